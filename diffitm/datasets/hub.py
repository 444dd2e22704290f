"""Data sets of the Hugging Face Hub, by its own client with the user's token."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffitm.core.errors import InputError
from diffitm.datasets import recipe
from diffitm.datasets.recipe import DatasetRecipe, Hub
from diffitm.datasets.status import Outcome
from diffitm.datasets.unpack import (
    STATE,
    UnsafeError,
    check_free,
    note_members,
    placed,
    target,
    unpack,
)


def fetch_hub(step: Hub, source: DatasetRecipe, root: Path, keep: bool) -> Outcome:
    """Files of the Hub, fetched by huggingface_hub with the user's token, moved to their places."""
    if not recipe.missing(source, root):
        return Outcome(step.repo, True, "there already")
    folder = root / STATE / "hub" / step.repo.replace("/", "__")
    try:
        members = _snapshot(step, folder, root, keep)
        note_members(step.repo, root, members)
    except (UnsafeError, OSError, InputError) as error:
        return Outcome(step.repo, False, _without_token(str(error)))
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(step.repo, True, f"{len(members):,} files fetched")


def _snapshot(step: Hub, folder: Path, root: Path, keep: bool) -> dict[str, int]:
    """The files placed, with their sizes in bytes. Raises InputError for what the Hub refuses."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{step.repo}"
    try:
        patterns = list(step.patterns)
        snapshot_download(step.repo, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
    except (GatedRepoError, RepositoryNotFoundError):
        raise InputError(
            f"accept its terms at {page}, make a token at https://huggingface.co/settings/tokens "
            "and set HF_TOKEN to it"
        ) from None
    except Exception as error:  # its own kinds, those of its HTTP library, OSError
        first = _without_token(str(error)).strip().partition("\n")[0]
        raise InputError(f"the Hub did not send it: {first or type(error).__name__}") from None
    members, ours = dict[str, int](), placed(step.repo, root)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to = target(path.relative_to(folder).as_posix(), step.files)
        if to is None:
            continue
        size = path.stat().st_size
        if to in step.archives:
            members |= unpack(path, root, step.rules, step.unpacked, ours)
            if not keep:
                continue
        else:
            members[to] = size
        check_free(root / to, size, ours.get(to))
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, root / to)
    if not members:
        raise InputError(f"{page} holds none of the files that are wanted")
    return members


def _without_token(text: str) -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text
