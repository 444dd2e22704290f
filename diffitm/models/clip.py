"""CLIP through open_clip: the baseline that fills the same store with one cosine a pair."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable, suggest
from diffitm.core.outside import is_transient, patiently
from diffitm.models.clip_check import architectures_of, check_weights
from diffitm.models.embedded import SHAPES
from diffitm.models.hub_weights import Weights, fetch, go_offline_if_away, needed
from diffitm.models.model_index import from_hub
from diffitm.models.parts import read_json
from diffitm.models.weight_cache import content_digest, on_disk
from diffitm.models.weight_files import (
    WeightsError,
    is_torchscript,
    read_shapes,
    readable,
    sha256,
)

log = logging.getLogger("diffitm")
# What open_clip lets through for a name, a config or a file that it cannot use.
WEIGHTS = (".safetensors", ".bin", ".pth")
# In the order in which open_clip takes them of a folder.
OWN_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
LOCAL, HUB = "local-dir:", "hf-hub:"
OPENAI_NOTES = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
)  # beside its weights
CONFIG = "open_clip_config.json"
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
    quick_gelu: bool = False  # what the weights want, and the model's name alone does not say
    weights: Weights | None = None  # of the Hub, once they are fetched

    @property
    def folder(self) -> str | None:
        """The user's folder or URI that it was found in, if so."""
        return self.model.removeprefix(LOCAL) if self.model.startswith(LOCAL) else None

    @property
    def is_tagged(self) -> bool:
        """Whether its weights are published ones, by their tag."""
        return self.pretrained in open_clip.list_pretrained_tags_by_model(self.model)

    def fetched(self) -> ClipSource:
        """The same with its weights on this machine, if it is one of the Hub. Raises as hub_weights.fetch."""
        if self.model.startswith(HUB):
            repo, _, commit = self.digest.removeprefix(HUB).rpartition("@")
            weights = fetch(repo, commit, _files_read, "clip")
            return replace(self, weights=weights)
        if not self.is_tagged:
            return self
        go_offline_if_away()
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
        raise InputError(f"{name!r}: {_no_model(name, model)}", "clip")
    file = _weights_file(given.partition(":")[2])
    if file is not None:
        where = given.partition(":")[2] if "://" in tag else str(file)
        digest = f"{model}:{content_digest([file])}"
        return ClipSource(name, model, where, digest, _wants_quick_gelu(name, model, file))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        if not tags:
            raise InputError(f"{name!r}: there is no file {tag!r}, and {model} has no tags", "clip")
        raise InputError(f"{name!r}: {tag!r} is no file and no tag{suggest(tag, tags)}", "clip")
    return ClipSource(name, model, tag, f"{model}:{tag}", _has_quick_gelu(model, tag))


def _weights_file(given: str) -> Path | None:
    """The local file that stands after NAME:, that of a URI fetched; None if it is none."""
    if "://" in given:
        return _file_copy(given)
    file = Path(given).expanduser().absolute()
    return file if given and file.is_file() else None


def _no_model(name: str, model: str) -> str:
    """What to say of a name that open_clip does not have."""
    file = _local_file(name)
    if file is None:
        known = open_clip.list_models()
        plain = model.lower().replace("/", "-")
        same = next((other for other in known if other.lower() == plain), None)
        if same is not None:  # the nearest by letters would be another
            return f"unknown model; did you mean {same!r}?"
        return f"unknown model{suggest(model, known)}"
    text = "is a weights file without the name of its architecture: give NAME:FILE"
    try:
        fitting = architectures_of(read_shapes(file))
    except WeightsError as error:
        return f"{text}. But {error}"
    shapes = f" Its shapes are those of {' or '.join(fitting)}." if fitting else ""
    return f"{text}, such as {(fitting or ['ViT-L-14'])[0]}:{name}.{shapes}"


def _local_file(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_file() else None


def _has_quick_gelu(model: str, tag: str) -> bool:
    return bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))


def _wants_quick_gelu(name: str, model: str, file: Path) -> bool:
    """Whether a weights file is run with QuickGELU though its architecture's config has GELU. A file does
    not say; the published weights of the architecture do, where they agree, and OpenAI's own file."""
    if open_clip.get_model_config(model).get("quick_gelu"):
        return False  # by its own config, as NAME-quickgelu
    if _openai_tag(file) is not None:
        return True
    tags = open_clip.list_pretrained_tags_by_model(model)
    kinds = {_has_quick_gelu(model, tag) for tag in tags}
    if kinds == {True}:
        text = (
            "clip %s: a weights file does not say its activation; QuickGELU is taken, as all published "
            "weights of %s have"
        )
        log.info(text, name, model)
        return True
    if kinds == {True, False}:
        quick = [tag for tag in tags if _has_quick_gelu(model, tag)]
        text = (
            "clip %s: a weights file does not say its activation, and the published weights of %s differ "
            "(%s have QuickGELU): GELU is taken. If these are tuned from one of those, give %s-quickgelu:FILE"
        )
        log.warning(text, name, model, ", ".join(quick), model)
    return False


