"""Evaluate models on GDBench, from the data folder to the report."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from diffitm.commands.entrance import entered
from diffitm.commands.run_record import (
    LOG,
    RunArtifacts,
    log_of,
    read_curves,
    read_images,
    read_pictures,
)
from diffitm.commands.stages.probe import add_probes, find_probes
from diffitm.core import storage
from diffitm.core.config import OnRay, option
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.evaluation.evaluate import evaluate, present, speeds, titles, write_results
from diffitm.models.loading import ModelSource, check_loadable, resolve
from diffitm.models.lora import locate, lora_file, unpinned
from diffitm.report.html import write_report
from diffitm.report.table import latex, make_table, markdown
from diffitm.report.terminal import print_results, print_state, print_summary
from diffitm.scoring.noise_plan import plan_timesteps
from diffitm.scoring.specs import ClipSpec, DiffusionSpec, Spec
from diffitm.store import pair_table
from diffitm.store.run_summary import Done, write_summary
from diffitm.store.score_store import Store, open_store, read_store
from diffitm.store.work_table import finish, open_work
from diffitm.tasks.check import check
from diffitm.tasks.registry import TASKS, find_task
from diffitm.training.run_folder import PICTURES

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool
    from diffitm.models.clip import ClipSource

log = logging.getLogger("diffitm")


WORLD = "world.json"  # what marks a data root of drawn scenes
TRAINED = 1000  # timesteps that diffusion models are trained with, and slices of the noise table
MOST = 2**63  # what a generator takes as a seed, and far beyond any sane number


class Examples(NamedTuple):
    """A task's examples as written: the file, and what identifies its content."""

    uri: str
    identity: str


class Prepared(NamedTuple):
    """What a run scores with and on: the data root, a task's examples, models and their stores."""

    out: str
    root: str
    examples: dict[str, Examples]
    specs: list[Spec]
    stores: list[Store]
    pool: ActorPool

    @property
    def files(self) -> dict[str, str]:
        """Task -> its examples file."""
        return {name: found.uri for name, found in self.examples.items()}


@dataclass(frozen=True)
class GdbenchConfig(OnRay):
    """Options of pipelines/gdbench.py."""

    model: list[str] = option(
        [], "diffusion models: shapes, a diffusers folder (or URI of one) or a Hub id"
    )
    clip: list[str] = option(
        [], "CLIP baselines: shapes, NAME:TAG, NAME:FILE or a folder, or their URIs"
    )
    tasks: list[str] = option(
        ["all"], "which tasks: names, package.module:Class or file.py:Class of your own"
    )
    data: str = option("shapes", "data root with a folder a task; shapes draws the embedded world")
    out: str = option("out/gdbench", "folder or URI for scores, results and the report")
    protocol: Literal["diffusionitm", "paper", "diffusion-classifier"] = option(
        "diffusionitm", "how timesteps and noise are chosen"
    )
    timesteps: list[int] = option(
        [10], "how many timesteps to ask the protocol for; several are compared"
    )
    timestep_list: list[int] = option(
        [], "these timesteps instead of the protocol's, such as a sweep's best"
    )
    timestep_weights: list[float] = option(
        [],
        "their weights in a score, such as those that a sweep has learned (default: all the same)",
    )
    seed: int = option(0, "seed of the noise (and of the timesteps of 'paper')")
    error: Literal["auto", "l2", "mse", "l1", "huber"] = option(
        "auto", "error that is averaged; auto: l2 norm for diffusionitm, mse otherwise"
    )
    resize: Literal["auto", "squash", "crop"] = option(
        "auto", "squash to a square, or crop the centre; auto: crop for diffusion-classifier"
    )
    latents: Literal["mean", "sample"] = option("mean", "posterior mean, or one seeded sample")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: fp16 on a GPU, else fp32"
    )
    variant: str | None = option(None, "weights variant, such as fp16, of a diffusers folder")
    lora: list[str] = option(
        [],
        "LoRA files or URIs for the diffusion models' U-Net, each a model of its own; none is the base",
    )
    prompts: list[str] = option(
        [], "texts that every diffusion model generates images of, from the same seeds"
    )
    samples: int = option(4, "images of a prompt")
    sampling_steps: int = option(25, "steps of DPM-Solver++ for an image")
    guidance: float = option(7.5, "classifier-free guidance of the images")
    segmentation: str | None = option(
        None,
        "shapes or a folder with train/ and val/: a linear probe of every CLIP's patch features",
    )
    clip_benchmark: list[str] = option(
        [], "data sets of the clip-benchmark package that every CLIP is measured on"
    )
    clip_benchmark_root: str = option("data/clip-benchmark", "where that package keeps them")
    mllm: str | None = option(
        None, "file.py:function of yours that measures a vision tower in a multimodal LLM"
    )
    limit: int | None = option(None, "at most this many examples a task, evenly spread")
    scenes: int = option(100, "scenes that --data shapes draws")
    batch_size: int = option(64, "forwards of the model in one batch")
    actors: int | None = option(None, "scoring actors (default: one a GPU, else one a processor)")
    max_actors: int | None = option(None, "let the pool grow to this many")
    cpus_per_actor: float | None = option(
        None, "processors (and threads) of an actor (default: 1, less on a tiny cluster)"
    )
    gpus_per_actor: float | None = option(
        None, "GPU share of an actor (default: 1 if there are any)"
    )
    published_bias: bool = option(
        False, "also show mmbias as the published code pools two of its pairs"
    )
    check: bool = option(
        False, "say which tasks DATA has, with all their images, and score nothing"
    )
    report_only: bool = option(False, "recompute everything from OUT's scores, without a model")


