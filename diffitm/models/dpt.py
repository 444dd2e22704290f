"""DPT's adapter: from one feature map of the U-Net to queries that are compared with a text.

Qu et al. 2024, Discriminative Probing and Tuning for Text-to-Image Generation. The layers are DETR's
(Carion et al. 2020), whose position is added to queries and keys but not to values.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from diffitm.core.errors import InputError
from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.dpt_file import AdapterFile, AdapterShape, check_fits
from diffitm.models.dpt_grounding import WIDTH, Boxes, Grounding
from diffitm.models.lora import lora_unet
from diffitm.models.stable_diffusion import StableDiffusion

QUERIES = 10
HEADS, HIDDEN, DROPOUT = 8, 2048, 0.1
TIME_HIDDEN = 1024
TEMPERATURE = 0.07  # of the logits at first
FREQUENCIES, EPSILON = 10_000, 1e-6  # of DETR's positions
BLOCKS = {"bottom": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # of a U-Net of diffusers
Encode = Callable[[Sequence[str]], Condition]


class DptAdapter(nn.Module):
    """Queries that read a feature map, and a head that compares them with a text; float32.

    A shape with grounding brings a hundred queries more and the heads of their boxes. As published all
    queries are one sequence; but since the decoder's one layer begins with targets of zero, none learns of
    another in it, dropout aside, so each question asks its own queries alone. All that is drawn is a
    function of the seed.
    """

    def __init__(self, shape: AdapterShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input_proj = nn.Conv2d(shape.channels, WIDTH, 1)
            self.time_freqs = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.time_embedding = TimestepEmbedding(WIDTH, TIME_HIDDEN, out_dim=WIDTH)
            self.encoder, self.decoder = EncoderLayer(), DecoderLayer()
            self.norm = nn.LayerNorm(WIDTH)
            self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
            self.head = nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, shape.clip_dim)
            )
            for layer in (self.encoder, self.decoder):
                for parameter in layer.parameters():
                    if parameter.dim() > 1:
                        nn.init.xavier_uniform_(parameter)
            self.grounding = Grounding(shape.clip_dim) if shape.grounding else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))

    def forward(self, maps: Tensor, timesteps: Tensor) -> Tensor:
        """The matching queries [B, Q, clip_dim] of maps float32 [B, C, h, w] at timesteps [B]."""
        found: Tensor = self.head(self._read(maps, timesteps, self.queries))
        return found

    def find(self, maps: Tensor, timesteps: Tensor) -> Boxes:
        """The boxes in maps float32 [B, C, h, w] at timesteps [B], of an adapter with grounding."""
        assert self.grounding is not None, "the caller knows the shape"
        found: Boxes = self.grounding(self._read(maps, timesteps, self.grounding.queries))
        return found

    def _read(self, maps: Tensor, timesteps: Tensor, queries: Tensor) -> Tensor:
        """What queries [Q, WIDTH] have read of maps, [B, Q, WIDTH]."""
        memory = self.input_proj(maps).flatten(2).transpose(1, 2)
        time = self.time_embedding(self.time_freqs(timesteps.to(maps.device)))
        places = positions(*maps.shape[2:]).to(maps.device) + time[:, None]
        memory = self.encoder(memory, places)
        queries = queries.expand(len(maps), -1, -1)
        found: Tensor = self.norm(self.decoder(memory, places, queries))
        return found

    def score(self, maps: Tensor, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """s(z_t, t, y) = max_i cos(q_i(z_t, t, y), p(y)), [B], of maps [B, C, h, w], timesteps [B] and pooled
        texts float32 [B, clip_dim]."""
        cosines = cosine_similarity(self(maps, timesteps), pooled[:, None], dim=-1)
        return cosines.max(1).values


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers, each normalised after its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = _attention(), _linear()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, values: Tensor, places: Tensor) -> Tensor:
        """Values and their positions, [B, N, W] each."""
        keys = values + places
        found, _ = self.attention(keys, keys, values, need_weights=False)
        values = self.norm1(values + self.dropout(found))
        out: Tensor = self.norm2(values + self.dropout(self.linear(values)))
        return out


class DecoderLayer(nn.Module):
    """Self-attention of the targets, which begin as zeros, then attention to what was encoded, then two
    linear layers; each normalised after its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.among, self.to_memory, self.linear = _attention(), _attention(), _linear()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, memory: Tensor, places: Tensor, queries: Tensor) -> Tensor:
        """Memory and its positions [B, N, W], the queries' own positions [B, Q, W]."""
        targets = torch.zeros_like(queries)
        keys = targets + queries
        found, _ = self.among(keys, keys, targets, need_weights=False)
        targets = self.norm1(targets + self.dropout(found))
        found, _ = self.to_memory(targets + queries, memory + places, memory, need_weights=False)
        targets = self.norm2(targets + self.dropout(found))
        out: Tensor = self.norm3(targets + self.dropout(self.linear(targets)))
        return out


