"""Tune a diffusion model for matching: from rows with negatives to LoRA weights, on Ray Train."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffitm import storage
from diffitm.errors import InputError
from diffitm.models.load import Source, resolve
from diffitm.provenance import fingerprint, record
from diffitm.training.job import Job, Validation
from diffitm.training.objectives import Objective
from diffitm.training.options import Config, find_problems
from diffitm.training.result import open_run, write_result
from diffitm.training.rows import Row, drop_equal, images_of, read_rows, texts_of, told, usable
from diffitm.training.track import Curves
from diffitm.training.webdataset import is_webdataset, read_shards

if TYPE_CHECKING:
    from ray.train import Result

log = logging.getLogger("diffitm")
TRAIN, VALID = "coco_neg/train_neg_clip.tsv", "coco_neg/valid_neg_clip.tsv"
TASKS = ("coco_neg_text", "coco_neg_image")
KEPT = 2  # checkpoints
NOT_SETTINGS = {  # the weights do not depend on these
    *("out", "workers", "cpus_per_worker", "gpus_per_worker", "retries", "ray", "preset"),
    *("cache_latents", "track"),
}


class Monitor:
    """An actor that collects what workers tell: lines of the log, unreadable images, why to stop."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.lost: dict[str, int] = {}
        self.stopped: str | None = None

    def add(self, line: dict[str, float]) -> None:
        self.lines.append(line)

    def lose(self, failure: str) -> None:
        self.lost[failure] = self.lost.get(failure, 0) + 1

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def read(self) -> list[dict[str, float]]:
        found, self.lines = self.lines, []
        return found

    def end(self) -> tuple[dict[str, int], str | None]:
        return self.lost, self.stopped


def run(config: Config) -> None:
    """Train, and write OUT/pytorch_lora_weights.safetensors.

    Raises InputError for bad input, before anything is trained where that is possible.
    """
    problems = find_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    out = storage.absolute(config.out)
    source = resolve(config.model)
    rows_file, root, valid = _data(config, out)
    reader = read_shards if is_webdataset(rows_file) else read_rows
    rows, equal = drop_equal(reader(rows_file))
    if equal:
        log.warning("%s: left out %s negatives that equal their row's own", rows_file, f"{equal:,}")
    objective = Objective(config.objective, config.lambda_, config.clip_over, config.guard)
    negatives = config.negatives if objective.has_wrong_pairs else "none"
    kept, lost = usable(rows, negatives, rows_file)
    if lost:
        log.warning("%s: left out %s", rows_file, told(lost))

    from diffitm.distributed import session

    session.connect(config.ray)
    job = _job(config, source, objective, negatives, rows, kept, root, valid, session.gpus())
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS} | {
        "weights": source.digest,
        "rows": fingerprint([asdict(row) for row in rows]),
        "dtype": job.dtype,
    }
    known = open_run(out, settings)
    if known.done:
        log.info("%s holds this run already; give another --out to train again", out)
        return
    if config.cache_latents:
        job = _cached(job, out)
    shown = {k: storage.public(v) if isinstance(v, str) else v for k, v in settings.items()}
    curves = Curves(config.track, storage.public(out), known.key, shown)
    result, lost_images = _train(config, job, fingerprint(settings)[:12], curves, out)
    if result.checkpoint is None:
        raise InputError(f"{out}: the run left no checkpoint")
    with result.checkpoint.as_directory() as folder:
        provenance = record(asdict(config))
        ended = write_result(Path(folder), job.rank, settings, known, provenance, lost_images, out)
    if lost_images:
        log.warning("%d images could not be read; see %s/failures.json", len(lost_images), out)
    if job.validation is not None:
        means = (100 * ended["best"], 100 * ended["base"])
        text = "best at update %d: %.1f%% on validation, before training %.1f%%"
        log.info(text, ended["best_step"], *means)
    weights = storage.join(out, "pytorch_lora_weights.safetensors")
    print(f"weights {weights}")
    if "://" not in out:
        command = ["--model", config.model, "--lora", "none", weights]
        if config.data != "shapes" and valid is not None:
            command += ["--data", valid, "--tasks", *TASKS]
        print(f"compare python pipelines/gdbench.py {shlex.join(command)}")


def _data(config: Config, out: str) -> tuple[str, str, str | None]:
    """The file of rows, where its images start, and the root that is validated on."""
    if config.data == "shapes":
        from diffitm.shapes.training import VERSION, write_training

        root = storage.join(
            storage.parent(out), "work", f"shapes-training-{config.scenes}-v{VERSION}"
        )
        write_training(root, config.scenes)
        return storage.join(root, TRAIN), root, config.validation_data or root
    given = storage.absolute(config.data)
    if storage.bare(given).endswith((".tsv", ".parquet", ".tar")):
        if is_webdataset(given) and config.images:
            raise InputError(f"--images {config.images}: shards hold their images; leave it out")
        root = storage.absolute(config.images) if config.images else storage.parent(given)
        return given, root, config.validation_data
    file = storage.join(given, TRAIN)
    if not storage.exists(file):
        raise InputError(
            f"--data {config.data}: is neither a .tsv, .parquet or .tar file, nor a folder with {TRAIN}"
        )
    known = given if storage.exists(storage.join(given, VALID)) else None
    return file, given, config.validation_data or known


