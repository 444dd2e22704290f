"""What the actors of the other stages make of a table, without Ray."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load

from diffitm.commands.stages import embed, encode, propose
from diffitm.commands.stages.embed import Gallery, SearchActor
from diffitm.commands.stages.encode import EncodeActor, Encoder
from diffitm.commands.stages.propose import MADE, RuleActor
from diffitm.commands.stages.sample import SAMPLES, SampleActor, Sampling, read_samples
from diffitm.distributed import item_stage
from diffitm.distributed.item_stage import WORK, ItemStage, run_items, work_folder
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import ItemCounter
from diffitm.models.loading import resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.negatives.rules import rules
from diffitm.retrieval.candidate_lists import FOUND
from diffitm.retrieval.exact_knn import EMBEDDINGS
from diffitm.scoring.diffusion import to_input
from diffitm.scoring.encoded_items import CACHED
from tests.ranks import Handle
from tests.tiny import write_image


def table(*lines: tuple[int, int, list[str]]) -> pa.Table:
    """Groups of (row, start, names)."""
    content = [{"row": r, "start": s, "names": n, "truth": [[]] * len(n)} for r, s, n in lines]
    return pa.Table.from_pylist(content, WORK)


def places(found: pa.Table) -> list[tuple[int, int]]:
    return list(zip(found["row"].to_pylist(), found["position"].to_pylist(), strict=True))


def test_encoded_images_and_texts(
    tmp_path: Path, sd_folder: Path, sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its own mean and deviation, or why it has none; each its own text."""
    monkeypatch.setattr(encode, "load_denoiser", lambda *given: sd)
    for i in (0, 2, 3):
        write_image(tmp_path / f"{i}.png", seed=i, size=(40, 30))
    (tmp_path / "1.png").write_bytes(b"none")
    encoder = Encoder(resolve(str(sd_folder)), None, "fp32", str(tmp_path), "crop")
    counter = ItemCounter()
    actor = EncodeActor("image", encoder, "cpu", Handle(counter))
    given = table((5, 10, ["0.png", "1.png", "2.png"]), (6, 13, ["3.png"]), (7, 14, ["1.png"]))
    found = actor(given)
    assert found.schema == CACHED and counter.count == 5
    assert places(found) == [(5, 10), (5, 11), (5, 12), (6, 13), (7, 14)]
    assert found["name"].to_pylist() == ["0.png", "1.png", "2.png", "3.png", "1.png"]
    lines = found.to_pylist()
    assert [line["failure"] is None for line in lines] == [True, False, True, True, False]
    assert [line["value"] is None for line in lines] == [False, True, False, False, True]
    for line in lines[:1] + lines[2:4]:
        pixels = to_input(Image.open(tmp_path / line["name"]), sd, "crop")
        mean, deviation = sd.encode_posterior(pixels[None])
        values = load(line["value"])
        torch.testing.assert_close(values["mean"], mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values["deviation"], deviation[0], atol=1e-5, rtol=1e-4)
    texts = EncodeActor("text", encoder, "cpu", Handle(counter))(table((0, 3, ["a cup", ""])))
    for text, line in zip(("a cup", ""), texts.to_pylist(), strict=True):
        expected = sd.encode_texts([text])["hidden"][0]
        torch.testing.assert_close(load(line["value"])["hidden"], expected, atol=1e-5, rtol=1e-4)


def test_captions_by_rule() -> None:
    counter = ItemCounter()
    captions = ["a red bus near a blue house", "Two men.", "a dog chases a cat"]
    found = RuleActor(7, "cpu", Handle(counter))(table((0, 4, captions[:2]), (1, 6, captions[2:])))
    assert found.schema == MADE and counter.count == 3
    assert places(found) == [(0, 4), (0, 5), (1, 6)]
    for caption, line in zip(captions, found.to_pylist(), strict=True):
        assert dict(zip(line["kinds"], line["captions"], strict=True)) == rules(caption, 7)


