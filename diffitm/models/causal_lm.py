"""A causal language model of transformers that answers prompts: Hub ids and local folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.hub_weights import Weights, fetch, needed
from diffitm.models.loading import DTYPES
from diffitm.models.model_index import from_hub
from diffitm.models.weight_cache import content_digest, on_disk

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
CUT_OFF, TOO_LONG = "cut off", "prompt too long for the model"
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class LanguageSource:
    """Where a language model lies: a folder, or a Hub id with its commit; `digest` names it."""

    name: str
    location: str
    revision: str | None
    digest: str
    weights: Weights | None = None  # of the Hub, once they are fetched

    def fetched(self) -> LanguageSource:
        """The same with its weights on this machine, if it is one of the Hub. Raises as hub_weights.fetch."""
        if self.revision is None:
            return self
        weights = fetch(self.name, self.revision, lambda names: needed(names, ("",)), "llm")
        return replace(self, weights=weights)


class Answer(NamedTuple):
    """What a model wrote; `problem` is why it is not a whole answer."""

    text: str
    problem: str | None


def resolve_language_model(name: str) -> LanguageSource:
    """Find a language model by folder, URI of one or Hub id. Loads no weights (those behind a URI are
    fetched) and runs none of its code.

    Raises InputError that says what was looked for.
    """
    given, name = name, storage.without_query(name)
    folder = _copy(given) if "://" in given else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{name!r}: the folder has no config.json (transformers layout)", "llm"
            )
        if not list(folder.glob("*.safetensors")):
            raise InputError(f"{name!r}: the folder has no .safetensors weights", "llm")
        if not any((folder / file).is_file() for file in TOKENIZERS):
            raise InputError(f"{name!r}: the folder has no tokenizer (tokenizer.json)", "llm")
        _check_kind(name, str(folder), None)
        where = given if "://" in given else str(folder.absolute())
        return LanguageSource(name, where, None, _digest(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise InputError(f"{name!r} is neither a folder nor a Hub id such as 'org/name'", "llm")
    commit = from_hub(name, "config.json", "llm").parent.name
    _check_kind(name, name, commit)
    return LanguageSource(name, name, commit, commit)


def _digest(folder: Path) -> str:
    return content_digest(sorted(path for path in folder.iterdir() if path.is_file()))


def _copy(uri: str, digest: str | None = None) -> Path:
    """A local copy of a model's folder in an object store."""
    there = storage.sizes(uri)
    if not there:
        raise InputError(f"{storage.without_query(uri)!r}: there is no such folder", "llm")
    return on_disk(uri, there, _digest, digest)[0]


def _on_machine(source: LanguageSource) -> tuple[str, str | None]:
    """The local folder, or the Hub id and its commit, to load from."""
    if source.weights is not None:
        return str(source.weights.on_machine()), None
    if "://" in source.location:
        return str(_copy(source.location, source.digest)), None
    return source.location, source.revision


def _check_kind(name: str, location: str, revision: str | None) -> None:
    """Raises InputError for a model that transformers does not know as a causal language model."""
    try:
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
    except _UNREADABLE as error:
        raise InputError(f"{name!r}: its config.json cannot be used: {error}", "llm") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{name!r}: a {config.model_type} model is no causal language model; give an "
            "instruct model such as meta-llama/Llama-3.1-8B-Instruct",
            "llm",
        )


class LanguageModel:
    """Answers prompts, greedily or, above temperature 0, by samples of each prompt's own seed.

    In exact arithmetic an answer does not depend on the prompts beside it: they are padded on the
    left, the padding is masked, and the noise of a sample belongs to (seed, prompt).

    Raises InputError if the model cannot be loaded or its weights are not whole.
    """

    def __init__(
        self,
        source: LanguageSource,
        dtype: str = "fp32",
        device: str = "cpu",
        temperature: float = 0.0,
        seed: int = 0,
        max_new_tokens: int = 80,
    ) -> None:
        self.device, self.temperature, self.seed = torch.device(device), temperature, seed
        self.max_new_tokens = max_new_tokens
        location, revision = _on_machine(source)
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left", **where)
            model, told = AutoModelForCausalLM.from_pretrained(
                location, dtype=DTYPES[dtype], use_safetensors=True,
                output_loading_info=True, **where,
            )  # fmt: skip
        except _UNREADABLE as error:
            raise InputError(f"{source.name!r} cannot be loaded: {error}", "llm") from error
        lost = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
        if lost:
            raise InputError(
                f"{source.name!r}: its weights lack {len(lost)}, such as {lost[0]}", "llm"
            )
        ends = model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise InputError(f"{source.name!r} has no token that ends an answer (eos_token)", "llm")
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.ends[0])
        # The model's own settings may sample, or punish the repetition that is asked for here.
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        self.model = model.eval().to(self.device)
        most = getattr(model.config, "max_position_embeddings", None)
        self.longest = most - max_new_tokens if most else None

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """The answer to each prompt, in one forward of all that are not too long."""
        texts = [self._as_chat(prompt) for prompt in prompts]
        plain = self.tokenizer.chat_template is None  # a template writes the special tokens itself
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=plain)["input_ids"]]
        fits = [self.longest is None or length <= self.longest for length in lengths]
        kept = [i for i, fit in enumerate(fits) if fit]
        answers = [Answer("", TOO_LONG)] * len(prompts)
        if not kept:
            return answers
        made = self._generate([texts[i] for i in kept], [prompts[i] for i in kept], plain)
        for i, ids in zip(kept, made, strict=True):
            ended = any(token in self.ends for token in ids.tolist())
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers[i] = Answer(text, None if ended else CUT_OFF)
        return answers

    def _as_chat(self, prompt: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt
        # Templates that know `enable_thinking` (Qwen's) would have the model think aloud first.
        found = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )  # fmt: skip
        return str(found)

    @torch.inference_mode()
    def _generate(self, texts: list[str], prompts: list[str], special: bool) -> Tensor:
        """The new tokens [B, T] after each text, padded behind its end."""
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=special
        ).to(self.device)
        noise = LogitsProcessorList()
        if self.temperature > 0:
            noise.append(_Gumbel(prompts, self.seed, self.temperature))
        out: Tensor = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_processor=noise,
        )
        return out[:, batch["input_ids"].shape[1] :].cpu()


class _Gumbel(LogitsProcessor):
    """The largest of logits / temperature + Gumbel noise is a sample of their softmax.

    So each prompt has a generator of its own, which transformers' sampling lacks.
    """

    def __init__(self, prompts: Sequence[str], seed: int, temperature: float) -> None:
        self.temperature = temperature
        self.generators = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
            number = int.from_bytes(digest[:8], "big") >> 1
            self.generators.append(torch.Generator().manual_seed(number))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        drawn = torch.stack([torch.rand(width, generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(drawn.double().clamp_min(1e-12)))
        return scores.float() / self.temperature + gumbel.float().to(scores.device)
