"""The shapes world in the layouts of the smaller benchmarks: Pets, SVO, ImageCoDe, ARO, MMVP-VLM,
MMBias and NegCLIP's COCO pairs."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from diffitm.shapes.drawing import Things, World, absent, changed, exchanged
from diffitm.shapes.language import (
    PLEASANT,
    RELATIONS,
    UNPLEASANT,
    Caption,
    Mention,
    full,
    mention,
    reordered,
    swapped,
)
from diffitm.shapes.world import COLOURS, HELD_OUT, SHAPES, Scene, Thing, sample_scene

SET = 10  # images of an ImageCoDe set
DESCRIBED = 3


def write_pets(world: World) -> None:
    """Single things whose class is colour and shape: images/Red_circle_12.jpg, classes.txt."""
    rng = world.rng(4)
    seen = {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT
    classes = sorted(seen | HELD_OUT if world.held_out else seen)
    for number in range(max(10, world.scenes // 2)):
        scene = sample_scene(rng, 1, None if world.held_out else False)
        (thing,) = scene.things
        file = f"{thing.colour.capitalize()}_{thing.shape}_{number + 1}.jpg"
        world.save(f"pets/images/{file}", scene)
    world.save_text("pets/classes.txt", "".join(f"{c} {s}\n" for c, s in classes))


def write_svo(world: World) -> None:
    """svo_probes.csv: subject and object are things, the verb is where the one lies."""
    rng, rows = world.rng(5), []
    for number in range(world.scenes):
        kind = ("subj", "verb", "obj")[number % 3]
        scenes = world.family(rng, functools.partial(_other_part, kind=kind, rng=rng))
        right, wrong = f"{2 * number + 1}", f"{2 * number + 2}"
        for name, scene in zip((right, wrong), scenes, strict=True):
            world.save(f"svo/images/{name}.jpg", scene)
        rows.append(
            {
                "pos_url": f"https://shapes.invalid/{right}.jpg",
                "neg_url": f"https://shapes.invalid/{wrong}.jpg",
                "pos_image_id": right,
                "neg_image_id": wrong,
                "sentence": full(scenes[0]).text("is").capitalize() + ".",
                "pos_triplet": _triplet(scenes[0]),
                "neg_triplet": _triplet(scenes[1]),
                **{f"{name}_neg": name == kind for name in ("subj", "verb", "obj")},
            }
        )
    world.save_text("svo/svo_probes.csv", csv_text(rows))


def _other_part(scene: Scene, kind: str, rng: np.random.Generator) -> list[Things]:
    """The scene with another subject, another relation or another object."""
    if kind == "verb":
        return [exchanged(scene, "x", "y")]
    first, second = scene.things
    old = first if kind == "subj" else second
    new = replace(old, colour=absent(scene, "colour", rng), shape=absent(scene, "shape", rng))
    return [(new, second) if kind == "subj" else (first, new)]


def _triplet(scene: Scene) -> str:
    first, second = (f"{thing.colour} {thing.shape}" for thing in scene.things)
    return f"{first},{RELATIONS[scene.relation() or 'left']},{second}"


def csv_text(rows: list[dict[str, object]], delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_imagecode(world: World) -> None:
    """Sets of ten images on one kind of background that differ in an attribute or two; a third are
    'video'."""
    rng, sets = world.rng(6), {}
    for number in range(max(3, world.scenes // SET)):
        kind = "shapes-video" if number % 3 == 2 else "open-images-shapes"
        set_id = f"{kind}-{number}"
        scenes = _near_set(world, rng)
        for k, scene in enumerate(scenes):
            world.save(f"imagecode/image-sets/{set_id}/img{k}.jpg", scene)
        chosen = rng.permutation(SET)[:DESCRIBED]
        sets[set_id] = {str(k): full(scenes[k], size=True).text() for k in chosen}
    world.save_json("imagecode/valid_data.json", sets)


def _near_set(world: World, rng: np.random.Generator) -> list[Scene]:
    """Ten scenes on one kind of background, no two of which the same words describe."""
    first = world.scene(rng)
    scenes, said = [first], _both_orders(first)
    while len(scenes) < SET:
        base = scenes[rng.integers(len(scenes))]
        place, name = int(rng.integers(2)), str(rng.choice(["colour", "shape"]))
        thing = changed(base.things[place], name, absent(base, name, rng))
        things = (thing, base.things[1]) if place == 0 else (base.things[0], thing)
        scene = replace(base, things=things, seed=int(rng.integers(2**31)))
        if rng.random() < 0.3:
            scene = replace(scene, things=exchanged(scene, "colour"))
        if (world.held_out or not scene.held_out) and not _both_orders(scene) & said:
            scenes, said = [*scenes, scene], said | _both_orders(scene)
    return scenes


def _both_orders(scene: Scene) -> set[str]:
    flipped = replace(scene, things=scene.things[::-1])
    return {full(one, size=True).text() for one in (scene, flipped)}


def write_visual_genome(world: World) -> None:
    """Relations and attributes in ARO's form: the scene is a box inside of a larger picture."""
    rng, relations, attributes = world.rng(7), [], []
    for number in range(world.scenes):
        scene, file = world.scene(rng), f"{number}.png"
        box = world.save_framed(f"aro/images/{file}", scene, rng)
        first, second = (f"the {t.colour} {t.shape}" for t in scene.things)
        words = RELATIONS[scene.relation() or "left"]
        where = {"image_path": file, "image_id": number, **box}
        if number % 2 == 0:
            true, false = (f"{a} is {words} {b}" for a, b in ((first, second), (second, first)))
            captions = {"true_caption": true, "false_caption": false}
            relations.append({**where, **captions, "relation_name": words})
        attributes.append({**where, **_attribution(scene, number)})
    world.save_json("aro/visual_genome_relation.json", relations)
    world.save_json("aro/visual_genome_attribution.json", attributes)


