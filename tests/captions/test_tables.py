"""Tables of images and captions: each kind alike, strictly, a bad row costing itself."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.captions.read import divide, image_root, read
from diffitm.captions.row import CaptionRow, Columns, Reading
from diffitm.captions.table import is_table
from diffitm.core.errors import InputError
from diffitm.store.pair_table import write_own

OWN = Reading()
ROWS = [("a.jpg", "a red circle"), ("sub/b.png", 'say "no", null'), ("a.jpg", "1")]


def pairs(uri: Path | str, reading: Reading = OWN) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.image, row.texts) for row in read(str(uri), reading) if row.failure is None]


def failures(uri: Path, reading: Reading = OWN) -> list[str]:
    return [f"{row.place}: {row.failure}" for row in divide(read(str(uri), reading))[1]]


def write(folder: Path, ending: str) -> Path:
    """The rows in a file of each kind, with a column that nobody asks for."""
    file = folder / f"rows.{ending}"
    lines = [{"n": i, "image": image, "caption": text} for i, (image, text) in enumerate(ROWS)]
    if ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(lines), file)
    elif ending in ("jsonl", "ndjson"):
        file.write_text("\n".join(map(json.dumps, lines)))
    elif ending == "json":
        file.write_text(json.dumps(lines))
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if ending == "csv" else "\t")
        writer.writerows([["n", "image", "caption"], *(line.values() for line in lines)])
        file.write_text(text.getvalue(), newline="")
    return file


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "ndjson", "json", "tsv", "csv", "CSV"])
def test_a_table_of_each_kind(tmp_path: Path, ending: str) -> None:
    """The columns by their usual names; words such as null and 1 are texts."""
    file = write(tmp_path, ending.lower()).rename(tmp_path / f"rows.{ending}")
    assert is_table(str(file))
    assert pairs(file) == [(image, (text,)) for image, text in ROWS]


def test_named_columns_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("url,path,words,from\nx,a.jpg,red,1\ny,b.jpg,blue,2\n")
    rows = list(read(str(file), Reading(Columns("path", "words", "from"))))
    assert [(row.image, row.texts, row.source) for row in rows] == [
        ("a.jpg", ("red",), "1"),
        ("b.jpg", ("blue",), "2"),
    ]


def test_image_and_caption_are_read_where_other_usual_names_are_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("path,image,caption,text\nx,a.jpg,red,no\n")
    assert pairs(file) == [("a.jpg", ("red",))]


def test_lists_of_texts_and_texts_for_all(tmp_path: Path) -> None:
    """A bad text of a list costs the row in score, itself alone where a row a text is wanted."""
    file = tmp_path / "rows.parquet"
    texts = [["a", "b"], [], None, ["a", " "], ["x"]]
    columns = {"image": ["1.jpg", "2.jpg", "3.jpg", "4.jpg", None], "texts": texts}
    parquet.write_table(pa.table(columns), file)
    rows = list(read(str(file), Reading()))
    assert [row.texts for row in rows] == [("a", "b"), (), (), ("a", " "), ("x",)]
    none = "the row has no text"
    assert [row.failure for row in rows] == [None, none, none, none, "the row names no image"]
    good, lost = divide(rows)
    assert [(row.image, row.texts[0]) for row in good] == [
        ("1.jpg", "a"),
        ("1.jpg", "b"),
        ("4.jpg", "a"),
    ]
    assert [row.place for row in lost] == [f"rows.parquet, row {n}" for n in (1, 2, 3, 4)]
    rows = list(read(str(file), Reading(texts=("red", "blue"))))
    assert [row.texts for row in rows] == [("red", "blue")] * 5
    assert [row.failure is None for row in rows] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (Columns("img"), r"image_column 'img': .*rows.csv has no such column; did you mean"),
        (Columns(), r"rows.csv has file_name and path; one must be named image"),
        (Columns("path"), "has none of caption, captions, text"),
        (Columns("path", "words", "set"), "source_column 'set': .* has no such column"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: Columns, text: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("file_name,path,words,imgs\na,a,red,b\n")
    with pytest.raises(InputError, match=text):
        list(read(str(file), Reading(columns)))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "image,text\na,b, c\n", r"line 2: 3 fields where .* 2 columns .* be quoted\): 'a,b,c'"),
        ("a.csv", "image,text\na\n", "line 2: 1 fields where"),
        ("a.tsv", "image\ttext\na\tb\tc\n", r"line 2: 3 fields .*cannot have tabs"),
        ("a.csv", 'image,text\na.jpg,"b\nc.jpg,d\n', "line 2: not CSV: a quote opens that does not close"),
        ("a.csv", 'image,text\na.jpg,"b\nc.jpg,d\ne.jpg,f"\n', r"line 2: a quote opens .*'c\.jpg,d'"),
        ("a.csv", 'image,text\na.jpg,"b\nc.jpg,"d"\n', "line 2: not CSV: a quoted text goes on"),
        ("a.csv", "image;text\na;b\n", "line 1: semicolons separate its columns where commas must"),
        ("a.csv", "image\ttext\na\tb\n", "line 1: tabs separate its columns where commas must"),
        ("a.tsv", "image,text\na,b\n", "line 1: commas separate its columns where tabs must"),
        ("a.csv", "image,text,text\na,b,c\n", "line 1: two columns are named 'text'"),
        ("a.csv", b"image,caf\xe9\na,b\n", "line 1: it is not UTF-8"),
        ("a.csv", "image,text\na,b\n".encode("utf-16"), "it is UTF-16"),
        ("a.csv", "image,text\na,b\n".encode("utf-16-le"), "it is UTF-16"),
        ("a.json", "[]".encode("utf-16-be"), "it is UTF-16"),
        ("a.csv", "image,text\na,b\n".encode("utf-32"), "it is UTF-32"),
        ("a.jsonl", "{}".encode("utf-32-be"), "it is UTF-32"),
        ("a.json", '{"images": [{"id": 1}], "annotations": null}', "annotations is null; expects a list"),
        ("a.json", '{"images": [], "annotations": {"1": ["x"]}}', "annotations is {.*; expects a list"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "only image_id, bbox"),
        ("a.csv", "", "a.csv cannot be read: it is empty"),
        ("a.csv", "image,text\n", "a.csv holds no row"),
        ("a.csv", "image,text\n,b\n", r"none of its 1 rows can be used; a\.csv, line 2: the row names no"),
        ("a.jsonl", "{no json", r"none of its 1 rows can be used; a\.jsonl, line 1: it is not JSON"),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read"),
        ("a.json", '{"a.jpg": ["x"], "a.jpg": ["y"]}', "'a.jpg' is there twice"),
        ("a.json", '[{"image": "a", "caption": "x", "caption": "y"}]', "'caption' is there twice"),
        ("a.json", '{"image": "a"}\n{"image": "b"}', r"JSON lines are named \.jsonl"),
        ("a.json", '{"image": ["a"], "caption": ["x"]}', "found the keys image, caption"),
        ("a.json", "3", "expects .*; found 3"),
        ("a.json", "{}", "holds no row"),
        ("a.json", "{", "cannot be read"),
        ("a.xlsx", "PK", r"a\.xlsx is no \.parquet, \.csv"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: Any, told: str) -> None:
    """The message names the file, the line where there are lines, and what is right."""
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=told) as caught:
        list(read(str(tmp_path / name), Reading()))
    assert name in str(caught.value)
    if is_table(name):
        with pytest.raises(InputError, match="captions: there is no file"):
            list(read(str(tmp_path / f"none-{name}"), Reading(field="captions")))


@pytest.mark.parametrize(
    "content",
    [
        b"image,text\ra.jpg,x\rb.jpg,y\r",
        b"image,text\r\na.jpg,x\r\n\r\n,\r\nb.jpg,y",
        "\ufeffimage, text \na.jpg,x\nb.jpg,y\n".encode(),
        b'image, text\na.jpg, x\nb.jpg, "y"\n',
    ],
)
def test_line_ends_and_byte_order_marks(tmp_path: Path, content: bytes) -> None:
    """Lines that hold nothing are none."""
    (tmp_path / "a.csv").write_bytes(content)
    assert pairs(tmp_path / "a.csv") == [("a.jpg", ("x",)), ("b.jpg", ("y",))]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('a.jpg\t"x\nb.jpg\ty\n', ['"x', "y"]),
        ('a.jpg\t"Hello" he said\nb.jpg\t12" wide\n', ['"Hello" he said', '12" wide']),
        ('a.jpg\t"say ""no"""\nb.jpg\ty\n', ['say "no"', "y"]),
        ('a.jpg\t"two\nlines"\nb.jpg\ty\n', ["two\nlines", "y"]),
    ],
)
def test_quotes_in_a_tsv_mean_something_where_its_writer_quoted(
    tmp_path: Path, content: str, texts: list[str]
) -> None:
    (tmp_path / "a.tsv").write_text(f"image\tcaption\n{content}")
    assert [own[0] for _, own in pairs(tmp_path / "a.tsv")] == texts


