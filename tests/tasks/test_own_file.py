"""Benchmarks of one's own from a file: pairs, choices and picks in every form that is read."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import diffitm
from diffitm.commands.gdbench import GdbenchConfig, run
from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.evaluation.examples import write_examples
from diffitm.tasks.check import check
from diffitm.tasks.registry import find_task

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
PAIRS = [
    {"i0": "red.png", "i1": "blue.png", "c0": "a red one", "c1": "a blue one", "tag": "colour"},
    {"i0": "blue.png", "i1": "grey.png", "c0": "blue, all of it", "c1": "grey", "tag": "other"},
]
CHOICES = [
    {"image": "red.png", "texts": ["a blue one", "a red one"], "right": 1, "tag": "colour"},
    {"image": "grey.png", "texts": ["grey", "red", "blue"], "right": 0, "tag": "other"},
]
PICKS = [
    {"text": "red", "images": ["blue.png", "red.png", "grey.png"], "right": 1, "tag": "colour"},
    {"text": "grey", "images": ["grey.png", "red.png"], "right": 0, "tag": "colour"},
]
KINDS = {"pairs": PAIRS, "choices": CHOICES, "picks": PICKS}
IMAGES = {"i0", "i1", "image", "images"}
Lines = list[dict[str, Any]]


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), COLOURS[name.removesuffix(".png")]).save(buffer, "PNG")
    return buffer.getvalue()


def put_images(root: Path) -> None:
    for name in COLOURS:
        (root / f"{name}.png").write_bytes(encoded(f"{name}.png"))


def put_jsonl(root: Path, lines: Lines) -> str:
    text = "\n".join(json.dumps(line) for line in lines)
    return _put(root, "mine.jsonl", text + "\n\n")


def put_json(root: Path, lines: Lines) -> str:
    return _put(root, "mine.json", json.dumps(lines))


def put_csv(root: Path, lines: Lines) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    for line in lines:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in line.items()})
    return _put(root, "mine.csv", text.getvalue())


def _put(root: Path, name: str, text: str) -> str:
    (root / name).write_text(text)
    return str(root / name)


def put_parquet(root: Path, lines: Lines) -> str:
    parquet.write_table(pa.Table.from_pylist(lines), root / "mine.parquet")
    return str(root / "mine.parquet")


def put_embedded(root: Path, lines: Lines) -> str:
    """As the Hub writes images: {bytes, path}; in two groups of rows."""

    def held(value: Any) -> Any:
        if isinstance(value, list):
            return [held(item) for item in value]
        return {"bytes": encoded(value), "path": value}

    made = [{k: held(v) if k in IMAGES else v for k, v in line.items()} for line in lines]
    parquet.write_table(pa.Table.from_pylist(made), root / "mine.parquet", row_group_size=1)
    return str(root / "mine.parquet")


def put_half_embedded(root: Path, lines: Lines) -> str:
    """The second line has paths alone."""
    put_embedded(root, lines)
    made = parquet.read_table(root / "mine.parquet").to_pylist()
    for name in IMAGES & set(made[1]):
        for value in made[1][name] if isinstance(made[1][name], list) else [made[1][name]]:
            value["bytes"] = None
    parquet.write_table(pa.Table.from_pylist(made), root / "mine.parquet")
    put_images(root)
    return str(root / "mine.parquet")


def put_shards(root: Path, lines: Lines) -> str:
    for number, line in enumerate(lines):
        members = {}
        for name in IMAGES & set(line):
            if name == "images":
                members |= {f"{i}.png": encoded(v) for i, v in enumerate(line[name])}
            else:
                members["png" if name == "image" else f"{name}.png"] = encoded(line[name])
        rest = {k: v for k, v in line.items() if k not in IMAGES}
        members["json"] = json.dumps(rest).encode()
        with tarfile.open(root / f"mine-{number}.tar", "w") as archive:
            for ending, data in members.items():
                info = tarfile.TarInfo(f"sample{number}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(root / "mine-{0..1}.tar")


FORMS: dict[str, Callable[[Path, Lines], str]] = {
    "jsonl": put_jsonl,
    "json": put_json,
    "csv": put_csv,
    "parquet": put_parquet,
    "embedded": put_embedded,
    "half embedded": put_half_embedded,
    "shards": put_shards,
}


def read(uri: str, root: Path) -> list[Example]:
    return list(find_task(uri)().examples(str(root)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, kind: str, form: str) -> None:
    """Every form gives the same texts, decisions, tags and pixels."""
    uri = FORMS[form](tmp_path, KINDS[kind])
    if form in ("jsonl", "json", "csv", "parquet"):
        put_images(tmp_path)
    examples = read(uri, tmp_path)
    direction = {"pairs": "both", "choices": "text", "picks": "image"}[kind]
    assert [e.direction for e in examples] == [direction] * 2
    for example, line in zip(examples, KINDS[kind], strict=True):
        shown = [name for key in ("i0", "i1", "image", "images") for name in _listed(line, key)]
        said = [text for key in ("c0", "c1", "text", "texts") for text in _listed(line, key)]
        assert list(example.texts) == said
        assert example.gold == line.get("right", 0)
        assert example.groups == {"tag": line["tag"]}
        loaded = [images.load(str(tmp_path), name)[0] for name in example.images]
        assert [i.getpixel((0, 0)) for i in loaded] == [COLOURS[n[:-4]] for n in shown]
    assert check(find_task(uri)(), str(tmp_path)).state == "ready"


def _listed(line: dict[str, Any], key: str) -> list[str]:
    value = line.get(key, [])
    return value if isinstance(value, list) else [value]


def test_metrics(tmp_path: Path) -> None:
    """Winoground's of pairs, accuracy of the other two; chance by the number of candidates."""
    put_images(tmp_path)
    task = find_task(put_jsonl(tmp_path, PAIRS))()
    example = next(iter(task.examples(str(tmp_path))))
    found = task.credits(example, np.array([[1.0, 0.0], [2.0, 3.0]]))
    assert {name: credit.value for name, credit in found.items()} == {
        "text": 1.0,
        "image": 0.0,
        "group": 0.0,
    }
    assert task.chance(example) == {"text": 0.25, "image": 0.25, "group": 1 / 6}
    assert len(task.contests(example)) == 4
    task = find_task(put_json(tmp_path, CHOICES))()
    first, second = task.examples(str(tmp_path))
    assert task.credits(first, np.array([[0.0, 1.0]]))["accuracy"].value == 1.0
    assert task.credits(second, np.array([[0.0, 1.0, -1.0]]))["accuracy"].value == 0.0
    assert task.chance(second) == {"accuracy": pytest.approx(1 / 3)}
    (contest,) = task.contests(first)
    assert contest.about == 1