def run(config: GdbenchConfig) -> None:
    """Score what is missing, then write results.json, provenance, failures and the report.

    Raises InputError for bad input before anything is scored, Incomplete at the end if examples could
    not be scored.
    """
    out = storage.absolute(config.out)
    if config.report_only:
        _report_again(config, out)
        return
    if config.check:
        _print_check(config, out)
        return
    _check(config)
    with entered(config, out, _read(config)):
        _run(config, out)


def _read(config: GdbenchConfig) -> list[tuple[str, str | None]]:
    """Options whose paths the actors read."""
    names = {"--model": config.model, "--lora": config.lora, "--clip": config.clip}
    found = [(option, name) for option, values in names.items() for name in values]
    files = [("--clip", name.partition(":")[2]) for name in config.clip]
    return [("--data", config.data), *found, *files, ("--segmentation", config.segmentation)]


def _run(config: GdbenchConfig, out: str) -> None:
    """See run, with OUT held."""
    ready = prepare(config)
    root, examples, specs, stores = ready.root, ready.examples, ready.specs, ready.stores
    clips = [spec.source for spec in specs if isinstance(spec, ClipSpec)]

    from diffitm.commands.stages.probe import probe
    from diffitm.commands.stages.sample import Sampling, sample, samples_folder

    probes = find_probes(
        config.segmentation, config.scenes, config.clip_benchmark, config.clip_benchmark_root,
        config.mllm, out,
    )  # fmt: skip
    provenance = record(asdict(config)) | {"stores": {s.name: s.config for s in stores}}
    drawn = storage.exists(storage.join(root, WORLD))
    diffusion = {_label(spec): spec for spec in specs if isinstance(spec, DiffusionSpec)}
    how = Sampling(config.samples, config.sampling_steps, config.guidance)
    prompts = list(dict.fromkeys(config.prompts))
    beside = RunArtifacts(
        {n: samples_folder(s, prompts, how) for n, s in diffusion.items()} if prompts else {},
        {n: log_of(unpinned(s.lora)) for n, s in diffusion.items() if s.lora}
        | {f"CLIP {c.name}": storage.join(c.folder, LOG) for c in clips if c.folder},
        {f"CLIP {c.name}": storage.join(c.folder, PICTURES) for c in clips if c.folder},
        {f"CLIP {c.name}": [p.file(c) for p in probes] for c in clips} if probes else {},
    )
    _write_run(out, examples, stores, provenance, root, drawn, beside)
    score_all([ready], out)
    for clip in clips:
        probe(probes, clip, out, ready.pool)
    for name, folder in beside.samples.items():
        sample(storage.join(out, folder), name, diffusion[name], prompts, how, ready.pool)
    _finish(config, out, ready.files, stores, provenance, root, drawn, beside)


