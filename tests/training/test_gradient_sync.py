"""Gradients that workers sum up in place, in buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffitm.training.gradient_sync import BUCKET, Gradients

WORLD = 3


class Exchange:
    """Stands in for the other processes, which have the same gradients: what was sent, and when."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.awaited = 0

    def all_reduce(self, tensor: Tensor, group: Any, async_op: bool) -> Exchange:
        assert async_op and group == "group"
        self.sent.append(tensor.numel())
        tensor.mul_(WORLD)
        return self

    def wait(self) -> None:
        self.awaited += 1


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Exchange:
    exchange = Exchange()
    monkeypatch.setattr(torch.distributed, "all_reduce", exchange.all_reduce)
    return exchange


def two_parts() -> tuple[list[nn.Parameter], list[nn.Parameter], Any]:
    """Parts of 8 and of 3 parameters, and a function that goes backward through both."""
    first, second = nn.Linear(3, 2), nn.Linear(2, 1)

    def backward() -> None:
        second(first(torch.ones(1, 3))).sum().backward()

    return list(first.parameters()), list(second.parameters()), backward


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_backward_passes_add_up_in_the_buffers() -> None:
    first, second, backward = two_parts()
    gradients = Gradients([first, second])
    assert [len(buffer) for buffer in gradients.buffers] == [8, 3]
    backward()
    once = gradients_of([*first, *second])
    backward()
    assert all(map(torch.equal, gradients_of([*first, *second]), [2 * g for g in once]))
    total = sum(float(2 * gradient.sum()) for gradient in once[2:])
    assert float(gradients.buffers[1].sum()) == pytest.approx(total)
    gradients.zero()
    assert not any(g.any() for g in gradients_of([*first, *second]))


def test_sums_are_the_same_however_they_are_sent(others: Exchange) -> None:
    """While the last pass goes on, last parameters first; or afterwards, where there was no pass."""
    first, second, backward = two_parts()
    gradients = Gradients([first, second])
    backward()
    once = gradients_of([*first, *second])
    gradients.send("group")
    assert others.sent == []
    backward()
    assert others.sent == [3, 8]
    assert others.awaited == 0
    gradients.exchange("group")
    assert others.sent == [3, 8] and others.awaited == 2
    assert all(map(torch.equal, gradients_of([*first, *second]), [2 * WORLD * g for g in once]))
    gradients.zero()
    gradients.exchange("group")
    assert others.sent == [3, 8, 3, 8] and others.awaited == 4
    backward()
    assert others.sent == [3, 8, 3, 8]  # no longer the last pass
    assert all(map(torch.equal, gradients_of([*first, *second]), once))


def test_a_part_that_waits_is_left_out(others: Exchange) -> None:
    """The optimizer passes it over, and nothing of it is sent; later it joins in with a gradient of 0."""
    first, second, backward = two_parts()
    gradients = Gradients([first, second])
    gradients.wait(first, True)
    gradients.send("group")
    backward()
    gradients.exchange("group")
    assert others.sent == [3] and first[0].grad is None
    gradients.wait(first, False)
    assert first[0].grad is not None and not first[0].grad.any()
    gradients.zero()
    gradients.send("group")
    backward()
    gradients.exchange("group")
    assert others.sent == [3, 3, 8]


def test_a_parameter_without_a_use_holds_nothing_up(others: Exchange) -> None:
    """Its buffer, and those that come after it in the order of all processes, are sent in the end."""
    first, second, backward = two_parts()
    unused = nn.Parameter(torch.zeros(5))
    gradients = Gradients([first, [unused], second])
    gradients.send("group")
    backward()
    assert others.sent == [3]
    gradients.exchange("group")
    assert others.sent == [3, 5, 8]


def test_a_buffer_has_one_kind_of_number() -> None:
    kinds = [torch.float32, torch.float32, torch.float64, torch.float32]
    parameters = [nn.Parameter(torch.ones(2, dtype=kind)) for kind in kinds]
    gradients = Gradients([parameters])
    assert [(len(b), b.dtype) for b in gradients.buffers] == [
        (4, torch.float32), (2, torch.float64), (2, torch.float32),
    ]  # fmt: skip
    for parameter in parameters:
        (3 * parameter).sum().backward()
    assert all((buffer == 3).all() for buffer in gradients.buffers)


def test_buckets_are_bounded() -> None:
    """A parameter larger than one has a bucket of its own."""
    sizes = [BUCKET // 8, BUCKET // 8, BUCKET, 10]
    gradients = Gradients([[nn.Parameter(torch.zeros(size)) for size in sizes]])
    assert [len(buffer) for buffer in gradients.buffers] == [BUCKET // 4, BUCKET, 10]
