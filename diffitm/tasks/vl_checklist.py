"""VL-Checklist (Zhao et al. 2022): a text and one with another object, attribute or relation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.base import RetrievalTask, pictures, with_macro

DATASETS = ("hake", "swig", "vg")  # whose images a file is about, by a word of its path; else vg
FIELDS = ("image", "texts")


class VlChecklist(RetrievalTask):
    """Every .json below data/Attribute, data/Object and data/Relation: [[image, {POS: [..], NEG: [..]}], ..].

    Images lie below hake/, swig/ and vg/ of the folder, in the authors' layout. The part is what is asked
    and the last word of a file's name, Object_Location_center or Attribute_color; spatial.json, which lies
    with the attributes, is Relation_spatial, as the authors count it. A pair of texts is an example.
    """

    name = "vl_checklist"
    folder = "vl_checklist"
    source = (
        "om-ai-lab/VL-CheckList (its licence is not stated); images of HAKE, SWiG, Visual Genome"
    )

    def examples(self, root: str) -> Iterator[Example]:
        """One example a pair of texts; those of an image are a cluster."""
        top = storage.join(root, self.folder, "data")
        start = f"{storage.filesystem(top)[1].rstrip('/')}/"
        found = [path.removeprefix(start) for path in storage.files(top, ".json", recursive=True)]
        files = [
            name for name in found if name.partition("/")[0] in ("Attribute", "Object", "Relation")
        ]
        if not files:
            raise InputError(f"task {self.name} needs {top}/Attribute/.. (from {self.source})")
        images = {name: pictures(root, f"{self.folder}/{name}") for name in DATASETS}
        for name in files:
            words = name.removesuffix(".json").replace("/", "_").split("_")
            folder = images[next((word for word in words if word in DATASETS), "vg")]
            for line in self.lines(root, f"data/{name}", FIELDS):
                image, texts = line.image("image", folder), line.within("texts")
                right, wrong = texts.texts("POS", 1), texts.texts("NEG", 1)
                if len(right) != len(wrong):
                    raise texts.wrong("NEG", f"as many texts as POS has, {len(right)}")
                for number, pair in enumerate(zip(right, wrong, strict=True)):
                    key = f"{name}/{line.key}/{number}"
                    yield Example(key, (image,), pair, "text", 0, image, {"part": _part(words)})

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, the mean of the parts, and each part's."""
        return with_macro(decisions, "part")


def _part(words: Sequence[str]) -> str:
    if words[-1] == "spatial":
        return "Relation_spatial"
    kind = [words[0], words[1]] if words[0] == "Object" else [words[0]]
    return "_".join([*kind, words[-1]])
