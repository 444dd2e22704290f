"""Gradients that workers sum up: views of a few flat buffers, so that no copy of them is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes that are exchanged at once, as torch's DistributedDataParallel has it


class Gradients:
    """The gradients of parameters, as views of buffers of some BUCKET bytes each.

    Backward passes add to them in place. Parameters of different `parts` share no buffer.
    """

    def __init__(self, parts: Iterable[Sequence[nn.Parameter]]) -> None:
        self.buffers: list[Tensor] = []
        self.places: dict[nn.Parameter, tuple[int, Tensor]] = {}  # buffer and view
        for part in parts:
            for bucket in _buckets(part):
                self._place(bucket)

    def _place(self, bucket: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in bucket]
        buffer = bucket[0].new_zeros(sum(sizes))
        for parameter, view in zip(bucket, buffer.split(sizes), strict=True):
            self.places[parameter] = (len(self.buffers), view.view_as(parameter))
            parameter.grad = self.places[parameter][1]
        self.buffers.append(buffer)

    def wait(self, part: Iterable[nn.Parameter], waits: bool) -> None:
        """Leave a part out, or in again. Without a gradient an optimizer passes a parameter over."""
        for parameter in part:
            parameter.requires_grad_(not waits)
            parameter.grad = None if waits else self.places[parameter][1]

    def zero(self) -> None:
        """Set all to 0."""
        torch._foreach_zero_(self.buffers)

    def exchange(self, group: Any = None) -> None:
        """Replace them by their sums over the processes of the group, on all alike."""
        live = {self.places[p][0] for p in self.places if p.grad is not None}
        works = [
            torch.distributed.all_reduce(self.buffers[number], group=group, async_op=True)
            for number in sorted(live)
        ]
        for work in works:
            work.wait()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Neighbours of one dtype and device, together about BUCKET bytes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (
            parameter.dtype,
            parameter.device,
        )
        if bucket and (size >= BUCKET or not alike):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