def test_images_in_a_zip(tmp_path: Path) -> None:
    """Read in place, stored and deflated; --check tells one that is not in it."""
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w", method) as archive:
            archive.writestr("all/red.png", encoded("red.png"))
            archive.writestr("all/blue.png", encoded("blue.png"))
        line = {"image": "pictures.zip/all/red.png", "texts": ["a", "b"], "right": 0}
        uri = put_jsonl(tmp_path, [line, {**line, "image": "pictures.zip/all/blue.png"}])
        found = [images.load(str(tmp_path), e.images[0])[0] for e in read(uri, tmp_path)]
        assert [i.getpixel((3, 3)) for i in found] == [COLOURS["red"], COLOURS["blue"]]
        assert check(find_task(uri)(), str(tmp_path)).state == "ready"
    put_jsonl(tmp_path, [line, {**line, "image": "pictures.zip/red.png"}])
    state = check(find_task(uri)(), str(tmp_path))
    assert (state.unreadable, state.can_run) == (1, True)
    assert "the archive has no red.png" in state.first
    data = (tmp_path / "pictures.zip").read_bytes()
    (tmp_path / "pictures.zip").write_bytes(data[: len(data) // 2])
    assert "no whole zip" in check(find_task(uri)(), str(tmp_path)).first


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("pairs", {"c1": 5}, "line 2: c1 is '5', it must be a text"),
        ("pairs", {"i1": ""}, "line 2: i1 is '', it must be the path of an image"),
        ("pairs", {"i0": "../red.png"}, "line 2: i0 is '../red.png', it must be the path of an"),
        (
            "pairs",
            {"tag": ["a"]},
            """line 2: tag is '["a"]', it must be a text or a whole number""",
        ),
        ("choices", {"right": 3}, "line 2: right is '3', it must be a whole number of 0 to 2"),
        ("choices", {"right": True}, "line 2: right is 'true', it must be a whole number of 0"),
        ("choices", {"texts": ["grey"]}, "it must be a list of 2 texts or more"),
        ("choices", {"texts": "grey"}, "line 2: texts is 'grey', it must be a list of texts"),
        ("picks", {"images": ["red.png", 4]}, "it must be a list of 2 paths of images or more"),
        ("picks", {"right": None}, "line 2: right is 'null', it must be a whole number"),
    ],
)
def test_first_wrong_line(
    tmp_path: Path, kind: str, changes: dict[str, Any], told: str, capsys: Any
) -> None:
    """With its file, line, field and value, also by --check."""
    put_images(tmp_path)
    first, second = KINDS[kind]
    uri = put_jsonl(tmp_path, [first, {**second, **changes}])
    with pytest.raises(InputError) as raised:
        read(uri, tmp_path)
    assert str(raised.value).startswith(f"{uri}, line 2: ")
    assert told in str(raised.value)
    config = GdbenchConfig(tasks=[uri], data=str(tmp_path), out=str(tmp_path / "out"), check=True)
    with pytest.raises(InputError, match="1 of 1 tasks cannot run"):
        run(config)
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"image": "a.png"', "line 1: not JSON"),
        ("[1, 2]", "line 1: it is '[1, 2]', it must be an object with fields"),
        ('{"picture": "a.png"}', "line 1: its fields must be i0, i1, c0, c1; or image, texts,"),
        ('{"i0": "a.png", "i1": "b.png", "c0": "x"}', "line 1: there is no c1, which goes with"),
        ('{"image": "a.png", "texts": ["a", "b"]}', "line 1: there is no right, which goes with"),
    ],
)
def test_no_such_form(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as raised:
        read(_put(tmp_path, "mine.jsonl", text), tmp_path)
    assert told in str(raised.value)


def test_wrong_cells_and_members(tmp_path: Path) -> None:
    """A CSV's line and a shard's sample are named too."""
    uri = _put(tmp_path, "mine.csv", 'image,texts,right\nred.png,"[""a"", ""b""]",two\n')
    with pytest.raises(InputError, match="line 2: right is 'two', it must be a whole number"):
        read(uri, tmp_path)
    uri = put_shards(tmp_path, [{**CHOICES[0], "right": 7}, CHOICES[1]])
    with pytest.raises(InputError, match=r"mine-0.tar, sample sample0: right is '7'"):
        read(uri, tmp_path)


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here or below the data root; one that holds its images below the data root."""
    root = tmp_path / "root"
    root.mkdir()
    put_jsonl(root, CHOICES)
    monkeypatch.chdir(tmp_path)
    assert len(read("mine.jsonl", root)) == 2
    with pytest.raises(InputError, match=r"there is no file .*other.jsonl, nor .*other.jsonl"):
        read("other.jsonl", root)
    put_embedded(tmp_path, CHOICES)
    with pytest.raises(InputError, match="it must lie below the data root"):
        read("mine.parquet", root)


def test_empty_text_costs_its_example(tmp_path: Path) -> None:
    put_images(tmp_path)
    uri = put_jsonl(tmp_path, [CHOICES[0], {**CHOICES[1], "texts": ["grey", " "]}])
    state = check(find_task(uri)(), str(tmp_path))
    assert (state.failed, state.can_run) == (1, True)
    assert "caption 1 is empty" in state.first


def test_from_python(tmp_path: Path) -> None:
    """A model's figures on a file, by tag."""
    put_images(tmp_path)
    uri = put_jsonl(tmp_path, CHOICES)
    found = diffitm.evaluate("clip:shapes", uri, str(tmp_path))
    assert set(found["task"]) == {"mine"}
    assert set(found["group"]) == {"all", "tag=colour", "tag=other"}
    assert found.set_index("group").loc["all", "n"] == 2


def test_names_that_others_have(tmp_path: Path) -> None:
    """Two of one name would be one line of a table."""
    put_images(tmp_path)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        put_jsonl(tmp_path / folder, CHOICES)
    tasks = [str(tmp_path / folder / "mine.jsonl") for folder in ("x", "y")]
    with pytest.raises(InputError, match=f"tasks {tasks[0]} and {tasks[1]} are both named mine"):
        write_examples(tasks, str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"winoground is a task of ours; rename the file"):
        find_task("folder/winoground.csv")
