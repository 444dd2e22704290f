"""Many small files become few: no row is lost or read twice, wherever a kill comes, and figures stay."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.lease import held
from diffitm.core.schema import SCORES, Example
from diffitm.evaluation.evaluate import evaluate
from diffitm.store import compaction, pair_table, score_store, stored_lines
from diffitm.store.compaction import compact, tidy
from diffitm.store.join import read_scored
from diffitm.store.manifest import MANIFEST, PREFIX, look, read_manifest
from diffitm.store.score_store import Store, open_store
from diffitm.store.stored_lines import StoredLines
from tests.objects import Objects, reachable, serve
from tests.pipeline import ROOT, environment
from tests.tiny import score_row, write_scores

STEPS = [10, 110, 210]
CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": STEPS}
IMAGES, TEXTS = 12, 3

Row = dict[str, Any]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def rows_of(images: range, tag: str = "") -> list[Row]:
    """Errors that tell their pair, and the empty text's."""
    return [
        score_row(f"d/{i:02d}", text, [i + j / 10, 1.0 + i, 2.0 + j], row=i)
        for i in images
        for j, text in enumerate(["", *(f"t{tag}{j}" for j in range(TEXTS))])
    ]


def scatter(store: Store, rows: list[Row], size: int, tag: str) -> None:
    """Rows in files of so many, in no order of images."""
    for number in range(0, len(rows), size):
        part = [rows[(k * 7) % len(rows)] for k in range(number, min(number + size, len(rows)))]
        write_scores(store, part, f"{tag}-{number:04d}")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few rows make several files, stretches and row groups."""
    for name, value in (("FEW", 2), ("LEAST", 5000), ("HELD", 700), ("GROUP", 3)):
        monkeypatch.setattr(compaction, name, value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """54 rows in 17 files: pairs, failures, one tried again, and parts of races of which two overlap."""
    made = open_store(str(tmp_path / "out"), "m", CONFIG)
    fill(made)
    return made


def fill(store: Store) -> None:
    failed = score_row("d/00", "t0", failure="unreadable")
    again = [score_row("d/98", "t0", failure=why) for why in ("first", "second")]
    raced = [
        score_row("d/99", "t0", [value] * len(places), positions=places)
        for value, places in ((5.0, [0]), (6.0, [0, 2]), (7.0, [1, 2]))
    ]
    write_scores(store, [*rows_of(range(IMAGES))[:1], failed], "a-0000")
    scatter(store, [*rows_of(range(IMAGES))[1:]], 4, "b")
    for number, row in enumerate([raced[0], again[0], raced[1]]):
        write_scores(store, [row], f"c-{number}")
    write_scores(store, [raced[2], again[1]], "d-0")


def content(store: Store) -> dict[tuple[str, str], list[Row]]:
    """What each pair has, in the order in which readers find it."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in store.dataset().to_table().to_pylist():
        found.setdefault((row["image"], row["text"]), []).append(row)
    return found


def count(store: Store) -> int:
    return int(store.dataset().count_rows())


def files(store: Store) -> set[str]:
    return {name for name in storage.sizes(store.uri) if name.endswith(".parquet")}


def known(store: Store, examples: str) -> list[Any]:
    """What the evaluation reads of each example."""
    items = read_scored(examples, store, "l2", partial=True)
    return [(item.failure, str(item.conditional.tolist())) for item in items]


