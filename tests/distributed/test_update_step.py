"""Updates of the loop on a model of one weight, where each number can be had by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffitm.core.schema import Example
from diffitm.distributed import train_loop
from diffitm.training import validation
from diffitm.training.module import Measured, TrainModule, Worker
from diffitm.training.run_folder import AVERAGED, BEST, HISTORY
from diffitm.training.sampler import Item, Loaded
from diffitm.training.validation import spread
from tests.ranks import Ranks

LR, STEPS = 0.1, 3


def micro_batch(*values: float | None) -> Loaded:
    """Items with such images; None for one that cannot be read."""
    items = [Item(i, f"{i}", "", f"{i}", "", i) for i in range(len(values))]
    images = {f"{i}": value for i, value in enumerate(values) if value is not None}
    return items, images, [f"{i}: cut off" for i, value in enumerate(values) if value is None]


def a_job(**more: Any) -> Any:
    settings = {
        "steps": STEPS, "micro_batch_size": 2, "grad_accum_steps": 2, "optimizer": "sgd", "lr": LR,
        "lr_scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 100.0,
        "ema": None, "waited": 0.0, "qualities": [], "dtype": "fp32", "seed": 0, "checkpoint_every": 100,
        "log_every": 1,
        "step": lambda step: [micro_batch(1.0, 3.0), micro_batch(5.0, 7.0)],
    }  # fmt: skip
    return SimpleNamespace(**settings | more)


class Line(TrainModule):
    """Loss weight x image, whose gradient is the mean of the images; logs it and the images' mean."""

    names = ("loss", "mean")

    def __init__(self, job: Any, worker: Worker) -> None:
        super().__init__(job, worker)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.groups = [([self.weight], job.lr)]
        self.asked: list[int] = []

        class Batches:
            waited = 0.0

            def steps(self, start: int) -> Iterator[list[Loaded]]:
                for step in range(start, job.steps):
                    self.waited += job.waited
                    yield job.step(step)[worker.rank :: worker.world]

        loader: Any = Batches()
        self.loader = loader

    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        values = torch.tensor([images[item.negative_image] for item in items])
        loss = (self.weight * values).mean()
        yield loss, (loss.detach(), values.mean())

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach().clone()}

    def load(self, weights: dict[str, Tensor]) -> None:
        self.weight.data.copy_(weights["weight"])

    def measures(self, step: int) -> bool:
        self.asked.append(step)
        return bool(self.job.qualities)  # type: ignore[attr-defined]

    def measure(self, step: int) -> Measured:
        quality = self.job.qualities[step]  # type: ignore[attr-defined]
        return Measured({"seen": self.weight.item()}, quality)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


def lines(ranks: Ranks) -> list[dict[str, float]]:
    return [dict(line) for line in ranks.monitor.lines]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_update_takes_the_mean_of_its_micro_batches(ranks: Ranks, world: int) -> None:
    """Gradients 2 and 6, of which SGD with momentum 0.9 goes 4, 7.6, 10.84."""
    assert ranks.train(Line, a_job(), world) == [STEPS] * world
    weights = [1.0, 1 - LR * 4, 1 - LR * (4 + 7.6), 1 - LR * (4 + 7.6 + 10.84)]
    assert ranks.weights()["weight"].item() == pytest.approx(weights[-1])
    found = lines(ranks)
    assert [line["loss"] for line in found] == pytest.approx([4 * w for w in weights[:-1]])
    for number, line in enumerate(found, 1):
        assert line["step"] == number
        assert (line["mean"], line["norm"], line["rate"]) == pytest.approx((4, 4, LR))
        assert line["examples_per_second"] == pytest.approx(4 / line["seconds_per_update"])
        assert line["waiting"] == 0


def test_images_that_cannot_be_read_drop_out(ranks: Ranks) -> None:
    """The others of their micro-batch stay, a micro-batch of none counts as 0; each is told."""
    steps = [
        [micro_batch(1.0, None), micro_batch(5.0, 7.0)],
        [micro_batch(None, None), micro_batch(5.0, 7.0)],
    ]
    job = a_job(steps=2, step=lambda step: steps[step])
    assert ranks.train(Line, job, 1) == [2]
    gradients = [(1 + 6) / 2, 6 / 2]
    last = 1 - LR * (gradients[0] + 0.9 * gradients[0] + gradients[1])
    assert ranks.weights()["weight"].item() == pytest.approx(last)
    assert [line["mean"] for line in lines(ranks)] == pytest.approx([3.5, 6.0])
    assert ranks.monitor.lost == {"0: cut off": 1, "1: cut off": 2}


