"""What a training worker computes on, and how workers exchange what is there."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray

from diffitm.core.errors import InputError

if TYPE_CHECKING:
    import torch


def actor_device(gpus: float) -> str:
    """torch's device of an actor that Ray gave this share of GPUs.

    Raises InputError where torch sees none of them.
    """
    if not gpus:
        return "cpu"
    _check_seen(f"this actor {gpus:g} GPUs", "--gpus-per-actor 0 to score on processors")
    return "cuda"


def free_memory() -> int | None:
    """Bytes that this process's GPU has free; None where torch sees none."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def worker_device() -> torch.device:
    """The device of this worker of Ray Train.

    Raises InputError where Ray gave it a share of a GPU and torch sees none.
    """
    import ray.train.torch

    device = ray.train.torch.get_device()
    if device.type == "cuda":
        _check_seen("this worker a GPU", "--gpus-per-worker 0 to train on processors")
    return device


def _check_seen(given: str, otherwise: str) -> None:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise InputError(
            f"Ray gave {given}, but torch {torch.__version__} ({built}) sees none: install a torch "
            f"that fits the node's driver (nvidia-smi names it), or give {otherwise}"
        )


def gradient_group(device: torch.device, seconds: int) -> Any:
    """The process group that tensors of the device are exchanged in; None is the default one, gloo,
    which all workers have for what lies in their memory."""
    import torch

    if device.type != "cuda" or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="nccl", timeout=timedelta(seconds=seconds))


def processors(given: float | None) -> float:
    """Those of this worker: as many as it was given, else its share of the node's."""
    if given is not None:
        return given
    return _here()[0] / ray.train.get_context().get_local_world_size()


def take_processors(gpus: float) -> None:
    """Give torch in this actor the part of its node's processors that goes with its share of GPUs; an
    actor without one has what Ray gave it."""
    if gpus:
        import torch

        cpus, there = _here()
        torch.set_num_threads(max(1, int(cpus * gpus / max(there, gpus))))


def _here() -> tuple[float, float]:
    """Processors and GPUs of this node."""
    context = ray.get_runtime_context()
    (node,) = (n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Ray knows of a container's share, the system of the machine.
    cpus = min(float(usable or 1), node["Resources"].get("CPU", 1.0))
    return cpus, node["Resources"].get("GPU", 0.0)
