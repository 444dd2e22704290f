"""A model in the diffusers layout, whose parts are read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTokenizer

from diffitm.core.errors import InputError
from diffitm.models.hub_weights import choose_variant
from diffitm.models.model_index import INDEX
from diffitm.models.parts import read_json, read_tokenizer
from diffitm.models.sides import Side, empty_part, is_loaded

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)
FLAT = 4  # dimensions of weights that can lie channels last; a video's have one more


def layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How convolutions' weights lie in memory: as tensor cores take them, channels last, where those are
    used. It changes nothing but the rounding, and in float32, without TF32, gains nothing."""
    is_tensor_core = device.type == "cuda" and dtype in HALF
    return torch.channels_last if is_tensor_core else torch.contiguous_format


@dataclass(frozen=True)
class Folder:
    """A local folder or a Hub id with a commit (`revision`), whose parts are read frozen and in eval mode.

    Every method raises OSError if it cannot read its part.
    """

    location: str
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    revision: str | None = None
    variant: str | None = None
    side: Side = "whole"  # the parts of the other have no weights
    configs: dict[str, Any] = field(default_factory=dict)  # of the parts that were read, by name

    def index(self) -> dict[str, Any]:
        """model_index.json."""
        if self._is_here:
            return read_json(Path(self.location, INDEX))
        return dict(DiffusionPipeline.load_config(self.location, revision=self.revision))

    @property
    def _is_here(self) -> bool:
        return Path(self.location).is_dir()

    def variant_of(self, part: str) -> str | None:
        """The variant of the weights that are read of a part: some folders have one of some parts only."""
        if not self._is_here:
            return self.variant
        names = [f"{part}/{path.name}" for path in sorted(Path(self.location, part).glob("*"))]
        try:
            return choose_variant(names, part, self.variant)
        except InputError as error:
            raise OSError(error.message) from error

    def model(self, kind: Any, part: str, dtype: torch.dtype | None = None) -> Any:
        """A model of diffusers, in another dtype than the others if one is given.

        Its attention is torch's scaled_dot_product_attention, which adds products of queries and keys up in
        float32 and never holds them in fp16. So `upcast_attention` in the config of Stable Diffusion 2, whose
        products overflow there, is met without a step of its own.
        """
        dtype = dtype or self.dtype
        if not is_loaded(part, self.side):
            there = {"subfolder": part, "revision": self.revision}
            return self._empty(kind, part, kind.load_config(self.location, **there))
        loaded = kind.from_pretrained(
            self.location,
            subfolder=part,
            revision=self.revision,
            torch_dtype=dtype,
            variant=self.variant_of(part),
        )
        self.configs[part] = loaded.config
        is_flat = all(weight.dim() <= FLAT for weight in loaded.parameters())
        laid = layout(self.device, dtype) if is_flat else torch.contiguous_format
        return loaded.to(self.device, memory_format=laid).eval().requires_grad_(False)

    def has(self, part: str) -> bool:
        """Whether model_index.json names a part, and not null."""
        return bool((self.index().get(part) or [None])[0])

    def vae(self, upcast: bool = False) -> Any:
        """The VAE: in float32 where its config says `force_upcast`, as it would overflow in fp16, else in
        the dtype of the others; `upcast` is what a config means that does not say it."""
        config = AutoencoderKL.load_config(self.location, subfolder="vae", revision=self.revision)
        upcast = bool(config.get("force_upcast", upcast))
        return self.model(AutoencoderKL, "vae", torch.float32 if upcast else None)

    def text_encoder(self, kind: Any, part: str) -> Any:
        """A text model of transformers."""
        if not is_loaded(part, self.side):
            given, _ = kind.config_class.get_config_dict(
                self.location, subfolder=part, revision=self.revision
            )
            return self._empty(kind, part, given)
        loaded, report = kind.from_pretrained(
            self.location,
            subfolder=part,
            revision=self.revision,
            dtype=self.dtype,
            variant=self.variant_of(part),
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):  # transformers would make them up
            raise OSError(f"the weights of {part} lack {', '.join(missing[:5])}")
        self.configs[part] = loaded.config
        return loaded.to(self.device).eval().requires_grad_(False)

    def _empty(self, kind: Any, part: str, settings: Mapping[str, Any]) -> Any:
        """What stands for a part of the other side."""
        made = empty_part(kind, settings)
        self.configs[part] = made.config
        return made.eval().requires_grad_(False)

    def tokenizer(self, part: str, encoder: Any, kind: Any = CLIPTokenizer) -> Any:
        """The tokenizer of a text encoder, which it has to fit."""
        return read_tokenizer(self.location, part, self.revision, encoder.config.to_dict(), kind)