def test_a_small_store_becomes_one_sorted_file(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of today's files, which have no manifest; a second call finds nothing to do. Of lines of one pair
    that overlap, the same one counts."""
    examples = written(tmp_path, "clevr", [f"d/{i:02d}" for i in (98, 99, 5)])
    before, found = content(store), known(store, examples)
    failed, raced, scored = found
    assert (
        failed[0] == "d/98: first"
        and raced[1].startswith("[[[5.0, 7.0, 6.0], ")
        and scored[0] is None
    )
    assert store.has_parts and store.rows == count(store) == 54
    caplog.set_level("INFO")
    tidy(store)
    assert "m: 17 files of scores became 1 (0.0 MB)" in caplog.text
    (name,) = files(store)
    assert name.startswith(PREFIX)
    assert content(store) == before and known(store, examples) == found
    assert store.has_parts and store.rows == 54
    table = store.dataset().to_table(columns=["image", "text"]).to_pylist()
    assert table == sorted(table, key=lambda row: (row["image"], row["text"]))
    assert store.dataset().schema == SCORES
    caplog.clear()
    tidy(store)
    assert caplog.text == "" and files(store) == {name}
    assert not storage.exists(storage.join(store.uri, f"{MANIFEST}.lease"))


def test_a_few_files_stay(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "m", CONFIG)
    for number in range(compaction.FEW):
        write_scores(store, rows_of(range(number, number + 1)), f"a-{number}")
    tidy(store)
    assert len(files(store)) == compaction.FEW and read_manifest(store.uri) is None
    assert not store.has_parts


@pytest.mark.usefixtures("small")
def test_whole_files_are_written_once(store: Store) -> None:
    """A later table's files join the last one alone, if that was small; what is appended counts at once."""
    compact(store)
    first = look(store.uri).listed
    assert len(first) > 2 and all(file.bytes >= compaction.LEAST for file in first[:-1])
    assert [file.raced for file in first].count(True) in (1, 2)
    before = content(store)
    more = rows_of(range(30, 33), "later")
    for number in range(3):
        write_scores(store, more[4 * number : 4 * number + 4], f"0-{number}")
    assert len(content(store)) == len(before) + 12 == len(before) + len(more)
    assert look(store.uri).names[-3:] == ["0-0.parquet", "0-1.parquet", "0-2.parquet"]
    both = content(store)
    compact(store)
    second = look(store.uri).listed
    kept = [file for file in first if file.bytes >= compaction.LEAST]
    assert list(second[: len(kept)]) == kept and len(second) > len(kept)
    assert content(store) == both and files(store) == {file.name for file in second}


@pytest.mark.usefixtures("small")
def test_a_large_file_is_taken_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place: a pair that a file before it and one behind it have, too, keeps its first line."""
    compact(store)
    last = parquet.read_table(Path(store.uri, look(store.uri).names[-1])).to_pylist()
    again = [score_row(row["image"], row["text"], [9.0] * len(STEPS)) for row in last[:1]]
    write_scores(store, [*rows_of(range(20, 80), "large"), *again], "taken-1")
    write_scores(store, [score_row("d/20", "tlarge0", [7.0] * len(STEPS))], "a-before")
    large = Path(store.uri, "taken-1.parquet").stat()
    monkeypatch.setattr(compaction, "LEAST", large.st_size)
    for number in range(3):
        write_scores(store, rows_of(range(90 + number, 91 + number)), f"e-{number}")
    before = content(store)
    compact(store)
    assert "taken-1.parquet" in [file.name for file in look(store.uri).listed]
    left = Path(store.uri, "taken-1.parquet").stat()
    assert (left.st_ino, left.st_mtime_ns) == (
        large.st_ino,
        large.st_mtime_ns,
    )  # it was read, though
    assert content(store) == before


def kill_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """Everything that changes the store is a step; before the one numbered `at` the process ends."""
    counter = itertools.count()

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            if next(counter) == at:
                raise Killed
            return call(*given)

        return step

    delete = before(lambda uri, name: storage.delete(storage.join(uri, name)))
    patch.setattr(compaction, "write_manifest", before(compaction.write_manifest))
    for name in ("_write", "close"):
        patch.setattr(compaction._Output, name, before(getattr(compaction._Output, name)))
    patch.setattr(
        compaction.storage, "footers", before(storage.footers)
    )  # a file is whole, and not named
    patch.setattr(
        compaction.storage, "delete_files", lambda uri, names: [delete(uri, n) for n in names]
    )


@pytest.mark.usefixtures("small")
def test_a_kill_at_any_step(store: Store, tmp_path: Path) -> None:
    """Readers find the same at once, while another table appends, too; the next compaction leaves nothing
    of the killed one."""
    compact(store)  # so that there are files of an earlier one
    first = look(store.uri).listed
    fill_more(store)
    before = content(store)
    later = score_row("e/0", "t", [1.0, 2.0, 3.0])
    for at in itertools.count():
        copy = dataclasses.replace(store, uri=str(tmp_path / str(at)))
        shutil.copytree(store.uri, copy.uri)
        killed = False
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, at)
            try:
                compact(copy)
            except Killed:
                killed = True
        assert content(copy) == before, at
        if not killed:
            break
        write_scores(copy, [later], "z-0")
        both = {**before, ("e/0", "t"): [later]}
        assert content(copy) == both, at
        tidy(copy)
        assert content(copy) == both, at
        assert files(copy) == set(look(copy.uri).names), at
        assert read_manifest(copy.uri).replaced == ()  # type: ignore[union-attr]
        assert set(first[:-1]) <= set(look(copy.uri).listed), at
        shutil.rmtree(copy.uri)
    assert at > 20 and len(look(copy.uri).listed) > len(first)


def fill_more(store: Store) -> None:
    """A second table's files, with more of what races left of a pair of the first."""
    scatter(store, rows_of(range(40, 52), "u"), 6, "e")
    raced = score_row("d/99", "t0", [8.0, 9.0], positions=[1, 2])
    write_scores(store, [raced, score_row("d/98", "t0", failure="third")], "0-0")


KILLED = """
import sys, time
from diffitm.store import compaction
from diffitm.store.score_store import read_store

compaction.FEW, compaction.LEAST, compaction.HELD, compaction.GROUP = 2, 5000, 700, 3
delete = compaction.storage.delete

def slow(uri, names):
    for name in names:
        delete(f"{uri}/{name}")
        time.sleep(0.02)

compaction.storage.delete_files = slow
print("begun", flush=True)
compaction.compact(read_store(sys.argv[1]))
"""


@pytest.mark.usefixtures("small")
def test_a_sigkill(store: Store) -> None:
    """In the middle of the deletions of a process of its own."""
    before = content(store)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, store.uri],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
    )
    end = time.monotonic() + 60
    while not (manifest := read_manifest(store.uri)) or not manifest.replaced:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = look(store.uri)
    assert left.manifest and left.manifest.replaced and left.appended
    assert content(store) == before
    tidy(store)
    assert content(store) == before
    assert files(store) == set(look(store.uri).names)


