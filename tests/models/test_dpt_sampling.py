"""DPT's self-correction: against a plain loop, and towards a higher score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffitm.core.errors import InputError
from diffitm.models.dpt import DptAdapter
from diffitm.models.dpt_file import AdapterShape
from diffitm.models.dpt_sampling import Corrected
from diffitm.models.stable_diffusion import StableDiffusion
from tests import plain_dpt, tiny

SHAPE = AdapterShape("up1", 32, tiny.WIDTH)
STEPS, GUIDANCE = 3, 2.0


def painter(sd: StableDiffusion, factor: float) -> Corrected:
    return Corrected(sd, DptAdapter(SHAPE, 1).eval(), factor)


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_images_equal_a_plain_loop(sd: StableDiffusion, factor: float) -> None:
    """One seed at a time, with the gradient of the formulas; it is given to the prompt's half alone."""
    made = painter(sd, factor)
    images = made.generate("a red circle", [4, 5], STEPS, GUIDANCE)
    state = dict(made.adapter.named_parameters())
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    scheduler.set_timesteps(STEPS)
    for seed, image in zip((4, 5), images, strict=True):
        latent = torch.randn(sd.latent_shape, generator=torch.Generator().manual_seed(seed))
        hidden, pooled = (value.clone() for value in plain_dpt.encoded(sd, "a red circle"))
        empty = plain_dpt.encoded(sd, "")[0]
        for step in scheduler.timesteps.tolist():
            moved = latent.clone().requires_grad_()
            map, _ = plain_dpt.read(sd, "up1", moved, step, hidden)
            plain_dpt.score(state, map, step, pooled).backward()
            with torch.no_grad():
                text = sd.unet((latent + factor * moved.grad)[None], step, hidden).sample
                none = sd.unet(latent[None], step, empty).sample
                guided = none + GUIDANCE * (text - none)
                latent = scheduler.step(guided, step, latent[None]).prev_sample[0]
        pixels = sd.decode(latent[None])[0].permute(1, 2, 0).numpy()
        difference = np.asarray(image, float) - (pixels / 2 + 0.5) * 255
        assert np.abs(difference).max() < 1.0


def test_the_gradient_leads_to_a_higher_score(sd: StableDiffusion) -> None:
    """And each latent's is its own."""
    made = painter(sd, 1.0)
    latents, at = torch.randn(2, *sd.latent_shape), torch.tensor([500, 500])
    texts = made.texts("a red circle", 2)
    gradient = made.gradient(latents, at, texts)
    alone = made.gradient(latents[1:], at[1:], made.texts("a red circle", 1))
    torch.testing.assert_close(gradient[1:], alone, rtol=1e-3, atol=1e-7)

    def score(moved: torch.Tensor) -> torch.Tensor:
        maps, _ = made.reader(moved, at, texts)
        return made.adapter.score(maps, at, texts["pooled"])

    with torch.no_grad():
        size = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (score(latents + 0.05 * gradient / size) > score(latents)).all()


def test_latents_are_not_cut(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's scheduler that says nothing of it, such as DPM-Solver++'s, is none that cuts."""
    config = dict(DPMSolverMultistepScheduler.from_config(sd.scheduler.config).config)
    silent = {k: v for k, v in config.items() if k != "clip_sample"}
    made, read = painter(sd, 0.0), DDPMScheduler.from_config(silent)
    assert read.config.clip_sample
    expected = made.generate("a red circle", [4], STEPS, GUIDANCE)
    monkeypatch.setattr(sd, "scheduler", read)
    found: Any = made.generate("a red circle", [4], STEPS, GUIDANCE)
    assert np.abs(np.asarray(found[0], float) - np.asarray(expected[0], float)).max() == 0


def test_a_picture_that_is_not_finite_is_told(sd: StableDiffusion) -> None:
    """Not a black one."""
    with pytest.raises(InputError, match="the picture of 'a red circle' is not finite"):
        painter(sd, float("nan")).generate("a red circle", [4], STEPS, GUIDANCE)
