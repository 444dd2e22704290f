"""Tiny models built from configs, and rows of the tables, so that tests download nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffitm import storage
from diffitm.matching.schedule import NoiseSchedule
from diffitm.models.denoiser import Condition, Denoiser
from diffitm.schema import SCORES
from diffitm.shapes.architecture import LENGTH, write_tokenizer
from diffitm.store import Store

WIDTH = 32


def unet() -> UNet2DConditionModel:
    """A U-Net for latents [4, 8, 8] with one attention block on each level."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def vae() -> AutoencoderKL:
    """A VAE from 32 to 8 pixels a side."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.5,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def write_sd(
    folder: Path, prediction: str = "epsilon", seed: int = 0, variant: str | None = None
) -> Path:
    """Save a random Stable Diffusion; `variant` 'fp16' names the files so and halves them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer")
        parts = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder(tokenizer)}
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
    )
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if variant == "fp16":
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, variant=variant)
    return folder


class Fixed(Denoiser):
    """A denoiser that always predicts zero: its error is the target itself."""

    def __init__(self, schedule: NoiseSchedule, shape: tuple[int, int, int] = (2, 4, 4)) -> None:
        self.schedule, self.latent_shape, self.resolution = schedule, shape, shape[-1]
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.seen: list[Tensor] = []

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixels.mean(1, keepdim=True).repeat(1, self.latent_shape[0], 1, 1)
        return mean, torch.zeros_like(mean)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        return {"hidden": torch.tensor([[float(len(text))] for text in texts])}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.seen.append(noised)
        return torch.zeros_like(noised)


def schedule(prediction: str = "epsilon", total: int = 1000) -> NoiseSchedule:
    """Stable Diffusion's training schedule, written out."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, total, dtype=torch.float64) ** 2
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, 0), prediction)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    """A PNG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def score_row(image: str, text: str, l2: list[float] | None = None, **other: Any) -> dict[str, Any]:
    """A row of the score store for latents of 4 elements."""
    row: dict[str, Any] = dict.fromkeys(SCORES.names)
    row |= {"row": 0, "image": image, "text": text}
    if l2 is not None:
        row |= {"l2": l2, "elements": 4, "timesteps": list(range(len(l2)))}
    return row | other


def write_scores(store: Store, rows: list[dict[str, Any]], name: str = "part-0") -> None:
    """Append a file to the store."""
    found, path = storage.filesystem(store.uri)
    table = pa.Table.from_pylist(rows, SCORES)
    parquet.write_table(table, f"{path}/{name}.parquet", filesystem=found)
