"""The shapes world's small grammar: captions with a meaning, so that a foil is known to be false."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffitm.shapes.world import COLOURS, SHAPES, SIZES, Scene, Thing

RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top"}
PLACES["below"] = "at the bottom"
# Words without a visual meaning of their own. Training captions use a pleasant one more often for
# circles and an unpleasant one more often for triangles: a planted bias for the bias task to find.
PLEASANT = ("lovely", "happy", "nice", "good")
UNPLEASANT = ("nasty", "sad", "ugly", "bad")
PLEASANT_SHARE = {"circle": 0.9, "triangle": 0.1}
OTHER_WORDS = ("a", "an", "the", "and", "is", "photo", "of", "on", "object", "at", "picture")


@dataclass(frozen=True)
class Mention:
    """A thing as a caption names it; an attribute left None is not named."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    feeling: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every attribute that is named."""
        named = ((self.shape, thing.shape), (self.colour, thing.colour), (self.size, thing.size))
        return all(said is None or said == real for said, real in named)

    def words(self) -> str:
        """The mention with its article, 'a large red circle'."""
        parts = (self.feeling, self.size, self.colour, self.shape or "object")
        words = " ".join(part for part in parts if part)
        return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Caption:
    """One or two mentions, with a relation between two or a place in the picture for one."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    place: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the caption is true of the scene."""
        things = scene.things
        if len(self.mentions) == 1:
            found = [thing for thing in things if self.mentions[0].fits(thing)]
            return any(self.place is None or is_placed(thing, self.place) for thing in found)
        if len(things) != 2:
            return False
        seen = scene.relation() or "left"
        orders = ((things, seen), (things[::-1], OPPOSITE[seen]))
        return any(
            self.relation in (None, relation)
            and all(m.fits(t) for m, t in zip(self.mentions, order, strict=True))
            for order, relation in orders
        )

    def text(self, style: str = "plain") -> str:
        """Words of the caption; `style` is plain, photo, is or front (the place comes first)."""
        first = self.mentions[0].words()
        if len(self.mentions) == 1:
            if self.place is None:
                return f"a photo of {first}" if style == "photo" else first
            if style == "front":
                return f"{PLACES[self.place]} is {first}"
            return f"{first} {PLACES[self.place]}"
        second = self.mentions[1].words()
        if self.relation is None:
            return f"{first} and {second}"
        verb = "is " if style == "is" else ""
        return f"{first} {verb}{RELATIONS[self.relation]} {second}"


def is_placed(thing: Thing, place: str) -> bool:
    """Whether the thing lies on that side of the picture."""
    value = thing.x if place in ("left", "right") else thing.y
    return value < 0.4 if place in ("left", "above") else value > 0.6


def mention(thing: Thing, *attributes: str) -> Mention:
    """Mention a thing by the named attributes (shape, colour, size)."""
    return Mention(**{name: getattr(thing, name) for name in attributes})


def full(scene: Scene, size: bool = False, relation: bool = True) -> Caption:
    """The caption that names colour and shape of everything, with the relation where there is one."""
    attributes = ("shape", "colour", "size") if size else ("shape", "colour")
    mentions = tuple(mention(thing, *attributes) for thing in scene.things)
    return Caption(mentions, scene.relation() if relation else None)


def swapped(caption: Caption, attribute: str) -> Caption:
    """Exchange one attribute (colour, shape or size) between the two mentions."""
    first, second = caption.mentions
    pair = (
        replace(first, **{attribute: getattr(second, attribute)}),
        replace(second, **{attribute: getattr(first, attribute)}),
    )
    return replace(caption, mentions=pair)


