"""CLIP through open_clip: the baseline that fills the same store with one cosine a pair."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable, suggest
from diffitm.core.outside import is_transient, patiently
from diffitm.models.hub_weights import Weights, fetch, needed
from diffitm.models.loading import SHAPES, from_hub
from diffitm.models.weight_cache import content_digest, on_disk

log = logging.getLogger("diffitm")
# What open_clip lets through for a name, a config or a file that it cannot use.
WEIGHTS = (".safetensors", ".bin", ".pth")
LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG = "open_clip_config.json"
POSITIONS = "positional_embedding"  # of an image tower
# What transformers' AutoTokenizer, which open_clip asks, reads of a folder.
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class ClipSource:
    """A model for open_clip: its name (or 'local-dir:' or 'hf-hub:' form), its pretrained tag or file."""

    name: str
    model: str
    pretrained: str | None
    digest: str
    quick_gelu: bool = False  # OpenAI's weights want it, and a model's name alone does not say so
    weights: Weights | None = None  # of the Hub, once they are fetched

    @property
    def folder(self) -> str | None:
        """The user's folder or URI that it was found in, if so."""
        return self.model.removeprefix(LOCAL) if self.model.startswith(LOCAL) else None

    def fetched(self, variant: str | None = None) -> ClipSource:
        """The same with its weights on this machine, if it is one of the Hub. Raises as hub_weights.fetch."""
        if self.model.startswith(HUB):
            repo, _, commit = self.digest.removeprefix(HUB).rpartition("@")
            weights = fetch(repo, commit, lambda names: needed(names, ("",)), "clip")
            return replace(self, weights=weights)
        if self.pretrained not in open_clip.list_pretrained_tags_by_model(self.model):
            return self
        try:
            config = open_clip.get_pretrained_cfg(self.model, self.pretrained)
            file = Path(patiently(lambda: open_clip.download_pretrained(config)))
        except (OSError, RuntimeError) as error:
            text = f"{self.name!r}: its weights cannot be fetched: {error}"
            if is_transient(error):
                raise Unavailable(f"clip {text}") from error
            raise InputError(text, "clip") from error
        return replace(self, weights=Weights(self.name, str(file.parent), (file.name,)))


