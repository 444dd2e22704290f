"""Storage, the score store, the pair table, and results made of hand-written scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.evaluation import evaluate
from diffitm.metrics.intervals import wilson
from diffitm.store import blocks, pair_table
from diffitm.store.join import read_examples
from diffitm.store.score_store import Store, open_store, read_store
from diffitm.store.stored_lines import StoredLines
from tests.tiny import read_images, score_row, write_scores

DIFFUSION = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10, 110], "seed": 0}
CLIP = {"kind": "clip", "weights": "abc"}


# --- storage


def test_interrupted_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither half of the new content nor a part file stays."""
    path = str(tmp_path / "deep" / "a.json")
    storage.write_text(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write_text(path, "new")
    assert storage.read_text(path) == "old"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["path", "file://", "memory://"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    """The same calls on a plain path, pyarrow's file system and fsspec's."""
    root = {"path": str(tmp_path), "file://": tmp_path.as_uri(), "memory://": "memory://round"}[
        kind
    ]
    path = storage.join(root, "a", "b.bin")
    assert not storage.exists(path)
    assert storage.files(storage.join(root, "a")) == []
    storage.make_folder(storage.join(root, "a"))
    storage.write_bytes(path, b"\x1f\x8b not really gzip")
    storage.write_text(storage.join(root, "a", "c.json"), "é")
    assert storage.read_bytes(path) == b"\x1f\x8b not really gzip"
    assert storage.read_text(storage.join(root, "a", "c.json")) == "é"
    assert storage.exists(path)
    assert [f.rsplit("/", 1)[-1] for f in storage.files(storage.join(root, "a"))] == [
        "b.bin",
        "c.json",
    ]
    assert len(storage.files(storage.join(root, "a"), ".json")) == 1
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "a", "absent"))


def test_unknown_scheme() -> None:
    with pytest.raises(InputError, match="cannot open 'nowhere://a/b'"):
        storage.exists("nowhere://a/b")


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf{}")
    assert storage.read_text(str(tmp_path / "a.txt")) == "{}"


def test_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out/x") == f"{tmp_path}/out/x"
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"


def test_readable_parquet_skips_cut_files(tmp_path: Path) -> None:
    table = pa.table({"row": list(range(100))})
    parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"not Parquet at all")
    good, broken = storage.readable_parquet(str(tmp_path))
    assert [Path(p).name for p in good] == ["a.parquet"]
    assert [Path(p).name for p in broken] == ["b.parquet", "c.parquet"]


# --- the store


def test_store_of_another_configuration_lies_elsewhere(tmp_path: Path) -> None:
    first = open_store(str(tmp_path), "a/model", DIFFUSION)
    again = open_store(str(tmp_path), "a/model", DIFFUSION)
    other = open_store(str(tmp_path), "a/model", {**DIFFUSION, "seed": 1})
    assert first == again
    assert first.uri != other.uri
    assert first.name.startswith("model-")
    assert read_store(first.uri) == first
    assert first.similarity is None


@pytest.mark.parametrize(
    ("model", "slug"),
    [("org/My_model v1.5/", "My-model-v1-5"), ("-x-", "x"), ("a" * 50, "a" * 40), ("é/Ä1", "1")],
)
def test_a_store_is_named_by_its_model(tmp_path: Path, model: str, slug: str) -> None:
    """The last part of a path; letters and digits alone."""
    store = open_store(str(tmp_path), model, CLIP)
    assert store.name.rpartition("-")[0] == slug
    assert (store.model, store.similarity, read_store(store.uri)) == (model, "cosine", store)


def test_store_refuses_scores_of_another_configuration(tmp_path: Path) -> None:
    """An edited _config.json is noticed; the message names every field that differs."""
    store = open_store(str(tmp_path), "m", DIFFUSION)
    note = Path(store.uri) / "_config.json"
    content = json.loads(note.read_text())
    del content["protocol"]
    note.write_text(json.dumps({**content, "seed": 5}))
    with pytest.raises(InputError, match=r"\(protocol, seed differ\)"):
        open_store(str(tmp_path), "m", DIFFUSION)


