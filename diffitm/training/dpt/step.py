"""The update step of DPT: matching by an adapter's queries, boxes of phrases where there are any, and of its
second stage the denoising error.

Qu et al. 2024, Discriminative Probing and Tuning for Text-to-Image Generation. The loop is the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.dpt import DptAdapter, Encode, MapReader, with_pooled
from diffitm.models.dpt_grounding import Boxes
from diffitm.models.lora import add_lora, lora_unet, lora_weights, restore_adapter
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.text_cache import TextCache
from diffitm.training.dpt.expressions import Expression, GroundingWeights
from diffitm.training.dpt.grounding import (
    GroundingLosses,
    Target,
    grounding_losses,
    target_of,
)
from diffitm.training.dpt.weights import ADAPTER, divided
from diffitm.training.lora.step import TEXT_BATCH, TEXT_CACHE_BYTES, Posterior
from diffitm.training.sampler import Item, draw_noise, seed_of

TEXTS, IMAGES = [0, 1, 2], [0, 3, 4]  # of the five pairs, those that differ in text, and in image


@dataclass(frozen=True)
class Matching:
    """Of a micro-batch: the loss with its graph, and for the log the two matching losses, the shares of right
    texts and images, the right pairs' denoising error (None in a probe) and the losses of boxes (None
    where no image has an expression)."""

    loss: Tensor
    of_texts: Tensor
    of_images: Tensor
    right_texts: Tensor
    right_images: Tensor
    error: Tensor | None
    grounding: GroundingLosses | None


class Dpt:
    """A frozen denoiser, an adapter and, with a `rank`, a LoRA on the denoiser.

    `parameters` are what is trained, float32; the adapter is, unless `trains_adapter` is False, and without
    `grounding`, the weights of its losses, what it has of boxes is not. With a LoRA
    in a dtype of 16 bits the U-Net's forward runs under autocast; adapter and losses are in float32.
    `encode_texts` stands in for the denoiser's own where texts were encoded beforehand.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: DptAdapter,
        rank: int | None = None,
        seed: int = 0,
        trains_adapter: bool = True,
        checkpointing: bool = False,
        encode_texts: Encode | None = None,
        grounding: GroundingWeights | None = None,
    ) -> None:
        self.denoiser, self.unet = denoiser, lora_unet(denoiser)
        self.adapter = adapter.to(denoiser.device).requires_grad_(trains_adapter)
        self.grounding = grounding
        if adapter.grounding is not None and grounding is None:
            adapter.grounding.requires_grad_(False)
        self.reader = MapReader(denoiser, adapter.shape.map)
        self.tunes = rank is not None
        self.parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        if rank is not None:
            self.parameters += add_lora(self.unet, rank, seed)
            if checkpointing:
                denoiser.checkpoint_gradients()
        encode = partial(with_pooled, denoiser, encode_texts or denoiser.encode_texts)
        self.texts = TextCache(encode, TEXT_CACHE_BYTES, TEXT_BATCH)
        self.autocast = self.tunes and denoiser.dtype != torch.float32

    def losses(
        self,
        items: Sequence[Item],
        right: Posterior,
        hard: Posterior,
        random: Posterior,
        expressions: Sequence[Expression | None] = (),
    ) -> Matching:
        """Of items with negatives of every kind, and the latents of their own images, the hard and the random
        ones; `expressions` are the items' own, None of an image that has none.

        The five pairs of an example share its timestep, its noise and the posterior's noise, and so does its
        image with its expression. Each text conditions the U-Net and is what its queries are compared with.
        """
        pairs, size = self._pairs(items, right, hard, random), len(items)
        said = {i: one for i, one in enumerate(expressions) if one is not None}
        if said:
            pairs = pairs.joined(self._said(pairs, said))
        if self.tunes:
            first, predicted = self._read(pairs.part(0, size), whole=True)
            others, _ = self._read(pairs.part(size, None), whole=False)
            maps = torch.cat([first, others])
        else:
            maps, predicted = self._read(pairs, whole=False)
        pooled = pairs.condition["pooled"][: 5 * size].float()
        self.adapter.train()
        with drawn_from(self.denoiser.device, seed_of("dropout", *(item.seed for item in items))):
            scores = self.adapter.score(maps[: 5 * size], pairs.at[: 5 * size], pooled)
            logits = self.adapter.logit_scale.exp() * scores.view(5, size).T
            located = None
            if said:
                hidden = pairs.condition["hidden"][5 * size :].float()
                found = self.adapter.find(maps[5 * size :], pairs.at[5 * size :])
                located = self._located(found, hidden, list(said.values()))
        of_texts, of_images = _choice(logits[:, TEXTS]), _choice(logits[:, IMAGES])
        loss, error = of_texts + of_images, None
        if predicted is not None:
            target = self.denoiser.schedule.target(
                pairs.latents[:size], pairs.noise[:size], pairs.at[:size]
            )
            mse = ((predicted.float() - target) ** 2).mean()
            loss, error = loss + mse, mse.detach()
        if located is not None:
            loss = loss + located.total
        return Matching(
            loss,
            of_texts.detach(),
            of_images.detach(),
            _right(logits[:, TEXTS]),
            _right(logits[:, IMAGES]),
            error,
            located,
        )

    def _said(self, pairs: _Pairs, said: Mapping[int, Expression]) -> _Pairs:
        """The images at these places, each with its expression."""
        rows = torch.tensor(list(said), device=self.denoiser.device)
        texts = self.texts.repeated([one.caption for one in said.values()])
        return _Pairs(pairs.latents[rows], pairs.noise[rows], pairs.at[rows], texts)

    def _located(
        self, found: Boxes, hidden: Tensor, expressions: Sequence[Expression]
    ) -> GroundingLosses:
        """The losses of boxes that were found with the texts' states float32 [G, L, D]."""
        assert self.grounding is not None and self.adapter.grounding is not None
        targets = targets_of(self.denoiser, expressions)
        tokens = self.adapter.grounding.tokens(hidden)
        return grounding_losses(found, tokens, targets, self.grounding)

    def _pairs(
        self, items: Sequence[Item], right: Posterior, hard: Posterior, random: Posterior
    ) -> _Pairs:
        """(I, y), (I, y-), (I, y°), (I-, y), (I°, y) of every example, one kind after the other."""
        device, denoiser = self.denoiser.device, self.denoiser
        seeds = [item.seed for item in items]
        drawn = draw_noise(seeds, denoiser.latent_shape, denoiser.schedule)
        one, two, three = (
            p.mean.to(device) + p.std.to(device) * drawn.posterior.to(device)
            for p in (right, hard, random)
        )
        captions = [item.caption for item in items]
        texts = [
            *captions,
            *(item.negative_caption for item in items),
            *(item.random_caption for item in items),
            *captions * 2,
        ]
        return _Pairs(
            torch.cat([one, one, one, two, three]),
            drawn.noise.to(device).repeat(5, 1, 1, 1),
            drawn.timesteps.to(device).repeat(5),
            self.texts.repeated(texts),
        )

    def _read(self, pairs: _Pairs, whole: bool) -> tuple[Tensor, Tensor | None]:
        """Maps float32 [B, C, h, w] and, of whole forwards, the predictions [B, C, h, w]."""
        noised = self.denoiser.schedule.add_noise(pairs.latents, pairs.noise, pairs.at)
        kind, dtype = self.denoiser.device.type, self.denoiser.dtype
        with torch.set_grad_enabled(self.tunes), torch.autocast(kind, dtype, enabled=self.autocast):
            return self.reader(noised, pairs.at, pairs.condition, whole)

    def weights(self) -> dict[str, Tensor]:
        """The adapter's tensors and the LoRA's, on the CPU."""
        found = self.adapter.state_dict()
        own = {f"{ADAPTER}{k}": v.detach().cpu().clone() for k, v in found.items()}
        return own | (lora_weights(self.unet) if self.tunes else {})

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights as weights() gives them."""
        adapter, lora = divided(weights)
        self.adapter.load_state_dict(adapter)
        if self.tunes:
            restore_adapter(self.unet, lora)


@dataclass(frozen=True)
class _Pairs:
    """Latents and noise [B, C, h, w], timesteps [B], and the condition of each pair."""

    latents: Tensor
    noise: Tensor
    at: Tensor
    condition: Condition

    def part(self, start: int, end: int | None) -> _Pairs:
        """Some of them."""
        rows = slice(start, end)
        condition = {name: value[rows] for name, value in self.condition.items()}
        return _Pairs(self.latents[rows], self.noise[rows], self.at[rows], condition)

    def joined(self, other: _Pairs) -> _Pairs:
        """These and others."""
        mine, theirs = (self.latents, self.noise, self.at), (other.latents, other.noise, other.at)
        latents, noise, at = (torch.cat(both) for both in zip(mine, theirs, strict=True))
        condition = {k: torch.cat([v, other.condition[k]]) for k, v in self.condition.items()}
        return _Pairs(latents, noise, at, condition)


def targets_of(denoiser: Denoiser, expressions: Sequence[Expression]) -> list[Target]:
    """What queries are to find of expressions, by the tokens of the model's text encoder."""
    assert isinstance(denoiser, StableDiffusion), "settings_of has refused others"
    texts = [one.caption for one in expressions]
    places, ends = denoiser.text_places(texts), denoiser.text_ends(texts).tolist()
    return [
        target_of(one, place, end, denoiser.device)
        for one, place, end in zip(expressions, places, ends, strict=True)
    ]


@contextlib.contextmanager
def drawn_from(device: torch.device, seed: int) -> Iterator[None]:
    """What is drawn in the block, such as dropout, is a function of the seed; nothing else is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _choice(logits: Tensor) -> Tensor:
    """Cross entropy of the first of each row's candidates [B, 3]."""
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def _right(logits: Tensor) -> Tensor:
    """The share of rows whose first candidate is above the others."""
    return (logits[:, :1] > logits[:, 1:]).all(1).float().mean().detach()
