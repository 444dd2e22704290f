"""A task by its name: one of ours, an installed package's or the user's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from diffitm.core.errors import InputError
from diffitm.core.registry import find, load
from diffitm.tasks.base import Task
from diffitm.tasks.own_file import is_own_file, own_file

ENTRY_POINTS = "diffitm.tasks"
GDBENCH = {
    "winoground": "diffitm.tasks.winoground:Winoground",
    "flickr30k": "diffitm.tasks.flickr30k:Flickr30kImage",
    "flickr30k_text": "diffitm.tasks.flickr30k:Flickr30kText",
    "flickr30k_variance": "diffitm.tasks.flickr30k:Flickr30kVariance",
    "imagecode": "diffitm.tasks.imagecode:ImageCoDe",
    "imagecode_video": "diffitm.tasks.imagecode:ImageCoDeVideo",
    "svo_subj": "diffitm.tasks.svo:SvoSubject",
    "svo_verb": "diffitm.tasks.svo:SvoVerb",
    "svo_obj": "diffitm.tasks.svo:SvoObject",
    "clevr": "diffitm.tasks.clevr:Clevr",
    "pets": "diffitm.tasks.pets:Pets",
    "vg_relation": "diffitm.tasks.aro:VgRelation",
    "vg_attribution": "diffitm.tasks.aro:VgAttribution",
    "coco_order": "diffitm.tasks.order:CocoOrder",
    "flickr30k_order": "diffitm.tasks.order:FlickrOrder",
    "mmvp_vlm": "diffitm.tasks.mmvp_vlm:MmvpVlm",
    "coco_neg_text": "diffitm.tasks.coco_neg:CocoNegText",
    "coco_neg_image": "diffitm.tasks.coco_neg:CocoNegImage",
    "mmbias": "diffitm.tasks.mmbias:MmBias",
}
SETS = {
    "sugarcrepe": "diffitm.tasks.sugarcrepe:SugarCrepe",
    "whatsup_a": "diffitm.tasks.whatsup:WhatsUpA",
    "whatsup_b": "diffitm.tasks.whatsup:WhatsUpB",
    "coco_spatial_one": "diffitm.tasks.whatsup:CocoOne",
    "coco_spatial_two": "diffitm.tasks.whatsup:CocoTwo",
    "gqa_spatial_one": "diffitm.tasks.whatsup:GqaOne",
    "gqa_spatial_two": "diffitm.tasks.whatsup:GqaTwo",
    "sugarcrepe_pp": "diffitm.tasks.sugarcrepe_pp:SugarCrepePp",
    "valse": "diffitm.tasks.valse:Valse",
    "cola": "diffitm.tasks.cola:Cola",
    "colorswap": "diffitm.tasks.colorswap:ColorSwap",
    "eqben_mini": "diffitm.tasks.eqben:EqBenMini",
    "eqben": "diffitm.tasks.eqben:EqBen",
    "bivlc": "diffitm.tasks.bivlc:BiVlc",
    "naturalbench": "diffitm.tasks.naturalbench:NaturalBench",
    "vismin": "diffitm.tasks.vismin:VisMin",
    "spec_i2t": "diffitm.tasks.spec:SpecText",
    "spec_t2i": "diffitm.tasks.spec:SpecImage",
    "vl_checklist": "diffitm.tasks.vl_checklist:VlChecklist",
    "genai_bench": "diffitm.tasks.genai_bench:GenAiBench",
    "selfbench": "diffitm.tasks.selfbench:SelfBench",
}
TASKS = GDBENCH | SETS
# Names of several tasks at once.
SUITES = {
    "gdbench": tuple(GDBENCH),
    "composition": (
        *("winoground", "vg_relation", "vg_attribution", "coco_order", "flickr30k_order"),
        *(name for name in SETS if name not in ("eqben", "genai_bench", "selfbench")),
    ),
    "all": tuple(TASKS),
}


def named(names: Iterable[str]) -> list[str]:
    """Tasks of these names, each once; the name of a suite stands for its tasks."""
    found = (SUITES.get(name, (name,)) for name in names)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def find_task(name: str) -> type[Task]:
    """A task's class: one of ours, an installed package's ('diffitm.tasks' entry point), or the
    user's own as 'package.module:Class' or 'folder/file.py:Class', or the file of one (mine.jsonl).

    Raises InputError if there is none, or it is not a task.
    """
    if is_own_file(name):
        found = own_file(name)
        if found.name in TASKS:
            raise InputError(f"task {name}: {found.name} is a task of ours; rename the file")
        return found
    installed: dict[str, EntryPoint] = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name in TASKS or (name not in installed and ":" not in name):
        known: type[Task] = find(TASKS | dict.fromkeys(installed, ""), name, "task")
        return known
    try:
        made = installed[name].load() if name in installed else load(name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"task {name!r} cannot be imported: {error}") from error
    if not (isinstance(made, type) and issubclass(made, Task)):
        raise InputError(f"task {name!r} is not a subclass of diffitm.tasks.base.Task")
    return made