def prepare(config: GdbenchConfig) -> Prepared:
    """Everything before scoring: the examples and the stores on disk, Ray and its pool of actors.

    Raises InputError for bad input.
    """
    out = storage.absolute(config.out)
    timesteps = _check(config)
    sources = [resolve(name) for name in dict.fromkeys(config.model)]
    clips = _clip_sources(config.clip)
    root = _data_root(config, out)
    examples = _write_examples(config, root, out)

    from diffitm.commands.weights import share
    from diffitm.distributed import session

    session.connect(config.ray, verbose=config.verbose)
    pool = session.choose_pool(
        config.actors, config.max_actors, config.cpus_per_actor, config.gpus_per_actor
    )
    work = storage.join(out, "work")
    sources = [share(source, work, config.variant) for source in sources]
    clips = [share(source, work) for source in clips]
    for source in sources:  # before a GPU is asked for
        check_loadable(source, [locate(name) for name in _loras(config) if name])
    dtype = config.dtype if config.dtype != "auto" else ("fp16" if pool.gpus else "fp32")
    specs: list[Spec] = [
        _diffusion(config, source, lora, root, steps, dtype)
        for source in sources
        for lora in _loras(config)
        for steps in timesteps
    ]
    specs += [ClipSpec(source, root, config.batch_size) for source in clips]
    stores = [open_store(out, _label(spec), spec.store_config()) for spec in specs]
    return Prepared(out, root, examples, specs, stores, pool)


def score_all(prepared: Sequence[Prepared], out: str) -> int:
    """Score the pairs that the stores lack and tell what that took, also in OUT/summary.json; how many
    forwards."""
    done = [
        _score(spec, store, list(ready.examples.values()), ready.out, ready.pool)
        for ready in prepared
        for spec, store in zip(ready.specs, ready.stores, strict=True)
    ]
    names = titles([store for ready in prepared for store in ready.stores])
    print_summary(write_summary(names, done, out))
    return sum(part.forwards for part in done)


def _loras(config: GdbenchConfig) -> list[str | None]:
    """Each --lora once; without any, or for 'none', the base model."""
    return [None if name == "none" else name for name in dict.fromkeys(config.lora or ["none"])]


def _diffusion(
    config: GdbenchConfig,
    source: ModelSource,
    lora: str | None,
    root: str,
    timesteps: tuple[int, ...],
    dtype: str,
) -> DiffusionSpec:
    resize = config.resize
    if resize == "auto":
        resize = "crop" if config.protocol == "diffusion-classifier" else "squash"
    return DiffusionSpec(
        source=source,
        root=root,
        protocol=config.protocol,
        timesteps=timesteps,
        seed=config.seed,
        dtype=dtype,
        resize=resize,
        latent_seed=config.seed if config.latents == "sample" else None,
        variant=config.variant,
        lora=locate(lora) if lora else None,
        lora_name=storage.identity(lora) if lora else None,
        batch_size=config.batch_size,
    )


def _label(spec: Spec) -> str:
    """The model's name in tables: with its LoRA file as typed, and CLIP marked as such."""
    if isinstance(spec, ClipSpec):
        return f"CLIP {spec.source.name}"
    return spec.source.name + (f" + {spec.lora_name}" if spec.lora_name else "")


def _task_names(config: GdbenchConfig) -> list[str]:
    """The chosen tasks, each once; 'all' stands for every task of ours."""
    named = [TASKS if name == "all" else [name] for name in config.tasks]
    return list(dict.fromkeys(itertools.chain.from_iterable(named)))


def _check(config: GdbenchConfig) -> list[tuple[int, ...]]:
    """All problems of the options together; the timesteps really used, for each --timesteps."""
    problems = []
    if not config.model and not config.clip:
        problems.append("give at least one --model or --clip (shapes is the embedded default)")
    if not config.clip and (config.segmentation or config.clip_benchmark or config.mllm):
        problems.append("--segmentation, --clip-benchmark and --mllm measure CLIPs: give a --clip")
    problems += _task_problems(config)
    least = {"batch_size": 1, "limit": 1, "scenes": 10, "seed": 0, "actors": 1, "max_actors": 1}
    least |= {"cpus_per_actor": 0, "gpus_per_actor": 0, "samples": 1, "sampling_steps": 1}
    for key, bound in least.items():
        value = getattr(config, key)
        if value is not None and not bound <= value < MOST:
            problems.append(f"--{key.replace('_', '-')} {value}: must be at least {bound}")
    for lora in _loras(config):
        try:
            _ = lora and lora_file(lora)
        except InputError as error:
            problems.append(str(error))
    problems += _list_problems(config)
    timesteps = {}
    for count in config.timesteps:
        try:
            timesteps[tuple(plan_timesteps(config.protocol, count, config.seed))] = count
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return [tuple(config.timestep_list)] if config.timestep_list else list(timesteps)


