"""What diffusers' pipelines give their networks, and plain references of errors, written with their parts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline, Flux2Pipeline
from torch import Tensor

TEXTS = ["A red cube", "a small blue sphere, left of it", ""]


class Text(NamedTuple):
    """What a network is told: tokens [1, L, D], which of them count, [1, L], a pooled embedding [1, P]."""

    hidden: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None


class Reference:
    """A family as its pipeline has it; this one is of plain latents and timesteps of 1000 sigma."""

    # What the pipeline is asked so that it draws one square of the model's own size, unguided.
    asked: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}
    guided: ClassVar[dict[str, Any]] = {"guidance_scale": 4.0}  # and two, guided

    def given(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the pipeline takes them."""
        return latents

    def step(self, given: dict[str, Any]) -> Tensor:
        """Our timestep of what a network is given."""
        timestep: Tensor = given["timestep"]
        return timestep.reshape(-1)[:1]

    def network(self, pipe: Any, text: str, z: Tensor, step: Tensor) -> Tensor:
        """The prediction for a text, [1, C, h, w]."""
        return self.told(pipe, self.text(pipe, text), z, step)

    def text(self, pipe: Any, text: str) -> Text:
        """What the pipeline makes of a text."""
        raise NotImplementedError

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        """The prediction of a network that is told this, [1, C, h, w]."""
        raise NotImplementedError

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens [1, L, D] of the empty negative prompt, and its pooled embedding."""
        _, _, hidden, mask = pipe.encode_prompt(TEXTS[0], negative_prompt="", clean_caption=False)
        return hidden[:, mask[0].bool()], None

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        """What the VAE gives of pixels: its posterior's mean."""
        mean: Tensor = vae.encode(pixels).latent_dist.mean
        return mean

    def scaled(self, vae: Any, raw: Tensor) -> Tensor:
        """The network's latents of the VAE's."""
        return (raw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def noised(self, z0: Tensor, noise: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Noised latents, and what is to be predicted of them."""
        return (1 - step / 1000) * z0 + step / 1000 * noise, noise - z0

    def error(self, folder: Path, z0: Tensor, noise: Tensor, step: float) -> float:
        """|| target - network's answer || of one pair."""
        z, target = self.noised(z0, noise, step)
        with torch.no_grad():
            out = self.network(pipeline_of(folder), TEXTS[0], z, torch.tensor([step]))
        return float((target - out).norm())


class PixArt(Reference):
    asked = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}  # noqa: RUF012

    def text(self, pipe: Any, text: str) -> Text:
        return Text(*pipe.encode_prompt(text, False)[:2])

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        none = {"resolution": None, "aspect_ratio": None}
        out = pipe.transformer(
            z, encoder_hidden_states=text.hidden, encoder_attention_mask=text.mask, timestep=step,
            added_cond_kwargs=none,
        )  # fmt: skip
        first: Tensor = out.sample.chunk(2, 1)[0]
        return first

    def noised(self, z0: Tensor, noise: Tensor, step: float) -> tuple[Tensor, Tensor]:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        abar = torch.cumprod(1 - betas, 0)[int(step)].float()
        return abar.sqrt() * z0 + (1 - abar).sqrt() * noise, noise


class Sana(Reference):
    asked = {"guidance_scale": 1.0, "use_resolution_binning": False}  # noqa: RUF012

    def text(self, pipe: Any, text: str) -> Text:
        from diffitm.models.sana import instruction

        found = pipe.encode_prompt(text, False, complex_human_instruction=[instruction()])
        return Text(*found[:2])

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        out: Tensor = pipe.transformer(
            z, encoder_hidden_states=text.hidden, encoder_attention_mask=text.mask, timestep=step
        ).sample
        return out

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        latent: Tensor = vae.encode(pixels).latent
        return latent

    def scaled(self, vae: Any, raw: Tensor) -> Tensor:
        return raw * vae.config.scaling_factor


class Sd3(Reference):
    def text(self, pipe: Any, text: str) -> Text:
        hidden, _, pooled, _ = pipe.encode_prompt(
            text, None, None, do_classifier_free_guidance=False
        )
        return Text(hidden, pooled=pooled)

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        out: Tensor = pipe.transformer(
            z, encoder_hidden_states=text.hidden, pooled_projections=text.pooled, timestep=step
        ).sample
        return out

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        _, hidden, _, pooled = pipe.encode_prompt(TEXTS[0], None, None, negative_prompt="")
        return hidden, pooled


class Packed(Reference):
    """Of latents in tokens of 2 x 2 and timesteps of sigma."""

    def given(self, latents: Tensor) -> Tensor:
        b, c, h, w = latents.shape
        cells = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(b, h * w // 4, 4 * c)

    def step(self, given: dict[str, Any]) -> Tensor:
        return super().step(given) * 1000


class Flux(Packed):
    length, guidance = 512, (1.0,)

    def text(self, pipe: Any, text: str) -> Text:
        hidden, pooled, ids = pipe.encode_prompt(text, None, max_sequence_length=self.length)
        assert not ids.any()
        return Text(hidden, pooled=pooled)

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        hidden, _, pooled = self.text(pipe, "")
        return hidden, pooled

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        side = z.shape[-1]
        out = pipe.transformer(
            pipe._pack_latents(z, 1, z.shape[1], side, side), encoder_hidden_states=text.hidden,
            pooled_projections=text.pooled, timestep=step / 1000,
            txt_ids=torch.zeros(text.hidden.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32),
            guidance=torch.tensor(self.guidance) if self.guidance else None,
        ).sample  # fmt: skip
        found: Tensor = pipe._unpack_latents(out, side * 8, side * 8, 8)
        return found


class Schnell(Flux):
    length, guidance = 256, ()
    asked = {"guidance_scale": 1.0, "max_sequence_length": 256}  # noqa: RUF012


class QwenImage(Packed):
    asked = {"true_cfg_scale": 1.0}  # noqa: RUF012
    guided = {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}  # noqa: RUF012

    def text(self, pipe: Any, text: str) -> Text:
        return Text(*pipe.encode_prompt(text, max_sequence_length=512))

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        side = z.shape[-1]
        out = pipe.transformer(
            pipe._pack_latents(z, 1, z.shape[1], side, side), encoder_hidden_states=text.hidden,
            encoder_hidden_states_mask=text.mask, timestep=step / 1000,
            img_shapes=[[(1, side // 2, side // 2)]],
        ).sample  # fmt: skip
        found: Tensor = pipe._unpack_latents(out, side * 8, side * 8, 8)[:, :, 0]
        return found

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        return pipe.encode_prompt("")[0], None

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        mean: Tensor = vae.encode(pixels[:, :, None]).latent_dist.mode()
        return mean

    def scaled(self, vae: Any, raw: Tensor) -> Tensor:
        mean, deviation = (
            torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        return ((raw - mean) / deviation)[:, :, 0]


class Reversed(Reference):
    """Whose network is given 1 - sigma and gives z0 - eps."""

    def step(self, given: dict[str, Any]) -> Tensor:
        return 1000 * (1 - super().step(given))


class Lumina2(Reversed):
    def text(self, pipe: Any, text: str) -> Text:
        return Text(*pipe.encode_prompt(text, False)[:2])

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        out: Tensor = pipe.transformer(
            z, 1 - step / 1000, encoder_hidden_states=text.hidden, encoder_attention_mask=text.mask
        ).sample
        return -out

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        _, _, hidden, mask = pipe.encode_prompt(TEXTS[0])
        return hidden[:, mask[0].bool()], None


class ZImage(Reversed):
    asked = {"guidance_scale": 0.0}  # noqa: RUF012

    def step(self, given: dict[str, Any]) -> Tensor:
        return super().step({"timestep": given["t"]})

    def text(self, pipe: Any, text: str) -> Text:
        (hidden,), _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        return Text(hidden[None])

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        texts = [text.hidden[0]]
        out: Tensor = pipe.transformer([z[0].unsqueeze(1)], 1 - step / 1000, texts).sample[0]
        return -out.squeeze(1)[None]

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        return pipe.encode_prompt(TEXTS[0])[1][0][None], None


class Flux2(Reference):
    def step(self, given: dict[str, Any]) -> Tensor:
        return super().step(given) * 1000

    def text(self, pipe: Any, text: str) -> Text:
        return Text(pipe.encode_prompt(text)[0])

    def told(self, pipe: Any, text: Text, z: Tensor, step: Tensor) -> Tensor:
        places, ids = pipe._prepare_latent_ids(z), pipe._prepare_text_ids(text.hidden)
        guidance = torch.ones(1) if pipe.transformer.config.guidance_embeds else None
        out = pipe.transformer(
            pipe._pack_latents(z), encoder_hidden_states=text.hidden, timestep=step / 1000,
            txt_ids=ids, img_ids=places, guidance=guidance,
        ).sample  # fmt: skip
        found: Tensor = pipe._unpack_latents_with_ids(out, places)
        return found

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        return pipe.encode_prompt("")[0], None

    def scaled(self, vae: Any, raw: Tensor) -> Tensor:
        cells = Flux2Pipeline._patchify_latents(raw)
        width = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        found: Tensor = (cells - vae.bn.running_mean.view(-1, 1, 1)) / width.view(-1, 1, 1)
        return found


REFERENCES: dict[str, Reference] = {
    "PixArt": PixArt(),
    "SD3": Sd3(),
    "Sana": Sana(),
    "FLUX.1-dev": Flux(),
    "FLUX.1-schnell": Schnell(),
    "Qwen-Image": QwenImage(),
    "Lumina2": Lumina2(),
    "Z-Image": ZImage(),
    "FLUX.2": Flux2(),
}


def reference(name: str) -> Reference:
    """That of a model in families.WRITERS."""
    return next(value for start, value in REFERENCES.items() if name.startswith(start))


def pipeline_of(folder: Path) -> Any:
    """Diffusers' own of a folder."""
    without = {"text_encoder_3": None, "tokenizer_3": None} if "without" in folder.name else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def spied(module: Any, run: Any) -> list[dict[str, Any]]:
    """The arguments of each forward of a module while `run` runs."""
    seen, names = list[dict[str, Any]](), inspect.signature(module.forward)

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(dict(names.bind(*args, **kwargs).arguments))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


def flat(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that are None, nested ones beside the others."""
    out: dict[str, Any] = {}
    for key, value in given.items():
        out |= flat(value) if isinstance(value, dict) else {key: value}
    return {key: value for key, value in out.items() if value is not None}
