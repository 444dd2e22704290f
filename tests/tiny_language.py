"""A tiny Llama and its word tokenizer, built here, so that tests download nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = "{{ bos_token }}USER {{ messages[0]['content'] }} BOT"
SPECIAL = ("<s>", "</s>", "<unk>")


def tokenizer(texts: Iterable[str], chat: bool) -> PreTrainedTokenizerFast:
    """One token a word of the texts; `chat` gives it a template."""
    split = pre_tokenizers.Whitespace()
    words = [word for text in ("USER BOT", *texts) for word, _ in split.pre_tokenize_str(text)]
    known = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=CHAT if chat else None,
    )  # fmt: skip


def write_llama(
    folder: Path, texts: Sequence[str], chat: bool = False, pairs: Sequence[tuple[str, str]] = (),
    positions: int = 256,
) -> Path:  # fmt: skip
    """Save a random Llama that knows the words of `texts`, or one that learnt the pairs of prompt and
    answer by heart."""
    words = tokenizer([*texts, *(text for pair in pairs for text in pair)], chat)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
                bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2 - 0.15 * bool(pairs),
            )
        )  # fmt: skip
        if pairs:
            _learn(model, words, pairs, chat)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _learn(
    model: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    chat: bool,
) -> None:
    asked = [f"USER {prompt} BOT" if chat else prompt for prompt, _ in pairs]
    starts = [words(text)["input_ids"] for text in asked]
    ends = [words(text, add_special_tokens=False)["input_ids"] + [1] for _, text in pairs]
    length = max(len(s) + len(e) for s, e in zip(starts, ends, strict=True))
    rows, labels = [], []
    for start, end in zip(starts, ends, strict=True):
        rest = length - len(start) - len(end)
        rows.append([*start, *end, *[1] * rest])
        labels.append([*[-100] * len(start), *end, *[-100] * rest])
    ids, wanted = torch.tensor(rows), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            return
    raise AssertionError(f"the tiny model did not learn: loss {loss.item():.3f}")