def test_what_a_manifest_lacks_is_named(store: Store) -> None:
    tidy(store)
    (name,) = files(store)
    path, note = Path(store.uri, name), Path(store.uri, MANIFEST)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"{MANIFEST} names {name} .* has {len(data) - 1:,} bytes"):
        store.dataset()
    path.unlink()
    with pytest.raises(InputError, match=f"{name} with {len(data):,} bytes, which is not there"):
        StoredLines(store, "l2")
    path.write_bytes(data)
    text = note.read_text()
    note.unlink()
    with pytest.raises(InputError, match=f"{MANIFEST} is missing, and {name}"):
        store.dataset()
    for wrong in (text[:-3], "[]", text.replace('"format": 1', '"format": 2'), "{}"):
        note.write_text(wrong)
        with pytest.raises(InputError, match=f"{MANIFEST} is not the manifest of a score store"):
            store.dataset()


def test_a_compaction_that_fails_is_told_and_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs no score."""
    before = content(store)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compaction._Output, "close", full)
        tidy(store)
    assert "m: the files of its scores stay as they are for now" in caplog.text
    assert "No space left on device" in caplog.text
    assert content(store) == before and len(files(store)) == 18
    tidy(store)
    assert content(store) == before and len(files(store)) == 1


def test_one_compaction_at_a_time(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with held(storage.join(store.uri, MANIFEST), is_file=True):
        tidy(store)
    assert "another run works on it" in caplog.text and len(files(store)) == 17
    tidy(store)
    assert len(files(store)) == 1


def test_files_that_go_while_they_are_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that a compaction overtakes looks again."""
    before, read = content(store), storage.footers

    def overtaken(uri: str, names: list[str]) -> Any:
        monkeypatch.setattr(storage, "footers", read)
        compact(store)
        return read(uri, names)

    monkeypatch.setattr(storage, "footers", overtaken)
    assert content(store) == before


