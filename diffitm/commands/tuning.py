"""What finetune.py and diva.py do alike: hold OUT, begin a run there or go on, train to its end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from diffitm.captions.read import image_root
from diffitm.captions.shards import is_webdataset
from diffitm.captions.table import is_table
from diffitm.commands.entrance import entered
from diffitm.core import storage
from diffitm.core.errors import InputError, flag
from diffitm.core.provenance import fingerprint
from diffitm.distributed.monitor import Line
from diffitm.distributed.trainer import fit, workers_of
from diffitm.models.loading import ModelSource
from diffitm.training.job import Training
from diffitm.training.row_table import RowsFile
from diffitm.training.run_folder import RunState, check_complete, open_run, release_on_refusal
from diffitm.training.tracking import RunTracker

if TYPE_CHECKING:
    from ray.train import Result

log = logging.getLogger("diffitm")
J = TypeVar("J", bound=Training)
Listener = Callable[[Line], None]
TRAIN = "coco_neg/train_neg_clip.tsv"  # of a data root, in NegCLIP's layout


class Plan(NamedTuple, Generic[J]):
    """What a run trains: the job, the settings that its weights depend on, and input that is lost
    already (what and why -> how often)."""

    job: J
    settings: dict[str, Any]
    lost: dict[str, int]


class Trained(NamedTuple, Generic[J]):
    """A training at its end: the last checkpoint's result, and all input that was lost."""

    result: Result
    job: J
    settings: dict[str, Any]
    state: RunState
    lost: dict[str, int]


class Tuning(NamedTuple, Generic[J]):
    """What a command has of its own: the module with the workers' loop, options whose paths workers
    read, and its steps. `encode` makes a job's images and texts ready beforehand, if that can be,
    `describe` puts a line of the log into words, `write` leaves the result of a training in its OUT."""

    loop: str
    read: tuple[str, ...]
    find_problems: Callable[[Any], list[str]]
    plan: Callable[[Any], Plan[J]]
    encode: Callable[[J, str], J] | None
    describe: Callable[[Line], str]
    write: Callable[[Any, Trained[J], str], None]


def run(config: Any, tuning: Tuning[J], listen: Listener | None) -> None:
    """Plan, train and write, with OUT held; `listen` gets every line of the log. Where OUT holds the
    result already, that is said.

    Raises InputError for bad input, before anything is trained where that is possible; Incomplete at
    the end if some input could not be read.
    """
    if problems := tuning.find_problems(config):
        raise InputError("\n".join(problems))
    out = storage.absolute(config.out)
    with _held(config, out, tuning.read) if listen is None else contextlib.nullcontext():
        trained = _train(config, tuning, out, listen)
        if trained is not None:
            tuning.write(config, trained, out)
        check_complete(out)


def _held(config: Any, out: str, read: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """OUT for this run alone. A sweep, which listens, holds what its trials write to."""
    paths = [(flag(name), getattr(config, name)) for name in read]
    # What a CLIP's NAME:FILE names.
    paths += [(option, path.partition(":")[2]) for option, path in paths if option == "--clip"]
    return entered(config, out, paths)


def _train(config: Any, tuning: Tuning[J], out: str, listen: Listener | None) -> Trained[J] | None:
    """Run the loop to its end; None where OUT holds the result.

    Raises InputError for what workers find wrong, and for an OUT of another run.
    """
    plan = tuning.plan(config)
    state = open_run(out, plan.settings)
    if state.done:
        log.info("%s holds this run already; give another --out to train again", out)
        return None
    name = fingerprint(plan.settings)[:12]
    with release_on_refusal(out):
        job = plan.job
        if config.cache_latents and tuning.encode is not None:
            job = tuning.encode(job, out)
        tracker = RunTracker(config.track, out, state.key, plan.settings, listen)
        result, unread = fit(
            tuning.loop, job, workers_of(config), name, tracker, out, tuning.describe
        )
    return Trained(result, job, plan.settings, state, plan.lost | unread)


def drawn(scenes: int, out: str) -> str:
    """The data root of drawn scenes, which runs beside each other share."""
    from diffitm.shapes.training import VERSION, write_training

    root = storage.join(storage.parent(out), "work", f"shapes-training-{scenes}-v{VERSION}")
    write_training(root, scenes)
    return root


def captioned(data: str, images: str | None, scenes: int, out: str) -> tuple[str, str]:
    """What --data has rows of captions in, and where their images start."""
    root = drawn(scenes, out) if data == "shapes" else storage.absolute(data)
    file = storage.join(root, TRAIN)
    if data != "shapes" and (is_table(root) or is_webdataset(root) or not storage.exists(file)):
        return root, image_root(root, images)
    return file, root


def common(
    config: Any,
    source: ModelSource,
    rows: RowsFile,
    micro_batch_size: int,
    gpus: float,
    what: str = "usable rows",
) -> dict[str, Any]:
    """What a job takes of the options that both tunings have. Raises InputError where rows are too few."""
    per_epoch = rows.usable // config.effective_batch
    if per_epoch == 0:
        raise InputError(
            f"--effective-batch {config.effective_batch}: there are only {rows.usable:,} {what}"
        )
    on_gpu = gpus > 0 if config.gpus_per_worker is None else config.gpus_per_worker > 0
    same = (
        "variant",
        "lr",
        "warmup_steps",
        "weight_decay",
        "seed",
        "checkpoint_every",
        "log_every",
    )
    return {
        **{name: getattr(config, name) for name in same},
        "source": source,
        "rows": rows,
        "dtype": config.dtype if config.dtype != "auto" else ("bf16" if on_gpu else "fp32"),
        "micro_batch_size": micro_batch_size,
        "grad_accum_steps": config.effective_batch // micro_batch_size,
        "steps": config.steps or max(1, round(config.epochs * per_epoch)),
        "lr_scheduler": config.lr_schedule,
        "max_grad_norm": config.clip_norm,
        "checkpointing": config.gradient_checkpointing,
    }
