"""What scores, from the options: sources found, weights brought to the cluster, specs, the pool of actors."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from diffitm.commands.text_stage import TextPlaces, with_texts
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.options import ModelOptions, dpt_names, lora_names, plans
from diffitm.evaluation.race_table import Races, full_part, write_races
from diffitm.evaluation.races import describe
from diffitm.metrics.score import other_dtype
from diffitm.models.distilled import tell_untrained
from diffitm.models.dpt_file import AdapterFile, check_adapter, find_adapter
from diffitm.models.families import FAMILIES
from diffitm.models.loading import ModelSource, check_config_used, resolve, size_note
from diffitm.models.lora import locate
from diffitm.models.model_check import check_loadable, settled
from diffitm.scoring.custom import CustomSpec, find_scorer
from diffitm.scoring.protocols import choose_protocol
from diffitm.scoring.racing import RacePlan
from diffitm.scoring.specs import ClipSpec, DiffusionSpec, DptSpec, Spec
from diffitm.store.blocks import Cost
from diffitm.store.compaction import tidy
from diffitm.store.pair_table import WorkTable, distinct_texts
from diffitm.store.roots import take_over
from diffitm.store.run_summary import Done
from diffitm.store.score_store import Store, open_store, stores_of
from diffitm.store.work_table import OpenWork, finish, open_pairs, open_work

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool
    from diffitm.models.clip import ClipSource

log = logging.getLogger("diffitm")


class Sources(NamedTuple):
    """Models as they were found, before Ray is started."""

    models: list[ModelSource]
    clips: list[ClipSource]


def find_sources(config: ModelOptions) -> Sources:
    """Raises InputError for a name that means nothing, and for a LoRA that is not there."""
    for lora in filter(None, lora_names(config)):
        locate(lora)
    models = [
        resolve(name, variant=config.variant, single_file_config=config.single_file_config)
        for name in dict.fromkeys(config.model)
    ]
    check_config_used(config.single_file_config, *models)
    for source in models:
        try:
            plans(config, FAMILIES[source.family].flow)
        except InputError as error:
            raise InputError(f"{error.message} ({source.name!r})", error.field) from error
    return Sources(models, _clips(config.clip))


def paths_read(config: ModelOptions) -> list[tuple[str, str | None]]:
    """Options of models whose paths the actors read, each with its value."""
    names = {
        "--model": config.model, "--lora": config.lora, "--dpt": config.dpt, "--clip": config.clip
    }  # fmt: skip
    found: list[tuple[str, str | None]] = [
        (option, name) for option, values in names.items() for name in values
    ]
    found += [("--clip", name.partition(":")[2]) for name in config.clip]
    found += [("--single-file-config", config.single_file_config)]
    return found + [("--scorer", find_scorer(name).file) for name in config.scorer]


def make_specs(
    config: ModelOptions, sources: Sources, root: str, out: str, generates: bool = False
) -> tuple[list[Spec], ActorPool]:
    """Start or join Ray, bring weights of the Hub to its nodes, check them; what scores the images below
    `root`, and the actors for it. `generates` is whether the models also make images.

    Raises InputError for weights that cannot be loaded.
    """
    from diffitm.commands.weights import share
    from diffitm.distributed import session

    session.connect(config.ray, verbose=config.verbose)
    pool = session.choose_pool(
        config.actors, config.max_actors, config.cpus_per_actor, config.gpus_per_actor
    )
    work = storage.join(out, "work")
    clips = [share(source, work) for source in sources.clips]
    models = [
        settled(share(source, work), config.prediction_type, config.resolution)
        for source in sources.models
    ]
    loras = [locate(name) for name in lora_names(config) if name]
    adapters = [find_adapter(name, "dpt") for name in dpt_names(config) if name]
    loras += [adapter.lora for adapter in adapters if adapter.lora]
    # All of them, before a GPU is asked for and anything is scored.
    models = [check_loadable(source, loras, config.variant) for source in models]
    for source, adapter in itertools.product(models, adapters):
        check_adapter(adapter, source, "dpt")
    _check_clips(clips)
    errors = [
        _diffusion(config, source, lora, root, steps, bool(pool.gpus))
        for source in models
        for lora in lora_names(config)
        for steps in plans(config, FAMILIES[source.family].flow)
        if None in dpt_names(config)
    ]
    specs: list[Spec] = [*TextPlaces(config.text_encoders, pool, generates).place(errors)]
    specs += [
        _dpt(config, source, adapter, root, bool(pool.gpus))
        for source in models
        for adapter in adapters
    ]
    for name, steps in {(s.label, s.timesteps): 1 for s in specs if isinstance(s, DiffusionSpec)}:
        tell_untrained(name, steps)
    for spec in {(s.source, s.dtype): s for s in specs if isinstance(s, DiffusionSpec)}.values():
        if spec.source.sizes:
            log.info("%s: %s", spec.source.name, size_note(spec.source, spec.dtype))
    specs += [ClipSpec(source, root, config.batch_size) for source in clips]
    scorers = dict.fromkeys(config.scorer)
    specs += [CustomSpec(find_scorer(name), root) for name in scorers]
    return specs, pool


def _clips(names: list[str]) -> list[ClipSource]:
    if not names:
        return []
    from diffitm.models.clip import resolve_clip

    return [resolve_clip(name) for name in dict.fromkeys(names)]


def _check_clips(clips: list[ClipSource]) -> None:
    """Raises InputError for weights that are not those of their architecture."""
    if clips:
        from diffitm.models.clip import check_clip

        for clip in clips:
            check_clip(clip)


def _diffusion(
    config: ModelOptions,
    source: ModelSource,
    lora: str | None,
    root: str,
    timesteps: tuple[float, ...],
    gpu: bool,
) -> DiffusionSpec:
    return DiffusionSpec(
        **_shared(config, source, root, gpu),
        protocol=choose_protocol(config.protocol, FAMILIES[source.family].flow),
        timesteps=timesteps,
        lora=locate(lora) if lora else None,
        lora_name=storage.without_query(lora) if lora else None,
        compiled=config.compile,
        empty=config.empty,
    )


def _dpt(
    config: ModelOptions, source: ModelSource, adapter: AdapterFile, root: str, gpu: bool
) -> DptSpec:
    shared = _shared(config, source, root, gpu)
    return DptSpec(**shared, adapter=adapter, timestep=config.dpt_timestep)


def _shared(config: ModelOptions, source: ModelSource, root: str, gpu: bool) -> dict[str, Any]:
    """What the specs of a diffusion model have in common."""
    resize, dtype = config.resize, str(config.dtype)
    if resize == "auto":
        resize = "crop" if config.protocol == "diffusion-classifier" else "squash"
    if dtype == "auto":
        dtype = FAMILIES[source.family].half if gpu else "fp32"
    return {
        "source": source,
        "root": root,
        "seed": config.seed,
        "dtype": dtype,
        "resize": resize,
        "latent_seed": config.seed if config.latents == "sample" else None,
        "variant": config.variant,
        "batch_size": config.batch_size,
    }


def open_stores(specs: list[Spec], root: str, out: str) -> list[Store]:
    """The store of each spec below `out`; a new one has what others know of the images below `root`.

    Raises InputError and Unavailable as score_store.open_store and roots.take_over do.
    """
    known = list(stores_of(out))
    stores = [open_store(out, spec.label, spec.store_config(), known) for spec in specs]
    take_over(stores, known, root)
    return stores


@functools.cache  # one look for all LoRAs and timesteps of a model
def _tell_long_texts(source: ModelSource | ClipSource, examples: tuple[str, ...]) -> None:
    from diffitm.models.text_limits import tell_long_texts

    tell_long_texts(source, distinct_texts(list(examples)))


def score_missing(
    spec: Spec,
    store: Store,
    examples: Mapping[str, Examples],
    out: str,
    pool: ActorPool,
    races: Races | None = None,
) -> Done:
    """Score what the examples of each task need and the store lacks; an interrupted run of the same goes on.

    With `races` the contests of examples are raced, which takes two tables: of what is scored in full, and
    of the races. In the end no table is open, and the store's small files are joined.
    """
    if races is None:
        done = _score_in_full(spec, store, list(examples.values()), out, pool)
    else:
        done = _race(spec, store, examples, out, pool, races)
    tidy(store)
    return done


def _race(
    spec: Spec,
    store: Store,
    examples: Mapping[str, Examples],
    out: str,
    pool: ActorPool,
    races: Races,
) -> Done:
    """Score in full what is not raced, then hold the races."""
    done, plan = Done(), races.plan
    if full := full_part(examples, races, out):
        done = _score_in_full(spec, store, full, out, pool)

    def write(uri: str) -> WorkTable:
        return write_races(examples, store, races, pool.min_actors, uri)

    identity = [part.identity for part in examples.values()]
    work = open_work(out, store, write, [*identity, json.dumps(plan.identity)])
    if work.left.pairs == 0:
        log.info("%s: every contest is decided already, 0 forwards needed", store.model)
        return done
    _tell_long(spec, examples.values())
    _tell_resumed(work, store)
    most = Cost(spec.cost).total(*work.left)
    text = "%s: %s pairs race (%s), %s forwards (%s timesteps) at most"
    pairs = f"{work.left.pairs:,}"
    log.info(text, store.model, pairs, describe(plan.rules), f"{most:,}", spec.cost)
    return done + _score(spec, work, store, out, pool, plan)


def _score_in_full(
    spec: Spec, store: Store, examples: list[Examples], out: str, pool: ActorPool
) -> Done:
    """Score the pairs that the store lacks."""
    work = open_pairs(out, store, [e.uri for e in examples], [e.identity for e in examples])
    if work.left.pairs == 0:
        log.info("%s: every pair is scored already, 0 forwards needed", store.model)
        return Done()
    _tell_long(spec, examples)
    _tell_resumed(work, store)
    unit = "scores" if store.similarity else f"forwards ({spec.cost} timesteps)"
    needed = f"{work.left.pairs:,} pairs of {work.left.images:,} images need"
    count = Cost(spec.cost).total(*work.left)
    log.info("%s: %s %s %s", store.model, needed, f"{count:,}", unit)
    return _score(spec, work, store, out, pool)


def _tell_long(spec: Spec, examples: Iterable[Examples]) -> None:
    if isinstance(spec, DiffusionSpec | DptSpec | ClipSpec):
        _tell_long_texts(spec.source, tuple(part.uri for part in examples))


def _tell_resumed(work: OpenWork, store: Store) -> None:
    if work.resumed:
        finished = f"{work.table.pairs - work.left.pairs:,} of {work.table.pairs:,}"
        log.info("%s: going on where it stopped, %s pairs done", store.model, finished)


def _score(
    spec: Spec,
    work: OpenWork,
    store: Store,
    out: str,
    pool: ActorPool,
    plan: RacePlan | None = None,
) -> Done:
    """Score a work table, close it and tell what was done."""
    from diffitm.commands.stages.score import score

    if isinstance(spec, DiffusionSpec) and spec.staged:
        spec = with_texts(spec, work.table, out, pool)
    if isinstance(spec, DiffusionSpec) and spec.compiled:
        log.info("%s: actors compile it before they score, for a minute or more", store.model)
    done = score(spec, work, store, pool, plan)
    finish(work, done)
    made = f"{done.pairs:,} pairs, {done.forwards:,} forwards done, {done.failures:,} pairs failed"
    log.info("%s: %s", store.model, made)
    if done.not_finite:
        text = "%s: %s of %s pairs have a score that is NaN or infinite%s; such as %s"
        hint, pairs = other_dtype(store.config.get("dtype")), ", ".join(done.strange)
        log.warning(text, store.model, f"{done.not_finite:,}", f"{done.pairs:,}", hint, pairs)
    return done
