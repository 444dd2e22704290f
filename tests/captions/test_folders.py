"""Folders of images with texts beside them or in metadata files."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.captions.read import divide, read
from diffitm.captions.row import Reading
from diffitm.core.errors import InputError

OWN = Reading()
KINDS = "a.jpg b.JPEG c.png d.webp e.gif f.bmp g.tif h.TIFF i.avif j.jfif k.l.jpg sub/m.JPG".split()


def put(folder: Path, names: list[str], data: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def found(folder: Path, reading: Reading = OWN) -> tuple[dict[str, str], dict[str, str]]:
    """Texts and reasons by image."""
    good, lost = divide(read(str(folder), reading))
    return {r.image: r.texts[0] for r in good}, {r.image: str(r.failure) for r in lost}


def test_every_kind_of_image_and_no_litter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies there and is no image is told."""
    put(tmp_path, [*KINDS, "._a.jpg", ".DS_Store", "Thumbs.db", ".cache/n.jpg", "__MACOSX/o.jpg"])
    put(tmp_path, [f"{name.rpartition('.')[0]}.txt" for name in KINDS], b" a text\n")
    put(tmp_path, ["p.heic", "q.heic", "notes.txt", "LICENSE"])
    with caplog.at_level(logging.WARNING, "diffitm"):
        texts, lost = found(tmp_path)
    assert (texts, lost) == (dict.fromkeys(KINDS, "a text"), {})
    assert "left out files that are no image and of none: 2 .heic" in caplog.text
    assert "1 .txt" in caplog.text and "1 without ending" in caplog.text


def test_links_multiply_nothing(tmp_path: Path) -> None:
    """To the folder itself, to one that is listed anyway, to each other; to one elsewhere is followed."""
    inside, other = tmp_path / "in", tmp_path / "other"
    put(inside, ["a/0.jpg", "b/1.jpg"])
    put(other, ["2.jpg"])
    for link, target in {
        "self": ".",
        "a/up": "..",
        "c": "a",
        "b/a": "../a",
        "d": str(other),
    }.items():
        os.symlink(target, inside / link)
    texts = Reading(texts=("x",))
    assert list(found(inside, texts)[0]) == ["a/0.jpg", "b/1.jpg", "d/2.jpg"]


def test_a_bad_text_costs_its_image(tmp_path: Path) -> None:
    put(tmp_path, [f"{name}.jpg" for name in "abcdef"])
    put(tmp_path, ["a.txt"], b"caf\xe9")
    put(tmp_path, ["b.txt", "c.txt", "d.txt"], b" ")
    put(tmp_path, ["b.json"], b'{"caption": "of the json"}')
    put(tmp_path, ["c.json"], b"{")
    put(tmp_path, ["f.txt"], b"good")
    texts, lost = found(tmp_path)
    assert texts == {"b.jpg": "of the json", "f.jpg": "good"}
    assert lost["a.jpg"] == "its .txt is not UTF-8 (at byte 3)"
    assert lost["c.jpg"].startswith("its .json cannot be read")
    assert lost["d.jpg"] == "the row has no text: no caption in its .txt"
    assert lost["e.jpg"] == "the row has no text: neither a .txt nor a .json"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_metadata_of_the_hub(tmp_path: Path, ending: str) -> None:
    """Paths start where it lies; an image that it does not name may have a text beside it."""
    put(tmp_path, ["train/a.png", "train/b.png", "test/c.png", "train/d.png"])
    put(tmp_path, ["test/c.txt"], b"beside")
    file = tmp_path / "train" / f"metadata.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": ["x", None]}), file)
    elif ending == "csv":
        file.write_text("file_name,text\na.png,x\nb.png,\n")
    else:
        file.write_text(
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": null}\n'
        )
    texts, lost = found(tmp_path)
    assert texts == {"train/a.png": "x", "test/c.png": "beside"}
    assert lost["train/b.png"] == "the row has no text"
    assert lost["train/d.png"].endswith("and no metadata names it")


