"""Task readers on files of the published form, ours and the authors', and on malformed ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.tasks.base import is_strings
from diffitm.tasks.clevr import SUBTASKS, Clevr
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from diffitm.tasks.registry import TASKS, find_task
from diffitm.tasks.winoground import Winoground

ENTRY = {
    "id": 4,
    "caption_0": "a cup in a mug",
    "caption_1": "a mug in a cup",
    "tag": "Noun",
    "secondary_tag": "",
    "num_main_preds": 1,
    "collapsed_tag": "Object",
}
CLEVR_ROWS = {"one.png": [["A cube.", "A ball."], ["A ball.", "A cube."]], "two.png": [["a", "b"]]}
FOLDER = "datasets/flickr30k/images"
BY_CAPTION = {
    f"caption {i}": [f"{FOLDER}/{(i // 5 + k) % 12}.jpg" for k in range(10)] for i in range(15)
}
BY_IMAGE = {f"{FOLDER}/{i}.jpg": [f"caption {i}-{k}" for k in range(10)] for i in range(3)}


def put(root: Path, path: str, content: Any) -> None:
    """A file of JSON, of bytes or of text below `root`."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def put_clevr(root: Path, rows: Any = CLEVR_ROWS) -> None:
    for subtask in SUBTASKS:
        put(root, f"clevr/captions/{subtask}.json", rows)


def put_all(root: Path) -> None:
    put(root, "winoground/data.json", [ENTRY])
    put_clevr(root)
    put(root, "flickr30k/val_top10_RN50x64.json", BY_CAPTION)
    put(root, "flickr30k/val_top10_RN50x64_text.json", BY_IMAGE)


def test_winoground(tmp_path: Path) -> None:
    put(tmp_path, "winoground/data.json", [ENTRY, {**ENTRY, "id": 9, "collapsed_tag": "Both"}])
    first, second = Winoground().examples(str(tmp_path))
    assert first == Example(
        id="4",
        images=("winoground/images/ex_4_img_0.png", "winoground/images/ex_4_img_1.png"),
        texts=("a cup in a mug", "a mug in a cup"),
        direction="both",
        cluster="4",
        groups={"collapsed_tag": "Object", "num_main_preds": "1"},
    )
    assert (second.id, second.groups["collapsed_tag"]) == ("9", "Both")
    assert first.needs_unconditional


@pytest.mark.parametrize("form", ["examples.jsonl", "data/examples.jsonl", "data.parquet"])
def test_winoground_in_other_forms(tmp_path: Path, form: str) -> None:
    """As the Hub has it: lines of JSON, or Parquet."""
    put(tmp_path, "winoground/data.json", [ENTRY, {**ENTRY, "id": 5}])
    expected = list(Winoground().examples(str(tmp_path)))
    (tmp_path / "winoground" / "data.json").unlink()
    if form.endswith(".parquet"):
        table = pa.Table.from_pylist([ENTRY, {**ENTRY, "id": 5}])
        parquet.write_table(table, tmp_path / "winoground" / form)
    else:
        lines = [json.dumps(ENTRY), json.dumps({**ENTRY, "id": 5})]
        put(tmp_path, f"winoground/{form}", "\n".join(lines) + "\n\n")
    assert list(Winoground().examples(str(tmp_path))) == expected


@pytest.mark.parametrize("folder", ["winoground/data", "winoground"])
def test_winoground_with_its_images_inside(tmp_path: Path, folder: str) -> None:
    """As mirrors on the Hub have it: the same entries, with references into the file."""
    put(tmp_path, "winoground/data.json", [ENTRY, {**ENTRY, "id": 5}])
    plain = list(Winoground().examples(str(tmp_path)))
    (tmp_path / "winoground" / "data.json").unlink()
    held = {f"image_{k}": {"bytes": bytes([k]), "path": f"ex_{k}.png"} for k in (0, 1)}
    rows = [{**ENTRY, **held}, {**ENTRY, "id": 5, **held}]
    file = tmp_path / folder / "test-00000-of-00001.parquet"
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), file)
    found = list(Winoground().examples(str(tmp_path)))
    assert [replace(e, images=()) for e in found] == [replace(e, images=()) for e in plain]
    assert [images.read(str(tmp_path), name) for name in found[1].images] == [b"\x00", b"\x01"]
    parquet.write_table(pa.Table.from_pylist([rows[0], rows[0]]), file)
    with pytest.raises(InputError, match="row 1: id is '4', it must be there once"):
        list(Winoground().examples(str(tmp_path)))


@pytest.mark.parametrize(
    ("folder", "below"),
    [
        ("", "winoground"),
        ("images/", "winoground/images"),
        ("data/images/", "winoground/data/images"),
    ],
)
def test_winoground_image_folders(tmp_path: Path, folder: str, below: str) -> None:
    put(tmp_path, "winoground/data.json", [ENTRY])
    put(tmp_path, f"winoground/{folder}ex_4_img_0.png", b"image")
    (example,) = Winoground().examples(str(tmp_path))
    assert example.images == (f"{below}/ex_4_img_0.png", f"{below}/ex_4_img_1.png")


