"""Sweeps without Ray: the option language, the halves, learned weights, the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from diffitm.commands import sweep_scores, sweep_trainings
from diffitm.commands.sweep import KINDS, run
from diffitm.core.config import option
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.distributed.tuner import stopper
from diffitm.sweep.options import Kind, read_sweep
from diffitm.sweep.report import write_report
from diffitm.sweep.result import (
    TrialResult,
    cells,
    open_sweep,
    ranked,
    write_best,
    write_table,
)
from diffitm.sweep.score_settings import TaskErrors, half_of, measure, parse_range
from diffitm.sweep.space import Axis, describe, draw, grid, read_axis
from diffitm.sweep.timestep_weights import Contrasts, learn
from diffitm.tasks.base import RetrievalTask


@dataclass(frozen=True)
class Plain:
    """A pipeline's options."""

    lr: float = option(1e-4, "rate")
    steps: int | None = option(None, "updates")
    recap: str = option("all", "tokens")
    tasks: list[str] = option(["all"], "tasks")
    cache: bool = option(False, "cache")


KIND = {"plain": Kind("plain", Plain, axes=(Axis("recap", ("all", "none")),))}


def test_words_and_file_make_axes_and_fixed_values(tmp_path: Path) -> None:
    """Words win over the file; lists are swept, unless the option takes one."""
    file = tmp_path / "sweep.yaml"
    file.write_text("lr: [1e-5, 0.001]\nsteps: 10\ntasks: [clevr]\nsamples: 3\n")
    words = ["plain", "--config", str(file), "steps=5,7", "--out", "o", "cache=true"]
    sweep = read_sweep(KIND, words)
    assert sweep.axes == (
        Axis("lr", (1e-5, 1e-3)),
        Axis("recap", ("all", "none")),
        Axis("steps", (5, 7)),
    )
    assert sweep.fixed == {"tasks": ["clevr"], "cache": True}
    assert (sweep.config.samples, sweep.config.out) == (3, "o")
    assert len(list(grid(sweep.axes))) == 8


def test_switches_are_swept_too() -> None:
    assert Axis("cache", (True, False)) in read_sweep(KIND, ["plain", "cache=true,false"]).axes


def test_paths_of_trials_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial runs in a folder of its own. Ids of the Hub and names stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").mkdir()
    (tmp_path / "mine.pt").touch()
    words = ["teacher=sd,org/sd", "clip=ViT-L-14:mine.pt", "data=DIR/*.tar", "recap=all"]
    words += ["validation_tasks=mmvp_vlm,my/task.py:Mine", "validation_data=file:///b/x"]
    sweep = sweep_trainings.placed(read_sweep(KINDS, ["recap-density", *words]))
    assert sweep.axes == (Axis("teacher", (f"{tmp_path}/sd", "org/sd")),)
    assert sweep.fixed == {
        "clip": f"ViT-L-14:{tmp_path}/mine.pt",
        "data": f"{tmp_path}/DIR/*.tar",
        "validation_data": "file:///b/x",
        "validation_tasks": ["mmvp_vlm", f"{tmp_path}/my/task.py:Mine"],
        "recap": "all",
    }
    named = sweep_trainings.placed(read_sweep(KINDS, ["lambda", "model=shapes", "data=shapes"]))
    assert named.fixed == {"model": "shapes", "data": "shapes"}


def test_a_sweep_of_scores_names_its_protocol() -> None:
    with pytest.raises(InputError, match=r"auto is none .* snr"):
        sweep_scores.check(read_sweep(KINDS, ["timesteps", "model=shapes", "protocol=auto"]), "out")


def test_tasks_without_right_answers_are_not_scored() -> None:
    sweep = sweep_scores.check(read_sweep(KINDS, ["timesteps", "model=shapes"]), "out")
    tasks = sweep_scores.gdbench_config(sweep, "diffusionitm", "out").tasks
    assert "winoground" in tasks and not {"mmbias", "flickr30k_variance", "all"} & set(tasks)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_demo_sweeps_can_be_read(kind: str, tmp_path: Path) -> None:
    """What `make sweep-demo` runs."""
    file = Path(__file__).parents[2] / "pipelines" / "sweeps" / f"{kind}.yaml"
    sweep = read_sweep(KINDS, [kind, "--config", str(file), f"out={tmp_path}"])
    half = sweep_scores if kind == "timesteps" else sweep_trainings
    checked = half.check(sweep, str(tmp_path))
    assert len(list(grid(checked.axes))) >= 4


