"""Files of DPT's adapter, and which models one can be of: cheap to import, and read before a model is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.loading import ModelSource, on_machine
from diffitm.models.lora import lora_file
from diffitm.models.parts import read_json
from diffitm.models.weight_files import sha256

NAME = "dpt_adapter.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # beside it, where both were trained
FAMILY = "StableDiffusionPipeline"
KEY = "dpt"  # of the file's metadata
HEADER = 8  # bytes that say how long the header is


@dataclass(frozen=True)
class AdapterShape:
    """Which map of the U-Net it reads (of `channels` channels), and how wide the text encoder's pooled
    output is; with `grounding` it finds boxes, too."""

    map: str
    channels: int
    clip_dim: int
    grounding: bool = False


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file: what the user typed, where it is, sha256 of its content, its shape, and sha256 of
    the LoRA beside it that it was trained with, if any."""

    name: str
    uri: str
    digest: str
    shape: AdapterShape
    lora_digest: str | None

    @property
    def lora(self) -> str | None:
        """The LoRA that belongs to it."""
        if self.lora_digest is None:
            return None
        return storage.join(storage.parent(self.uri), LORA)

    def read(self) -> dict[str, Tensor]:
        """The adapter's tensors. Raises InputError if the file is another by now."""
        data = storage.read_bytes(self.uri)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise InputError(f"{self.name!r} changed while the run was going on")
        return load(data)


def find_adapter(name: str, field: str) -> AdapterFile:
    """An adapter by its file or folder, or the URI of one; the LoRA that it was trained with lies beside it.

    Raises InputError that names `field` and says what is wrong.
    """
    uri = storage.absolute(name)
    if not uri.endswith(".safetensors"):
        uri = storage.join(uri, NAME)
    try:
        data = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{name!r}: there is no {uri}: give what finetune left", field) from None
    except OSError as error:
        raise InputError(f"{name!r}: {uri} cannot be read: {error}", field) from error
    try:
        load(data)
        length = int.from_bytes(data[:HEADER], "little")
        known = json.loads(json.loads(data[HEADER : HEADER + length])["__metadata__"][KEY])
        shape = AdapterShape(
            known["map"],
            int(known["channels"]),
            int(known["clip_dim"]),
            bool(known.get("grounding")),
        )
        lora_digest = known["lora"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        text = f"{name!r}: {uri} is no adapter of finetune --objective dpt: {error}"
        raise InputError(text, field) from error
    found = AdapterFile(name, uri, hashlib.sha256(data).hexdigest(), shape, lora_digest)
    if found.lora is not None:
        try:
            beside = sha256(lora_file(found.lora))
        except InputError as error:
            text = f"{name!r}: was trained with a LoRA, which is not beside it: {error.message}"
            raise InputError(text, field) from error
        if beside != lora_digest:
            text = f"{name!r}: {LORA} beside it is not the one that it was trained with"
            raise InputError(text, field)
    return found


def save_adapter(
    tensors: Mapping[str, Tensor], shape: AdapterShape, folder: str, tuned: bool
) -> None:
    """Write an adapter's file, `tuned` for one that belongs to the LoRA file in that folder."""
    lora = None
    if tuned:
        lora = hashlib.sha256(storage.read_bytes(storage.join(folder, LORA))).hexdigest()
    metadata = {"format": "pt", KEY: json.dumps({**vars(shape), "lora": lora})}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    storage.write_bytes(storage.join(folder, NAME), data)


def maps_of(unet: Mapping[str, Any]) -> dict[str, int]:
    """The maps of a U-Net of these settings (its config.json) by DPT's names, each with its channels: what
    its blocks give, `bottom` on the way down and `up` on the way up."""
    widths = [int(width) for width in unet["block_out_channels"]]
    found = {f"bottom{number}": width for number, width in enumerate(widths)}
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        found["mid"] = widths[-1]
    return found | {f"up{number}": width for number, width in enumerate(reversed(widths))}


def shape_of(unet: Mapping[str, Any], name: str, field: str) -> AdapterShape:
    """An adapter's for a map of a U-Net of these settings. Raises InputError for a map that it has not."""
    maps = maps_of(unet)
    if name not in maps:
        raise InputError(f"{name}: the maps of this U-Net are {', '.join(maps)}", field)
    return AdapterShape(name, maps[name], int(unet["cross_attention_dim"]))


def check_fits(shape: AdapterShape, unet: Mapping[str, Any], name: str, field: str) -> None:
    """Raises InputError if the adapter `name` is not for a U-Net of these settings."""
    try:
        wanted = shape_of(unet, shape.map, field)
    except InputError as error:
        raise InputError(f"{name!r}: is an adapter of {error.message}", field) from error
    if shape != replace(wanted, grounding=shape.grounding):
        raise InputError(
            f"{name!r}: is for a map {shape.map} of {shape.channels} channels and texts {shape.clip_dim} "
            f"wide; this model has {wanted.channels} and {wanted.clip_dim}",
            field,
        )


def check_adapter(adapter: AdapterFile, source: ModelSource, field: str) -> None:
    """Raises InputError if an adapter is not for a model, as far as the model's files are on this machine."""
    settings = unet_settings(source)
    if settings is not None:
        check_fits(adapter.shape, settings, adapter.name, field)


def unet_settings(source: ModelSource) -> dict[str, Any] | None:
    """The settings of a model's U-Net, None where its files are not on this machine.

    Raises InputError for a family that DPT does not fit.
    """
    if source.family != FAMILY:
        raise InputError(
            f"{source.name!r}: DPT is of Stable Diffusion 1.x and 2.x, whose texts it compares with; this is "
            f"a {source.family}",
            source.field,
        )
    location, revision = on_machine(source)
    return None if revision is not None else read_json(Path(location, "unet", "config.json"))