def _job(
    config: Config,
    source: Source,
    objective: Objective,
    negatives: str,
    rows: list[Row],
    kept: list[int],
    root: str,
    valid: str | None,
    gpus: float,
) -> Job:
    """The settings that travel to the workers. Raises InputError where rows are too few."""
    micro = config.effective_batch // config.batch_size
    per_epoch = len(kept) // config.effective_batch
    if per_epoch == 0:
        raise InputError(
            f"--effective-batch {config.effective_batch}: there are only {len(kept)} usable rows"
        )
    validation = None
    if config.validate_every and valid is not None:
        if not storage.exists(storage.join(storage.absolute(valid), VALID)):
            raise InputError(f"--validation-data {valid}: has no {VALID}")
        validation = Validation(
            storage.absolute(valid),
            TASKS,
            config.validate_every,
            config.validation_examples,
            config.validation_timesteps,
        )
    elif config.validate_every:
        log.warning("no --validation-data: the last weights are kept, not the best")
    on_gpu = gpus > 0 if config.gpus_per_worker is None else config.gpus_per_worker > 0
    return Job(
        source=source,
        variant=config.variant,
        dtype=config.dtype if config.dtype != "auto" else ("bf16" if on_gpu else "fp32"),
        objective=objective,
        rows=rows,
        kept=kept,
        root=root,
        resize=config.resize,
        negatives=negatives,
        per_example=config.draw_negatives == "example",
        size=config.batch_size,
        micro=micro,
        steps=config.steps or max(1, round(config.epochs * per_epoch)),
        rate=config.lr,
        schedule=config.lr_schedule,
        warmup=config.warmup_steps,
        weight_decay=config.weight_decay,
        clip=config.clip_norm,
        rank=config.rank,
        ema=config.ema,
        checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        validation=validation,
        latents=None,
        texts=None,
    )


def _cached(job: Job, out: str) -> Job:
    """The job with its images and texts encoded beforehand."""
    from diffitm.distributed import session
    from diffitm.distributed.caching import Encoder, encode

    pool = session.choose_pool(None, None, None, None)
    encoder = Encoder(job.source, job.variant, job.dtype, job.root, job.resize)
    return replace(
        job,
        latents=encode(out, "image", images_of(job.rows), encoder, pool),
        texts=encode(out, "text", texts_of(job.rows), encoder, pool),
    )


def _train(
    config: Config, job: Job, name: str, curves: Curves, out: str
) -> tuple[Result, dict[str, int]]:
    """Run Ray Train; it goes on from its last checkpoint. Raises InputError if a loss ended it."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from diffitm.distributed import session
    from diffitm.distributed.progress import Watch
    from diffitm.distributed.tuning import loop

    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0
    cpus = config.cpus_per_worker or 1.0
    free = ray.cluster_resources().get("CPU", 0) - session.SPARE_CPUS
    if config.workers * cpus > free:
        raise InputError(
            f"--workers {config.workers} with {cpus:g} processors each leaves none for the loaders: "
            f"the cluster has {free + session.SPARE_CPUS:g} and {session.SPARE_CPUS} must stay free"
        )
    # On this node, so that it outlives those of the workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(num_cpus=0)(Monitor).options(scheduling_strategy=here).remote()
    found, folder = storage.filesystem(storage.join(out, "train"))
    found.create_dir(folder, recursive=True)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": job, "monitor": monitor, "cpus": cpus},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=found,
            failure_config=FailureConfig(max_failures=config.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    )
    log.info("%s rows, %s updates of %d examples", *_sizes(job))
    lines = _Lines(job.steps, curves)
    try:
        with Watch(monitor, lines.tell):
            result = trainer.fit()
        lost, stopped = ray.get(monitor.end.remote())
        lines.tell(ray.get(monitor.read.remote()))
    finally:
        curves.close()
    if stopped is not None:
        raise InputError(f"{stopped}; the checkpoints of {folder}/{name} are intact")
    return result, lost


def _sizes(job: Job) -> tuple[str, str, int]:
    return f"{len(job.kept):,}", f"{job.steps:,}", job.size * job.micro


class _Lines:
    """Logs what the workers tell, and shows it as curves."""

    def __init__(self, steps: int, curves: Curves) -> None:
        self.steps, self.curves = steps, curves

    def tell(self, lines: list[dict[str, float]]) -> None:
        from diffitm.distributed.progress import clock

        for line in lines:
            self.curves.add(line)
            step = int(line["step"])
            accuracies = {k: v for k, v in line.items() if k.startswith("accuracy/")}
            if accuracies:
                shown = ", ".join(f"{k[9:]} {100 * v:.1f}%" for k, v in accuracies.items())
                log.info("update %d: %s", step, shown)
                continue
            left = (self.steps - step) / max(step, 1)
            log.info(
                "update %d of %d: loss %.4f, E+ %.4f, E- %.4f, %.0f%% held; %.1f examples/s, "
                "%.0f%% waiting%s",
                *(step, self.steps, line["loss"], line["right"], line["contrast"]),
                *(100 * line["held"], line["examples_per_second"], 100 * line["waiting"]),
                f", {clock(left * step * line['seconds_per_update'])} left" if left else "",
            )
