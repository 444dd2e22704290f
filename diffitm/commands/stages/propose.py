"""Hard negative captions as Ray Data stages: by rule, and by a language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.core.storage import join
from diffitm.distributed.item_stage import ItemStage, run_items, work_folder
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import whole_files
from diffitm.negatives import rules

if TYPE_CHECKING:
    from diffitm.models.causal_lm import Answer, LanguageSource

VERSION = 1  # grows when the same settings would give other captions
RULES_AT_ONCE = 256
ANSWERS_AT_ONCE = {"cpu": 8, "cuda": 64}
MADE = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("kinds", pa.list_(pa.string())),
    ]
)
ANSWERS = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("text", pa.string()),
        ("problem", pa.string()),
    ]
)


def by_rule(out: str, captions: list[str], seed: int, pool: ActorPool) -> dict[str, dict[str, str]]:
    """Captions by rule, caption -> kind -> text; what is made already lies below work/ beside `out`."""
    settings = {"version": VERSION, "captions": fingerprint(captions), "seed": seed}
    folder = join(work_folder(out, "negatives-rules", settings), "made")
    stage = ItemStage("captions by rule", folder, MADE, RuleActor, (seed,), RULES_AT_ONCE)
    run_items(stage, captions, pool)
    return {
        captions[line["position"]]: dict(zip(line["kinds"], line["captions"], strict=True))
        for line in whole_files(folder, MADE).to_table().to_pylist()
    }


class RuleActor:
    """Makes hard captions by rule."""

    def __init__(self, seed: int, device: str, counter: Any) -> None:
        self.seed, self.counter = seed, counter

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = []
        for group in table.to_pylist():
            for position, caption in enumerate(group["names"], group["start"]):
                made = rules.rules(caption, self.seed)
                line = {"row": group["row"], "position": position}
                lines.append({**line, "captions": list(made.values()), "kinds": list(made)})
            self.counter.add.remote(len(group["names"]))
        return pa.Table.from_pylist(lines, MADE)


@dataclass(frozen=True)
class Question:
    """All that an answer depends on, but the caption: model, prompt and LanguageModel's settings."""

    source: LanguageSource
    template: str
    dtype: str
    temperature: float
    seed: int
    max_new_tokens: int


def by_model(
    out: str, captions: list[str], question: Question, batch_size: int | None, pool: ActorPool
) -> dict[str, tuple[str, str | None]]:
    """A language model's answers, caption -> text and problem; what is there already is kept.

    `batch_size` bounds the prompts of a forward and is at most a group's size.
    """
    settings = {
        **asdict(question),
        "version": VERSION,
        "captions": fingerprint(captions),
        "source": question.source.digest,
        "device": pool.device,
    }
    folder = join(work_folder(out, "negatives-llm", settings), "answers")
    size = ANSWERS_AT_ONCE[pool.device]
    stage = ItemStage(
        "captions by the language model",
        folder,
        ANSWERS,
        AnswerActor,
        (question, batch_size or size),
        size,
    )
    run_items(stage, captions, pool)
    return {
        captions[line["position"]]: (line["text"], line["problem"])
        for line in whole_files(folder, ANSWERS).to_table().to_pylist()
    }


class AnswerActor:
    """Loads the language model once; has it answer captions."""

    def __init__(self, question: Question, batch_size: int, device: str, counter: Any) -> None:
        from diffitm.models.causal_lm import LanguageModel

        self.template, self.batch_size, self.counter = question.template, batch_size, counter
        self.model = LanguageModel(
            question.source, question.dtype, device, question.temperature, question.seed,
            question.max_new_tokens,
        )  # fmt: skip

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = []
        for group in table.to_pylist():
            names: list[str] = group["names"]
            for s in range(0, len(names), self.batch_size):
                some = names[s : s + self.batch_size]
                prompts = [self.template.replace("{caption}", caption) for caption in some]
                for position, answer in enumerate(self._answer(prompts), group["start"] + s):
                    lines.append({"row": group["row"], "position": position, **answer._asdict()})
                self.counter.add.remote(len(some))
        return pa.Table.from_pylist(lines, ANSWERS)

    def _answer(self, prompts: list[str]) -> list[Answer]:
        try:
            return self.model.answer(prompts)
        except torch.OutOfMemoryError as error:
            text = (
                f"{len(prompts)} prompts do not fit the GPU's memory; give a smaller --batch-size"
            )
            raise InputError(text) from error