def _list_problems(config: GdbenchConfig) -> list[str]:
    """What is wrong with --timestep-list and --timestep-weights."""
    listed, weights = config.timestep_list, config.timestep_weights
    found = [
        f"--timestep-list {step}: must be 0 to {TRAINED - 1}"
        for step in listed
        if not 0 <= step < TRAINED
    ]
    if len(listed) > TRAINED:
        found.append(f"--timestep-list: {len(listed)} are too many, at most {TRAINED}")
    if weights and len(weights) != len(listed):
        found.append(
            f"--timestep-weights: {len(weights)} for {len(listed)} of --timestep-list; give one each"
        )
    if weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        found.append("--timestep-weights: must be 0 or more, and not all of them 0")
    return found


def _task_problems(config: GdbenchConfig) -> list[str]:
    """Tasks that cannot be found, and two of the same name."""
    problems, seen = [], set()
    for name in _task_names(config):
        try:
            task = find_task(name)
        except InputError as error:
            problems.append(str(error))
            continue
        if task.name in seen:
            problems.append(f"two tasks have the name {task.name!r}; rename yours ({name})")
        seen.add(task.name)
    return problems


def _clip_sources(names: list[str]) -> list[ClipSource]:
    if not names:
        return []
    from diffitm.models.clip import resolve_clip

    return [resolve_clip(name) for name in dict.fromkeys(names)]


def _data_root(config: GdbenchConfig, out: str) -> str:
    if config.data != "shapes":
        root = storage.absolute(config.data)
        if not storage.exists(root):
            raise InputError(f"--data: there is no folder {root}")
        return root
    from diffitm.shapes.layouts import VERSION, write_world

    root = storage.join(out, f"shapes-{config.scenes}-v{VERSION}")
    write_world(root, config.scenes)
    return root


def _write_examples(config: GdbenchConfig, root: str, out: str) -> dict[str, Examples]:
    """The examples of every task. Raises InputError with all that is missing."""
    found, problems = {}, []
    for name in _task_names(config):
        task = find_task(name)()
        folder = storage.join(out, "examples")
        try:
            uri, count = pair_table.write_examples(
                task.name, task.examples(root), folder, config.limit
            )
        except InputError as error:
            problems.append(str(error))
            continue
        absent = present(root, uri) if count else None
        if count == 0:
            where = storage.join(root, task.folder)
            problems.append(f"task {task.name}: its files below {where} hold no example")
        elif absent is not None:
            problems.append(
                f"task {task.name} needs its images, such as {absent} (from {task.source})"
            )
        else:
            log.info("%s: %s examples", task.name, f"{count:,}")
            found[name] = Examples(uri, f"{task.version}-{storage.identity(uri)}")
    if problems:
        hint = "--check tells what DATA has, --tasks chooses, prepare.py fetches"
        raise InputError("\n".join([*problems, hint]))
    return found


def _print_check(config: GdbenchConfig, out: str) -> None:
    """--check: the state of every chosen task. Raises InputError if one cannot run."""
    problems = _task_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    root = _data_root(config, out)
    states = []
    for name in _task_names(config):
        states.append(check(find_task(name)(), root))
        print_state(states[-1])
    lacking = [state.task for state in states if not state.can_run]
    if lacking:
        raise InputError(f"{len(lacking)} of {len(states)} tasks cannot run: {', '.join(lacking)}")
    print(f"all {len(states)} tasks can run")


