"""Self-Bench (Jeong et al. 2025): prompts in GenEval's form, the texts that their pictures are compared with,
labels of pictures, and where pictures lie."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffitm.captions.lines import Line, read_lines
from diffitm.core import storage
from diffitm.core.errors import InputError, suggest
from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask

FIELDS = ("tag", "include", "exclude", "prompt", "candidates")
METADATA = "metadata.jsonl"
SETTINGS = "settings.json"  # of a folder of pictures that we made: what they depend on
# GenEval's words (Ghosh et al. 2023); the numbers of candidates are Self-Bench's: 10, 4, 4 and 1 + 50 + 50.
COLOURS = tuple("red orange yellow green blue purple pink brown black white".split())
COUNTS = ("one", "two", "three", "four")
POSITIONS = ("left of", "right of", "above", "below")
OTHER_THINGS = 50  # in the place of either thing of two


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place in the file; `fields` are what metadata.jsonl holds of it, `candidates` the
    texts that its line gives for its pictures, if it does, `where` it stands, for messages."""

    index: int
    tag: str
    text: str
    fields: dict[str, Any]
    candidates: tuple[str, ...]
    where: str

    @property
    def include(self) -> list[dict[str, Any]]:
        """The things that its picture is to show: class, count, color, position."""
        found: list[dict[str, Any]] = self.fields.get("include", [])
        return found


def read_prompts(uri: str) -> list[Prompt]:
    """The prompts of a file of the form of GenEval's evaluation_metadata.jsonl: tag, include, exclude,
    prompt. `candidates` of a line are texts of one's own to compare its pictures with.

    Raises InputError that names the first wrong line, or for a file without any.
    """
    if not storage.without_query(uri).endswith((".jsonl", ".json")):
        raise InputError(f"{uri}: must be shapes or a file that ends in .jsonl", "prompts")
    prompts = [_strict(number, line) for number, line in enumerate(read_lines(uri, ""))]
    if not prompts:
        raise InputError(f"{uri}: holds no prompt", "prompts")
    return prompts


def make_prompts(lines: Iterable[dict[str, Any]], name: str) -> list[Prompt]:
    """Prompts of lines that were made, not read; `name` stands for their file in messages."""
    named = (Line(f"{name}, line {n}", str(n), line) for n, line in enumerate(lines, 1))
    return [_strict(number, line) for number, line in enumerate(named)]


def _strict(number: int, line: Line) -> Prompt:
    for name in line.fields:
        if name not in FIELDS:
            raise InputError(f"{line.where}: unknown field {name!r}{suggest(str(name), FIELDS)}")
    return _prompt(number, line)


def _prompt(number: int, line: Line) -> Prompt:
    tag, text = line.text("tag"), line.text("prompt")
    for name, value in (("tag", tag), ("prompt", text)):
        if not value.strip():
            raise line.wrong(name, "a text that is not empty")
    if "/" in tag:
        raise line.wrong("tag", "a text without /")
    include = line.fields.get("include", [])
    if not isinstance(include, list) or not all(isinstance(thing, dict) for thing in include):
        raise line.wrong("include", "a list of things with their class")
    own = line.texts("candidates", 1) if "candidates" in line.fields else ()
    return Prompt(number, tag, text, dict(line.fields), own, line.where)