def _attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, DROPOUT, batch_first=True)


def _linear() -> nn.Sequential:
    first, last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(DROPOUT), last)


def positions(height: int, width: int) -> Tensor:
    """DETR's sine embedding of each place of a map, row by row, [h w, WIDTH]; the first half is of rows."""
    half = WIDTH // 2
    rates = FREQUENCIES ** (2 * (torch.arange(half) // 2) / half)

    def along(count: int) -> Tensor:
        whole = torch.arange(1, count + 1) / (count + EPSILON) * 2 * math.pi
        angles = whole[:, None] / rates
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)

    rows = along(height)[:, None].expand(height, width, half)
    columns = along(width)[None].expand(height, width, half)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class _Reached(Exception):  # noqa: N818, it is no error
    """Ends a forward of a U-Net whose map is there."""


class MapReader:
    """Reads a map, by DPT's name for it, of a Stable Diffusion's U-Net."""

    def __init__(self, denoiser: Denoiser, name: str) -> None:
        self.denoiser, kind = denoiser, name.rstrip(string.digits)
        path = ".".join(filter(None, (BLOCKS[kind], name.removeprefix(kind))))
        self.block = lora_unet(denoiser).get_submodule(path)

    def __call__(
        self, noised: Tensor, timesteps: Tensor, condition: Condition, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The map float32 [B, C, h, w] of noised latents [B, ..] at timesteps [B]; with `whole` the
        prediction, too, else the forward ends at the map."""
        found: list[Tensor] = []

        def keep(block: nn.Module, given: object, made: Tensor | tuple[Tensor, ...]) -> None:
            found.append(made[0] if isinstance(made, tuple) else made)
            if not whole:
                raise _Reached

        predicted, handle = None, self.block.register_forward_hook(keep)
        try:
            predicted = self.denoiser.predict(noised, timesteps, condition)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0].float(), predicted


def load_adapter(file: AdapterFile, denoiser: Denoiser, field: str) -> DptAdapter:
    """An adapter on the model's device. Raises InputError if it is not for the model."""
    check_fits(file.shape, settings_of(denoiser, field), file.name, field)
    adapter = DptAdapter(file.shape)
    restore(adapter, file.read(), file.name, field)
    return adapter.to(denoiser.device).eval()


def restore(adapter: DptAdapter, tensors: Mapping[str, Tensor], name: str, field: str) -> None:
    """Put tensors into an adapter. Raises InputError if they are not its own."""
    try:
        adapter.load_state_dict(dict(tensors))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"{name!r}: holds other tensors than an adapter's: {text}", field
        ) from error


def settings_of(denoiser: Denoiser, field: str) -> Mapping[str, object]:
    """The settings of a model's U-Net. Raises InputError for a model that DPT does not fit."""
    if not isinstance(denoiser, StableDiffusion):
        kind = type(denoiser).__name__
        raise InputError(f": DPT is of Stable Diffusion 1.x and 2.x, not of a {kind}", field)
    settings: Mapping[str, object] = denoiser.unet.config
    return settings


def with_pooled(denoiser: Denoiser, encode: Encode, texts: Sequence[str]) -> Condition:
    """The condition of texts with "pooled" [B, D]: the text encoder's output at each text's end, after its
    last norm and without a projection."""
    assert isinstance(denoiser, StableDiffusion), "settings_of has refused others"
    found = encode(texts)
    ends = denoiser.text_ends(texts).to(found["hidden"].device)
    return found | {"pooled": found["hidden"][torch.arange(len(ends)), ends]}