def _score(spec: Spec, store: Store, examples: list[Examples], out: str, pool: ActorPool) -> Done:
    """Score the pairs that the store lacks; an interrupted run of the same examples goes on."""
    from diffitm.commands.stages.score import score

    work = open_work(out, store, [e.uri for e in examples], [e.identity for e in examples])
    if work.rows_left == 0:
        log.info("%s: every pair is scored already, 0 forwards needed", store.model)
        return Done()
    if work.resumed:
        finished = f"{work.table.pairs - work.pairs_left:,} of {work.table.pairs:,}"
        log.info("%s: going on where it stopped, %s pairs done", store.model, finished)
    unit = "similarities" if store.is_clip else f"U-Net forwards ({spec.cost} timesteps)"
    needed = f"{work.pairs_left:,} pairs of {work.rows_left:,} images need"
    log.info("%s: %s %s %s", store.model, needed, f"{work.pairs_left * spec.cost:,}", unit)
    done = score(spec, work, store, pool)
    finish(work, done)
    made = f"{done.pairs:,} pairs, {done.forwards:,} forwards done, {done.failures:,} pairs failed"
    log.info("%s: %s", store.model, made)
    return done


def _write_run(
    out: str,
    examples: dict[str, Examples],
    stores: list[Store],
    provenance: dict[str, Any],
    root: str,
    drawn: bool,
    beside: RunArtifacts,
) -> None:
    """What --report-only needs to find; from here on it reports on this run."""
    files = {name: storage.name(found.uri) for name, found in examples.items()}
    run = {
        "examples": files,
        "stores": [store.name for store in stores],
        # Below OUT it moves with OUT.
        "root": storage.below(root, out),
        "drawn": drawn,
        **beside.noted(),
        "provenance": provenance,
    }
    storage.write_text(storage.join(out, "run.json"), json.dumps(run, indent=2))


def _report_again(config: GdbenchConfig, out: str) -> None:
    """--report-only: the last run's examples and stores, with the chosen tasks and error."""
    path = storage.join(out, "run.json")
    try:
        run = json.loads(storage.read_text(path))
    except FileNotFoundError:
        raise InputError(f"--report-only: {out} holds no run; give the --out of one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--report-only: {path} cannot be read: {error}") from error
    tasks = list(run["examples"]) if config.tasks == ["all"] else _task_names(config)
    lacking = sorted(set(tasks) - set(run["examples"]))
    if lacking:
        raise InputError(f"--report-only: {out} holds no examples of {', '.join(lacking)}")
    examples = {name: storage.join(out, "examples", run["examples"][name]) for name in tasks}
    stores = [read_store(storage.join(out, "scores", name)) for name in run["stores"]]
    if not config.timestep_weights:
        weights = run["provenance"]["config"].get("timestep_weights", [])
        config = replace(config, timestep_weights=weights)
    provenance = run["provenance"] | {"report": record(asdict(config))}
    root = run["root"]
    below = "://" not in root and not root.startswith("/")
    _finish(
        *(config, out, examples, stores, provenance),
        root=storage.join(out, root) if below else root,
        drawn=run["drawn"],
        beside=RunArtifacts(*(run.get(name, {}) for name in RunArtifacts._fields)),
    )


def _finish(
    config: GdbenchConfig,
    out: str,
    examples: dict[str, str],
    stores: list[Store],
    provenance: dict[str, Any],
    root: str,
    drawn: bool,
    beside: RunArtifacts,
) -> None:
    """Evaluate, write and show. `root` holds the images; `drawn`: they are the shapes world.

    Raises Incomplete at the end if examples could not be scored.
    """
    weights = np.array(config.timestep_weights) if config.timestep_weights else None
    evaluation = evaluate(examples, stores, config.error, weights)
    add_probes(evaluation, out, beside.probes)
    evaluation.speeds = speeds(out, stores)
    table = make_table(evaluation, not drawn, config.published_bias)
    results = write_results(evaluation, provenance, out)
    storage.write_text(storage.join(out, "table.md"), markdown(table))
    storage.write_text(storage.join(out, "table.tex"), latex(table))
    shown = (read_images(out, beside), read_curves(beside), read_pictures(beside))
    report = write_report(evaluation, table, provenance, root, out, *shown)
    print_results(evaluation, table)
    print(f"results  {results}")
    print(f"tables   {storage.join(out, 'table.md')}, table.tex")
    print(f"scores   {storage.join(out, 'scores')}")
    print(f"report   {report}")
    if evaluation.failures:
        count, where = len(evaluation.failures), storage.join(out, "failures.json")
        print(f"failures {where} ({count})")
        raise Incomplete(f"{count:,} examples could not be scored; they are listed in {where}")
