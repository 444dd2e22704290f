"""The losses of boxes written from their formulas: one example, one box and one query after the other, every
assignment tried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

CLASSES, NO_OBJECT, TEMPERATURE = 256, 0.1, 0.07


def giou(one: Tensor, two: Tensor) -> Tensor:
    """Of two boxes of centre, width and height (Rezatofighi et al. 2019)."""
    (l1, t1, r1, b1), (l2, t2, r2, b2) = corners(one), corners(two)
    across = (torch.minimum(r1, r2) - torch.maximum(l1, l2)).clamp(min=0)
    down = (torch.minimum(b1, b2) - torch.maximum(t1, t2)).clamp(min=0)
    union = (r1 - l1) * (b1 - t1) + (r2 - l2) * (b2 - t2) - across * down
    whole = (torch.maximum(r1, r2) - torch.minimum(l1, l2)) * (
        torch.maximum(b1, b2) - torch.minimum(t1, t2)
    )
    return across * down / union - (whole - union) / whole


def iou(one: Sequence[float], two: Sequence[float]) -> float:
    """Of two boxes of centre, width and height."""
    sides = []
    for place in (0, 1):
        low = max(box[place] - box[place + 2] / 2 for box in (one, two))
        high = min(box[place] + box[place + 2] / 2 for box in (one, two))
        sides.append(max(0.0, high - low))
    both = sides[0] * sides[1]
    return both / (one[2] * one[3] + two[2] * two[3] - both)


def corners(box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def shares(tokens: Sequence[int]) -> dict[int, float]:
    return {token: 1 / len(tokens) for token in tokens}


def assigned(
    logits: Tensor, boxes: Tensor, wanted: Sequence[Tensor], tokens: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """The query of each box, of the least cost of all assignments."""
    probabilities = [logits[q].softmax(0).tolist() for q in range(len(logits))]
    cost = [
        [
            -sum(share * probabilities[q][k] for k, share in shares(names).items())
            + 5 * sum(abs(float(a - b)) for a, b in zip(boxes[q], box, strict=True))
            - 2 * float(giou(boxes[q], box))
            for q in range(len(boxes))
        ]
        for box, names in zip(wanted, tokens, strict=True)
    ]
    every = itertools.permutations(range(len(boxes)), len(wanted))
    return min(every, key=lambda chosen: sum(cost[n][q] for n, q in enumerate(chosen)))


Example = tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[Sequence[int]], int]


def losses(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of classes, L1, GIoU and alignment. Each example: logits [Q, CLASSES], boxes [Q, 4] and vectors [Q, D]
    of the queries, vectors [L, D] of the tokens, its boxes, the tokens that name each, and how many
    tokens are the text's."""
    of_classes, of_l1, of_giou, of_alignment = ([torch.zeros(())] for _ in range(4))
    count = max(1, sum(len(example[4]) for example in examples))
    for logits, boxes, queries, vectors, wanted, tokens, length in examples:
        chosen = assigned(logits.detach(), boxes.detach(), wanted, tokens)
        for q in range(len(boxes)):
            logs = logits[q] - logits[q].exp().sum().log()
            if q not in chosen:
                of_classes.append(-NO_OBJECT * logs[CLASSES - 1])
                continue
            n = chosen.index(q)
            of_classes += [-share * logs[k] for k, share in shares(tokens[n]).items()]
            of_l1.append(sum((boxes[q] - wanted[n]).abs(), torch.zeros(())))
            of_giou.append(1 - giou(boxes[q], wanted[n]))
            like = [queries[q] @ vectors[k] / TEMPERATURE for k in range(length)]
            mean = sum(like[k] for k in tokens[n]) / len(tokens[n])
            of_alignment.append((torch.stack(like).exp().sum().log() - mean) / 2)
        for token in {token for names in tokens for token in names}:
            like = [queries[q] @ vectors[token] / TEMPERATURE for q in range(len(boxes))]
            own = [q for n, q in enumerate(chosen) if token in tokens[n]]
            mean = sum(like[q] for q in own) / len(own)
            of_alignment.append((torch.stack(like).exp().sum().log() - mean) / 2)
    kinds = (of_classes, of_l1, of_giou, of_alignment)
    one, two, three, four = (torch.stack(kind).sum() / count for kind in kinds)
    return one, two, three, four
