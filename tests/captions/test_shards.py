"""Samples of WebDataset shards: names with dots, texts that are bad, shards that break off."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

import pytest

from diffitm.captions.read import divide, read
from diffitm.captions.row import Columns, Reading
from diffitm.captions.shards import shards
from diffitm.core import images
from diffitm.core.errors import InputError
from tests.loopback import picture

OWN = Reading()


def write(path: Path, members: list[tuple[str, bytes]] | dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def found(path: Path | str, reading: Reading = OWN) -> tuple[dict[str, str], dict[str, str]]:
    """Texts by sample, and reasons by sample."""
    good, lost = divide(read(str(path), reading))
    texts = {row.place.split("sample ")[-1]: row.texts[0] for row in good}
    return texts, {row.place.split("sample ")[-1]: str(row.failure) for row in lost}


def test_as_img2dataset_writes_them(tmp_path: Path) -> None:
    """The .txt before the .json's caption, which also has the source."""
    file = write(tmp_path / "0000.tar", {
        "1.jpg": picture(), "1.txt": b"red", "1.json": b'{"caption": "no", "set": 3}', "2.json":
        b'{"caption": "blue"}', "2.JPG": picture(), "./sub/3.webp": picture(), "./sub/3.TXT": b"green\n",
    })  # fmt: skip
    assert found(file)[0] == {"1": "red", "2": "blue", "sub/3": "green"}
    rows = list(read(str(file), Reading(Columns(source="set"))))
    assert [row.source for row in rows] == ["3", None, None]
    assert all(images.load(str(tmp_path), row.image)[0].size for row in rows)
    every = list(read(str(file), Reading(texts=("x",))))
    assert [row.texts for row in every] == [("x",)] * 3