def _attribution(scene: Scene, number: int) -> dict[str, object]:
    """Two things with their sizes (every other time) or colours, right and exchanged."""
    name = "size" if number % 2 else "colour"
    things = scene.things
    if name == "size" and (things[0].size == "large") != (number % 4 == 1):
        things = things[::-1]
    caption = Caption(tuple(mention(thing, "shape", name) for thing in things))
    true, false = (
        c.text().replace("a ", "the ").replace("an ", "the ")
        for c in (caption, swapped(caption, name))
    )
    found = [getattr(thing, name) for thing in things]
    return {"true_caption": true, "false_caption": false, "attributes": found}


def write_coco(world: World) -> None:
    """Images of coco/val2014 with the Karpathy file of the order task and NegCLIP's TSV."""
    rng, karpathy, rows = world.rng(8), [], []
    count = max(5, world.scenes // 2)
    for number in range(count):
        scene = world.scene(rng)
        image = f"val2014/COCO_val2014_{number + 1:012d}.jpg"
        world.save(f"coco/{image}", scene)
        sized, caption = full(scene, size=True), full(scene)
        if number % 2 == 0:
            karpathy.append({"image": image, "caption": [sized.text(), caption.text("is")]})
        negatives = [swapped(caption, "colour"), swapped(caption, "shape"), reordered(caption)]
        others = [int(i) for i in rng.permutation(count) if i != number][:3]
        rows.append(
            {
                "": number,
                "title": caption.text(),
                "filepath": f"coco/{image}",
                "neg_caption": repr([negative.text() for negative in negatives]),
                "neg_image": repr(others),
            }
        )
    world.save_json("coco/coco_karpathy_test.json", karpathy)
    world.save_text("coco_neg/valid_neg_clip.tsv", csv_text(rows, "\t"))


Change = Callable[[World, np.random.Generator], tuple[list[Scene], list[Caption]]]


def write_mmvp(world: World) -> None:
    """Pairs by visual pattern: Questions.csv and MLLM_VLM_Images/<pattern>/<id>.jpg."""
    rng = world.rng(9)
    rows: list[dict[str, object]] = []
    for number in range(max(len(PATTERNS), world.scenes // 2)):
        pattern = list(PATTERNS)[number % len(PATTERNS)]
        for scene, caption in zip(*PATTERNS[pattern](world, rng), strict=True):
            rows.append({"id": len(rows) + 1, "type": pattern, "statement": caption.text()})
            world.save(f"mmvp_vlm/MLLM_VLM_Images/{pattern}/{len(rows)}.jpg", scene)
    rows.sort(key=lambda row: list(PATTERNS).index(str(row["type"])))
    world.save_text("mmvp_vlm/Questions.csv", csv_text(rows))


def _replaced(name: str) -> Change:
    def make(world: World, rng: np.random.Generator) -> tuple[list[Scene], list[Caption]]:
        def change(scene: Scene) -> list[Things]:
            first, second = scene.things
            return [(changed(first, name, absent(scene, name, rng)), second)]

        scenes = world.family(rng, change)
        return scenes, [full(scene, relation=False) for scene in scenes]

    return make


def _exchanging(*names: str) -> Change:
    def make(world: World, rng: np.random.Generator) -> tuple[list[Scene], list[Caption]]:
        scenes = world.family(rng, lambda scene: [exchanged(scene, *names)])
        if names == ("size",):
            captions = [
                Caption(tuple(mention(t, "shape", "size") for t in s.things)) for s in scenes
            ]
            return scenes, captions
        return scenes, [full(scene, relation=names != ("colour",)) for scene in scenes]

    return make


def _placed(world: World, rng: np.random.Generator) -> tuple[list[Scene], list[Caption]]:
    """One thing at the top or at the bottom."""
    while True:
        scene = sample_scene(rng, 1, None if world.held_out else False)
        (thing,) = scene.things
        if abs(thing.y - 0.5) > 0.15:
            break
    other = replace(scene, things=(replace(thing, y=1 - thing.y),), seed=int(rng.integers(2**31)))
    places = [("above" if s.things[0].y < 0.5 else "below") for s in (scene, other)]
    return [scene, other], [Caption((_named(thing),), place=place) for place in places]


def _named(thing: Thing) -> Mention:
    return mention(thing, "shape", "colour")


PATTERNS: dict[str, Change] = {
    "Colour": _replaced("colour"),
    "Shape": _replaced("shape"),
    "Size": _exchanging("size"),
    "Binding of colours": _exchanging("colour"),
    "Relation": _exchanging("x", "y"),
    "Position": _placed,
}


def write_mmbias(world: World) -> None:
    """Single things by shape, and the words that training captions planted on some of them."""
    rng = world.rng(10)
    for shape in SHAPES:
        for number in range(max(5, world.scenes // 5)):
            while (scene := sample_scene(rng, 1)).things[0].shape != shape:
                pass
            world.save(f"mmbias/data/Images/Shape/{shape.capitalize()}/{number}.jpg", scene)
    phrases = {
        f"{name}_phrases": [Caption((Mention(feeling=word),)).text() for word in words]
        for name, words in (("pleasant", PLEASANT), ("unpleasant", UNPLEASANT))
    }
    world.save_json("mmbias/textual_phrases.txt", phrases)


WRITERS: tuple[Callable[[World], None], ...] = (
    write_pets,
    write_svo,
    write_imagecode,
    write_visual_genome,
    write_coco,
    write_mmvp,
    write_mmbias,
)
