"""Races from the examples to the figures, on a small denoiser: what is scored, stored, and comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from diffitm.captions.row import CaptionRow
from diffitm.core.errors import InputError
from diffitm.core.schema import Example, read_block
from diffitm.evaluation.evaluate import Evaluation, evaluate
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.race_table import Races, full_part, write_races
from diffitm.evaluation.races import RaceOptions, pair_values
from diffitm.evaluation.top import Top, TopRaces, write_groups
from diffitm.metrics.credit import Credit
from diffitm.models.denoiser import Condition
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.protocols import plan_timesteps
from diffitm.scoring.race_block import BlockRaces
from diffitm.scoring.racing import Racing, Rounds, hold
from diffitm.store import pair_table
from diffitm.store.join import read_scored
from diffitm.store.pair_scores import summarise, write_pairs, write_raced_top, write_top
from diffitm.store.score_store import Store, open_store
from diffitm.tasks.base import Task
from diffitm.tasks.mmvp_vlm import MmvpVlm
from diffitm.tasks.registry import find_task
from diffitm.tasks.winoground import Winoground
from tests.tiny import Fixed, read_images, schedule, write_image, write_scores

STEPS = plan_timesteps("diffusionitm", 30)
RULES = RaceOptions(Racing(0.2))
NAN = "a text without a number"


class Toy(Fixed):
    """Errors that depend on image, text and timestep, and a count of forwards."""

    forwards = 0

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            row = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
            rows.append(row * np.nan if text == NAN else row)
        return {"hidden": torch.stack(rows)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.forwards += len(noised)
        t = timesteps.view(-1, 1, 1, 1) / 1000
        return noised * t + condition["hidden"].view(-1, 2, 4, 4) * (1 - t)


@dataclasses.dataclass
class World:
    """Images with a model, and the examples of some tasks that share them."""

    root: Path
    out: str
    examples: dict[str, Examples]
    scorer: DiffusionScorer

    @property
    def forwards(self) -> int:
        return self.scorer.denoiser.forwards  # type: ignore[attr-defined]

    def store(self, name: str, timesteps: Sequence[int] = STEPS, **config: Any) -> Store:
        base = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": list(timesteps)}
        return open_store(self.out, name, base | config | {"name": name})

    def score(self, store: Store, examples: Sequence[Examples] | None = None) -> int:
        """Score in full what is missing; how many forwards that took."""
        before, uris = self.forwards, [e.uri for e in examples or self.examples.values()]
        work = pair_table.write_work(uris, store, f"{self.out}/work.parquet")
        rows = read_images(work.uri)
        if rows:
            self.put(store, self.scorer.score(rows))
        assert self.forwards - before <= work.pairs * len(self.scorer.timesteps) - work.stored
        return self.forwards - before

    def race(
        self, store: Store, options: RaceOptions = RULES, actors: float = 1e-9, error: str = "l2",
        weights: np.ndarray | None = None,
    ) -> int:  # fmt: skip
        """As a run does; how many forwards that took."""
        before, plan = self.forwards, options.plan(store, error, weights)
        assert plan is not None
        races = Races(options, plan, {name: find_task(name)() for name in self.examples})
        if full := full_part(self.examples, races, self.out):
            self.score(store, full)
        uri = f"{self.out}/races.parquet"
        work = write_races(self.examples, store, races, actors, uri)  # type: ignore[arg-type]
        for line in parquet.read_table(work.uri).to_pylist():
            block = BlockRaces(self.scorer, read_block(line), plan)
            block.run()
            self.put(store, block.lines())
        return self.forwards - before

    def put(self, store: Store, lines: list[dict[str, Any]]) -> None:
        write_scores(store, lines, f"part-{len(list(Path(store.uri).glob('*.parquet')))}")

    def results(self, store: Store, options: RaceOptions | None = RULES, **how: Any) -> Evaluation:
        files = {name: part.uri for name, part in self.examples.items()}
        found = evaluate(files, [store], racing=options, **how)
        return replace(found, rows=[replace(row, model="") for row in found.rows],
                       races=[replace(race, model="") for race in found.races])  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two image and two text tasks, Winoground's and one without decisions, on twelve images."""
    root = tmp_path / "data"
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        write_image(root / name, number)
    texts = [f"a caption, number {number}" for number in range(20)]
    tasks = {
        "flickr30k": [
            Example(f"i{k}", tuple(names[k : k + 6]), (texts[k],), "image", 2) for k in range(6)
        ],
        "flickr30k_text": [
            Example(f"t{k}", (names[k],), tuple(texts[k : k + 9]), "text", 4) for k in range(8)
        ],
        "winoground": [
            Example(f"w{k}", tuple(names[k : k + 2]), tuple(texts[k : k + 2]), "both")
            for k in range(8)
        ],
        "mmvp_vlm": [
            Example(f"m{k}", tuple(names[k : k + 2]), tuple(texts[k + 3 : k + 5]), "both")
            for k in range(4)
        ],
        "flickr30k_variance": [
            Example(f"{i}-{j}", (names[i],), (texts[j],), "image", 0, names[i],
                    {"image": str(i), "text": str(j)})
            for i, j in itertools.product(range(3), range(3))
        ],
    }  # fmt: skip
    examples = {}
    for name, some in tasks.items():
        uri, _ = pair_table.write_examples(name, some, str(tmp_path / "examples"), None)
        examples[name] = Examples(uri, uri)
    return World(root, str(tmp_path), examples, scorer(root))


