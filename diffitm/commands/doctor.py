"""What this machine or cluster has, in ten lines, and what to type next."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffitm import __version__
from diffitm.core import storage
from diffitm.core.config import option
from diffitm.core.errors import InputError
from diffitm.tasks.registry import TASKS, find_task

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "ray")
HUB = 5.0  # seconds that the Hub has for an answer
GIB = 2**30


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `diffitm doctor`."""

    data: str | None = option(None, "a data root: which tasks it has files of")
    ray: str | None = option(None, "address of a Ray cluster to look at (default: RAY_ADDRESS)")


def run(config: DoctorConfig) -> None:
    """Print a line for each thing that a run depends on; nothing that fails keeps the others back."""
    asked: dict[str, Callable[[], str]] = {
        "diffitm": lambda: f"{__version__}, Python {platform.python_version()}",
        "packages": versions,
        "machine": machine,
        "GPU": gpus,
        "Ray": lambda: cluster(config.ray),
        "Hub": hub,
        "token": token,
        "cache": cache,
        "data": lambda: data(config.data),
    }
    for name, ask in asked.items():
        try:
            line = ask()
        except Exception as error:  # a broken package or driver is what a doctor is asked for
            line = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name:9} {line}", flush=True)
    print(f"{'next':9} {advice(config)}")


def versions() -> str:
    """Of the packages that scores depend on."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join(found)


def machine() -> str:
    """Processors that this process may use, memory, and room on the disk of the working folder."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = shutil.disk_usage(".").free / GIB
    return f"{usable} processors, {memory:.0f} GiB memory, {free:.0f} GiB free on this disk"


def gpus() -> str:
    """Name and memory of each, or why torch sees none."""
    import torch

    if not torch.cuda.is_available():
        built = (
            f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        )
        return f"none that torch sees; it {built}"
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append(f"{name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)")
    return ", ".join(found)


def cluster(address: str | None) -> str:
    """What a cluster has, if one is named."""
    from diffitm.distributed import session

    if not session.is_elsewhere(address):
        return "starts on this machine when a command needs it; a cluster: --ray HOST:PORT"
    session.connect(address)
    total = session.resources()
    nodes = 1 + len(session.other_nodes())
    return (
        f"{nodes} nodes up with {total.get('CPU', 0):g} processors and {total.get('GPU', 0):g} GPUs"
    )


def hub() -> str:
    """Whether the Hub answers."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "is not asked: HF_HUB_OFFLINE is set; models must be in the cache or a folder"
    import urllib3

    endpoint = HfApi().endpoint
    address = f"{endpoint}/api/models?limit=1"
    answer = urllib3.request("GET", address, timeout=HUB, retries=False)
    return f"{endpoint} answers ({answer.status})"


def token() -> str:
    """Whether there is one, never what it is."""
    from huggingface_hub import get_token

    if get_token():
        return "there is one for gated models"
    return "none: gated models and Winoground need one (HF_TOKEN, or hf auth login)"


def cache() -> str:
    """Where models from the Hub are kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    return f"{models} models in {folder}"


def data(root: str | None) -> str:
    """Tasks whose folder a data root has; whether all of it is there, gdbench --check says."""
    if root is None:
        return "none named; --data DATA tells which tasks it has, --data shapes needs none"
    if root == "shapes":
        return f"the embedded world is drawn when it is needed: all {len(TASKS)} tasks"
    where = storage.absolute(root)
    if not storage.exists(where):
        raise InputError(f": there is no folder {where}", "data")
    there = [name for name in TASKS if storage.exists(storage.join(where, find_task(name).folder))]
    return f"{where} has the folder of {', '.join(there) or 'no task'}"


def advice(config: DoctorConfig) -> str:
    """The command to type next."""
    if config.data in (None, "shapes"):
        return "diffitm gdbench --model shapes --clip shapes --data shapes --out out/demo"
    return f"diffitm gdbench --check --data {config.data}"
