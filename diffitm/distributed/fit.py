"""Run Ray Train: workers, checkpoints, retries, and the log that the driver tells."""

from __future__ import annotations

import logging
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffitm import storage
from diffitm.distributed.monitor import Line, Monitor
from diffitm.errors import InputError
from diffitm.training.job import Training
from diffitm.training.result import CHECKPOINTS
from diffitm.training.track import Curves

if TYPE_CHECKING:
    from ray.train import Result

log = logging.getLogger("diffitm")
KEPT = 2  # checkpoints
NOT_SETTINGS = {  # the weights do not depend on these options
    *("out", "workers", "cpus_per_worker", "gpus_per_worker", "retries", "ray", "preset"),
    *("cache_latents", "track", "gradient_checkpointing"),
    *("checkpoint_every", "log_every", "measure_every"),
}


def settings_of(config: Any, **more: Any) -> dict[str, Any]:
    """The options that the weights depend on, without keys and queries of URIs, and what else they
    do."""
    found = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS}
    return {k: storage.title(v) if isinstance(v, str) else v for k, v in found.items()} | more


@dataclass(frozen=True)
class Workers:
    """How many training processes, what each takes, and how often lost ones are replaced."""

    count: int
    cpus: float | None
    gpus: float | None
    retries: int


def fit(
    module: str,
    job: Training,
    workers: Workers,
    name: str,
    curves: Curves,
    out: str,
    describe: Callable[[Line], str],
) -> tuple[Result, dict[str, int]]:
    """Run the module's `loop` on the workers; it goes on from the last checkpoint of OUT/train/<name>.
    Its result and the unreadable images. `describe` puts a line's values into words.

    Raises InputError if the loop ended the run.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from diffitm.distributed import session
    from diffitm.distributed.progress import Watch

    cpus, gpus = share(workers)
    monitor = session.start_here(Monitor)
    found, folder = storage.filesystem(storage.join(out, CHECKPOINTS))
    found.create_dir(folder, recursive=True)
    trainer = TorchTrainer(
        _loop,
        train_loop_config={
            "module": module,
            "job": pickle.dumps(job),
            "monitor": monitor,
            "cpus": cpus,
        },
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=found,
            failure_config=FailureConfig(max_failures=workers.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    )
    sizes = (f"{len(job.kept):,}", f"{job.steps:,}", job.size * job.micro)
    log.info("%s rows, %s updates of %d examples", *sizes)
    lines = _Lines(job.steps, curves, describe)
    try:
        with Watch(monitor, lines.tell):
            result = _fitted(trainer, monitor)
        lost, stopped = ray.get(monitor.end.remote())
        lines.tell(ray.get(monitor.read.remote()))
    finally:
        curves.close()
    if stopped is not None:
        intact = f"; the checkpoints of {folder}/{name} are intact" if result.checkpoint else ""
        raise InputError(stopped + intact)
    if result.checkpoint is None:
        raise InputError(f"{out}: the run left no checkpoint")
    return result, lost


def _loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker. Ray's controller has no use for the modules of the loop and
    the job, which take seconds to import."""
    job = pickle.loads(settings["job"])
    import_module(settings["module"]).loop({**settings, "job": job})


def share(workers: Workers) -> tuple[float, float]:
    """Processors and GPUs of a worker. Raises InputError if the workers leave none for the loaders,
    and warns where the cluster may grow."""
    from diffitm.distributed import session

    gpus = workers.gpus
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0
    cpus = workers.cpus or 1.0
    free = session.resources().get("CPU", 0) - session.SPARE_CPUS
    if workers.count * cpus > free:
        session.refuse(
            f"--workers {workers.count} with {cpus:g} processors each leaves none for the loaders: "
            f"the cluster has {free + session.SPARE_CPUS:g} and {session.SPARE_CPUS} must stay free"
        )
    return cpus, gpus


def _fitted(trainer: Any, monitor: Any) -> Result:
    """Its result. Raises InputError if workers failed and one of them has told why, KeyboardInterrupt
    on Ctrl-C, of which Ray Train's own handler makes an exit."""
    import ray
    from ray.train import TrainingFailedError

    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        _, stopped = ray.get(monitor.end.remote())
        if stopped is None:
            raise
        raise InputError(stopped) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # a trial of a sweep is not in it
            signal.signal(signal.SIGINT, handler)


class _Lines:
    """Logs what the workers tell, and shows it as curves."""

    def __init__(self, steps: int, curves: Curves, describe: Callable[[Line], str]) -> None:
        self.steps, self.curves, self.describe = steps, curves, describe

    def tell(self, lines: list[Line]) -> None:
        from diffitm.distributed.progress import clock

        for line in lines:
            self.curves.add(line)
            step = int(line["step"])
            if "loss" not in line:
                log.info("update %d: %s", step, measured(line))
                continue
            left = (self.steps - step) / max(step, 1)
            log.info(
                "update %d of %d: %s; %.1f examples/s, %.0f%% waiting%s",
                *(step, self.steps, self.describe(line)),
                *(line["examples_per_second"], 100 * line["waiting"]),
                f", {clock(left * step * line['seconds_per_update'])} left" if left else "",
            )


def measured(line: Line) -> str:
    """What a validation measured, in words."""
    told = [f"{k[9:]} {100 * v:.1f}%" for k, v in line.items() if k.startswith("accuracy/")]
    told += [f"{k.replace('_', ' ')} {v:.4f}" for k, v in line.items() if "reconstruction" in k]
    return ", ".join(told)