def test_a_tsv_that_is_quoted_here_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('image\tcaption\na\t"say ""no"""\nb\t"Hello" he said\n')
    with pytest.raises(InputError, match=r"a\.tsv, line 3: not CSV: a quoted text goes on"):
        list(read(str(tmp_path / "a.tsv"), Reading()))


def test_a_text_of_several_lines_is_none_of_swallowed_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\na.jpg,"a red\nbig car, see a.jpg, b"\n')
    assert pairs(tmp_path / "a.csv") == [("a.jpg", ("a red\nbig car, see a.jpg, b",))]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('image,caption\n"a b.png","a red circle\nmy b.png,a blue square"\nc.png,x\n', 3),
        ('image,caption\n0001,"open\n0002,closed"\n0003,x\n', 3),
        ('image,caption\na.heic,"open\nb.heic,between\n\nc.heic,closed"\nd.heic,x\n', 3),
        ('caption,image\n"a dog,my a.png\na cat",b.png\nx,c.png\n', 3),
        ('n,image,caption,set\n1,a b.png,"open,train\n2,c d.png,closed",test\n', 3),
        ('image,caption\nabc,"open\ndef,closed"\nghi,x\n', 3),
    ],
)
def test_a_quote_that_a_later_row_closes(tmp_path: Path, content: str, line: int) -> None:
    """Whatever the images' names look like, and in whichever column it opens."""
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"line 2: a quote opens .* of line {line} \("):
        list(read(str(file), OWN))


