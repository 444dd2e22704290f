"""What does racing save, how often does it decide as in full, and does its stated doubt hold?

    python -m benchmarks.racing OUT       from the errors that a run of gdbench stored in full
    python -m benchmarks.racing           from simulated races whose outcome is known

README.md has the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from diffitm.commands.run_record import read_record
from diffitm.core import storage
from diffitm.core.schema import Contest, Example
from diffitm.evaluation.races import pair_values
from diffitm.metrics.intervals import interval
from diffitm.scoring.racing import RacePlan, Racing, hold, race, survivors
from diffitm.store.join import read_scored
from diffitm.tasks.base import Task
from diffitm.tasks.registry import find_task

DOUBTS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
RACES = 4000  # simulated ones of a setting


class Scored(NamedTuple):
    """An example with its contests and all errors [pairs, N] of its pairs."""

    example: Example
    contests: list[Contest]
    errors: np.ndarray


@dataclass(frozen=True)
class Line:
    """A task at a doubt: how many times fewer forwards, the share of contests that come out as in full with
    the 95% interval, and the accuracy (the task's first metric) by races and in full, in %."""

    task: str
    timesteps: int
    doubt: float
    contests: int
    saved: float
    agreement: float
    low: float
    high: float
    raced: float
    full: float


def read_examples(out: str, name: str) -> tuple[Task, list[Scored], list[int]]:
    """The complete examples of a task in an OUT of gdbench with one diffusion model, and its timesteps."""
    record, task = read_record(out), find_task(name)()
    (store,) = [store for store in record.stores if not store.similarity]
    found = []
    for item in read_scored(record.examples[name], store, "l2"):
        if item.failure is None and (contests := task.contests(item.example)):
            found.append(Scored(item.example, contests, pair_values(item)))
    return task, found, store.config["timesteps"]


def thinned(examples: Sequence[Scored], parts: int) -> Iterator[Scored]:
    """Each example with every so manieth timestep, once for each way to begin."""
    for scored in examples:
        for start in range(parts):
            yield scored._replace(errors=scored.errors[:, start::parts])


def measure(task: Task, examples: Sequence[Scored], doubt: float, error: str = "l2") -> Line:
    """Race all examples at a doubt."""
    total = examples[0].errors.shape[1]
    plans = [RacePlan(Racing(d), tuple(range(total)), error) for d in (doubt, 0.0)]
    spent: dict[tuple[int, str, str], int] = {}
    alike, clusters, credits = [], [], [[], []]  # type: ignore[var-annotated]
    for number, (example, contests, errors) in enumerate(examples):
        raced, full = ([run.race for run in hold(contests, errors, plan)] for plan in plans)
        for contest, one, other in zip(contests, raced, full, strict=True):
            about = range(len(contest.candidates)) if contest.about is None else [contest.about]
            alike.append(float(all((c in one.winners) == (c in other.winners) for c in about)))
            clusters.append(example.cluster)
        for found, races in zip(credits, (raced, full), strict=True):
            standings = [r.standing() for r in races]
            found.append(next(iter(task.raced_credits(example, standings).values())).value)
        # Ways to begin are runs of their own, which share no pair.
        way = number % (len(examples) // len({id(s.example) for s in examples}))
        for run in hold(contests, errors, plans[0]):
            for pair, count in run.spent.items():
                key = (way, *_pair(example, pair))
                spent[key] = max(spent.get(key, 0), count)
    low, high = interval(np.array(alike), np.array(clusters))
    means = [100 * float(np.mean(found)) for found in credits]
    saved = len(spent) * total / sum(spent.values())
    return Line(
        task.name,
        total,
        doubt,
        len(alike),
        saved,
        100 * float(np.mean(alike)),
        100 * low,
        100 * high,
        *means,
    )


def _pair(example: Example, number: int) -> tuple[str, str]:
    texts, pairs = len(example.texts), len(example.images) * len(example.texts)
    if number >= pairs:
        return example.images[number - pairs], ""
    return example.images[number // texts], example.texts[number % texts]


def simulated(
    candidates: int, kept: int, total: int, apart: float, kind: str, doubt: float, seed: int
) -> float:
    """The share of wrong outcomes of races with a known one. Errors of the candidates have means that are
    `apart` (in spreads of an error), a slope over the timesteps and noise: normal, or of heavy tails
    (Student's t of 4), or correlated between neighbouring timesteps."""
    numbers, wrong = np.random.default_rng(seed), 0
    for _ in range(RACES):
        noise = numbers.normal(size=(candidates, total))
        if kind == "heavy tails":
            noise = numbers.standard_t(4, (candidates, total))
        if kind == "correlated":
            noise = (noise + np.roll(noise, 1, 1)) / np.sqrt(2)
        slope = 0.5 * numbers.normal(size=(candidates, 1)) * np.linspace(-1, 1, total)
        means = apart * numbers.normal(size=(candidates, 1))
        errors = 5 * numbers.normal(size=total) + means + noise + slope
        wrong += set(race(errors, Racing(doubt), kept)[0]) != set(survivors(errors, kept))
    return wrong / RACES


def print_simulated(doubt: float) -> None:
    """A table of wrong outcomes in %."""
    print(f"wrong outcomes in % of {RACES:,} races each, at most {100 * doubt:g} promised")
    print("| candidates | kept | timesteps | apart | normal | heavy tails | correlated |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    settings = [
        (c, k, n, a)
        for c, k in ((2, 1), (4, 1), (10, 1), (10, 5))
        for n in (10, 49, 245)
        for a in (0.0, 0.1, 0.3)
    ]
    for seed, setting in enumerate(settings):
        shares = [
            100 * simulated(*setting, kind, doubt, seed)
            for kind in ("normal", "heavy tails", "correlated")
        ]
        print(
            f"| {' | '.join(map(str, setting))} | {' | '.join(f'{s:.1f}' for s in shares)} |",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", metavar="OUT", help="of a gdbench run, scored in full")
    parser.add_argument("--tasks", nargs="*", help="default: all of OUT that have contests")
    parser.add_argument("--parts", type=int, nargs="*", default=[5, 1],
                        help="race with every so manieth timestep")  # fmt: skip
    parser.add_argument("--doubt", type=float, default=0.05, help="of the simulation")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.source is None:
        print_simulated(args.doubt)
        return
    out, lines = storage.absolute(args.source), []
    print(
        "| task | timesteps | doubt | decisions | times fewer | as in full, % | raced, % | full, % |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in args.tasks or read_record(out).examples:
        task, examples, _ = read_examples(out, name)
        for parts in args.parts if examples else []:
            for doubt in DOUBTS:
                line = measure(task, list(thinned(examples, parts)), doubt)
                lines.append(asdict(line))
                shown = f"{line.agreement:.1f} [{line.low:.1f}, {line.high:.1f}]"
                print(f"| {line.task} | {line.timesteps} | {doubt:g} | {line.contests:,} | "
                      f"{line.saved:.2f} | "
                      f"{shown} | {line.raced:.1f} | {line.full:.1f} |", flush=True)  # fmt: skip
    if args.out:
        storage.write_text(args.out, json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()
