"""Self-Bench of one's own, without Ray: bad input, what is made again, and the folders of pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from diffitm.commands import selfbench as command
from diffitm.commands.selfbench import (
    Maker,
    SelfbenchConfig,
    find_makers,
    keep_settings,
    pictures_of,
    run,
)
from diffitm.commands.stages import pictures
from diffitm.commands.stages.pictures import Picture, PictureActor, Sampler, lacking
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.distributed import session
from diffitm.distributed.item_stage import WORK
from diffitm.distributed.stages import ItemCounter
from diffitm.models.loading import resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.specs import DiffusionSpec
from diffitm.tasks import selfbench
from tests.ranks import Handle
from tests.tiny import write_dit

LINES = [{"tag": "t", "prompt": text} for text in ("a red circle", "a blue square", "a cross")]


def message(*options: object) -> str:
    """What the command says of these options."""
    with pytest.raises(InputError) as raised:
        run(parse(SelfbenchConfig, [str(option) for option in options]))
    return raised.value.on_command_line()


def test_all_problems_at_once(tmp_path: Path) -> None:
    told = message(
        "--clip", "shapes", "--samples", 0, "--guidance", 3, 4, "--labels", tmp_path / "none.csv",
    )  # fmt: skip
    assert "give a --model, whose pictures" in told
    assert "--samples 0: must be at least 1" in told
    assert "--guidance: 2 for 0 of --model; give one, or one each" in told
    assert f"--labels: there is no file {tmp_path / 'none.csv'}" in told


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    given = ("--model", "shapes", "--out", tmp_path / "out", "--prompts")
    assert "there is no file" in message(*given, tmp_path / "none.jsonl")
    assert "must be shapes or a file that ends in .jsonl" in message(*given, tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_candidates_do_not_depend_on_the_tags_that_are_chosen(tmp_path: Path) -> None:
    """A thing that prompts of another tag alone have stands in, too."""
    things = ("bench", "cat", "dog", "kite")
    lines: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": name}], "prompt": f"a {name}"}
        for name in things
    ]
    both = [{"class": "bench"}, {"class": "cat"}]
    lines.append({"tag": "two_object", "include": both, "prompt": "a bench and a cat"})
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    whole = command.read_prompts(config(prompts=str(file)))
    some = command.read_prompts(config(prompts=str(file), tags=["two_object"]))
    assert some == whole[-1:]
    assert set(some[0][1]) == {
        "a bench and a cat", "a bench and a dog", "a bench and a kite", "a dog and a cat",
        "a kite and a cat",
    }  # fmt: skip


def test_models_that_make_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused by name before Ray starts."""
    monkeypatch.setattr(session, "connect", lambda *given, **more: pytest.fail("Ray was started"))
    folder = write_dit(tmp_path / "dit")
    told = message("--model", "shapes", folder, "--out", tmp_path / "out")
    assert f"--model {str(folder)!r}: a DiTPipeline makes no pictures of texts here" in told
    assert "StableDiffusion3Pipeline" in told and "DiT" not in told.split("as do")[1]


def table(items: list[Picture], start: int = 0) -> pa.Table:
    names = [json.dumps(picture) for picture in items]
    line = {"row": 3, "start": start, "names": names, "truth": [[]] * len(names)}
    return pa.Table.from_pylist([line], WORK)


@pytest.fixture
def spec(sd_folder: Path, tmp_path: Path) -> DiffusionSpec:
    return DiffusionSpec(resolve(str(sd_folder)), str(tmp_path), "diffusionitm", (500,))


def asked(count: int = 3) -> list[Picture]:
    prompts = selfbench.make_prompts(LINES, "x")
    return [
        Picture(
            f"f/{selfbench.picture_of(p.index, n)}", p.text, selfbench.picture_seed(0, p.index, n)
        )
        for p in prompts
        for n in range(count)
    ]


def made(actor: PictureActor, root: Path, items: list[Picture]) -> dict[str, np.ndarray]:
    actor.root = str(root)
    actor(table(items))
    return {p.path: np.asarray(Image.open(root / p.path), int) for p in items}


