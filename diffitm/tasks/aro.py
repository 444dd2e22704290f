"""ARO (Yuksekgonul et al. 2023): who does what to whom, and what is how, in Visual Genome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from diffitm.core.schema import Example
from diffitm.metrics.figures import Decision, Figure, macro, means
from diffitm.tasks.base import RetrievalTask, entry

NUMBER = (int, float)
LARGEST = 2**31  # pixels
# ARO's notebook leaves these relations out of its macro accuracy: exchanged, they stay true or mean
# nothing.
SYMMETRIC = frozenset(
    """adjusting|attached to|between|bigger than|biting|boarding|brushing|chewing|cleaning|climbing|
    close to|coming from|coming out of|contain|crossing|dragging|draped over|drinking|drinking from|
    driving|driving down|driving on|eating from|eating in|enclosing|exiting|facing|filled with|
    floating in|floating on|flying|flying above|flying in|flying over|flying through|full of|
    going down|going into|going through|grazing in|growing in|growing on|guiding|hanging from|
    hanging in|hanging off|hanging over|higher than|holding onto|hugging|in between|jumping off|
    jumping on|jumping over|kept in|larger than|leading|leaning over|leaving|licking|longer than|
    looking in|looking into|looking out|looking over|looking through|lying next to|lying on top of|
    making|mixed with|mounted on|moving|on the back of|on the edge of|on the front of|
    on the other side of|opening|painted on|parked at|parked beside|parked by|parked in|
    parked in front of|parked near|parked next to|perched on|petting|piled on|playing|playing in|
    playing on|playing with|pouring|reaching for|reading|reflected on|riding on|running in|
    running on|running through|seen through|sitting behind|sitting beside|sitting by|
    sitting in front of|sitting near|sitting next to|sitting under|skiing down|skiing on|
    sleeping in|sleeping on|smiling at|sniffing|splashing|sprinkled on|stacked on|standing against|
    standing around|standing behind|standing beside|standing in front of|standing near|
    standing next to|staring at|stuck in|surrounding|swimming in|swinging|talking to|topped with|
    touching|traveling down|traveling on|tying|typing on|underneath|wading in|waiting for|
    walking across|walking by|walking down|walking next to|walking through|working in|working on|
    worn on|wrapped around|wrapped in|by|of|near|next to|with|beside|on the side of|around
    """.replace("\n    ", "").split("|")
)
LEAST_CASES = 25  # an attribute pair with fewer is not part of ARO's macro accuracy


class VisualGenome(RetrievalTask):
    """Rows with image_path, a box that the image is cropped to, true_caption and false_caption."""

    folder = "aro"
    source = "the ARO authors' annotation files and vgr_vga_images.zip"
    file: ClassVar[str]
    key: ClassVar[str]

    def examples(self, root: str) -> Iterator[Example]:
        """One example a row; the image is the cluster."""
        rows = self.read_json(root, self.file)
        if not isinstance(rows, list):
            raise self.malformed(root, self.file, rows, "a list of rows")
        boxes = {f"bbox_{side}": NUMBER for side in "xywh"}
        texts = {"image_path": str, "true_caption": str, "false_caption": str}
        for number, row in enumerate(rows):
            found, group = entry(row, **texts, **boxes), self.group(row)
            if found is None or group is None:
                wanted = f"the fields {', '.join([*texts, *boxes, self.key])}"
                raise self.malformed(root, self.file, row, wanted)
            image, right, wrong, *box = found
            if not all(-LARGEST < side < LARGEST for side in box):
                raise self.malformed(root, self.file, row, f"sane numbers in {', '.join(boxes)}")
            crop = ",".join(str(int(side)) for side in box)
            yield Example(
                id=str(number),
                images=(f"{self.folder}/images/{image}#xywh={crop}",),
                texts=(right, wrong),
                direction="text",
                cluster=image,
                groups={self.key: group},
            )

    def group(self, row: dict[str, Any]) -> str | None:
        """The row's relation or attributes, None if it has none."""
        raise NotImplementedError

    def kept(self, counts: Counter[str]) -> set[str]:
        """The groups of the macro accuracy, from their numbers of cases."""
        raise NotImplementedError

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy over all cases (GDBench's figure), ARO's mean over groups, and each group's."""
        kept = self.kept(Counter(decision.groups[self.key] for decision in decisions))
        whole, *groups = means(decisions)
        shown = [figure for figure in groups if figure.group.partition("=")[2] in kept]
        return [whole, macro(decisions, "accuracy", self.key, kept), *shown]


class VgRelation(VisualGenome):
    """visual_genome_relation.json; the macro accuracy leaves symmetric relations out."""

    name = "vg_relation"
    file = "visual_genome_relation.json"
    key = "relation"

    def group(self, row: dict[str, Any]) -> str | None:
        """The row's relation_name."""
        found = entry(row, relation_name=str)
        return found[0] if found else None

    def kept(self, counts: Counter[str]) -> set[str]:
        """Relations that ARO's notebook keeps."""
        return set(counts) - SYMMETRIC


class VgAttribution(VisualGenome):
    """visual_genome_attribution.json; the macro accuracy takes attribute pairs with 25 cases."""

    name = "vg_attribution"
    file = "visual_genome_attribution.json"
    key = "attributes"

    def group(self, row: dict[str, Any]) -> str | None:
        """The row's pair of attributes."""
        found = entry(row, attributes=list)
        return "_".join(map(str, found[0][:2])) if found and len(found[0]) >= 2 else None

    def kept(self, counts: Counter[str]) -> set[str]:
        """Attribute pairs with enough cases."""
        return {group for group, count in counts.items() if count >= LEAST_CASES}
