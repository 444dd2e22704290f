"""The losses of the VAE, CLIP and the U-Net (train.py)."""

from __future__ import annotations

import numpy as np
import open_clip
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextModel, CLIPTokenizer

from tools.shapes import architecture as arch

MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeLoss(nn.Module):
    """Reconstruction (absolute and squared) with a light pull of the latents to a unit normal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.vae = arch.build_vae()

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(len(data["images"]), size=self.size)
        images = pixels(data["images"][chosen])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.vae.encode(images).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample
        wrong = decoded.float() - images
        return wrong.abs().mean() + 2 * wrong.square().mean() + 1e-5 * posterior.kl().mean()


class DiffusionLoss(nn.Module):
    """Noise prediction with a fixed text encoder; one caption in ten is dropped.

    An item weighs 1 / alphas_cumprod, at most `most`, which makes an error of the noise one of the velocity
    (Salimans and Ho 2022): things are so large that half of the noise does not hide where they stand, and at
    the noisy timesteps, where a text has to tell, errors of the noise hardly count.
    """

    timesteps = (-0.5, 1.0)  # of two draws in three, mean and deviation of the timestep's logit

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, size: int, most: float
    ) -> None:
        super().__init__()
        self.size, self.most = size, most
        self.text_encoder = text_encoder.requires_grad_(False)
        self.unet = arch.build_unet()
        empty = tokenizer("", padding="max_length", max_length=arch.LENGTH).input_ids
        self.empty = torch.tensor(empty)
        self.alphas_cumprod = arch.build_scheduler().alphas_cumprod

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        size = self.size
        chosen = rng.integers(len(data["latents"]), size=size)
        latents = torch.from_numpy(data["latents"][chosen])
        captions = rng.integers(data["tokens"].shape[1], size=size)
        tokens = torch.from_numpy(data["tokens"][chosen, captions]).long()
        tokens = torch.where(torch.from_numpy(rng.random(size) < 0.1)[:, None], self.empty, tokens)
        centred = 1 / (1 + np.exp(-rng.normal(*self.timesteps, size)))
        share = np.where(rng.random(size) < 0.65, centred, rng.random(size))
        timesteps = torch.from_numpy((share * 1000).astype(np.int64).clip(0, 999))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        kept = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noised = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        condition = self.text_encoder(tokens).last_hidden_state
        wrong = self.unet(noised, timesteps, condition).sample - noise
        return (wrong.square() * (1 / kept).clamp(max=self.most)).mean()


class ClipLoss(nn.Module):
    """The symmetric contrastive loss over one process's batch.

    Of the captions the share `halved` is half of their words in any order, the share `shuffled` all of
    them. So this CLIP learns, as real ones do, what there is and hardly who has what or stands where.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, size: int, halved: float, shuffled: float = 0.0
    ) -> None:
        super().__init__()
        self.size, self.halved, self.shuffled = size, halved, shuffled
        self.special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.clip = open_clip.CLIP(**arch.clip_config(tokenizer), output_dict=True)

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(len(data["images"]), size=self.size)
        images = ((pixels(data["images"][chosen]) + 1) / 2 - MEAN) / STD
        captions = rng.integers(data["tokens"].shape[1], size=len(chosen))
        tokens = data["tokens"][chosen, captions]
        kinds = rng.random(len(tokens))
        for row in np.flatnonzero(kinds < self.halved + self.shuffled):
            tokens[row] = self._bag(tokens[row], bool(kinds[row] < self.halved), rng)
        out = self.clip(images, torch.from_numpy(tokens).long())
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        target = torch.arange(len(chosen))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def _bag(self, tokens: np.ndarray, half: bool, rng: np.random.Generator) -> np.ndarray:
        """The words in any order, half of them or all."""
        pad, start, end = self.special
        words = rng.permutation(tokens[~np.isin(tokens, self.special)])
        if half:
            words = words[: (len(words) + 1) // 2]
        bag = np.full_like(tokens, pad)
        bag[: len(words) + 2] = [start, *words, end]
        return bag