def test_a_single_value_fixes_a_default_axis() -> None:
    sweep = read_sweep(KIND, ["plain", "recap=all", "tasks=clevr,svo"])
    assert sweep.axes == ()
    assert sweep.fixed == {"recap": "all", "tasks": ["clevr", "svo"]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say what to sweep: plain; nothing was given"),
        (["plan"], "did you mean 'plain'"),
        (["plain", "lrr=1"], "unknown key 'lrr'; did you mean 'lr'"),
        (["plain", "lr=1,x"], "lr: 'x' is not a number"),
        (["plain", "steps=2.5"], "steps: '2.5' is not a whole number"),
        (["plain", "search=gird"], "search: 'gird' is not one of grid, random, optuna"),
        (["plain", "lr=uniform(0,1)"], "ranges need search=random or optuna"),
        (["plain", "lr=uniform(1,0)", "search=random"], "the first number must be the smaller"),
        (["plain", "lr=loguniform(0,1)", "search=random"], "must start above 0"),
        (["plain", "steps=uniform(1,9)", "search=random"], "use randint"),
        (["plain", "recap=uniform(0,1)", "search=random"], "the option is no number"),
        (["plain", "lr=normal(0,1)", "search=random"], "a range is uniform(LOW, HIGH)"),
        (["plain", "reduction=1"], "--reduction 1: must be at least 2"),
        (["plain", "samples=0", "parallel=0"], "--parallel 0: must be at least 1"),
    ],
)
def test_bad_words_are_told(words: list[str], told: str) -> None:
    with pytest.raises(InputError) as error:
        read_sweep(KIND, words)
    assert told in str(error.value)


def test_a_range_keeps_its_ends() -> None:
    axis = read_axis("lr", float, "loguniform(1e-5, 1e-3)")
    assert axis == Axis("lr", (), "loguniform", 1e-5, 1e-3)
    assert axis.extremes == (1e-5, 1e-3)
    assert read_axis("steps", int | None, "randint(2, 4)").extremes == (2, 4)


def test_settings_drawn_are_distinct_and_the_same_again() -> None:
    axes = [Axis("a", (1, 2, 3)), Axis("b", ("x", "y"))]
    found = draw(axes, 4, seed=0)
    assert found == draw(axes, 4, seed=0) != draw(axes, 4, seed=1)
    assert len({str(setting) for setting in found}) == 4
    assert len(draw(axes, 50, seed=0)) == 6
    ranges = [Axis("lr", (), "loguniform", 1e-5, 1e-1), Axis("n", (), "randint", 1, 2)]
    drawn = draw(ranges, 40, seed=0)
    assert {setting["n"] for setting in drawn} == {1, 2}
    assert 10 < sum(setting["lr"] < 1e-3 for setting in drawn) < 30
    assert all(1e-5 <= setting["lr"] <= 1e-1 for setting in drawn)
    few = draw([Axis("n", (), "randint", 1, 4)], 8, seed=0)
    assert sorted(setting["n"] for setting in few) == [1, 2, 3, 4]


def test_the_real_kinds_take_the_options_of_their_pipelines() -> None:
    sweep = read_sweep(KINDS, ["lambda", "lambda=0.5,1", "lr=1e-4", "model=shapes"])
    assert [axis.name for axis in sweep.axes] == ["lambda_"]
    assert sweep.fixed == {"lr": 1e-4, "model": "shapes"}
    sweep = read_sweep(KINDS, ["recap-density", "density=0,0.5,1"])
    assert sweep.axes == (Axis("density", (0.0, 0.5, 1.0)),)
    with pytest.raises(InputError, match="density: stands for recap"):
        read_sweep(KINDS, ["recap-density", "density=0,1", "recap=all"])
    sweep = read_sweep(KINDS, ["timesteps", "model=a,b", "range=0-500,500-1000"])
    assert {axis.name for axis in sweep.axes} == {"model", "number", "range", "weighting"}


