"""GenAI-Bench (Li et al. 2024): how far scores of generated images agree with people's ratings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from scipy import stats

from diffitm.core.schema import Example
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure, Unit
from diffitm.metrics.pairwise import agreement_intervals, pairwise_accuracy
from diffitm.tasks.base import Task, pictures

FILE, HUMAN = "genai_image.json", "human"
KENDALL, PEARSON, PAIRWISE = "Kendall tau-b", "Pearson r", "pairwise accuracy"
UNITS: dict[str, Unit] = {KENDALL: "number", PEARSON: "number", PAIRWISE: "share"}
LEAST = 3  # images with a score


class GenAiBench(Task):
    """genai_image.json: {number: {prompt, models: {generator: [rating, ..]}}}; <generator>/<number>.jpeg.

    The set of 527 prompts or that of 1,600, by what is there. An image's rating is the mean of its raters'.
    Over all images together, as the authors report it ("no grouping"): Kendall's tau-b, Pearson's r, and the
    pairwise accuracy with ties (Deutsch, Foster and Freitag 2023): scores that differ by no more than a
    threshold count as equal, and the threshold is that of the highest accuracy. Scores of different images
    are compared, so a diffusion model's normalised score is the one to look at.
    """

    name = "genai_bench"
    folder = "genai_bench"
    source = "the Hub dataset BaiqiL/GenAI-Bench-1600 (its licence is not stated)"
    graded: ClassVar[bool] = False

    def examples(self, root: str) -> Iterator[Example]:
        """One example an image, with its rating; those of a prompt are a cluster."""
        images = dict[str, str]()
        for line in self.lines(root, FILE):
            prompt, rated = line.text("prompt"), line.within("models")
            for generator, ratings in rated.fields.items():
                if not _are_ratings(ratings):
                    raise rated.wrong(generator, "a list of ratings, numbers")
                if generator not in images:
                    images[generator] = pictures(root, f"{self.folder}/{generator}")
                yield Example(
                    id=f"{generator}/{line.key}",
                    images=(f"{images[generator]}/{line.key}.jpeg",),
                    texts=(prompt,),
                    direction="image",
                    cluster=line.key,
                    groups={HUMAN: repr(round(float(np.mean(ratings)), 6))},
                )

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """The score itself."""
        value = float(scores.squeeze())
        return {"score": Credit(value) if np.isfinite(value) else LOST}

    def chance(self, example: Example) -> dict[str, float]:
        """Nothing is guessed."""
        return {"score": 0.0}

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Agreement over the images that have a score, with intervals in which prompts are clusters."""
        kept = [d for d in decisions if d.credits is not None and d.credits["score"].finite]
        scores = np.array([d.credits["score"].value for d in kept if d.credits])
        ratings = np.array([float(d.groups[HUMAN]) for d in kept])
        failures = sum(decision.failed for decision in decisions)
        values: tuple[float | None, ...] = (None, None, None)
        bounds: tuple[tuple[float | None, float | None], ...] = ((None, None),) * 3
        if len(kept) >= LEAST and len(set(ratings)) > 1 and len(set(scores)) > 1:
            accuracy, threshold = pairwise_accuracy(ratings, scores)
            values = (
                float(stats.kendalltau(ratings, scores, variant="b").statistic),
                float(stats.pearsonr(ratings, scores).statistic),
                accuracy,
            )
            clusters = np.array([d.cluster for d in kept])
            bounds = agreement_intervals(ratings, scores, clusters, threshold)
        return [
            Figure("all", name, value, low, high, len(kept), None, 0, failures, UNITS[name])
            for name, value, (low, high) in zip(UNITS, values, bounds, strict=True)
        ]


def _are_ratings(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )
