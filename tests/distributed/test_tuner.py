"""What a sweep makes of Ray Tune's results, and what its log says, without Ray."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayTaskError

from diffitm.core.config import option
from diffitm.core.errors import InputError
from diffitm.distributed import tuner
from diffitm.sweep.options import Kind, Sweep, SweepConfig
from diffitm.sweep.result import TrialResult
from diffitm.sweep.space import Axis

LR, RANK = Axis("lr", (0.1, 0.01)), Axis("rank", (), "randint", 2, 8)


def a_sweep(**more: Any) -> Sweep:
    fixed = {"data": "s3://b/d", "workers": 3, "out": "o", "batch_size": 8, "steps": 9}
    kind = Kind("finetune", type(option(1, "x")))
    return Sweep(kind, SweepConfig(**more), fixed, (LR,))


def a_result(**metrics: Any) -> Any:
    return SimpleNamespace(metrics=metrics, error=None, config={"setting": {"lr": 0.1}})


def test_rows_of_the_table() -> None:
    """Done, cut short by ASHA, or failed with the reason and nothing measured."""
    done = tuner._row(a_result(accuracy=0.7, step=9, finished=True, time_total_s=12, other=1))
    assert done == TrialResult({"lr": 0.1}, "done", seconds=12.0, accuracy=0.7, step=9)
    stopped = tuner._row(a_result(accuracy=0.5, step=3, curve=[[3, 0.5]]))
    assert stopped.state == "stopped early"
    assert (stopped.curve, stopped.failure, stopped.seconds) == ([[3, 0.5]], None, 0.0)
    failed = a_result(accuracy=0.5, finished=True, time_total_s=2.0)
    failed.error = RuntimeError("Traceback\n  ..\nValueError: bad")
    assert tuner._row(failed) == TrialResult({"lr": 0.1}, "failed", "ValueError: bad", 2.0)
    failed.metrics = None
    assert tuner._row(failed).seconds == 0


def test_the_line_that_says_why() -> None:
    """Of what a user is meant to read the first, as Ray hands it on; of others the last."""
    meant = RayTaskError("f", "Traceback ..", InputError("--lr 0: must be above 0\nmore"))
    assert tuner._cause(meant.as_instanceof_cause()) == "--lr 0: must be above 0"
    assert tuner._cause(RuntimeError("first\n  last \n")) == "last"
    assert tuner._cause("its node is lost") == "its node is lost"


def test_what_results_depend_on() -> None:
    """The options of the search and of the pipeline, not where and with how many it runs."""
    found = tuner.identity(a_sweep())
    assert (found["sweep"], found["axes"]) == ("finetune", ["lr 0.1, 0.01"])
    assert found["options"].keys() == {"data", "steps"}
    for name in ("search", "samples", "search_seed", "early_stopping", "grace", "reduction"):
        assert name in found
    assert not {"out", "parallel", "store", "ray_address"} & found.keys()
    same = a_sweep(out="elsewhere", parallel=7)
    assert tuner.identity(same) == found
    assert tuner.identity(a_sweep(samples=3)) != found
    assert tuner.identity(replace(a_sweep(), axes=(RANK,))) != found


def test_settings_of_a_search(caplog: pytest.LogCaptureFixture) -> None:
    """All of a grid; as many as were asked for, or as there are."""
    assert tuner._settings(a_sweep(samples=1)) == [{"lr": 0.1}, {"lr": 0.01}]
    assert len(tuner._settings(a_sweep(search="random", samples=1))) == 1
    with caplog.at_level(logging.INFO, "diffitm"):
        both = tuner._settings(a_sweep(search="random", samples=2))
        assert sorted(s["lr"] for s in both) == [0.01, 0.1] and caplog.messages == []
        assert len(tuner._settings(a_sweep(search="random", samples=3))) == 2
    assert caplog.messages == ["there are 2 settings, not samples=3"]
    ranges = replace(a_sweep(search="random", samples=4), axes=(RANK,))
    one = tuner._settings(ranges)
    assert one == tuner._settings(ranges)
    other = SweepConfig(search="random", samples=4, search_seed=1)
    assert one != tuner._settings(replace(ranges, config=other))


def test_domains_of_optuna() -> None:
    """Whole numbers with both ends, other ranges as they are, values to choose from."""
    whole = tuner._domain(RANK)
    assert (whole.lower, whole.upper) == (2, 9)  # Tune's upper end is left out
    rate = tuner._domain(Axis("lr", (), "loguniform", 1e-4, 1e-2))
    assert (rate.lower, rate.upper, rate.sampler.__class__.__name__) == (1e-4, 1e-2, "_LogUniform")
    assert tuner._domain(LR).categories == [0.1, 0.01]


@pytest.mark.parametrize(
    ("steps", "every", "more", "expected"),
    [
        (36, 4, {"grace": 2, "reduction": 3}, (8, 37, 3)),
        (36, 50, {"grace": 1, "reduction": 4}, (36, 37, 4)),
        (36, 0, {}, None),
        (36, 4, {"early_stopping": False}, None),
    ],
)
def test_where_trainings_are_compared(
    steps: int, every: int, more: dict[str, Any], expected: tuple[int, ...] | None
) -> None:
    """From the first validations on, at the latest at the end, which stops none."""
    asha = tuner.stopper(a_sweep(**more), steps, every)
    if asha is None:
        assert expected is None
        return
    (bracket,) = asha._brackets
    rungs = [milestone for milestone, _ in bracket._rungs]
    assert (min(rungs), asha._max_t, asha._reduction_factor) == expected
    assert asha._time_attr == "step"


def a_trial(name: str, status: str = "RUNNING") -> Any:
    return SimpleNamespace(
        trial_id=name,
        status=status,
        config={"setting": {"lr": 0.1}},
        last_result={"accuracy": 0.625},
        get_error=lambda: None,
    )


def test_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Updates of a training, ends with the time left, and tries that were cut short."""
    now = [100.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now[0])
    lines = tuner._Progress((LR,), total=5)
    lines.setup()
    first, second, over = a_trial("a"), a_trial("b"), a_trial("z", "TERMINATED")
    trials = [first, second, over]
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.on_trial_result(1, trials, first, {"step": 4, "accuracy": 0.5})
        lines.on_trial_result(1, trials, first, {"step": 9, "accuracy": 0.6, "finished": True})
        lines.on_trial_result(1, trials, first, {"accuracy": 0.6})
        now[0] = 130.0
        lines.on_trial_complete(1, trials, first)
        lines.on_trial_recover(1, trials, second)
        second.get_error = lambda: RuntimeError("..\nOSError: busy")
        lines.on_trial_recover(1, trials, second)
        now[0] = 160.0
        lines.on_trial_error(1, trials, second)
        more = [a_trial(name, "ERROR") for name in "cd"]
        lines.on_trial_error(1, [*trials, *more], more[1])
    assert caplog.messages == [
        "lr 0.1: update 4, accuracy 50.0%",
        "lr 0.1: accuracy 62.5% (2 of 5 done, about 1 min 30 s left)",
        "lr 0.1: tried again after: its node is lost",
        "lr 0.1: tried again after: OSError: busy",
        "lr 0.1: failed (3 of 5 done, about 1 min 0 s left)",
        "lr 0.1: failed (5 of 5 done)",
    ]


