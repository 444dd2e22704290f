"""Scores from errors, by hand."""

from __future__ import annotations

import numpy as np

from diffitm.metrics.score import averaged, conditional_score, normalised_score

ERRORS = np.array([[1.0, 2.0, 6.0], [3.0, 3.0, 0.0]])  # pairs x timesteps


def test_errors_are_averaged_over_timesteps() -> None:
    """Weights count in proportion, whatever their sum."""
    assert averaged(ERRORS).tolist() == [3, 2]
    assert averaged(ERRORS[None]).tolist() == [[3, 2]]
    np.testing.assert_allclose(averaged(ERRORS, np.array([1.0, 3.0, 0.0])), [7 / 4, 3])
    np.testing.assert_allclose(averaged(ERRORS, np.array([0.0, 0.0, 0.1])), [6, 0])


def test_higher_is_a_better_match() -> None:
    """The smaller error, and the more that the text takes off the image's own."""
    conditional, unconditional = np.array([1.0, 2.0]), np.array([1.5, 4.0])
    assert conditional_score(conditional).tolist() == [-1, -2]
    assert normalised_score(conditional, unconditional).tolist() == [0.5, 2]