def test_files_that_go_before_they_are_opened(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = content(store), look

    def overtaken(uri: str) -> Any:
        monkeypatch.setattr(score_store, "look", seen)
        found = seen(uri)
        compact(store)
        return found

    monkeypatch.setattr(score_store, "look", overtaken)
    assert content(store) == before


def test_files_that_go_while_they_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Store.dataset

    def overtaken(self: Store, images: Any = None) -> Any:
        found = dataset(self, images)
        compact(store)
        return found

    monkeypatch.setattr(Store, "dataset", overtaken)
    with pytest.raises(Unavailable, match="another run compacted it"):
        StoredLines(store, "l2")


@pytest.mark.usefixtures("small")
def test_compacted_files_that_go_or_are_spoilt(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large store's reader looks again where they are compacted once more, and names one that is spoilt:
    it has no rows to leave out."""
    monkeypatch.setattr(compaction, "LEAST", 10**6)
    compact(store)
    scatter(store, rows_of(range(30, 33)), 4, "n")
    examples, read = written(tmp_path, "clevr", ["d/02", "d/31"]), storage.footers
    expected = known(store, examples)
    monkeypatch.setattr(stored_lines, "AT_ONCE", 10)

    def overtaken(uri: str, names: Any) -> Any:
        if (asked := list(names)) and asked[0].startswith(PREFIX):
            monkeypatch.setattr(storage, "footers", read)
            compact(store)
        return read(uri, asked)

    monkeypatch.setattr(storage, "footers", overtaken)
    assert known(store, examples) == expected
    (file,) = look(store.uri).listed
    Path(store.uri, file.name).write_bytes(b"x" * file.bytes)
    with pytest.raises(InputError, match=f"{file.name} cannot be read"):
        known(store, examples)


def test_files_of_other_columns(store: Store) -> None:
    """As an earlier version wrote them: what they lack is null."""
    old = pa.Table.from_pylist([score_row("o/1", "t", [1.0, 2.0, 3.0])], SCORES)
    old = old.drop_columns(["positions", "digest"]).append_column("more", pa.array([1]))
    parquet.write_table(old, Path(store.uri, "old.parquet"))
    before = content(store)
    tidy(store)
    assert content(store) == before and store.dataset().schema == SCORES


@pytest.mark.usefixtures("small")
def test_a_large_store_is_read_by_task(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures, from the row groups that hold the task's images alone."""
    monkeypatch.setattr(compaction, "HELD", 10**6)
    examples = {
        "clevr": written(tmp_path, "clevr", [f"d/{i:02d}" for i in (2, 3, 7)]),
        "coco_neg_text": written(tmp_path, "coco_neg_text", ["d/00", "d/11", "d/40"]),
        "pets": written(tmp_path, "pets", ["c/0", "x/0"]),
    }
    whole = evaluate(examples, [store], "l2")
    asked: list[int] = []
    fragments = score_store._groups

    def counted(*given: Any) -> list[int]:
        found = fragments(*given)
        asked.append(len(found))
        return found

    monkeypatch.setattr(score_store, "_groups", counted)
    monkeypatch.setattr(stored_lines, "AT_ONCE", 10)
    assert evaluate(examples, [store], "l2") == whole
    compact(store)
    asked.clear()
    assert evaluate(examples, [store], "l2") == whole
    (file,) = look(store.uri).listed
    assert file.rows == 54 and sum(asked) < 14
    assert len(whole.rows) > 3 and whole.failures


def written(root: Path, task: str, images: list[str]) -> str:
    made = [
        Example(image, (image,), ("t0", "t1"), "text", cluster=image, groups={"kind": image})
        for image in images
    ]
    return pair_table.write_examples(task, made, str(root / "examples"), None)[0]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    with serve(tmp_path_factory.mktemp("objects") / "served") as objects, reachable(objects):
        yield objects


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["uri", "whole_uri"])
def test_in_an_object_store(bucket: Objects, form: str) -> None:
    """Killed between the manifest and the last deletions, then whole."""
    made = open_store(getattr(bucket, form)(f"out-{form}"), "m", CONFIG)
    fill(made)
    before = content(made)
    deleted: list[str] = []

    def killed(uri: str, names: list[str]) -> None:
        deleted.extend(names[:1])
        storage_delete(uri, names[:1])
        if names:
            raise Killed

    storage_delete = storage.delete_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction.storage, "delete_files", killed)
        with pytest.raises(Killed):
            compact(made)
    assert len(deleted) == 1 and deleted[0] not in files(made)
    assert read_manifest(made.uri).replaced  # type: ignore[union-attr]
    assert content(made) == before
    tidy(made)
    assert content(made) == before
    assert files(made) == set(look(made.uri).names) and len(files(made)) > 1
    storage.delete(storage.join(made.uri, lost := look(made.uri).names[0]))
    with pytest.raises(InputError, match=f"names {lost}"):
        made.dataset()
