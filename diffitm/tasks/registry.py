"""A task by its name: one of ours, an installed package's or the user's own."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from diffitm.core.errors import InputError
from diffitm.core.registry import find, load
from diffitm.tasks.base import Task
from diffitm.tasks.own_file import is_own_file, own_file

ENTRY_POINTS = "diffitm.tasks"
TASKS = {
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


def find_task(name: str) -> type[Task]:
    """A task's class: one of ours, an installed package's ('diffitm.tasks' entry point), or the
    user's own as 'package.module:Class' or 'folder/file.py:Class', or the file of one (mine.jsonl).

    Raises InputError if there is none, or it is not a task.
    """
    if is_own_file(name):
        return own_file(name)
    installed: dict[str, EntryPoint] = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name in TASKS or (name not in installed and ":" not in name):
        known: type[Task] = find(TASKS | dict.fromkeys(installed, ""), name, "task")
        return known
    try:
        found = installed[name].load() if name in installed else load(name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"task {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"task {name!r} is not a subclass of diffitm.tasks.base.Task")
    return found
