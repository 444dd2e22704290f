"""The contract between a diffusion model and everything that uses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from diffitm.core.errors import InputError
from diffitm.models.noise_schedule import NoiseSchedule, Schedule

# What the model is conditioned on, by name; every tensor is [B, ...]. Stable Diffusion needs
# {"hidden": [B, L, D]}; a model with pooled text adds its own. A model that looks away from padding adds
# "mask", bool [B, L], of the tokens that are a text's: the others can be left out or added at will.
Condition = dict[str, Tensor]
Encode = Callable[[Sequence[str]], Condition]


class Denoiser(ABC):
    """A latent diffusion model, frozen and in eval mode.

    Subclasses set the attributes and the abstract methods. Latents are float32 [B, C, h, w], shifted and
    scaled as the model was trained on them.
    """

    # Tokenizer -> tokens that are read of a text, where that is not what the tokenizer's settings say. Texts
    # are read as far as the longest of them reaches.
    lengths: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def lengths_of(cls, network: Mapping[str, Any]) -> Mapping[str, int]:
        """`lengths` of a network of these settings (its config.json)."""
        return cls.lengths

    @staticmethod
    def plain_text(text: str) -> str:
        """A text as the network was trained to see it, such as in lower case."""
        return text

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """What a tokenizer is given of a text: the plain one, with a language model's template around it
        where there is one, which `lengths` count, too."""
        return cls.plain_text(text)

    @classmethod
    def around_texts(cls) -> str:
        """What the installed diffusers, and no file of the model, says to put around texts."""
        return ""

    takes_lora: ClassVar[bool] = True

    # Tokens of a condition that the network has places for; None where it takes any number.
    places: int | None = None
    resolution: int  # side of the input image in pixels
    latent_shape: tuple[int, int, int]  # C, h, w
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype

    @classmethod  # noqa: B027, most have nothing to check
    def check_part(cls, name: str, config: Any) -> None:
        """Raises OSError where a part of these settings is none that the model can be had with."""

    @classmethod  # noqa: B027
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """Raises OSError where parts, of which these are the settings by name, are not of one model."""

    @abstractmethod
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [B, 3, H, W] in [-1, 1] to mean and deviation of their latents, [B, C, h, w]. Of an
        autoencoder without a posterior the deviation is 0."""

    def encode_images(self, pixels: Tensor, seed: int | None = None) -> Tensor:
        """Pixels float32 [B, 3, H, W] in [-1, 1] to latents: the posterior's mean.

        With a seed, one sample of the posterior instead, with the same noise for every image.
        """
        mean, deviation = self.encode_posterior(pixels)
        if seed is None:
            return mean
        generator = torch.Generator().manual_seed(seed)
        return mean + deviation * torch.randn(mean.shape[1:], generator=generator).to(mean)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pixels float32 [B, 3, H, W], cut to [-1, 1]; without gradient."""

    def take_prediction(self, prediction: str) -> None:
        """Read the network's output as this (one of noise_schedule.PREDICTIONS), whatever its folder
        says."""
        if isinstance(self.schedule, NoiseSchedule):
            self.schedule = replace(self.schedule, prediction=prediction)

    def take_resolution(self, side: int) -> None:
        """Take images of `side` pixels from now on.

        Raises InputError for a side, or a kind of model, that cannot.
        """
        raise InputError(
            f"{side}: {type(self).__name__} takes images of {self.resolution} pixels alone",
            "resolution",
        )

    def refuses(self, text: str) -> str | None:
        """Why a text cannot be a condition of this model; None if it can, as every text here."""
        return None

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than the model reads, so that encode_texts leaves its end out."""
        return False

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """The condition of each text; '' is the unconditional one.

        Raises ValueError for a text that the model refuses.
        """

    @abstractmethod
    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """What the schedule calls the prediction, float32 [B, C, h, w], whatever sign, scale and channels
        the network's output has, for noised latents, timesteps [B], condition [B].

        Gradients reach the noised latents and the condition.
        """

    @abstractmethod
    def checkpoint_gradients(self) -> None:
        """From now on recompute activations in the backward pass of predict: less memory, more time."""

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """An image of the prompt for each seed, which alone determines its noise.

        Raises InputError for a kind of model that generates none here.
        """
        raise InputError(f": {type(self).__name__} generates no images", "prompts")


def select(condition: Condition, index: Tensor) -> Condition:
    """Rows `index` [B] of a condition."""
    return {name: value[index.to(value.device)] for name, value in condition.items()}


def encode_with_zeros(encode: Encode, texts: Sequence[str]) -> Condition:
    """As `encode` has them, but '' is zeros: what some were trained with where a text was dropped."""
    empty, condition = torch.tensor([not text for text in texts]), encode(texts)

    def zeros(value: Tensor) -> Tensor:
        rows = empty.to(value.device).view(-1, *(1,) * (value.dim() - 1))
        return value.masked_fill(rows, 0) if value.is_floating_point() else value  # a mask stays

    return {name: zeros(value) for name, value in condition.items()}


def rows_of(condition: Condition) -> list[Condition]:
    """Each row as a condition [1, ...] of its own memory; of a masked one without its padding."""
    rows = [
        {k: value[i : i + 1] for k, value in condition.items()} for i in range(_count(condition))
    ]
    if "mask" in condition:
        rows = [_without_padding(row) for row in rows]
    return [{name: value.clone() for name, value in row.items()} for row in rows]


def stack(rows: Sequence[Condition]) -> Condition:
    """One condition of many; masked ones are padded to the longest."""
    if "mask" in rows[0]:
        longest = max(row["mask"].shape[1] for row in rows)
        rows = [padded(row, longest) for row in rows]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def padded(condition: Condition, length: int) -> Condition:
    """A masked condition with `length` tokens."""
    more = length - condition["mask"].shape[1]
    added = {"mask": (0, more), "hidden": (0, 0, 0, more)}
    return condition | {name: pad(condition[name], by) for name, by in added.items()}


def _without_padding(row: Condition) -> Condition:
    kept = row["mask"][0]
    return row | {name: row[name][:, kept] for name in ("mask", "hidden")}


def _count(condition: Condition) -> int:
    return len(next(iter(condition.values())))