class Choice(RetrievalTask):
    """One text of two."""

    name = "choice"

    def examples(self, root: str) -> Iterator[Example]:
        return iter(())


def _table(errors: np.ndarray, seed: int = 0) -> TaskErrors:
    """An image and two texts an example, the first right; `errors` [n, 2, N]."""
    examples = [
        Example(id=str(i), images=(f"{i}.png",), texts=("a", "b"), direction="text", gold=0,
                cluster=f"{seed}-{i}")
        for i in range(len(errors))
    ]  # fmt: skip
    halves = [half_of(example.cluster) for example in examples]
    chooses = np.array([half for half, _ in halves])
    chosen = errors[chooses]
    folds = np.array([fold for half, fold in halves if half])
    clusters = np.array([example.cluster for example in examples])
    starts = np.arange(len(chosen))
    contrasts = Contrasts(chosen[:, 1] - chosen[:, 0], starts, folds, clusters[chooses])
    values = errors.reshape(-1, errors.shape[-1]).astype(np.float32)
    return TaskErrors(Choice(), examples, values, contrasts, chooses, clusters, {})


def _errors(n: int, useful: list[int], steps: int, seed: int = 0) -> np.ndarray:
    """Noise, but at the useful timesteps, where the wrong text has the larger error."""
    errors = np.random.default_rng(seed).normal(size=(n, 2, steps))
    errors[:, 1, useful] += 1.5
    return errors


def test_learning_finds_the_useful_timesteps() -> None:
    table = _table(_errors(400, [3, 7], 10))
    places, weights = learn([table.contrasts], np.arange(10), 2)
    assert places.tolist() == [3, 7]
    assert weights == pytest.approx([0.5, 0.5], abs=0.1)
    _, spread = learn([table.contrasts], np.arange(10), 10)
    assert spread.sum() == pytest.approx(1)
    assert spread[[3, 7]].sum() > 0.7


def test_learning_from_noise_keeps_equal_weights() -> None:
    """The pull is chosen on held-out clusters, so that nothing is made of chance."""
    table = _table(_errors(200, [], 10, seed=1))
    _, weights = learn([table.contrasts], np.arange(10), 10)
    assert weights == pytest.approx(0.1)
    assert learn([table.contrasts], np.arange(10), 2)[0].tolist() == [2, 7]


def test_decisions_of_one_cluster_are_one_witness() -> None:
    """The same decisions ten times over are no more evidence than once."""
    once = _table(_errors(60, [2], 8, seed=3)).contrasts
    often = Contrasts(
        np.repeat(once.values, 10, axis=0),
        np.arange(10 * len(once.values)),
        np.repeat(once.fold, 10),
        np.repeat(once.cluster, 10),
    )
    _, weights = learn([once], np.arange(8), 8)
    _, again = learn([often], np.arange(8), 8)
    assert again == pytest.approx(weights, abs=1e-3)


def test_a_task_without_two_folds_keeps_equal_weights() -> None:
    """Nothing can be held out, so nothing shows that other weights are better."""
    table = _table(_errors(40, [3], 6)).contrasts
    alone = replace(table, fold=np.zeros_like(table.fold))
    assert learn([alone], np.arange(6), 6)[1] == pytest.approx(1 / 6)


def test_tasks_share_weights_and_count_the_same() -> None:
    """A large task does not outvote a small one."""
    large, small = _table(_errors(900, [1], 6)), _table(_errors(90, [4], 6, seed=2), seed=2)
    _, weights = learn([large.contrasts, small.contrasts], np.arange(6), 6)
    assert weights[4] > 0.6 * weights[1]
    assert weights[[0, 2, 3, 5]].max() < weights[4] / 2


def test_the_gradient_of_the_loss_is_right() -> None:
    """Against finite differences."""
    from diffitm.sweep.timestep_weights import _losses

    task = _table(_errors(60, [1], 4)).contrasts
    weights, small = np.array([0.1, 0.4, 0.3, 0.2]), 1e-6
    losses, slope = _losses(task, weights)
    for i in range(4):
        shifted = weights + small * np.eye(4)[i]
        numeric = (_losses(task, shifted)[0].mean() - losses.mean()) / small
        assert slope[i] == pytest.approx(numeric, rel=1e-3, abs=1e-6)