@pytest.mark.parametrize(
    "text",
    [
        "a red\nsmall circle",
        "a red, small circle\non white, alone",
        "a red circle\non white, alone",
        "dots\nof 3,000 kinds",
        "a poem,\n\nwith foo.png, in it",
    ],
)
def test_texts_of_several_lines(tmp_path: Path, text: str) -> None:
    """As they are; one that looks like rows too, where every field of the file is quoted."""
    for quoting, own in ((csv.QUOTE_MINIMAL, text), (csv.QUOTE_ALL, "a red\nb.png,a blue")):
        with (tmp_path / "a.csv").open("w", newline="") as stream:
            writer = csv.writer(stream, quoting=quoting)
            writer.writerows([["image", "caption"], ["a.png", own], ["b.png", "x"]])
        assert pairs(tmp_path / "a.csv") == [("a.png", (own,)), ("b.png", ("x",))]


def test_a_sentence_is_no_row_of_names_without_endings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\nab12,"A day\nOutside, a dog runs"\ncd34,x\n')
    assert pairs(tmp_path / "a.csv")[0] == ("ab12", ("A day\nOutside, a dog runs",))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_text_of_any_length(tmp_path: Path, ending: str) -> None:
    """The csv module's own limit is 131,072 characters."""
    file, separator = tmp_path / f"a.{ending}", "," if ending == "csv" else "\t"
    file.write_text(f"image{separator}caption\na.png{separator}{'x' * 140_000}\n")
    assert [len(texts[0]) for _, texts in pairs(file)] == [140_000]


