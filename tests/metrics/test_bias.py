"""Bias effect sizes against the published code's numbers, enumeration and simulation; their reader."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.metrics.bias import association, effect_interval, effect_p, effect_size
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.mmbias import EFFECT, PUBLISHED_EFFECT, MmBias
from tests.conftest import DATA
from tests.tasks.test_tasks import put

IDS = {"Christian": 0, "Muslim": 1, "Jewish": 2, "Buddhist": 8}
PHRASES = {"pleasant_phrases": ["joy", "love"], "unpleasant_phrases": ["war", "hate", "fear"]}
GOLDEN = json.loads((DATA / "mmbias.json").read_text())


def decided(group: str, credit: Credit | None, kind: str = "Religion") -> Decision:
    """What became of one image; without a finite credit it failed."""
    failed = credit is None or not credit.finite
    phi = None if credit is None else {"phi": credit}
    return Decision("image", {"kind": kind, "group": group}, {"phi": 0.0}, phi, failed)


def decisions(kind: str = "Religion", **phi: Iterable[float]) -> list[Decision]:
    return [decided(g, Credit(float(v)), kind) for g, values in phi.items() for v in values]


def by_pair(made: list[Decision]) -> dict[tuple[str, str], Figure]:
    figures = MmBias().figures(made)
    found = {(figure.group, figure.metric): figure for figure in figures}
    assert len(found) == len(figures)
    return found


def golden() -> list[tuple[str, np.ndarray]]:
    """Group and scores [20], ten of them pleasant, of each image of the golden data."""
    with np.load(DATA / "metrics.npz") as data:
        scores, classes = data["mmbias_scores"], data["mmbias_class"]
    names = {number: name for name, number in IDS.items()}
    return [(names[int(c)], row) for row, c in zip(scores, classes, strict=True)]


@pytest.fixture(scope="module")
def golden_figures() -> dict[tuple[str, str], Figure]:
    """Figures of the golden phi, whose means are float32 as the published code takes them."""
    phi = [(name, float(row[:10].mean() - row[10:].mean())) for name, row in golden()]
    return by_pair([decided(name, Credit(value)) for name, value in phi])


@pytest.mark.parametrize("pair", sorted(GOLDEN))
def test_golden_effect_sizes(golden_figures: dict[tuple[str, str], Figure], pair: str) -> None:
    """The published code's numbers with the right pair's deviation."""
    figure = golden_figures[f"pair={pair}", EFFECT]
    assert figure.value == pytest.approx(GOLDEN[pair]["right_pair"], abs=1e-9)
    assert figure.n == 24
    assert figure.low < figure.value < figure.high
    assert (figure.unit, figure.chance, figure.failures) == ("effect size", 0.0, 0)


def test_golden_scores_through_the_credits() -> None:
    """From scores to effects: our means are float64, so they agree to float32 (1e-6) alone."""
    task, example = MmBias(), Example("0", ("a",), ("x",) * 20, "text", gold=10)
    lines = [(name, task.credits(example, row[None])["phi"]) for name, row in golden()]
    found = by_pair([decided(name, credit) for name, credit in lines])
    for pair, numbers in GOLDEN.items():
        value = found[f"pair={pair}", EFFECT].value
        assert value == pytest.approx(numbers["right_pair"], abs=1e-6)
    value = found["pair=Buddhist-Jewish", PUBLISHED_EFFECT].value
    assert value == pytest.approx(GOLDEN["Buddhist-Jewish"]["published_code"], abs=1e-6)


def test_golden_published_pooling(golden_figures: dict[tuple[str, str], Figure]) -> None:
    """The one pair that the published code divides by other groups, and no figure for the rest."""
    other = {pair: figure for (pair, name), figure in golden_figures.items() if name != EFFECT}
    assert list(other) == ["pair=Buddhist-Jewish"]
    expected = GOLDEN["Buddhist-Jewish"]["published_code"]
    assert other["pair=Buddhist-Jewish"].metric == PUBLISHED_EFFECT
    assert other["pair=Buddhist-Jewish"].value == pytest.approx(expected, abs=1e-9)
    assert abs(expected) > 10  # no number for the deviation of the pair itself


def test_published_pairs_in_order(golden_figures: dict[tuple[str, str], Figure]) -> None:
    """Those whose groups are both there, none twice and none reversed."""
    assert [pair for pair, name in golden_figures if name == EFFECT] == [
        "pair=Christian-Muslim",
        "pair=Christian-Jewish",
        "pair=Jewish-Muslim",
        "pair=Buddhist-Muslim",
        "pair=Buddhist-Christian",
        "pair=Buddhist-Jewish",
    ]


def test_by_hand() -> None:
    """phi 3 - 1; effect over the population deviation (ddof 0) of both groups together."""
    assert association(np.array([2.0, 4.0, 1.0, 0.0, 2.0]), 2) == 2.0
    x, y = np.array([3.0, 5.0]), np.array([1.0, 2.0])
    assert effect_size(x, y) == pytest.approx(2.5 / np.sqrt(8.75 / 4), abs=1e-12)
    assert effect_size(x, y, np.array([0.0, 4.0])) == pytest.approx(2.5 / 2, abs=1e-12)


def test_sign_and_antisymmetry() -> None:
    """Positive where the first group is nearer to the pleasant phrases; exchanged, it is negated."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 12), rng.normal(0, 1, 15)
    assert effect_size(x, y) > 0.3
    assert effect_size(y, x) == pytest.approx(-effect_size(x, y))
    task, example = MmBias(), Example("0", ("a",), tuple("pqrs"), "text", gold=2)
    assert task.credits(example, np.array([[2.0, 2.0, 1.0, 1.0]]))["phi"].value == 1.0
    assert task.credits(example, np.array([[1.0, 1.0, 2.0, 2.0]]))["phi"].value == -1.0


