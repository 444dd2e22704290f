"""Tiny random models of transformers that read an image with a text, in the layout of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.tiny_language import tokenizer

SIDE, PATCH, IMAGE = 16, 8, "<image>"
CHAT = (
    "USER {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} BOT"
)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
PIXELS: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}


def seeded(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config)


def write_llava(folder: Path, texts: Sequence[str], chat: bool) -> Path:
    """A LLaVA that knows the texts' words, and Yes."""
    words = tokenizer(["Yes No", *texts], chat=False)
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    words.pad_token = "</s>"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(
            **SMALL, vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1,
            initializer_range=0.3,
        ),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )  # fmt: skip
    seeded(LlavaForConditionalGeneration, config).save_pretrained(folder)
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    LlavaProcessor(
        pictures, words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT if chat else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bert(folder: Path, texts: Sequence[str]) -> BertTokenizer:
    words = dict.fromkeys(word for text in texts for word in text.lower().split())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizer(str(folder / "vocab.txt"), model_max_length=20)


def write_blip(folder: Path, texts: Sequence[str]) -> Path:
    words = bert(folder, texts)
    config = BlipConfig(
        text_config={
            **SMALL, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 2,
            "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3, "initializer_range": 0.3,
            "projection_dim": 16,
        },
        vision_config={**SMALL, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3},
        projection_dim=16, image_text_hidden_size=16,
    )  # fmt: skip
    seeded(BlipForImageTextRetrieval, config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(**PIXELS), words).save_pretrained(folder)
    return folder


def write_blip2(folder: Path, texts: Sequence[str]) -> Path:
    words = bert(folder, texts)
    queries = 4
    config = Blip2Config(
        vision_config={**SMALL, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3},
        qformer_config={
            **SMALL, "vocab_size": len(words), "encoder_hidden_size": 32, "use_qformer_text_input": True,
            "cross_attention_frequency": 1, "initializer_range": 0.3,
        },
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 4, "ffn_dim": 32, "vocab_size": len(words),
                     "word_embed_proj_dim": 32},
        num_query_tokens=queries, image_text_hidden_size=16,
    )  # fmt: skip
    seeded(Blip2ForImageTextRetrieval, config).save_pretrained(folder)
    Blip2Processor(BlipImageProcessor(**PIXELS), words).save_pretrained(folder)
    return folder