BAD = {
    "null": "the row has no text",
    '" "': "the row has no text",
    "NaN": "a text is a number: NaN",
    "5": "a text is a number: 5",
    "true": "a text is true or false: true",
    '{"a": 1}': "a text is an object",
    '[["x"]]': 'a text is a list: ["x"]',
    '"\\ud800"': "a text is not UTF-8",
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_bad_text_costs_its_row(tmp_path: Path, ending: str, value: str) -> None:
    rows = ['{"image": "a.jpg", "caption": "x"}', f'{{"image": "b.jpg", "caption": {value}}}']
    text = "\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]"
    file = tmp_path / f"rows.{ending}"
    file.write_text(text)
    assert pairs(file) == [("a.jpg", ("x",))]
    (told,) = failures(file)
    assert told.startswith(
        f"rows.{ending}, {'line 2' if ending == 'jsonl' else 'entry 1'}: {BAD[value]}"
    )


def test_bytes_that_are_no_utf8_cost_their_row(tmp_path: Path) -> None:
    """In an image's path too."""
    (tmp_path / "a.csv").write_bytes(b"image,caption\na.jpg,caf\xe9\nb.jpg,x\nc\xe9.jpg,x\n")
    assert pairs(tmp_path / "a.csv") == [("b.jpg", ("x",))]
    assert failures(tmp_path / "a.csv") == [
        r"a.csv, line 2: a text is not UTF-8: caf\udce9",
        r"a.csv, line 4: the image's path is not UTF-8: c\udce9.jpg",
    ]


def test_bad_lines_of_json(tmp_path: Path) -> None:
    """A line that is no JSON, no object, says something twice or names an image by a number."""
    lines = ["{", "[1]", '{"image":"a","caption":"x","caption":"y"}', '{"image":3,"caption":"x"}']
    (tmp_path / "a.jsonl").write_text(
        "\n".join([*lines, "", '{"path": "b", "text": "y"}', '{"n": 1}'])
    )
    assert pairs(tmp_path / "a.jsonl") == [("b", ("y",))]
    told = failures(tmp_path / "a.jsonl")
    assert [text.split(": ")[0] for text in told] == [f"a.jsonl, line {n}" for n in (1, 2, 3, 4, 7)]
    expected = ["not JSON", "no object", "twice", "a number", "none of image"]
    assert all(word in text for word, text in zip(expected, told, strict=True))


def test_images_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a.jpg": ["x", "y"], "b.jpg": "z", "c.jpg": []}')
    assert pairs(tmp_path / "a.json") == [("a.jpg", ("x", "y")), ("b.jpg", ("z",))]
    assert failures(tmp_path / "a.json") == ["a.json, key 'c.jpg': the row has no text"]


def test_coco_captions(tmp_path: Path) -> None:
    """An image's captions in their order; what hangs together with nothing is told."""
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "b.jpg"},
        {"id": 1, "file_name": "c"},
    ]
    said = [(1, "x"), (1, ""), (9, "y"), (1, "z")]
    annotations = [{"image_id": i, "caption": c} for i, c in said]
    content = {"info": {}, "images": images, "annotations": annotations}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    good, lost = divide(read(str(tmp_path / "captions_val2014.json"), Reading()))
    assert [(row.image, row.texts[0]) for row in good] == [("a.jpg", "x"), ("a.jpg", "z")]
    assert [(row.place.split(", ")[1], row.failure) for row in lost] == [
        ("image 0", "the row has no text"),
        ("image 1", "the row has no text"),
        ("image 2", "another image has its id 1"),
        ("annotation 2", "its image_id 9 is of none of the images"),
    ]


def test_coco_of_instances_has_images(tmp_path: Path) -> None:
    """Which are enough where no captions are wanted."""
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert pairs(tmp_path / "instances.json", Reading(texts=())) == [("a.jpg", ())]


def test_karpathys_data_set(tmp_path: Path) -> None:
    """With COCO's folders, and without as Flickr30K has none."""
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "x"}, {"raw": "y"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "z"}, {}]},
    ]  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    good, lost = divide(read(str(tmp_path / "dataset_coco.json"), Reading()))
    found = [(row.image, row.texts[0]) for row in good]
    assert found == [("val2014/a.jpg", "x"), ("val2014/a.jpg", "y"), ("b.jpg", "z")]
    assert [row.place for row in lost] == ["dataset_coco.json, image 1"]


