"""Self-Bench's prompts, candidates, labels and seeds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffitm.core.errors import InputError
from diffitm.shapes.language import vocabulary
from diffitm.shapes.prompts import shape_prompts
from diffitm.tasks import selfbench

CLASSES = [f"thing{i:02}" for i in range(77)] + ["bench", "apple", "clock"]


def line(tag: str, prompt: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": prompt, **more}


def thing(name: str, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": 1, **more}


# GenEval's forms, with its 80 classes.
GENEVAL = [
    *(line("single_object", f"a photo of a {name}", thing(name)) for name in CLASSES),
    line("two_object", "a photo of an apple and a bench", thing("apple"), thing("bench")),
    line(
        "counting", "a photo of three clocks", {"class": "clock", "count": 3},
        exclude=[{"class": "clock", "count": 4}],
    ),
    line("colors", "a photo of an orange clock", thing("clock", color="orange")),
    line(
        "position", "a photo of a bench right of an apple",
        thing("apple"), thing("bench", position=["right of", 0]),
    ),
    line(
        "color_attr", "a photo of a red bench and a blue apple",
        thing("bench", color="red"), thing("apple", color="blue"),
    ),
    line(
        "color_attr", "a photo of a pink clock and a white bench",
        thing("clock", color="pink"), thing("bench", color="white"),
    ),
]  # fmt: skip


def write(folder: Path, lines: list[Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))
    return str(file)


def test_candidates_are_as_many_as_published(tmp_path: Path) -> None:
    """Self-Bench's numbers: 80, 101, 4, 10, 4, and all prompts of color_attr."""
    prompts = selfbench.read_prompts(write(tmp_path, GENEVAL))
    texts = selfbench.candidates(prompts)
    counts = {p.tag: len(own) for p, own in zip(prompts, texts, strict=True)}
    assert counts == {
        "single_object": 80, "two_object": 101, "counting": 4, "colors": 10, "position": 4,
        "color_attr": 2,
    }  # fmt: skip
    assert all(own[0] == p.text for p, own in zip(prompts, texts, strict=True))
    known = {p.tag: set(own) for p, own in zip(prompts, texts, strict=True)}
    assert known["counting"] == {
        "a photo of one clock", "a photo of two clocks", "a photo of three clocks",
        "a photo of four clocks",
    }  # fmt: skip
    assert {"a photo of an orange clock", "a photo of a red clock"} < known["colors"]
    assert known["position"] == {
        f"a photo of a bench {place} an apple" for place in selfbench.POSITIONS
    }
    both = Counter(
        ("an apple" in text, text.endswith("and a bench")) for text in known["two_object"]
    )
    assert both == {(True, True): 1, (True, False): 50, (False, True): 50}
    assert texts == selfbench.candidates(prompts)


def test_own_candidates_and_other_tags(tmp_path: Path) -> None:
    """What a line gives wins over its tag's rule; an unknown tag compares with its other prompts."""
    lines = [
        line("colors", "a clock that is red", candidates=["a clock that is blue"]),
        *(line("weather", text) for text in ("rain", "snow", "rain")),
    ]
    found = selfbench.candidates(selfbench.read_prompts(write(tmp_path, lines)))
    assert found[0] == ("a clock that is red", "a clock that is blue")
    assert found[1:] == [("rain", "snow"), ("snow", "rain"), ("rain", "snow")]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "holds no prompt"),
        ([line("a", "b", promt="c")], "line 1: unknown field 'promt'; did you mean 'prompt'?"),
        ([line("a", " ")], "line 1: prompt is ' ', it must be a text that is not empty"),
        ([{"prompt": "b"}], "line 1: there is no tag, a text"),
        ([line("a", "b"), line("", "c")], "line 2: tag is '', it must be a text that is not empty"),
        ([{**line("a", "b"), "include": ["c"]}], "it must be a list of things with their class"),
        ([line("a", "b", candidates=[3])], "candidates is '[3]', it must be a list of texts"),
    ],
)
def test_wrong_prompts(tmp_path: Path, lines: list[Any], told: str) -> None:
    with pytest.raises(InputError) as raised:
        selfbench.read_prompts(write(tmp_path, lines))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (line("weather", "rain"), "'rain' has nothing to be compared with"),
        (line("colors", "a clock", thing("clock")), "a color of red, orange"),
        (line("colors", "a clock", thing("clock", color="red")), "a prompt with red"),
        (line("counting", "six clocks", {"class": "clock", "count": 6}), "a count of 1 to 4"),
        (line("position", "a by b", thing("b"), thing("a")), "a position of left of"),
        (line("two_object", "a with b", thing("a"), thing("b")), "with 'and' between them"),
        (line("two_object", "a and b", thing("a")), "include to have 2 things"),
    ],
)
def test_prompts_without_candidates(entry: dict[str, Any], told: str) -> None:
    """The line, what is needed, and that it may give its own."""
    with pytest.raises(InputError) as raised:
        selfbench.candidates(selfbench.make_prompts([entry], "mine.jsonl"))
    assert "mine.jsonl, line 1: " in str(raised.value) and told in str(raised.value)


