"""Tune a diffusion model for matching: from rows with negatives to LoRA weights, on Ray Train."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffitm import storage
from diffitm.config import option
from diffitm.errors import InputError
from diffitm.models.load import resolve
from diffitm.models.lora import save_lora
from diffitm.provenance import fingerprint, record
from diffitm.training.job import Job, Validation
from diffitm.training.objectives import Objective
from diffitm.training.rows import read_rows, told, usable

if TYPE_CHECKING:
    from ray.train import Result

log = logging.getLogger("diffitm")
TRAIN, VALID = "coco_neg/train_neg_clip.tsv", "coco_neg/valid_neg_clip.tsv"
TASKS = ("coco_neg_text", "coco_neg_image")
KEPT = 2  # checkpoints
NOT_SETTINGS = {  # the weights do not depend on these
    *("out", "workers", "cpus_per_worker", "gpus_per_worker", "retries", "ray", "preset"),
}


@dataclass(frozen=True)
class Config:
    """Options of pipelines/finetune.py."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "diffusionitm": {
            "objective": "hard-neg",
            "negatives": "mixed",
            "clip_over": "microbatch",
            "batch_size": 4,
            "effective_batch": 112,
            "epochs": 8,
            "validate_every": 500,
            "validation_examples": 328,
        }
    }
    model: str = option("", "diffusion model: shapes, a diffusers folder or a Hub id")
    data: str = option("", "shapes, a data root in COCO's layout, or a .tsv or Parquet of rows")
    images: str | None = option(None, "where a file's image paths start (default: its own folder)")
    out: str = option("out/finetune", "folder or URI for weights, checkpoints and the log")
    preset: str | None = option(None, "settings of a paper: diffusionitm; options given win")
    objective: str = option(
        "hard-neg", "no-neg, hard-neg, hard-neg-unclipped, relativistic or soft-neg"
    )
    lambda_: float = option(1.0, "bound of the wrong pair's error, in errors of the right pair")
    clip_over: Literal["example", "microbatch"] = option("example", "where the bound holds")
    guard: Literal["none", "clip", "frozen"] = option("none", "what holds soft-neg's empty text")
    negatives: Literal["hard-text", "random-text", "hard-image", "mixed"] = option(
        "mixed", "what wrong pairs are made of"
    )
    draw_negatives: Literal["batch", "example"] = option(
        "batch", "whether the kind of a mixed negative is drawn for a micro-batch or an example"
    )
    steps: int | None = option(None, "updates of the weights (default: those of --epochs)")
    epochs: float = option(1.0, "how often each row is seen, unless --steps says")
    batch_size: int = option(8, "examples of a micro-batch, one forward of right and wrong pairs")
    effective_batch: int = option(32, "examples of an update, over all workers")
    lr: float = option(1e-4, "learning rate of AdamW")
    lr_schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = option(
        "constant", "diffusers' schedules"
    )
    warmup_steps: int = option(
        0, "updates until the full learning rate, where the schedule has any"
    )
    weight_decay: float = option(1e-2, "of AdamW")
    clip_norm: float = option(1.0, "norm that the gradient is clipped to")
    rank: int = option(4, "of the LoRA on every attention projection")
    ema: float | None = option(None, "decay of averaged weights, which are then the result")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on a GPU, else fp32"
    )
    variant: str | None = option(None, "weights variant, such as fp16, of a diffusers folder")
    gradient_checkpointing: bool = option(False, "less memory, more time")
    resize: Literal["squash", "crop"] = option("squash", "squash to a square, or crop the centre")
    seed: int = option(0, "of everything that is drawn")
    scenes: int = option(2000, "scenes that --data shapes draws for training")
    validate_every: int = option(100, "updates between validations; 0 for none")
    validation_data: str | None = option(
        None, "data root with coco_neg (default: --data, if it has one)"
    )
    validation_examples: int = option(328, "examples of each validation task, evenly spread")
    validation_timesteps: int = option(4, "timesteps of a validation score")
    checkpoint_every: int = option(100, "updates between checkpoints")
    log_every: int = option(10, "updates between lines of the log")
    workers: int = option(1, "training processes, of which each takes its share of micro-batches")
    cpus_per_worker: float | None = option(None, "processors of a worker (default: 1)")
    gpus_per_worker: float | None = option(None, "GPUs of a worker (default: 1 if there are any)")
    retries: int = option(3, "how often lost workers are replaced")
    ray: str | None = option(
        None, "address of a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )


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
    problems = _problems(config)
    if problems:
        raise InputError("\n".join(problems))
    out = storage.absolute(config.out)
    source = resolve(config.model)
    rows_file, root, valid = _data(config, out)
    rows = read_rows(rows_file)
    kept, lost = usable(rows, config.negatives, rows_file)
    if lost:
        log.warning("%s: left out %s", rows_file, told(lost))

    from diffitm.distributed import session

    session.connect(config.ray)
    job = _job(config, source, rows, kept, root, valid, session.gpus())
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS} | {
        "weights": source.digest,
        "rows": fingerprint([asdict(row) for row in rows]),
        "dtype": job.dtype,
    }
    if _is_complete(out, settings):
        log.info("%s holds this run already; give another --out to train again", out)
        return
    result, lost_images = _train(config, job, settings, out)
    _write(config, job, result, settings, lost_images, out)


