"""What diva.py's objectives do alike with a CLIP: how it is validated, written and compared."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.clip import ClipSource, load_clip
from diffitm.models.clip_export import (
    stock_name,
    stock_preprocessing,
    write_open_clip,
    write_transformers,
)
from diffitm.tasks.registry import find_task
from diffitm.training.diva.options import DivaConfig
from diffitm.training.diva.step import PROJECTION
from diffitm.training.job import Validation
from diffitm.training.run_folder import PICTURES, WEIGHTS

log = logging.getLogger("diffitm")


def validation_of(config: DivaConfig, root: str | None, tasks: Sequence[str]) -> Validation | None:
    """`tasks` unless others are asked for. Raises InputError if one is unknown or its files are not there."""
    if root is None or not config.validate_every:
        return None
    names = tuple(config.validation_tasks or tasks)
    for name in names:
        if next(iter(find_task(name)().examples(root)), None) is None:
            raise InputError(f"--validation-data {root}: holds no example of {name}")
    return Validation(root, names, config.validate_every, config.validation_examples)


def write_clip(
    checkpoint: Path,
    source: ClipSource,
    load: Callable[[nn.Module, dict[str, Tensor]], None],
    out: str,
) -> Callable[[], None]:
    """The tuned CLIP for open_clip and transformers, the projection, the picture if there is one; `load`
    puts trained weights into a CLIP. What it gives back tells people what came out."""
    disable_progress_bar()  # of transformers, for a file of a second
    weights = load_file(checkpoint / WEIGHTS)
    clip = load_clip(source).model
    load(clip, weights)
    write_open_clip(clip, source, out)
    reason = write_transformers(clip, source, storage.join(out, "transformers"))
    projection = {k: v for k, v in weights.items() if k.startswith(PROJECTION)}
    storage.write_bytes(storage.join(out, "projection.safetensors"), save(projection))
    picture = checkpoint / PICTURES
    if picture.exists():
        storage.write_bytes(storage.join(out, PICTURES), picture.read_bytes())
    preprocessing = stock_preprocessing(clip)

    def tell() -> None:
        if reason is not None:
            log.info("no folder for transformers: %s", reason)
        print(f"clip {out}")
        if name := stock_name(source):
            given = "".join(f", {key}={value!r}" for key, value in preprocessing.items())
            text = "open_clip loads the weights as %s, pretrained='open_clip_model.safetensors'%s"
            log.info(text, name, given)

    return tell


def tell_comparison(config: DivaConfig, outs: Sequence[str], tasks: Sequence[str] = ()) -> None:
    """The command that compares the CLIPs in `outs` with the one that they were tuned from."""
    if "://" not in config.out:
        data = "shapes" if config.data == "shapes" else "DATA"
        command = ["--clip", *outs, config.clip, "--data", data]
        command += ["--tasks", *tasks] if tasks else []
        print(f"compare diffitm gdbench {shlex.join(command)}")