def test_names_with_dots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name up to the first dot is the sample's and other endings are its fields; where these are
    samples themselves, none is lost."""
    file = write(tmp_path / "a.tar", [
        ("cat.1.jpg", b"i"), ("cat.1.txt", b"one"), ("cat.2.jpg", b"i"), ("cat.2.txt", b"two"),
        ("dog.v1.0.png", b"i"), ("dog.v1.0.json", b'{"caption": "dog"}'),
        ("field.jpg", b"i"), ("field.seg.png", b"i"), ("field.txt", b"field"), ("field.cls", b"1"),
        ("rgb.rgb.jpg", b"i"), ("rgb.txt", b"rgb"),
        ("own.jpg", b"i"), ("own.txt", b"own"), ("own.b.jpg", b"i"), ("own.b.txt", b"other"),
    ])  # fmt: skip
    with caplog.at_level(logging.WARNING, "diffitm"):
        texts, lost = found(file)
    assert "left out 1 images that are fields of other samples, such as field.seg" in caplog.text
    assert texts == {
        "cat.1": "one", "cat.2": "two", "dog.v1.0": "dog", "field": "field", "rgb.rgb": "rgb",
        "own": "own", "own.b": "other",
    }  # fmt: skip
    assert lost == {}


BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "Latin-1": ({"b.jpg": b"", "b.txt": b"caf\xe9 au"}, "its .txt is not UTF-8 (at byte 3)"),
    "broken json": ({"b.jpg": b"", "b.txt": b"x", "b.json": b"{"}, "its .json cannot be read"),
    "other json": ({"b.jpg": b"", "b.json": b"[1]"}, "its .json is no object"),
    "twice in json": ({"b.jpg": b"", "b.json": b'{"caption":"x","caption":"y"}'}, "is there twice"),
    "a number": ({"b.jpg": b"", "b.json": b'{"caption": 5}'}, "a text is a number: 5"),
    "nan": ({"b.jpg": b"", "b.json": b'{"caption": NaN}'}, "a text is a number: NaN"),
    "null": ({"b.jpg": b"", "b.json": b'{"caption": null}'}, "the row has no text: no caption in its .json"),
    "empty": ({"b.jpg": b"", "b.txt": b" \n"}, "the row has no text: no caption in its .txt"),
    "no text": ({"b.jpg": b""}, "the row has no text: neither a .txt nor a .json"),
    "no image": ({"b.txt": b"x"}, "it has no image, only .txt"),
    "of no known kind": ({"b.heic": b"x", "b.txt": b"x"}, "it has no image, only .heic, .txt"),
    "two images": ({"b.jpg": b"", "b.png": b"", "b.txt": b"x"}, "it has 2 images: .jpg and .png"),
    "no list": (
        {"b.jpg": b"", "b.txt": b"x", "b.json": b'{"negative_captions": "y"}'},
        "its negative captions are no list of texts: y",
    ),
    "no such negative": (
        {"b.jpg": b"", "b.txt": b"x", "b.json": b'{"negative_images": ["q"]}'},
        "negative_images names q, which is no sample with an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_costs_itself(tmp_path: Path, kind: str) -> None:
    """And what another sample of the file is, is read."""
    members, told = BAD[kind]
    file = write(
        tmp_path / "s.tar", {"a.jpg": b"", "a.txt": b"good", **members, "c.jpg": b"", "c.txt": b"c"}
    )
    texts, lost = found(file, Reading(negatives=True))
    assert texts == {"a": "good", "c": "c"}
    assert list(lost) == ["b"]
    assert told in lost["b"]


def test_an_empty_txt_does_not_hide_the_json(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tar", {"a.jpg": b"", "a.txt": b" ", "a.json": b'{"caption": "x"}'})
    assert found(file) == ({"a": "x"}, {})


def test_a_txt_that_shows_nothing_does_not_hide_the_json(tmp_path: Path) -> None:
    members = {"a.jpg": b"", "a.txt": "\u200b".encode(), "a.json": b'{"caption": "x"}'}
    assert found(write(tmp_path / "s.tar", members)) == ({"a": "x"}, {})


def test_members_twice_and_in_any_order(tmp_path: Path) -> None:
    members = [("0.jpg", b""), ("1.jpg", b""), ("0.txt", b"a"), ("1.txt", b"b"), ("0.jpg", b"i")]
    texts, lost = found(write(tmp_path / "s.tar", members))
    assert (texts, lost) == ({"1": "b"}, {"0": "it has 2 images: .jpg and .jpg"})


def test_litter_is_no_sample_and_links_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("._a.jpg", ".DS_Store", "__MACOSX/._a.jpg", "Thumbs.db")
    file = write(tmp_path / "s.tar", {"a.jpg": b"", "a.txt": b"x", **dict.fromkeys(names, b"?")})
    assert found(file) == ({"a": "x"}, {})
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
    with caplog.at_level(logging.WARNING, "diffitm"):
        assert found(file) == ({"a": "x"}, {})
    assert "left out 1 members that are links" in caplog.text


def test_images_alone(tmp_path: Path) -> None:
    """Bad texts cost them nothing, each image of a sample is one, fields of others are none."""
    members = {
        "a.jpg": b"",
        "a.txt": b"\xff",
        "a.json": b"{",
        "b.jpg": b"",
        "b.png": b"",
        "a.seg.png": b"",
    }
    rows = list(read(str(write(tmp_path / "s.tar", members)), Reading(texts=())))
    assert [row.place for row in rows] == [f"s.tar, sample {name}" for name in "abb"]
    assert all(row.failure is None for row in rows)


def test_a_shard_that_breaks_off_gives_what_comes_before(tmp_path: Path) -> None:
    members = {f"{i}.{ending}": b"x" for i in range(4) for ending in ("jpg", "txt")}
    file = write(tmp_path / "s.tar", members)
    whole = file.read_bytes()
    for data in (whole[:2100], whole[:2100] + b"x" * 900):
        file.write_bytes(data)
        texts, lost = found(file)
        assert texts == {"0": "x"}
        assert lost["s.tar, behind 1 samples"].startswith("it is no whole, uncompressed tar")
    file.write_bytes(b"no tar" * 200)
    with pytest.raises(
        InputError, match=r"none of its 1 rows can be used; s\.tar, behind 0 samples"
    ):
        found(file)


def test_archives_one_behind_the_other(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes them, and writers that end an archive with two blocks alone."""
    parts = [
        write(tmp_path / "part", {f"{key}.jpg": b"x", f"{key}.txt": b"t"}).read_bytes()
        for key in "01"
    ]
    for sizes in ((10240, 10240), (2048 + 1024, 10240), (2048 + 1024, 2048 + 512)):
        data = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        (tmp_path / "s.tar").write_bytes(b"".join(data))
        assert found(tmp_path / "s.tar") == ({"0": "t", "1": "t"}, {})


