"""CLIP through open_clip: the baseline that fills the same store with one cosine a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from diffitm.errors import InputError, suggest
from diffitm.matching.cache import TextCache
from diffitm.models.load import SHAPES, content_digest, from_hub
from diffitm.scoring import TEXT_CACHE_BYTES, Work, load_images, similarity_lines

# What open_clip lets through for a name, a config or a file that it cannot use.
WEIGHTS = (".safetensors", ".bin", ".pth")
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class ClipSource:
    """A model for open_clip: its name (or 'local-dir:' or 'hf-hub:' form), its pretrained tag or file."""

    name: str
    model: str
    pretrained: str | None
    digest: str
    quick_gelu: bool = False  # OpenAI's weights want it, and a model's name alone does not say so


def resolve_clip(name: str) -> ClipSource:
    """Find a CLIP by name: 'shapes', 'ViT-L-14:openai', 'ViT-L-14:checkpoint.pt', a folder with
    open_clip_config.json, or 'hf-hub:org/name'. Loads no weights.

    Raises InputError with the nearest known model or tag.
    """
    folder = SHAPES / "clip" if name == "shapes" else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"--clip {name!r}: the folder has no open_clip_config.json")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not any(path.suffix in WEIGHTS for path in files):
            raise InputError(f"--clip {name!r}: the folder has no weights ({', '.join(WEIGHTS)})")
        # 'shapes' is found again on every machine; other folders are used where they are.
        where = "shapes" if name == "shapes" else f"local-dir:{folder.absolute()}"
        return ClipSource(name, where, None, content_digest(files))
    if name.startswith("hf-hub:"):
        config = from_hub(name.removeprefix("hf-hub:"), "open_clip_config.json", "--clip")
        return ClipSource(name, name, None, f"{name}@{config.parent.name}")
    model, _, tag = name.partition(":")
    if model not in open_clip.list_models():
        raise InputError(f"--clip {name!r}: unknown model{suggest(model, open_clip.list_models())}")
    if Path(tag).expanduser().is_file():
        file = Path(tag).expanduser().absolute()
        return ClipSource(name, model, str(file), f"{model}:{content_digest([file])}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise InputError(f"--clip {name!r}: {tag!r} is no file and no tag{suggest(tag, tags)}")
    quick_gelu = bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    return ClipSource(name, model, tag, f"{model}:{tag}", quick_gelu)


class ClipScorer:
    """Cosine similarity of image and text; every image and text encoded once.

    Raises InputError if the weights cannot be loaded.
    """

    def __init__(
        self,
        source: ClipSource,
        root: str,
        device: str = "cpu",
        batch_size: int = 64,
        text_cache_bytes: int = TEXT_CACHE_BYTES,
    ) -> None:
        self.root, self.device, self.batch_size = root, torch.device(device), batch_size
        self.cost = 1
        model = f"local-dir:{SHAPES / 'clip'}" if source.model == "shapes" else source.model
        try:
            # Unlike create_model_and_transforms, this refuses to go on with random weights.
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                model,
                pretrained=source.pretrained,
                device=self.device,
                force_quick_gelu=source.quick_gelu,
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except _UNREADABLE as error:
            raise InputError(f"--clip {source.name!r} cannot be loaded: {error}") from error
        self.model.eval()
        self.texts = TextCache(self.encode_texts, text_cache_bytes, batch_size)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Unit text embeddings, [B, W]."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return {"embedding": normalize(self.model.encode_text(tokens).float(), dim=-1)}

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings [B, W] of preprocessed pixels [B, 3, H, W]."""
        return normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    def measure_rate(self) -> float:
        """See scoring.Scorer: one cosine a pair costs nothing."""
        return 0.0

    def score(self, rows: Sequence[Work]) -> list[dict[str, Any]]:
        """See scoring.Scorer."""
        loaded = load_images(rows, self.root, self.preprocess)
        pixels = [item.value for item in loaded if item.failure is None]
        chunks = range(0, len(pixels), self.batch_size)
        stacked = (torch.stack(pixels[i : i + self.batch_size]) for i in chunks)
        embedded = iter([row for chunk in stacked for row in self.encode_images(chunk)])
        similarities: list[np.ndarray | None] = []
        for row, item in zip(rows, loaded, strict=True):
            if item.failure is not None:
                similarities.append(None)
                continue
            texts = self.texts(row.texts)["embedding"]
            similarities.append((texts @ next(embedded)).cpu().numpy())
        return similarity_lines(rows, loaded, similarities)
