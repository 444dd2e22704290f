"""Word orders of a caption against brute force over permutations, and in another process."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from diffitm.tasks import perturb
from diffitm.tasks.perturb import KINDS, clean, foils, tags

CAPTIONS = (
    "a black dog chases the small cat in a green park",
    "two young men play soccer on the grass",
    "a woman in a red dress holds an old umbrella",
    "happy children are running near a big wooden house",
    "a dog, a cat and a bird",
    "the of by",
    "dog",
    "ein grüner würfel 立方体",
)
# Reads captions, answers with their foils for seeds 0 and 1; whoever opens a socket fails.
SCRIPT = """
import json, socket, sys
class Closed(socket.socket):
    def __init__(self, *_, **__):
        raise OSError("the network was asked")
def refuse(*_, **__):
    raise OSError("the network was asked")
socket.socket, socket.create_connection, socket.getaddrinfo = Closed, refuse, refuse
from diffitm.tasks.perturb import foils
found = {c: [foils(c, seed) for seed in (0, 1)] for c in json.load(sys.stdin)}
print(json.dumps(found))
"""
WORDS = ("dog", "cat", "red", "big", "the", "in", "a", "runs", "he", "it")
Order = tuple[str, ...]


@functools.cache
def elsewhere() -> dict[str, list[list[str]]]:
    """Foils from a fresh process without network, other hash seed, captions in reverse order."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(["a tall glass", *reversed(CAPTIONS)]),
        env={**os.environ, "PYTHONHASHSEED": "31337"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[list[str]]] = json.loads(done.stdout)
    return found


@functools.cache
def shuffled(words: Order, places: tuple[tuple[int, ...], ...]) -> frozenset[Order]:
    """Every order but the given one whose words stay within their group of places."""
    found = set()
    for chosen in itertools.product(*map(itertools.permutations, places)):
        out = list(words)
        for group, order in zip(places, chosen, strict=True):
            for i, j in zip(group, order, strict=True):
                out[i] = words[j]
        found.add(tuple(out))
    return frozenset(found - {words})


def possible(caption: str) -> list[frozenset[Order]]:
    """All other orders of each kind, in the order of the foils, given the words' tags."""
    words = tuple(caption.split())
    kinds = [tag[:2] if tag[:2] in ("NN", "NP", "AJ") else "" for tag in tags(words)]
    kinds = ["N" if kind.startswith("N") else kind for kind in kinds]
    nouns, adjectives, rest = (
        tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in ("N", "AJ", "")
    )
    trigrams = tuple(tuple(range(i, min(i + 3, len(words)))) for i in range(0, len(words), 3))
    moved = {
        tuple(words[i] for group in order for i in group)
        for order in itertools.permutations(trigrams)
    }
    return [
        shuffled(words, (nouns, adjectives)),
        shuffled(words, (rest,)),
        shuffled(words, trigrams),
        frozenset(moved - {words}),
    ]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_fresh_process(caption: str) -> None:
    """Another process with another hash seed, order of captions and no network says the same."""
    assert elsewhere()[caption] == [list(foils(caption, seed)) for seed in (0, 1)]


def test_independent_of_what_was_asked_before() -> None:
    """Each order of asking, and asking twice, gives the same foils."""
    first = {caption: foils(caption) for caption in CAPTIONS}
    np.random.seed(1)
    assert {caption: foils(caption) for caption in reversed(CAPTIONS)} == first
    assert all(foils(caption) == foils(caption, 0) == first[caption] for caption in CAPTIONS)


def test_another_seed() -> None:
    """Other orders for most captions and kinds that have many."""
    same = total = 0
    for caption in CAPTIONS[:4]:
        for seed in range(1, 6):
            pairs = list(zip(foils(caption, 0), foils(caption, seed), strict=True))
            same += sum(one == other for one, other in pairs)
            total += len(pairs)
    assert total == 80
    assert same / total < 0.4


