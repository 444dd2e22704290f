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
        cpus = (os.cpu_count() or 1) + SPARE_CPUS
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def choose_pool(
    actors: int | None, max_actors: int | None, cpus: float, gpus: float | None
) -> Pool:
    """The pool of the options, with defaults from the cluster: an actor a GPU, else one a processor.

    Raises InputError if the cluster as it stands could never run the actors beside the readers.
    """
    total = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
    free = total.get("CPU", 0) - SPARE_CPUS
    if actors is None:
        fitting = total.get("GPU", 0) / gpus if gpus else free / cpus
        actors = max(1, int(fitting))
    if actors < 1 or (max_actors is not None and max_actors < actors):
        raise InputError(
            f"--actors {actors} to --max-actors {max_actors}: must be 1 or more, rising"
        )
    if gpus == 0 and actors * cpus > free:
        raise InputError(
            f"--actors {actors} x --cpus-per-actor {cpus:g} leaves no processor for the readers: "
            f"the cluster has {total.get('CPU', 0):g} and {SPARE_CPUS} must stay free; "
            f"at most {max(0, int(free / cpus))} actors fit"
        )
    if gpus and total.get("GPU", 0) < actors * gpus:
        log.warning(
            "the cluster has %g GPUs, %d actors want %g each: waiting for nodes to come up",
            total.get("GPU", 0),
            actors,
            gpus,
        )
    return Pool(actors, max_actors or actors, cpus, gpus)
