"""What the driver of a training asks for, logs and calls the same run."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from diffitm.core.errors import InputError
from diffitm.distributed import session, trainer
from diffitm.distributed.trainer import Workers, measured, settings_of, workers_of
from diffitm.training.lora.options import FinetuneConfig


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
    assert trainer.share(Workers(2, 9, None, None, 0)) == (1.0, 1.0)
    assert trainer.share(Workers(4, 9, 2.0, 0.5, 0)) == (2.0, 0.5)
    with pytest.raises(InputError, match=r"--workers 3 with 1 GPUs each: the cluster has 2"):
        trainer.share(Workers(3, 9, None, None, 0))
    with pytest.raises(InputError, match=r"--workers 3 with 3 processors each: the cluster has 8"):
        trainer.share(Workers(3, 3, 3.0, 0.0, 0))
    has = {"CPU": 8.0}
    assert trainer.share(Workers(8, 9, None, None, 0)) == (1.0, 0.0)


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
