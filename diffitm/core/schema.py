"""Example, the unit that a task yields, and the Arrow schema of every table that is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

Direction = Literal["text", "image", "both"]


@dataclass(frozen=True)
class Example:
    """One decision of a task: every image is scored against every text.

    `direction` 'text': one image, pick the text at `gold`. 'image': one text, pick the image at
    `gold`. 'both': image i belongs to text i (Winoground's pairs). `images` are paths below the
    data root with '/' (a crop is a media fragment, 'x.jpg#xywh=left,top,width,height'). Examples of
    one `cluster` are not independent (they share an image or a set); without one an example stands
    alone. `groups` are the breakdowns.
    """

    id: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    direction: Direction
    gold: int = 0
    cluster: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    failure: str | None = None  # why it cannot be scored at all

    @property
    def needs_unconditional(self) -> bool:
        """Whether errors of different images are compared, which the empty text's error corrects."""
        return self.direction != "text"


def encodable(text: str) -> str:
    """The text without lone surrogates, which no file and no tokenizer takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def fault(example: Example) -> str | None:
    """Why an example decides nothing: a caption is no text, or a wrong candidate is the right one."""
    for i, text in enumerate(example.texts):
        if not text.strip():
            return f"caption {i} is empty"
        if text != encodable(text):
            return f"caption {i} is not UTF-8"
    kinds = {"text": [example.texts], "image": [example.images]}
    for candidates in kinds.get(example.direction, [example.texts, example.images]):
        gold = candidates[0 if example.direction == "both" else example.gold]
        if candidates.count(gold) > 1:
            return f"a wrong candidate is the right one: {gold}"
    return None


class PairRow(NamedTuple):
    """An image of a block and the texts that need a score against it.

    `stored` are, text by text, the places in the plan whose errors are in the store already; none where
    no text has any.
    """

    row: int
    image: str
    texts: list[str]
    stored: list[list[int]] | None = None


class Contest(NamedTuple):
    """What a race decides: the `kept` of the candidates whose error is the lowest.

    `candidates` are numbers of pairs, `bases` those of each one's image with the empty text, whose error
    is taken off; none where the texts of one image are compared. `about` is the place of the candidate of
    which alone is asked whether it is among them; None asks it of all. With `drops_lost` a candidate
    without finite errors loses, instead of spoiling the contest.
    """

    candidates: Sequence[int]
    kept: int
    bases: Sequence[int] = ()
    about: int | None = None
    drops_lost: bool = False


class RaceBlock(NamedTuple):
    """One row of the table of races: contests that share images, with all their pairs.

    Pair p is of images[image_of[p]] and texts[text_of[p]]; `stored` are the places in the plan whose
    errors are in the store, and `errors` these.
    """

    row: int
    images: list[str]
    texts: list[str]
    image_of: list[int]
    text_of: list[int]
    stored: list[list[int]]
    errors: list[list[float]]
    contests: list[Contest]


EXAMPLES = pa.schema(
    [
        ("task", pa.string()),
        ("position", pa.int64()),  # the example's place in its task
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("direction", pa.string()),
        ("gold", pa.int32()),
        ("cluster", pa.string()),
        ("groups", pa.map_(pa.string(), pa.string())),
        ("unconditional", pa.bool_()),
        ("failure", pa.string()),  # why the example cannot be scored at all
    ]
)


def read_block(line: dict[str, Any]) -> RaceBlock:
    """A row of RACES."""
    contests = [Contest(**contest) for contest in line["contests"]]
    return RaceBlock(**{**line, "contests": contests})


def block_rows(line: dict[str, Any]) -> list[PairRow]:
    """The images of a row of BLOCK."""
    stored = line["stored"] or [None] * len(line["images"])
    each = zip(line["images"], line["texts"], stored, strict=True)
    return [PairRow(line["row"], *image) for image in each]


PLACES = pa.list_(pa.int16())  # in a plan of timesteps

# One row a pair that still needs a score, by image. The empty text is the unconditional one.
WORK = pa.schema([("image", pa.string()), ("text", pa.string()), ("stored", PLACES)])

# One row a block of such pairs: images with their texts.
BLOCK = pa.schema(
    [
        ("row", pa.int64()),
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.list_(pa.string()))),
        ("stored", pa.list_(pa.list_(PLACES))),
    ]
)

# One row a block of contests; see RaceBlock.
RACES = pa.schema(
    [
        ("row", pa.int64()),
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("image_of", pa.list_(pa.int32())),
        ("text_of", pa.list_(pa.int32())),
        ("stored", pa.list_(PLACES)),
        ("errors", pa.list_(pa.list_(pa.float32()))),
        (
            "contests",
            pa.list_(
                pa.struct(
                    [
                        ("candidates", pa.list_(pa.int32())),
                        ("kept", pa.int32()),
                        ("bases", pa.list_(pa.int32())),
                        ("about", pa.int32()),
                        ("drops_lost", pa.bool_()),
                    ]
                )
            ),
        ),
    ]
)

# One row a pair. Errors are per timestep; `l2` is the norm over the latent's elements, `l1` and
# `huber` are means over them, and the mean squared error is l2 ** 2 / elements. CLIP fills
# `similarity` alone. `failure` tells why a pair has no score. A line of a race holds a part of the plan,
# whose places are `positions`; without them it is the whole. A pair can have several such lines.
SCORES = pa.schema(
    [
        ("row", pa.int64()),
        ("image", pa.string()),
        ("text", pa.string()),
        ("timesteps", pa.list_(pa.int32())),
        (
            "sigmas",
            pa.list_(pa.float32()),
        ),  # a flow model's, which has no timesteps in whole numbers
        ("positions", PLACES),
        ("l2", pa.list_(pa.float32())),
        ("l1", pa.list_(pa.float32())),
        ("huber", pa.list_(pa.float32())),
        ("elements", pa.int32()),
        ("similarity", pa.float32()),
        ("digest", pa.string()),  # sha256 of the image file
        ("failure", pa.string()),
    ]
)
