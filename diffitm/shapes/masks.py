"""Drawn scenes with a class for every pixel, in the layout of diffitm.probes.labelled."""

from __future__ import annotations

import json

import numpy as np

from diffitm.core import storage
from diffitm.shapes.drawing import World
from diffitm.shapes.world import RADIUS, SHAPES, SIZE, Scene, signed_distance

VERSION = 1
SEEDS = {"train": 201, "val": 202}  # the embedded models, the tasks and tuning have others
CLASSES = ["background", *SHAPES]


def write_masks(root: str, scenes: int) -> None:
    """So many scenes of two things in train and as many others in val: images, masks, classes.json.

    Classes are shapes, of whatever colour: a patch's pixels give colours away, but not shapes.
    """
    marker = storage.join(root, "masks.json")
    wanted = {"version": VERSION, "scenes": scenes}
    if storage.exists(marker) and json.loads(storage.read_text(marker)) == wanted:
        return
    for split, seed in SEEDS.items():
        world = World(root, scenes, False, seed)
        rng = world.rng(30)
        for number in range(scenes):
            scene, name = world.scene(rng), f"{number:05d}.png"
            world.save(f"{split}/images/{name}", scene)
            world.save_pixels(f"{split}/masks/{name}", draw_mask(scene))
    storage.write_text(storage.join(root, "classes.json"), json.dumps(CLASSES))
    storage.write_text(marker, json.dumps(wanted))


def draw_mask(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Places in CLASSES, uint8 [size, size]: a pixel is of a thing that holds its centre."""
    centre = (np.arange(size) + 0.5) / size
    mask = np.zeros((size, size), np.uint8)
    for thing in scene.things:
        x, y = centre[None, :] - thing.x, centre[:, None] - thing.y
        inside = signed_distance(thing.shape, x, y, RADIUS[thing.size]) <= 0
        mask[inside] = CLASSES.index(thing.shape)
    return mask
