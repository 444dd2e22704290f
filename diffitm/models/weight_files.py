"""Files of weights: what they hold, read without running what is in them."""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
POINTER = b"version https://git-lfs"
LEFT_OVER = "save its tensors alone where you trust it"
# Numbers and settings that trainers put beside the tensors; making them runs nothing of the file's.
# Either name of numpy's module is in files.
_PLAIN: list[Any] = [
    *((function, f"numpy.{module}.multiarray.{name}")
      for module in ("core", "_core")
      for name, function in (("scalar", multiarray.scalar), ("_reconstruct", multiarray._reconstruct))),
    *(np.ndarray, np.dtype, argparse.Namespace),
    *(type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"),
]  # fmt: skip


class WeightsError(ValueError):
    """A file is no weights that can be used: the message names it, and what would be right."""


def read_weights(file: Path, device: str = "cpu") -> Any:
    """What the file holds: the tensors of a .safetensors by name, else whatever was pickled; on the
    device 'meta' shapes alone, which cost no memory.

    Raises WeightsError.
    """
    check_whole(file)
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(file, device)
        if _is_safetensors(file):
            raise WeightsError(
                f"{file} is a safetensors file by its content: give it a name that ends in .safetensors"
            )
        if is_torchscript(file):  # which torch.load would tell, with a warning of its own
            raise WeightsError(_how_to_read_program(file))
        with readable():
            return torch.load(file, map_location=device, weights_only=True)
    except WeightsError:
        raise
    except SafetensorError as error:
        raise WeightsError(f"{file} is no whole safetensors file: {error}") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise WeightsError(_why(file, error)) from error


def readable() -> AbstractContextManager[Any]:
    """In its block torch.load(weights_only=True) also reads numpy's numbers and plain settings."""
    manager: AbstractContextManager[Any] = torch.serialization.safe_globals(_PLAIN)
    return manager


def read_shapes(file: Path) -> Shapes:
    """The shape of each tensor; of a training checkpoint, those of its 'state_dict'.

    Raises WeightsError, also where there is no tensor.
    """
    return {
        name: tuple(t.shape) for name, t in tensors_of(read_weights(file, "meta"), file).items()
    }


def tensors_of(found: Any, file: Path) -> dict[str, Tensor]:
    """The tensors by name of what read_weights gives. Raises WeightsError where there is none."""
    if isinstance(found, dict):
        state = found.get("state_dict", found)
        if not isinstance(state, dict):
            raise WeightsError(
                f"{file} holds under 'state_dict' no tensors by name, but {type(state).__name__}"
            )
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        if unnamed := [k for k in tensors if not isinstance(k, str)]:
            raise WeightsError(f"{file} has {unnamed[0]!r} where the name of a tensor should be")
        if tensors:
            return tensors
        deeper = [k for k, v in found.items() if isinstance(v, dict) and _has_tensors(v)]
        if deeper:
            text = f"{file} holds its tensors under {deeper[0]!r}, not by their names or under"
            raise WeightsError(f"{text} 'state_dict': save that part as a file of its own")
    keys = f" of {few([str(key) for key in found])}" if isinstance(found, dict) and found else ""
    raise WeightsError(f"{file} holds no tensors by name, but {type(found).__name__}{keys}")


def check_whole(file: Path) -> None:
    """Raises WeightsError for what stands in the place of weights that were not fetched: nothing, a
    pointer of Git LFS, a page of a web site."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        raise WeightsError(f"{file} is empty: a download that broke off; fetch it again")
    if head.startswith(POINTER):
        text = f"{file} is a pointer of Git LFS, not the weights themselves"
        raise WeightsError(f"{text}: run `git lfs pull` in its folder, or fetch the file again")
    # A safetensors file begins with its header's length, whose bytes can read as a space and '<'.
    if head[8:9] != b"{" and head.lstrip().startswith((b"<", b'{"error"')):
        raise WeightsError(f"{file} is a page of a web site, not weights: fetch the file again")


def is_torchscript(file: Path) -> bool:
    """Whether it is an archive of torch.jit, as OpenAI published CLIP: a program with its weights."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def sha256(file: Path) -> str:
    """Of the file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def few(names: list[str], most: int = 3) -> str:
    """The first of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_safetensors(file: Path, device: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        if device != "meta":
            return {name: opened.get_tensor(name) for name in names}
        slices = {name: opened.get_slice(name) for name in names}
        return {
            name: torch.empty(
                found.get_shape(),
                dtype=_TYPES.get(
                    found.get_dtype(), torch.uint8
                ),  # one that torch lacks is no weight's
                device="meta",
            )
            for name, found in slices.items()
        }


def _has_tensors(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _how_to_read_program(file: Path) -> str:
    tensors = f"torch.jit.load({file.name!r}).state_dict()"
    notes = "{'input_resolution', 'context_length', 'vocab_size'}"  # OpenAI's, which are no weights
    read = f"torch.save({{k: v for k, v in {tensors}.items() if k not in {notes}}}, 'weights.pt')"
    return f"{file} is a TorchScript archive, which is a program: {LEFT_OVER}: {read}"


def _why(file: Path, error: Exception) -> str:
    """What is wrong with a file that torch.load refuses."""
    strange = _strange(file) or _named_by(error) if isinstance(error, UnpicklingError) else []
    if strange:
        read = f"torch.load({file.name!r}, weights_only=False)['state_dict']"
        text = f"{file} holds more than tensors and numbers ({few(strange)}), which are not read"
        return f"{text}: {LEFT_OVER}: torch.save({read}, 'weights.pt')"
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    if "weights_only" in text:  # advice of torch that reads whatever is in the file
        return f"{file} is no file of weights that torch.save wrote, or not a whole one"
    return f"{file} is no whole file of weights: {text[:200]}"


def _named_by(error: Exception) -> list[str]:
    """What torch's refusal names, of files whose list cannot be had."""
    found = re.findall(r"GLOBAL ([\w.]+)|numpy[\w.]*ObjectDType", str(error))
    return [name or "a numpy array of objects" for name in found[:1]]


def _is_safetensors(file: Path) -> bool:
    """Whether it begins as one: the length of its header, and that."""
    with file.open("rb") as opened:
        head = opened.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def _strange(file: Path) -> list[str]:
    """Names of what would have to be imported to read the file."""
    try:
        with readable():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError):  # of the old format
        return []