def test_a_negative_image_that_cannot_be_read(ranks: Ranks) -> None:
    """Its example drops out, although its own image is there."""
    items = [Item(0, "a", "", "a", "", 0), Item(1, "a", "", "b", "", 1)]
    job = a_job(steps=1, grad_accum_steps=1, step=lambda step: [(items, {"a": 2.0}, ["b: none"])])
    assert ranks.train(Line, job, 1) == [1]
    assert ranks.weights()["weight"].item() == pytest.approx(1 - LR * 2)


def test_long_gradients_are_cut(ranks: Ranks) -> None:
    """To the norm; the log has what it was."""
    ranks.train(Line, a_job(steps=1, max_grad_norm=0.5), 1)
    assert ranks.weights()["weight"].item() == pytest.approx(1 - LR * 0.5)
    assert lines(ranks)[0]["norm"] == pytest.approx(4)


def test_rates_follow_their_schedule(ranks: Ranks) -> None:
    """The line of an update has the rate that it was made with: none at first, then a half."""
    job = a_job(lr_scheduler="constant_with_warmup", warmup_steps=2, weight_decay=0.0)
    ranks.train(Line, job, 1)
    assert [line["rate"] for line in lines(ranks)] == pytest.approx([0, LR / 2, LR])
    moved = LR / 2 * (4 * 1.9) + LR * (4 * 1.9 * 0.9 + 4)
    assert ranks.weights()["weight"].item() == pytest.approx(1 - moved)


def test_adamw(ranks: Ranks) -> None:
    """Its first update is one rate long, the weight decays by rate x decay before."""
    ranks.train(Line, a_job(steps=1, optimizer="adamw", weight_decay=0.5), 1)
    assert ranks.weights()["weight"].item() == pytest.approx(1 * (1 - LR * 0.5) - LR, abs=1e-6)


