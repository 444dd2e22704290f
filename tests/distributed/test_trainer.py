"""What the driver of a training asks for, logs and calls the same run."""

from __future__ import annotations

import contextlib
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch

from diffitm.core.errors import InputError
from diffitm.distributed import devices, session, trainer
from diffitm.distributed.trainer import Workers, measured, settings_of, workers_of
from diffitm.distributed.worker_group import GroupSettings, run_group
from diffitm.training.lora.options import FinetuneConfig
from tests.ranks import Handle


def test_workers_that_the_options_ask_for() -> None:
    config = FinetuneConfig(workers="2:5", cpus_per_worker=1.5, gpus_per_worker=0.5, retries=7)
    assert workers_of(config) == Workers(2, 5, 1.5, 0.5, 7)
    assert workers_of(FinetuneConfig(workers=3)) == Workers(3, 3, None, None, 3)


@pytest.mark.parametrize(
    ("accum", "expected"), [(8, (2, 5)), (5, (2, 5)), (4, (2, 4)), (1, (1, 1))]
)
def test_workers_that_have_something_to_do(
    accum: int, expected: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    job: Any = SimpleNamespace(grad_accum_steps=accum)
    assert trainer._useful(Workers(2, 5, None, None, 0), job) == expected
    told = [f"--workers 5: an update has {accum} micro-batches"] if accum < 5 else []
    assert [message.split(",")[0] for message in caplog.messages] == told


def test_the_share_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU where there are any; what is asked for; refused where the least number does not fit."""
    has = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr(session, "resources", lambda: has)
    assert trainer.worker_share(Workers(2, 9, None, None, 0)) == (1.0, 1.0)
    assert trainer.worker_share(Workers(4, 9, 2.0, 0.5, 0)) == (2.0, 0.5)
    with pytest.raises(InputError, match=r"--workers 3 with 1 GPUs each: the cluster has 2"):
        trainer.worker_share(Workers(3, 9, None, None, 0))
    with pytest.raises(InputError, match=r"--workers 3 with 3 processors each: the cluster has 8"):
        trainer.worker_share(Workers(3, 3, 3.0, 0.0, 0))
    has = {"CPU": 8.0}
    assert trainer.worker_share(Workers(8, 9, None, None, 0)) == (1.0, 0.0)


def test_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Of updates with the time left, of validations with what they measured; all become curves."""
    shown: list[dict[str, float]] = []
    curves: Any = SimpleNamespace(add=shown.append)
    lines = trainer._Lines(40, curves, lambda line: f"loss {line['loss']:.2f}")
    costs = {"examples_per_second": 2.5, "waiting": 0.25, "seconds_per_update": 3.0}
    told = [
        {"step": 0, "accuracy/a": 0.5, "accuracy/b": 0.25, "reconstruction_blind": 0.125},
        {"step": 10, "loss": 0.5} | costs,
        {"step": 40, "loss": 0.25} | costs,
    ]
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.tell(told)
    assert shown == told
    assert caplog.messages == [
        "update 0: a 50.0%, b 25.0%, reconstruction blind 0.1250",
        "update 10 of 40: loss 0.50; 2.5 examples/s, 25% waiting, 1 min 30 s left",
        "update 40 of 40: loss 0.25; 2.5 examples/s, 25% waiting",
    ]
    assert measured({"step": 1, "x": 2}) == ""


def test_a_run_of_the_same_settings() -> None:
    """Whatever it runs on and wherever it goes; with other ones where the weights depend on them."""
    config = FinetuneConfig(data="s3://b/d?key=x", out="a", workers=2, track=["wandb"], lr=1e-3)
    found = settings_of(config, pipeline="finetune.py")
    assert found["data"] == "s3://b/d" and found["pipeline"] == "finetune.py"
    assert (found["lr"], found["seed"]) == (1e-3, 0)
    other = FinetuneConfig(
        data="s3://b/d?key=y", out="b", workers=8, retries=0, lr=1e-3, cpus_per_worker=2.0,
        gpus_per_worker=1.0, checkpoint_every=7, log_every=3, gradient_checkpointing=True,
    )  # fmt: skip
    assert settings_of(other, pipeline="finetune.py") == found
    for name in ("out", "workers", "preset", "ray_address", "checkpoint_every", "track"):
        assert name not in found
    assert {"steps", "epochs", "effective_batch", "batch_size", "objective", "rank"} <= found.keys()


class Elastic:
    """Groups of workers that come to such an end; what it was made of."""

    stop: str | None = None
    checkpoint: Any = "kept"

    def __init__(self, plan: Any, places: Any, monitor: Any, retries: int) -> None:
        Elastic.given, self.monitor = (plan, places, retries), monitor

    def to_end(self) -> Any:
        told = self.monitor.actor
        told.add({"step": 8, "accuracy/a": 0.5})
        told.lose("a.jpg: cut off")
        if self.stop:
            told.stop(self.stop)
        return SimpleNamespace(checkpoint=self.checkpoint)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a training of 4 micro-batches an update; its result, and the curves' and rooms' ends."""
    ends: list[str] = []

    class Room:
        def __init__(self, *given: Any) -> None:
            self.given, self.standing = given, None

        def close(self) -> None:
            ends.append("room")

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(session, "start_here", lambda kind: Handle(kind()))
    monkeypatch.setattr(session, "resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr("diffitm.distributed.capacity.Capacity", Room)
    monkeypatch.setattr("diffitm.distributed.elastic.ElasticTraining", Elastic)
    monkeypatch.setattr(
        "diffitm.distributed.progress.Watch", lambda *given, **more: contextlib.nullcontext()
    )
    rows = SimpleNamespace(usable=1234)
    job: Any = SimpleNamespace(rows=rows, steps=8, micro_batch_size=2, grad_accum_steps=4)
    shown: list[Any] = []
    curves: Any = SimpleNamespace(add=shown.append, close=lambda: ends.append("curves"))

    def run(gpus: float | None = None) -> Any:
        workers = Workers(2, 9, 1.5, gpus, 7)
        out = str(tmp_path)
        result = trainer.fit("m", job, workers, "run", curves, out, str)
        return result, ends, shown

    run.ends = ends  # type: ignore[attr-defined]
    return run


def test_a_training_and_its_end(fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On workers that have something to do; the last lines are shown, unreadable images are handed
    on, and nothing is asked for any more."""
    with caplog.at_level(logging.INFO, "diffitm"):
        (result, lost), ends, shown = fit()
    assert (result.checkpoint, lost) == ("kept", {"a.jpg: cut off": 1})
    assert shown == [{"step": 8, "accuracy/a": 0.5}]
    assert sorted(ends) == ["curves", "room"]
    plan, places, retries = Elastic.given
    assert places.given == ({"CPU": 1.5, "GPU": 1.0}, 2, 4) and retries == 7
    assert (plan.module, plan.name) == ("m", "run")
    assert (plan.share, plan.processors) == ({"CPU": 1.5, "GPU": 1.0}, 1.5)
    assert plan.folder == str(tmp_path / "train") and (tmp_path / "train").is_dir()
    assert "1,234 rows, 8 updates of 8 examples" in caplog.messages
    fit(gpus=0.0)
    assert Elastic.given[1].given[0] == {"CPU": 1.5}


def test_a_training_that_was_stopped(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elastic, "stop", "the loss of row 3 is nan")
    with pytest.raises(
        InputError, match=r"row 3 is nan; the checkpoints of .*/train/run are intact"
    ):
        fit()
    monkeypatch.setattr(Elastic, "checkpoint", None)
    with pytest.raises(InputError, match=r"row 3 is nan$"):
        fit()
    monkeypatch.setattr(Elastic, "stop", None)
    with pytest.raises(InputError, match="the run left no checkpoint"):
        fit()
    assert sorted(fit.ends) == ["curves"] * 3 + ["room"] * 3


def test_what_ray_train_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try of a group, whose checkpoints stay; the exchange of memory over gloo."""
    from ray.train import torch as ray_torch

    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, loop: Any, **how: Any) -> None:
            given.update(how)

        def fit(self) -> str:
            return "result"

    monkeypatch.setattr(ray_torch, "TorchTrainer", Trainer)
    shares = ({"CPU": 1.5}, {"CPU": 2.0, "GPU": 1.0})
    for share in shares:
        job: Any = SimpleNamespace(steps=3, reads_images=True)
        plan = GroupSettings("m", job, share, 1.5, "run", "/x", None)  # type: ignore[arg-type]
        assert run_group(plan, 3, "monitor") == "result"
        scaling, run = given["scaling_config"], given["run_config"]
        assert (scaling.num_workers, scaling.use_gpu) == (3, "GPU" in share)
        assert scaling.resources_per_worker == share
        assert (run.name, run.storage_path) == ("run", "/x")
        assert run.failure_config.max_failures == 0
        assert run.checkpoint_config.num_to_keep == 2
        assert given["torch_config"].backend == "gloo"
        settings = given["train_loop_config"]
        assert (settings["module"], settings["monitor"]) == ("m", "monitor")
        assert (settings["decodes"], settings["processors"]) == (True, 1.5)
        assert pickle.loads(settings["job"]) == job


def test_processors_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it was given, else its share of what Ray and the system let its node use."""
    context = SimpleNamespace(get_node_id=lambda: "b")
    nodes = [
        {"NodeID": "a", "Resources": {"CPU": 64.0}},
        {"NodeID": "b", "Resources": {"CPU": 6.0, "GPU": 2.0}},
    ]
    local = SimpleNamespace(get_local_world_size=lambda: 4)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.train, "get_context", lambda: local)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert devices.processors(2.5) == 2.5
    assert devices.processors(0.0) == 0.0
    assert devices.processors(None) == 6 / 4
    given = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for gpus in (0.0, 1.0, 0.5, 0.1):
        devices.take_processors(gpus)
    assert given == [3, 1, 1], "a scoring actor's go with its GPUs"
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {0, 1})
    assert devices.processors(None) == 2 / 4
