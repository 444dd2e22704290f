"""From what a user types to a loaded diffusion model, and what identifies its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffitm.core import registry, storage
from diffitm.core.errors import InputError, suggest
from diffitm.models.denoiser import Denoiser
from diffitm.models.hub_weights import Weights, fetch, go_offline_if_away, needed
from diffitm.models.lora import (
    digest_of,
    lora_file,
    lora_unet,
    match_lora,
    merge_lora,
    read_lora,
    unpinned,
)
from diffitm.models.weight_cache import on_disk

SHAPES = Path(__file__).resolve().parents[1] / "shapes" / "weights"
INDEX = "model_index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Family:
    """Where a family's Denoiser is, and what of a folder its scores depend on: parts, and settings of
    model_index.json with what they are if absent."""

    denoiser: str
    parts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


_UNET = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# The pipeline class that a diffusers folder names in model_index.json -> what runs it.
FAMILIES = {
    "StableDiffusionPipeline": Family("diffitm.models.stable_diffusion:StableDiffusion", _UNET),
    "StableDiffusionXLPipeline": Family(
        "diffitm.models.sdxl:StableDiffusionXL",
        (*_UNET, "text_encoder_2", "tokenizer_2"),
        {"force_zeros_for_empty_prompt": True},
    ),
    "DiTPipeline": Family(
        "diffitm.models.dit:Dit", ("transformer", "vae", "scheduler"), {"id2label": None}
    ),
}


def family_of(index: Mapping[str, Any], name: str, field: str) -> Family:
    """The family that a model_index.json names. Raises InputError for one that is not known here."""
    kind = str(index["_class_name"])
    if kind not in FAMILIES:
        raise InputError(
            f"{name!r}: unknown kind of diffusion model {kind!r}{suggest(kind, FAMILIES)}", field
        )
    return FAMILIES[kind]


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a local folder, a URI, or a Hub id with its commit; `digest` names the weights,
    `field` is what the user gave it with."""

    name: str
    location: str
    revision: str | None
    family: str
    digest: str
    field: str = "model"
    weights: Weights | None = None  # of the Hub, once they are fetched

    def fetched(self, variant: str | None = None) -> ModelSource:
        """The same with its weights on this machine, if it is one of the Hub. Raises as hub_weights.fetch."""
        if self.revision is None:
            return self
        parts = FAMILIES[self.family].parts

        def choose(names: list[str]) -> list[str]:
            return [INDEX, *needed(names, parts, variant)]

        return replace(self, weights=fetch(self.name, self.revision, choose, self.field))


def resolve(name: str, field: str = "model") -> ModelSource:
    """Find a diffusers model by name: 'shapes', a local folder, a URI of one or a Hub id. Loads no
    weights; those behind a URI are fetched.

    Raises InputError that names `field` and says what was looked for.
    """
    given, name = name, storage.without_query(name)
    folder = SHAPES / "diffusion" if name == "shapes" else Path(name).expanduser()
    if "://" in given:
        folder = _copy(given, field)
    if folder.is_dir():
        index = folder / INDEX
        if not index.is_file():
            raise InputError(
                f"{name!r}: the folder has no model_index.json (diffusers layout)", field
            )
        settings = _read_index(index, name, field)
        family = family_of(settings, name, field)
        missing = [part for part in family.parts if not (folder / part).is_dir()]
        if missing:
            raise InputError(f"{name!r}: the folder lacks {', '.join(missing)}", field)
        location = given if name == "shapes" or "://" in given else str(folder.absolute())
        digest = _digest(folder, family, settings)
        return ModelSource(name, location, None, str(settings["_class_name"]), digest, field)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise InputError(
            f"{name!r} is neither a folder nor a Hub id such as 'org/name', nor 'shapes'", field
        )
    index = from_hub(name, INDEX, field)
    commit = index.parent.name
    settings = _read_index(index, name, field)
    family_of(settings, name, field)
    return ModelSource(name, name, commit, str(settings["_class_name"]), commit, field)