def test_what_is_due_when(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks before the first update and after each; lines and checkpoints every so many and at the
    end, under the update's number."""
    left: list[Line] = []
    monkeypatch.setattr(Line, "leave", lambda module, folder: left.append(module))
    ranks.train(Line, a_job(steps=5, log_every=2, checkpoint_every=3), 1)
    assert [path.name for path in ranks.checkpoints] == [
        "checkpoint_00000003",
        "checkpoint_00000005",
    ]
    assert [line["step"] for line in lines(ranks)] == [2, 4, 5]
    (module,) = left  # with the last checkpoint alone
    assert module.asked == [0, 1, 2, 3, 4, 5]
    steps = {
        every: [step for step in range(6) if module.is_due(step, every)] for every in (0, 2, 5)
    }
    assert steps == {0: [], 2: [0, 2, 4, 5], 5: [0, 5]}


def test_a_group_goes_on_from_its_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """Weights, momentum, schedule, averages, log and losses of images as without a break."""
    more = {"ema": 0.5, "lr_scheduler": "linear", "checkpoint_every": 2, "steps": 5}
    more["step"] = lambda step: [micro_batch(1.0, None), micro_batch(step, 7.0)]
    ranks.train(Line, a_job(**more), 1)
    cut, _, whole = ranks.checkpoints
    states = [torch.load(whole / "state.pt", weights_only=True)]
    history = json.loads((whole / HISTORY).read_text())
    files = {name: (whole / name).read_bytes() for name in (AVERAGED, "weights.safetensors")}
    assert files[AVERAGED] != files["weights.safetensors"]
    ranks.checkpoints, ranks.monitor.lost, ranks.monitor.lines = [cut], {}, []
    ranks.folder = tmp_path / "again"
    ranks.folder.mkdir()
    ranks.train(Line, a_job(**more), 1)
    assert [line["step"] for line in lines(ranks)] == [3, 4, 5]
    again = ranks.checkpoints[-1]
    states.append(torch.load(again / "state.pt", weights_only=True))
    assert files == {name: (again / name).read_bytes() for name in files}
    assert str(states[0]) == str(states[1])
    resumed = json.loads((again / HISTORY).read_text())
    assert [line["loss"] for line in resumed["history"]] == [h["loss"] for h in history["history"]]
    assert resumed["lost"] == history["lost"] == {"1: cut off": 5}
    assert resumed["step"] == 5


def test_what_an_update_costs(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the updates since the line before, two of which take ten seconds; one at the end takes ten."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(train_loop.time, "perf_counter", lambda: next(ticks))
    ranks.train(Line, a_job(log_every=2, waited=1.0), 1)
    costs = [
        (line["examples_per_second"], line["seconds_per_update"], line["waiting"])
        for line in lines(ranks)
    ]
    assert costs == [(0.8, 5.0, 0.2), (0.4, 10.0, 0.1)]
    assert all(line["peak_bytes"] > 2**20 for line in lines(ranks))


def test_averaged_weights(ranks: Ranks) -> None:
    """diffusers' average with its growing decay, and the present weights afterwards."""
    ranks.train(Line, a_job(steps=1, ema=0.9999), 1)
    folder = ranks.checkpoints[-1]
    assert ranks.weights()["weight"].item() == pytest.approx(0.6)
    # The first update takes the weights as they are: its decay is 0.
    assert load_file(folder / AVERAGED)["weight"].item() == pytest.approx(0.6)
    ranks.checkpoints.clear()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    ranks.train(Line, a_job(steps=2, ema=0.9999), 1)
    last, decay = 0.6 - LR * 7.6, 2 / 11
    average = decay * 0.6 + (1 - decay) * last
    assert load_file(ranks.checkpoints[-1] / AVERAGED)["weight"].item() == pytest.approx(average)
    assert ranks.weights()["weight"].item() == pytest.approx(last)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_no_number_changes_nothing(ranks: Ranks, world: int) -> None:
    """All stop before the update, and say which row it was."""
    job = a_job(step=lambda step: [micro_batch(1.0, 3.0), micro_batch(5.0, float("nan"))])
    assert ranks.train(Line, job, world) == [0] * world
    assert ranks.monitor.stopped == "step 1: the loss of row 0 (0), row 1 (1) is nan"
    assert ranks.checkpoints == [] and lines(ranks) == []


def test_accuracy_is_shared_out(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all workers of what could be scored; evenly spread examples, each once."""
    asked: list[list[int]] = []

    class Task:
        def examples(self, root: str) -> Iterator[Any]:
            yield from range(10)

    def credits(task: Any, chosen: list[int], scorer: Any) -> list[float | None]:
        asked.append(chosen)
        return [None if i == 4 else float(i) for i in chosen]

    monkeypatch.setattr(validation, "find_task", lambda name: Task)
    monkeypatch.setattr(validation, "credits", credits)
    check: Any = SimpleNamespace(root="", examples=5)

    def measure(module: Line, step: int) -> Measured:
        value = validation.accuracy("x", check, None, module.worker)  # type: ignore[arg-type]
        assert value is not None
        return Measured({"accuracy": value})

    monkeypatch.setattr(Line, "measure", measure)
    ranks.train(Line, a_job(steps=0, qualities=[0.0]), 2)
    assert sorted(asked) == [[0, 4, 8], [2, 6]]
    assert [line["accuracy"] for line in lines(ranks)] == [pytest.approx((0 + 2 + 6 + 8) / 4)]


def test_the_best_weights_are_kept(ranks: Ranks) -> None:
    """Those of the highest quality after the start, the first of equals; they are the averaged ones."""
    job = a_job(steps=3, qualities=[0.9, 0.5, 0.7, 0.7], ema=0.5, checkpoint_every=3)
    ranks.train(Line, job, 1)
    (folder,) = ranks.checkpoints
    seen = [line["seen"] for line in lines(ranks) if "seen" in line]
    assert load_file(folder / BEST)["weight"].item() == seen[2]
    assert load_file(folder / AVERAGED)["weight"].item() == seen[3]
    history = json.loads((folder / HISTORY).read_text())
    assert (history["base"], history["best"], history["best_step"]) == (0.9, 0.7, 2)


def test_spread() -> None:
    examples: list[Example] = list(np.arange(7))
    assert spread(examples, 3) == [0, 2, 4]
    assert spread(examples, 7) == spread(examples, 9) == examples
