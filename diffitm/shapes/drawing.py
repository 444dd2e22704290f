"""Scenes drawn into one data root, and the changes of a scene that make its near misses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from diffitm.core import storage
from diffitm.shapes.world import COLOURS, SHAPES, Scene, Thing, render, sample_scene

SEED = 7
MARGIN = 24  # pixels around a scene that a task crops
Things = tuple[Thing, ...]
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 97, "subsampling": 0}


class World:
    """Draws scenes for one data root; every task has its own random stream."""

    def __init__(self, root: str, scenes: int, held_out: bool = False, seed: int = SEED) -> None:
        self.root, self.scenes, self.held_out, self.seed = root, scenes, held_out, seed

    def rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    def scene(self, rng: np.random.Generator, axis: str | None = None) -> Scene:
        return sample_scene(rng, 2, self.held_out, axis)

    def family(
        self, rng: np.random.Generator, changes: Callable[[Scene], list[Things]]
    ) -> list[Scene]:
        """A scene and its changed twins, each on a background of its own. None of them holds a
        combination kept out of training; of a held-out world the first does (no exchange of colours
        leaves one in both)."""
        while True:
            scene = self.scene(rng)
            drawn = [scene, *(repainted(scene, things, rng) for things in changes(scene))]
            if self.held_out or not any(one.held_out for one in drawn):
                return drawn

    def save(self, path: str, scene: Scene) -> None:
        self.save_pixels(path, render(scene))

    def save_framed(self, path: str, scene: Scene, rng: np.random.Generator) -> dict[str, int]:
        """Save the scene somewhere in a picture of grey noise; the box that holds it."""
        inner = render(scene)
        height, width = (side + MARGIN for side in inner.shape[:2])
        frame = rng.integers(60, 200, (height, width, 1), dtype=np.uint8).repeat(3, axis=2)
        x, y = (int(v) for v in rng.integers(0, MARGIN + 1, 2))
        frame[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
        self.save_pixels(path, frame)
        return {"bbox_x": x, "bbox_y": y, "bbox_w": inner.shape[1], "bbox_h": inner.shape[0]}

    def save_pixels(self, path: str, pixels: np.ndarray) -> None:
        self.save_bytes(path, encoded(path, pixels))

    def save_bytes(self, path: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.root, path), data)

    def save_text(self, path: str, text: str) -> None:
        storage.write_text(storage.join(self.root, path), text)

    def save_json(self, path: str, value: object) -> None:
        storage.write_text(storage.join(self.root, path), json.dumps(value, indent=1))


def encoded(path: str, pixels: np.ndarray) -> bytes:
    """An image file of the kind that its name says; a .npy as OpenCV keeps pictures."""
    buffer = io.BytesIO()
    if path.endswith(".npy"):
        np.save(buffer, pixels[..., ::-1])
    else:
        kind: dict[str, Any] = {"format": "PNG"} if path.endswith(".png") else JPEG
        Image.fromarray(pixels).save(buffer, **kind)
    return buffer.getvalue()


def repainted(scene: Scene, things: Things, rng: np.random.Generator) -> Scene:
    """Other things on another background of another texture."""
    background = sample_scene(rng, 1).background
    return replace(scene, things=things, background=background, seed=int(rng.integers(2**31)))


def exchanged(scene: Scene, *attributes: str) -> Things:
    """The things with these attributes exchanged between the two."""
    first, second = scene.things
    return (
        replace(first, **{name: getattr(second, name) for name in attributes}),
        replace(second, **{name: getattr(first, name) for name in attributes}),
    )


def changed(thing: Thing, attribute: str, value: str) -> Thing:
    """The thing with another colour or shape."""
    if attribute == "colour":
        return replace(thing, colour=value)
    return replace(thing, shape=value)


def absent(scene: Scene, attribute: str, rng: np.random.Generator) -> str:
    """A colour or shape that nothing in the scene has."""
    present = {getattr(thing, attribute) for thing in scene.things}
    known = COLOURS if attribute == "colour" else SHAPES
    return str(rng.choice([value for value in known if value not in present]))