def resolve_clip(name: str) -> ClipSource:
    """Find a CLIP by name: 'shapes', 'ViT-L-14:openai', 'ViT-L-14:checkpoint.pt', a folder with
    open_clip_config.json, or 'hf-hub:org/name'; file and folder may be URIs. Loads no weights; those
    behind a URI are fetched.

    Raises InputError with the nearest known model or tag.
    """
    given, name = name, storage.without_query(name)
    folder = SHAPES / "clip" if name == "shapes" else Path(name).expanduser()
    if _is_uri(given):
        folder = _copy(given)
    if folder.is_dir():
        # 'shapes' is found again on every machine; other folders are used where they are.
        place = given if _is_uri(given) else folder.absolute()
        where = "shapes" if name == "shapes" else f"{LOCAL}{place}"
        return ClipSource(name, where, None, _digest(folder, name))
    if name.startswith(HUB):
        config = from_hub(name.removeprefix(HUB), CONFIG, "clip")
        return ClipSource(name, name, None, f"{name}@{config.parent.name}")
    model, _, tag = name.partition(":")
    if model not in open_clip.list_models():
        raise InputError(
            f"{name!r}: unknown model{suggest(model, open_clip.list_models())}", "clip"
        )
    if "://" in tag:
        uri = given.partition(":")[2]
        return ClipSource(name, model, uri, f"{model}:{content_digest([_file_copy(uri)])}")
    if Path(tag).expanduser().is_file():
        file = Path(tag).expanduser().absolute()
        return ClipSource(name, model, str(file), f"{model}:{content_digest([file])}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise InputError(f"{name!r}: {tag!r} is no file and no tag{suggest(tag, tags)}", "clip")
    quick_gelu = bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    return ClipSource(name, model, tag, f"{model}:{tag}", quick_gelu)


def _is_uri(name: str) -> bool:
    """Whether it is one as a whole, not NAME:URI."""
    return re.match(r"[\w+.-]+://", name) is not None


def _digest(folder: Path, name: str) -> str:
    """sha256 of what of a local folder is loaded. Raises InputError if something is missing."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{name!r}: the folder has no {CONFIG}", "clip")
    weights = open_clip.factory._find_checkpoint_in_dir(folder)
    if weights is None:
        raise InputError(f"{name!r}: the folder has no weights ({', '.join(WEIGHTS)})", "clip")
    read = {CONFIG, Path(weights).name, *TOKENIZER_FILES}
    return content_digest(sorted(path for path in folder.iterdir() if path.name in read))


def _copy(uri: str, digest: str | None = None) -> Path:
    """A local copy of a CLIP's folder in an object store."""
    there = storage.sizes(uri)
    wanted = {n: s for n, s in there.items() if n in (CONFIG, *TOKENIZER_FILES)}
    wanted |= {n: s for n, s in there.items() if n.endswith(WEIGHTS)}
    return on_disk(uri, wanted, lambda folder: _digest(folder, storage.without_query(uri)), digest)[
        0
    ]


def _file_copy(uri: str, digest: str | None = None) -> Path:
    """A local copy of a weights file in an object store."""
    folder, name = storage.parent(uri), storage.name(uri)
    there = storage.sizes(folder)
    if name not in there:
        raise InputError(f": there is no file {storage.without_query(uri)}", "clip")
    listed = {name: there[name]}
    return on_disk(folder, listed, lambda copy: content_digest([copy / name]), digest)[0] / name


def on_machine(source: ClipSource) -> tuple[str, str | None]:
    """open_clip's name of the model on this machine, and its pretrained tag or file."""
    if source.weights is not None:
        folder = source.weights.on_machine()
        if source.model.startswith(HUB):
            return f"{LOCAL}{folder}", None
        return source.model, str(folder / source.weights.files[0])
    if source.model == "shapes":
        return f"{LOCAL}{SHAPES / 'clip'}", None
    if source.folder is not None and _is_uri(source.folder):
        return f"{LOCAL}{_copy(source.folder, source.digest)}", None
    if source.pretrained is not None and _is_uri(source.pretrained):
        digest = source.digest.removeprefix(f"{source.model}:")
        return source.model, str(_file_copy(source.pretrained, digest))
    return source.model, source.pretrained


class LoadedClip(NamedTuple):
    """open_clip's model in eval mode, its image transform and its tokenizer."""

    model: Any
    preprocess: Any
    tokenizer: Any


def load_clip(source: ClipSource, device: torch.device | str = "cpu") -> LoadedClip:
    """Load what the source names.

    Raises InputError if they cannot be loaded.
    """
    model, pretrained = on_machine(source)
    try:
        # Unlike create_model_and_transforms, this refuses to go on with random weights.
        loaded, preprocess = open_clip.create_model_from_pretrained(
            model,
            pretrained=pretrained,
            device=torch.device(device),
            force_quick_gelu=source.quick_gelu,
            **preprocessing(source),
        )
        _check_size(source.name, model, pretrained, loaded.visual)
        return LoadedClip(loaded.eval(), preprocess, open_clip.get_tokenizer(model))
    except _UNREADABLE as error:
        raise InputError(f"{source.name!r} cannot be loaded: {error}", "clip") from error


@functools.cache
def preprocessing(source: ClipSource) -> dict[str, Any]:
    """open_clip's arguments for a weights file, which says nothing of its images: what all published
    weights of the architecture have in common. Warns where they have not."""
    tags = open_clip.list_pretrained_tags_by_model(source.model)
    if source.pretrained is None or source.pretrained in tags:
        if source.weights is None or source.pretrained is None:
            return {}
        tags = [source.pretrained]  # whose file it is
    known = [open_clip.get_pretrained_cfg(source.model, tag) for tag in tags]
    found: dict[str, Any] = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        values = {cfg[key] for cfg in known}
        if len(values) == 1:
            (value,) = values
            found[f"image_{key}"] = list(value) if isinstance(value, tuple) else value
        elif values:
            text = (
                "clip %s: %s differs among the published weights of %s; open_clip's default is used"
            )
            log.warning(text, source.name, key, source.model)
    return found


def _check_size(name: str, model: str, file: str | None, tower: Any) -> None:
    """open_clip stretches the positions of weights for another image size, and says nothing."""
    if model.startswith(LOCAL):
        file = open_clip.factory._find_checkpoint_in_dir(Path(model.removeprefix(LOCAL)))
    if file is None or not Path(file).is_file():
        return
    there, wanted = _positions(str(file)), getattr(tower, POSITIONS, None)
    if there is None or wanted is None:
        return
    wanted = list(wanted.shape)
    if there != wanted:
        raise InputError(
            f"{name!r}: its weights have positions of {there}, its config, for images of "
            f"{tower.image_size} pixels, has {wanted}: they are for another image size",
            "clip",
        )


def _positions(file: str) -> list[int] | None:
    """Shape of the image tower's positions in a weights file, if they are there by this name."""
    key = f"visual.{POSITIONS}"
    if file.endswith((".npz", ".npy")):  # big_vision's, for towers of timm
        return None
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as weights:
            return weights.get_slice(key).get_shape() if key in set(weights.keys()) else None
    found = open_clip.factory.load_state_dict(file, weights_only=True).get(key)
    return None if found is None else list(found.shape)
