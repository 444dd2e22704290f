"""WhatsUp (Kamath et al. 2023): where one thing is, from photographs and questions on COCO and GQA."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from diffitm.core.schema import Example
from diffitm.metrics.credit import Credit
from diffitm.metrics.figures import Decision, Figure, means
from diffitm.tasks.base import RetrievalTask, pictures

PLACED = {"right": "left", "under": "on", "behind": "in-front"}  # the one and its opposite
PAIR, SET = "pair accuracy", "set accuracy"


class WhatsUp(RetrievalTask):
    """<file>.json: [{image_path, caption_options}], the first of the four options is right.

    An image is named <thing>_<preposition>_<thing>.jpeg: of two things there are four images. Accuracy is
    by image (chance 25), `pair accuracy` by two opposite prepositions that are both right, and `set
    accuracy` by all four.
    """

    folder = "whatsup"
    source = "amitakamath/whatsup_vlms (MIT), its Google Drive"
    file: ClassVar[str]

    def examples(self, root: str) -> Iterator[Example]:
        """One example an image; those of the same two things are a cluster."""
        images = dict[str, str]()
        for line in self.lines(root, self.file):
            # The published paths begin with the authors' folder.
            folder, _, name = line.image("image_path").removeprefix("data/").partition("/")
            images.setdefault(folder, pictures(root, f"{self.folder}/{folder}"))
            words = name.rpartition(".")[0].split("_")
            if len(words) < 3 or "/" in name:
                raise line.wrong("image_path", "FOLDER/THING_PREPOSITION_THING.jpeg")
            texts = line.texts("caption_options", 4)
            things = f"{words[0]} {words[-1]}"
            groups = {"preposition": words[1], "things": things}
            yield Example(line.key, (f"{images[folder]}/{name}",), texts, "text", 0, things, groups)

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, of pairs and of sets, and by preposition."""
        whole, *groups = [f for f in means(decisions) if not f.group.startswith("things=")]
        sets: dict[str, dict[str, Decision]] = {}
        for decision in decisions:
            place = sets.setdefault(decision.groups["things"], {})
            place[decision.groups["preposition"]] = decision
        pairs = [
            _joint(PAIR, [found[one], found[other]])
            for found in sets.values()
            for one, other in PLACED.items()
            if one in found and other in found
        ]
        fours = [_joint(SET, list(found.values())) for found in sets.values() if len(found) == 4]
        return [whole, *means(pairs)[:1], *means(fours)[:1], *groups]


def _joint(metric: str, decisions: Sequence[Decision]) -> Decision:
    """The decision that all of some are right; without a score where one of them has none."""
    credits: Mapping[str, Credit] | None = None
    if all(decision.credits is not None for decision in decisions):
        own = [decision.credits["accuracy"] for decision in decisions if decision.credits]
        value = math.prod(credit.value for credit in own)
        finite = all(credit.finite for credit in own)
        credits = {metric: Credit(value, 0 < value < 1, finite)}
    return Decision(
        decisions[0].cluster,
        {},
        {metric: math.prod(decision.chance["accuracy"] for decision in decisions)},
        dict(credits) if credits else None,
        any(decision.failed for decision in decisions),
    )


class WhatsUpA(WhatsUp):
    """controlled_images_dataset.json: 412 photographs of a thing left of, right of, on or under another."""

    name = "whatsup_a"
    published = 412
    file = "controlled_images_dataset.json"


class WhatsUpB(WhatsUp):
    """controlled_clevr_dataset.json: 408 photographs of a thing left of, right of, in front of or behind
    another."""

    name = "whatsup_b"
    published = 408
    file = "controlled_clevr_dataset.json"


class Spatial(RetrievalTask):
    """<file>.json: [[image id, right text, wrong text], ...]."""

    folder = "whatsup"
    source = "amitakamath/whatsup_vlms (MIT), its Google Drive"
    file: ClassVar[str]
    images: ClassVar[str]
    digits: ClassVar[int] = 0

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry; those of an image are a cluster."""
        images = pictures(root, self.images)
        for line in self.lines(root, self.file, ("image id", "right text", "wrong text")):
            number = line.label("image id")
            if not re.fullmatch("[0-9]+", number):
                raise line.wrong("image id", "the number of an image")
            image = f"{images}/{number.zfill(self.digits)}.jpg"
            texts = line.text("right text"), line.text("wrong text")
            yield Example(line.key, (image,), texts, "text", 0, image)


class CocoOne(Spatial):
    """COCO-spatial, where one thing is: 2,247 entries, images below coco/val2017."""

    name = "coco_spatial_one"
    published = 2247
    file = "coco_qa_one_obj.json"
    images = "coco/val2017"
    digits = 12


class CocoTwo(CocoOne):
    """COCO-spatial, where two things are: 440 entries."""

    name = "coco_spatial_two"
    published = 440
    file = "coco_qa_two_obj.json"


class GqaOne(Spatial):
    """GQA-spatial, where one thing is: 1,160 entries, images below whatsup/vg_images."""

    name = "gqa_spatial_one"
    published = 1160
    file = "vg_qa_one_obj.json"
    images = "whatsup/vg_images"


class GqaTwo(GqaOne):
    """GQA-spatial, where two things are: 291 entries."""

    name = "gqa_spatial_two"
    published = 291
    file = "vg_qa_two_obj.json"
