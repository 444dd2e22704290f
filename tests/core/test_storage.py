"""Files and the names of them, on a disk and in the memory of fsspec."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example, fault


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and synced beside its place, then renamed; readable by others."""
    steps = list[str]()
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        assert os.fstat(handle).st_size == 5
        steps.append("sync")
        sync(handle)

    def renamed(part: str, to: Path) -> None:
        assert Path(part).parent == to.parent and Path(part).read_bytes() == b"whole"
        steps.append("rename")
        replace(part, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    storage.write_bytes(str(tmp_path / "deep" / "a"), b"whole")
    assert steps == ["sync", "rename"]
    assert (tmp_path / "deep" / "a").read_bytes() == b"whole"
    assert (tmp_path / "deep" / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


def test_a_stream_that_broke_off_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def break_off() -> None:
        with storage.replacing(str(path)) as sink:
            sink.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert path.read_text() == "old"
    with storage.replacing(str(path)) as sink:
        sink.write(b"new")
        sink.write(b"er")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "newer")]


def test_names_by_hand() -> None:
    """A URI's query stays at its end; a path's question mark is a letter."""
    assert storage.join("s3://b/a/?x=1", "c", "d") == "s3://b/a/c/d?x=1"
    assert storage.join("/a?b/", "c") == "/a?b/c"
    assert storage.parent("s3://b/a/c?x=1") == "s3://b/a?x=1"
    assert storage.parent("/a/b?/c/") == "/a/b?"
    assert storage.name("s3://b/a/c/?x=/1") == "c"
    assert storage.name("/a/b?c") == "b?c"
    assert storage.without_query("s3://b/a?x") == "s3://b/a"
    assert storage.without_query("/a?x") == "/a?x"
    assert storage.below("s3://b/a/c/d?x=1", "s3://b/a/?y=2") == "c/d"
    assert storage.below("/data/x", "/dat") == "/data/x"
    assert storage.below("s3://b/a?x", "/data") == "s3://b/a?x"
    assert storage.absolute("~/x") == f"{Path.home()}/x"


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    """Files alone, sorted, below it only where asked for."""
    for name in ("b.txt", "a.bin", "d/c.txt"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    root = str(tmp_path)
    assert storage.files(root) == [f"{root}/a.bin", f"{root}/b.txt"]
    assert storage.files(root, ".txt", recursive=True) == [f"{root}/b.txt", f"{root}/d/c.txt"]
    sizes = storage.sizes(f"{root}/", recursive=True)
    assert {name: size for name, (size, _) in sizes.items()} == {
        "a.bin": 5,
        "b.txt": 5,
        "d/c.txt": 7,
    }
    assert set(storage.sizes(root)) == {"a.bin", "b.txt"}
    assert storage.sizes(f"{root}/none") == {}
    stat = (tmp_path / "b.txt").stat()
    assert sizes["b.txt"] == (5, stat.st_mtime_ns)
    assert storage.versions([f"{root}/b.txt", f"{root}/d/c.txt"])[0] == (5, stat.st_mtime_ns)
    storage.delete(f"{root}/b.txt")
    assert storage.files(root, ".txt") == []


def test_copies_and_parts_of_a_file(tmp_path: Path) -> None:
    source, there = tmp_path / "source", f"memory://copies{tmp_path.name}/deep/b"
    source.write_bytes(b"0123456789")
    storage.upload(str(source), there)
    assert storage.read_bytes(there) == b"0123456789"
    storage.download(there, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"0123456789"
    assert storage.read_range(str(source), 3, 4) == b"3456"
    assert storage.read_range(there, 8, 2) == b"89"


def test_a_stamp_changes_with_any_file(tmp_path: Path) -> None:
    """With its size, its time, its coming and going, and its name."""
    names = ["a", "b"]
    for name in names:
        (tmp_path / name).write_text(name)
    os.utime(tmp_path / "b", ns=(1, 1))
    stamps = [storage.stamp(str(tmp_path), names)]
    assert storage.stamp(str(tmp_path), names) == stamps[0]
    os.utime(tmp_path / "b", ns=(2, 2))
    stamps.append(storage.stamp(str(tmp_path), names))
    (tmp_path / "b").write_text("longer")
    os.utime(tmp_path / "b", ns=(2, 2))
    stamps.append(storage.stamp(str(tmp_path), names))
    (tmp_path / "b").unlink()
    stamps += [storage.stamp(str(tmp_path), names), storage.stamp(str(tmp_path), ["a"])]
    stamps.append(storage.stamp(str(tmp_path), ["a", "c"]))
    assert len(set(stamps)) == 6
    assert storage.stamp("s3://bucket/a", names) is None


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example("0", ("a",), ("x", "y"), "text"), None),
        (Example("0", ("a",), ("x", " \n"), "text"), "caption 1 is empty"),
        (Example("0", ("a",), ("x", "y", "y"), "text"), None),
        (Example("0", ("a",), ("x", "y", "y"), "text", 1), "the right one: y"),
        (Example("0", ("a",), ("x", "x", "y"), "text", 2), None),
        (Example("0", ("a", "a", "b"), ("x",), "image", 2), None),
        (Example("0", ("a", "b", "b"), ("x",), "image", 2), "the right one: b"),
        (Example("0", ("a", "b"), ("x", "x"), "both"), "the right one: x"),
        (Example("0", ("a", "a"), ("x", "y"), "both", 1), "the right one: a"),
        (Example("0", ("a", "b"), ("x", "y"), "both"), None),
    ],
)
def test_an_example_whose_right_answer_comes_twice_decides_nothing(
    example: Example, reason: str | None
) -> None:
    """Wrong candidates may be alike; what is right stands at `gold`."""
    assert (fault(example) or "").endswith(reason or "") and (fault(example) is None) == (
        not reason
    )


@pytest.mark.parametrize("uri", ["s3://", "s3:///name", "gs://?x=1"])
def test_a_uri_without_a_bucket(uri: str) -> None:
    with pytest.raises(InputError, match="names no bucket"):
        storage.filesystem(uri)