def small_captions() -> list[str]:
    """Every list of up to five of two words, and random lists of up to six of ten."""
    rng = np.random.default_rng(0)
    both = [" ".join(w) for n in range(6) for w in itertools.product(("a", "dog"), repeat=n)]
    return both + [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(120)]


def test_every_kind_that_has_another_order_gives_one() -> None:
    """Against brute force: a foil of each kind with an order that none before it took, in turn."""
    left_out = np.zeros(4, int)
    for caption in small_captions():
        found, expected = list(foils(caption)), possible(caption)
        left_out += [not orders for orders in expected]
        taken: set[tuple[str, ...]] = set()
        for orders in expected:
            if free := orders - taken:
                foil = tuple(found.pop(0).split())
                assert foil in free, (caption, foil)
                taken.add(foil)
        assert not found, caption
    assert left_out.min() > 10  # the lists put each kind to the test


def test_trigrams_that_no_draw_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad luck in all draws: an exchange of neighbours finds the order, if there is any."""
    monkeypatch.setattr(perturb, "TRIES", 0)
    for caption in small_captions():
        found = perturb._trigrams(caption.split(), np.random.default_rng(0))
        assert (found is not None) == bool(possible(caption)[3]), caption
    assert foils("the of by the of by in a to")[-1] == "the of by in a to the of by"


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("", 0),
        ("dog", 0),
        ("a a", 0),
        ("a a a", 0),
        ("a a a a", 0),  # trigrams 'a a a' and 'a' commute
        ("a a a a a a a", 0),
        ("the of by the of by", 2),  # equal trigrams: only the words can move
        ("the of by the of by the of by", 2),
        ("the of by the of by the", 3),  # the last trigram is shorter and does not commute
        ("the of", 1),  # all kinds have the same other order
    ],
)
def test_captions_without_another_order(caption: str, count: int) -> None:
    """Only the kinds that have an order left come out, for every seed."""
    assert {len(foils(caption, seed)) for seed in range(40)} == {count}


def test_foils_are_orders_of_the_words() -> None:
    """The same words as often, one space between, never the caption itself."""
    rng = np.random.default_rng(1)
    captions = [" ".join(rng.choice(WORDS, rng.integers(1, 31))) for _ in range(150)]
    for caption in [*captions, *CAPTIONS]:
        for foil in foils(caption, seed=3):
            assert foil != caption
            assert sorted(foil.split(" ")) == sorted(caption.split(" "))


def test_nouns_change_with_nouns_and_the_rest_with_the_rest() -> None:
    """By hand: each word keeps its kind of place, and those of the other kind keep their place."""
    caption = "a black dog chases the small cat in a green park"
    words = caption.split()
    nouns, adjectives = (2, 6, 10), (1, 5, 9)
    fixed = [i for i in range(11) if i not in nouns + adjectives]
    for seed in range(30):
        first, second = (foil.split() for foil in foils(caption, seed)[:2])
        assert {first[i] for i in nouns} == {"dog", "cat", "park"}
        assert {first[i] for i in adjectives} == {"black", "small", "green"}
        assert [first[i] for i in fixed] == [words[i] for i in fixed]
        assert sorted(second[i] for i in fixed) == sorted(words[i] for i in fixed)
        assert all(second[i] == words[i] for i in nouns + adjectives)


def test_trigrams_keep_their_words_together() -> None:
    """Inside trigrams every third place is a border that no word crosses; whole ones only move."""
    caption = "a woman in a red dress holds an old umbrella"
    groups = [tuple(caption.split()[i : i + 3]) for i in range(0, 10, 3)]
    for seed in range(30):
        inside, moved = foils(caption, seed)[2:]
        cut = [inside.split()[i : i + 3] for i in range(0, 10, 3)]
        assert [sorted(g) for g in cut] == [sorted(g) for g in groups]
        orders = {" ".join(itertools.chain(*p)) for p in itertools.permutations(groups)}
        assert moved in orders


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("dog cat bird", 0),
        ("red big small", 0),
        ("under with from", 0),
        ("under with from", 1),
        ("dog cat bird under with from red big small", -1),
    ],
)
def test_every_order_is_as_likely(caption: str, kind: int) -> None:
    """Three things have five other orders: chi-square over 400 seeds."""
    drawn = [foils(caption, seed)[kind] for seed in range(400)]
    counts = list(dict.fromkeys(drawn))
    assert len(counts) == 5
    assert stats.chisquare([drawn.count(order) for order in counts]).pvalue > 1e-3


def test_orders_of_repeated_words_are_as_likely() -> None:
    """'of of by' has two other orders, whichever 'of' is which."""
    drawn = [foils("of of by", seed)[0] for seed in range(300)]
    assert set(drawn) == {"of by of", "by of of"}
    assert 0.4 < drawn.count("of by of") / 300 < 0.6


def test_kinds_draw_independently() -> None:
    """Two kinds with the same five orders never agree, and come to most of the 20 pairs."""
    drawn = {foils("under with from", seed) for seed in range(300)}
    assert all(first != second for first, second in drawn)
    assert len(drawn) > 15


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Man (left) & a dog.", "a man left & a dog"),
        ('wow!"yes" a:b ; c~d * #5', "wow yes a b c d 5"),
        ("  two\tmen\n and   a dog  \r\n", "two men and a dog"),
        ("a well-known dog's toy, is it?", "a well-known dog's toy, is it?"),
        ("No. 3.5 metres...", "no 3 5 metres"),
        ("ÉCOLE", "école"),
        ("... !!! ", ""),
        ("", ""),
    ],
)
def test_clean(caption: str, expected: str) -> None:
    """ARO's characters become spaces, its others stay; cleaning again changes nothing."""
    assert clean(caption) == expected
    assert clean(expected) == expected


