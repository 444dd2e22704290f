"""Connect to Ray: the job's or the given cluster, else a quiet one on this machine."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data

from diffitm.errors import InputError

log = logging.getLogger("diffitm")
# Readers, the writer and Ray Data's checkpoint filter need processors beside the scoring actors.
SPARE_CPUS = 2


@dataclass(frozen=True)
class Pool:
    """The actor pool: how many actors, and the share of the machine that each one takes."""

    min_actors: int
    max_actors: int
    cpus: float
    gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def connect(address: str | None) -> None:
    """Start or join Ray. `address` None means RAY_ADDRESS (a job has it), else this machine alone.

    A local start gives Ray a few more logical processors than there are, so that the actors cannot
    starve the readers on a small machine.
    """
    if ray.is_initialized():
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        ray.init(address=address, **quiet)
    else:
        cpus = _processors() + SPARE_CPUS
        # Ray warns on stdout of more processes than a few times this, which every run here has.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(8 * cpus))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    for name in ("ray", "ray.data"):  # what fails reaches the caller as an exception
        logging.getLogger(name).setLevel(logging.CRITICAL)


def choose_pool(
    actors: int | None, max_actors: int | None, cpus: float | None, gpus: float | None
) -> Pool:
    """The pool of the options, with defaults from the cluster: an actor a GPU, else one a processor.

    Where nothing is asked for, an actor takes one processor, or less on a cluster so small that
    the readers would have none. Raises InputError if what is asked for leaves them none.
    """
    total = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
    free = max(0.0, total.get("CPU", 0) - SPARE_CPUS)
    if actors is None:
        fitting = total.get("GPU", 0) / gpus if gpus else free / (cpus or 1.0)
        actors = max(1, int(fitting))
    most = max_actors or actors
    if not 1 <= actors <= most:
        raise InputError(f"--actors {actors}, --max-actors {most}: must be 1 or more, and rising")
    if cpus is None:
        cpus = min(1.0, int(100 * free / most) / 100)
        if gpus == 0 and actors > max(1.0, free):
            raise InputError(_too_many(actors, 1.0, free))
    elif actors * cpus > free:
        raise InputError(_too_many(actors, cpus, free))
    if gpus and total.get("GPU", 0) < actors * gpus:
        text = "the cluster has %g GPUs, %d actors want %g each: waiting for nodes to come up"
        log.warning(text, total.get("GPU", 0), actors, gpus)
    return Pool(actors, most, cpus, gpus)


def _too_many(actors: int, cpus: float, free: float) -> str:
    return (
        f"--actors {actors} with {cpus:g} processors each leaves none for the readers: the cluster "
        f"has {free + SPARE_CPUS:g} and {SPARE_CPUS} must stay free; at most {int(free / cpus)} fit"
    )


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> float:
    """GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))