def _openai_tag(file: Path) -> str | None:
    """The model of OpenAI's that a file is, as published: a TorchScript archive that is known by its
    sha256, which stands in its address."""
    if not is_torchscript(file):
        return None
    digest = sha256(file)
    for model in open_clip.list_models():
        config = open_clip.get_pretrained_cfg(model, "openai") or {}
        if digest in config.get("url", ""):
            return model
    return None


def _files_read(names: list[str]) -> list[str]:
    """What open_clip reads of a repository: its settings, and its own weights before transformers'."""
    chosen = needed(names, ("",))
    own = next((name for name in OWN_WEIGHTS if name in names), None)
    if own is None:
        return chosen
    return [own, *(n for n in chosen if not any(ending in n for ending in WEIGHTS))]


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
    _tell_preprocessing(folder, name)
    read = {CONFIG, Path(weights).name, *TOKENIZER_FILES}
    return content_digest(sorted(path for path in folder.iterdir() if path.name in read))


def _tell_preprocessing(folder: Path, name: str) -> None:
    """Log what a folder's config does not say of its images. Raises InputError where it is no config."""
    try:
        config = read_json(folder / CONFIG)
        given = {**(config.get("preprocess_cfg") or {})}
        config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    except (OSError, KeyError, TypeError) as error:
        text = error if isinstance(error, OSError) else f"{CONFIG} has no model_cfg of both towers"
        raise InputError(f"{name!r}: {text}", "clip") from error
    values = asdict(PreprocessCfg())
    lacking = [key for key in ("mean", "std") if key not in given]
    if lacking:
        taken = ", ".join(f"{key} {values[key]}" for key in lacking)
        log.warning("clip %s: its %s does not say all, so there is taken: %s", name, CONFIG, taken)


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
    check_clip(source)
    model, pretrained = on_machine(source)
    go_offline_if_asked(model)
    try:
        with tempfile.TemporaryDirectory(prefix="diffitm-") as folder, readable():
            # Unlike create_model_and_transforms, this refuses to go on with random weights.
            loaded, preprocess = open_clip.create_model_from_pretrained(
                model,
                pretrained=_without_program(pretrained, Path(folder)),
                device=torch.device(device),
                force_quick_gelu=source.quick_gelu,
                **preprocessing(source),
            )
        for key, parameter in loaded.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise InputError(
                    f"{source.name!r}: {key} holds NaN or infinite values: a training that diverged?",
                    "clip",
                )
        return LoadedClip(loaded.eval(), preprocess, open_clip.get_tokenizer(model))
    except _UNREADABLE as error:
        text = " ".join(str(error).split())
        raise InputError(f"{source.name!r} cannot be loaded: {text}", "clip") from error


def check_clip(source: ClipSource) -> None:
    """Whether the weights, where they are a file on this machine, are those of the architecture. Costs no
    memory of the model's size.

    Raises InputError that names the file and what differs.
    """
    model, file = _file_of(source)
    if file is None:
        return
    text = "its config" if model.startswith(LOCAL) else model
    try:
        if _openai_tag(file) is None:
            check_weights(model, file, text)
    except WeightsError as error:
        raise InputError(f"{source.name!r} cannot be loaded: {error}", "clip") from error


def _file_of(source: ClipSource) -> tuple[str, Path | None]:
    """open_clip's name of the model, and its weights where they are a file on this machine."""
    model, pretrained = on_machine(source)
    found = pretrained
    if model.startswith(LOCAL):
        found = open_clip.factory._find_checkpoint_in_dir(Path(model.removeprefix(LOCAL)))
    file = Path(found) if found else None
    return model, file if file is not None and file.is_file() else None


def go_offline_if_asked(model: str) -> None:
    """open_clip asks the Hub for the tokenizers and text towers of others: once, not for minutes."""
    config = {} if model.startswith(LOCAL) else (open_clip.get_model_config(model) or {})
    if {"hf_tokenizer_name", "hf_model_name"} & config.get("text_cfg", {}).keys():
        go_offline_if_away()


def _without_program(pretrained: str | None, folder: Path) -> str | None:
    """What open_clip loads weights from; of OpenAI's own TorchScript file, which is known not to do
    harm, the tensors alone."""
    if (
        pretrained is None
        or not Path(pretrained).is_file()
        or _openai_tag(Path(pretrained)) is None
    ):
        return pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will no longer write such files
        state = torch.jit.load(pretrained, map_location="cpu").state_dict()
    kept = {k: v.contiguous() for k, v in state.items() if k not in OPENAI_NOTES}
    save_file(kept, folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


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