def test_turning_the_errors_of_one_half_changes_its_own_figure_alone() -> None:
    """With equal weights; learned ones are in test_score_settings.py."""
    errors = _errors(300, [2], 5)
    table = _table(errors)
    found = measure([table], list(range(100, 600, 100)), 5, "0-1000", "uniform")
    errors[~table.chooses] = errors[~table.chooses, ::-1]
    turned = measure([_table(errors)], list(range(100, 600, 100)), 5, "0-1000", "uniform")
    assert turned["accuracy"] == found["accuracy"]
    assert turned["measured"] == pytest.approx(1 - found["measured"])
    assert found["tasks"]["choice"]["low"] < found["measured"] < found["tasks"]["choice"]["high"]


def test_a_setting_takes_the_timesteps_of_its_range() -> None:
    table, steps = _table(_errors(100, [2], 10)), list(range(0, 1000, 100))
    found = measure([table], steps, 2, "200-800", "uniform")
    assert found["timesteps"] == [300, 600]
    assert measure([table], steps, 50, "200-800", "uniform")["timesteps"] == steps[2:8]
    assert measure([table], steps, 1, "0-1000", "learned")["timesteps"] == [200]
    with pytest.raises(InputError, match="none of the stored timesteps lies in 10-90"):
        measure([table], steps, 1, "10-90", "uniform")
    with pytest.raises(InputError, match="LOW below HIGH"):
        parse_range("500-100")


def test_asha_stops_the_worse_and_lets_the_last_validation_be() -> None:
    """Rungs at 4 and 12 of 36 updates; at the end there is nothing left to stop."""
    sweep = read_sweep(KINDS, ["lambda", "model=shapes", "data=shapes"])
    asha = stopper(sweep, steps=36, every=4)
    assert asha is not None
    (bracket,) = asha._brackets

    def told(name: str, step: int, accuracy: float) -> str:
        return bracket.on_result(SimpleNamespace(trial_id=name), step, accuracy)

    assert [told("good", 4, 0.9), told("fair", 4, 0.8)] == ["CONTINUE", "STOP"]
    assert told("good", 12, 0.9) == "CONTINUE"
    assert stopper(read_sweep(KINDS, ["lambda", "early_stopping=false"]), 36, 4) is None


