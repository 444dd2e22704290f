"""Drawn scenes to tune on: other ones than the tasks', in the NegCLIP layout."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

from diffitm.core import storage
from diffitm.shapes.drawing import Things, World, exchanged
from diffitm.shapes.language import Mention, full, reordered, swapped
from diffitm.shapes.probes import csv_text
from diffitm.shapes.world import SIZE, Scene, Thing, bounds

VERSION = 2
SEED, VALID_SEED = 101, 102  # training of the embedded models and the tasks have others
CHANGES = (("colour",), ("x", "y"), ("shape",))


def write_training(root: str, scenes: int) -> None:
    """coco_neg/train_neg_clip.tsv with two rows a scene (it and its changed twin, each the other's
    negative image), and valid_neg_clip.tsv of a tenth as many scenes, at least 50; of both their things'
    boxes in MDETR's form, grounding/train.json and valid.json."""
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
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(world.scenes):
        change = CHANGES[number % len(CHANGES)]
        twins = world.family(rng, functools.partial(_changed, change=change))
        for k, scene in enumerate(twins):
            caption, row = full(scene), len(rows)
            path = f"coco/{split}/{row}.jpg"
            world.save(path, scene)
            for text, found in expressions(scene):
                size = {"width": SIZE, "height": SIZE}
                images.append({"id": len(images), "file_name": path, "caption": text, **size})
                annotations += [{"image_id": len(images) - 1, **own} for own in found]
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
    told = [{"id": number, **own} for number, own in enumerate(annotations)]
    world.save_json(f"grounding/{split}.json", {"images": images, "annotations": told})


def expressions(scene: Scene) -> list[tuple[str, list[dict[str, object]]]]:
    """Texts of a scene of two things, each with its boxes' annotations: one about each thing, which the other
    one places, and one that names both."""
    found = []
    for order in (scene.things, scene.things[::-1]):
        caption = full(replace(scene, things=order))
        found.append((caption.text(), [_annotation(order[0], 0, caption.mentions[0])]))
    caption = full(scene, relation=False)
    text = caption.text()
    starts = (0, len(text) - len(caption.mentions[1].words()))
    named = zip(scene.things, starts, caption.mentions, strict=True)
    found.append((text, [_annotation(*own) for own in named]))
    return found


def _annotation(thing: Thing, start: int, said: Mention) -> dict[str, object]:
    left, top, right, bottom = (SIZE * side for side in bounds(thing))
    return {
        "bbox": [round(side, 2) for side in (left, top, right - left, bottom - top)],
        "tokens_positive": [[start, start + len(said.words())]],
        "area": round((right - left) * (bottom - top), 2),
        "category_id": 1,
        "iscrowd": 0,
    }


def _changed(scene: Scene, change: tuple[str, ...]) -> list[Things]:
    return [exchanged(scene, *change)]