@pytest.mark.parametrize(("count", "left"), [(29, 29), (30, 30), (31, 30), (80, 30)])
def test_clean_keeps_thirty_words(count: int, left: int) -> None:
    """The first thirty, characters that go away not counted."""
    words = [f"w{i}" for i in range(count)]
    assert clean(" ".join(words)) == " ".join(words[:left])
    assert clean(" ! * ".join(words)) == " ".join(words[:left])


def test_no_spacing_tells_a_foil() -> None:
    """Commas, hyphens and apostrophes stay with their word: no space that the caption lacks."""
    caption = "a dog, a cat, and the man's well-known bird, in front of a house?"
    for seed in range(30):
        for foil in foils(caption, seed):
            assert not any(mark in foil for mark in (" ,", "  ", " '", " -", " ?", ",,"))
            assert foil == foil.strip()
            assert sorted(foil.split()) == sorted(caption.split())


@pytest.mark.parametrize(
    ("sentence", "nouns", "adjectives"),
    [
        ("a black dog chases the small cat", {"dog", "cat"}, {"black", "small"}),
        (
            "a woman in a red dress holds an old umbrella",
            {"woman", "dress", "umbrella"},
            {"red", "old"},
        ),
        ("the children are running near a big house", {"children", "house"}, {"big"}),
        ("he eats with them under it and very quickly", set(), set()),
        (
            "two men, women, and a small, red house?",
            {"men,", "women,", "house?"},
            {"small,", "red"},
        ),
    ],
)
def test_tags(sentence: str, nouns: set[str], adjectives: set[str]) -> None:
    """Plain sentences: nouns, plurals and adjectives, with a comma too; pronouns are neither."""
    found = list(zip(sentence.split(), tags(sentence.split()), strict=True))
    assert {word for word, tag in found if tag.startswith(("NN", "NP"))} == nouns
    assert {word for word, tag in found if tag.startswith("AJ")} == adjectives


def test_four_kinds_in_aros_order() -> None:
    """The foils of a whole caption come as ARO lists them."""
    assert [kind.split(" ")[0] for kind in KINDS] == ["nouns", "all", "within", "trigrams"]
    assert [len(foils(caption)) for caption in CAPTIONS[:4]] == [4] * 4
