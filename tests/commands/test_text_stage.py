"""Texts that are encoded before they are scored: the scores, what a killed stage leaves, which models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load, save_file

from diffitm.commands import selfbench
from diffitm.commands.stages import encode
from diffitm.commands.stages.encode import Encoder, encode_more_texts
from diffitm.commands.text_stage import TextPlaces, with_texts
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import RACES, WORK, PairRow
from diffitm.distributed import item_stage, session
from diffitm.distributed.item_stage import ItemStage
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import ItemCounter
from diffitm.evaluation.options import GdbenchConfig, check_models, check_options
from diffitm.models.loading import ModelSource, load_denoiser, resolve
from diffitm.models.lora import text_encoders
from diffitm.scoring.encoded_items import CACHED, Cache
from diffitm.scoring.scorer import RowScorer
from diffitm.scoring.specs import DiffusionSpec
from diffitm.store.pair_table import WorkTable, work_texts
from tests import families, tiny
from tests.ranks import Handle

POOL = ActorPool(1, 1, 1.0, 0.0)
TEXTS = ["a red circle on a blue square", "", "two birds", "a cup beside the plate and a spoon"]
FLOW, TABLE = (600.0, 200.0), (600, 200)
MODELS: dict[str, tuple[Callable[[Path], Path], tuple[float, ...]]] = {
    "SD": (tiny.write_sd, TABLE),
    "SD3": (families.write_sd3, FLOW),
    "Lumina2": (families.write_lumina2, FLOW),  # texts of their own lengths
}


class KilledError(Exception):
    """Stands for a kill of the run."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The stage in this process, a file a row; the names of each time that it was asked."""
    asked = list[list[str]]()

    def run_items(stage: ItemStage, names: list[str], pool: ActorPool) -> str:
        asked.append(names)
        actor = stage.worker(*stage.arguments, "cpu", Handle(ItemCounter()))
        storage.make_folder(stage.folder)
        found, folder = storage.filesystem(stage.folder)
        size = stage.items_per_row
        for row, start in enumerate(range(0, len(names), size)):
            own = names[start : start + size]
            line = {"row": row, "start": start, "names": own, "truth": [[]] * len(own)}
            table = actor(pa.Table.from_pylist([line], item_stage.WORK))
            path = f"{folder}/{row}.parquet"
            parquet.write_table(table, path, filesystem=found, row_group_size=stage.row_group)
            if "killed" in own:
                whole = storage.read_bytes(storage.join(stage.folder, f"{row}.parquet"))
                storage.write_bytes(storage.join(stage.folder, f"{row}.parquet"), whole[:-20])
                raise KilledError
        return stage.folder

    monkeypatch.setattr(encode, "run_items", run_items)
    return asked


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        tiny.write_image(tmp_path / "images" / f"{i}.png", seed=i)
    return tmp_path / "images"


def rows() -> list[PairRow]:
    return [PairRow(i, f"{i}.png", TEXTS[i:]) for i in range(3)]


def work(folder: Path, texts: list[str] = TEXTS) -> WorkTable:
    lines = [{"image": "a.png", "text": text} for text in texts]
    parquet.write_table(pa.Table.from_pylist(lines, WORK), folder / "work.parquet")
    return WorkTable(str(folder / "work.parquet"), 1, len(texts))


def values(spec: DiffusionSpec) -> dict[tuple[str, str], Any]:
    return by_pair(spec.build("cpu"))


def by_pair(scorer: RowScorer) -> dict[tuple[str, str], Any]:
    lines = scorer.score(rows())
    return {(line["image"], line["text"]): (line["failure"], line["l2"]) for line in lines}


