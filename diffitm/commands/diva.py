"""Teach a CLIP to see detail (DIVA): from images to a tuned CLIP, on Ray Train."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.captions.read import image_root
from diffitm.captions.shards import is_webdataset, shards
from diffitm.commands import sds, tuning
from diffitm.commands.tuned_clip import tell_comparison, validation_of, write_clip
from diffitm.commands.tuning import Listener, Plan, Trained, Tuning, common, drawn
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint, record
from diffitm.distributed.monitor import Line
from diffitm.distributed.trainer import hand_over, settings_of
from diffitm.models.clip import ClipSource, check_clip, resolve_clip
from diffitm.models.loading import ModelSource, check_config_used, resolve
from diffitm.models.model_check import check_loadable
from diffitm.training.diva.options import DivaConfig, find_problems, micro_batch
from diffitm.training.diva.recap import parse_recap
from diffitm.training.diva.step import load_tower
from diffitm.training.image_pool import Paths, in_shard, read_images, split
from diffitm.training.job import DivaJob, Validation
from diffitm.training.row_table import RowsFile, StoredRows
from diffitm.training.run_folder import write_log, write_note

log = logging.getLogger("diffitm")
Lost = dict[str, int]
TASKS = ("mmvp_vlm",)  # whose accuracy is logged, unless others are asked for
LISTING = 3  # grows when the same shards would be listed otherwise
LISTED = pa.schema(
    [("shard", pa.string()), ("found", pa.list_(pa.string())), ("lost", pa.list_(pa.string()))]
)


def run(config: DivaConfig, listen: Listener | None = None) -> None:
    """Train, and write the tuned CLIP to OUT and OUT/transformers. `listen` gets every line of the log.

    Raises InputError for bad input, before anything is trained where that is possible; Incomplete at
    the end if images or shards could not be read.
    """
    if config.objective == "sds-clip":
        sds.run(config, listen)
    else:
        tuning.run(config, TUNING, listen)


def _write(config: DivaConfig, trained: Trained[DivaJob], out: str) -> None:
    """The tuned CLIP, the log and what was lost; how they compare is told."""
    job = trained.job
    with trained.result.checkpoint.as_directory() as folder:
        tell = write_clip(Path(folder), job.clip, load_tower, out)
        progress = write_log(Path(folder), record(asdict(config)), trained.lost, out)
    write_note(out, trained.settings, replace(trained.state, done=True))
    _tell(progress["history"])
    tell()
    tell_comparison(config, [out])


def build_plan(config: DivaConfig) -> Plan[Any]:
    """What a run trains, for either objective.

    Raises InputError for bad input.
    """
    if config.objective == "sds-clip":
        return sds.build_plan(config)
    out = storage.absolute(config.out)
    teacher = resolve(config.teacher, "teacher", config.variant, config.single_file_config)
    check_config_used(config.single_file_config, teacher)
    clip = resolve_clip(config.clip)

    from diffitm.commands.weights import share
    from diffitm.distributed import session

    root, valid = _roots(config, out)
    check = validation_of(config, valid, TASKS)
    given, lost = storage.absolute(config.data), Lost()
    paths = list[str]()
    if not is_webdataset(given):
        paths, lost = read_images(root if config.data == "shapes" else given)
    session.connect(config.ray, verbose=config.verbose)
    work = storage.join(storage.parent(out), "work")
    teacher, clip = share(teacher, work), share(clip, work)
    teacher = check_loadable(teacher, variant=config.variant)
    check_clip(clip)
    if is_webdataset(given):
        paths, lost = _in_shards(shards(given), out)
    trained, held = split(paths, config.max_images, config.held_out)
    rows = hand_over(out, Paths(trained), range(len(trained)))
    job = _job(config, teacher, clip, root, rows, held, check, session.gpus())
    settings = settings_of(
        config,
        pipeline="diva.py",
        teacher_weights=teacher.digest,
        clip_weights=clip.digest,
        images=fingerprint([trained, held]),
        dtype=job.dtype,
    )
    return Plan(job, settings, lost)


def _roots(config: DivaConfig, out: str) -> tuple[str, str | None]:
    """Where images start, and the root that is validated on."""
    valid = storage.absolute(config.validation_data) if config.validation_data else None
    if config.data == "shapes":
        return storage.join(drawn(config.scenes, out), "coco", "train"), valid
    given = storage.absolute(config.data)
    return image_root(given, None), valid


def _in_shards(names: list[str], out: str) -> tuple[list[str], Lost]:
    """What the shards hold, and what of them could not be used; listed once for runs beside
    each other. Raises InputError if they hold no image."""
    from diffitm.distributed.item_stage import work_folder

    state = {
        "version": LISTING,
        "shards": [storage.without_query(name) for name in names],
        "files": storage.versions(names),
    }
    file = storage.join(work_folder(out, "listing", state), "listing.parquet")
    if not storage.exists(file):
        sink = pa.BufferOutputStream()
        parquet.write_table(_list_shards(names), sink)
        storage.write_bytes(file, sink.getvalue().to_pybytes())
    found, path = storage.filesystem(file)
    lines = parquet.read_table(path, filesystem=found).to_pylist()
    lost = dict(Counter(reason for line in lines for reason in line["lost"]))
    if lost:
        text = "--data: left out %s samples or ends of shards; %s"
        log.warning(text, f"{sum(lost.values()):,}", next(iter(lost)))
    references = [reference for line in lines for reference in line["found"]]
    if not references:
        raise InputError(f"--data: {names[0]} and the other shards hold no image")
    return references, lost


def _list_shards(names: list[str]) -> pa.Table:
    """A row a shard, each by a task of Ray Data."""
    import ray.data

    def listed(table: pa.Table) -> pa.Table:
        lines = [(shard, *in_shard(shard)) for shard in table["shard"].to_pylist()]
        columns = zip(*lines, strict=True)
        return pa.table(dict(zip(("shard", "found", "lost"), columns, strict=True)), LISTED)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = ray.data.from_arrow(pa.table({"shard": names})).repartition(len(names))
    lines = blocks.map_batches(listed, batch_size=None, batch_format="pyarrow").take_all()
    return pa.Table.from_pylist(sorted(lines, key=lambda line: line["shard"]), LISTED)


def _job(
    config: DivaConfig,
    teacher: ModelSource,
    clip: ClipSource,
    root: str,
    rows: RowsFile,
    held: list[str],
    check: Validation | None,
    gpus: float,
) -> DivaJob:
    """The settings that travel to the workers. Raises InputError where images are too few."""
    shared = common(config, teacher, rows, micro_batch(config), gpus, "images")
    steps = shared["steps"]
    if config.projection_steps >= steps:
        raise InputError(
            f"--projection-steps {config.projection_steps}: leaves CLIP none of the {steps} updates"
        )
    return DivaJob(
        **shared,
        root=root,
        optimizer=config.optimizer,
        validation=check,
        latents=None,
        clip=clip,
        projection_lr=config.projection_lr or config.lr,
        projection_steps=config.projection_steps,
        recap=parse_recap(config.recap),
        prompt=config.prompt,
        add=config.add_prompt,
        repeats=config.repeats,
        reduce=config.repeats_reduce,
        crop_scale=config.crop_scale,
        held_out=held,
        measure_every=config.measure_every,
    )


def _try(job: DivaJob, device: str) -> None:
    """On a worker: whether CLIP, teacher, recap and text fit, before hours go into latents."""
    from diffitm.commands.workers.diva import build

    build(job, device)


def encoded(job: DivaJob, out: str) -> DivaJob:
    """The job with its images encoded for the teacher beforehand."""
    from diffitm.commands.stages.encode import Encoder, encode
    from diffitm.distributed import session

    pool = session.choose_pool(None, None, None, None)
    encoder = Encoder(job.source, job.variant, job.dtype, job.root, "squash")
    images = sorted(row.image for row in StoredRows(job.rows))
    first = partial(session.ask, pool.cpus, pool.gpus, _try, job, pool.device)
    return replace(job, latents=encode(out, "image", images, encoder, pool, first))


def _tell(history: list[Line]) -> None:
    """What the teacher made of held-out images."""
    errors = [line["reconstruction"] for line in history if "reconstruction" in line]
    blind = [e for line in history if (e := line.get("reconstruction_without_tokens")) is not None]
    if errors:
        text = "reconstruction error of held-out images: %.4f at first, %.4f now%s"
        without = f"; {blind[0]:.4f} without tokens" if blind else ""
        log.info(text, errors[0], errors[-1], without)


def _describe(line: Line) -> str:
    return f"loss {line['loss']:.4f}, gradient {line['norm']:.3f}"


TUNING = Tuning(
    loop="diffitm.commands.workers.diva",
    read=("teacher", "single_file_config", "clip", "data", "validation_data"),
    find_problems=find_problems,
    plan=build_plan,
    encode=encoded,
    describe=_describe,
    write=_write,
)
