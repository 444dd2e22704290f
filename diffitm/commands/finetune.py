"""Tune a diffusion model for matching: from rows with negatives to LoRA weights, on Ray Train."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from diffitm.commands import grounding, tuning
from diffitm.commands.tuning import TRAIN, Listener, Plan, Trained, Tuning, captioned, common
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import record
from diffitm.distributed.monitor import Line
from diffitm.distributed.trainer import hand_over, settings_of
from diffitm.models.dpt_file import LORA, check_adapter, find_adapter, shape_of, unet_settings
from diffitm.models.dpt_file import NAME as ADAPTER_FILE
from diffitm.models.families import FAMILIES
from diffitm.models.loading import ModelSource, check_config_used, resolve
from diffitm.models.lora import save_lora
from diffitm.models.model_check import check_loadable
from diffitm.training.dpt.expressions import StoredExpressions
from diffitm.training.dpt.options import DPT
from diffitm.training.dpt.weights import save_weights
from diffitm.training.job import DenoiserJob, DptJob, LoraJob, Validation
from diffitm.training.lora.options import (
    FinetuneConfig,
    find_problems,
    negatives_of,
    objective_of,
)
from diffitm.training.row_table import RowsFile, StoredRows
from diffitm.training.rows import (
    drop_equal,
    images_of,
    read_rows,
    summarise_dropped,
    texts_of,
    usable,
)
from diffitm.training.run_folder import write_result

log = logging.getLogger("diffitm")
VALID = "coco_neg/valid_neg_clip.tsv"
TASKS = ("coco_neg_text", "coco_neg_image")


def run(config: FinetuneConfig, listen: Listener | None = None) -> None:
    """Train, and write OUT/pytorch_lora_weights.safetensors, of DPT its adapter. `listen` gets every line of
    the log.

    Raises InputError for bad input, before anything is trained where that is possible; Incomplete at
    the end if images could not be read.
    """
    tuning.run(config, DPT_TUNING if config.objective == DPT else TUNING, listen)


def _write(config: FinetuneConfig, trained: Trained[DenoiserJob], out: str) -> None:
    """The weights, the log and what was lost; how they compare is told."""
    job, name, option = trained.job, LORA, "--lora"
    save: Callable[..., None] = functools.partial(save_lora, rank=job.rank)
    if isinstance(job, DptJob):
        save = functools.partial(save_weights, map=job.map, rank=job.rank)
        name, option = ADAPTER_FILE, "--dpt"
    with trained.result.checkpoint.as_directory() as folder:
        provenance = record(asdict(config))
        ended = write_result(
            Path(folder), save, trained.settings, trained.state, provenance, trained.lost, out
        )
    if job.validation is not None:
        means = (100 * ended["best"], 100 * ended["base"])
        text = "best at update %d: %.1f%% on validation, before training %.1f%%"
        log.info(text, ended["best_step"], *means)
    weights = storage.join(out, name)
    print(f"weights {weights}")
    if "://" not in out:
        command = ["--model", config.model, option, "none", weights]
        if config.data != "shapes" and (valid := _data(config, out)[2]) is not None:
            command += ["--data", valid, "--tasks", *TASKS]
        print(f"compare diffitm gdbench {shlex.join(command)}")


def build_plan(config: FinetuneConfig) -> Plan[DenoiserJob]:
    """What a run trains.

    Raises InputError for bad input.
    """
    out = storage.absolute(config.out)
    source = resolve(
        config.model, variant=config.variant, single_file_config=config.single_file_config
    )
    check_config_used(config.single_file_config, source)
    rows_file, root, valid = _data(config, out)
    found, unusable = read_rows(rows_file)
    rows, equal = drop_equal(found)
    if equal:
        log.warning("%s: left out %s negatives that equal their row's own", rows_file, f"{equal:,}")
    negatives = negatives_of(config)
    kept, lost = usable(rows, negatives, rows_file)
    if lost:
        log.warning("%s: left out %s", rows_file, summarise_dropped(lost))
    said = None
    if config.grounding is not None:
        said = grounding.read(config, root, {rows[position].image for position in kept})

    from diffitm.commands.weights import share
    from diffitm.distributed import session
    from diffitm.models.text_limits import tell_long_texts

    session.connect(config.ray, verbose=config.verbose)
    source = share(source, storage.join(storage.parent(out), "work"))
    source = check_loadable(source, variant=config.variant)
    tell_long_texts(source, texts_of([rows[position] for position in kept]))
    file = hand_over(out, rows, kept)
    job = _job(config, source, negatives, file, root, valid, session.gpus())
    if said is not None and isinstance(job, DptJob):
        job = replace(job, grounding=grounding.handed_over(said, config, job, out))
    settings = settings_of(
        config, pipeline="finetune.py", weights=source.digest, rows=file.digest, dtype=job.dtype
    )
    if isinstance(job, DptJob) and job.adapter is not None:
        settings["adapter_digest"] = job.adapter.digest
    if isinstance(job, DptJob) and job.grounding is not None:
        settings["grounding_digest"] = job.grounding.file.digest
    return Plan(job, settings, unusable)


def _data(config: FinetuneConfig, out: str) -> tuple[str, str, str | None]:
    """The file of rows, where its images start, and the root that is validated on."""
    file, root = captioned(config.data, config.images, config.scenes, out)
    known = None
    if file == storage.join(root, TRAIN) and storage.exists(storage.join(root, VALID)):
        known = root
    return file, root, config.validation_data or known


def _job(
    config: FinetuneConfig,
    source: ModelSource,
    negatives: str,
    rows: RowsFile,
    root: str,
    valid: str | None,
    gpus: float,
) -> DenoiserJob:
    """The settings that travel to the workers. Raises InputError where rows are too few, DPT does not fit."""
    shared = common(config, source, rows, config.batch_size, gpus)
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
    shared |= {
        "root": root,
        "resize": config.resize,
        "negatives": negatives,
        "per_example": config.draw_negatives == "example",
        "optimizer": "adamw",
        "rank": config.rank,
        "ema": config.ema,
        "validation": validation,
        "latents": None,
        "texts": None,
    }
    if config.objective != DPT:
        flow = FAMILIES[source.family].flow
        return LoraJob(**shared, objective=objective_of(config).fitted(flow))
    adapter = None
    if config.stage == "tune":
        adapter = find_adapter(config.adapter or "", "adapter")
        check_adapter(adapter, source, "adapter")
    elif (settings := unet_settings(source)) is not None:
        shape_of(settings, config.feature_map, "feature_map")
    map = adapter.shape.map if adapter else config.feature_map
    return DptJob(**shared, map=map, adapter=adapter, trains_adapter=config.train_adapter)


def encoded(job: DenoiserJob, out: str) -> DenoiserJob:
    """The job with its images and texts encoded beforehand."""
    from diffitm.commands.stages.encode import Encoder, encode
    from diffitm.distributed import session

    pool = session.choose_pool(None, None, None, None)
    encoder = Encoder(job.source, job.variant, job.dtype, job.root, job.resize)
    rows = StoredRows(job.rows)
    texts = texts_of(rows)
    if isinstance(job, DptJob) and job.grounding is not None:
        said = StoredExpressions(job.grounding.file)
        texts = sorted({*texts, *(one.caption for one in said)})
    return replace(
        job,
        latents=encode(out, "image", images_of(rows), encoder, pool),
        texts=encode(out, "text", texts, encoder, pool),
    )


def _describe(line: Line) -> str:
    values = (line["loss"], line["right"], line["contrast"], 100 * line["held"])
    return "loss {:.4f}, E+ {:.4f}, E- {:.4f}, {:.0f}% held".format(*values)


def _describe_dpt(line: Line) -> str:
    values = (line["loss"], 100 * line["right_texts"], 100 * line["right_images"])
    text = "loss {:.4f}, right texts {:.0f}%, right images {:.0f}%".format(*values)
    if "of_l1" in line:
        text += ", boxes' L1 {of_l1:.4f}, GIoU {of_giou:.4f}".format(**line)
    return text + (f", error {line['error']:.4f}" if "error" in line else "")


TUNING = Tuning(
    loop="diffitm.commands.workers.lora",
    read=("model", "single_file_config", "data", "images", "validation_data", "adapter"),
    find_problems=find_problems,
    plan=build_plan,
    encode=encoded,
    describe=_describe,
    write=_write,
)
DPT_TUNING = TUNING._replace(loop="diffitm.commands.workers.dpt", describe=_describe_dpt)
