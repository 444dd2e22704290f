"""What a diffusers folder says of itself: its model_index.json, local or of the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffitm.core.errors import InputError
from diffitm.models.hub_weights import go_offline_if_away
from diffitm.models.weight_files import POINTER

INDEX = "model_index.json"
HUB_ID = re.compile(r"(?![./~])[\w.-]+/[\w.-]+")


def snapshot_of(folder: Path, name: str, field: str) -> Path:
    """The newest files in a folder of the Hub's cache (models--org--name); another folder as it is.

    Raises InputError where the cache has no whole commit.
    """
    commits = folder / "snapshots"
    if (folder / INDEX).exists() or not commits.is_dir():
        return folder
    main = folder / "refs" / "main"
    there = sorted(path.name for path in commits.iterdir() if path.is_dir())
    if main.is_file() and main.read_text().strip() in there:
        return commits / main.read_text().strip()
    if len(there) == 1:
        return commits / there[0]
    raise InputError(
        f"{name!r}: is a folder of the Hub's cache with {len(there)} commits, none of which is its main: "
        f"give {commits}/COMMIT",
        field,
    )


def read_index(index: Path, name: str, field: str) -> dict[str, Any]:
    """What a model_index.json says of the model `name`. Raises InputError where it names no class."""
    try:
        return index_of(index.read_text(encoding="utf-8-sig"), name, field)
    except UnicodeDecodeError as error:
        raise InputError(f"{name!r}: {INDEX} is not in UTF-8: {error}", field) from error


def index_of(text: str, name: str, field: str) -> dict[str, Any]:
    """The same of its text."""
    try:
        settings: dict[str, Any] = json.loads(text)
        settings["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        pointer = ", it is a pointer of Git LFS" if text.startswith(POINTER.decode()) else ""
        broken = ": it is no whole JSON" if isinstance(error, ValueError) and not pointer else ""
        raise InputError(
            f"{name!r}: model_index.json names no _class_name{pointer}{broken}", field
        ) from error
    return settings


def from_hub(name: str, file: str, field: str) -> Path:
    """A file of a Hub repository, whose parent folder is named by the commit.

    Raises InputError with what to do about it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    go_offline_if_away()
    try:
        return Path(hf_hub_download(name, file))
    except GatedRepoError as error:
        raise InputError(f"{name!r} is gated: accept its terms and set HF_TOKEN", field) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{name!r}: there is no such model on the Hub", field) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{name!r}: no such folder, and the Hub gave none: {error}", field
        ) from error