def test_chosen_prompts_keep_their_places() -> None:
    prompts = selfbench.make_prompts(GENEVAL, "x")
    assert selfbench.chosen(prompts, [], None) == prompts
    some = selfbench.chosen(prompts, ["single_object", "color_attr"], 2)
    assert [p.index for p in some] == [0, 40, 84, 85]
    with pytest.raises(InputError, match="colours: no prompt has this tag; did you mean 'colors'"):
        selfbench.chosen(prompts, ["colours"], None)


def test_each_picture_has_a_seed_of_its_own() -> None:
    """By base seed, prompt and number alone; these numbers must not change."""
    keys = [(seed, prompt, n) for seed in range(3) for prompt in range(5) for n in range(4)]
    seeds = [selfbench.picture_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert [selfbench.picture_seed(*key) for key in keys] == seeds
    assert selfbench.picture_seed(0, 0, 0) == 5874934615388537135
    assert selfbench.picture_seed(3, 552, 1) == 2602021875335177652


def test_prompts_of_the_shapes_world() -> None:
    """Words that the model knows; every candidate of a picture says something else than its prompt."""
    lines, words = shape_prompts(), set(vocabulary())
    prompts = selfbench.make_prompts(lines, "shapes")
    assert Counter(p.tag for p in prompts) == {
        "single_object": 4, "colors": 20, "two_object": 6, "color_attr": 24, "position": 24,
    }  # fmt: skip
    for own in selfbench.candidates(prompts):
        assert len(own) > 3 and len({frozenset(text.split(" and ")) for text in own}) == len(own)
        assert all(word in words for text in own for word in text.split())
    assert lines == shape_prompts()


PICTURES = ["outputs/9/a/00000/samples/00000.png", "outputs/9/a/00000/samples/00001.png"]


def test_labels(tmp_path: Path) -> None:
    lines = [{"image": PICTURES[0], "correct": True}, {"image": PICTURES[1], "correct": False}]
    assert selfbench.read_labels(write(tmp_path, lines), PICTURES) == {
        PICTURES[0]: True, PICTURES[1]: False,
    }  # fmt: skip
    table = tmp_path / "labels.csv"
    table.write_text(f"image,correct\n{PICTURES[0]},TRUE\n{PICTURES[1]},0\n")
    assert list(selfbench.read_labels(str(table), PICTURES).values()) == [True, False]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"image": "x.png", "correct": True}], "image is 'x.png', it must be a picture of this"),
        ([{"image": PICTURES[0], "correct": "yes"}], "correct is 'yes', it must be true or false"),
        ([{"image": PICTURES[0]}], "line 1: there is no correct, true or false"),
        ([{"image": PICTURES[0], "correct": v} for v in (True, False)], "it must be labelled once"),
        ([], "holds no label"),
    ],
)
def test_wrong_labels(tmp_path: Path, lines: list[Any], told: str) -> None:
    with pytest.raises(InputError) as raised:
        selfbench.read_labels(write(tmp_path, lines), PICTURES)
    assert told in str(raised.value)