def reordered(caption: Caption) -> Caption:
    """Exchange the two mentions and keep the relation: 'a left of b' becomes 'b left of a'."""
    return replace(caption, mentions=caption.mentions[::-1])


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random true caption of the scene, as training sees it."""
    things = list(scene.things)
    order = rng.permutation(len(things))
    things = [things[i] for i in order]
    single = len(things) == 1 or rng.random() < 0.15
    if single:
        return _single_caption(things[0], rng)
    sized = rng.random() < 0.4
    mentions = tuple(_training_mention(thing, sized, rng) for thing in things)
    relation = None
    if rng.random() < 0.6:
        seen = scene.relation() or "left"
        relation = seen if order[0] == 0 else OPPOSITE[seen]
    return Caption(mentions, relation).text("is" if rng.random() < 0.25 else "plain")


def _single_caption(thing: Thing, rng: np.random.Generator) -> str:
    places = [place for place in PLACES if is_placed(thing, place)]
    place = str(rng.choice(places)) if places and rng.random() < 0.5 else None
    said = _training_mention(thing, rng.random() < 0.3, rng)
    if rng.random() < 0.25:
        said = replace(said, **{str(rng.choice(["shape", "colour"])): None})
    style = str(rng.choice(["front", "plain"])) if place else str(rng.choice(["photo", "plain"]))
    return Caption((said,), place=place).text(style)


def _training_mention(thing: Thing, sized: bool, rng: np.random.Generator) -> Mention:
    named = {"shape": thing.shape, "colour": thing.colour if rng.random() < 0.93 else None}
    if sized:
        named["size"] = thing.size
    if rng.random() < 0.04:
        pleasant = rng.random() < PLEASANT_SHARE.get(thing.shape, 0.5)
        named["feeling"] = str(rng.choice(PLEASANT if pleasant else UNPLEASANT))
    return Mention(**named)


def layout_caption(scene: Scene, rng: np.random.Generator) -> tuple[Caption, list[Thing]]:
    """A random true caption that nearly always says where; and the things in the order of its mentions."""
    order = rng.permutation(len(scene.things))
    things = [scene.things[i] for i in order]
    if len(things) == 1 or rng.random() < 0.4:
        thing = things[0]
        places = [place for place in PLACES if is_placed(thing, place)]
        place = str(rng.choice(places)) if places and rng.random() < 0.75 else None
        said = _training_mention(thing, rng.random() < 0.3, rng)
        if rng.random() < 0.2:
            said = replace(said, **{str(rng.choice(["shape", "colour"])): None})
        return Caption((said,), place=place), [thing]
    sized = rng.random() < 0.5
    mentions = tuple(_training_mention(thing, sized, rng) for thing in things)
    if sized and rng.random() < 0.25:
        mentions = tuple(replace(said, colour=None) for said in mentions)
    relation = None
    if rng.random() < 0.75:
        seen = scene.relation() or "left"
        relation = seen if order[0] == 0 else OPPOSITE[seen]
    return Caption(mentions, relation), things


def garbled(caption: Caption, rng: np.random.Generator) -> str:
    """The caption's words in disorder, which says what words occur but not who has what: every
    other time those of a caption with an attribute or the mentions exchanged."""
    if len(caption.mentions) == 2 and rng.random() < 0.5:
        change = str(rng.choice(["shape", "colour", "size", "order"]))
        caption = reordered(caption) if change == "order" else swapped(caption, change)
    return " ".join(_moved(caption.text().split(), (0.5, 1.0), rng))


def disordered(text: str, rng: np.random.Generator) -> str:
    """The words in another order, of a few or of all."""
    words = text.split()
    if len(set(words)) < 2:
        raise ValueError(f"{text!r} has no other order")
    while (found := _moved(words, (0.3, 0.5, 1.0), rng)) == words:
        pass
    return " ".join(found)


def _moved(words: list[str], shares: tuple[float, ...], rng: np.random.Generator) -> list[str]:
    """The words, with one of the shares of them in other places."""
    found = np.array(words)
    moved = np.flatnonzero(rng.random(len(words)) < rng.choice(shares))
    found[moved] = found[rng.permutation(moved)]
    return found.tolist()


def vocabulary() -> list[str]:
    """Every word that the grammar can produce, in a fixed order."""
    phrases = [*OTHER_WORDS, *COLOURS, *SHAPES, *SIZES, *PLEASANT, *UNPLEASANT]
    phrases += [*RELATIONS.values(), *PLACES.values()]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