def test_headers_for_all_members(tmp_path: Path) -> None:
    """As `git archive` writes one; names that are long have headers of their own."""
    names = ["a", "b" * 180]
    with tarfile.open(tmp_path / "s.tar", "w", pax_headers={"comment": "x" * 600}) as archive:
        for name in (f"{name}.{ending}" for name in names for ending in ("jpg", "txt")):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    assert found(tmp_path / "s.tar") == (dict.fromkeys(names, "x"), {})


def test_zeros_where_members_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What an aborted download leaves is a failure of the shard, what stands before and behind is read."""
    write(tmp_path / "a.tar", {"a.jpg": b"", "a.txt": b"a"})
    members = {f"{i}.{ending}": b"x" for i in range(4) for ending in ("jpg", "txt")}
    whole = write(tmp_path / "s.tar", members).read_bytes()
    cases = [
        (whole[:2048] + bytes(2048) + whole[4096:], "023", "zeros .* bytes 2,048 to 4,096"),
        (whole[:2048] + bytes(2560) + whole[4608:], "0", "breaks off at byte 4,608"),
        (whole + b"more", "0123", "breaks off at byte 10,240"),
        (whole + b"<html>" * 200, "0123", "breaks off at byte 10,240"),
        (whole[:2048] + bytes(2**21), "0", "zeros .* bytes 2,048 to"),
        (bytes(2**16), "", "zeros .* bytes 0 to 65,536"),
    ]
    for data, kept, told in cases:
        (tmp_path / "s.tar").write_bytes(data)
        texts, lost = found(tmp_path / "*.tar")
        assert texts == {"a": "a"} | dict.fromkeys(kept, "x")
        (failure,) = lost.values()
        assert re.search(told, failure), failure
    write(tmp_path / "s.tar", {})
    assert found(tmp_path / "*.tar") == ({"a": "a"}, {})
    assert "it is an empty archive" in caplog.text


def test_negative_images_of_other_shards(tmp_path: Path) -> None:
    """A key is that of its shard, or of the only one that has it."""
    known = json.dumps({"caption": "x", "negative_images": ["1", "2"]}).encode()
    write(tmp_path / "a.tar", {"./0.png": b"", "./0.json": known, "./1.png": b"", "1.txt": b"x"})
    write(tmp_path / "b.tar", {f"{i}.{e}": b"x" for i in range(3) for e in ("png", "txt")})
    rows = list(read(str(tmp_path / "*.tar"), Reading(negatives=True)))
    images_by_place = {row.place: row.image for row in rows}
    assert rows[0].negative_images == (
        images_by_place["a.tar, sample 1"],
        images_by_place["b.tar, sample 2"],
    )
    assert all(row.failure is None for row in rows)


def test_shards_that_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "s-0.tar", {"a.png": b"", "a.txt": b"a"})
    write(tmp_path / "._s-0.tar", {})
    assert shards(str(tmp_path / "*.tar")) == [str(tmp_path / "s-0.tar")]
    for uri, told in (
        ("s-{0..1}.tar", r"captions: there is no shard .*s-1\.tar"),
        ("t-*.tar", "captions: there is no shard"),
        ("{0..1}/s.tar", "must be in the file's name"),
    ):
        with pytest.raises(InputError, match=told):
            found(tmp_path / uri, Reading(field="captions"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """One beside the shards is none of theirs, one of a shard is refused by name."""
    write(tmp_path / "a.tar", {"a.png": b"", "a.txt": b"a"})
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb"):
        pass
    assert found(tmp_path / "*.tar") == ({"a": "a"}, {})
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.tar"), "wb"):
        pass
    for name in ("*.tar", "caf\udce9.tar", "caf\udce9.csv", "caf\udce9"):
        with pytest.raises(InputError, match=r"caf\\udce9.*: this path is not UTF-8; rename it"):
            found(tmp_path / name)