def test_clevr(tmp_path: Path) -> None:
    """Caption then foil in every subtask, spatial too; the image is the cluster."""
    put_clevr(tmp_path)
    examples = list(Clevr().examples(str(tmp_path)))
    assert len(examples) == 3 * len(SUBTASKS) == 21
    assert len({e.id for e in examples}) == 21
    assert examples[1] == Example(
        id="pair_binding_size/one.png/1",
        images=("clevr/images/one.png",),
        texts=("A ball.", "A cube."),
        direction="text",
        cluster="one.png",
        groups={"subtask": "pair_binding_size"},
    )
    spatial = [e for e in examples if e.groups["subtask"] == "spatial"]
    assert spatial[0].texts == ("A cube.", "A ball.")
    assert {e.cluster for e in examples} == {"one.png", "two.png"}
    assert not examples[0].needs_unconditional


def test_flickr30k_takes_every_fifth_caption(tmp_path: Path) -> None:
    put(tmp_path, "flickr30k/val_top10_RN50x64.json", BY_CAPTION)
    examples = list(Flickr30kImage().examples(str(tmp_path)))
    assert [e.texts for e in examples] == [("caption 0",), ("caption 5",), ("caption 10",)]
    first = examples[1]
    assert first.images == tuple(f"flickr30k/images/{k}.jpg" for k in range(1, 11))
    assert (first.direction, first.gold, first.cluster) == ("image", 0, "flickr30k/images/1.jpg")
    assert first.needs_unconditional


def test_flickr30k_text(tmp_path: Path) -> None:
    put(tmp_path, "flickr30k/val_top10_RN50x64_text.json", BY_IMAGE)
    examples = list(Flickr30kText().examples(str(tmp_path)))
    assert len(examples) == 3
    assert examples[2].images == ("flickr30k/images/2.jpg",)
    assert examples[2].texts == tuple(f"caption 2-{k}" for k in range(10))
    assert (examples[2].direction, examples[2].gold) == ("text", 0)


@pytest.mark.parametrize("task", [Flickr30kImage(), Flickr30kText()])
def test_flickr30k_credits(task: Any) -> None:
    """Rank 3 of ten is R@5 but not R@1; chance is k of n."""
    example = Example("0", ("a",), tuple("abcdefghij"), "text")
    scores = np.array([[7.0, 9, 8, 6, 5, 4, 3, 2, 1, 0]])
    values = {name: credit.value for name, credit in task.credits(example, scores).items()}
    assert values == {"R@1": 0.0, "R@5": 1.0}
    assert task.chance(example) == {"R@1": 0.1, "R@5": 0.5}


def test_clevr_and_winoground_credits() -> None:
    pair = Example("0", ("a",), ("x", "y"), "text")
    assert Clevr().credits(pair, np.array([[2.0, 1.0]]))["accuracy"].value == 1.0
    assert Clevr().credits(pair, np.array([[1.0, 2.0]]))["accuracy"].value == 0.0
    assert Clevr().chance(pair) == {"accuracy": 0.5}
    both = Example("0", ("a", "b"), ("x", "y"), "both")
    credits = Winoground().credits(both, np.array([[2.0, 1.0], [0.0, 3.0]]))
    assert {name: credit.value for name, credit in credits.items()} == {
        "text": 1,
        "image": 1,
        "group": 1,
    }
    assert set(Winoground().chance(both)) == set(credits)


def test_captions_in_other_scripts(tmp_path: Path) -> None:
    """Files are UTF-8 whatever the locale, with or without a byte order mark."""
    rows = {"é.png": [["ein Würfel", "立方体"]]}
    put_clevr(tmp_path, b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False).encode())
    example = next(Clevr().examples(str(tmp_path)))
    assert example.texts == ("ein Würfel", "立方体")
    assert example.images == ("clevr/images/é.png",)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_missing_files(tmp_path: Path, name: str) -> None:
    """The message names the file and where it comes from."""
    task = find_task(name)()
    with pytest.raises(InputError) as raised:
        list(task.examples(str(tmp_path)))
    assert f"task {name} needs {tmp_path}/{task.folder}/" in str(raised.value)
    assert task.source in str(raised.value)


def readers() -> list[tuple[str, str]]:
    return [
        ("winoground", "winoground/data.json"),
        ("clevr", "clevr/captions/spatial.json"),
        ("flickr30k", "flickr30k/val_top10_RN50x64.json"),
        ("flickr30k_text", "flickr30k/val_top10_RN50x64_text.json"),
    ]