def test_two_metadata_files_of_one_folder(tmp_path: Path) -> None:
    put(tmp_path, ["a.png", "sub/b.png"])
    for name in ("metadata.csv", "sub/metadata.csv"):
        (tmp_path / name).write_text(f"file_name,text\n{'b' if 'sub' in name else 'a'}.png,x\n")
    assert found(tmp_path)[0] == {"a.png": "x", "sub/b.png": "x"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "y"}')
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl both say"):
        found(tmp_path)


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    """Of paths, which start where the file lies, or of the images themselves."""
    (tmp_path / "data").mkdir()
    images = pa.array([{"bytes": b"x", "path": "a.png"}])
    parquet.write_table(pa.table({"image": images, "text": ["x"]}), tmp_path / "data/0.parquet")
    parquet.write_table(pa.table({"image": ["b.png"], "text": ["y"]}), tmp_path / "data/1.parquet")
    assert found(tmp_path)[0] == {"data/0.parquet#row=0": "x", "data/b.png": "y"}


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data: .* holds no image \(\.jpg, .* and no \.parquet"):
        found(tmp_path)
    put(tmp_path, ["0.tar"])
    with pytest.raises(InputError, match=r"shards are given as DIR/\*\.tar"):
        found(tmp_path)
    with pytest.raises(InputError, match="data: there is no such folder"):
        found(tmp_path / "none")


def test_images_that_are_no_files(tmp_path: Path) -> None:
    """A link that leads nowhere or to itself and a pipe are told, as is one alone."""
    put(tmp_path, ["a.png"])
    put(tmp_path, ["a.txt", "b.txt"], b"x")
    os.symlink("none.png", tmp_path / "b.png")
    os.symlink("c.png", tmp_path / "c.png")
    os.symlink("none", tmp_path / "notes")
    os.mkfifo(tmp_path / "d.png")
    link, pipe = (
        "it is a link that leads to no file",
        "it is no file but a pipe, a socket or a device",
    )
    lost = {"b.png": link, "c.png": link, "d.png": pipe}
    assert found(tmp_path) == ({"a.png": "x"}, lost)
    assert found(tmp_path, Reading(texts=("y",))) == ({"a.png": "y"}, lost)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"none of its 3 rows .* b\.png: it is a link"):
        found(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    put(tmp_path, ["a.png"])
    put(tmp_path, ["a.txt"], b"x")
    for name in (b"caf\xe9.png", b"caf\xe9.txt", b"caf\xe9.caf\xe9"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"x")
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"\xe9"))
    for name in ("metadata.jsonl", "b.png"):
        with open(os.path.join(os.fsencode(tmp_path), b"\xe9", name.encode()), "wb") as file:
            file.write(b"{}")
    told = "its path is not UTF-8"
    lost = {"caf\\udce9.png": told, "\\udce9/b.png": told, "\\udce9/metadata.jsonl": told}
    assert found(tmp_path) == ({"a.png": "x"}, lost)
    assert found(tmp_path, Reading(texts=("y",))) == ({"a.png": "y"}, lost)


def test_two_images_of_one_text(tmp_path: Path) -> None:
    """As in a shard; images alone, or with metadata, may have names alike."""
    put(tmp_path, ["a.png", "d.jpg", "d.png"])
    put(tmp_path, ["a.txt", "d.txt"], b"x")
    failure = "d.txt is of 2 images: d.jpg and d.png"
    assert found(tmp_path) == ({"a.png": "x"}, {"d.jpg": failure, "d.png": failure})
    assert len(found(tmp_path, Reading(texts=("y",)))[0]) == 3
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d.jpg", "text": "y"}')
    assert found(tmp_path)[0] == {"a.png": "x", "d.jpg": "y", "d.png": "x"}


def test_metadata_that_names_an_image_by_another_way(tmp_path: Path) -> None:
    put(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./a.png", "text": "x"}')
    assert found(tmp_path) == ({"./a.png": "x"}, {})


def test_a_parquet_file_that_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It costs itself; one of other columns is refused; what else lies there is told."""
    parquet.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tmp_path / "0.parquet")
    put(tmp_path, ["1.parquet", "2.tar"], b"PAR1")
    texts, lost = found(tmp_path)
    assert (texts, list(lost)) == ({"0.parquet#row=0": "x"}, [""])
    assert lost[""].startswith("it cannot be read: ")
    assert "left out files that are no image and of none: 1 .tar" in caplog.text
    parquet.write_table(pa.table({"n": [1]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet has none of image"):
        found(tmp_path)
