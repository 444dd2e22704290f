"""Models in one file, as trainers and exchanges give them: each machine converts one once, by diffusers."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.models.families import kind_of
from diffitm.models.hub_weights import fetch
from diffitm.models.model_index import HUB_ID, INDEX, from_hub, read_index, snapshot_of
from diffitm.models.weight_cache import alone, cache_folder, content_digest, on_disk
from diffitm.models.weight_files import WeightsError, read_weights, readable, tensors_of

ENDINGS = (".safetensors", ".ckpt")
NETWORK = "model.diffusion_model."  # how names of the network's weights begin
CONFIGS = (".json", ".txt", ".model")  # the ends of what a folder has beside weights
OPTION = "single_file_config"
log = logging.getLogger("diffitm")


@dataclass(frozen=True)
class SingleFile:
    """A model in one file, a path or URI, and the diffusers folder or Hub id whose configs and tokenizers it
    has; where none is given, diffusers tells a Hub id by the weights."""

    location: str
    config: str | None
    field: str = "model"

    def folder(self) -> Path:
        """The diffusers folder of it on this machine, made where the cache of models has none of a file of
        this path, size and time.

        Raises InputError for what is no whole model, and for configs that are not there or do not fit.
        """
        file = self._on_disk()
        configs = _configs(self.config) if self.config else None
        said = _said(configs) if configs else []
        known = [str(file), file.stat().st_size, file.stat().st_mtime_ns, content_digest(said)]
        kept = cache_folder() / f"single-file-{fingerprint(known)[:32]}"
        with alone(cache_folder(), kept.name):
            if not kept.is_dir():
                with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".part-") as part:
                    self._convert(file, configs, Path(part, "copy"))
                    Path(part, "copy").rename(kept)
        return kept

    def _on_disk(self) -> Path:
        if "://" not in self.location:
            return Path(self.location)
        above, name = storage.parent(self.location), storage.name(self.location)
        listed = storage.sizes(above)
        if name not in listed:
            raise InputError(f"{self._name!r}: there is no such file", self.field)
        copy, _ = on_disk(
            above, {name: listed[name]}, lambda folder: content_digest([folder / name])
        )
        return copy / name

    @property
    def _name(self) -> str:
        return storage.without_query(self.location)

    def _convert(self, file: Path, configs: Path | None, to: Path) -> None:
        import diffusers  # slow to import
        from diffusers.loaders.single_file_utils import (
            SingleFileComponentError,
            fetch_diffusers_config,
        )

        try:
            tensors = tensors_of(read_weights(file, "meta"), file)
        except WeightsError as error:
            raise InputError(f"{self._name!r}: {error}", self.field) from error
        if not any(name.startswith(NETWORK) for name in tensors):
            raise InputError(
                f"{self._name!r} holds no whole diffusion model: none of its tensors, such as "
                f"{next(iter(tensors))!r}, is called {NETWORK}..; --lora takes a LoRA, --clip a CLIP",
                self.field,
            )
        whose = self.config or str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
        configs = configs or _configs(whose)
        settings = read_index(configs / INDEX, whose, OPTION)
        kind_of(settings, whose, OPTION)
        text = "%s: made a folder of diffusers once, with the configs of %s, in %s"
        log.info(text, self._name, whose, cache_folder())
        try:
            with readable():
                pipeline = getattr(diffusers, settings["_class_name"]).from_single_file(
                    str(file), config=str(configs)
                )
            pipeline.save_pretrained(to)
        except (*_UNFIT, SingleFileComponentError) as error:
            why = " ".join(str(error).split())
            raise InputError(
                f"{self._name!r} does not go with the configs of {whose!r} "
                f"({type(error).__name__}: {why}): give a diffusers folder or Hub id of its kind",
                OPTION,
            ) from error
        for tokenizer in configs.glob(
            "tokenizer*"
        ):  # which are saved in another form than they had
            shutil.rmtree(to / tokenizer.name, ignore_errors=True)
            shutil.copytree(tokenizer, to / tokenizer.name)


# What diffusers raises where names or shapes of weights are not those of a config.
_UNFIT = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError,
    NotImplementedError, SafetensorError,
)  # fmt: skip


def _configs(name: str) -> Path:
    """The folder of what a model has beside its weights."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = snapshot_of(folder, name, OPTION)
        if not (folder / INDEX).is_file():
            raise InputError(f"{name!r}: the folder has no {INDEX} (diffusers layout)", OPTION)
        return folder
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name!r} is neither a folder nor a Hub id such as 'org/name'", OPTION)
    commit = from_hub(name, INDEX, OPTION).parent.name
    return Path(fetch(name, commit, _choose, OPTION).on_machine())


def _said(configs: Path) -> list[Path]:
    return sorted(filter(_is_config, [*configs.glob("*"), *configs.glob("*/*")]))


def _choose(names: Iterable[str]) -> list[str]:
    return [name for name in names if _is_config(Path(name))]


def _is_config(path: Path) -> bool:
    return path.suffix in CONFIGS and not path.name.endswith(".index.json")
