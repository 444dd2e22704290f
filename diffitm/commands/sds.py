"""Teach a CLIP by its own contrastive loss and a diffusion model's error (SDS-CLIP), on Ray Train."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from diffitm.commands import tuning
from diffitm.commands.run_record import LOG
from diffitm.commands.tuned_clip import tell_comparison, validation_of, write_clip
from diffitm.commands.tuning import Listener, Plan, Trained, Tuning, captioned, common
from diffitm.core import storage
from diffitm.core.errors import Incomplete
from diffitm.core.provenance import record
from diffitm.distributed.monitor import Line
from diffitm.distributed.trainer import hand_over, settings_of
from diffitm.models.clip import check_clip, resolve_clip
from diffitm.models.loading import check_config_used, resolve
from diffitm.models.model_check import check_loadable
from diffitm.training.diva.options import DivaConfig, find_problems, micro_batch
from diffitm.training.diva.sds import load_norms
from diffitm.training.job import SdsJob
from diffitm.training.rows import read_rows, texts_of, usable
from diffitm.training.run_folder import write_log, write_note

ARO = ("vg_relation", "vg_attribution", "coco_order", "flickr30k_order")
TASKS = ("winoground", *ARO)  # whose accuracy is logged, unless others are asked for
TABLE = "before-after.md"
SCENES, SEED = 100, 201  # of the drawn tasks that are validated on


def run(config: DivaConfig, listen: Listener | None = None) -> None:
    """Train, and write the tuned CLIP to OUT and OUT/transformers; with `control` also the one of a lambda
    of 0, to OUT-control. What the validation found of all is one table in OUT.

    Raises InputError for bad input, before anything is trained where that is possible; Incomplete at
    the end if images could not be read.
    """
    unread: Incomplete | None = None
    arms = [config, *([control_of(config)] if config.control else [])]
    for arm in arms:
        try:
            tuning.run(arm, TUNING, listen)
        except Incomplete as error:
            unread = error
    outs = [storage.absolute(arm.out) for arm in arms]
    if table := before_after({f"lambda {a.lambda_:g}": o for a, o in zip(arms, outs, strict=True)}):
        storage.write_text(storage.join(outs[0], TABLE), table)
        print(table, end="")
    tell_comparison(config, outs, config.validation_tasks or TASKS)
    if unread is not None:
        raise unread


def control_of(config: DivaConfig) -> DivaConfig:
    """The same training with the contrastive loss alone, in a folder beside OUT."""
    return replace(config, lambda_=0.0, control=False, out=f"{config.out.rstrip('/')}-control")


def before_after(outs: dict[str, str]) -> str:
    """Accuracies of the validation, before and after, as Markdown; '' where nothing was validated.
    `outs` are the folders of the trained CLIPs by their names."""
    curves = {}
    for name, out in outs.items():
        logged = map(json.loads, storage.read_text(storage.join(out, LOG)).splitlines())
        curves[name] = [
            found
            for line in logged
            if (found := {k[9:]: v for k, v in line.items() if k.startswith("accuracy/")})
        ]
    first = next(iter(curves.values()))
    if not first:
        return ""
    lines = [
        ["accuracy in % on validation data", "before", *outs],
        ["---", *["---:"] * (1 + len(outs))],
    ]
    for task, before in first[0].items():
        after = (curve[-1][task] for curve in curves.values())
        lines.append([task, *(f"{100 * value:.1f}" for value in (before, *after))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _write(config: DivaConfig, trained: Trained[SdsJob], out: str) -> None:
    """The tuned CLIP, the log and what was lost."""
    with trained.result.checkpoint.as_directory() as folder:
        tell = write_clip(Path(folder), trained.job.clip, load_norms, out)
        write_log(Path(folder), record(asdict(config)), trained.lost, out)
    write_note(out, trained.settings, replace(trained.state, done=True))
    tell()


def build_plan(config: DivaConfig) -> Plan[SdsJob]:
    """What a run trains.

    Raises InputError for bad input.
    """
    out = storage.absolute(config.out)
    teacher = resolve(config.teacher, "teacher", config.variant, config.single_file_config)
    check_config_used(config.single_file_config, teacher)
    clip = resolve_clip(config.clip)

    from diffitm.commands.weights import share
    from diffitm.distributed import session
    from diffitm.models.text_limits import tell_long_texts

    check = validation_of(config, _validation_data(config, out), TASKS)
    file, root = captioned(config.data, None, config.scenes, out)
    rows, lost = read_rows(file)
    kept, _ = usable(rows, "none", file)
    session.connect(config.ray, verbose=config.verbose)
    work = storage.join(storage.parent(out), "work")
    teacher, clip = share(teacher, work), share(clip, work)
    teacher = check_loadable(teacher, variant=config.variant)
    check_clip(clip)
    for source in (teacher, clip):
        tell_long_texts(source, texts_of([rows[position] for position in kept]))
    stored = hand_over(out, rows, kept)
    job = SdsJob(
        **common(config, teacher, stored, micro_batch(config), session.gpus()),
        root=root,
        optimizer=config.optimizer,
        validation=check,
        latents=None,
        clip=clip,
        projection_lr=config.projection_lr or config.lr,
        weight=config.lambda_,
        jacobian=config.jacobian,
    )
    settings = settings_of(
        config,
        pipeline="diva.py",
        teacher_weights=teacher.digest,
        clip_weights=clip.digest,
        rows=stored.digest,
        dtype=job.dtype,
    )
    return Plan(job, settings, lost)


def _validation_data(config: DivaConfig, out: str) -> str | None:
    """The root that is validated on; drawn scenes for drawn scenes."""
    if config.validation_data:
        return storage.absolute(config.validation_data)
    if config.data != "shapes" or not config.validate_every:
        return None
    from diffitm.shapes.layouts import write_world

    root = storage.join(storage.parent(out), "work", f"validation-{SCENES}")
    write_world(root, SCENES, seed=SEED)
    return root


def _describe(line: Line) -> str:
    more = "".join(f", {k} {line[k]:.4f}" for k in ("contrast", "denoising") if k in line)
    return f"loss {line['loss']:.4f}{more}, gradient {line['norm']:.3f}"


TUNING = Tuning(
    loop="diffitm.commands.workers.sds",
    read=("teacher", "single_file_config", "clip", "data", "validation_data"),
    find_problems=find_problems,
    plan=build_plan,
    encode=None,
    describe=_describe,
    write=_write,
)