def test_captions_by_rule_come_back_by_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever file and in whatever order."""
    captions = ["a", "b", "c"]

    def run_items(stage: ItemStage, names: list[str], pool: ActorPool) -> None:
        folder = stage.folder
        assert names == captions
        Path(folder).mkdir(parents=True)
        for number, positions in enumerate(([2], [1, 0])):
            lines = [
                {"row": 0, "position": p, "captions": [f"not {p}"], "kinds": ["k"]}
                for p in positions
            ]
            parquet.write_table(pa.Table.from_pylist(lines, MADE), f"{folder}/{number}.parquet")

    monkeypatch.setattr(propose, "run_items", run_items)
    pool = ActorPool(1, 1, 1.0, 0.0)
    found = propose.by_rule(str(tmp_path / "out"), captions, 0, pool)
    assert found == {c: {"k": f"not {p}"} for p, c in enumerate(captions)}


def test_samples_of_prompts(tmp_path: Path) -> None:
    """One PNG a seed, in the order of the seeds and of the prompts."""

    def generate(prompt: str, seeds: Any, steps: int, guidance: float) -> list[Image.Image]:
        assert (steps, guidance) == (9, 2.5)
        return [Image.new("RGB", (1, 1), (len(prompt), seed, 0)) for seed in seeds]

    model = SimpleNamespace(generate=generate)
    spec: Any = SimpleNamespace(painter=lambda device: model)
    counter = ItemCounter()
    actor = SampleActor(spec, Sampling(3, 9, 2.5), "cpu", Handle(counter))
    first, second = actor(table((0, 0, ["a"]))), actor(table((1, 1, ["bb"]), (2, 2, ["ccc"])))
    assert counter.count == 3 and first.schema == SAMPLES
    assert places(second) == [(1, 1), (2, 2)]
    parquet.write_table(second, tmp_path / "0.parquet")
    parquet.write_table(first, tmp_path / "1.parquet")
    found = read_samples(str(tmp_path))
    assert list(found) == ["a", "bb", "ccc"]
    for prompt, images in found.items():
        pixels = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in images]
        assert pixels == [(len(prompt), seed, 0) for seed in range(3)]


def embedded(values: dict[int, list[float] | None], truth: dict[int, list[int]]) -> pa.Table:
    lines = [
        {
            "row": 0, "position": p, "truth": truth.get(p, []),
            "failure": None if v else "cut off",
            "embedding": np.array(v, "<f4").tobytes() if v else None,
        }
        for p, v in values.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(lines, EMBEDDINGS)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (None, [[1, 2, 3], [], [3, 2, 1]]),
        (0, [[2, 3], [], [3, 1]]),
        (1, [[1, 2, 3], [], [3, 1]]),
    ],
)
def test_a_search_leaves_out_what_is_true(
    tmp_path: Path, keep: int | None, expected: list[list[int]]
) -> None:
    """From the place `keep` on, or nothing; what cannot be read finds none and is found by none."""
    gallery = embedded({1: [1.0, 0.0], 2: [0.8, 0.6], 3: [0.0, 1.0], 4: None}, {})
    parquet.write_table(gallery, tmp_path / "g.parquet")
    queries = embedded({7: [1.0, 0.0], 8: None, 9: [0.0, 1.0]}, {7: [1], 9: [2, 2]})
    counter = ItemCounter()
    where = Gallery(str(tmp_path), [str(tmp_path / "g.parquet")], 4)
    found = SearchActor(where, 3, keep, "cpu", Handle(counter))(queries)
    assert found.schema == FOUND and counter.count == 3
    assert found["position"].to_pylist() == [7, 8, 9]
    assert found["candidates"].to_pylist() == expected


def test_unreadable_items_and_results_in_order(tmp_path: Path) -> None:
    table = embedded({5: None, 1: [1.0], 0: None}, {})
    parquet.write_table(table, tmp_path / "0.parquet")
    assert embed.failures(Gallery(str(tmp_path), [], 3)) == {0: "cut off", 5: "cut off"}


@pytest.mark.parametrize(
    ("count", "size", "together", "actors", "rows", "blocks"),
    [
        (100, 10, 4, 1, 2, 5),  # ten rows, for eight blocks of an actor
        (1000, 10, 4, 1, 4, 25),
        (1001, 10, 4, 1, 4, 26),
        (3, 10, 4, 8, 1, 1),
    ],
)
def test_rows_of_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    count: int, size: int, together: int, actors: int, rows: int, blocks: int,
) -> None:  # fmt: skip
    """Each item once with what is true for it; blocks for all actors, none too long."""
    stages: list[Any] = []
    monkeypatch.setattr(item_stage, "run_stage", lambda *given: stages.append(given))
    names, truth = [f"n{i}" for i in range(count)], [[i] for i in range(count)]
    folder = str(tmp_path / "made" / "out")
    pool = ActorPool(actors, 99, 1.0, 0.0)
    items = ItemStage("x", folder, MADE, int, (1,), size, together, 7)
    assert run_items(items, names, pool, truth) == folder
    ((stage, actor, arguments, given),) = stages
    assert (stage.rows, stage.blocks, stage.total, stage.together) == (rows, blocks, count, 7)
    assert (stage.out, stage.column, stage.schema) == (folder, "row", MADE)
    assert (actor, arguments, given) == (int, (1,), pool)
    lines = parquet.read_table(tmp_path / "made" / "work.parquet").to_pylist()
    assert [line["row"] for line in lines] == list(range(-(-count // size)))
    for line in lines:
        own = slice(line["start"], line["start"] + size)
        assert line["start"] == line["row"] * size
        assert (line["names"], line["truth"]) == (names[own], truth[own])
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["work.parquet"]
    # Another size than that of the first run does not cut the rows anew.
    run_items(items._replace(items_per_row=size + 1), names, pool, truth)
    assert parquet.read_table(tmp_path / "made" / "work.parquet").to_pylist() == lines


def test_a_work_folder_is_that_of_its_settings(tmp_path: Path) -> None:
    out = str(tmp_path / "runs" / "a")
    folders = [work_folder(out, "x", {"seed": seed}) for seed in (0, 1, 0)]
    assert folders[0] == folders[2] != folders[1]
    assert work_folder(str(tmp_path / "runs" / "b"), "x", {"seed": 0}) == folders[0]
    assert folders[0].startswith(str(tmp_path / "runs" / "work" / "x-"))
    assert (Path(folders[1]) / "_config.json").read_text() == '{\n "seed": 1\n}'