def test_pictures_depend_on_their_seed_alone(
    tmp_path: Path, sd: StableDiffusion, spec: DiffusionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte in whatever order and rows; in larger batches to one level of a colour."""
    monkeypatch.setattr(pictures, "load_denoiser", lambda *given: sd)
    handle: Any = Handle(ItemCounter())
    actor = PictureActor(spec, Sampler(2, 3.0, 1), str(tmp_path), "cpu", handle)
    items = asked()
    first = made(actor, tmp_path / "a", items)
    assert len({value.tobytes() for value in first.values()}) == len(items)
    second = made(actor, tmp_path / "b", items[4:][::-1]) | made(actor, tmp_path / "b", items[:4])
    assert all((first[path] == value).all() for path, value in second.items())
    several = PictureActor(spec, Sampler(2, 3.0, 3), str(tmp_path), "cpu", handle)
    for path, value in made(several, tmp_path / "c", items).items():
        assert np.abs(first[path] - value).max() <= 1


def test_only_what_is_not_whole_is_made(
    tmp_path: Path, spec: DiffusionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the driver's look and by an actor that is given a row again; a file that is cut off is not whole."""
    calls: list[tuple[str, list[int]]] = []

    class Model:
        def generate(self, prompt: str, seeds: Any, steps: int, guidance: float) -> list[Any]:
            assert (steps, guidance) == (7, 2.5)
            calls.append((prompt, list(seeds)))
            return [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds]

    monkeypatch.setattr(pictures, "load_denoiser", lambda *given: Model())
    items, counter = asked(2), ItemCounter()
    root, handle = str(tmp_path), Handle(counter)
    actor = PictureActor(spec, Sampler(7, 2.5, 2), root, "cpu", handle)  # type: ignore[arg-type]
    assert lacking(root, "f", items) == items
    found = actor(table(items, 5))
    assert found.schema == pictures.PICTURES and counter.count == 6
    assert found["position"].to_pylist() == list(range(5, 11))
    assert [prompt for prompt, _ in calls] == [line["prompt"] for line in LINES]
    assert calls[1] == (LINES[1]["prompt"], [items[2].seed, items[3].seed])
    assert lacking(root, "f", items) == []
    whole = (tmp_path / items[3].path).read_bytes()
    (tmp_path / items[3].path).write_bytes(whole[:-20])
    (tmp_path / items[4].path).unlink()
    assert lacking(root, "f", items) == items[3:5]
    calls.clear()
    actor(table(items))
    assert [seeds for _, seeds in calls] == [[items[3].seed], [items[4].seed]]
    assert (tmp_path / items[3].path).read_bytes() == whole
    assert {p.name for p in (tmp_path / "f" / "00000" / "samples").iterdir()} == {
        "00000.png", "00001.png",
    }  # fmt: skip


def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, spec: DiffusionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Model:
        def generate(self, prompt: str, seeds: Any, *given: Any) -> list[Any]:
            sizes.append(len(seeds))
            if len(seeds) > 1:
                raise RuntimeError("CUDA error: out of memory")
            return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(pictures, "load_denoiser", lambda *given: Model())
    handle: Any = Handle(ItemCounter())
    actor = PictureActor(spec, Sampler(7, 2.5, 4), str(tmp_path), "cpu", handle)
    actor(table(asked(3)[:3]))
    assert sizes == [3, 1, 1, 1]
    assert lacking(str(tmp_path), "f", asked(3)[:3]) == []


def config(**more: Any) -> SelfbenchConfig:
    return replace(SelfbenchConfig(model=["m"]), **more)


def test_other_settings_or_prompts_need_another_out(tmp_path: Path, spec: DiffusionSpec) -> None:
    """Pictures of two seeds, or of two texts, never lie in one folder; more prompts may come."""
    prompts = [(prompt, ()) for prompt in selfbench.make_prompts(LINES, "x")]
    maker, out = Maker(spec, 9.0, "outputs/9/m"), str(tmp_path)
    first = keep_settings(config(), maker, prompts[:2], out)
    assert (first["picture_seed"], first["guidance"], first["dtype"]) == (0, 9.0, "fp32")
    assert keep_settings(config(), maker, prompts, out) == first
    assert keep_settings(config(seed=5), maker, prompts[:1], out) == first  # that of scoring
    noted = json.loads((tmp_path / "outputs" / "9" / "m" / "settings.json").read_text())
    assert list(noted["prompts"]) == ["0", "1", "2"]
    with pytest.raises(
        InputError, match="holds pictures of picture_seed 0, or did, not 1: give another"
    ):
        keep_settings(config(picture_seed=1), maker, prompts, out)
    half = maker._replace(spec=replace(spec, dtype="bf16"))
    with pytest.raises(InputError, match="holds pictures of dtype fp32, or did, not bf16"):
        keep_settings(config(), half, prompts, out)
    other = [(replace(prompts[1][0], fields={"prompt": "b"}), ())]
    with pytest.raises(InputError, match="holds pictures of another prompt 1, or did, than"):
        keep_settings(config(), maker, other, out)


def test_pictures_of_others_are_never_mixed_in(tmp_path: Path, spec: DiffusionSpec) -> None:
    """Those that were there before, as Self-Bench's own are, and those that were deleted, whose scores are
    kept by their paths."""
    prompts = [(prompt, ()) for prompt in selfbench.make_prompts(LINES, "x")]
    maker, out = Maker(spec, 9.0, "outputs/9/m"), str(tmp_path)
    samples = tmp_path / "outputs" / "9" / "m" / "00000" / "samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(samples / "00000.png")
    with pytest.raises(InputError, match=r"m holds pictures and no settings.json, so others"):
        keep_settings(config(), maker, prompts, out)
    shutil.rmtree(tmp_path / "outputs")
    first = keep_settings(config(), maker, prompts, out)
    shutil.rmtree(tmp_path / "outputs")
    with pytest.raises(InputError, match="holds pictures of picture_seed 0, or did, not 1"):
        keep_settings(config(picture_seed=1), maker, prompts, out)
    assert keep_settings(config(), maker, prompts, out) == first


def test_folders_of_models(tmp_path: Path, spec: DiffusionSpec) -> None:
    """Named as Self-Bench's, by the end of a name; a LoRA is a model of its own, two timesteps are not."""
    source = replace(spec.source, name="org/stable-diffusion-v1-5")
    base = replace(spec, source=source)
    tuned = replace(base, lora_name="runs/one/best.safetensors")
    more = replace(base, timesteps=(1, 2))
    makers = find_makers(config(guidance=[4.5]), [source], [base, tuned, more])
    assert [maker.folder for maker in makers] == [
        "outputs/4.5/stable-diffusion-v1-5", "outputs/4.5/stable-diffusion-v1-5_one-best",
    ]  # fmt: skip
    other = replace(source, name="mine/stable-diffusion-v1-5")
    both = find_makers(config(guidance=[9.0, 4.0]), [source, spec.source], [base, spec])
    assert [maker.guidance for maker in both] == [9.0, 4.0]
    alike = find_makers(config(), [source, other], [base, tuned, replace(spec, source=other)])
    assert [maker.name for maker in alike] == [
        "org--stable-diffusion-v1-5", "stable-diffusion-v1-5_one-best", "mine--stable-diffusion-v1-5"
    ]  # fmt: skip
    names = ("my models/sd", "my_models/sd")
    same = [replace(spec, source=replace(source, name=name)) for name in names]
    with pytest.raises(InputError, match="my models/sd and my_models/sd both lie in my_models--sd"):
        find_makers(config(), [s.source for s in same], same)
    correct = replace(source, name="org/stable-diffusion-v1-5-correct")
    with pytest.raises(InputError, match="are both the task by_stable-diffusion-v1-5-correct"):
        find_makers(config(), [source, correct], [base, replace(spec, source=correct)])


def test_pictures_that_lie_there(tmp_path: Path, spec: DiffusionSpec) -> None:
    """By the paths that labels name them with, whatever prompts are chosen."""
    maker = Maker(spec, 9.0, "outputs/9/m")
    assert pictures_of(maker, str(tmp_path)) == []
    for name in ("00007/samples/00001.png", "00007/metadata.jsonl", "settings.json"):
        file = tmp_path / maker.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    assert pictures_of(maker, str(tmp_path)) == ["outputs/9/m/00007/samples/00001.png"]


def test_tasks_of_pictures(tmp_path: Path, spec: DiffusionSpec) -> None:
    """A line a picture; the correct ones are a task of their own, a model without any has none."""
    prompts = selfbench.make_prompts(LINES, "x")
    pairs = list(zip(prompts, selfbench.candidates(prompts), strict=True))
    maker = Maker(spec, 9.0, "outputs/9/m")
    lines = selfbench.choices(pairs, maker.folder, 2)
    assert lines[3] == {
        "image": "outputs/9/m/00001/samples/00001.png",
        "texts": ["a blue square", "a red circle", "a cross"],
        "right": 0,
        "tag": "t",
        "cluster": "00001",
    }
    labels = {line["image"]: number < 2 for number, line in enumerate(lines)}
    found = command.write_tasks(maker, lines, labels, str(tmp_path))
    assert [(g.task, g.correct) for g in found.values()] == [
        ("by_m", False),
        ("by_m-correct", True),
    ]
    whole, right = ([json.loads(x) for x in Path(uri).read_text().splitlines()] for uri in found)
    assert whole == lines and right == lines[:2]
    shown = next(iter(found.values())).shown
    assert shown == {"a red circle": [line["image"] for line in lines[:2]]}
    none = command.write_tasks(maker, lines, dict.fromkeys(labels, False), str(tmp_path))
    assert [g.task for g in none.values()] == ["by_m"]