def is_same(one: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> bool:
    assert one.keys() == other.keys() and len(one) == 9
    assert all(failure is None and len(l2) == 2 for failure, l2 in one.values())
    return all((one[pair][1] == other[pair][1]).all() for pair in one)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("empty", ["text", "zeros"])
def test_scores_are_those_of_resident_encoders(
    name: str, empty: str, root: Path, asked: list[list[str]]
) -> None:
    """Bit for bit, whatever the batch of forwards, by a scorer that has no text encoders."""
    write, steps = MODELS[name]
    source = resolve(str(write(root / "model")))
    spec = DiffusionSpec(source, str(root), "snr", steps, empty=empty)
    staged = with_texts(replace(spec, staged=True), work(root), str(root / "out"), POOL)
    assert [sorted(names) for names in asked] == [sorted(TEXTS)]
    assert staged.store_config() == spec.store_config()
    built: Any = staged.build("cpu")
    assert {p.device.type for e in text_encoders(built.denoiser) for p in e.parameters()} == {
        "meta"
    }
    assert is_same(values(staged), values(spec))
    # Resident encoders read as many texts at once as a forward has pairs, which may round otherwise.
    small: Any = replace(spec, batch_size=2).build("cpu")
    small.texts.batch.size = 64
    assert is_same(values(replace(staged, batch_size=2)), by_pair(small))


@pytest.mark.parametrize("kind", ["path", "memory://"])
def test_a_killed_stage_goes_on(
    kind: str,
    tmp_path: Path,
    sd_folder: Path,
    asked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the files that are whole; a later run asks for what is new alone."""
    monkeypatch.setitem(encode.AT_ONCE, "text", 2)
    out = str(tmp_path / "out") if kind == "path" else f"memory://{tmp_path.name}/out"
    encoder = Encoder(resolve(str(sd_folder)), None, "fp32", "", "squash")
    with pytest.raises(KilledError):
        encode_more_texts(out, ["", "a", "b", "killed", "c"], encoder, POOL)
    folders = encode_more_texts(out, ["", "a", "b", "bird", "c"], encoder, POOL)
    assert asked == [["", "a", "b", "killed", "c"], ["b", "bird", "c"]]
    assert encode_more_texts(out, ["c", "a"], encoder, POOL) == folders
    more = encode_more_texts(out, ["c", "d", "a"], encoder, POOL)
    assert asked[2:] == [["d"]] and more[:-1] == folders
    assert all(storage.below(folder, out).startswith("work/texts-") for folder in more)
    cache, model = Cache(*more), load_denoiser(encoder.source)
    assert sorted(cache.place) == ["", "a", "b", "bird", "c", "d"] and not cache.failures
    for text in cache.place:
        assert torch.equal(cache([text])["hidden"], model.encode_texts([text])["hidden"])
    other = replace(encoder, dtype="bf16")
    encode_more_texts(out, ["a"], other, POOL)
    assert asked[3:] == [["a"]]


def test_a_lora_of_text_encoders(root: Path, sd_folder: Path, asked: list[list[str]]) -> None:
    """Its texts are its own; one of the network alone reads those of the base."""
    source = resolve(str(sd_folder))
    whole: Any = load_denoiser(source)
    weights = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 32,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q": None,
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, width in weights.items():
        module = whole.unet.get_submodule(name.removeprefix("unet.")) if width is None else None
        out, into = module.weight.shape if module else (width, width)
        for side, shape in (("lora_A", (2, into)), ("lora_B", (out, 2))):
            tensors[f"{name}.{side}.weight"] = torch.randn(shape, generator=generator)
    spec = DiffusionSpec(source, str(root), "snr", TABLE)
    found = list[Any]()
    for kept in ("unet.", ""):
        file = root / f"lora{kept}.safetensors"
        save_file({k: v for k, v in tensors.items() if k.startswith(kept)}, file)
        own = replace(spec, lora=str(file))
        staged = with_texts(replace(own, staged=True), work(root), str(root / "out"), POOL)
        found.append(values(staged))
        assert is_same(found[-1], values(own))
    base = with_texts(replace(spec, staged=True), work(root), str(root / "out"), POOL)
    assert is_same(values(base), values(spec))
    assert len(asked) == 2, "the base and the network's LoRA have the same texts"
    assert not is_same(*found) and not is_same(found[0], values(base))


def test_a_text_that_has_no_embedding(root: Path, sd_folder: Path, asked: list[list[str]]) -> None:
    """Costs its own pairs, with the reason that the stage had."""
    spec = DiffusionSpec(resolve(str(sd_folder)), str(root), "snr", TABLE)
    staged = with_texts(replace(spec, staged=True), work(root), str(root / "out"), POOL)
    (folder,) = staged.encoded
    (file,) = Path(folder).iterdir()
    lines = parquet.read_table(file).to_pylist()
    for line in lines:
        if line["name"] == "two birds":
            line |= {"value": None, "failure": "no class"}
    parquet.write_table(pa.Table.from_pylist(lines, CACHED), file, row_group_size=4)
    found, expected = values(staged), values(spec)
    for (image, text), (failure, l2) in found.items():
        assert failure == ("no class" if text == "two birds" else None)
        if not failure:  # in batches of other pairs
            np.testing.assert_allclose(l2, expected[image, text][1], rtol=1e-5)


class Picky(tiny.Fixed):
    """Refuses the texts that begin with a dash."""

    def refuses(self, text: str) -> str | None:
        return f"no class {text}" if text.startswith("-") else None


def test_an_encoder_tells_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its own reason, the others their own values."""
    model = Picky(tiny.schedule())
    monkeypatch.setattr(encode, "load_denoiser", lambda *given: model)
    actor = encode.EncodeActor(
        "text", Encoder(resolve("shapes"), None, "fp32", "", "squash"), "cpu", Handle(ItemCounter())
    )
    line = {"row": 0, "start": 0, "names": ["a", "-b", "cc"], "truth": [[], [], []]}
    found = actor(pa.Table.from_pylist([line], item_stage.WORK)).to_pylist()
    assert [line["failure"] for line in found] == [None, "no class -b", None]
    assert [line["value"] is None for line in found] == [False, True, False]
    values = [load(line["value"])["hidden"] for line in found if line["value"]]
    assert all(
        torch.equal(value, model.encode_texts([text])["hidden"][0])
        for value, text in zip(values, ("a", "cc"), strict=True)
    )


def test_large_encoders_write_few_texts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of theirs lies in memory: of FLUX.2-dev a text has 16 MB."""
    stages = list[ItemStage]()
    monkeypatch.setattr(encode, "run_items", lambda stage, *given: stages.append(stage) or "")
    source = resolve("shapes")
    for count in (2 * 10**9, 2 * 10**9 + 1):
        large = replace(source, sizes=(("unet", 10**11), ("text_encoder", count)))
        out = f"memory://large{count}/out"
        encode_more_texts(out, ["a"], Encoder(large, None, "fp32", "", "squash"), POOL)
    assert [(s.items_per_row, s.rows_per_block, s.row_group) for s in stages] == [
        (64, 4, 4), (16, 1, 4),
    ]  # fmt: skip


def test_texts_of_a_work_table(tmp_path: Path) -> None:
    """Each once, of pairs and of races."""
    assert list(work_texts(work(tmp_path, ["b", "", "b", "a"]))) == ["", "a", "b"]
    lines = [{"row": 0, "texts": ["b", ""]}, {"row": 1, "texts": ["c", "b"]}]
    parquet.write_table(pa.Table.from_pylist(lines, RACES), tmp_path / "races.parquet")
    table = WorkTable(str(tmp_path / "races.parquet"), 2, 4)
    assert list(work_texts(table)) == ["", "b", "c"]


def sized(source: ModelSource) -> DiffusionSpec:
    """Of 64 GB of network, 1 of VAE and 47 of text encoder in bf16."""
    sizes = (("transformer", 32 * 10**9), ("vae", 5 * 10**8), ("text_encoder", 235 * 10**8))
    return DiffusionSpec(replace(source, sizes=sizes), "", "snr", FLOW, dtype="bf16")


@pytest.mark.parametrize(
    ("where", "gpus", "free", "expected"),
    [
        ("auto", 1.0, [141, 150], False),
        ("auto", 1.0, [80], True),
        ("auto", 1.0, [150, 80], True),  # of two kinds of nodes
        ("auto", 0.5, [141], True),  # two actors on a GPU
        ("auto", 1.0, [], False),  # torch sees none: an actor says so
        ("auto", 0.0, [80], False),
        ("stage", 1.0, [150], True),
        ("stage", 0.0, [80], True),
        ("resident", 1.0, [80], False),
    ],
)
def test_where_texts_are_encoded(
    where: str, gpus: float, free: list[int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights of both sides and what the GPUs have free."""
    monkeypatch.setattr(session, "free_gpu_memory", lambda asked: [f * 10**9 for f in free])
    specs = [sized(resolve("shapes"))] * 2
    placed = TextPlaces(where, ActorPool(1, 1, 1.0, gpus)).place(specs)
    assert [spec.staged for spec in placed] == [expected] * 2


def test_no_gpu_is_asked_about_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(gpus: float) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(session, "free_gpu_memory", ask)
    spec = sized(resolve("shapes"))
    small = replace(spec, source=replace(spec.source, sizes=(("unet", 10**9), ("vae", 10**9))))
    places = TextPlaces("auto", ActorPool(1, 1, 1.0, 1.0))
    assert [one.staged for one in places.place([small])] == [False]
    with pytest.raises(AssertionError):
        places.place([spec])


def test_what_no_gpu_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told before a text is encoded, by what the stage needs."""
    spec, free = sized(resolve("shapes")), [64]
    monkeypatch.setattr(session, "free_gpu_memory", lambda asked: [f * 10**9 for f in free])
    pool = ActorPool(1, 1, 1.0, 1.0)
    told = (
        r"network and VAE are 65\.0 GB in bf16, its text encoders 47\.0 GB, a GPU has 64\.0 GB free"
    )
    for where in ("auto", "stage"):
        with pytest.raises(InputError, match=told):
            TextPlaces(where, pool).place([spec])
    free[:] = [80]
    with pytest.raises(InputError, match="and images are made with both on one GPU"):
        TextPlaces("auto", pool, generates=True).place([spec])
    labelled = resolve(str(tiny.write_dit(tmp_path / "dit")))
    dit = replace(spec, source=labelled)
    assert [one.staged for one in TextPlaces("auto", pool).place([dit])] == [False]
    with pytest.raises(InputError, match="has no text encoders") as found:
        TextPlaces("stage", pool).place([dit])
    assert found.value.on_command_line().startswith("--text-encoders stage: ")


def test_options() -> None:
    """What cannot go with the stage is refused by name."""
    config = GdbenchConfig(model=["shapes"], text_encoders="stage")
    assert check_models(config) == []
    check_options(config)
    with pytest.raises(InputError, match="--text-encoders stage: images of --prompts are made"):
        check_options(replace(config, prompts=["a cup"]))
    check_options(replace(config, prompts=["a cup"], text_encoders="auto"))
    clips = replace(config, model=[], clip=["shapes"])
    assert check_models(clips) == ["--text-encoders is of diffusion models: give a --model"]
    making = selfbench.SelfbenchConfig(model=["shapes"], text_encoders="stage")
    with pytest.raises(InputError, match="--text-encoders stage: pictures are made"):
        selfbench.run(making)
