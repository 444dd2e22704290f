"""From what a user types to a loaded diffusion model, and what identifies its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffitm.core import registry, storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.models.denoiser import Denoiser
from diffitm.models.embedded import EMBEDDED, folder_of
from diffitm.models.families import FAMILIES, Family, absent_parts, kind_of
from diffitm.models.hub_weights import (
    STEMS,
    Weights,
    check_variant,
    fetch,
    needed,
)
from diffitm.models.lora import digest_of, lora_file, merge_file
from diffitm.models.model_index import HUB_ID, INDEX, from_hub, index_of, read_index, snapshot_of
from diffitm.models.sides import Side, is_loaded
from diffitm.models.single_file import ENDINGS, SingleFile
from diffitm.models.weight_cache import on_disk

SETTINGS = ("config.json", "scheduler_config.json", "generation_config.json")
SIDES: dict[Side, str] = {
    "whole": "its weights",
    "texts": "the weights of its text encoders",
    "network": "the weights of its network and VAE",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a local folder, a URI, or a Hub id with its commit; `digest` names the weights
    of the `variant`, `field` is what the user gave it with."""

    name: str
    location: str
    revision: str | None
    family: str
    digest: str
    field: str = "model"
    variant: str | None = None
    weights: Weights | None = None  # of the Hub, once they are fetched
    prediction: str | None = None  # what the network predicts, where its folder says something else
    upcast: bool = False  # its VAE stays in float32, though not all of its family's do
    resolution: int | None = (
        None  # side of images in pixels, where another than its own was asked for
    )
    guidance: float | None = None  # what its network is told, where it takes one
    absent: tuple[str, ...] = ()  # optional parts of its family that it does without
    distilled: bool = False  # its model_index.json says so, though not all of its family are
    sizes: tuple[tuple[str, int], ...] = ()  # parameters of each part, once it was checked
    single_file: SingleFile | None = None  # that its folder is made of

    @property
    def told(self) -> dict[str, Any]:
        """What a store says of its scores: what its family does, and that it is distilled."""
        own = {"unconditional": False} if self.distilled else {}
        return {**FAMILIES[self.family].told, **own}

    @property
    def parts(self) -> tuple[str, ...]:
        """What of its folder is read."""
        return tuple(p for p in FAMILIES[self.family].parts if p not in self.absent)

    @property
    def has_text_encoders(self) -> bool:
        """Whether weights of their own read its texts."""
        return any(is_loaded(part, "texts") for part in self.parts)

    def memory(self, dtype: str, side: Side = "whole") -> int:
        """Bytes of the weights of a side of it in a dtype, 0 before it was checked."""
        wide = {"vae"} if self.upcast else set[str]()
        return sum(
            count * (DTYPES["fp32"] if part in wide else DTYPES[dtype]).itemsize
            for part, count in self.sizes
            if is_loaded(part, side)
        )

    def fetched(self) -> ModelSource:
        """The same with its weights on this machine, if it is one of the Hub. Raises as hub_weights.fetch."""
        if self.revision is None:
            return self
        parts = self.parts

        def choose(names: list[str]) -> list[str]:
            try:
                check_variant(names, parts, self.variant)
            except InputError as error:
                raise InputError(f"{self.name!r}: {error.message}", self.field) from error
            return [INDEX, *needed(names, parts, self.variant)]

        return replace(self, weights=fetch(self.name, self.revision, choose, self.field))