def candidates(prompts: Sequence[Prompt], tags: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The texts that the pictures of each prompt of some tags (all, if none is given) are compared with, its
    own first, each once. They are the same whichever the other tags are.

    They are those of its line or, by its tag, the thing in other colours (colors) or numbers (counting), the
    things in other places (position), another thing instead of either (two_object), for which it must be of
    GenEval's form, else the other prompts of the tag. Raises InputError for a prompt without any.
    """
    same: dict[str, list[str]] = {}
    for prompt in prompts:
        same.setdefault(prompt.tag, []).append(prompt.text)
    classes = sorted({str(t["class"]) for p in prompts for t in p.include if "class" in t})
    found = []
    for prompt in (prompt for prompt in prompts if not tags or prompt.tag in tags):
        others: Iterable[str] = prompt.candidates
        if not prompt.candidates:
            rule = RULES.get(prompt.tag)
            others = rule(prompt, classes) if rule else same[prompt.tag]
        texts = tuple(dict.fromkeys([prompt.text, *others]))
        if len(texts) < 2:
            raise InputError(
                f"{prompt.where}: {prompt.text!r} has nothing to be compared with: it must have candidates, "
                f"or its tag {prompt.tag!r} another prompt"
            )
        found.append(texts)
    return found


def _colours(prompt: Prompt, classes: Sequence[str]) -> list[str]:
    colour = _given(prompt, 0, "color", COLOURS)
    return [_exchanged(prompt, prompt.text, colour, other) for other in COLOURS]


def _counts(prompt: Prompt, classes: Sequence[str]) -> list[str]:
    count, thing = _thing(prompt, 0).get("count"), _given(prompt, 0, "class")
    if not isinstance(count, int) or not 0 < count <= len(COUNTS):
        raise _wrong(prompt, f"a count of 1 to {len(COUNTS)}")
    word = COUNTS[count - 1]
    before, found, after = prompt.text.partition(f"{word} ")
    if not found:
        raise _wrong(prompt, f"a prompt with {word}")
    others = [f"{before}{other} {after}" for other in COUNTS[1:]]
    return [f"{before}{COUNTS[0]} {thing}", *others]


def _positions(prompt: Prompt, classes: Sequence[str]) -> list[str]:
    given = _thing(prompt, 1).get("position")
    place = given[0] if isinstance(given, list) and given else None
    if place not in POSITIONS or place not in prompt.text:
        raise _wrong(prompt, f"a position of {', '.join(POSITIONS)} that the prompt names")
    return [prompt.text.replace(str(place), other, 1) for other in POSITIONS]


def _two_things(prompt: Prompt, classes: Sequence[str]) -> list[str]:
    """Which things stand in for one is drawn by the prompt's place."""
    first, second = (_given(prompt, i, "class") for i in (0, 1))
    before, found, after = prompt.text.partition(" and ")
    if not found:
        raise _wrong(prompt, "a prompt of two things with 'and' between them")
    others = [name for name in classes if name not in (first, second)]
    drawn = np.random.default_rng([prompt.index]).permutation(len(others))
    chosen = [others[i] for i in drawn]
    texts = [
        f"{before} and {_exchanged(prompt, after, second, other)}"
        for other in chosen[:OTHER_THINGS]
    ]
    kept = chosen[-OTHER_THINGS:]
    return texts + [f"{_exchanged(prompt, before, first, other)} and {after}" for other in kept]


RULES = {
    "colors": _colours,
    "counting": _counts,
    "position": _positions,
    "two_object": _two_things,
}


def _thing(prompt: Prompt, place: int) -> dict[str, Any]:
    if len(prompt.include) <= place:
        raise _wrong(prompt, f"include to have {place + 1} things")
    return prompt.include[place]


def _given(prompt: Prompt, place: int, name: str, known: Collection[str] = ()) -> str:
    value = _thing(prompt, place).get(name)
    if not isinstance(value, str) or (known and value not in known):
        raise _wrong(prompt, f"a {name} of {', '.join(known)}" if known else f"a {name}")
    return value


def _exchanged(prompt: Prompt, text: str, word: str, other: str) -> str:
    """The text with another word and its article instead of the first of a word. Raises InputError where
    there is none."""
    found = re.search(rf"\b(an? )?{re.escape(word)}\b", text)
    if found is None:
        raise _wrong(prompt, f"a prompt with {word}")
    article = ("an " if other[0] in "aeiou" else "a ") if found[1] else ""
    return text[: found.start()] + article + other + text[found.end() :]


def _wrong(prompt: Prompt, right: str) -> InputError:
    return InputError(
        f"{prompt.where}: the candidates of tag {prompt.tag} need {right}, as GenEval's prompts have it; it "
        f"is {prompt.text!r} of {prompt.include!r:.120}. A prompt of another form must give its candidates"
    )


def chosen(prompts: Sequence[Prompt], tags: Sequence[str], limit: int | None) -> list[Prompt]:
    """The prompts of some tags (all, if none is given), at most `limit` of each, evenly spread. Raises
    InputError for a tag that no prompt has."""
    known = list(dict.fromkeys(prompt.tag for prompt in prompts))
    for tag in tags:
        if tag not in known:
            raise InputError(f"{tag}: no prompt has this tag{suggest(tag, known)}", "tags")
    found = []
    for tag in known:
        if not tags or tag in tags:
            own = [prompt for prompt in prompts if prompt.tag == tag]
            count = min(limit or len(own), len(own))
            found += [own[i * len(own) // count] for i in range(count)]
    return sorted(found, key=lambda prompt: prompt.index)


def folder_of(guidance: float, model: str) -> str:
    """Where a model's pictures lie, below OUT."""
    return f"outputs/{guidance:g}/{model}"


def place_of(index: int) -> str:
    """The folder of a prompt below its model's."""
    return f"{index:05}"


def picture_of(index: int, number: int) -> str:
    """The file of a prompt's picture below its model's folder."""
    return f"{place_of(index)}/samples/{number:05}.png"


def picture_seed(seed: int, index: int, number: int) -> int:
    """The seed of a picture's noise, whatever else is made: of the base seed, its prompt's place and its
    number."""
    return int(np.random.default_rng([seed, index, number]).integers(2**63))


def read_labels(uri: str, pictures: Collection[str]) -> dict[str, bool]:
    """Picture -> whether it shows its prompt, from a table with the columns image and correct (true or false,
    in text 1 or 0, too). Raises InputError for a picture that is not one of `pictures`, or is there twice."""
    known, found = set(pictures), dict[str, bool]()
    for line in read_lines(uri, ""):
        image, value = line.image("image"), line.fields.get("correct")
        if line.is_text and isinstance(value, str):
            value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
        if not isinstance(value, bool):
            raise line.wrong("correct", "true or false")
        if image not in known:
            example = next(iter(pictures), "")
            raise line.wrong("image", f"a picture of this run, such as {example}")
        if found.setdefault(image, value) is not value:
            raise line.wrong("image", "labelled once: it was the other before")
    if not found:
        raise InputError(f"{uri}: holds no label", "labels")
    return found


def choices(
    prompts: Sequence[tuple[Prompt, tuple[str, ...]]], folder: str, samples: int
) -> list[dict[str, Any]]:
    """A line of a task of choices for each picture of a folder: image, texts, right, tag; those of one prompt
    are a cluster."""
    return [
        {
            "image": f"{folder}/{picture_of(prompt.index, number)}",
            "texts": list(own),
            "right": 0,
            "tag": prompt.tag,
            "cluster": place_of(prompt.index),
        }
        for (prompt, own), number in itertools.product(prompts, range(samples))
    ]


class SelfBench(RetrievalTask):
    """outputs/<guidance>/<model>/<number>/metadata.jsonl (tag, include, prompt) and samples/<number>.png.

    As the authors distribute it, and as `diffitm selfbench` writes it, whose models are told by "(own)". A
    picture is compared with the texts that `candidates` gives of its model's prompts.
    """

    name = "selfbench"
    folder = "selfbench"
    source = "the Hub dataset eugene6923/Self-Bench (its licence is not stated)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a picture, by model and tag; those of a prompt are a cluster."""
        top = storage.join(root, self.folder, "outputs")
        found = [
            (s, m) for s in storage.folders(top) for m in storage.folders(storage.join(top, s))
        ]
        if not found:
            raise InputError(f"task {self.name} needs {top} (from {self.source})")
        models = [model for _, model in found]
        for setting, model in found:
            made = model if models.count(model) == 1 else f"{model} {setting}"
            if storage.exists(storage.join(top, setting, model, SETTINGS)):
                made += " (own)"
            yield from self._of_model(root, f"outputs/{setting}/{model}", made)

    def _of_model(self, root: str, below: str, made: str) -> Iterator[Example]:
        folder = storage.join(root, self.folder, below)
        names = [name for name in storage.folders(folder) if name.isdecimal()]
        prompts = [
            _prompt(int(name), line)
            for name in names
            for line in self.lines(root, f"{below}/{name}/{METADATA}")
        ]
        if len(prompts) != len(names):
            raise InputError(f"{folder}: each {METADATA} must hold one prompt")
        for name, prompt, texts in zip(names, prompts, candidates(prompts), strict=True):
            samples = storage.files(storage.join(folder, name, "samples"), ".png")
            if not samples:
                raise InputError(f"{storage.join(folder, name, 'samples')}: holds no .png")
            groups = {"made by": made, "part": f"{made} {prompt.tag}"}
            for path in samples:
                file = storage.name(path)
                image = f"{self.folder}/{below}/{name}/samples/{file}"
                number = f"{made}/{name}/{file.removesuffix('.png')}"
                yield Example(number, (image,), texts, "text", 0, name, groups)