def _problems(config: Config) -> list[str]:
    """What is wrong with the options, all of it."""
    problems = []
    for name, example in (("model", "shapes"), ("data", "shapes")):
        if not getattr(config, name):
            problems.append(f"give --{name}, such as --{name} {example}")
    try:
        Objective(config.objective, config.lambda_, config.clip_over, config.guard)
    except InputError as error:
        problems.append(str(error))
    least = dict.fromkeys(("batch_size", "effective_batch", "rank", "workers", "scenes"), 1)
    least |= dict.fromkeys(("checkpoint_every", "log_every", "validation_examples"), 1)
    least |= dict.fromkeys(("validate_every", "warmup_steps", "retries", "weight_decay"), 0)
    for name, bound in least.items():
        if getattr(config, name) < bound:
            value = getattr(config, name)
            problems.append(f"--{name.replace('_', '-')} {value:g}: must be at least {bound}")
    for name in ("lr", "clip_norm", "epochs"):
        if not getattr(config, name) > 0:
            problems.append(
                f"--{name.replace('_', '-')} {getattr(config, name):g}: must be above 0"
            )
    if config.steps is not None and config.steps < 1:
        problems.append(f"--steps {config.steps}: must be at least 1")
    if config.ema is not None and not 0 < config.ema < 1:
        problems.append(f"--ema {config.ema:g}: must lie between 0 and 1")
    share = config.batch_size * config.workers
    if share > 0 and config.effective_batch % share:
        problems.append(
            f"--effective-batch {config.effective_batch}: must be a multiple of --batch-size x "
            f"--workers = {share}"
        )
    return problems


def _data(config: Config, out: str) -> tuple[str, str, str | None]:
    """The file of rows, where its images start, and the root that is validated on."""
    if config.data == "shapes":
        from diffitm.shapes.training import write_training

        root = storage.join(out, f"shapes-{config.scenes}")
        write_training(root, config.scenes)
        return storage.join(root, TRAIN), root, config.validation_data or root
    given = storage.absolute(config.data)
    if given.endswith((".tsv", ".parquet")):
        root = storage.absolute(config.images) if config.images else storage.parent(given)
        return given, root, config.validation_data
    file = storage.join(given, TRAIN)
    if not storage.exists(file):
        raise InputError(
            f"--data {config.data}: is neither a .tsv nor a .parquet file, nor a folder with {TRAIN}"
        )
    known = given if storage.exists(storage.join(given, VALID)) else None
    return file, given, config.validation_data or known


