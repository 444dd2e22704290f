"""Evaluate models on GDBench, from the data folder to the report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffitm.commands.entrance import entered
from diffitm.commands.extras import Extras
from diffitm.commands.models import (
    find_sources,
    make_specs,
    open_stores,
    paths_read,
    score_missing,
)
from diffitm.commands.run_record import (
    RunRecord,
    read_curves,
    read_images,
    read_pictures,
    read_record,
)
from diffitm.commands.stages.probe import add_probes
from diffitm.core import storage
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.evaluation.cut_texts import count_cut
from diffitm.evaluation.evaluate import error_of, evaluate, speeds, titles, write_results
from diffitm.evaluation.examples import Examples, data_root, write_examples
from diffitm.evaluation.options import (
    GdbenchConfig,
    check_options,
    race_options,
    race_rules,
    task_names,
    task_problems,
)
from diffitm.evaluation.race_table import Races
from diffitm.report.html import write_report
from diffitm.report.matrix import (
    Generated,
    make_matrix,
    matrix_latex,
    matrix_markdown,
    print_matrix,
)
from diffitm.report.means import means_latex, means_table
from diffitm.report.table import latex, make_table, markdown
from diffitm.report.terminal import WIDTH, print_results, print_state, print_summary
from diffitm.scoring.specs import Spec
from diffitm.store.run_summary import write_summary
from diffitm.store.score_store import Store
from diffitm.tasks.check import check
from diffitm.tasks.registry import find_task

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool

log = logging.getLogger("diffitm")
WORLD = "world.json"  # what marks a data root of drawn scenes
ALL = (GdbenchConfig().tasks, ["all"])  # what of a report stands for all that it has


class Prepared(NamedTuple):
    """What a run scores with and on: the data root, a task's examples, models and their stores."""

    config: GdbenchConfig
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


def run(config: GdbenchConfig) -> None:
    """Score what is missing, then write results.json, provenance, failures and the report.

    Raises InputError for bad input before anything is scored, Incomplete at the end if examples could
    not be scored.
    """
    out = storage.absolute(config.out)
    if config.report_only:
        report_again(config, out)
    elif config.check:
        _print_check(config, out)
    else:
        check_options(config)
        with entered(config, out, _read(config)):
            score_and_report(prepare(config))


def score_and_report(
    prepared: Prepared, generated: Sequence[Generated] = (), more: Mapping[str, Any] | None = None
) -> None:
    """See run; OUT is held. `generated` are tasks of pictures that models made, `more` is provenance."""
    config, out = prepared.config, prepared.out
    extras = Extras(config, prepared.specs, out)
    run_record = RunRecord(
        out=out,
        examples=prepared.files,
        stores=prepared.stores,
        root=prepared.root,
        drawn=storage.exists(storage.join(prepared.root, WORLD)),
        artifacts=extras.artifacts,
        provenance=record(asdict(config))
        | {"stores": {s.name: s.config for s in prepared.stores}}
        | dict(more or {}),
        cut_texts=tuple(count_cut(prepared.specs, prepared.files)),
        generated=tuple(generated),
    )
    run_record.write()
    score_all([prepared], out)
    extras.make(prepared.pool)
    report(config, run_record)


def report_again(config: GdbenchConfig, out: str) -> None:
    """--report-only: the last run's examples and stores, with the chosen tasks and error."""
    last = read_record(out)
    tasks = list(last.examples) if config.tasks in ALL else task_names(config)
    if lacking := sorted(set(tasks) - set(last.examples)):
        raise InputError(f"--report-only: {out} holds no examples of {', '.join(lacking)}")
    config = _like_last(config, last.provenance["config"])
    provenance = last.provenance | {"report": record(asdict(config))}
    examples = {name: last.examples[name] for name in tasks}
    report(config, replace(last, examples=examples, provenance=provenance))


def _like_last(config: GdbenchConfig, last: dict[str, Any]) -> GdbenchConfig:
    """The options of a report with those of the last run that say how its scores become figures, where they
    are not given."""
    used: dict[str, Any] = {
        "timestep_weights": config.timestep_weights or last.get("timestep_weights", [])
    }
    if race_rules(config) is None:
        names = ("racing", "n_samples", "to_keep")
        used |= {name: last[name] for name in names if name in last}
    used["racing_audit"] = config.racing_audit or last.get("racing_audit", 0.0)
    if config.error == "auto":
        used["error"] = last["error"]
    return replace(config, **used)


