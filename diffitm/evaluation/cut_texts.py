"""Texts that a model reads not to their end, by task, and candidates that are the same to it by that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffitm.store.pair_table import distinct_texts, examples_dataset
from diffitm.tasks.registry import find_task

if TYPE_CHECKING:
    from diffitm.models.text_limits import TextLimits
    from diffitm.scoring.specs import Spec

log = logging.getLogger("diffitm")
BATCH = 1000  # examples


@dataclass(frozen=True)
class CutTexts:
    """Of a task's distinct `texts` the model cuts `cut` after `tokens` tokens, marks among them; in `alike`
    examples different candidates are the same to it then."""

    model: str
    task: str
    tokens: int
    texts: int
    cut: int
    alike: int


def count_cut(specs: Sequence[Spec], examples: Mapping[str, str]) -> list[CutTexts]:
    """What diffusion models and CLIPs cut of the tasks' texts (name -> examples file), where it is any; a
    warning where candidates become the same.

    Raises InputError for a tokenizer that cannot be loaded.
    """
    # With torch, which an evaluation does not need.
    from diffitm.models.text_limits import TextLimits
    from diffitm.scoring.specs import ClipSpec, DiffusionSpec, DptSpec

    read = (spec for spec in specs if isinstance(spec, DiffusionSpec | DptSpec | ClipSpec))
    sources = dict.fromkeys(spec.source for spec in read)
    found = []
    for source in sources:
        limits = TextLimits(source)
        for name, uri in examples.items():
            task = find_task(name).name
            texts = list(distinct_texts([uri]))
            if cut := limits.cut(texts):
                alike = _count_alike(limits, uri, cut)
                found.append(CutTexts(source.name, task, limits.most, len(texts), len(cut), alike))
                if alike:
                    log.warning("%s", cut_note(found[-1:]))
    return found


def _count_alike(limits: TextLimits, uri: str, cut: set[str]) -> int:
    """Examples with different candidates of which the same is read."""
    count = 0
    for batch in examples_dataset([uri]).to_batches(columns=["texts", "failure"], batch_size=BATCH):
        for line in batch.to_pylist():
            texts = list(dict.fromkeys(line["texts"]))
            if line["failure"] is None and len(texts) > 1 and not cut.isdisjoint(texts):
                count += len(set(limits.read(texts))) < len(texts)
    return count


def cut_note(cut: Sequence[CutTexts]) -> str:
    """What tables and reports say of cut texts; nothing where none is."""
    lines = []
    for model in dict.fromkeys(part.model for part in cut):
        parts = [part for part in cut if part.model == model]
        told = ", ".join(map(_of_task, parts))
        lines.append(f"{model} reads {parts[0].tokens} tokens of a text and cuts {told}.")
    return " ".join(lines)


def _of_task(part: CutTexts) -> str:
    text = f"{part.cut:,} of {part.texts:,} of {part.task}"
    if not part.alike:
        return text
    examples = "1 example has" if part.alike == 1 else f"{part.alike:,} examples have"
    return f"{text} (by which {examples} candidates that are the same to it)"
