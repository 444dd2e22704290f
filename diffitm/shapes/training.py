"""Drawn scenes to tune on: other ones than the tasks', in the NegCLIP layout."""

from __future__ import annotations

import functools
import json

from diffitm.core import storage
from diffitm.shapes.drawing import Things, World, exchanged
from diffitm.shapes.language import full, reordered, swapped
from diffitm.shapes.probes import csv_text
from diffitm.shapes.world import Scene

VERSION = 1
SEED, VALID_SEED = 101, 102  # training of the embedded models and the tasks have others
CHANGES = (("colour",), ("x", "y"), ("shape",))


def write_training(root: str, scenes: int) -> None:
    """coco_neg/train_neg_clip.tsv with two rows a scene (it and its changed twin, each the other's
    negative image), and valid_neg_clip.tsv of a tenth as many scenes, at least 50."""
    marker = storage.join(root, "training.json")
    wanted = {"version": VERSION, "scenes": scenes}
    if storage.exists(marker) and json.loads(storage.read_text(marker)) == wanted:
        return
    _write(World(root, scenes, False, SEED), "train")
    _write(World(root, max(50, scenes // 10), False, VALID_SEED), "valid")
    storage.write_text(marker, json.dumps(wanted))


def _write(world: World, split: str) -> None:
    rng = world.rng(20)
    rows: list[dict[str, object]] = []
    for number in range(world.scenes):
        change = CHANGES[number % len(CHANGES)]
        twins = world.family(rng, functools.partial(_changed, change=change))
        for k, scene in enumerate(twins):
            caption, row = full(scene), len(rows)
            path = f"coco/{split}/{row}.jpg"
            world.save(path, scene)
            negatives = [swapped(caption, "colour"), swapped(caption, "shape"), reordered(caption)]
            texts = [n.text() for n in negatives if n.text() != caption.text()]
            rows.append(
                {
                    "": row,
                    "title": caption.text(),
                    "filepath": path,
                    "neg_caption": repr(texts),
                    "neg_image": repr([row + 1 - 2 * k]),
                }
            )
    world.save_text(f"coco_neg/{split}_neg_clip.tsv", csv_text(rows, "\t"))


def _changed(scene: Scene, change: tuple[str, ...]) -> list[Things]:
    return [exchanged(scene, *change)]