def test_normalising_cancels_and_scale_does_not_matter() -> None:
    """A constant added to all scores of an image, its unconditional error, and any unit."""
    rng = np.random.default_rng(1)
    scores = rng.normal(-100, 1, (20, 14))
    groups = np.arange(20) < 9

    def found(scores: np.ndarray) -> tuple[float, ...]:
        phi = np.array([association(row, 6) for row in scores])
        x, y = phi[groups], phi[~groups]
        return effect_size(x, y), *effect_interval(x, y), effect_p(x, y)

    expected = pytest.approx(found(scores), abs=1e-9)
    assert found(scores + rng.normal(0, 30, (20, 1))) == expected
    assert found(scores / 500) == expected
    assert found(scores * 1000) == expected


def enumerated(x: np.ndarray, y: np.ndarray) -> float:
    """Share of all exchanges of the groups whose difference is as large, either way."""
    both, observed = np.concatenate([x, y]), abs(x.mean() - y.mean())
    reached = []
    for chosen in itertools.combinations(range(len(both)), len(x)):
        inside = np.isin(np.arange(len(both)), chosen)
        reached.append(abs(both[inside].mean() - both[~inside].mean()) >= observed - 1e-9)
    return float(np.mean(reached))


@pytest.mark.parametrize(("sizes", "shift"), [((4, 3), 0.0), ((3, 5), 1.0), ((2, 2), 5.0)])
def test_p_equals_full_enumeration(sizes: tuple[int, int], shift: float) -> None:
    """Small groups of unequal size, ties included, both directions."""
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 4, sizes[0]) + shift, rng.integers(0, 4, sizes[1]).astype(float)
    for first, second in ((x, y), (y, x)):
        assert effect_p(first, second) == pytest.approx(enumerated(first, second), abs=0.03)


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e3, 1e5])
def test_p_is_that_of_any_unit(unit: float) -> None:
    """Exchanges that give the observed difference count however it rounds."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        x, y = rng.normal(3, 1, 3), rng.normal(0, 1, 4)
        assert effect_p(x * unit, y * unit) == effect_p(x, y)


def test_p_is_never_zero_and_is_one_without_a_difference() -> None:
    """The observed order counts too: 5,000 exchanges cannot claim less than 1 in 5,001."""
    x = np.arange(30.0)
    assert effect_p(x, x + 1000) == pytest.approx(1 / 5001)
    assert effect_p(x, x[::-1].copy()) == 1.0


def test_p_is_uniform_under_the_null() -> None:
    """Skewed associations, groups of unequal size."""
    rng = np.random.default_rng(3)
    p = [effect_p(rng.exponential(size=7), rng.exponential(size=11)) for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1


def test_interval_coverage() -> None:
    """Groups of 20 images: 92 of 100 intervals held the true effect in 1,000 runs, 95 of 100 with 50."""
    rng, true = np.random.default_rng(4), 0.5 / np.sqrt(1 + 0.25**2)
    hits = 0
    for _ in range(200):
        low, high = effect_interval(rng.normal(0.5, 1, 20), rng.normal(0, 1, 20))
        hits += low <= true <= high
    assert 0.88 <= hits / 200 <= 0.985


def test_interval_is_that_of_whole_effects() -> None:
    """The deviation is that of each resample, against 4,000 drawn one by one."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(2, 1, 12), rng.normal(0, 1, 9)
    drawn = [effect_size(rng.choice(x, 12), rng.choice(y, 9)) for _ in range(4000)]
    assert effect_interval(x, y) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_interval_narrows_and_is_deterministic() -> None:
    """Four times the images, about half the width; the same numbers each time."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 30))
    low, high = effect_interval(x, y)
    wide = high - low
    low, high = effect_interval(np.tile(x, 4), np.tile(y, 4))
    assert 0.4 < (high - low) / wide < 0.6
    assert effect_interval(x, y) == effect_interval(x, y)
    assert effect_interval(x, y) != effect_interval(x, y, seed=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_score_that_is_not_finite_never_counts(bad: float) -> None:
    """One such score loses the image: effects are those without it, and it counts as a failure."""
    example = Example("0", ("a",), tuple("pqrs"), "text", gold=2)
    scores = np.array([[5.0, 1.0, bad, 1.0]])
    assert MmBias().credits(example, scores) == {"phi": LOST}
    made = decisions(American=[3, 1, 2], Arab=[0, 1, 1])
    (whole,) = by_pair(made).values()
    (found,) = by_pair([*made, decided("Arab", LOST), decided("American", None)]).values()
    assert (found.value, found.low, found.high, found.p, found.n) == (
        whole.value,
        whole.low,
        whole.high,
        whole.p,
        6,
    )
    assert (whole.failures, found.failures) == (0, 2)


def test_failures_are_those_of_the_pair() -> None:
    """Each pair counts its two groups' own."""
    made = decisions(Christian=[1, 2], Muslim=[0, 3], Jewish=[5, 1])
    made += [decided("Muslim", None), decided("Muslim", LOST), decided("Jewish", None)]
    found = {pair: figure.failures for (pair, _), figure in by_pair(made).items()}
    assert found == {
        "pair=Christian-Muslim": 2,
        "pair=Christian-Jewish": 1,
        "pair=Jewish-Muslim": 3,
    }


