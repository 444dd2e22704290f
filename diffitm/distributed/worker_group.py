"""One group of workers of Ray Train, from its start to its end, and how long it may wait for what."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)

from diffitm.training.job import Training

if TYPE_CHECKING:
    from pyarrow import fs

KEPT = 2  # checkpoints
# Seconds that one worker may wait for another: for a validation whose examples are slow to read, or a
# checkpoint on a slow disk. Ray sees a worker that is gone far sooner and ends the group.
EXCHANGE = 24 * 3600
# Seconds from the request for workers to their room, which Capacity has seen to be there a moment before.
# When it is gone again the group ends, and Capacity waits, for as long as it takes.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
# Seconds between two looks at the workers; each takes one report, so checkpoints are no closer.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
# A node that goes with notice is as lost as one that goes without: no process to watch for notices.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# The others stay as they are: a worker that does not answer for 10 minutes is taken for dead
# (RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S), reports wait for each other without a bound.


@dataclass(frozen=True)
class GroupSettings:
    """What the groups of a run have in common: the module with the loop, the job, a worker's share of
    the cluster, its processors if they were given, and where checkpoints go."""

    module: str
    job: Training
    share: dict[str, float]
    processors: float | None
    name: str
    folder: str
    filesystem: fs.FileSystem


def run_group(plan: GroupSettings, workers: int, monitor: Any) -> ray.train.Result:
    """Train with so many workers from the last checkpoint on, until the loop returns.

    Raises TrainingFailedError or RayError once a worker is gone: whether another group follows is not
    for Ray to say, as it takes the loss of a node for a failure of the run.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = {
        "module": plan.module,
        "job": pickle.dumps(plan.job),
        "monitor": monitor,
        "decodes": plan.job.reads_images,
        "processors": plan.processors,
    }
    return TorchTrainer(
        _loop,
        train_loop_config=settings,
        # What lies in memory is exchanged by gloo, whatever the workers compute on.
        torch_config=TorchConfig(backend="gloo", timeout_s=EXCHANGE),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu="GPU" in plan.share, resources_per_worker=plan.share
        ),
        run_config=RunConfig(
            name=plan.name,
            storage_path=plan.folder,
            storage_filesystem=plan.filesystem,
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    ).fit()


def _loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker; the updates that are done. Ray's controller has no use for the
    modules of the loop and the job, which take seconds to import."""
    if settings["decodes"]:
        from diffitm.training.dataloader import prepare_processes

        prepare_processes()
    job = pickle.loads(settings["job"])
    return import_module(settings["module"]).loop({**settings, "job": job})


def describe_end(error: Exception, places: dict[int, tuple[str, str]]) -> str:
    """What ended a group, in a line: the worker that is gone, else the first that failed, and where it
    was (`places` by rank)."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    if not failures:
        cause = getattr(error, "controller_failure", error)
        return f"{type(cause).__name__}: {_last_line(cause)}"
    gone = [rank for rank, e in failures.items() if _is_gone(e)]
    rank = min(gone or failures)
    where = f" on {places[rank][1]}" if rank in places else ""
    failure = failures[rank]
    kind = "" if _is_gone(failure) else f"{type(failure).__name__}: "
    return f"worker {rank}{where}: {kind}{_last_line(failure)}"


def has_no_room(error: Exception) -> bool:
    """Whether the group did not start because the room for it has gone again."""
    cause = getattr(error, "controller_failure", None)
    return type(cause).__name__ == "WorkerGroupStartupTimeoutError"


def is_own_error(error: Exception) -> bool:
    """Whether the loop raised it, so that its traceback tells more than the end of a process does."""
    return isinstance(error, WorkerGroupError) and not any(
        map(_is_gone, error.worker_failures.values())
    )


def _is_gone(error: Exception) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), RayActorError)


def _last_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:400] if lines else type(error).__name__