def resolve(
    name: str,
    field: str = "model",
    variant: str | None = None,
    single_file_config: str | None = None,
) -> ModelSource:
    """Find a diffusers model by name: one of EMBEDDED, a local folder, a URI of one, a Hub id, or a model in
    one file, a path or URI. Loads no weights; those behind a URI are fetched, and of one file a folder is
    made once, with the configs of `single_file_config` (SingleFile). `variant` is that of the weights that
    will be loaded.

    Raises InputError that names `field` and says what was looked for.
    """
    given, name = name, storage.without_query(name)
    folder = folder_of(name) if name in EMBEDDED else Path(name).expanduser()
    single = _single_file(given, single_file_config, field)
    if single is not None:
        folder = single.folder()
    elif "://" in given:
        folder = _copy(given, field, variant)
    if folder.is_dir():
        folder = snapshot_of(folder, name, field)
        index = folder / INDEX
        if not index.is_file():
            raise InputError(f"{name!r}: {_no_index(folder)}", field)
        settings = read_index(index, name, field)
        kind = kind_of(settings, name, field)
        family = FAMILIES[kind]
        absent = absent_parts(family, settings)
        missing = [p for p in family.parts if p not in absent and not (folder / p).is_dir()]
        if missing:
            raise InputError(f"{name!r}: the folder lacks {', '.join(missing)}", field)
        location = given if name in EMBEDDED or "://" in given else str(folder.absolute())
        digest = _digest(folder, family, settings, variant)
        return ModelSource(
            name, location, None, kind, digest, field, variant=variant, absent=absent,
            distilled=bool(settings.get("is_distilled")), single_file=single,
        )  # fmt: skip
    if folder.is_file():
        raise InputError(f"{name!r}: is a file, not a diffusers folder", field)
    if not HUB_ID.fullmatch(name):
        raise InputError(
            f"{name!r} is neither a folder nor a Hub id such as 'org/name', nor one of "
            f"{', '.join(EMBEDDED)}",
            field,
        )
    index = from_hub(name, INDEX, field)
    commit = index.parent.name
    settings = read_index(index, name, field)
    kind = kind_of(settings, name, field)
    absent = absent_parts(FAMILIES[kind], settings)
    return ModelSource(
        name, name, commit, kind, commit, field, variant=variant, absent=absent,
        distilled=bool(settings.get("is_distilled")),
    )  # fmt: skip


