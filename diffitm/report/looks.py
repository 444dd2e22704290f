"""How series are told apart on a page: a colour and a marker a model, outlines where a score is naive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# (on a light page, on a dark one), after Okabe and Ito. For eyes without red, green or blue cones two of
# them are at least 14 apart (CIELAB, simulated after Machado et al. 2009).
PALETTE = (
    ("#0072B2", "#3B97DB"),
    ("#E69F00", "#F0B030"),
    ("#009E73", "#22B88A"),
    ("#CC79A7", "#D983B5"),
    ("#56B4E9", "#B5E2FF"),
    ("#D55E00", "#EC6A20"),
    ("#606060", "#757575"),
    ("#4B2E83", "#FFF58A"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")  # the same in a legend
NAIVE_SCORE = "conditional"


@dataclass(frozen=True)
class Look:
    """That of the `place`-th model, of 64 that differ; `light` is its naive score."""

    place: int
    light: bool = False

    @property
    def colour(self) -> int:
        """Its place in PALETTE."""
        return self.place % len(PALETTE)

    @property
    def turn(self) -> int:
        """The place of its marker; where it is not that of the colour, bars have a pattern."""
        return (self.place + self.place // len(PALETTE)) % len(MARKERS)

    @property
    def pattern(self) -> int:
        """0: none."""
        return (self.turn - self.colour) % len(MARKERS)

    @property
    def marker(self) -> str:
        return MARKERS[self.turn]


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `form` is bar, dot, line or chance. `both`: it stands for a model's naive and
    normalised scores."""

    name: str
    look: Look
    form: str
    both: bool = False

    @property
    def sign(self) -> str:
        return SIGNS[self.look.turn]


class Looks:
    """Of the columns of a table: (title, model, score)."""

    def __init__(self, columns: Sequence[tuple[str, str, str]]) -> None:
        self.columns = columns
        self.models = list(dict.fromkeys(model for _, model, _ in columns))
        self.two_scores = any(score == NAIVE_SCORE for *_, score in columns)

    @property
    def patterns(self) -> list[int]:
        """Those of its bars."""
        return sorted({Look(i).pattern for i in range(len(self.models))} - {0})

    def of(self, model: str, score: str) -> Look:
        return Look(self.models.index(model), score == NAIVE_SCORE)

    def of_column(self, title: str) -> Look:
        model, score = next((m, s) for t, m, s in self.columns if t == title)
        return self.of(model, score)

    def keys(self, titles: Iterable[str], form: str) -> list[Key]:
        """A legend: an entry a model, the way the chart's columns name it."""
        shown = set(titles)
        found: dict[str, list[tuple[str, str]]] = {}
        for title, model, score in self.columns:
            if title in shown:
                found.setdefault(model, []).append((title, score))
        return [
            Key(model, self.of(model, members[-1][1]), form, len(members) > 1)
            for model, members in found.items()
        ]