def scorer(root: Path, timesteps: Sequence[int] = STEPS) -> DiffusionScorer:
    toy = Toy(schedule())
    return DiffusionScorer(
        toy, make_plan(list(timesteps), toy.latent_shape), str(root), "squash", 7
    )


def test_a_race_scores_less_and_comes_out_as_over_complete_errors(world: World) -> None:
    """Whatever is stored beside it; once raced, nothing is asked again."""
    whole, raced = world.store("whole"), world.store("raced")
    full = world.score(whole)
    spent = world.race(raced)
    assert spent < 0.8 * full
    assert world.race(raced) == 0
    one, other = world.results(raced), world.results(whole)
    assert one.rows == other.rows and one.races == other.races
    assert not one.failures
    races = {race.task: race for race in one.races}
    assert set(races) == {"flickr30k", "flickr30k_text", "winoground", "mmvp_vlm"}
    assert races["flickr30k"].contests == 12 and races["winoground"].contests == 32
    assert all(race.forwards < race.full for race in one.races)
    rows = {(row.task, row.score) for row in one.rows}
    assert rows == {
        ("flickr30k", "normalised"), ("flickr30k_text", "conditional"), ("winoground", "normalised"),
        ("mmvp_vlm", "normalised"), ("flickr30k_variance", "conditional"),
        ("flickr30k_variance", "normalised"),
    }  # fmt: skip
    assert {row.racing for row in one.rows} == {"doubt 0.2", None}
    assert {row.task for row in one.rows if row.racing is None} == {"flickr30k_variance"}