def failure(root: Path, name: str) -> str:
    with pytest.raises(InputError) as raised:
        list(find_task(name)().examples(str(root)))
    return str(raised.value)


@pytest.mark.parametrize(("name", "file"), readers())
def test_malformed_json(tmp_path: Path, name: str, file: str) -> None:
    """Cut off, empty, of another type, or not text at all: the message names the file."""
    for content in ("[{", "", '"text"', "3", b"\xff\xfe\x00"):
        put_all(tmp_path)
        put(tmp_path, file, content)
        assert str(tmp_path / file) in failure(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "file", "content", "text"),
    [
        ("winoground", "winoground/data.json", {"a": 1}, "expects a list of entries"),
        ("winoground", "winoground/data.json", ["x"], "expects the fields id, caption_0"),
        (
            "winoground",
            "winoground/data.json",
            [{k: v for k, v in ENTRY.items() if k != "caption_1"}],
            "expects the fields id, caption_0, caption_1",
        ),
        ("winoground", "winoground/data.json", [{**ENTRY, "id": "x"}], "expects the fields id"),
        ("clevr", "clevr/captions/spatial.json", [["a", "b"]], "expects {image file"),
        ("clevr", "clevr/captions/spatial.json", {"i": [["a"]]}, "[caption, foil] pair"),
        ("clevr", "clevr/captions/spatial.json", {"i": [["a", "b", "c"]]}, "[caption, foil] pair"),
        ("clevr", "clevr/captions/spatial.json", {"i": ["a", "b"]}, "[caption, foil] pair"),
        ("clevr", "clevr/captions/spatial.json", {"i": [["a", None]]}, "[caption, foil] pair"),
        ("clevr", "clevr/captions/spatial.json", {"i": "a"}, "[caption, foil] pair"),
        ("flickr30k", readers()[2][1], {"c": []}, "expects a list of strings"),
        ("flickr30k", readers()[2][1], {"c": "a.jpg"}, "expects a list of strings"),
        ("flickr30k", readers()[2][1], {"c": [1, 2]}, "expects a list of strings"),
        ("flickr30k_text", readers()[3][1], {"i": {}}, "expects a list of strings"),
        ("flickr30k_text", readers()[3][1], [], "expects {query: [candidate, ...]}"),
    ],
)
def test_entries_of_another_form(
    tmp_path: Path, name: str, file: str, content: Any, text: str
) -> None:
    """The message names file, task, what is expected and what was found."""
    put_all(tmp_path)
    put(tmp_path, file, content)
    message = failure(tmp_path, name)
    assert message.startswith(f"{tmp_path / file}: task {name} expects ")
    assert text in message
    assert "found " in message


def test_winoground_lines_that_are_not_json(tmp_path: Path) -> None:
    put(tmp_path, "winoground/examples.jsonl", json.dumps(ENTRY) + "\n{cut")
    assert str(tmp_path / "winoground" / "examples.jsonl") in failure(tmp_path, "winoground")
    (tmp_path / "winoground" / "examples.jsonl").unlink()
    put(tmp_path, "winoground/data.parquet", b"PAR1 no")
    assert str(tmp_path / "winoground" / "data.parquet") in failure(tmp_path, "winoground")


def test_is_strings() -> None:
    assert is_strings(["a", "b"])
    assert is_strings(["a", "b"], 2)
    for wrong in ([], ["a", 1], "ab", ("a", "b"), None):
        assert not is_strings(wrong)
    assert not is_strings(["a"], 2)


# How many examples a published file of so many entries holds.
COUNTS: dict[str, Callable[[Any], int]] = {
    "winoground": len,
    "flickr30k": lambda entries: -(-len(entries) // 5),
    "flickr30k_text": len,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_published_files(published: Path, name: str) -> None:
    root = published / "annotations"
    file = dict(readers())[name]
    raw = json.loads((root / file).read_text())
    examples = list(find_task(name)().examples(str(root)))
    assert len(examples) == COUNTS[name](raw) > 0
    shape = {"winoground": (2, 2), "flickr30k": (10, 1), "flickr30k_text": (1, 10)}[name]
    assert {(len(e.images), len(e.texts)) for e in examples} == {shape}
    assert not any("datasets/" in image for e in examples for image in e.images)
    assert all(image.startswith(file.split("/")[0]) for e in examples for image in e.images)


def test_published_clevr(published: Path) -> None:
    """Two rows an image in each of the seven subtasks; the caption comes first."""
    root = published / "annotations"
    examples = list(Clevr().examples(str(root)))
    images = {e.cluster for e in examples}
    assert len(examples) == 14 * len(images) > 0
    by_id = {e.id: e for e in examples}
    assert by_id["spatial/CLEVR_val2_000138.png/0"].texts == (
        "On the right is a gray cylinder.",
        "On the left is a gray cylinder.",
    )