def test_trainings_of_several_lengths_are_not_stopped_by_rank(tmp_path: Path) -> None:
    words = ["lambda", "model=shapes", "data=shapes", "steps=20,100", f"out={tmp_path}"]
    with pytest.raises(InputError, match="steps: trainings of several lengths"):
        run(read_sweep(KINDS, words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lambda", "model=shapes", "data=shapes", "clip=shapes"], "unknown key 'clip'"),
        (["lambda", "model=shapes", "lamda=1"], "unknown key 'lamda'; did you mean 'lambda'?"),
        (["timesteps", "model=shapes", "clip=shapes"], "clip: a sweep has no use for it"),
        (["timesteps"], "give model=, such as model=shapes"),
        (
            ["timesteps", "model=shapes", "seed=0,1"],
            "seed: give one value; scores are stored for one",
        ),
        (["timesteps", "model=shapes", "data=a,b"], "data: give one value"),
        (["timesteps", "model=shapes", "tasks=mmbias"], "tasks: mmbias has no right and wrong"),
        (["timesteps", "model=shapes", "store=/no/run"], "store: /no/run holds no scores"),
        (
            ["lambda", "model=s3://KEY:SECRET@b/a,shapes", "data=shapes"],
            "model: a s3:// URI holds credentials",
        ),
        (
            ["recap-density", "teacher=s3://KEY:SECRET@b/a"],
            "teacher: a s3:// URI holds credentials",
        ),
        (["timesteps", "model=shapes", "range=0-5"], "range: none of the 49 of diffusionitm lies"),
        (["timesteps", "model=shapes", "number=0,5"], "number: 0 must be at least 1"),
        (
            ["recap-density", "clip=shapes", "teacher=shapes", "data=/x"],
            "validation_data: give the",
        ),
        (["lambda", "model=shapes", "data=shapes", "validate_every=0"], "nothing to compare"),
        (["lambda", "data=shapes", "steps=2"], "give --model"),
    ],
)
def test_what_no_trial_could_use_is_told_before_any(
    words: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        run(read_sweep(KINDS, [*words, f"out={tmp_path / 'out'}"]))
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()


def test_keys_in_out_are_refused() -> None:
    with pytest.raises(InputError, match="out: a s3:// URI holds credentials"):
        run(read_sweep(KINDS, ["lambda", "out=s3://KEY:SECRET@bucket/x"]))


def _row(number: int, accuracy: float | None, steps: int, **more: object) -> TrialResult:
    state = "failed" if accuracy is None else "done"
    timesteps, weights = list(range(steps)), [1 / steps] * steps
    return TrialResult({"number": number}, state, accuracy=accuracy, timesteps=timesteps,
               weights=weights, **more)  # fmt: skip


def test_a_training_that_was_stopped_is_not_the_best() -> None:
    """At its end the other one may have fallen below it."""
    rows = [
        TrialResult({"lr": 1}, "stopped early", accuracy=0.58),
        TrialResult({"lr": 2}, "done", accuracy=0.5),
    ]
    assert [row.setting["lr"] for row in ranked(rows, [Axis("lr", (1, 2))])] == [2, 1]


def test_the_best_comes_first_and_the_cheaper_of_equals() -> None:
    rows = [_row(9, 0.7, 9), _row(2, 0.7, 2), _row(5, None, 1), _row(3, 0.8, 3), _row(4, 0.8, 3)]
    axes = [Axis("number", (9, 2, 5, 3, 4))]
    assert [row.setting["number"] for row in ranked(rows, axes)] == [3, 4, 2, 9, 5]


def test_table_and_best_setting_are_files_that_others_read(tmp_path: Path) -> None:
    axes = [Axis("lambda_", (0.5, 1.0))]
    rows = [
        TrialResult(
            {"lambda_": 1.0}, "done", accuracy=0.6, base=0.5, step=8, curve=[[0, 0.5], [8, 0.6]]
        ),
        TrialResult({"lambda_": 0.5}, "failed", failure="no images"),
    ]
    table = pq.read_table(write_table(rows, axes, str(tmp_path))).to_pylist()
    assert [line["lambda"] for line in table] == [1.0, 0.5]
    assert (table[0]["accuracy"], table[1]["failure"]) == (0.6, "no images")
    values = {"lambda_": 1.0, "model": "shapes", "steps": None, "weights": [0.1] * 90}
    path, text = write_best("best.yaml", values, "why", str(tmp_path))
    assert Path(path).read_text() == text
    assert len(text.splitlines()) == 5
    assert yaml.safe_load(text) == {k.rstrip("_"): v for k, v in values.items()}
    assert describe(rows[0].setting, axes) == "lambda 1"


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    open_sweep(str(tmp_path), {"axes": ["lr 1, 2"]})
    open_sweep(str(tmp_path), {"axes": ["lr 1, 2"]})
    with pytest.raises(InputError, match=r"axes was .*give another out="):
        open_sweep(str(tmp_path), {"axes": ["lr 1, 3"]})


def test_a_row_in_words() -> None:
    """Accuracies in percent, a gain with its sign, of a failure its reason."""
    axes = [Axis("lambda_", (0.5, 1.0)), Axis("range", ("0-500",))]
    score = TrialResult(
        {"lambda_": 0.5, "range": "0-500"}, "done", accuracy=0.5, measured=0.25, timesteps=[1, 2]
    )
    assert cells(score, axes) == {
        "lambda": "0.5", "range": "0-500", "timesteps": "2", "accuracy": "50.0",
        "measured": "25.0", "state": "done",
    }  # fmt: skip
    training = TrialResult(
        {"lambda_": 1.0}, "stopped early", accuracy=0.5, base=0.625, step=9, at_step=8
    )
    assert cells(training, axes[:1]) == {
        "lambda": "1", "accuracy": "50.0", "gain": "-12.5", "update": "8", "state": "stopped early",
    }  # fmt: skip
    lost = TrialResult({"lambda_": 1.0}, "failed", failure="no images", base=0.5)
    assert cells(lost, axes[:1]) == {"lambda": "1", "accuracy": "", "state": "no images"}


def test_the_other_sweep_is_described(tmp_path: Path) -> None:
    open_sweep(str(tmp_path), {"kind": "lambda", "axes": "lr 1", "gone": 1})
    with pytest.raises(InputError) as error:
        open_sweep(str(tmp_path), {"kind": "lambda", "axes": "lr 2", "new": 3})
    told = "(axes was lr 1 and is lr 2; gone was 1 and is None; new was None and is 3)"
    assert told in str(error.value) and "kind" not in str(error.value)


def test_numbers_are_drawn_between_the_ends() -> None:
    """Evenly: as many below the middle as above, of a logarithmic range below the middle power."""
    uniform = [s["x"] for s in draw([Axis("x", (), "uniform", 2.0, 4.0)], 200, seed=0)]
    assert 2 <= min(uniform) < 2.1 and 3.9 < max(uniform) <= 4
    assert 80 < sum(x < 3 for x in uniform) < 120
    powers = [s["x"] for s in draw([Axis("x", (), "loguniform", 1.0, 100.0)], 200, seed=0)]
    assert 1 <= min(powers) < 1.1 and 80 < sum(x < 10 for x in powers) < 120
    mixed = draw([Axis("x", ("a", "b")), Axis("n", (), "randint", 1, 1)], 9, seed=0)
    assert sorted(s["x"] for s in mixed) == ["a", "b"]


def test_axes_in_words_and_their_ends() -> None:
    ranged, listed = Axis("lambda_", (), "uniform", 0.5, 2.0), Axis("n", (1, 2))
    assert (str(ranged), str(listed)) == ("lambda uniform(0.5, 2)", "n 1, 2")
    assert [*grid([listed, ranged])] == [
        {"n": n, "lambda_": value} for n in (1, 2) for value in (0.5, 2.0)
    ]
    assert describe({"lambda_": 0.123456, "n": 2}, [ranged, listed]) == "lambda 0.1235, n 2"
    assert describe({}, []) == "the given setting"
    assert read_axis("n", int, [1, "1", 2]) == Axis("n", (1, 2))
    assert read_axis("n", int, ["3"]) == 3
    assert read_axis("tasks", list[str], ["a", "b"]) == ["a", "b"]
    for text, told in (
        ("randint(1.5, 2)", "whole numbers"),
        ("randint(1, 2.5)", "whole numbers"),
        ("randint(x, 2)", "both ends must be numbers"),
        ("randint(2, 2)", "the first number must be the smaller"),
    ):
        with pytest.raises(InputError, match=told):
            read_axis("n", int, text)


def test_words_of_a_sweep_in_all_forms() -> None:
    """--key value, --key=value, hyphens; brackets hold commas; search options are ours."""
    words = ["plain", "--lr", "loguniform(1e-5, 1e-3)", "--steps=3", "cache=no", "search-seed=4"]
    sweep = read_sweep(KIND, [*words, "search=random", "early_stopping=false", "recap=all"])
    assert sweep.axes == (Axis("lr", (), "loguniform", 1e-5, 1e-3),)
    assert sweep.fixed == {"steps": 3, "cache": False, "recap": "all"}
    assert (sweep.config.search, sweep.config.search_seed) == ("random", 4)
    assert (sweep.config.early_stopping, sweep.config.samples) == (False, 8)


def test_the_report_shows_every_setting(tmp_path: Path) -> None:
    axes = [Axis("number", (2, 5))]
    tasks = {"clevr": {"chosen": 0.9, "measured": 0.625, "low": 0.5, "high": 0.75, "n": 8}}
    rows = [
        _row(2, 0.75, 2, measured=0.625, tasks=tasks),
        _row(5, None, 5, failure="no such store"),
    ]
    page = Path(write_report("timesteps", rows, axes, "clevr", "a: 1", {}, str(tmp_path)))
    text = page.read_text()
    for part in ("Sweep: timesteps", "2 settings of number 2, 5", "62.5", "75.0", "a: 1"):
        assert part in text
    assert "number 5: no such store" in text and "mean of the tasks" in text
    lines = [TrialResult({"number": 2}, "done", accuracy=0.5, base=0.25, curve=[[0, 0.25]])]
    text = Path(write_report("lambda", lines, axes, "", "", {}, str(tmp_path))).read_text()
    assert "Hollow marks" in text and "Accuracy by number" in text
