"""People's own tables, folders and shards, row by row."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core.errors import InputError
from diffitm.store.pair_list import (
    Columns,
    OwnRow,
    is_table,
    read_folder,
    read_samples,
    read_table,
)
from diffitm.training.webdataset import members
from tests.loopback import picture

ROWS = [("a.jpg", "a red circle"), ("sub/b.png", 'say "no", null'), ("a.jpg", "1")]
EXPECTED = [OwnRow(image, (text,)) for image, text in ROWS]


def write(folder: Path, ending: str) -> str:
    """The rows in a file of each kind, with a column that nobody asks for."""
    file = folder / f"rows.{ending}"
    if ending == "parquet":
        columns = {"image": [r[0] for r in ROWS], "caption": [r[1] for r in ROWS], "n": [1, 2, 3]}
        parquet.write_table(pa.table(columns), file)
    elif ending == "jsonl":
        lines = [json.dumps({"n": i, "image": r[0], "caption": r[1]}) for i, r in enumerate(ROWS)]
        file.write_text("\n".join(lines))
    elif ending == "tsv":
        file.write_text("n\timage\tcaption\n" + "".join(f"1\t{a}\t{b}\n" for a, b in ROWS))
    else:
        quoted = [(a, b.replace('"', '""')) for a, b in ROWS]
        file.write_text("n,image,caption\n" + "".join(f'1,{a},"{b}"\n' for a, b in quoted))
    return str(file)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "tsv", "csv"])
def test_a_table_of_each_kind(tmp_path: Path, ending: str) -> None:
    """The columns by their usual names; words such as null and 1 are texts."""
    uri = write(tmp_path, ending)
    assert is_table(uri)
    assert list(read_table(uri, Columns())) == EXPECTED


def test_named_columns_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("url,path,words,from\nx,a.jpg,red,1\ny,b.jpg,blue,2\n")
    rows = list(read_table(str(file), Columns("path", "words", "from")))
    assert rows == [OwnRow("a.jpg", ("red",), "1"), OwnRow("b.jpg", ("blue",), "2")]


def test_lists_of_texts_and_texts_for_all(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    texts = [["a", "b"], [], None, ["a", " "], ["x"]]
    columns = {"image": ["1.jpg", "2.jpg", "3.jpg", "4.jpg", None], "texts": texts}
    parquet.write_table(pa.table(columns), file)
    rows = list(read_table(str(file), Columns()))
    assert [row.texts for row in rows] == [("a", "b"), (), ("",), ("a", " "), ("x",)]
    assert [row.failure for row in rows] == [
        None, "the row has no text", "the row has no text", "one of the row's texts is empty",
        "the row names no image",
    ]  # fmt: skip
    rows = list(read_table(str(file), Columns(), ["red", "blue"]))
    assert [row.texts for row in rows] == [("red", "blue")] * 5
    assert [row.failure is None for row in rows] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (Columns("img"), r"image_column 'img': .*rows.csv has no such column; did you mean"),
        (
            Columns(),
            r"image_column: .*rows.csv has file_name and path; name one of file_name, path",
        ),
        (Columns("path"), "text_column: .* has none of text, caption"),
        (Columns("path", "words", "set"), "source_column 'set': .* has no such column"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: Columns, text: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("file_name,path,words,imgs\na,a,red,b\n")
    with pytest.raises(InputError, match=text):
        list(read_table(str(file), columns))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "image,text\na,b,c\n"),
        ("a.jsonl", "{no json"),
        ("a.parquet", "PAR1"),
        ("a.csv", ""),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"data: .*{name} cannot be read"):
        list(read_table(str(tmp_path / name), Columns()))
    with pytest.raises(InputError, match="data: there is no file"):
        list(read_table(str(tmp_path / f"none-{name}"), Columns()))


def test_a_folder(tmp_path: Path) -> None:
    """Each image with the text beside it; hidden and other files are none."""
    for name in ("b.png", "a.jpg", "sub/c.JPEG", ".d.jpg", "e.gif", "f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text(" a red circle\n")
    (tmp_path / "sub" / "c.txt").write_text("")
    (tmp_path / "f.txt").write_bytes(b"\xff")
    rows = {row.image: row for row in read_folder(str(tmp_path), [])}
    assert list(rows) == ["a.jpg", "b.png", "f.jpg", "sub/c.JPEG"]
    assert rows["a.jpg"] == OwnRow("a.jpg", ("a red circle",))
    assert rows["b.png"].failure == "there is no b.txt beside it"
    assert rows["sub/c.JPEG"].failure == "sub/c.txt is empty"
    assert str(rows["f.jpg"].failure).startswith("f.txt: 'utf-8'")
    assert [row.texts for row in read_folder(str(tmp_path), ["x"])] == [("x",)] * 4
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"data: .* holds no \.jpg or \.png"):
        list(read_folder(str(tmp_path / "none"), []))


def test_shards(tmp_path: Path) -> None:
    """As img2dataset writes them; a sample without a text is a failure."""
    file = tmp_path / "0000.tar"
    contents: dict[str, bytes] = {
        "1.jpg": picture(), "1.txt": b"red", "1.json": b'{"caption": "no", "set": 3}', "2.json":
        b'{"caption": "blue"}', "2.jpg": picture(), "3.jpg": picture(), "4.txt": b"alone",
        "5.jpg": picture(), "5.json": b"{",
    }  # fmt: skip
    with tarfile.open(file, "w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    rows = list(read_samples(members(str(file)), [], "set"))
    assert [row.texts for row in rows] == [("red",), ("blue",), ("",), ("alone",), ()]
    assert [row.source for row in rows] == ["3", None, None, None, None]
    told = [row.failure for row in rows]
    assert told[:4] == [None, None, "the row has no text", "the row names no image"]
    assert str(told[4]).startswith(".json cannot be read")
    assert rows[0].image.startswith("0000.tar#bytes=")
    every = list(read_samples(members(str(file)), ["x"]))
    assert [row.texts for row in every[:3]] == [("x",)] * 3
