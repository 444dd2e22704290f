"""Tiny models built from configs, and rows of the tables, so that tests download nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffitm.core import storage
from diffitm.core.schema import SCORES, WORK, PairRow, block_rows
from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.noise_schedule import NoiseSchedule
from diffitm.store.blocks import block
from diffitm.store.score_store import Store
from tools.shapes.architecture import LENGTH, write_tokenizer

WIDTH = 32
POOLED = 24
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sdxl_added(pooled: int = POOLED) -> dict[str, Any]:
    """What an SDXL's U-Net has beside a Stable Diffusion's."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + pooled,
    }


def unet(**other: Any) -> UNet2DConditionModel:
    """A U-Net for latents [4, 8, 8] with one attention block on each level."""
    options: dict[str, Any] = dict(
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
    return UNet2DConditionModel(**options | other)


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


def text_config(
    tokenizer: CLIPTokenizer, width: int = WIDTH, pooled: int = POOLED
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=pooled,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_sd(
    folder: Path, prediction: str = "epsilon", seed: int = 0, variant: str | None = None
) -> Path:
    """Save a random Stable Diffusion; `variant` 'fp16' names the files so and halves them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer")
        encoder = text_config(tokenizer)
        parts = {"unet": unet(), "vae": vae(), "text_encoder": CLIPTextModel(encoder)}
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction)
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


def write_sdxl(
    folder: Path, seed: int = 0, zeros: bool = True, second: tuple[int, int] = (WIDTH, POOLED)
) -> Path:
    """Save a random Stable Diffusion XL, with the published scheduler; `zeros` for the empty text; `second`
    are the widths of the second text encoder and of its pooled output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = [write_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        pipeline = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tokenizers[0])),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizers[1], *second)),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet(
                cross_attention_dim=WIDTH + second[0],
                **sdxl_added(second[1]),
            ),
            scheduler=EulerDiscreteScheduler(**BETAS),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


LABELS = ("tench, Tinca tinca", "cat", "tiger cat", "white shark", "crane", "crane", "tiger")


def write_dit(folder: Path, labels: Sequence[str] = LABELS, seed: int = 0) -> Path:
    """Save a random DiT with a class for each of `labels`, 'label one, label two'."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=len(labels),
        )
        pipeline = DiTPipeline(transformer, vae(), DDIMScheduler())
    first, *others = (b.norm1.emb.class_embedder for b in transformer.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    pipeline.save_pretrained(folder)
    write_index(folder, id2label={str(i): names for i, names in enumerate(labels)})
    return folder


def gradients(model: Denoiser, condition: Condition) -> tuple[Condition, int]:
    """The gradient of a sum of squared predictions in each part of a condition [2, ...], and the bytes
    that the graph kept for it."""
    generator = torch.Generator().manual_seed(4)
    noised = torch.randn(2, *model.latent_shape, generator=generator)
    leaves = {name: value.clone().requires_grad_() for name, value in condition.items()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (model.predict(noised, torch.tensor([100, 700]), leaves) ** 2).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True)), kept


def write_index(folder: Path, **changed: Any) -> None:
    """Change settings of a folder's model_index.json."""
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


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

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :1].repeat(1, 3, 1, 1).clamp(-1, 1)

    def checkpoint_gradients(self) -> None:
        pass


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


def read_images(work: str) -> list[PairRow]:
    """All images of a work table with their texts, as one block."""
    pairs = parquet.read_table(work, schema=WORK)
    return block_rows(block(0, pairs).to_pylist()[0])