def report(config: GdbenchConfig, record: RunRecord) -> None:
    """Evaluate, write and show.

    Raises Incomplete at the end if examples could not be scored.
    """
    out, artifacts = record.out, record.artifacts
    weights = np.array(config.timestep_weights) if config.timestep_weights else None
    racing = race_options(config)
    evaluation = evaluate(record.examples, record.stores, config.error, weights, racing)
    add_probes(evaluation, out, artifacts.probes)
    evaluation.speeds = speeds(out, record.stores)
    chosen = {find_task(name).name for name in record.examples}
    evaluation.cut_texts = [part for part in record.cut_texts if part.task in chosen]
    table = make_table(evaluation, not record.drawn, config.published_bias)
    results = write_results(evaluation, record.provenance, out)
    means = means_table(table)
    matrix = None
    if record.generated:
        names = zip(titles(record.stores), (store.model for store in record.stores), strict=True)
        matrix = make_matrix(evaluation, record.generated, dict(names))
    texts = markdown(table), latex(table)
    if means is not None:
        texts = f"{texts[0]}\n{markdown(means)}", f"{texts[1]}\n{means_latex(means)}"
    if matrix is not None:
        texts = (
            f"{texts[0]}\n{matrix_markdown(matrix)}",
            f"{texts[1]}\n{matrix_latex(matrix)}",
        )
    for name, text in zip(("table.md", "table.tex"), texts, strict=True):
        storage.write_text(storage.join(out, name), text)
    shown = (read_images(record), read_curves(artifacts), read_pictures(artifacts))
    page = write_report(evaluation, table, record.provenance, record.root, out, *shown, matrix)
    print_results(evaluation, table)
    if matrix is not None:
        print_matrix(matrix, WIDTH)
    print(f"results  {results}")
    print(f"tables   {storage.join(out, 'table.md')}, table.tex")
    print(f"scores   {storage.join(out, 'scores')}")
    print(f"report   {page}")
    if evaluation.failures:
        count, where = len(evaluation.failures), storage.join(out, "failures.json")
        print(f"failures {where} ({count})")
        text = f"{count:,} examples could not be scored; they are listed in {where}"
        reasons = Counter(line["failure"] for line in evaluation.failures)
        often, times = reasons.most_common(1)[0]
        raise Incomplete(f"{text}. {times:,} of them: {often}")


def _read(config: GdbenchConfig) -> list[tuple[str, str | None]]:
    """Options whose paths the actors read."""
    return [("--data", config.data), *paths_read(config), ("--segmentation", config.segmentation)]


def prepare(config: GdbenchConfig) -> Prepared:
    """Everything before scoring: the examples and the stores on disk, Ray and its pool of actors.

    Raises InputError for bad input.
    """
    out = storage.absolute(config.out)
    check_options(config)
    sources = find_sources(config)
    tasks = task_names(config)
    root = data_root(config.data, config.scenes, out, tasks)
    examples = write_examples(tasks, root, out, config.limit)
    specs, pool = make_specs(config, sources, root, out, generates=bool(config.prompts))
    stores = open_stores(specs, root, out)
    return Prepared(config, out, root, examples, specs, stores, pool)


def races_of(ready: Prepared, store: Store) -> Races | None:
    """How a store's pairs are raced, None for not at all."""
    config, options = ready.config, race_options(ready.config)
    weights = np.array(config.timestep_weights) if config.timestep_weights else None
    plan = options.plan(store, error_of(store, config.error), weights) if options else None
    if options is None or plan is None:
        return None
    return Races(options, plan, {name: find_task(name)() for name in ready.examples})


def score_all(prepared: Sequence[Prepared], out: str) -> int:
    """Score the pairs that the stores lack and tell what that took, also in OUT/summary.json; how many
    forwards."""
    done = [
        score_missing(spec, store, ready.examples, ready.out, ready.pool, races_of(ready, store))
        for ready in prepared
        for spec, store in zip(ready.specs, ready.stores, strict=True)
    ]
    names = titles([store for ready in prepared for store in ready.stores])
    print_summary(write_summary(names, done, out))
    return sum(part.forwards for part in done)


def _print_check(config: GdbenchConfig, out: str) -> None:
    """--check: the state of every chosen task. Raises InputError if one cannot run."""
    problems = task_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    root = data_root(config.data, config.scenes, out, task_names(config))
    states = []
    for name in task_names(config):
        states.append(check(find_task(name)(), root))
        print_state(states[-1])
    lacking = [state.task for state in states if not state.can_run]
    if lacking:
        raise InputError(f"{len(lacking)} of {len(states)} tasks cannot run: {', '.join(lacking)}")
    print(f"all {len(states)} tasks can run")
