"""VQAScore: the probability that a model answers 'Yes' when asked whether the image shows the text.

Lin et al. 2024, Evaluating Text-to-Visual Generation with Image-to-Text Generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.vision_language import find, load

ANSWER, MARK = "Yes", "{text}"
OPTION = ",question="  # in the argument, before a file with another question
AT_ONCE = 8  # pairs
# Whose processors put the image before the text by themselves.
ALONE = ("blip-2", "instructblip")


class Vqa:
    """Any image-text-to-text model of transformers; `argument` is a folder or Hub id, and after
    ',question=' a file with the question, in which {text} stands for the text."""

    version = 1
    score = "probability"

    def __init__(self, argument: str, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        name, self.question = read_question(argument)
        self.model, self.processor = load(name, {"*": AutoModelForImageTextToText}, device)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.answer: int = tokenizer(ANSWER, add_special_tokens=False).input_ids[0]

    @classmethod
    def identity(cls, argument: str | None) -> dict[str, Any]:
        """The weights, and the question that is asked."""
        if argument is None:
            raise ValueError("name the model: vqa:org/name")
        name, question = read_question(argument)
        return {"argument": None, "weights": find(name)[2], "question": question}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Probabilities [images, texts]."""
        pairs = [(image, text) for image in images for text in texts]
        found = [
            self._ask(pairs[start : start + AT_ONCE]).float().cpu()
            for start in range(0, len(pairs), AT_ONCE)
        ]
        return torch.cat(found).view(len(images), len(texts)).numpy()

    def _ask(self, pairs: Sequence[tuple[Image.Image, str]]) -> Tensor:
        """The answer's probability for each pair, of all tokens that could come first."""
        inputs = self.processor(
            images=[[image] for image, _ in pairs],
            text=[self.prompt(text) for _, text in pairs],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        made = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        probabilities: Tensor = made.logits[0].float().softmax(-1)
        return probabilities[:, self.answer]

    def prompt(self, text: str) -> str:
        """The question about a text, as the model is asked."""
        question = self.question.replace(MARK, text)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return str(
                self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            )
        if self.model.config.model_type in ALONE:
            return question
        return f"{self.processor.image_token}\n{question}"


def read_question(argument: str) -> tuple[str, str]:
    """The model's name and the question. Raises InputError for a file that is none."""
    name, _, file = argument.partition(OPTION)
    if not file:
        return name, files("diffitm.scoring").joinpath("vqa.txt").read_text().strip()
    try:
        question = storage.read_text(file).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file!r} cannot be read: {error}", "scorer") from error
    if MARK not in question:
        raise InputError(f"{file!r}: holds no {MARK}", "scorer")
    return name, question
