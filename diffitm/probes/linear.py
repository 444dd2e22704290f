"""A linear classifier of pixels on patch features, whose logits are interpolated between patches."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, grid_sample

log = logging.getLogger("diffitm")
L2 = 1e-4
ITERATIONS = 500
GRADIENT, PROGRESS = 1e-5, 1e-9  # where the fit ends: largest element, change of the loss in a step
CONSTANT = 1e-6  # a smaller std is none
CHUNK = 2**16  # pixels that are predicted at a time: a large image has gigabytes of logits


@dataclass(frozen=True)
class Head:
    """Logits ((x - mean) / std) @ weight + bias; mean and std [C], weight [C, K]."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [..., K] of features [..., C]."""
        return (features - self.mean) / self.std @ self.weight + self.bias

    def predict(self, features: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Class numbers [H, W] of one image's patches [h, w, C]: bilinear logits, then argmax."""
        logits, number = self(features), size[0] * size[1]
        chunks = np.array_split(np.arange(number), -(-number // CHUNK))
        found = [at_pixels(logits, size, chunk).argmax(1).cpu().numpy() for chunk in chunks]
        return np.concatenate(found).reshape(size)


def fit(features: Tensor, labels: Tensor, classes: int) -> Head:
    """Multinomial logistic regression of features [N, C] and labels [N], standardised by their own
    mean and std: mean cross-entropy + L2 / 2 |weight|^2, by L-BFGS over all rows from zero.

    The minimum is one, so the result depends on no seed and no learning rate.
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > CONSTANT, std, torch.inf)
    inputs = (features - mean) / std
    weight = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=PROGRESS,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(inputs @ weight + bias, labels) + L2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    if optimiser.state[weight]["n_iter"] >= ITERATIONS:
        log.warning("segmentation: the linear head has not converged in %d steps", ITERATIONS)
    return Head(mean, std, weight.detach(), bias.detach())


def at_pixels(features: Tensor, size: tuple[int, int], pixels: np.ndarray) -> Tensor:
    """Features [n, C] at pixels (flat numbers [n]) of an image of a size (height, width), bilinear
    between patches [h, w, C].

    Interpolating features and then classifying is classifying and then interpolating logits, which
    is what `Head.predict` does.
    """
    row, column = np.divmod(pixels, size[1])
    places = np.stack([(2 * column + 1) / size[1] - 1, (2 * row + 1) / size[0] - 1], axis=-1)
    grid = torch.from_numpy(places).to(features)[None, None]
    sampled = grid_sample(
        features.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0].T
