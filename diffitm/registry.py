"""Names to objects, imported only when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from diffitm.errors import InputError, suggest

TASKS = {
    "winoground": "diffitm.tasks.winoground:Winoground",
    "clevr": "diffitm.tasks.clevr:Clevr",
    "flickr30k": "diffitm.tasks.flickr30k:Flickr30kImage",
    "flickr30k_text": "diffitm.tasks.flickr30k:Flickr30kText",
}
# The pipeline class that a diffusers folder names in model_index.json -> the Denoiser that runs it.
DENOISERS = {
    "StableDiffusionPipeline": "diffitm.models.stable_diffusion:StableDiffusion",
}


def find(table: dict[str, str], name: str, what: str) -> Any:
    """The object that `name` stands for.

    Raises InputError, with the nearest known name, if there is none.
    """
    if name not in table:
        raise InputError(f"unknown {what} {name!r}{suggest(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
