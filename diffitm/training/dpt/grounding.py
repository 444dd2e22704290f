"""The losses of boxes and their phrases: queries matched with boxes, then MDETR's criterion.

Kamath et al. 2021, with the weights of Qu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import box_convert, generalized_box_iou

from diffitm.models.dpt_grounding import CLASSES, Boxes
from diffitm.training.dpt.expressions import Expression, GroundingWeights

COSTS = (1.0, 5.0, 2.0)  # of matching: classes, L1, GIoU
NO_OBJECT = 0.1  # weight of a query without a box, in the loss of classes
TEMPERATURE = 0.07
EPSILON = 1e-6  # of what a mean is divided by
FAR = 1e9  # cost where one is not finite


@dataclass(frozen=True)
class GroundingLosses:
    """Of a micro-batch, each a sum over its boxes divided by how many those are; `total` is weighted."""

    total: Tensor
    classes: Tensor
    l1: Tensor
    giou: Tensor
    alignment: Tensor


@dataclass(frozen=True)
class Target:
    """The boxes of an expression [N, 4], which tokens name each, bool [N, L], and which are of the text at
    all, its beginning and its end among them, bool [L]."""

    boxes: Tensor
    tokens: Tensor
    read: Tensor

    @property
    def classes(self) -> Tensor:
        """The share of each class in a box, [N, CLASSES]: all its tokens alike."""
        shares = self.tokens.float() / (self.tokens.sum(1, keepdim=True) + EPSILON)
        return pad(shares, (0, CLASSES - shares.shape[1]))


def target_of(
    expression: Expression, places: Tensor, end: int, device: torch.device | str
) -> Target:
    """Of an expression whose tokens are of characters `places` [L, 2], the last of them at `end`. What a
    model cuts of a text has no tokens."""
    begins, ends = places[:, 0], places[:, 1]
    tokens = torch.zeros(len(expression.boxes), len(places), dtype=torch.bool)
    for row, spans in zip(tokens, expression.spans, strict=True):
        for first, last in spans:
            row |= (begins < last) & (ends > first) & (ends > begins)
    boxes = torch.tensor(expression.boxes, dtype=torch.float32).view(-1, 4)
    read = torch.arange(len(places)) <= end
    return Target(boxes.to(device), tokens.to(device), read.to(device))


def grounding_losses(
    found: Boxes, tokens: Tensor, targets: Sequence[Target], weights: GroundingWeights
) -> GroundingLosses:
    """Of what the queries found and the tokens' unit vectors [B, L, D].

    Each box is one query's, by the least cost of all. A query without a box is to be of no object; an
    expression without boxes, all of them.
    """
    pairs = [match(found, row, target) for row, target in enumerate(targets)]
    rows = torch.cat([torch.full_like(query, row) for row, (query, _) in enumerate(pairs)])
    queries = torch.cat([query for query, _ in pairs])
    own = [(target, box) for target, (_, box) in zip(targets, pairs, strict=True)]
    boxes = torch.cat([target.boxes[box] for target, box in own])
    count = max(1, sum(len(target.boxes) for target in targets))
    classes = torch.zeros_like(found.logits)
    classes[:, :, -1] = 1
    classes[rows, queries] = torch.cat([target.classes[box] for target, box in own])
    weight = torch.full_like(found.logits[:, :, 0], NO_OBJECT)
    weight[rows, queries] = 1
    of_classes = -(weight * (found.logits.log_softmax(-1) * classes).sum(-1)).sum() / count
    chosen = found.boxes[rows, queries]
    of_l1 = (chosen - boxes).abs().sum() / count
    of_giou = (1 - generalized_box_iou(corners(chosen), corners(boxes)).diagonal()).sum() / count
    shape = (*found.logits.shape[:2], tokens.shape[1])
    named = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    named[rows, queries] = torch.cat([target.tokens[box] for target, box in own])
    read = torch.stack([target.read for target in targets])
    of_alignment = alignment(found.aligned, tokens, named, read) / count
    total = (
        weights.classes * of_classes
        + weights.l1 * of_l1
        + weights.giou * of_giou
        + weights.alignment * of_alignment
    )
    parts = (of_classes, of_l1, of_giou, of_alignment)
    return GroundingLosses(total, *(part.detach() for part in parts))


@torch.no_grad()
def match(found: Boxes, row: int, target: Target) -> tuple[Tensor, Tensor]:
    """Which query of example `row` has which box: places of both, of the least cost together."""
    shares, boxes = found.logits[row].softmax(-1), found.boxes[row]
    parts = (
        -shares @ target.classes.T,
        torch.cdist(boxes, target.boxes, p=1),
        -generalized_box_iou(corners(boxes), corners(target.boxes)),
    )
    cost = torch.stack([weight * part for weight, part in zip(COSTS, parts, strict=True)]).sum(0)
    # A cost that is not finite must reach the loss, which ends the run by naming the rows.
    places = linear_sum_assignment(cost.nan_to_num(FAR, FAR, -FAR).cpu())
    query, box = (torch.as_tensor(place, device=boxes.device) for place in places)
    return query, box


def alignment(queries: Tensor, tokens: Tensor, named: Tensor, read: Tensor) -> Tensor:
    """MDETR's contrastive alignment, summed up: of unit vectors [B, Q, D] and [B, L, D], with `named` bool
    [B, Q, L] the tokens of a query's box and `read` bool [B, L] those of the text, half of it from boxes
    to tokens and half from tokens to boxes."""
    logits = queries @ tokens.transpose(1, 2) / TEMPERATURE
    open_logits = logits.masked_fill(~read[:, None], -torch.inf)
    terms = []
    for along in (2, 1):
        mean = logits.masked_fill(~named, 0).sum(along) / (named.sum(along) + EPSILON)
        # Of tokens beside the text, whose column is -inf, none is named.
        every = (open_logits if along == 2 else logits).logsumexp(along)
        terms.append((every - mean).masked_fill(~named.any(along), 0).sum())
    return (terms[0] + terms[1]) / 2


def corners(boxes: Tensor) -> Tensor:
    """Boxes [N, 4] of centre, width and height as left, top, right, bottom."""
    return box_convert(boxes, "cxcywh", "xyxy")
