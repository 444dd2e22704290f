"""A Ray whose GPUs are numbers: workers are given shares of them and run on the processor."""

from __future__ import annotations

from typing import Any

from tests.pipeline import ROOT

# Of ray.init, for the workers.
WITHOUT_CUDA: dict[str, Any] = {
    "env_vars": {"PYTHONPATH": str(ROOT)},
    "worker_process_setup_hook": "tests.processors.choose_processor",
}
# The same, and it waits less after failures. Ray writes the hook into env_vars, so each has its own.
IMPATIENT: dict[str, Any] = {
    "env_vars": {"PYTHONPATH": str(ROOT)},
    "worker_process_setup_hook": "tests.processors.wait_less",
}


def choose_processor() -> None:
    """In a worker: whatever Ray gave it, the model runs on the processor."""
    import torch

    from diffitm.distributed import devices

    devices.actor_device = lambda gpus: "cpu"
    devices.worker_device = lambda: torch.device("cpu")


def wait_less() -> None:
    """In a worker, Attempts' own too."""
    from diffitm.distributed import actors, attempts

    choose_processor()
    attempts.SHORT = actors.SHORT = 1.0
    attempts.LONGEST = 4.0
