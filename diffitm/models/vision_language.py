"""Models of transformers that read an image with a text, with their processors, by folder or Hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffitm.core.errors import InputError
from diffitm.models.model_index import from_hub
from diffitm.models.weight_cache import content_digest

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def find(name: str) -> tuple[str, str | None, str]:
    """Where a model lies, its commit on the Hub if it is there, and what identifies its content.

    Raises InputError if it is neither a folder in transformers' layout nor a Hub id.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            text = f"{name!r}: the folder has no config.json (transformers layout)"
            raise InputError(text, "scorer")
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return str(folder.absolute()), None, content_digest(files)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        text = f"{name!r} is neither a folder nor a Hub id such as 'org/name'"
        raise InputError(text, "scorer")
    commit = from_hub(name, "config.json", "scorer").parent.name
    return name, commit, commit


def load(name: str, kinds: dict[str, Any], device: str) -> tuple[Any, Any]:
    """The model, in eval mode, and its processor. `kinds` are classes by the config's model_type; '*' is
    for any other.

    Raises InputError for another kind of model, and for weights that cannot be loaded or are not whole.
    """
    from transformers import AutoConfig, AutoProcessor

    location, revision, _ = find(name)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        config = AutoConfig.from_pretrained(location, **where)
        kind = kinds.get(config.model_type, kinds.get("*"))
        if kind is None:
            text = f"{name!r}: a {config.model_type} model is none of {', '.join(kinds)}"
            raise InputError(text, "scorer")
        processor = AutoProcessor.from_pretrained(location, **where)
        model, told = kind.from_pretrained(
            location, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
    except _UNREADABLE as error:
        raise InputError(f"{name!r} cannot be loaded: {error}", "scorer") from error
    lost = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if lost:
        text = f"{name!r}: its weights lack {len(lost)}, such as {lost[0]}"
        raise InputError(text, "scorer")
    return model.eval().to(device), processor