def load_denoiser(
    source: ModelSource,
    dtype: str = "fp32",
    device: str = "cpu",
    variant: str | None = None,
    lora: str | None = None,
    side: Side = "whole",
) -> Denoiser:
    """Load the model, or a side of it alone, and merge LoRA weights into what is loaded.

    Raises InputError for an unknown family or dtype, unreadable weights, LoRA keys that do not fit,
    a LoRA for a model without a U-Net, weights that are larger than what a GPU has free.
    """
    from diffitm.models.folder import Folder  # slow to import

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    _check_memory(source, dtype, device, side)
    build = registry.load(FAMILIES[source.family].denoiser)
    if dtype == "fp32":  # cuDNN would round convolutions to TF32
        torch.backends.cudnn.allow_tf32 = False
    folder, revision = on_machine(source)
    try:
        if revision is None:
            check_variant(files_of(Path(folder)), source.parts, variant)
        parts = Folder(folder, DTYPES[dtype], torch.device(device), revision, variant, side)
        denoiser: Denoiser = build(parts)
    except InputError as error:
        raise InputError(
            f"{source.name!r} cannot be loaded: {error.message}", source.field
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{source.name!r} cannot be loaded: {text}", source.field) from error
    if source.prediction is not None:
        denoiser.take_prediction(source.prediction)
    if source.resolution is not None:
        denoiser.take_resolution(source.resolution)
    if lora is not None:
        merge_file(denoiser, lora)
    return denoiser


def _check_memory(source: ModelSource, dtype: str, device: str, side: Side) -> None:
    if not device.startswith("cuda") or not source.sizes:
        return
    free, total = torch.cuda.mem_get_info(device)
    # What this process keeps of models that it no longer has is free for the next one.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if (wanted := source.memory(dtype, side)) > free:
        raise InputError(
            f"{source.name!r}: {SIDES[side]} are {gigabytes(wanted)} in {dtype}, of the GPU's "
            f"{gigabytes(total)} {gigabytes(free)} are free: --dtype fp16 or bf16, a smaller model, fewer "
            "actors on a GPU (--gpus-per-actor 1), or a GPU with more",
            source.field,
        )


def size_note(source: ModelSource, dtype: str) -> str:
    """The parameters of a checked source's parts and the memory of its weights, in words."""
    parts = ", ".join(f"{part} {count / 1e6:,.1f}" for part, count in source.sizes)
    total = sum(count for _, count in source.sizes)
    return f"{total / 1e6:,.1f} million parameters ({parts}), {gigabytes(source.memory(dtype))} in {dtype}"


def gigabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def files_of(folder: Path) -> list[str]:
    """The files of a local model and its parts, from its folder on."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def check_config_used(config: str | None, *sources: ModelSource) -> None:
    """Raises InputError for a single_file_config where no model is in one file."""
    if config is not None and not any(source.single_file for source in sources):
        raise InputError(f"{config}: no model is in one file", "single_file_config")


def _no_index(folder: Path) -> str:
    """What to say of a folder that is no model of diffusers."""
    below = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    single = sorted(path.name for path in folder.iterdir() if path.suffix in ENDINGS)
    text = "the folder has no model_index.json (diffusers layout)"
    if below:
        return f"{text}; its {below[0]} has one"
    if (folder / "open_clip_config.json").is_file():
        return f"{text}, but a CLIP's open_clip_config.json"
    if single:
        return f"{text}, but {single[0]}: give that file for a model in one file"
    return text


def _single_file(given: str, config: str | None, field: str) -> SingleFile | None:
    if not storage.name(given).endswith(ENDINGS):
        return None
    if (
        config is not None and Path(config).expanduser().is_dir()
    ):  # actors may run in another folder
        config = str(Path(config).expanduser().absolute())
    if "://" in given:
        return SingleFile(given, config, field) if storage.is_file(given) else None
    file = Path(given).expanduser()
    return SingleFile(str(file.absolute()), config, field) if file.is_file() else None


def on_machine(source: ModelSource) -> tuple[str, str | None]:
    """The local folder, or the Hub id and its commit, to load from."""
    if source.location in EMBEDDED:
        return str(folder_of(source.location)), None
    if source.single_file is not None:
        return str(source.single_file.folder()), None
    if source.weights is not None:
        return str(source.weights.on_machine()), None
    if "://" in source.location:
        return str(_copy(source.location, source.field, source.variant, source.digest)), None
    return source.location, source.revision


def _copy(uri: str, field: str, variant: str | None, digest: str | None = None) -> Path:
    """A local copy of what is loaded of a diffusers folder in an object store."""
    there = storage.sizes(uri, recursive=True)
    if INDEX not in there:
        raise InputError(
            f"{storage.without_query(uri)!r}: there is no {INDEX} (diffusers layout)", field
        )
    settings = index_of(
        storage.read_text(storage.join(uri, INDEX)), storage.without_query(uri), field
    )
    family = FAMILIES[kind_of(settings, storage.without_query(uri), field)]
    parts = [part for part in family.parts if part not in absent_parts(family, settings)]
    wanted = {name: there[name] for name in (INDEX, *needed(there, parts, variant))}
    copy, _ = on_disk(
        uri, wanted, lambda folder: _digest(folder, family, settings, variant), digest
    )
    return copy


def around_texts(source: ModelSource) -> str:
    """A fingerprint of what the installed diffusers puts around its texts; '' where that is nothing."""
    around = registry.load(FAMILIES[source.family].denoiser).around_texts()
    return fingerprint(around)[:12] if around else ""


def lora_digest(path: str) -> str:
    """sha256 of a LoRA file and of the adapter_config.json beside it, which may hold its scale."""
    return digest_of(lora_file(path))


def _digest(
    folder: Path, family: Family, index: Mapping[str, Any], variant: str | None = None
) -> str:
    """sha256 over the names and contents of the files that are loaded, and the index's settings."""
    total = hashlib.sha256()
    if family.settings:
        used = {key: index.get(key, absent) for key, absent in family.settings.items()}
        total.update(json.dumps(used, sort_keys=True).encode())
    parts = [part for part in family.parts if part not in absent_parts(family, index)]
    read = filter(_is_loaded, needed(files_of(folder), parts, variant))
    for name in sorted(read, key=Path):
        total.update(name.encode())
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _is_loaded(name: str) -> bool:
    """Whether a file is one that its part is loaded from, and no copy or note beside it. Of tokenizers all
    are, as their files have many names."""
    part, _, file = name.partition("/")
    return part.startswith("tokenizer") or file.startswith(STEMS) or file in SETTINGS
