"""Scores from stored errors: other timesteps, weights and error kinds need no model again."""

from __future__ import annotations

import numpy as np

ERRORS = ("l2", "mse", "l1", "huber")


def column(error: str) -> str:
    """The column of the store that a kind of error is made of."""
    return "l2" if error == "mse" else error


def error_values(stored: np.ndarray, error: str, elements: np.ndarray | int | float) -> np.ndarray:
    """Errors of a kind, float32, from those of its column; `elements` of a latent broadcasts."""
    stored = np.asarray(stored, np.float32)
    return (stored.astype(float) ** 2 / elements).astype(np.float32) if error == "mse" else stored


def averaged(errors: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """d(x, w): the mean over the last axis (timesteps), weighted if weights [N] are given."""
    if weights is None:
        return errors.mean(-1)
    with np.errstate(invalid="ignore"):  # an infinite error without weight gives NaN
        return np.asarray(errors @ (weights / weights.sum()))


def conditional_score(conditional: np.ndarray) -> np.ndarray:
    """-d(x, w), higher is a better match; for images this is the naive score."""
    return -conditional


def normalised_score(conditional: np.ndarray, unconditional: np.ndarray) -> np.ndarray:
    """-(d(x, w) - d(x)) (DiffusionITM, eq. 5): what the text explains beyond the image's own ease."""
    with np.errstate(invalid="ignore"):  # two infinite ones give NaN
        return -(conditional - unconditional)


def other_dtype(dtype: str | None, option: str = "--dtype") -> str:
    """What to say of scores that are not finite: which dtype may give some that are."""
    wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(dtype or "")
    return f" in {dtype}: try {option} {wider}" if wider else ""
