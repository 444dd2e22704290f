"""What flow models share whose texts are read by a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffitm.models.denoiser import Condition
from diffitm.models.flow import FlowDiffusion
from diffitm.models.latent_diffusion import OneEncoder, is_cut, sample, tokenize_masked


class LanguageFlow(OneEncoder, FlowDiffusion):
    """A flow model that is given hidden states of a language model, which reads texts in a template.

    The condition is {"hidden": [B, L, D], "mask": [B, L]}. Subclasses set `lengths`, diffusers' own
    `pipeline`, and what OneEncoder asks for.
    """

    layer: ClassVar[int] = -2  # whose output the network is given
    skipped: ClassVar[int] = 0  # tokens before a text, which it is not given
    pipeline: Any

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        given = self.templated(text, self.tokenizer)
        return is_cut(self.tokenizer, given, self.lengths["tokenizer"])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, and what follows them in the template, as pipelines do."""
        given = [self.templated(text, self.tokenizer) for text in texts]
        ids, mask = tokenize_masked(self.tokenizer, given, self.lengths["tokenizer"], self.device)
        hidden = self.hidden_states(ids, mask)[self.layer]
        return {"hidden": hidden[:, self.skipped :], "mask": mask[:, self.skipped :]}

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """The language model's, [B, L, D] each, for token ids and mask [B, L]."""
        model = self.text_encoder.base_model  # without the layer that says the next word
        found: Sequence[Tensor] = model(
            ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        return found

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. Euler's steps with the folder's shift, diffusers' pipeline."""
        pipeline = self.pipeline(
            scheduler=self.sampler(), vae=self.vae, text_encoder=self.text_encoder,
            tokenizer=self.tokenizer, transformer=self.network,
        )  # fmt: skip
        asked = self.asked(prompt, len(seeds), guidance)
        images: list[Image.Image] = sample(
            pipeline, self, prompt, seeds, steps, guidance, self.unpacked, **asked
        )
        return images

    def asked(self, prompt: str, count: int, guidance: float) -> dict[str, Any]:
        """What else its pipeline is called with for so many images of a prompt."""
        return {}

    def unpacked(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] of what its pipeline gives."""
        return latents


def chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """Messages in a tokenizer's chat template, to where the answer begins, if asked for. Raises OSError
    without a template."""
    if tokenizer.chat_template is None:
        raise OSError(
            "its tokenizer has no chat_template, in which texts are given to its text encoder"
        )
    given = {"add_generation_prompt": add_generation_prompt, **options}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