def load_denoiser(
    source: ModelSource,
    dtype: str = "fp32",
    device: str = "cpu",
    variant: str | None = None,
    lora: str | None = None,
) -> Denoiser:
    """Load the model and merge LoRA weights into its U-Net.

    Raises InputError for an unknown family or dtype, unreadable weights, LoRA keys that do not fit,
    a LoRA for a model without a U-Net.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    build = registry.load(FAMILIES[source.family].denoiser)
    if dtype == "fp32":  # cuDNN would round convolutions to TF32
        torch.backends.cudnn.allow_tf32 = False
    folder, revision = _on_machine(source)
    try:
        denoiser = build(folder, DTYPES[dtype], device, revision, variant)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source.name!r} cannot be loaded: {error}", source.field) from error
    if lora is not None:
        unet = lora_unet(denoiser)
        tensors, scale = read_lora(lora)
        merge_lora(unet, tensors, scale)
    return denoiser


def check_loadable(source: ModelSource, loras: Sequence[str]) -> None:
    """What can be told of a model without its weights in memory: whether their files are whole, and
    whether LoRA files fit its U-Net.

    Raises InputError that names the file.
    """
    folder = Path(_on_machine(source)[0])
    for part in FAMILIES[source.family].parts:
        for file in sorted((folder / part).glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    continue
            except (OSError, SafetensorError) as error:
                text = f"{source.name!r}: {file} is no whole safetensors file: {error}"
                raise InputError(text, source.field) from error
    if loras and (folder / "unet").is_dir():
        from diffusers import UNet2DConditionModel

        try:
            config = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(config)
        except (OSError, ValueError) as error:
            raise InputError(f"{source.name!r}: its U-Net: {error}", source.field) from error
        for lora in loras:
            try:
                match_lora(unet, read_lora(lora)[0])
            except InputError as error:
                raise InputError(f"{unpinned(lora)}: {error.message}", "lora") from error


def _on_machine(source: ModelSource) -> tuple[str, str | None]:
    """The local folder, or the Hub id and its commit, to load from."""
    if source.location == "shapes":
        return str(SHAPES / "diffusion"), None
    if source.weights is not None:
        return str(source.weights.on_machine()), None
    if "://" in source.location:
        return str(_copy(source.location, source.field, source.digest)), None
    return source.location, source.revision


def _copy(uri: str, field: str, digest: str | None = None) -> Path:
    """A local copy of the parts of a diffusers folder in an object store."""
    there = storage.sizes(uri, recursive=True)
    if INDEX not in there:
        raise InputError(
            f"{storage.without_query(uri)!r}: there is no {INDEX} (diffusers layout)", field
        )
    settings = _index_of(
        storage.read_text(storage.join(uri, INDEX)), storage.without_query(uri), field
    )
    family = family_of(settings, storage.without_query(uri), field)
    parts = tuple(f"{part}/" for part in family.parts)
    wanted = {name: state for name, state in there.items() if name.startswith((INDEX, *parts))}
    return on_disk(uri, wanted, lambda folder: _digest(folder, family, settings), digest)[0]


def lora_digest(path: str) -> str:
    """sha256 of a LoRA file and of the adapter_config.json beside it, which may hold its scale."""
    return digest_of(lora_file(path))


def _read_index(index: Path, name: str, field: str) -> dict[str, Any]:
    return _index_of(index.read_text(), name, field)


def _index_of(text: str, name: str, field: str) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(text)
        settings["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name!r}: model_index.json names no _class_name", field) from error
    return settings


def _digest(folder: Path, family: Family, index: Mapping[str, Any]) -> str:
    """sha256 over the names and contents of the parts that scoring uses, and the index's settings."""
    total = hashlib.sha256()
    if family.settings:
        used = {key: index.get(key, absent) for key, absent in family.settings.items()}
        total.update(json.dumps(used, sort_keys=True).encode())
    files = (p for part in family.parts for p in (folder / part).rglob("*") if p.is_file())
    for path in sorted(files):
        total.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


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