def nothing(figure: Figure) -> bool:
    return figure.value is figure.low is figure.high is figure.p is None


@pytest.mark.parametrize("lost", [None, LOST])
def test_group_without_scored_images(lost: Credit | None) -> None:
    """No number rather than a wrong one; what is there is counted."""
    made = [*decisions(American=[1, 2, 3]), decided("Arab", lost), decided("Arab", lost)]
    (figure,) = by_pair(made).values()
    assert nothing(figure)
    assert (figure.metric, figure.n, figure.failures) == (EFFECT, 3, 2)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -137.3])
def test_no_deviation(value: float) -> None:
    """All associations equal, whatever their mean rounds to: no effect size, not -1 or 1."""
    (figure,) = by_pair(decisions(American=[value] * 7, Arab=[value] * 5)).values()
    assert nothing(figure)
    assert figure.n == 12


def test_scorer_blind_to_the_text_has_no_association() -> None:
    """One score for all phrases of an image: 0, however the means of the two kinds round."""
    rng, task = np.random.default_rng(7), MmBias()
    example = Example("0", ("a",), tuple("abcdefghijklm"), "text", gold=6)
    for value in rng.normal(-100, 30, 50):
        assert task.credits(example, np.full((1, 13), value)) == {"phi": Credit(0.0)}


def test_one_image_a_group_claims_no_certainty() -> None:
    """Its effect is 2 or -2 whatever the images are: the interval must not be that point."""
    (figure,) = by_pair(decisions(American=[1.0], Arab=[0.3])).values()
    assert figure.low is None or figure.low < figure.high


def test_published_pooling_needs_its_groups() -> None:
    """Without Christians there is no published number, with them there is one for each pair."""
    made = decisions(Buddhist=[3, 1], Hindu=[0, 2, 5], Jewish=[1, 7])
    assert {name for _, name in by_pair(made)} == {EFFECT}
    phi = np.array([1.0, 4.0, 6.0])
    found = by_pair(made + decisions(Christian=phi))
    other = {pair for pair, name in found if name == PUBLISHED_EFFECT}
    assert other == {"pair=Buddhist-Hindu", "pair=Buddhist-Jewish"}
    pooled = np.std([1, 4, 6, 0, 2, 5])
    value = found["pair=Buddhist-Hindu", PUBLISHED_EFFECT].value
    assert value == pytest.approx((2 - 7 / 3) / pooled)


def test_unknown_groups_are_paired_within_their_kind() -> None:
    """No published pair: all pairs of groups of one kind, none across."""
    made = decisions("Hair", Long=[1, 2], Short=[3, 5])
    made += decisions("Age", Old=[1, 4], Young=[2, 2], Middle=[0, 1])
    assert [pair for pair, _ in by_pair(made)] == [
        "pair=Long-Short",
        "pair=Old-Young",
        "pair=Old-Middle",
        "pair=Young-Middle",
    ]


