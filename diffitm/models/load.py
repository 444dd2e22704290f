"""From what a user types to a loaded diffusion model, and what identifies its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffitm import registry
from diffitm.errors import InputError
from diffitm.models.denoiser import Denoiser
from diffitm.models.lora import lora_file, merge_lora, read_lora

SHAPES = Path(__file__).resolve().parents[1] / "shapes" / "weights"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Source:
    """Where a model lies: a local folder, or a Hub id with its commit; `digest` names the weights."""

    name: str
    location: str
    revision: str | None
    family: str
    digest: str


def resolve(name: str) -> Source:
    """Find a diffusers model by name: 'shapes', a local folder or a Hub id. Loads no weights.

    Raises InputError that says what was looked for.
    """
    folder = SHAPES / "diffusion" if name == "shapes" else Path(name).expanduser()
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"--model {name!r}: the folder has no model_index.json (diffusers layout)"
            )
        missing = [part for part in _PARTS if not (folder / part).is_dir()]
        if missing:
            raise InputError(f"--model {name!r}: the folder lacks {', '.join(missing)}")
        location = "shapes" if name == "shapes" else str(folder.absolute())
        return Source(name, location, None, _family(index, name), _digest(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise InputError(f"--model {name!r} is neither a folder nor a Hub id such as 'org/name'")
    index = from_hub(name, "model_index.json", "--model")
    commit = index.parent.name
    return Source(name, name, commit, _family(index, name), commit)


def load_denoiser(
    source: Source,
    dtype: str = "fp32",
    device: str = "cpu",
    variant: str | None = None,
    lora: str | None = None,
) -> Denoiser:
    """Load the model and merge LoRA weights into its U-Net.

    Raises InputError for an unknown family or dtype, unreadable weights, LoRA keys that do not fit.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    build = registry.find(registry.DENOISERS, source.family, "kind of diffusion model")
    if dtype == "fp32":  # cuDNN would round convolutions to TF32
        torch.backends.cudnn.allow_tf32 = False
    folder = str(SHAPES / "diffusion") if source.location == "shapes" else source.location
    try:
        denoiser = build(folder, DTYPES[dtype], device, source.revision, variant)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--model {source.name!r} cannot be loaded: {error}") from error
    if lora is not None:
        tensors, scale = read_lora(lora)
        merge_lora(denoiser.unet, tensors, scale)
    return denoiser


def lora_digest(path: str) -> str:
    """sha256 of a LoRA file and of the adapter_config.json beside it, which may hold its scale."""
    file = lora_file(path)
    beside = file.parent / "adapter_config.json"
    total = hashlib.sha256(file.read_bytes())
    if beside.is_file():
        total.update(beside.read_bytes())
    return total.hexdigest()


def _family(index: Path, name: str) -> str:
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--model {name!r}: model_index.json names no _class_name") from error


def _digest(folder: Path) -> str:
    """sha256 over the names and contents of the parts that scoring uses."""
    total = hashlib.sha256()
    for path in sorted(p for part in _PARTS for p in (folder / part).rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def content_digest(paths: Sequence[Path]) -> str:
    """sha256 over the contents of files."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def from_hub(name: str, file: str, option: str) -> Path:
    """A file of a Hub repository, whose parent folder is named by the commit.

    Raises InputError with what to do about it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, file))
    except GatedRepoError as error:
        raise InputError(
            f"{option} {name!r} is gated: accept its terms and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{option} {name!r}: there is no such model on the Hub") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{option} {name!r}: no such folder, and the Hub gave none: {error}"
        ) from error
