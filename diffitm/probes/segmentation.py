"""How much of each pixel's class a linear head finds in frozen patch features: mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.metrics.intervals import BLOCK, RESAMPLES, no_spread, percentiles, wilson
from diffitm.models.clip_tokens import find_tower, image_side, patch_features
from diffitm.probes.labelled import IGNORED, THREADS, Pair, read_classes, read_pair, read_split
from diffitm.probes.linear import at_pixels, fit

PIXELS = 2**19  # at most, that a head is trained on: of 1024 features they take twice 2 GiB
COUNTS = ("correct", "predicted", "labelled")
Encoder = Callable[[Sequence[Image.Image]], Tensor]  # to patches [B, h, w, C], float32


@dataclass(frozen=True, eq=False)
class SegmentationResult:
    """Pixels of every image and class that were predicted right, predicted and labelled so, int
    [N, K] each: diagonal, column sums and row sums of the image's confusion matrix, which is all
    that IoU and accuracy need. Ignored pixels are in none of them."""

    model: str
    classes: list[str]
    names: list[str]  # of images, below the root
    correct: np.ndarray
    predicted: np.ndarray
    labelled: np.ndarray

    @property
    def images(self) -> int:
        return len(self.names)

    @property
    def iou(self) -> np.ndarray:
        """IoU of each class [K] over all images, nan for a class that no pixel is labelled as."""
        return _iou(self._counts().sum(0))

    @property
    def miou(self) -> float:
        """The mean IoU of the classes that are labelled."""
        return float(np.nanmean(self.iou))

    @property
    def accuracy(self) -> float:
        """The share of labelled pixels that were predicted right."""
        return float(self.correct.sum() / self.labelled.sum())

    def to_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
        return {**vars(self), **{name: getattr(self, name).tolist() for name in COUNTS}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> SegmentationResult:
        """The result that `to_json` gave."""
        return cls(**{**found, **{name: np.array(found[name], np.int64) for name in COUNTS}})

    def _counts(self) -> np.ndarray:
        """[N, 3, K], in the order of COUNTS."""
        return np.stack([self.correct, self.predicted, self.labelled], axis=1)


class Difference(NamedTuple):
    """First less second, the 95% interval and the two-sided p of no difference."""

    value: float
    low: float
    high: float
    p: float


def evaluate(
    model: Any, name: str, root: str, device: torch.device | str = "cpu", batch_size: int = 64
) -> SegmentationResult:
    """The linear probe of an open_clip model on `device`, called `name`, on the data set at `root`
    (its layout: diffitm.probes.labelled): trained on train, measured on val.

    Raises InputError for a model without dense tokens and for what is wrong with the data.
    """
    return probe(clip_encoder(model, name, device), name, root, batch_size)


def clip_encoder(model: Any, name: str, device: torch.device | str) -> Encoder:
    """Frozen patch features of images squashed to the model's square input."""
    tower = find_tower(model, name)
    side, config = image_side(tower), model.visual.preprocess_cfg
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    def encode(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([images.to_pixels(picture, side, "squash") for picture in pictures])
        scaled = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        return patch_features(tower, (scaled - mean) / std).float()

    return encode


def probe(encode: Encoder, name: str, root: str, batch_size: int = 64) -> SegmentationResult:
    """The linear probe of any patch features. Raises InputError for what is wrong with the data."""
    train, val = (read_split(root, split) for split in ("train", "val"))
    classes = read_classes(root, [*train, *val])
    head = fit(*_training_pixels(encode, root, train, batch_size), len(classes))
    kept, counts = [], []
    for (image, _), features, mask in _encoded(encode, root, val, batch_size):
        found = _count(head.predict(features, mask.shape), mask, len(classes))
        if found[-1].any():
            kept.append(image)
            counts.append(found)
    if not kept:
        raise InputError(f"{root}: no pixel of val has a class, all are {IGNORED}")
    return SegmentationResult(name, classes, kept, *np.stack(counts, axis=1))


def interval(result: SegmentationResult, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mIoU over images. One image says nothing: (0, 1).

    Percentiles of resamples, each of which averages the classes that are labelled in it. Where
    resamples do not differ, Wilson's interval of that many images.
    """
    if result.images == 1:
        return 0.0, 1.0
    resampled = _resampled(result, seed)
    if no_spread(resampled):
        return wilson(result.miou * result.images, result.images)
    return percentiles(resampled)


def paired(first: SegmentationResult, second: SegmentationResult, seed: int = 0) -> Difference:
    """Difference of two mIoUs; both bootstraps draw the same images. One image says nothing.

    p is twice the smaller share of resamples on either side of zero, so that it is no smaller than
    2 / (RESAMPLES + 1). Raises InputError for results of different images or labels.
    """
    same = first.names == second.names and first.classes == second.classes
    if not same or not np.array_equal(first.labelled, second.labelled):
        both = f"segmentation by {first.model!r} and {second.model!r}"
        raise InputError(f"{both} cannot be compared: their images or labels differ")
    value = first.miou - second.miou
    if first.images == 1:
        return Difference(value, -1.0, 1.0, 1.0)
    resampled = _resampled(first, seed) - _resampled(second, seed)
    fewer = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return Difference(value, *percentiles(resampled), min(1.0, 2 * (fewer + 1) / (RESAMPLES + 1)))


def _resampled(result: SegmentationResult, seed: int) -> np.ndarray:
    """The mIoU of each of RESAMPLES draws of as many images; a seed draws the same ones always."""
    rng = np.random.default_rng(seed)
    number, counts = result.images, result._counts().astype(float)
    means = []
    for _ in range(RESAMPLES // BLOCK):
        times = rng.multinomial(number, np.full(number, 1 / number), size=BLOCK).astype(float)
        drawn = (times @ counts.reshape(number, -1)).reshape(BLOCK, *counts.shape[1:])
        means.append(np.nanmean(_iou(drawn), axis=1))
    return np.concatenate(means)


def _iou(counts: np.ndarray) -> np.ndarray:
    """IoU [..., K] of counts [..., 3, K], nan where nothing is labelled."""
    correct, predicted, labelled = np.moveaxis(counts, -2, 0)
    empty = np.full(correct.shape, np.nan)
    return np.divide(correct, predicted + labelled - correct, out=empty, where=labelled > 0)


def _count(predicted: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class [3, K], in the order of COUNTS, where the mask [H, W] has a class."""
    predicted, labelled = predicted[mask != IGNORED], mask[mask != IGNORED]
    groups = (labelled[predicted == labelled], predicted, labelled)
    return np.stack([np.bincount(group, minlength=classes) for group in groups])


def _training_pixels(
    encode: Encoder, root: str, pairs: Sequence[Pair], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Features [N, C] and classes [N] of pixels drawn from the images, by a seed each: as many of
    an image as it has patches, fewer where all images would give more than PIXELS."""
    rows, labels = [], []
    for number, (_, features, mask) in enumerate(_encoded(encode, root, pairs, batch_size)):
        known = np.flatnonzero(mask != IGNORED)
        wanted = min(features[..., 0].numel(), max(1, PIXELS // len(pairs)), len(known))
        chosen = np.random.default_rng([0, number]).choice(known, wanted, replace=False)
        rows.append(at_pixels(features, mask.shape, chosen))
        labels.append(torch.from_numpy(mask.ravel()[chosen]))
    found = torch.cat(labels).long()
    if not len(found):
        raise InputError(f"{root}: no pixel of train has a class, all are {IGNORED}")
    return torch.cat(rows), found.to(rows[0].device)


def _encoded(
    encode: Encoder, root: str, pairs: Sequence[Pair], batch_size: int
) -> Iterator[tuple[Pair, Tensor, np.ndarray]]:
    """Each pair with its patches [h, w, C] and its mask [H, W]."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            loaded = list(pool.map(lambda pair: read_pair(root, pair), batch))
            with torch.no_grad():
                features = encode([image for image, _ in loaded])
            for pair, patches, (_, mask) in zip(batch, features, loaded, strict=True):
                yield pair, patches, mask