def test_published_pairs_hide_no_other_kind() -> None:
    """Published pairs first, then all that hold a group which no published pair has."""
    made = decisions("Religion", Other=[1, 2], Muslim=[3, 5], Christian=[0, 1], Hindu=[2, 3])
    made += decisions("Hair", Long=[1, 2], Short=[3, 5])
    assert [pair.removeprefix("pair=") for pair, _ in by_pair(made)] == [
        "Christian-Muslim",
        "Hindu-Muslim",
        "Other-Muslim",
        "Other-Christian",
        "Other-Hindu",
        "Long-Short",
    ]


def test_groups_of_one_name_in_two_kinds_are_not_mixed() -> None:
    """'Other' of one kind has nothing to do with 'Other' of another one."""
    first = decisions("Hair", Other=[1, 2], Short=[3, 5])
    figures = MmBias().figures(first + decisions("Age", Other=[40, 50], Young=[2, 2.5]))
    expected = effect_size(np.array([1.0, 2.0]), np.array([3.0, 5.0]))
    assert len(figures) == 2
    assert figures[0].value == pytest.approx(expected)
    assert [figure.n for figure in figures] == [4, 4]


def write(root: Path, *images: str, phrases: Any = PHRASES) -> None:
    put(root, "mmbias/textual_phrases.txt", phrases)
    for image in images:
        put(root, f"mmbias/data/Images/{image}", b"image")


def test_reader(tmp_path: Path) -> None:
    """Sorted by path whatever was written first; pleasant phrases first, gold where they end."""
    names = ["Religion/Muslim/2.jpg", "Nationality/Arab/9.jpg", "Religion/Jewish/10.jpg"]
    write(tmp_path, *names, "Religion/Muslim/1.jpg", "Religion/Muslim/notes.txt")
    examples = list(MmBias().examples(str(tmp_path)))
    assert [example.id for example in examples] == [
        "Nationality/Arab/9.jpg",
        "Religion/Jewish/10.jpg",
        "Religion/Muslim/1.jpg",
        "Religion/Muslim/2.jpg",
    ]
    assert examples[1] == Example(
        id="Religion/Jewish/10.jpg",
        images=("mmbias/data/Images/Religion/Jewish/10.jpg",),
        texts=("joy", "love", "war", "hate", "fear"),
        direction="text",
        gold=2,
        cluster="Religion/Jewish/10.jpg",
        groups={"kind": "Religion", "group": "Jewish"},
    )
    assert not examples[1].needs_unconditional


def test_reader_and_credits_agree_on_the_phrases(tmp_path: Path) -> None:
    """phi of what was read: the mean of the pleasant less that of the unpleasant ones."""
    write(tmp_path, "Religion/Muslim/1.jpg")
    (example,) = MmBias().examples(str(tmp_path))
    score = {"joy": 4.0, "love": 6.0, "war": 1.0, "hate": 2.0, "fear": 3.0}
    scores = np.array([[score[text] for text in example.texts]])
    assert MmBias().credits(example, scores)["phi"] == Credit(3.0)
    assert MmBias().chance(example) == {"phi": 0.0}


@pytest.mark.parametrize(
    "phrases",
    [
        [],
        "x",
        {},
        {"pleasant_phrases": ["joy"]},
        {"pleasant_phrases": ["joy"], "unpleasant_phrases": []},
        {"pleasant_phrases": "joy", "unpleasant_phrases": ["war"]},
        {"pleasant_phrases": ["joy"], "unpleasant_phrases": [1]},
    ],
)
def test_malformed_phrases(tmp_path: Path, phrases: Any) -> None:
    """The message names file, task and the two lists."""
    write(tmp_path, "Religion/Muslim/1.jpg", phrases=json.dumps(phrases))
    with pytest.raises(InputError) as raised:
        list(MmBias().examples(str(tmp_path)))
    file = tmp_path / "mmbias" / "textual_phrases.txt"
    assert str(raised.value).startswith(f"{file}: task mmbias expects lists of strings")
    assert "pleasant_phrases and unpleasant_phrases" in str(raised.value)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([], "task mmbias needs images below {base}"),
        (["Religion/Muslim/notes.txt"], "task mmbias needs images below {base}"),
        (["Religion/1.jpg"], "{base}/Religion/1.jpg: task mmbias expects <kind>/<group>/<image>"),
        (["1.jpg"], "{base}/1.jpg: task mmbias expects <kind>/<group>/<image>"),
    ],
)
def test_images_out_of_place(tmp_path: Path, images: list[str], text: str) -> None:
    """None at all, or directly below a kind: the message names the place."""
    write(tmp_path, *images)
    with pytest.raises(InputError) as raised:
        list(MmBias().examples(str(tmp_path)))
    assert text.format(base=tmp_path / "mmbias" / "data" / "Images") in str(raised.value)
