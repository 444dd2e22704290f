"""The update step of SDS-CLIP: a frozen diffusion model's error beside CLIP's own contrastive loss.

Basu et al. 2023, Augmenting CLIP with Improved Visio-Linguistic Reasoning (arXiv 2307.09233), whose code is
not public; where the paper leaves a choice, docs/diva.md says which was made. The loop is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from diffitm.core.errors import InputError
from diffitm.models.clip_tokens import image_side
from diffitm.models.denoiser import Denoiser
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES, TextCache
from diffitm.training.diva.step import CLIP_SCALE, PROJECTION, normalisation
from diffitm.training.sampler import draw_noise

NORM = "norm."  # of trained weights, before the CLIP's own name of each
INITIAL = 0.02  # deviation of the projection's first weights
TEXT_BATCH = 64


class SdsClip:
    """CLIP's norms with a linear projection of its image embedding into the teacher's latents, both trained
    in float32; all else stays as it is.

    `weight` is lambda, the denoising error's beside the contrastive loss. Without `jacobian` the
    gradient passes the teacher's network by, as in score distillation. Raises InputError if the parts
    do not fit.
    """

    def __init__(
        self,
        clip: Any,
        tokenizer: Callable[[list[str]], Tensor],
        teacher: Denoiser,
        weight: float,
        jacobian: bool = True,
        seed: int = 0,
        checkpointing: bool = False,
    ) -> None:
        clip.to(teacher.device).eval().requires_grad_(False)
        self.clip = clip
        self.tokenizer, self.teacher = tokenizer, teacher
        self.weight, self.jacobian = weight, jacobian
        self.norms = norms_of(clip)
        for parameter in self.norms.values():
            parameter.requires_grad_(True)
        self.normal = normalisation(self.clip.visual, teacher.device)
        self.side = image_side(self.clip.visual)
        self.autocast = teacher.dtype != torch.float32
        width = self._width()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = nn.Linear(width, math.prod(teacher.latent_shape))
            nn.init.normal_(self.projection.weight, std=INITIAL)
            nn.init.zeros_(self.projection.bias)
        self.projection.to(teacher.device)
        self.texts = TextCache(teacher.encode_texts, TEXT_CACHE_BYTES, TEXT_BATCH)
        if checkpointing:
            teacher.checkpoint_gradients()
            self.clip.set_grad_checkpointing()

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained of CLIP, and of the projection: nothing with a weight of 0."""
        return list(self.norms.values()), list(self.projection.parameters()) if self.weight else []

    def embed(self, pixels: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, W] of images, uint8 [B, 3, H, W] at CLIP's size, and of texts; neither is of
        unit length."""
        tokens = self.tokenizer(list(captions)).to(self.teacher.device)
        with torch.autocast(self.teacher.device.type, self.teacher.dtype, enabled=self.autocast):
            image = self.clip.encode_image(self._normalised(pixels), normalize=False)
            text = self.clip.encode_text(tokens, normalize=False)
        return image.float(), text.float()

    def contrast(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The contrastive loss of all embeddings [N, W] of an update, and its gradient with respect to
        each."""
        images, texts = (value.detach().requires_grad_() for value in (images, texts))
        scale = self.clip.logit_scale.detach().exp().to(images)
        loss = contrastive(images, texts, scale)
        by_image, by_text = torch.autograd.grad(loss, [images, texts])
        return loss.detach(), by_image, by_text

    def errors(self, images: Tensor, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Mean squared error [B] of the teacher's noise, of a flow model of its velocity, given z_t of the
        projected embeddings [B, W] with the timestep and noise of the seeds, and the captions."""
        schedule, device = self.teacher.schedule, self.teacher.device
        drawn = draw_noise(seeds, self.teacher.latent_shape, schedule)
        at, noise = drawn.timesteps.to(device), drawn.noise.to(device)
        latents = self.projection(images).view(-1, *self.teacher.latent_shape)
        noised = schedule.add_noise(latents, noise, at)
        with (
            torch.set_grad_enabled(self.jacobian and torch.is_grad_enabled()),
            torch.autocast(device.type, self.teacher.dtype, enabled=self.autocast),
        ):
            predicted = self.teacher.predict(noised, at, self.texts.repeated(captions))
        is_flow = schedule.prediction == "flow"
        if is_flow:
            wrong = predicted.float() - schedule.target(latents, noise, at)
        else:
            wrong = schedule.noise(noised, predicted.float(), at) - noise
        error = (wrong**2).flatten(1).mean(1)
        # The velocity's target has z0 in it: past the network the gradient by z0 is 2 wrong / (C h w).
        if self.jacobian or is_flow:
            return error
        # As if the network's Jacobian were the identity: d error / d z_t = 2 wrong / (C h w).
        past = 2 * (noised * wrong.detach()).flatten(1).mean(1)
        return error.detach() + past - past.detach()

    def weights(self) -> dict[str, Tensor]:
        """Norms and projection, by name."""
        parts = {f"{NORM}{name}": value for name, value in self.norms.items()}
        parts |= {f"{PROJECTION}{name}": p for name, p in self.projection.named_parameters()}
        return {name: value.detach().cpu().clone().contiguous() for name, value in parts.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights as weights() gives them. Raises InputError for those of another width."""
        taken, given = self.projection.weight.shape, weights[f"{PROJECTION}weight"].shape
        if taken != given:
            raise InputError(
                f": the projection takes embeddings of {given[1]} into latents of {given[0]}; here they "
                f"are {taken[1]} and {taken[0]}",
                "clip",
            )
        load_norms(self.clip, weights)
        own = {k.removeprefix(PROJECTION): v for k, v in weights.items() if not k.startswith(NORM)}
        self.projection.load_state_dict(own)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = self.normal
        return (pixels.to(self.teacher.device).float() / CLIP_SCALE - mean) / std

    @torch.no_grad()
    def _width(self) -> int:
        """Of an embedding. Raises InputError if it is not that of texts."""
        pixels = torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)
        image, text = self.embed(pixels, ["a"])
        if image.shape != text.shape:
            raise InputError(
                f": its images have embeddings of {image.shape[1]}, its texts of {text.shape[1]}",
                "clip",
            )
        return image.shape[1]


def norms_of(clip: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all layer norms of both towers and of a ResNet's batch norms, by name.

    Raises InputError for a CLIP whose image tower has none.
    """
    found = {
        f"{name}.{part}": parameter
        for name, module in clip.named_modules()
        if isinstance(module, nn.LayerNorm | _BatchNorm)
        for part, parameter in module.named_parameters(recurse=False)
    }
    if not any(name.startswith("visual.") for name in found):
        raise InputError(": its image tower has no layer norms to train", "clip")
    return found


def load_norms(clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put trained norms into the CLIP that they were trained from."""
    norms = norms_of(clip)
    with torch.no_grad():
        for name, value in weights.items():
            if name.startswith(NORM):
                norms[name.removeprefix(NORM)].copy_(value)


def contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE of embeddings [N, W], of each image with its own text."""
    logits = scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T
    own = torch.arange(len(images), device=images.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
