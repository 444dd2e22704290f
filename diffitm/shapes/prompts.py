"""Prompts of the shapes world in the form of GenEval's metadata, with what else a picture could show."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from diffitm.shapes.drawing import SEED
from diffitm.shapes.language import RELATIONS, Caption, Mention, full
from diffitm.shapes.world import COLOURS, HELD_OUT, SHAPES, Scene, sample_scene

DRAWN = 24  # prompts of two things with their colours, of either tag
STREAM = 40  # of the world's random numbers


def shape_prompts() -> list[dict[str, Any]]:
    """Lines with tag, include, prompt and, where a picture is not compared with the other prompts of the tag,
    candidates, in which a colour, a shape or the relation is another."""
    rng = np.random.default_rng([SEED, STREAM])
    scenes = _scenes(rng)
    return [
        *(_one(shape, None) for shape in SHAPES),
        *(_one(s, c) for s, c in itertools.product(SHAPES, COLOURS) if (c, s) not in HELD_OUT),
        *(_two(first, second) for first, second in itertools.combinations(SHAPES, 2)),
        *(coloured(scene) for scene in scenes[:DRAWN]),
        *(placed(scene) for scene in scenes[DRAWN:]),
    ]


def _scenes(rng: np.random.Generator) -> list[Scene]:
    """No two of the first half have the same things, in whatever order, so that each has one true prompt."""
    found: dict[frozenset[tuple[str, str]], Scene] = {}
    while len(found) < 2 * DRAWN:
        scene = sample_scene(rng)
        found.setdefault(frozenset(thing.combination for thing in scene.things), scene)
    return list(found.values())


def _line(tag: str, include: list[dict[str, Any]], caption: Caption) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": caption.text()}


def _one(shape: str, colour: str | None) -> dict[str, Any]:
    thing: dict[str, Any] = {"class": shape, "count": 1}
    if colour is None:
        return _line("single_object", [thing], Caption((Mention(shape),)))
    others = [Caption((Mention(shape, other),)).text() for other in COLOURS if other != colour]
    line = _line("colors", [{**thing, "color": colour}], Caption((Mention(shape, colour),)))
    return {**line, "candidates": others}


def _two(first: str, second: str) -> dict[str, Any]:
    def said(*shapes: str) -> Caption:
        return Caption(tuple(Mention(shape) for shape in shapes))

    others = [shape for shape in SHAPES if shape not in (first, second)]
    texts = [said(first, other) for other in others] + [said(other, second) for other in others]
    include = [{"class": shape, "count": 1} for shape in (first, second)]
    line = _line("two_object", include, said(first, second))
    return {**line, "candidates": [caption.text() for caption in texts]}


def _things(scene: Scene) -> list[dict[str, Any]]:
    return [{"class": t.shape, "count": 1, "color": t.colour} for t in scene.things]


def coloured(scene: Scene) -> dict[str, Any]:
    """The line of a scene of two things by their colours."""
    return _line("color_attr", _things(scene), full(scene, relation=False))


def placed(scene: Scene) -> dict[str, Any]:
    """The same by where they are."""
    caption = full(scene)
    second, first = _things(scene)[::-1]
    include = [second, {**first, "position": [RELATIONS[str(caption.relation)], 0]}]
    others = [r for r in RELATIONS if r != caption.relation]
    texts = [Caption(caption.mentions, other).text() for other in others]
    return {**_line("position", include, caption), "candidates": texts}
