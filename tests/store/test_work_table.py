"""Work tables on disk, and what a run's summary makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core.schema import Example
from diffitm.store import blocks, pair_table, work_table
from diffitm.store.run_summary import Done, summarise, write_summary
from diffitm.store.score_store import Store, open_store
from diffitm.store.work_table import OpenWork, finish, finished, open_pairs
from tests.tiny import read_images, score_row, write_scores

CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), "m", CONFIG)


@pytest.fixture
def examples(tmp_path: Path) -> list[str]:
    """Images a, b and c with two texts each."""
    made = [Example(n, (n,), ("x", "y"), "text") for n in "abc"]
    return [pair_table.write_examples("t", made, str(tmp_path / "examples"), None)[0]]


def commit(work: OpenWork, name: str, *rows: int) -> Path:
    """A file of the checkpoint, as Ray Data leaves it, of blocks that are an image each."""
    blocks.cut(work.table.uri, blocks.Cost(1), work.table.pairs, lambda left: 2)
    folder = Path(work.checkpoint)
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table({"row": list(rows)}), folder / name)
    return folder / name


def score_files(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.uri).glob("*.parquet"))


def test_an_unfinished_table_is_gone_on_with(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    """The same examples in any order; what its checkpoint holds is not done again."""
    first = open_pairs(str(tmp_path), store, examples, ["one", "two"])
    assert first.folder == str(tmp_path / "work" / store.name / "0000")
    assert (first.table.images, first.table.pairs) == (3, 6)
    assert (first.left.images, first.left.pairs, first.resumed) == (3, 6, False)
    commit(first, "a.parquet", 1)
    again = open_pairs(str(tmp_path), store, examples, ["two", "one"])
    assert (again.folder, again.table) == (first.folder, first.table)
    assert (again.left.images, again.left.pairs, again.resumed) == (2, 4, True)
    assert not (Path(first.folder) / "done").exists()


def test_a_commit_that_a_kill_cut_is_taken_back(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    """Rows both pending and committed are committed; rows only pending stay so."""
    work = open_pairs(str(tmp_path), store, examples, ["one"])
    committed = commit(work, "a.parquet", 0)
    both, pending = commit(work, "a.pending.parquet", 0), commit(work, "b.pending.parquet", 1)
    again = open_pairs(str(tmp_path), store, examples, ["one"])
    assert (again.folder, again.left.images) == (work.folder, 2)
    assert (committed.exists(), both.exists(), pending.exists()) == (True, False, True)


def test_a_table_of_other_examples_is_closed(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    """Scores whose commit is pending go, the others stay and are not asked for again."""
    old = open_pairs(str(tmp_path), store, examples, ["one"])
    commit(old, "b1.parquet", 0)
    commit(old, "b2.pending.parquet", 1)
    write_scores(store, [score_row("a", text, [1.0]) for text in "xy"], "b1-0")
    write_scores(store, [score_row("b", text, [1.0]) for text in "xy"], "b2-0")
    write_scores(store, [score_row("c", "x", [1.0])], "earlier-b2")
    new = open_pairs(str(tmp_path), store, examples, ["other"])
    assert json.loads((Path(old.folder) / "done").read_text()) == {"closed": True}
    assert score_files(store) == ["b1-0.parquet", "earlier-b2.parquet"]
    assert Path(new.folder).name == "0001"
    asked = [(row.image, row.texts) for row in read_images(new.table.uri)]
    assert asked == [("b", ["x", "y"]), ("c", ["y"])]
    back = open_pairs(str(tmp_path), store, examples, ["one"])
    assert Path(back.folder).name == "0002"


def test_closing_without_pending_commits_deletes_nothing(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    open_pairs(str(tmp_path), store, examples, ["one"])
    write_scores(store, [score_row("a", "x", [1.0])])
    open_pairs(str(tmp_path), store, examples, ["other"])
    assert score_files(store) == ["part-0.parquet"]


def test_tables_that_are_done_or_were_never_begun_are_passed_over(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    """One with a note that it is done, one that is all committed, one without its note."""
    first = open_pairs(str(tmp_path), store, examples, ["one"])
    finish(first, Done(pairs=1))
    second = open_pairs(str(tmp_path), store, examples, ["one"])
    commit(second, "a.parquet", 0, 1, 2)
    third = open_pairs(str(tmp_path), store, examples, ["one"])
    (Path(third.folder) / "table.json").unlink()
    fourth = open_pairs(str(tmp_path), store, examples, ["one"])
    folders = [Path(work.folder).name for work in (first, second, third, fourth)]
    assert folders == ["0000", "0001", "0002", "0003"]
    assert json.loads((Path(second.folder) / "done").read_text()) == {"closed": True}
    finish(fourth, Done(pairs=5))
    assert [note.get("pairs") for note in finished(str(tmp_path), store)] == [1, None, 5]


def test_a_checkpoint_ends_with_its_table(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    """One that a kill left is cleared away by the next run; that of an open table stays."""
    assert not work_table.is_open(str(tmp_path), store)
    first = open_pairs(str(tmp_path), store, examples, ["one"])
    path = commit(first, "a.parquet", 0)
    assert work_table.is_open(str(tmp_path), store) and path.exists()
    finish(first, Done(pairs=1))
    assert not Path(first.checkpoint).exists() and not work_table.is_open(str(tmp_path), store)
    commit(first, "a.parquet", 0)
    second = open_pairs(str(tmp_path), store, examples, ["two"])
    assert not Path(first.checkpoint).exists()
    path = commit(second, "b.parquet", 0)
    open_pairs(str(tmp_path), store, examples, ["two"])
    assert path.exists()
    open_pairs(str(tmp_path), store, examples, ["three"])
    assert not Path(second.checkpoint).exists()
    assert work_table.is_open(str(tmp_path), store)


def test_nothing_to_do_leaves_no_table_to_go_on_with(
    tmp_path: Path, store: Store, examples: list[str]
) -> None:
    write_scores(store, [score_row(image, text, [1.0]) for image in "abc" for text in "xy"])
    work = open_pairs(str(tmp_path), store, examples, ["one"])
    assert (work.left.images, work.left.pairs, work.resumed) == (0, 0, False)
    assert not (Path(work.folder) / "table.json").exists()


def test_only_what_is_both_is_mended(tmp_path: Path) -> None:
    """Names that merely begin alike are others."""
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "bb.parquet"):
        (tmp_path / name).touch()
    work_table.mend(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.parquet", "b.pending.parquet", "bb.parquet",
    ]  # fmt: skip
    work_table.mend(str(tmp_path / "absent"))


ONE = Done(2, 3, 5, 7.0, 11, 13.0, 17.0, 19.0, 23, 29, 31, 0, 37.0, ("8 -> 4",), 89, ("x",), 97.0)
TWO = Done(
    41,
    43,
    47,
    53.0,
    59,
    61.0,
    67.0,
    71.0,
    73,
    79,
    37,
    16,
    83.0,
    ("4 -> 2", "2 -> 1"),
    103,
    ("y",),
    103.0,
)


def test_what_was_done_adds_up() -> None:
    """But for the most memory and the smallest batch, of which 0 means none."""
    smaller = ("8 -> 4", "4 -> 2", "2 -> 1")
    both = Done(
        43,
        46,
        52,
        60.0,
        70,
        74.0,
        84.0,
        90.0,
        96,
        108,
        37,
        16,
        120.0,
        smaller,
        192,
        ("x", "y"),
        200.0,
    )
    assert both == ONE + TWO
    assert (TWO + ONE).memory == 37 and (TWO + ONE).batch_size == 16
    assert (TWO + Done(batch_size=4)).batch_size == 4
    assert (Done() + Done()) == Done()


def test_a_summary_by_hand(tmp_path: Path) -> None:
    """Shares and rates of numbers that divide evenly; the total is of all models."""
    one = Done(pairs=6, forwards=60, failures=1, busy=20.0, waited=8.0, loading=4.0, inside=15.0, begun=9,
               finished=7, memory=3, batch_size=8, seconds=30.0, smaller=("8 -> 4",))  # fmt: skip
    first, second, total = write_summary(["m", "n"], [one, Done(pairs=1)], str(tmp_path))
    assert (first.model, first.pairs, first.forwards, first.failures) == ("m", 6, 60, 1)
    assert (first.retries, first.out_of_memory, first.gpu_memory_bytes) == (2, 1, 3)
    assert (first.seconds, first.batch_size) == (30.0, 8)
    assert (first.forwards_per_second, first.forwards_per_second_of_an_actor) == (2.0, 3.0)
    assert (first.unet_share, first.waiting_share, first.loading_share) == (0.75, 0.25, 0.125)
    assert second == summarise("n", Done(pairs=1))
    assert (second.forwards_per_second, second.unet_share, second.waiting_share) == (None,) * 3
    assert second.loading_share is None
    assert (second.forwards_per_second_of_an_actor, second.batch_size) == (None, None)
    assert (total.model, total.pairs, total.forwards) == ("total", 7, 60)
    assert summarise("clip", Done(busy=2.0)).unet_share is None
    file = json.loads((tmp_path / "summary.json").read_text())
    assert [line["model"] for line in file["models"]] == ["m", "n"]
    assert file["total"]["waiting_share"] == 0.25