def _job(
    config: Config,
    source: Any,
    rows: list[Any],
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
        objective=Objective(config.objective, config.lambda_, config.clip_over, config.guard),
        rows=rows,
        kept=kept,
        root=root,
        resize=config.resize,
        negatives=config.negatives,
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
    )


def _is_complete(out: str, settings: dict[str, Any]) -> bool:
    """Whether OUT holds the result of this run.

    Raises InputError that names what differs if OUT belongs to a run of other settings.
    """
    path = storage.join(out, "finetune.json")
    if not storage.exists(path):
        storage.write_text(path, json.dumps({"settings": settings, "done": False}, indent=2))
        return False
    known = json.loads(storage.read_text(path))
    old = known["settings"]
    if old != settings:
        differ = [k for k in settings if old.get(k) != settings[k]]
        told = ", ".join(f"{k} was {old.get(k)!r} and is {settings[k]!r}" for k in differ)
        raise InputError(f"{out} holds a run with other settings ({told}): give another --out")
    return bool(known["done"])


def _train(
    config: Config, job: Job, settings: dict[str, Any], out: str
) -> tuple[Result, dict[str, int]]:
    """Run Ray Train; it goes on from its last checkpoint. Raises InputError if a loss ended it."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

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
    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    name = fingerprint(settings)[:12]
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
    with Watch(monitor, _Lines(job.steps).tell):
        result = trainer.fit()
    lost, stopped = ray.get(monitor.end.remote())
    _Lines(job.steps).tell(ray.get(monitor.read.remote()))
    if stopped is not None:
        raise InputError(f"{stopped}; the checkpoints of {folder}/{name} are intact")
    return result, lost


def _sizes(job: Job) -> tuple[str, str, int]:
    return f"{len(job.kept):,}", f"{job.steps:,}", job.size * job.micro


class _Lines:
    """Logs what the workers tell."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def tell(self, lines: list[dict[str, float]]) -> None:
        from diffitm.distributed.progress import clock

        for line in lines:
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


def _write(
    config: Config,
    job: Job,
    result: Result,
    settings: dict[str, Any],
    lost: dict[str, int],
    out: str,
) -> None:
    """The weights that the validation chose, else the last; the log, provenance, what was lost."""
    from safetensors.torch import load_file

    from diffitm.distributed.tuning import BEST, HISTORY, WEIGHTS

    if result.checkpoint is None:
        raise InputError(f"{out}: the run left no checkpoint")
    with result.checkpoint.as_directory() as folder:
        path = Path(folder)
        chosen = path / BEST if (path / BEST).exists() else path / WEIGHTS
        save_lora(load_file(chosen), out, job.rank)
        save_lora(load_file(path / WEIGHTS), storage.join(out, "last"), job.rank)
        progress = json.loads((path / HISTORY).read_text())
    lines = "".join(json.dumps(line) + "\n" for line in progress["history"])
    storage.write_text(storage.join(out, "log.jsonl"), lines)
    _tensorboard(progress["history"], out)
    storage.write_text(storage.join(out, "failures.json"), json.dumps(lost, indent=2))
    provenance = json.dumps(record(asdict(config)), indent=2)
    storage.write_text(storage.join(out, "provenance.json"), provenance)
    done = {"settings": settings, "done": True, "best_step": progress["best_step"]}
    storage.write_text(storage.join(out, "finetune.json"), json.dumps(done, indent=2))
    if lost:
        log.warning("%d images could not be read; see %s/failures.json", len(lost), out)
    if job.validation is not None:
        mean = 100 * progress["best"]
        log.info("best at update %d: %.1f%% on validation", progress["best_step"], mean)
    print(f"weights {storage.join(out, 'pytorch_lora_weights.safetensors')}")


def _tensorboard(history: list[dict[str, float]], out: str) -> None:
    """The log as TensorBoard's events below OUT."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for line in history:
                for name, value in line.items():
                    if name != "step":
                        writer.add_scalar(name, value, int(line["step"]))
        for path in Path(folder).iterdir():
            target = storage.join(out, "tensorboard", path.name)
            storage.write_bytes(target, path.read_bytes())