def test_negatives_in_tables(tmp_path: Path) -> None:
    """NegCLIP's layout with lines of images, others with paths; a row without its lists is lost alone, and
    the numbers of the others stay."""
    lines = ["\ttitle\tfilepath\tneg_caption\tneg_image", "0\tx\ta.jpg\t['y']\t[2, 99]"]
    lines += ["1\ty\tb.jpg\tnone\t[]", "2\tz\tc.jpg\t[]\t[0]", "3\tw\td\t[]\t['a']"]
    (tmp_path / "n.tsv").write_text("\n".join(lines))
    wanted = Reading(negatives=True)
    rows = [row for row in read(str(tmp_path / "n.tsv"), wanted) if row.failure is None]
    assert [(row.negative_captions, row.negative_images) for row in rows] == [
        (("y",), ("c.jpg",)),
        ((), ("a.jpg",)),
    ]
    told = failures(tmp_path / "n.tsv", wanted)
    assert told[0] == "n.tsv, line 3: its negative captions are no list of texts: none"
    assert told[1].startswith("n.tsv, line 5: its negative images are no list of texts")
    assert len(pairs(tmp_path / "n.tsv")) == 4, "who asks for no negatives loses nothing"
    line = {"image": "a", "caption": "x", "negative_captions": ["y"], "negative_images": ["b"]}
    (tmp_path / "n.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps(line | {"negative_captions": [1]})
    )
    rows = [row for row in read(str(tmp_path / "n.jsonl"), wanted) if row.failure is None]
    assert [(row.negative_captions, row.negative_images) for row in rows] == [(("y",), ("b",))]
    (tmp_path / "n.csv").write_text('image,caption,negative_captions\na,x,"[""y"", ""z""]"\n')
    (row,) = read(str(tmp_path / "n.csv"), wanted)
    assert row.negative_captions == ("y", "z")


def test_empty_negatives_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = {"image": "a", "caption": "x", "negative_captions": ["", " ", "p", "\u200b"]}
    (tmp_path / "n.jsonl").write_text(json.dumps(line))
    (row,) = read(str(tmp_path / "n.jsonl"), Reading(negatives=True))
    assert row.negative_captions == ("p",)
    assert "n.jsonl: left out 3 negative captions that are empty" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_lists_of_texts_in_cells(tmp_path: Path, ending: str) -> None:
    """As Python or JSON writes them; what is no list of texts is a text, whatever it begins with."""
    cells = ["['x', 'y']", '["x", "y"]', "[1]", "[sic] x", "[{[]: 1}]", "[]"]
    with (tmp_path / f"a.{ending}").open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="," if ending == "csv" else "\t")
        writer.writerows([["image", "caption"], *([str(n), cell] for n, cell in enumerate(cells))])
    rows = list(read(str(tmp_path / f"a.{ending}"), OWN))
    assert [row.texts for row in rows] == [("x", "y")] * 2 + [(cell,) for cell in cells[2:5]] + [()]
    assert rows[-1].failure == "the row has no text"


def test_texts_that_show_nothing(tmp_path: Path) -> None:
    texts = ["\u200b", "\x00", "\ufeff", "\u00a0\u200d", "a\u200bb", "\U0001f600"]
    lines = [json.dumps({"image": f"{n}", "caption": text}) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [own for _, own in pairs(tmp_path / "a.jsonl")] == [(texts[4],), (texts[5],)]
    assert {told.split(": ")[1] for told in failures(tmp_path / "a.jsonl")} == {
        "the row has no text"
    }


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    """One that is not read may be there twice."""
    cells = [pa.array([text]) for text in ("a.png", "x", "1", "2")]
    names = ["image", "caption", "n", "n"]
    parquet.write_table(pa.Table.from_arrays(cells, names=names), tmp_path / "a.parquet")
    assert pairs(tmp_path / "a.parquet") == [("a.png", ("x",))]
    names[2] = "caption"
    parquet.write_table(pa.Table.from_arrays(cells, names=names), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="two columns are named 'caption'"):
        list(read(str(tmp_path / "a.parquet"), OWN))


def test_images_by_path_in_the_hubs_struct(tmp_path: Path) -> None:
    """As datasets writes an image that it was given by path; one of neither is a failure."""
    images = [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": "b.png"}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "caption": ["x", "y", "z"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert pairs(tmp_path / "a.parquet") == [("a.png", ("x",)), ("a.parquet#row=1", ("y",))]
    assert failures(tmp_path / "a.parquet") == ["a.parquet, row 2: the row names no image"]


def test_absolute_paths_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = ["/x/a.png", "https://x/a.png", "~/a.png", "a.png", "~a.png"]
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in images))
    assert len(pairs(tmp_path / "a.csv")) == 5
    assert "3 of its image paths are absolute, such as /x/a.png" in caplog.text


