"""Hard negative captions: exchanged words by rule, and the checks of what a language model proposes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffitm.tasks.perturb import generator, orders, places

SWAPS = ("noun swap", "adjective swap")
ARTICLES = ("a", "an")
# Two words with nothing but these between them belong together: 'cat and dog', 'big red'. Their
# exchange says the same.
JOINING = {"a", "an", "the", "and", "or", "&"}
TOKEN = re.compile(r"(\W*)(.*?)((?:['\u2019]s)?\W*)", re.DOTALL)

COPIED_WORDS = 5  # a run of the prompt's words that is no chance
SLACK = 2  # words that a proposal may always be longer or shorter than its caption
LENGTH_SHARE, SHARED_SHARE = 0.5, 0.5


def normal(text: str) -> str:
    """The text's words in lower case, one space between: what makes two captions the same."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def rules(caption: str, seed: int) -> dict[str, str]:
    """Hard captions by kind: two nouns exchanged, two adjectives exchanged, ARO's four orders.

    A pure function of (caption, seed). Punctuation and the first capital stay in their places, an
    exchanged word takes its article along. None says the words of the caption or of another one in
    the same order; a kind that has nothing of its own is left out.
    """
    frame = _frame(caption)
    text = " ".join(frame.words)
    swaps = dict[str, list[str]]()
    for kind, group in zip(SWAPS, places(frame.words)[:2] if text else (), strict=False):
        pairs = list(_exchangeable(frame.words, group))
        if pairs:
            chosen = pairs[int(generator(kind, text, seed).integers(len(pairs)))]
            swaps[kind] = _exchanged(frame.words, *chosen)
    bare = [" ".join(words) for words in swaps.values()]
    found = {kind: _with_articles(frame.words, words) for kind, words in swaps.items()}
    found |= {kind: order.split() for kind, order in orders(text, seed, bare).items()}
    seen, kept = {normal(caption)}, dict[str, str]()
    for kind, words in found.items():
        made = frame.fill(words)
        if normal(made) not in seen:
            seen.add(normal(made))
            kept[kind] = made
    return kept


class _Frame(NamedTuple):
    """A caption as its words and the punctuation around each token; a token may have no word."""

    tokens: list[tuple[str, str, str]]
    capital: bool

    @property
    def words(self) -> list[str]:
        """All words, the first without its capital."""
        words = [word for _, word, _ in self.tokens if word]
        return [words[0].lower(), *words[1:]] if self.capital else words

    def fill(self, words: Sequence[str]) -> str:
        """Other words in the places of the caption's."""
        left = iter([words[0][:1].upper() + words[0][1:], *words[1:]] if self.capital else words)
        filled = (before + (word and next(left)) + after for before, word, after in self.tokens)
        return " ".join(filled)


def _frame(caption: str) -> _Frame:
    found = (TOKEN.fullmatch(token) for token in caption.split())
    tokens = [(match[1], match[2], match[3]) for match in found if match]
    first = next((word for _, word, _ in tokens if word), "")
    return _Frame(tokens, first[:1].isupper() and first[1:] == first[1:].lower() and first != "I")


def _exchangeable(words: Sequence[str], group: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of places whose words differ and are not joined to one expression."""
    return [
        (i, j)
        for n, i in enumerate(group)
        for j in group[n + 1 :]
        if words[i].lower() != words[j].lower() and not set(words[i + 1 : j]) <= JOINING
    ]


def _exchanged(words: Sequence[str], i: int, j: int) -> list[str]:
    out = list(words)
    out[i], out[j] = out[j], out[i]
    return out


def _with_articles(words: Sequence[str], swapped: Sequence[str]) -> list[str]:
    """'a umbrella' as 'an umbrella': the article that a word had, else the one of its first letter."""
    out = list(swapped)
    changed = [i for i, word in enumerate(words) if word != swapped[i]]
    for here, there in zip(changed, reversed(changed), strict=True):
        if here and words[here - 1].lower() in ARTICLES:
            own = words[there - 1].lower() if there else ""
            vowel = swapped[here][0].lower() in "aeiou"
            out[here - 1] = own if own in ARTICLES else ARTICLES[vowel]
    return out


def tidy(answer: str) -> str:
    """A language model's answer without space and quotes around it."""
    return answer.strip().strip('"“”').strip()


def checker(template: str) -> Callable[[str, str], str | None]:
    """A function of (caption, proposal): why the proposal is no hard caption, None if it may be one.

    `template` is the prompt with '{caption}'. The reasons: 'empty', 'several lines', 'copies the
    prompt' (a run of 5 words that the caption lacks), 'equals the caption', 'other length' (half as
    many words more or fewer, and more than 2), 'other words' (it lacks half of the caption's).
    """
    copied = {run for part in template.split("{caption}") for run in _runs(normal(part).split())}

    def check(caption: str, proposal: str) -> str | None:
        right, words = normal(caption).split(), normal(proposal).split()
        if not words:
            return "empty"
        if len(proposal.splitlines()) > 1:
            return "several lines"
        if (copied & _runs(words)) - _runs(right):
            return "copies the prompt"
        if words == right:
            return "equals the caption"
        if abs(len(words) - len(right)) > max(SLACK, LENGTH_SHARE * len(right)):
            return "other length"
        shared = sum((Counter(words) & Counter(right)).values())
        return "other words" if shared < SHARED_SHARE * len(right) else None

    return check


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + COPIED_WORDS]) for i in range(len(words) - COPIED_WORDS + 1)}
