"""The shapes world in the published layouts of the benchmarks beyond GDBench, a few entries a part.

As no scene has depth, WhatsUp's behind and in front are told as above and below.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.shapes.drawing import SEED, World, absent, encoded, repainted
from diffitm.shapes.language import (
    OPPOSITE,
    PLACES,
    RELATIONS,
    Caption,
    full,
    mention,
    reordered,
    swapped,
)
from diffitm.shapes.probes import PATTERNS
from diffitm.shapes.prompts import coloured, placed
from diffitm.shapes.world import SIZES, Scene, render, sample_scene

VERSION = 2
LEAST, SHARE = 4, 10  # entries of a part: a tenth of the scenes
OF_PAIRS = ("Colour", "Binding of colours", "Relation", "Shape")
PLACED = {"left": (0.25, 0.5), "right": (0.75, 0.5), "above": (0.5, 0.25), "below": (0.5, 0.75)}
# WhatsUp's prepositions, each with what it is here.
ON_TABLES = {"left_of": "left", "right_of": "right", "on": "above", "under": "below"}
IN_DEPTH = {"left_of": "left", "right_of": "right", "in-front_of": "below", "behind": "above"}


def write_sets(root: str, scenes: int, held_out: bool = False, seed: int = SEED) -> None:
    """Write all of them below `root`; nothing is done again if they are there already."""
    marker = storage.join(root, "sets.json")
    wanted = {"version": VERSION, "scenes": scenes, "held_out": held_out, "seed": seed}
    if storage.exists(marker) and json.loads(storage.read_text(marker)) == wanted:
        return
    world = World(root, max(LEAST, scenes // SHARE), held_out, seed)
    for number, write in enumerate(WRITERS):
        write(world, world.rng(100 + number))
    world.save_json("sets.json", wanted)


def foils(scene: Scene, rng: np.random.Generator) -> dict[str, tuple[Caption, Caption]]:
    """A caption of a scene of two things and one that is wrong, for each part of SugarCrepe."""
    caption, first = full(scene), scene.things[0]
    one, sized = mention(first, "shape", "colour"), mention(first, "shape", "size")
    other = replace(sized, size=SIZES[1 - SIZES.index(first.size)])
    colour, shape = absent(scene, "colour", rng), absent(scene, "shape", rng)
    second = caption.mentions[1]
    relation = OPPOSITE[caption.relation or "left"]
    return {
        "add_att": (Caption((mention(first, "shape"),)), Caption((other,))),
        "add_obj": (Caption((one,)), Caption((one, replace(one, shape=shape, colour=colour)))),
        "replace_att": (caption, replace(caption, mentions=(replace(one, colour=colour), second))),
        "replace_obj": (caption, replace(caption, mentions=(replace(one, shape=shape), second))),
        "replace_rel": (caption, replace(caption, relation=relation)),
        "swap_att": (caption, swapped(caption, "colour")),
        "swap_obj": (caption, swapped(caption, "shape")),
    }


def write_sugarcrepe(world: World, rng: np.random.Generator) -> None:
    """Both sets over one gallery of coco/val2017; as published, a part lacks a number."""
    parts: dict[str, dict[str, Any]] = {}
    again: dict[str, list[Any]] = {}
    for number in range(world.scenes):
        scene, file = world.scene(rng), f"{number + 1:012d}.jpg"
        world.save(f"coco/val2017/{file}", scene)
        flipped = full(replace(scene, things=scene.things[::-1]))
        for part, (right, wrong) in foils(scene, rng).items():
            row = {"filename": file, "caption": right.text(), "negative_caption": wrong.text()}
            if (part, number) != ("swap_obj", 1):
                parts.setdefault(part, {})[str(number)] = row
            if not part.startswith("add"):
                again.setdefault(part, []).append({"id": number, **row, "caption2": flipped.text()})
    for part, rows in parts.items():
        world.save_json(f"sugarcrepe/data/{part}.json", rows)
    for part, entries in again.items():
        world.save_json(f"sugarcrepe_pp/data/{part}.json", entries)


def write_whatsup(world: World, rng: np.random.Generator) -> None:
    """Both controlled sets and the four of questions, these on images of coco/val2017 and of their own."""
    for folder, file, names in (
        ("controlled_images", "controlled_images_dataset", ON_TABLES),
        ("controlled_clevr", "controlled_clevr_dataset", IN_DEPTH),
    ):
        rows, seen = [], set[str]()
        for _ in range(world.scenes):
            scene = world.scene(rng)
            first, second = (f"{t.colour}-{t.shape}" for t in scene.things)
            if f"{first} {second}" in seen:
                continue
            seen.add(f"{first} {second}")
            for name, relation in names.items():
                drawn = _arranged(scene, relation, rng)
                world.save(f"whatsup/{folder}/{first}_{name}_{second}.jpeg", drawn)
                right = full(drawn)
                others = [replace(right, relation=r).text() for r in RELATIONS if r != relation]
                path = f"data/{folder}/{first}_{name}_{second}.jpeg"
                rows.append({"image_path": path, "caption_options": [right.text(), *others]})
        world.save_json(f"whatsup/{file}.json", rows)
    for name, images in (("coco", "coco/val2017/{:012d}.jpg"), ("vg", "whatsup/vg_images/{}.jpg")):
        one, two = [], []
        for number in range(10_000, 10_000 + world.scenes):
            scene = world.scene(rng)
            world.save(images.format(number), scene)
            two.append([number, full(scene).text(), reordered(full(scene)).text()])
            place = str(rng.choice(list(PLACES)))
            alone = _alone(rng, place)
            world.save(images.format(number + 50_000), alone)
            said = mention(alone.things[0], "shape", "colour")
            texts = (Caption((said,), place=p).text() for p in (place, OPPOSITE[place]))
            one.append([number + 50_000, *texts])
        world.save_json(f"whatsup/{name}_qa_one_obj.json", one)
        world.save_json(f"whatsup/{name}_qa_two_obj.json", two)


def _arranged(scene: Scene, relation: str, rng: np.random.Generator) -> Scene:
    """The things of a scene, the first of them so placed to the second."""
    places = PLACED[relation], PLACED[OPPOSITE[relation]]
    things = tuple(replace(t, x=x, y=y) for t, (x, y) in zip(scene.things, places, strict=True))
    return replace(scene, things=things, seed=int(rng.integers(2**31)))


def _alone(rng: np.random.Generator, place: str) -> Scene:
    scene = sample_scene(rng, 1)
    x, y = PLACED[place]
    return replace(scene, things=(replace(scene.things[0], x=x, y=y),))


def write_valse(world: World, rng: np.random.Generator) -> None:
    """All eleven pieces; of each the second item is not valid."""
    pieces = {
        "existence": ("add_obj", "visual7w/images/v7w_{}.jpg"),
        "plurals": ("replace_att", "coco/val2017/{:012d}.jpg"),
        "counting-hard": ("replace_obj", "visual7w/images/v7w_{}.jpg"),
        "counting-small-quant": ("replace_att", "visual7w/images/v7w_{}.jpg"),
        "counting-adversarial": ("replace_obj", "visual7w/images/v7w_{}.jpg"),
        "relations": ("replace_rel", "coco/val2017/{:012d}.jpg"),
        "action-replacement": ("replace_rel", "swig/images_512/falling_{}.jpg"),
        "actant-swap": ("swap_obj", "swig/images_512/falling_{}.jpg"),
        "coreference-standard": ("swap_att", "coco/train2014/COCO_train2014_{:012d}.jpg"),
        "coreference-hard": (
            "swap_att",
            "visdial/VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg",
        ),
        "foil-it": ("replace_obj", "coco/val2014/COCO_val2014_{:012d}.jpg"),
    }
    for place, (piece, (part, form)) in enumerate(pieces.items()):
        items = {}
        for number in range(LEAST):
            scene, path = world.scene(rng), form.format(20_000 + 100 * place + number)
            world.save(path, scene)
            right, wrong = foils(scene, rng)[part]
            votes = 1 if number == 1 else 3
            items[f"{piece}_{number}"] = {
                "dataset": "shapes",
                "image_file": path.rpartition("/")[2],
                "caption": right.text(),
                "foil": wrong.text(),
                "mturk": {"foil": 3 - votes, "caption": votes, "other": 0},
                "linguistic_phenomena": piece,
            }
        world.save_json(f"valse/data/{piece}.json", items)


def _pair(world: World, rng: np.random.Generator, number: int) -> tuple[list[Scene], list[str]]:
    """Two scenes that differ in one way, with their captions."""
    scenes, captions = PATTERNS[OF_PAIRS[number % len(OF_PAIRS)]](world, rng)
    return scenes, [caption.text() for caption in captions]


def write_cola(world: World, rng: np.random.Generator) -> None:
    rows = []
    for number in range(world.scenes):
        scenes, captions = _pair(world, rng, 1)
        row: list[str] = []
        for k in (0, 1):
            file = f"{2_400_000 + 2 * number + k}.jpg"
            world.save(f"cola/images/{file}", scenes[k])
            row += [f"https://shapes.invalid/vg_gqa_images/{file}", captions[k]]
        rows.append(row)
    world.save_json("cola/data/COLA_multiobjects_matching_benchmark.json", rows)


def write_colorswap(world: World, rng: np.random.Generator) -> None:
    """As the authors' archive has it: the images in a zip."""
    rows, buffer = [], io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(world.scenes):
            scenes, captions = _pair(world, rng, 1)
            names = [f"images/img_{number}_{k}.png" for k in (1, 2)]
            for name, scene in zip(names, scenes, strict=True):
                archive.writestr(name, encoded(name, render(scene)))
            rows.append(
                {
                    "id": number,
                    "caption_1": captions[0],
                    "caption_2": captions[1],
                    "image_1": names[0],
                    "image_2": names[1],
                    "image_source": ("midjourney", "dalle")[number % 2],
                    "caption_source": "human",
                }
            )
    world.save_bytes("colorswap/data/images.zip", buffer.getvalue())
    world.save_json("colorswap/data/test.json", rows)


