"""SVO-Probes (Hendricks and Nematzadeh 2021): a sentence, its image, and one that differs in the
subject, the verb or the object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask, entry

PROBES, ROWS = "svo_probes.csv", "svo.json"
KINDS = ("subj", "verb", "obj")
Row = tuple[str, str, str, str]  # sentence, right image, wrong image, kind of negative


class Svo(RetrievalTask):
    """svo_probes.csv with images/<id>.jpg, else svo.json with images/<pos_id>.

    Addresses that are dead leave rows without an image: those are counted as failures.
    """

    folder = "svo"
    source = "the SVO-Probes authors' list of image addresses (diffitm prepare fetches them)"
    kind: ClassVar[str]

    def examples(self, root: str) -> Iterator[Example]:
        """One example a row with this kind of negative."""
        read = self._probes if self._has(root, PROBES) else self._rows
        for number, (sentence, right, wrong, kind) in enumerate(read(root)):
            if kind == self.kind:
                yield Example(
                    id=str(number),
                    images=tuple(f"{self.folder}/images/{file}" for file in (right, wrong)),
                    texts=(sentence,),
                    direction="image",
                    cluster=right,
                )

    def _has(self, root: str, name: str) -> bool:
        return storage.exists(storage.join(root, self.folder, name))

    def _probes(self, root: str) -> Iterator[Row]:
        for number, line in enumerate(self.read_table(root, PROBES), 2):
            try:
                (kind,) = [k for k in KINDS if _true(line[f"{k}_neg"])]
                right, wrong = line["pos_image_id"].strip(), line["neg_image_id"].strip()
                if not right or not wrong:
                    raise ValueError("an image without id")
                yield line["sentence"].strip(), f"{right}.jpg", f"{wrong}.jpg", kind
            except (KeyError, ValueError):
                wanted = "sentence, pos_image_id, neg_image_id and one true of subj_neg, verb_neg, obj_neg"
                raise self.malformed(root, PROBES, {f"row {number}": line}, wanted) from None

    def _rows(self, root: str) -> Iterator[Row]:
        if not self._has(root, ROWS):
            where = storage.join(root, self.folder)
            raise InputError(f"task {self.name} needs {where}/{PROBES} or {ROWS} ({self.source})")
        lines = self.read_json(root, ROWS)
        if not isinstance(lines, list):
            raise self.malformed(root, ROWS, lines, "a list of rows")
        for line in lines:
            found = entry(line, sentence=str, pos_id=str, neg_id=str, neg_type=str)
            if found is None or found[3] not in KINDS:
                wanted = f"sentence, pos_id, neg_id and a neg_type of {', '.join(KINDS)}"
                raise self.malformed(root, ROWS, line, wanted)
            sentence, right, wrong, kind = found
            yield sentence, right, wrong, kind


def _true(value: Any) -> bool:
    return value.strip().lower() in ("true", "1")


class SvoSubject(Svo):
    """Negatives with another subject."""

    name = "svo_subj"
    kind = "subj"


class SvoVerb(Svo):
    """Negatives with another verb."""

    name = "svo_verb"
    kind = "verb"


class SvoObject(Svo):
    """Negatives with another object."""

    name = "svo_obj"
    kind = "obj"
