"""Train on Ray Train with workers that come and go, and tell the driver's log what they do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffitm.core import storage
from diffitm.core.config import ON_RAY
from diffitm.core.errors import InputError
from diffitm.distributed.monitor import Line, Monitor
from diffitm.training.job import Training
from diffitm.training.options import span
from diffitm.training.row_table import RowsFile, digest_of, write_rows
from diffitm.training.rows import TrainingRow
from diffitm.training.run_folder import CHECKPOINTS
from diffitm.training.tracking import RunTracker

if TYPE_CHECKING:
    from ray.train import Result

log = logging.getLogger("diffitm")
NOT_SETTINGS = {  # the weights do not depend on these options
    *ON_RAY,
    *("out", "workers", "cpus_per_worker", "gpus_per_worker", "retries", "preset"),
    *("cache_latents", "track", "gradient_checkpointing", "control"),
    *("checkpoint_every", "log_every", "measure_every"),
}


def settings_of(config: Any, **more: Any) -> dict[str, Any]:
    """The options that the weights depend on, without keys and queries of URIs, and what else they
    do."""
    found = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS}
    return {
        k: storage.without_query(v) if isinstance(v, str) else v for k, v in found.items()
    } | more


def hand_over(out: str, rows: Sequence[TrainingRow], kept: Sequence[int]) -> RowsFile:
    """Write the rows where all workers can read them, once for runs beside each other."""
    from diffitm.distributed.item_stage import work_folder

    digest = digest_of(rows, kept)
    uri = storage.join(work_folder(out, "rows", {"rows": digest}), "rows.parquet")
    if not storage.exists(uri):
        write_rows(uri, rows, kept, digest)
    return RowsFile(uri, digest, len(kept))


@dataclass(frozen=True)
class Workers:
    """How many training processes, from `least` to `most`, what each takes, and how often a group of them
    may end other than by the loss of a node."""

    least: int
    most: int
    cpus: float | None
    gpus: float | None
    retries: int


def workers_of(config: Any) -> Workers:
    """What the options ask for."""
    taken = (config.cpus_per_worker, config.gpus_per_worker)
    return Workers(*span(config.workers), *taken, config.retries)


def fit(
    module: str,
    job: Training,
    workers: Workers,
    name: str,
    curves: RunTracker,
    out: str,
    describe: Callable[[Line], str],
) -> tuple[Result, dict[str, int]]:
    """Run the module's `loop` on the workers; it goes on from the last checkpoint of OUT/train/<name>.
    Its result and the unreadable images. `describe` puts a line's values into words.

    Raises InputError if the loop ended the run, or if workers were lost too often.
    """
    import ray

    from diffitm.distributed import session
    from diffitm.distributed.capacity import Capacity
    from diffitm.distributed.elastic import ElasticTraining
    from diffitm.distributed.progress import Watch
    from diffitm.distributed.worker_group import GroupSettings

    cpus, gpus = worker_share(workers)
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    monitor = session.start_here(Monitor)
    found, folder = storage.filesystem(storage.join(out, CHECKPOINTS))
    found.create_dir(folder, recursive=True)
    plan = GroupSettings(module, job, bundle, workers.cpus, name, folder, found)
    sizes = (f"{job.rows.usable:,}", f"{job.steps:,}", job.micro_batch_size * job.grad_accum_steps)
    log.info("%s rows, %s updates of %d examples", *sizes)
    lines = _Lines(job.steps, curves, describe)
    places = Capacity(bundle, *_useful(workers, job))
    relay = ElasticTraining(plan, places, monitor, workers.retries)

    def look(told: list[Line]) -> None:
        lines.tell(told)
        relay.look()

    try:
        with Watch(monitor, look, standing=places.standing):
            result = relay.to_end()
        lost, stopped = ray.get(monitor.end.remote())
        lines.tell(ray.get(monitor.read.remote()))
    finally:
        places.close()
        curves.close()
    if stopped is not None:
        intact = f"; the checkpoints of {folder}/{name} are intact" if result.checkpoint else ""
        raise InputError(stopped + intact)
    if result.checkpoint is None:
        raise InputError(f"{out}: the run left no checkpoint")
    return result, lost


def _useful(workers: Workers, job: Training) -> tuple[int, int]:
    """How many workers, at least and at most, have something to do."""
    if workers.most > job.grad_accum_steps:
        log.warning(
            "--workers %d: an update has %d micro-batches, so no more workers than that are used; a "
            "smaller --batch-size makes more",
            *(workers.most, job.grad_accum_steps),
        )
    return min(workers.least, job.grad_accum_steps), min(workers.most, job.grad_accum_steps)


def worker_share(workers: Workers) -> tuple[float, float]:
    """Processors and GPUs of a worker. Raises InputError if the least number of workers does not fit,
    and warns where the cluster may grow."""
    from diffitm.distributed import session

    total, gpus = session.resources(), workers.gpus
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    cpus = workers.cpus or 1.0
    for each, key, what in ((cpus, "CPU", "processors"), (gpus, "GPU", "GPUs")):
        if workers.least * each > total.get(key, 0):
            has = f"the cluster has {total.get(key, 0):g}"
            session.refuse(f"--workers {workers.least} with {each:g} {what} each: {has}")
    return cpus, gpus


class _Lines:
    """Logs what the workers tell, and shows it as curves."""

    def __init__(self, steps: int, curves: RunTracker, describe: Callable[[Line], str]) -> None:
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