class Tuner:
    """Stands in for Ray Tune's: takes down how it was made, and gives these results."""

    made: ClassVar[list[dict[str, Any]]] = []
    results: ClassVar[list[Any]] = []

    def __init__(self, trainable: Any, **how: Any) -> None:
        self.made.append({"trainable": trainable, **how})

    @staticmethod
    def can_restore(where: str, storage_filesystem: Any) -> bool:
        return True

    @classmethod
    def restore(cls, where: str, trainable: Any, **how: Any) -> Tuner:
        return cls(trainable, where=where, **how)

    def fit(self) -> list[Any]:
        return self.results


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    for name in (
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
        "RAY_AIR_NEW_OUTPUT",
        "TUNE_DISABLE_SIGINT_HANDLER",
    ):
        monkeypatch.setenv(name, "")  # what a run sets goes with the test
    monkeypatch.setattr(tuner.tune, "Tuner", Tuner)
    monkeypatch.setattr(tuner.tune, "with_resources", lambda trainable, share: (trainable, share))
    monkeypatch.setattr(tuner, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY", "OTHER"})
    monkeypatch.setattr(Tuner, "made", [])
    monkeypatch.setattr(Tuner, "results", [a_result(accuracy=0.5, finished=True)] * 2)
    return Tuner.made


def test_a_sweep_begins_and_goes_on(made: list[dict[str, Any]], tmp_path: Any) -> None:
    """A grid on processors, a failed trial again; keys stay out of Ray's options. With other settings
    or another state it begins anew."""
    out = str(tmp_path)
    rows = tuner.Experiment(sweep=a_sweep(), trainable="f", cpus=1.5, parallel=3, out=out).run()
    assert [row.state for row in rows] == ["done", "done"]
    assert sorted(tuner.ENV_VARS_TO_PROPAGATE) == ["OTHER"]
    (first,) = made
    assert first["trainable"] == ("f", {"CPU": 1.5})
    assert first["param_space"] == {"setting": {"grid_search": [{"lr": 0.1}, {"lr": 0.01}]}}
    plan, run = first["tune_config"], first["run_config"]
    assert (plan.metric, plan.mode, plan.num_samples) == ("accuracy", "max", 1)
    assert plan.search_alg.max_concurrent == 3 and plan.max_concurrent_trials is None
    assert isinstance(plan.scheduler, tuner.FIFOScheduler) and not plan.reuse_actors
    assert (run.storage_path, run.failure_config.max_failures) == (f"{out}/tune", tuner.RETRIES)
    assert run.callbacks[0].total == 2
    where = tmp_path / "tune" / run.name
    where.mkdir()
    (where / "experiment_state-1.json").touch()
    tuner.Experiment(sweep=a_sweep(), trainable="f", cpus=1.5, parallel=3, out=out).run()
    assert made[1]["where"] == str(where) and made[1]["resume_unfinished"]
    assert (made[1]["resume_errored"], made[1]["restart_errored"]) == (False, True)
    tuner.Experiment(
        sweep=a_sweep(), trainable="f", cpus=1.5, parallel=3, out=out, state=["another store"]
    ).run()
    tuner.Experiment(sweep=a_sweep(parallel=2), trainable="f", cpus=1.5, parallel=2, out=out).run()
    names = [made[i]["run_config"].name for i in (0, 2, 3)]
    assert len(set(names)) == 3


def test_trainings_are_stopped_by_their_stopper(made: list[dict[str, Any]], tmp_path: Any) -> None:
    """Their trials take none of the processors, on the head, and are not tried again."""
    asha = tuner.stopper(a_sweep(), 36, 4)
    tuner.Experiment(
        sweep=a_sweep(), trainable="f", cpus=0, parallel=3, stopper=asha, out=str(tmp_path)
    ).run()
    assert made[0]["trainable"] == ("f", tuner.HEAD)
    assert made[0]["tune_config"].scheduler is asha
    assert made[0]["run_config"].failure_config.max_failures == 0


def test_a_sweep_whose_state_is_cut_off(made: list[dict[str, Any]], tmp_path: Any) -> None:
    Tuner.results.pop()
    with pytest.raises(InputError, match="its state is cut off, 1 of 2; delete it, run again"):
        tuner.Experiment(
            sweep=a_sweep(), trainable="f", cpus=1.0, parallel=1, out=str(tmp_path)
        ).run()


def test_optuna_is_not_installed(
    made: list[dict[str, Any]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    sweep = a_sweep(search="optuna", samples=2)
    with pytest.raises(InputError, match=r"pip install 'diffitm\[optuna\]'"):
        tuner.Experiment(sweep=sweep, trainable="f", cpus=1.0, parallel=1, out=str(tmp_path)).run()


def test_optuna_draws_so_many(made: list[dict[str, Any]], tmp_path: Any) -> None:
    pytest.importorskip("optuna")
    sweep = a_sweep(search="optuna", samples=2, search_seed=3)
    tuner.Experiment(sweep=sweep, trainable="f", cpus=1.0, parallel=5, out=str(tmp_path)).run()
    plan = made[0]["tune_config"]
    assert (plan.num_samples, plan.max_concurrent_trials) == (2, 5)
    assert made[0]["param_space"]["setting"]["lr"].categories == [0.1, 0.01]
    run = tmp_path / "tune" / made[0]["run_config"].name
    run.mkdir()
    (run / "experiment_state-1.json").touch()
    tuner.Experiment(sweep=sweep, trainable="f", cpus=1.0, parallel=5, out=str(tmp_path)).run()
    assert (made[1]["resume_errored"], made[1]["restart_errored"]) == (True, False)
