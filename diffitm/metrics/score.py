"""Scores from stored errors: other timesteps, weights and error kinds need no model again."""

from __future__ import annotations

import numpy as np

ERRORS = ("l2", "mse", "l1", "huber")


def averaged(errors: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """d(x, w): the mean over the last axis (timesteps), weighted if weights [N] are given."""
    if weights is None:
        return errors.mean(-1)
    return errors @ (weights / weights.sum())


def conditional_score(conditional: np.ndarray) -> np.ndarray:
    """-d(x, w), higher is a better match; for images this is the naive score."""
    return -conditional


def normalised_score(conditional: np.ndarray, unconditional: np.ndarray) -> np.ndarray:
    """-(d(x, w) - d(x)) (DiffusionITM, eq. 5): what the text explains beyond the image's own ease."""
    return -(conditional - unconditional)