def test_images_alone(tmp_path: Path) -> None:
    """A table of images needs no captions then, and a bad caption costs nothing."""
    (tmp_path / "a.csv").write_text("image,n\na.jpg,1\nb.jpg,2\n")
    rows = list(read(str(tmp_path / "a.csv"), Reading(texts=())))
    assert [(row.image, row.texts, row.failure) for row in rows] == [
        ("a.jpg", (), None),
        ("b.jpg", (), None),
    ]


def test_where_images_are(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "a.doc").write_text("")
    assert image_root(str(tmp_path / "a.csv"), None) == str(tmp_path)
    assert image_root(str(tmp_path / "a.csv"), str(tmp_path / "sub")) == str(tmp_path / "sub")
    assert image_root(str(tmp_path / "s-*.tar"), None) == str(tmp_path)
    assert image_root(str(tmp_path / "sub"), None) == str(tmp_path / "sub")
    for uri, images, told in (
        ("s.tar", "sub", "images .*: shards hold their images; leave it out"),
        ("sub", "sub", "images .*: a folder holds its images; leave it out"),
        ("a.csv", str(tmp_path / "none"), "images: there is no folder"),
        ("none", None, "data: there is no folder"),
        ("a.doc", None, r"data: .*a\.doc is no \.parquet, \.csv"),
    ):
        with pytest.raises(InputError, match=told):
            image_root(str(tmp_path / uri), images)


def test_a_row_without_texts_stays_one() -> None:
    """There is nothing to divide, and nothing vanishes."""
    row = CaptionRow("line 1", failure="it is not JSON")
    assert divide([row]) == ([], [row])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_negative_images_by_number_in_every_kind(kind: str, tmp_path: Path) -> None:
    """NegCLIP's numbers are the images of these rows, whatever the table; of one without an image, none."""
    lines = [
        {"image": "a", "caption": "x", "neg_image": [1, 2, 9]},
        {"image": "b", "caption": "y", "neg_image": []},
        {"image": "", "caption": "z", "neg_image": [0]},
        {"image": "d", "caption": "w", "neg_image": ["--1"]},
    ]
    file = tmp_path / f"n.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    elif kind == "parquet":
        for line in lines:
            line["neg_image"] = [str(n) for n in line["neg_image"]]
        parquet.write_table(pa.Table.from_pylist(lines), file)
    else:
        ending = "\n".join(map(json.dumps, lines))
        file.write_text(ending if kind == "jsonl" else json.dumps(lines))
    rows = list(read(str(file), Reading(negatives=True)))
    assert [row.negative_images for row in rows[:2]] == [("b",), ()]
    assert "no image" in str(rows[2].failure)
    assert "negative images are no list" in str(rows[3].failure)


def test_a_reason_that_quotes_half_a_character(tmp_path: Path) -> None:
    """Costs its row, and can be written down."""
    (tmp_path / "n.jsonl").write_text('{"\\ud800": 1}\n{"image": "a", "caption": "x"}')
    rows = list(read(str(tmp_path / "n.jsonl"), Reading()))
    assert [row.failure is None for row in rows] == [False, True]
    assert write_own(rows, str(tmp_path / "out"))[1:] == (2, 1)
