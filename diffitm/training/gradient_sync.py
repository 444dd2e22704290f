"""Gradients that workers sum up: views of a few flat buffers, sent while the last backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes that are exchanged at once, as torch's DistributedDataParallel has it


class Gradients:
    """The gradients of parameters, as views of buffers of some BUCKET bytes each.

    Backward passes add to them in place, so an exchange needs no copy of them. Parameters of different
    `parts` share no buffer.
    """

    def __init__(self, parts: Iterable[Sequence[nn.Parameter]]) -> None:
        self.buffers: list[Tensor] = []
        self.places: dict[nn.Parameter, tuple[int, Tensor]] = {}  # buffer and view
        for part in parts:
            for bucket in _buckets(part):
                self._place(bucket)
        self.missing: list[set[nn.Parameter]] = []  # by buffer: whose last gradient is to come
        self.unsent: list[int] = []  # buffers, the next one last
        self.works: list[Any] = []
        self.group: Any = None

    def _place(self, bucket: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in bucket]
        buffer = bucket[0].new_zeros(sum(sizes))
        for parameter, view in zip(bucket, buffer.split(sizes), strict=True):
            self.places[parameter] = (len(self.buffers), view.view_as(parameter))
            parameter.grad = self.places[parameter][1]
            parameter.register_post_accumulate_grad_hook(self._arrives)
        self.buffers.append(buffer)

    def wait(self, part: Iterable[nn.Parameter], waits: bool) -> None:
        """Leave a part out, or in again. Without a gradient an optimizer passes a parameter over."""
        for parameter in part:
            parameter.requires_grad_(not waits)
            parameter.grad = None if waits else self.places[parameter][1]

    def zero(self) -> None:
        """Set all to 0."""
        torch._foreach_zero_(self.buffers)

    def send(self, group: Any = None) -> None:
        """Send each buffer to the other processes of the group as soon as the next backward pass, which
        must be the last one of this process, has added to all of it. All processes send in one order."""
        self.group, self.missing = group, [set() for _ in self.buffers]
        for parameter, (number, _) in self.places.items():
            if parameter.grad is not None:
                self.missing[number].add(parameter)
        self.unsent = [number for number, missing in enumerate(self.missing) if missing]

    def exchange(self, group: Any = None) -> None:
        """Replace the gradients by their sums over the processes of the group, on all alike; what was not
        sent is sent now."""
        if not self.missing:
            self.send(group)
        while self.unsent:
            self._send_next()
        for work in self.works:
            work.wait()
        self.missing, self.works = [], []

    def _arrives(self, parameter: nn.Parameter) -> None:
        if self.missing:
            self.missing[self.places[parameter][0]].discard(parameter)
            while self.unsent and not self.missing[self.unsent[-1]]:
                self._send_next()

    def _send_next(self) -> None:
        buffer = self.buffers[self.unsent.pop()]
        self.works.append(torch.distributed.all_reduce(buffer, group=self.group, async_op=True))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Neighbours of one dtype and device, together about BUCKET bytes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        if bucket and (size >= BUCKET or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