def test_scores_without_a_config_are_not_taken(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(store, [score_row("a", "x", [1.0])])
    (Path(store.uri) / "_config.json").unlink()
    with pytest.raises(InputError, match=r"holds scores but no _config\.json"):
        open_store(str(tmp_path), "m", DIFFUSION)
    with pytest.raises(InputError, match="is not the config of a score store"):
        read_store(store.uri)


# --- the pair table


def text_example(name: str, image: str, *texts: str) -> Example:
    return Example(name, (image,), texts, "text", cluster=image)


def image_example(name: str, text: str, *images: str) -> Example:
    return Example(name, images, (text,), "image", cluster=images[0])


def written(tmp_path: Path, task: str, *examples: Example, limit: int | None = None) -> str:
    return pair_table.write_examples(task, iter(examples), str(tmp_path / "examples"), limit)[0]


def work_rows(work: pair_table.WorkTable) -> list[tuple[str, list[str]]]:
    rows = read_images(work.uri)
    assert (len(rows), sum(len(row.texts) for row in rows)) == (work.images, work.pairs)
    return [(row.image, row.texts) for row in rows]


@pytest.fixture
def two_tasks(tmp_path: Path) -> list[str]:
    """Image a and the text 'x' occur in both tasks; only the second compares images."""
    first = written(
        tmp_path, "one", text_example("0", "a", "x", "y"), text_example("1", "c", "x", "z")
    )
    second = written(
        tmp_path, "two", image_example("0", "x", "a", "b"), image_example("1", "w", "b", "a")
    )
    return [first, second]


def test_shared_pairs_are_scored_once(tmp_path: Path, two_tasks: list[str]) -> None:
    """Unique pairs over both tasks, grouped by image; '' once an image and only where needed."""
    store = open_store(str(tmp_path), "m", DIFFUSION)
    work = pair_table.write_work(two_tasks, store, str(tmp_path / "work.parquet"))
    assert work_rows(work) == [
        ("a", ["", "w", "x", "y"]),
        ("b", ["", "w", "x"]),
        ("c", ["x", "z"]),
    ]
    assert (work.images, work.pairs) == (3, 9)


def test_clip_needs_no_unconditional_pair(tmp_path: Path, two_tasks: list[str]) -> None:
    store = open_store(str(tmp_path), "c", CLIP)
    work = pair_table.write_work(two_tasks, store, str(tmp_path / "work.parquet"))
    assert work_rows(work) == [("a", ["w", "x", "y"]), ("b", ["w", "x"]), ("c", ["x", "z"])]


def test_stored_pairs_are_left_out_and_failed_ones_tried_again(
    tmp_path: Path, two_tasks: list[str]
) -> None:
    """Cut files count as nothing; a pair that failed and later succeeded is done."""
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(
        store,
        [
            score_row("a", "", [1.0, 2.0]),
            score_row("a", "x", [1.0, 2.0]),
            score_row("a", "y", failure="there is no such file"),
            score_row("b", "w", failure="first try"),
        ],
    )
    write_scores(store, [score_row("b", "w", [1.0, 2.0])], "part-1")
    cut = (Path(store.uri) / "part-1.parquet").read_bytes()
    (Path(store.uri) / "part-2.parquet").write_bytes(cut[:-20])
    work = pair_table.write_work(two_tasks, store, str(tmp_path / "work.parquet"))
    assert work_rows(work) == [("a", ["w", "y"]), ("b", ["", "x"]), ("c", ["x", "z"])]


def test_nothing_left(tmp_path: Path) -> None:
    uri = written(tmp_path, "one", text_example("0", "a", "x", "y"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(store, [score_row("a", "x", [1.0]), score_row("a", "y", [1.0])])
    work = pair_table.write_work([uri], store, str(tmp_path / "work.parquet"))
    assert (work.images, work.pairs) == (0, 0)
    assert work_rows(work) == []


def test_texts_are_pairs_of_their_own_whatever_they_hold(tmp_path: Path) -> None:
    """Quotes, other scripts and differences in case or in blanks are kept apart."""
    texts = ('It\'s "so"', "Ein Bär", "ein bär", "ein bär ", "猫; DROP TABLE p", "a\nb")
    uri = written(tmp_path, "one", text_example("0", "a", *texts))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    rows = work_rows(pair_table.write_work([uri], store, str(tmp_path / "work.parquet")))
    assert len(rows) == 1
    assert sorted(rows[0][1]) == sorted(texts)


def test_blank_caption_is_a_failure_without_work(tmp_path: Path) -> None:
    """It would be scored as the unconditional pair."""
    uri = written(
        tmp_path, "clevr", text_example("0", "a", "x", "  "), text_example("1", "b", "x", "y")
    )
    store = open_store(str(tmp_path), "m", DIFFUSION)
    rows = work_rows(pair_table.write_work([uri], store, str(tmp_path / "work.parquet")))
    assert rows == [("b", ["x", "y"])]
    reasons = [(e.id, e.failure) for e in read_examples(uri)]
    assert reasons == [("0", "caption 1 is empty"), ("1", None)]


def test_a_failure_of_its_own_is_kept_and_an_example_alone_is_its_own_cluster(
    tmp_path: Path,
) -> None:
    lost = Example("0", ("a",), ("x", " "), "text", failure="no such object")
    uri = written(tmp_path, "t", lost, Example("1", ("a",), ("x", "y"), "text"))
    reasons = [(e.cluster, e.failure) for e in read_examples(uri)]
    assert reasons == [("0", "no such object"), ("1", None)]


def test_tables_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions and rows are counted on; the name depends on every batch."""
    monkeypatch.setattr(pair_table, "BATCH", 2)
    monkeypatch.setattr(pair_table, "ROW_GROUP", 3)
    folder, examples = (
        str(tmp_path / "examples"),
        [text_example(str(n), f"i{n}", "x", "y") for n in range(5)],
    )
    uri, total = pair_table.write_examples("t", examples, folder, None)
    assert total == 5
    lines = parquet.read_table(uri).to_pylist()
    assert [(line["position"], line["id"]) for line in lines] == [(n, str(n)) for n in range(5)]
    for n in (0, 4):
        other = [text_example(e.id, "z", "x", "y") if e.id == str(n) else e for e in examples]
        assert pair_table.write_examples("t", other, folder, None)[0] != uri
    store = open_store(str(tmp_path), "m", DIFFUSION)
    work = pair_table.write_work([uri], store, str(tmp_path / "work.parquet"))
    assert work_rows(work) == [(f"i{n}", ["x", "y"]) for n in range(5)]
    assert (work.images, work.pairs) == (5, 10)


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    example = Example("7", ("a", "b"), ("x", "y"), "both", 0, "set", {"tag": "Both", "n": "1"})
    other = Example("8", ("a",), ("x", "y", "z"), "text", 2, "a")
    uri = written(tmp_path, "winoground", example, other)
    assert list(read_examples(uri)) == [example, other]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1, [0]), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (99, [*range(10)]), (None, [*range(10)])],
)
def test_limit_is_spread_evenly(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    uri = written(
        tmp_path, "one", *(text_example(str(i), "a", "x", "y") for i in range(10)), limit=limit
    )
    found = parquet.read_table(uri).to_pylist()
    assert [int(line["id"]) for line in found] == kept
    assert [line["position"] for line in found] == list(range(len(kept)))


def test_examples_are_named_by_their_content(tmp_path: Path) -> None:
    """The same examples have the same file, any other ones another, and none replaces another's."""
    folder = str(tmp_path / "examples")
    one, two = text_example("0", "a", "x", "y"), text_example("0", "a", "y", "x")
    first = pair_table.write_examples("t", [one], folder, None)
    assert first == pair_table.write_examples("t", iter([one]), folder, None)
    assert first[1] == 1
    assert first[0] != pair_table.write_examples("t", [two], folder, None)[0]
    assert pair_table.write_examples("t", [], folder, None)[1] == 0
    assert Path(first[0]).exists()
    assert not list(tmp_path.glob("examples/.*"))


def test_remaining_counts_what_the_checkpoint_lacks(tmp_path: Path, two_tasks: list[str]) -> None:
    """All of it until there are blocks; pending and cut checkpoint files do not count as done."""
    store = open_store(str(tmp_path), "m", DIFFUSION)
    work = pair_table.write_work(two_tasks, store, str(tmp_path / "work.parquet"))
    folder = tmp_path / "checkpoint"
    assert pair_table.remaining(work, str(folder)) == (3, 9, 0)
    blocks.cut(work.uri, blocks.Cost(1, 100), 309, lambda left: 110)
    assert pair_table.remaining(work, str(folder)) == (3, 9, 0)
    folder.mkdir()
    parquet.write_table(pa.table({"row": [1]}), folder / "a.parquet")
    assert pair_table.remaining(work, str(folder)) == (2, 6, 0)
    parquet.write_table(pa.table({"row": [0]}), folder / "b.pending.parquet")
    (folder / "c.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9])
    assert pair_table.remaining(work, str(folder)) == (2, 6, 0)
    parquet.write_table(pa.table({"row": [0, 1, 2]}), folder / "d.parquet")
    assert pair_table.remaining(work, str(folder)) == (0, 0, 0)


def read_pairs(uri: str, store: Store, error: str = "l2") -> list[dict[str, Any]]:
    """The pairs in order, with their errors; None where there are none."""
    found = []
    for pairs in StoredLines(store, error).pairs(uri):
        columns = (pairs.keys.to_pylist(), pairs.conditional, pairs.unconditional, pairs.failure)
        for line, errors, empty, failure in zip(*columns, strict=True):
            lists = [None if np.isnan(e).all() else e.tolist() for e in (errors, empty)]
            more = {"errors": lists[0], "unconditional": lists[1], "failure": failure.as_py()}
            found.append(line | more)
    return found


def test_scored_pairs_come_in_the_order_of_the_examples(tmp_path: Path) -> None:
    """By position, then image, then text, whatever order the scores were written in."""
    examples = [
        Example(str(n), (f"b{n}", f"a{n}"), ("z", "x"), "both", cluster=str(n)) for n in range(12)
    ]
    uri = written(tmp_path, "winoground", *examples)
    store = open_store(str(tmp_path), "m", DIFFUSION)
    rows = [
        score_row(f"{letter}{n}", text, [float(n), float("zx".find(text))])
        for n in range(12)
        for letter in "ab"
        for text in ("x", "z", "")
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    write_scores(store, [rows[i] for i in order[:20]])
    write_scores(store, [rows[i] for i in order[20:]], "part-1")
    found = read_pairs(uri, store)
    keys = [(line["position"], line["i"], line["j"]) for line in found]
    assert keys == [(n, i, j) for n in range(12) for i in range(2) for j in range(2)]
    assert [line["errors"] for line in found] == [[float(n), float(j)] for n, _, j in keys]
    assert all(line["unconditional"] == [line["position"], 0.0] for line in found)
    assert {line["failure"] for line in found} == {None}


def test_pair_that_is_not_there_yet(tmp_path: Path) -> None:
    """A pair without a score, or whose image lacks the unconditional error, says so."""
    uri = written(tmp_path, "two", image_example("0", "x", "a", "b", "c", "d"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(
        store,
        [
            *(score_row("a", text, [1.0]) for text in ("x", "")),
            score_row("b", "x", [1.0]),
            score_row("c", "x", failure="unreadable image"),
            score_row("c", "", failure="unreadable image"),
        ],
    )
    reasons = [line["failure"] for line in read_pairs(uri, store)]
    assert reasons == [None, "not scored yet", "unreadable image", "not scored yet"]


def test_the_empty_text_belongs_to_pairs_whose_images_are_compared(tmp_path: Path) -> None:
    """Whatever the store holds; its reason is told where the pair's own error is there."""
    uri = written(
        tmp_path,
        "t",
        text_example("0", "a", "x", "y"),
        image_example("1", "x", "a", "b", "c"),
        text_example("2", "b", "x", "z"),
    )
    store = open_store(str(tmp_path), "m", DIFFUSION)
    lines = [score_row(image, "x", [1.0] * 2) for image in "ab"]
    lines += [score_row("a", "y", [2.0] * 2), score_row("c", "x", failure="torn")]
    lines += [score_row("a", "", [3.0] * 2), score_row("b", "", failure="refused")]
    write_scores(store, [*lines, score_row("c", "", failure="also torn")])
    found = [(line["unconditional"], line["failure"]) for line in read_pairs(uri, store)]
    assert found == [
        (None, None), (None, None),
        ([3.0] * 2, None), (None, "refused"), (None, "torn"),
        (None, None), (None, "not scored yet"),
    ]  # fmt: skip


def test_pair_written_twice_counts_once_and_success_wins(tmp_path: Path) -> None:
    uri = written(tmp_path, "one", text_example("0", "a", "x", "y"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(store, [score_row("a", "x", failure="no"), score_row("a", "y", [2.0] * 2)])
    again = [score_row("a", "x", [1.0] * 2), score_row("a", "y", [2.0] * 2)]
    write_scores(store, again, "part-1")
    found = [(line["errors"], line["failure"]) for line in read_pairs(uri, store)]
    assert found == [([1.0, 1.0], None), ([2.0, 2.0], None)]


# --- results


def rows_by(evaluation: evaluate.Evaluation) -> dict[tuple[str, str, str], evaluate.ResultRow]:
    return {(row.group, row.metric, row.score): row for row in evaluation.rows}


def test_text_retrieval_by_hand(tmp_path: Path) -> None:
    """A win, a loss, a tie and an unreadable image, in two groups."""
    uri = written(
        tmp_path,
        "clevr",
        Example("0", ("a",), ("x", "y"), "text", cluster="a", groups={"subtask": "size"}),
        Example("1", ("b",), ("x", "y"), "text", cluster="b", groups={"subtask": "size"}),
        Example("2", ("c",), ("x", "y"), "text", cluster="c", groups={"subtask": "spatial"}),
        Example("3", ("d",), ("x", "y"), "text", cluster="d", groups={"subtask": "spatial"}),
    )
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(
        store,
        [
            score_row("a", "x", [1.0, 2.0]),
            score_row("a", "y", [2.0, 2.0]),
            score_row("b", "x", [9.0, 0.0]),
            score_row("b", "y", [1.0, 2.0]),
            score_row("c", "x", [1.0, 3.0]),
            score_row("c", "y", [3.0, 1.0]),
            score_row("d", "x", failure="there is no such file"),
            score_row("d", "y", failure="there is no such file"),
        ],
    )
    evaluation = evaluate.evaluate({"clevr": uri}, [store])
    rows = rows_by(evaluation)
    assert set(rows) == {
        (group, "accuracy", "conditional") for group in ("all", "subtask=size", "subtask=spatial")
    }
    whole = rows["all", "accuracy", "conditional"]
    assert (whole.value, whole.n, whole.ties, whole.failures) == (0.5, 3, 1, 1)
    assert (whole.model, whole.task, whole.chance) == ("m", "clevr", 0.5)
    assert (whole.protocol, whole.timesteps) == ("diffusionitm", 2)
    size = rows["subtask=size", "accuracy", "conditional"]
    assert (size.value, size.low, size.high) == (0.5, *wilson(1, 2))
    assert rows["subtask=spatial", "accuracy", "conditional"].value == 0.5
    assert evaluation.comparisons == []
    assert evaluation.failures == [
        {"model": "m", "task": "clevr", "example": "3", "failure": "d: there is no such file"}
    ]


@pytest.mark.parametrize(
    ("error", "value"), [("l2", 1.0), ("mse", 0.0), ("l1", 0.0), ("huber", 1.0)]
)
def test_error_kinds(tmp_path: Path, error: str, value: float) -> None:
    """Each kind is averaged by itself: norms 2.75 < 3, but squares 25.25 > 18."""
    uri = written(tmp_path, "clevr", text_example("0", "a", "x", "y"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(
        store,
        [
            score_row("a", "x", [0.5, 5.0], l1=[3.0, 3.0], huber=[1.0, 1.0]),
            score_row("a", "y", [3.0, 3.0], l1=[1.0, 1.0], huber=[2.0, 2.0]),
        ],
    )
    rows = rows_by(evaluate.evaluate({"clevr": uri}, [store], error))
    assert rows["all", "accuracy", "conditional"].value == value


def test_normalised_score_mends_the_naive_one(tmp_path: Path) -> None:
    """Image b is easy whatever the text says: naive picks it, the normalised score does not."""
    examples = [image_example(str(n), "x", f"a{n}", f"b{n}") for n in range(6)]
    uri = written(tmp_path, "flickr30k", *examples)
    store = open_store(str(tmp_path), "m", DIFFUSION)
    lines = []
    for n in range(6):
        lines += [score_row(f"a{n}", "x", [9.0, 9.0]), score_row(f"a{n}", "", [12.0, 12.0])]
        lines += [score_row(f"b{n}", "x", [2.0, 2.0]), score_row(f"b{n}", "", [2.5, 2.5])]
    write_scores(store, lines)
    evaluation = evaluate.evaluate({"flickr30k": uri}, [store])
    rows = rows_by(evaluation)
    assert rows["all", "R@1", "normalised"].value == 1.0
    assert rows["all", "R@1", "conditional"].value == 0.0
    assert rows["all", "R@5", "normalised"].value == rows["all", "R@5", "conditional"].value == 1.0
    (test,) = evaluation.comparisons  # R@5 of both is the same, example by example
    assert (test.metric, test.difference, test.n) == ("R@1", 1.0, 6)
    assert (test.first_score, test.second_score) == ("normalised", "conditional")
    assert (test.p, test.test) == (pytest.approx(2 / 2**6), "McNemar")


def winoground_rows(image: int, errors: tuple[float, float], ease: float) -> list[dict[str, Any]]:
    texts = zip(("c0", "c1"), errors, strict=True)
    return [score_row(f"i{image}", t, [e]) for t, e in texts] + [score_row(f"i{image}", "", [ease])]


def test_winoground_by_hand(tmp_path: Path) -> None:
    """Text right; naive image wrong because image 1 is easy; normalised image and group right."""
    example = Example("0", ("i0", "i1"), ("c0", "c1"), "both", groups={"collapsed_tag": "Object"})
    uri = written(tmp_path, "winoground", example)
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(store, winoground_rows(0, (8.0, 9.0), 10.0) + winoground_rows(1, (4.0, 2.0), 5.0))
    rows = rows_by(evaluate.evaluate({"winoground": uri}, [store]))
    found = {key: row.value for key, row in rows.items() if key[0] == "all"}
    assert found == {
        ("all", "text", "conditional"): 1.0,
        ("all", "image", "conditional"): 0.0,
        ("all", "group", "conditional"): 0.0,
        ("all", "text", "normalised"): 1.0,
        ("all", "image", "normalised"): 1.0,
        ("all", "group", "normalised"): 1.0,
    }
    assert rows["collapsed_tag=Object", "group", "normalised"].value == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_score_that_is_not_finite_is_never_a_win(tmp_path: Path, bad: float) -> None:
    """It counts as wrong, is counted as a failure and is listed once."""
    uri = written(
        tmp_path, "clevr", text_example("0", "a", "x", "y"), text_example("1", "b", "x", "y")
    )
    store = open_store(str(tmp_path), "m", DIFFUSION)
    lines = [score_row("a", "x", [1.0, 1.0]), score_row("a", "y", [1.0, bad])]
    lines += [score_row("b", "x", [1.0, 1.0]), score_row("b", "y", [2.0, 2.0])]
    write_scores(store, lines)
    evaluation = evaluate.evaluate({"clevr": uri}, [store])
    row = rows_by(evaluation)["all", "accuracy", "conditional"]
    assert (row.value, row.n, row.failures, row.ties) == (0.5, 2, 1, 0)
    assert [(f["example"], f["failure"]) for f in evaluation.failures] == [
        ("0", "a score is not finite")
    ]


def test_unconditional_error_that_is_not_finite_is_listed(tmp_path: Path) -> None:
    """Only the normalised scores are lost then; the example is listed all the same."""
    uri = written(tmp_path, "flickr30k", image_example("0", "x", "a", "b"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(
        store,
        [score_row(image, "x", [error]) for image, error in (("a", 1.0), ("b", 2.0))]
        + [score_row("a", "", [float("nan")]), score_row("b", "", [1.0])],
    )
    evaluation = evaluate.evaluate({"flickr30k": uri}, [store])
    rows = rows_by(evaluation)
    assert rows["all", "R@1", "conditional"].value == 1.0
    assert rows["all", "R@1", "normalised"].value == 0.0
    assert [f["example"] for f in evaluation.failures] == ["0"]


def test_clip_store(tmp_path: Path) -> None:
    """Cosines only: one kind of score, no comparison; a constant CLIP is at chance with a tie."""
    uri = written(
        tmp_path, "flickr30k", image_example("0", "x", "a", "b"), image_example("1", "y", "a", "b")
    )
    store = open_store(str(tmp_path), "clip", CLIP)
    cosines = {("a", "x"): 0.3, ("b", "x"): 0.2, ("a", "y"): 0.1, ("b", "y"): 0.1}
    write_scores(store, [score_row(*pair, similarity=value) for pair, value in cosines.items()])
    evaluation = evaluate.evaluate({"flickr30k": uri}, [store])
    row = rows_by(evaluation)["all", "R@1", "cosine"]
    assert (row.value, row.ties, row.chance, row.failures) == (0.75, 1, 0.5, 0)
    assert (row.protocol, row.timesteps) == ("cosine", 0)
    assert {r.score for r in evaluation.rows} == {"cosine"}
    assert (evaluation.comparisons, evaluation.failures) == ([], [])


def test_several_stores_and_tasks(tmp_path: Path) -> None:
    """Every task under every store; a store without scores gives failures, not a win."""
    tasks = {
        "clevr": written(tmp_path, "clevr", text_example("0", "a", "x", "y")),
        "flickr30k_text": written(tmp_path, "flickr30k_text", text_example("9", "a", "y", "x")),
    }
    full = open_store(str(tmp_path), "full", DIFFUSION)
    empty = open_store(str(tmp_path), "empty", {**DIFFUSION, "seed": 1})
    write_scores(full, [score_row("a", "x", [1.0]), score_row("a", "y", [2.0])])
    evaluation = evaluate.evaluate(tasks, [full, empty])
    found = {(r.model, r.task, r.metric): r.value for r in evaluation.rows if r.n}
    assert found == {
        ("full", "clevr", "accuracy"): 1.0,
        ("full", "flickr30k_text", "R@1"): 0.0,
        ("full", "flickr30k_text", "R@5"): 1.0,
    }
    assert [(f["model"], f["task"], f["failure"]) for f in evaluation.failures] == [
        ("empty", "clevr", "a: not scored yet"),
        ("empty", "flickr30k_text", "a: not scored yet"),
    ]


def test_many_examples_of_different_sizes(tmp_path: Path) -> None:
    """All keep their own scores; how batches are cut is tested in test_join.py."""
    rng = np.random.default_rng(0)
    examples, lines, wins = [], [], []
    for n in range(120):
        errors = rng.random(2 + n % 9)
        texts = [f"t{n}-{k}" for k in range(len(errors))]
        examples.append(text_example(str(n), f"image{n}", *texts))
        lines += [
            score_row(f"image{n}", text, [float(e)]) for text, e in zip(texts, errors, strict=True)
        ]
        wins.append(errors.argmin() == 0)
    uri = written(tmp_path, "clevr", *examples)
    store = open_store(str(tmp_path), "m", DIFFUSION)
    write_scores(store, lines)
    row = rows_by(evaluate.evaluate({"clevr": uri}, [store]))["all", "accuracy", "conditional"]
    assert row.n == 120
    assert row.value == pytest.approx(np.mean(wins))


def test_written_results(tmp_path: Path) -> None:
    """results.json holds exactly the documented keys, and numbers that are JSON."""
    uri = written(tmp_path, "flickr30k", image_example("0", "x", "a", "b"))
    store = open_store(str(tmp_path), "m", DIFFUSION)
    lines = [score_row(i, t, [1.0, 2.0]) for i in "ab" for t in ("x", "")]
    write_scores(store, lines)
    evaluation = evaluate.evaluate({"flickr30k": uri}, [store])
    path = evaluate.write_results(evaluation, {"commit": "abc"}, str(tmp_path / "out"))
    written_rows = json.loads(Path(path).read_text())
    assert Path(path).name == "results.json"
    assert set(written_rows) == {
        "rows", "comparisons", "counts", "curves", "denoising", "speeds", "cases", "races", "cut_texts",
    }  # fmt: skip
    for row in written_rows["rows"]:
        assert set(row) == {
            "model", "task", "group", "metric", "score", "value", "low", "high", "n", "chance",
            "ties", "failures", "unit", "p", "protocol", "timesteps", "racing",
        }  # fmt: skip
    assert len(written_rows["rows"]) == 4
    first = written_rows["rows"][0]
    assert (first["value"], first["ties"], first["n"]) == (0.5, 1, 1)
    beside = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert beside == {"commit": "abc"}
    assert json.loads((tmp_path / "out" / "failures.json").read_text()) == {"failures": []}


def test_present_names_an_absent_image(tmp_path: Path) -> None:
    uri = written(tmp_path, "clevr", text_example("0", "d/a.png#xywh=0,0,1,1", "x", "y"))
    assert evaluate.present(str(tmp_path), uri) == str(tmp_path / "d" / "a.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").touch()
    assert evaluate.present(str(tmp_path), uri) is None


def test_examples_that_are_refused_halfway_leave_no_file(tmp_path: Path) -> None:
    def examples() -> Iterator[Example]:
        yield Example("0", ("a.png",), ("x", "y"), "text")
        raise InputError("line 2 is none")

    with pytest.raises(InputError, match="line 2"):
        pair_table.write_examples("own", examples(), str(tmp_path / "examples"), None)
    assert list((tmp_path / "examples").iterdir()) == []