def test_a_full_run_after_a_race_scores_what_is_missing(world: World) -> None:
    """To the forward; its errors and figures are those of a full run."""
    whole, raced = world.store("whole"), world.store("raced")
    full = world.score(whole)
    spent = world.race(raced)
    assert world.score(raced) == full - spent
    for part in world.examples.values():
        pairs = zip(*(read_scored(part.uri, s, "l2") for s in (whole, raced)), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(pair_values(one), pair_values(other), rtol=1e-5)
    assert world.results(raced, None).rows == world.results(whole, None).rows
    assert world.results(raced).races == world.results(whole).races


def test_another_doubt_uses_what_was_scored(world: World) -> None:
    raced, fresh = world.store("raced"), world.store("fresh")
    sharp = RaceOptions(Racing(0.01))
    first = world.race(raced)
    assert first < world.race(raced, sharp) + first == world.race(fresh, sharp)
    assert world.results(raced, sharp).rows == world.results(fresh, sharp).rows
    assert world.results(raced).rows == world.results(fresh).rows  # and the other way round


def test_an_incomplete_store_is_no_full_run(world: World) -> None:
    raced = world.store("raced")
    world.race(raced)
    found = world.results(raced, None)
    assert {line["failure"].split(": ")[-1] for line in found.failures} == {"not scored yet"}
    assert {line["task"] for line in found.failures} == {
        "flickr30k", "flickr30k_text", "winoground", "mmvp_vlm"
    }  # fmt: skip
    sharper = world.results(raced, RaceOptions(Racing(0.0)))
    assert {line["failure"] for line in sharper.failures} == {"not scored yet"}


def test_without_doubt_the_figures_are_those_of_a_full_run(world: World) -> None:
    certain, raced, whole = RaceOptions(Racing(0.0)), world.store("raced"), world.store("whole")
    assert world.race(raced, certain) <= world.score(whole)
    full = {
        (row.task, row.group, row.metric, row.score): row for row in world.results(whole, None).rows
    }
    for row in world.results(raced, certain).rows:
        expected = full[row.task, row.group, row.metric, row.score]
        assert (row.value, row.n, row.ties) == (expected.value, expected.n, expected.ties)


@pytest.mark.parametrize("actors", [1, 100])
def test_how_contests_are_cut_into_blocks_does_not_matter(world: World, actors: int) -> None:
    """A pair whose contests lie in several blocks may be scored twice there, and counts once."""
    one, other = world.store("one"), world.store(f"other{actors}")
    world.race(one)
    world.scorer.batches[0].size = 3
    world.race(other, actors=actors)
    table = parquet.read_table(f"{world.out}/races.parquet")
    assert table.num_rows >= (4 if actors == 1 else 20)
    found, expected = world.results(other), world.results(one)
    assert found.rows == expected.rows and found.races == expected.races
    for part in world.examples.values():
        both = (read_scored(part.uri, s, "l2", partial=True) for s in (one, other))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(pair_values(a), pair_values(b), rtol=1e-5)


def test_a_lost_image_costs_its_own_examples(world: World) -> None:
    """The same ones as in a full run; its pairs are tried again by the next one."""
    picture = (world.root / "3.png").read_bytes()
    (world.root / "3.png").write_bytes(picture[:100])
    whole, raced = world.store("whole"), world.store("raced")
    world.score(whole)
    world.race(raced)
    names = [
        {(line["task"], line["example"]) for line in world.results(store, how).failures}
        for store, how in ((raced, RULES), (whole, RULES), (whole, None))
    ]
    assert names[0] == names[1] == names[2]
    assert ("flickr30k_text", "t3") in names[0] and ("winoground", "w2") in names[0]
    assert all("unreadable" in line["failure"] for line in world.results(raced).failures)
    good = [r.value for r in world.results(raced).rows if r.group == "all" and r.racing]
    assert good == [r.value for r in world.results(whole).rows if r.group == "all" and r.racing]
    (world.root / "3.png").write_bytes(picture)
    assert world.race(raced) > 0
    assert not world.results(raced).failures


def test_a_number_that_is_none_is_lost_and_never_wins(world: World) -> None:
    example = Example("n", ("0.png",), (NAN, "x", "y"), "text", 0)
    right = Example("r", ("0.png",), ("x", NAN, "y"), "text", 0)
    uri, _ = pair_table.write_examples("pets", [example, right], world.out, None)
    world.examples = {"pets": Examples(uri, uri)}
    store, spent = world.store("raced"), world.race(world.store("raced"))
    assert spent == 3 * 5  # nothing beyond the first look
    found = world.results(store)
    assert [line["failure"] for line in found.failures] == ["a score is not finite"] * 2
    assert found.rows[0].value is None and found.rows[0].failures == 2


def test_the_audit(world: World) -> None:
    """Audited examples are complete; agreement is that of the contests by hand; what needs all errors is
    of them alone."""
    options, store = RaceOptions(Racing(0.3), audit=0.5), world.store("raced")
    world.race(store, options)
    found = world.results(store, options)
    plan = options.plan(store, "l2", None)
    assert plan is not None
    for race in found.races:
        agreed, kept = [], 0
        task = find_task(race.task)()
        for item in read_scored(world.examples[race.task].uri, store, "l2", partial=True):
            if not options.is_audited(race.task, item.example):
                continue
            kept += 1
            errors = pair_values(item)
            assert item.is_complete
            for contest in task.contests(item.example):
                values = errors[contest.candidates]
                values = values - errors[contest.bases] if contest.bases else values
                (run,) = hold([contest], errors, plan)
                best = set(np.argsort(values.mean(1))[: contest.kept].tolist())
                if contest.about is None:
                    agreed.append(best == set(run.race.winners))
                else:
                    agreed.append((contest.about in best) == (contest.about in run.race.winners))
        assert (race.audited, race.agreed) == (len(agreed), sum(agreed))
        assert race.agreement == (pytest.approx(np.mean(agreed)) if agreed else None)
        if not kept:
            continue
        assert {line.n for line in found.denoising if line.task == race.task} == {kept}
        counts = {(c.task, c.timesteps): c.n for c in found.counts}
        assert counts[race.task, len(STEPS)] == kept
    assert sum(race.audited for race in found.races) > 20
    more = RaceOptions(Racing(0.3), audit=0.8)
    some = [Example(str(n), ("a",), ("b",), "text") for n in range(2000)]
    chosen = [{e.id for e in some if o.is_audited("t", e)} for o in (options, more)]
    assert chosen[0] < chosen[1] and 900 < len(chosen[0]) < 1100


def test_every_example_audited_is_a_full_run(world: World) -> None:
    options, raced, whole = (
        RaceOptions(Racing(0.3), 1.0),
        world.store("raced"),
        world.store("whole"),
    )
    assert world.race(raced, options) == world.score(whole)
    assert world.results(raced, options).curves == [
        replace(curve, model="raced") for curve in world.results(whole, None).curves
    ]


@pytest.mark.parametrize("error", ["mse", "l1", "huber"])
def test_other_errors_and_weights(world: World, error: str) -> None:
    """What decides in the actor is what decides in the evaluation, also by weights, some of them 0."""
    weights = np.linspace(0, 1, len(STEPS))
    raced, whole = world.store("raced"), world.store("whole")
    world.score(whole)
    world.race(raced, error=error, weights=weights)
    how = {"error": error, "weights": weights}
    one, other = world.results(raced, **how), world.results(whole, **how)
    assert one.rows == other.rows and one.races == other.races and not one.failures
    certain = RaceOptions(Racing(0.0))
    full = {
        (r.task, r.group, r.metric, r.score): r.value
        for r in world.results(whole, None, **how).rows
    }
    for row in world.results(whole, certain, **how).rows:
        assert row.value == full[row.task, row.group, row.metric, row.score]


@pytest.mark.parametrize("own", [Winoground, MmvpVlm])
def test_a_task_with_credits_of_its_own_is_scored_in_full(own: type[Task]) -> None:
    example = Example("w", ("a", "b"), ("x", "y"), "both")
    assert own().contests(example)

    class Mine(own):  # type: ignore[misc, valid-type]
        def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
            return {"mine": Credit(1.0)}

    assert Mine().contests(example) == []


@pytest.mark.parametrize("audit", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none(audit: float) -> None:
    with pytest.raises(InputError, match=r"racing_audit .*must be 0 to 1"):
        RaceOptions(Racing(), audit)


def test_the_best_of_no_more_than_are_asked_for(world: World) -> None:
    """They are scored in full and ranked by that, one that cannot be read is not among them."""
    (world.root / "1.png").write_bytes(b"no image")
    rows = [CaptionRow(str(n), f"{n}.png", (f"text {n % 2}",)) for n in range(4)]
    own, _, _ = pair_table.write_own(rows, world.out)
    groups, store = write_groups(own, "text", world.out), world.store("top")
    plan = RULES.plan(store, "l2", None)
    assert plan is not None
    races = Races(RULES, plan, {Top.name: Top(2)})
    (full,) = full_part({Top.name: groups}, races, world.out)
    assert world.score(store, [full]) == 3 * 2 * len(STEPS)
    assert write_races({Top.name: groups}, store, races, 1, f"{world.out}/r.parquet").pairs == 0
    pairs = write_pairs(world.out, own, store, "l2", raced=True)
    top = write_raced_top(pairs, world.out, "text", TopRaces(groups, store, races))
    found = [
        (line["text"], line["rank"], line["image"]) for line in parquet.read_table(top).to_pylist()
    ]
    assert [line[:2] for line in found] == [("text 0", 1), ("text 0", 2), ("text 1", 1)]
    assert found[2][2] == "3.png" and {line[2] for line in found[:2]} == {"0.png", "2.png"}
    by_image = {line["image"]: line for line in parquet.read_table(pairs).to_pylist()}
    assert by_image["1.png"]["failure"].startswith("unreadable")
    assert by_image[found[0][2]]["score"] >= by_image[found[1][2]]["score"]
    assert {by_image[f"{n}.png"]["measured"] for n in (0, 2, 3)} == {len(STEPS)}


def test_the_best_of_many(world: World) -> None:
    """One that cannot be read loses; the others are those of the full scores, by score."""
    (world.root / "5.png").write_bytes(b"no image")
    rows = [CaptionRow(str(n), f"{n}.png", ("some text",)) for n in range(12)]
    own, _, _ = pair_table.write_own(rows, world.out)
    groups, store = write_groups(own, "text", world.out), world.store("top")
    options = RaceOptions(Racing(0.02), audit=0.0)
    plan = options.plan(store, "l2", None)
    assert plan is not None
    world.examples = {Top.name: groups}
    races = Races(options, plan, {Top.name: Top(3)})
    work = write_races(world.examples, store, races, 1, f"{world.out}/r.parquet")
    for line in parquet.read_table(work.uri).to_pylist():
        block = BlockRaces(world.scorer, read_block(line), plan)
        block.run()
        world.put(store, block.lines())
    pairs = write_pairs(world.out, own, store, "l2", raced=True)
    table = parquet.read_table(pairs).to_pylist()
    assert sum(line["measured"] for line in table) < 11 * len(STEPS)
    found = TopRaces(groups, store, races)
    top = parquet.read_table(write_raced_top(pairs, world.out, "text", found)).to_pylist()
    assert [line["rank"] for line in top] == [1, 2, 3]
    assert [line["score"] for line in top] == sorted((line["score"] for line in top), reverse=True)
    summary = summarise(pairs, 3)
    assert 1 <= summary.compared < 11 and summary.failures == 1
    assert found.figure is not None and found.figure.forwards < found.figure.full
    whole = world.store("whole")
    world.score(whole, [Examples(own, own)])
    best = parquet.read_table(
        write_top(write_pairs(world.out, own, whole, "l2"), world.out, 3, "text")
    )
    assert {line["image"] for line in top} == set(best["image"].to_pylist())


# --- the published rounds


def published(
    errors: np.ndarray, grid: Sequence[int], samples: Sequence[int], kept: Sequence[int]
) -> tuple[int, int]:
    """Diffusion Classifier's adaptive loop, plainly: the class it ends with and the errors it evaluated.

    Of every class that is left it evaluates the round's timesteps that it has not evaluated yet, and
    keeps the classes of lowest mean error over all of them.
    """
    steps = sorted(grid)
    known: dict[int, dict[int, float]] = {c: {} for c in range(len(errors))}
    left, done = list(known), 0
    for n, keep in zip(samples, kept, strict=True):
        stride = len(steps) // n
        for c in left:
            for t in steps[stride // 2 :: stride][:n]:
                if t not in known[c]:
                    known[c][t] = errors[c, steps.index(t)]
                    done += 1
        means = {c: float(np.mean(list(known[c].values()))) for c in left}
        left = sorted(left, key=lambda c: means[c])[:keep]
    return left[0], done


def test_the_published_rounds_against_their_plain_loop(world: World) -> None:
    """Through table, actor, store and evaluation: the same picks, the same number of forwards."""
    samples, kept = (4, 9, 32), (5, 2, 1)
    grid = plan_timesteps("diffusion-classifier", 32)
    world.scorer = scorer(world.root, grid)
    names = [f"class number {number}" for number in range(12)]
    some = [Example(f"{k}", (f"{k}.png",), tuple(names), "text", k) for k in range(12)]
    uri, _ = pair_table.write_examples("pets", some, world.out, None)
    world.examples = {"pets": Examples(uri, uri)}
    settings = {"protocol": "diffusion-classifier", "timesteps": grid}
    whole, raced = (world.store(name, **settings) for name in ("whole", "raced"))
    world.score(whole)
    options = RaceOptions(Rounds(samples, kept))
    spent = world.race(raced, options, error="mse")
    right = done = 0
    for item in read_scored(uri, whole, "mse"):
        pick, evaluated = published(item.conditional[0], grid, samples, kept)
        right, done = right + (pick == item.example.gold), done + evaluated
    assert spent == done < 12 * 12 * 32 / 2
    found = world.results(raced, options)
    assert found.rows[0].value == pytest.approx(right / 12)
    assert found.races[0].rules == "rounds of 4, 9, 32 keeping 5, 2, 1"
    assert found.races[0].forwards == done