def write_eqben(world: World, rng: np.random.Generator) -> None:
    """The mini set and the 10 % one, of all seven parts; youcook2's frames are arrays."""
    parts = {
        "eqbensd": (0, "png"),
        "eqbenkubric_cnt": (3, "jpg"),
        "eqbenkubric_loc": (2, "jpg"),
        "eqbenkubric_attr": (1, "jpg"),
        "eqbengebc": (2, "jpg"),
        "eqbenag": (2, "png"),
        "eqbenyoucook2": (0, "npy"),
    }
    rows = []
    for part, (pattern, ending) in parts.items():
        for number in range(max(2, world.scenes // 2)):
            scenes, captions = _pair(world, rng, pattern)
            names = [f"{part}/{number}_{k}.{ending}" for k in (0, 1)]
            for name, scene in zip(names, scenes, strict=True):
                for folder in ("eqben_vllm/images", "images"):
                    world.save(f"eqben/{folder}/{name}", scene)
            rows.append(
                dict(
                    zip(("image0", "image1", "caption0", "caption1"), names + captions, strict=True)
                )
            )
    world.save_json("eqben/eqben_vllm/all_select.json", rows)
    world.save_json("eqben/ann.json", rows)


def _embedded(scene: Scene, name: str) -> dict[str, Any]:
    """An image as the Hub's data sets hold it."""
    return {"bytes": encoded(name, render(scene)), "path": name}


def _save_parquet(world: World, path: str, rows: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=3)
    world.save_bytes(path, buffer.getvalue())


def write_bivlc(world: World, rng: np.random.Generator) -> None:
    rows = []
    for number in range(world.scenes):
        (scene, other), (caption, negative) = _pair(world, rng, number)
        kind = (("replace", "att"), ("swap", "att"), ("replace", "rel"), ("replace", "obj"))[
            number % 4
        ]
        rows.append(
            {
                "image": _embedded(scene, f"{number}.jpg"),
                "caption": caption,
                "negative_caption": negative,
                "negative_image": _embedded(other, f"{number}_negative.jpg"),
                "type": kind[0],
                "subtype": kind[1],
            }
        )
    _save_parquet(world, "bivlc/data/test-00000-of-00001.parquet", rows)


def write_vismin(world: World, rng: np.random.Generator) -> None:
    rows = []
    for number in range(max(world.scenes, 4)):
        scenes, captions = _pair(world, rng, number)
        rows.append(
            {
                "image_0": _embedded(scenes[0], f"{number}_0.png"),
                "text_0": captions[0],
                "image_1": _embedded(scenes[1], f"{number}_1.png"),
                "text_1": captions[1],
                "id": str(number),
                "category": ("attribute", "counting", "relation", "object")[number % 4],
            }
        )
    half = len(rows) // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        _save_parquet(world, f"vismin/data/test-{k:05d}-of-00002.parquet", part)


def write_naturalbench(world: World, rng: np.random.Generator) -> None:
    rows = []
    for number in range(world.scenes):
        scenes, captions = _pair(world, rng, number)
        names = [f"images/{number}_{k}.jpg" for k in (0, 1)]
        for name, scene in zip(names, scenes, strict=True):
            world.save(f"NaturalBench-Retrieval/{name}", scene)
        fields = ("image_0", "image_1", "caption_0", "caption_1")
        rows.append({"index": number, **dict(zip(fields, names + captions, strict=True))})
    world.save_json("NaturalBench-Retrieval/metadata.json", rows)


def write_spec(world: World, rng: np.random.Generator) -> None:
    """Two candidates an entry in each part, the right one at either place."""
    parts = {
        "absolute_size": "Size",
        "relative_size": "Size",
        "absolute_spatial": "Position",
        "relative_spatial": "Relation",
        "existence": "Shape",
        "count": "Colour",
    }
    for part, pattern in parts.items():
        texts, images = [], []
        for number in range(LEAST):
            scenes, captions = PATTERNS[pattern](world, rng)
            said, right = [caption.text() for caption in captions], number % 2
            names = [f"{number}/{k}.jpg" for k in (0, 1)]
            for name, scene in zip(names, scenes, strict=True):
                world.save(f"spec/data/{part}/{name}", scene)
            texts.append({"query": names[right], "keys": said, "label": right})
            images.append({"query": said[right], "keys": names, "label": right})
        world.save_json(f"spec/data/{part}/image2text.json", texts)
        world.save_json(f"spec/data/{part}/text2image.json", images)


def write_vl_checklist(world: World, rng: np.random.Generator) -> None:
    """A file of each kind, on images of each data set."""
    files = {
        "Attribute/vg/color": ("replace_att", "vg/VG_100K"),
        "Attribute/vaw/size": ("add_att", "vg/VG_100K_2"),
        "Attribute/vg/spatial": ("replace_rel", "vg/VG_100K"),
        "Object/Location/hake_location/hake_obj_center": ("replace_obj", "hake/vcoco/val2014"),
        "Object/Size/swig_size/swig_agent_large": ("replace_obj", "swig"),
        "Relation/swig_action": ("swap_obj", "swig"),
    }
    for place, (name, (part, folder)) in enumerate(files.items()):
        rows = []
        for number in range(LEAST):
            scene, file = world.scene(rng), f"{folder}/{100 * place + number}.jpg"
            world.save(f"vl_checklist/{file}", scene)
            right, wrong = foils(scene, rng)[part]
            path = file.partition("/")[2]
            rows.append([path, {"POS": [right.text()], "NEG": [wrong.text()]}])
        world.save_json(f"vl_checklist/data/{name}.json", rows)


def write_genai_bench(world: World, rng: np.random.Generator) -> None:
    """Prompts with a picture that fits, rated high, one that nearly fits, and one of something else."""
    prompts = {}
    for number in range(world.scenes):
        scenes, captions = _pair(world, rng, number)
        ratings = {"DALLE_3": [5, 5, 4], "SDXL_Base": [2, 3, 3], "SDXL_Turbo": [1, 1, 2]}
        for name, scene in zip(ratings, [*scenes, world.scene(rng)], strict=True):
            world.save(f"genai_bench/{name}/{number:05d}.jpeg", scene)
        prompts[f"{number:05d}"] = {"id": number, "prompt": captions[0], "models": ratings}
    world.save_json("genai_bench/genai_image.json", prompts)


def write_selfbench(world: World, rng: np.random.Generator) -> None:
    """Two models' pictures of prompts of two kinds, two of each."""
    for model in ("stable-diffusion-v1-5", "stable-diffusion-3-medium-diffusers"):
        for number in range(2 * LEAST):
            scene = world.scene(rng)
            line = coloured(scene) if number < LEAST else placed(scene)
            place = f"selfbench/outputs/9/{model}/{number:05d}"
            world.save_text(f"{place}/metadata.jsonl", f"{json.dumps(line)}\n")
            for sample in (scene, repainted(scene, scene.things, rng)):
                world.save(f"{place}/samples/{int(sample is not scene):05d}.png", sample)


WRITERS: tuple[Callable[[World, np.random.Generator], None], ...] = (
    write_sugarcrepe,
    write_whatsup,
    write_valse,
    write_cola,
    write_colorswap,
    write_eqben,
    write_bivlc,
    write_vismin,
    write_naturalbench,
    write_spec,
    write_vl_checklist,
    write_genai_bench,
    write_selfbench,
)
