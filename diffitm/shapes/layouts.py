"""The shapes world written in the published layouts of the benchmark tasks.

`python -m diffitm.shapes.layouts DIR --scenes 500` writes a data root that the real readers read.
Everything is a function of (seed, number of scenes, held-out or not).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from dataclasses import replace

import numpy as np

from diffitm.core import storage
from diffitm.shapes import probes
from diffitm.shapes.drawing import SEED, Things, World, absent, exchanged
from diffitm.shapes.language import Caption, Mention, full, mention, reordered, swapped
from diffitm.shapes.sets import write_sets
from diffitm.shapes.world import Scene

VERSION = 2
CANDIDATES = 10
TRIES = 2000  # families in a row that the gallery has no room for
ORDERED = 2  # captions of an image that the order task takes


def write_world(root: str, scenes: int, held_out: bool = False, seed: int = SEED) -> None:
    """Write all tasks below `root`; nothing is done again if they are there already."""
    marker = storage.join(root, "world.json")
    wanted = {"version": VERSION, "scenes": scenes, "held_out": held_out, "seed": seed}
    if storage.exists(marker) and json.loads(storage.read_text(marker)) == wanted:
        return
    world = World(root, scenes, held_out, seed)
    write_winoground(world)
    write_clevr(world)
    write_flickr30k(world)
    for write in probes.WRITERS:
        write(world)
    world.save_json("world.json", wanted)


def write_winoground(world: World) -> None:
    """data.json and ex_{id}_img_{k}.png: colours exchanged (Object), places exchanged (Relation),
    colours exchanged under a relation (Both)."""
    rng, entries = world.rng(1), []
    kinds = ("Object", "Relation", "Both")
    for number in range(world.scenes):
        kind = kinds[number % 3]
        change = ("x", "y") if kind == "Relation" else ("colour",)
        scenes = world.family(rng, functools.partial(_exchanged_once, change=change))
        caption = full(scenes[0], relation=kind != "Object")
        other = reordered(caption) if kind == "Relation" else swapped(caption, "colour")
        for k, drawn in enumerate(scenes):
            world.save(f"winoground/images/ex_{number}_img_{k}.png", drawn)
        entries.append(
            {
                "id": number,
                "caption_0": caption.text(),
                "caption_1": other.text(),
                "tag": f"Shapes-{kind}",
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": kind,
            }
        )
    world.save_json("winoground/data.json", entries)


def _exchanged_once(scene: Scene, change: tuple[str, ...]) -> list[Things]:
    return [exchanged(scene, *change)]


def write_clevr(world: World) -> None:
    """captions/<subtask>.json with two rows an image in the published sentences, and images/."""
    rng = world.rng(2)
    rows: dict[str, dict[str, list[list[str]]]] = {}
    for number in range(world.scenes):
        scene, file = world.scene(rng, axis="x"), f"SHAPES_val_{number:06d}.png"
        world.save(f"clevr/images/{file}", scene)
        for order in ((0, 1), (1, 0)):
            for subtask, (caption, foil) in _clevr_row(scene, order, rng).items():
                pair = [_sentence(caption), _sentence(foil)]
                rows.setdefault(subtask, {}).setdefault(file, []).append(pair)
    for subtask, entries in rows.items():
        world.save_json(f"clevr/captions/{subtask}.json", entries)


def _clevr_row(
    scene: Scene, order: tuple[int, int], rng: np.random.Generator
) -> dict[str, tuple[Caption, Caption]]:
    """Caption and foil of every subtask, the thing at order[0] named first."""
    first, second = (scene.things[i] for i in order)
    sized = Caption((mention(first, "shape", "size"), mention(second, "shape", "size")))
    coloured = Caption((mention(first, "shape", "colour"), mention(second, "shape", "colour")))
    colour, shape = absent(scene, "colour", rng), absent(scene, "shape", rng)
    side, other_side = ("left", "right") if first.x < second.x else ("right", "left")
    one = mention(first, "shape", "colour")
    return {
        "pair_binding_size": (sized, swapped(sized, "size")),
        "pair_binding_color": (coloured, swapped(coloured, "colour")),
        "recognition_color": (_one(colour=first.colour), _one(colour=colour)),
        "recognition_shape": (_one(shape=first.shape), _one(shape=shape)),
        "spatial": (Caption((one,), place=side), Caption((one,), place=other_side)),
        "binding_color_shape": (Caption((one,)), _one(first.shape, second.colour)),
        "binding_shape_color": (Caption((one,)), _one(second.shape, first.colour)),
    }


def _one(shape: str | None = None, colour: str | None = None) -> Caption:
    return Caption((Mention(shape, colour),))


def _sentence(caption: Caption) -> str:
    return caption.text("front").capitalize() + "."


def write_flickr30k(world: World) -> None:
    """Both candidate lists over one gallery with five captions an image, and images/.

    The gallery comes in families of five: a scene, and it with colours exchanged, places exchanged,
    sizes exchanged, or one thing of another shape; so near misses are among the ten candidates. As
    no two say the same, the world has room for little more than 500 of them.
    """
    rng = world.rng(3)
    gallery: list[Scene] = []
    said: set[str] = set()
    near_misses = functools.partial(_near_misses, rng=rng)
    tries = 0
    while len(gallery) < world.scenes and tries < TRIES:
        tries += 1
        family = world.family(rng, near_misses)
        texts = {full(scene, size=True).text() for scene in family}
        texts |= {_flipped(scene).text() for scene in family}
        if not texts & said:
            tries, gallery, said = 0, [*gallery, *family], said | texts
    gallery = gallery[: world.scenes]
    paths = [f"datasets/flickr30k/images/{1000 + i}.jpg" for i in range(len(gallery))]
    for path, scene in zip(paths, gallery, strict=True):
        world.save(path.removeprefix("datasets/"), scene)
    by_caption: dict[str, list[str]] = {}
    by_image: dict[str, list[str]] = {}
    for i, scene in enumerate(gallery):
        caption = full(scene, size=True)
        near = _nearest(scene, [j for j in range(len(gallery)) if j != i], gallery)
        candidates = [paths[j] for j in [i, *near[: CANDIDATES - 1]]]
        by_caption |= dict.fromkeys(_five_texts(scene), candidates)
        foils = (_five_texts(gallery[j])[k] for j in near for k in (0, 2))
        by_image[paths[i]] = [caption.text(), *itertools.islice(foils, CANDIDATES - 1)]
    world.save_json("flickr30k/val_top10_RN50x64.json", by_caption)
    world.save_json("flickr30k/val_top10_RN50x64_text.json", by_image)
    karpathy = [
        {
            "image": path.replace("datasets/flickr30k/images", "flickr30k-images"),
            "caption": _five_texts(scene)[:ORDERED],
        }
        for path, scene in zip(paths, gallery, strict=True)
    ]
    world.save_json("flickr30k/flickr30k_val.json", karpathy[: max(1, world.scenes // 4)])


def _near_misses(scene: Scene, rng: np.random.Generator) -> list[Things]:
    first, second = scene.things
    reshaped = replace(first, shape=absent(scene, "shape", rng))
    changes = [exchanged(scene, "colour"), exchanged(scene, "x", "y"), exchanged(scene, "size")]
    return [*changes, (reshaped, second)]


def _flipped(scene: Scene) -> Caption:
    return full(replace(scene, things=scene.things[::-1]), size=True)


def _five_texts(scene: Scene) -> list[str]:
    """Five ways to say everything: no other scene of the gallery is the same, so all else is false."""
    plain, flipped = full(scene, size=True), _flipped(scene)
    texts = [c.text(style) for c in (plain, flipped) for style in ("plain", "is")]
    return [*texts, plain.text().capitalize() + "."]


def _nearest(scene: Scene, others: list[int], gallery: list[Scene]) -> list[int]:
    """The others by how much they share with `scene`, ties by position: a stand-in for CLIP."""

    def shared(index: int) -> int:
        other = gallery[index]
        same = sum(
            getattr(a, name) == getattr(b, name)
            for a in scene.things
            for b in other.things
            for name in ("colour", "shape", "size")
        )
        return same + (scene.relation() == other.relation())

    return sorted(others, key=lambda index: (-shared(index), index))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="data root to write, a folder or URI")
    parser.add_argument("--scenes", type=int, default=500, help="scenes of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--held-out", action="store_true", help="scenes with a combination that training never saw"
    )
    args = parser.parse_args()
    for write in (write_world, write_sets):
        write(storage.absolute(args.root), args.scenes, args.held_out, args.seed)


if __name__ == "__main__":
    main()
