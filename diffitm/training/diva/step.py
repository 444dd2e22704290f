"""The update step of DIVA: a frozen diffusion model's error teaches CLIP's image tower to see detail.

Wang et al. 2024, Diffusion Feedback Helps CLIP See Better. The loop is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffitm.core.errors import InputError
from diffitm.models.clip_tokens import find_tower, image_side, visual_tokens
from diffitm.models.denoiser import Condition, Denoiser, rows_of
from diffitm.training.diva.recap import Recap, add_text
from diffitm.training.lora.step import Posterior
from diffitm.training.sampler import draw_noise, seed_of

# What each repeat's gradient counts. The published code divides all but the first one's by its 5
# accumulation steps, whose sum it then takes: 5 g1 + g2.
REDUCES: dict[str, Callable[[int], list[float]]] = {
    "mean": lambda repeats: [1 / repeats] * repeats,
    "published": lambda repeats: [5.0] + [1.0] * (repeats - 1),
}
CLIP_SCALE = 255.0
PROJECTION = "projection."


class Diva:
    """CLIP's image tower with a linear projection to the teacher's condition, both trained in float32;
    the teacher and CLIP's text tower stay as they are.

    `prompt` is the text whose embedding meets the recap, `add` one of recap.add_text's ways. With
    `checkpointing` both networks recompute their activations. Raises InputError if the parts do not fit.
    """

    def __init__(
        self,
        clip: nn.Module,
        name: str,
        teacher: Denoiser,
        recap: Recap,
        prompt: str = "",
        add: str = "mean",
        repeats: int = 2,
        reduce: str = "mean",
        seed: int = 0,
        checkpointing: bool = False,
    ) -> None:
        self.clip, self.teacher, self.recap, self.add = clip, teacher, recap, add
        self.repeats = repeats
        self.weights_of_repeats = REDUCES[reduce](repeats)
        device = teacher.device
        clip.to(device).eval().requires_grad_(False)
        self.tower = find_tower(clip, name).requires_grad_(True)
        self.normal = normalisation(self.tower, device)
        side = image_side(self.tower)
        if reason := teacher.refuses(prompt):
            raise InputError(f"{prompt!r}: {reason}; this teacher takes --prompt ''", "prompt")
        with torch.no_grad():
            width, patches = _width_and_patches(self.tower, side, device)
            self.patches, self.side = patches, side
            (self.text,) = rows_of(teacher.encode_texts([prompt]))
        kept, length = 1 + recap.kept(patches), self.text["hidden"].shape[1]
        if teacher.places is not None and kept > teacher.places:
            raise InputError(
                f"{recap}: has {kept} tokens of {patches} patches and the class token, the teacher's "
                f"network has places for {teacher.places}; take fewer patches",
                "recap",
            )
        if add == "tokens" and kept != length:
            raise InputError(
                f"tokens: the recap {recap} has {kept} tokens of {patches} patches and "
                f"the class token, the text has {length}; let them be equal, or take mean",
                "add_prompt",
            )
        _check_latents(teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = nn.Linear(width, self.text["hidden"].shape[2])
        self.projection.to(device)
        tower, projection = self.parts()
        self.parameters = tower + projection
        if checkpointing:
            teacher.checkpoint_gradients()
            grad_checkpointing: Any = self.tower.set_grad_checkpointing
            grad_checkpointing()
        self.autocast = teacher.dtype != torch.float32

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained of the tower, and of the projection."""
        return list(self.tower.parameters()), list(self.projection.parameters())

    def condition(self, tokens: Tensor, seeds: Sequence[int]) -> Condition:
        """What the teacher is conditioned on, from visual tokens [B, 1 + P, W]: the recap where a text's
        tokens stand, none of it masked, and what else it takes, such as a pooled embedding, of the text."""
        recap = self.recap(tokens, self.recap.draw(seeds, self.patches))
        hidden = add_text(self.projection(recap), self.text["hidden"][0], self.add)
        own = {"hidden": hidden}
        if "mask" in self.text:
            own["mask"] = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return self._of_the_text(len(tokens)) | own

    def losses(
        self, pixels: Tensor, posterior: Posterior, seeds: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each repeat the loss to go backward from, and the plain mean squared error.

        `pixels` uint8 [B, 3, H, W] at CLIP's size. Take the gradient before the next repeat is asked
        for, so that one graph is held at a time.
        """
        for repeat in range(self.repeats):
            drawn = [seed_of(seed, "repeat", repeat) for seed in seeds]
            error = self.errors(pixels, posterior, drawn).mean()
            yield error * self.weights_of_repeats[repeat], error.detach()

    def errors(
        self, pixels: Tensor, posterior: Posterior, seeds: Sequence[int], blind: bool = False
    ) -> Tensor:
        """Mean squared error of each image [B], with the timestep, noise and patches of its seed;
        `blind`: with the text alone."""
        noised, at, target = self.noised(posterior, seeds)
        with torch.autocast(self.teacher.device.type, self.teacher.dtype, enabled=self.autocast):
            condition = self.conditions(pixels, seeds, blind)
            predicted = self.teacher.predict(noised, at, condition)
        return ((predicted.float() - target) ** 2).flatten(1).mean(1)

    def conditions(self, pixels: Tensor, seeds: Sequence[int], blind: bool = False) -> Condition:
        """The condition of uint8 images, or of none of them."""
        if blind:
            return self._of_the_text(len(pixels))
        return self.condition(visual_tokens(self.tower, self.normalised(pixels)), seeds)

    def _of_the_text(self, count: int) -> Condition:
        return {k: v.expand(count, *v.shape[1:]) for k, v in self.text.items()}

    def noised(
        self, posterior: Posterior, seeds: Sequence[int], at: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_t [B, C, h, w], timesteps [B] (all `at`, if given) and what the teacher should predict."""
        device, schedule = self.teacher.device, self.teacher.schedule
        drawn = draw_noise(seeds, self.teacher.latent_shape, schedule)
        steps = drawn.timesteps.to(device)
        if at is not None:
            steps = torch.full_like(steps, at)
        noise = drawn.noise.to(device)
        mean, std = posterior.mean.to(device), posterior.std.to(device)
        latents = mean + std * drawn.posterior.to(device)
        noised = schedule.add_noise(latents, noise, steps)
        return noised, steps, schedule.target(latents, noise, steps)

    def normalised(self, pixels: Tensor) -> Tensor:
        """CLIP's input, float32, of uint8 [B, 3, H, W]."""
        mean, std = self.normal
        return (pixels.to(self.teacher.device).float() / CLIP_SCALE - mean) / std

    def weights(self) -> dict[str, Tensor]:
        """Tower and projection, by name."""
        parts = {PROJECTION: self.projection, "tower.": self.tower}
        return {
            prefix + name: value.detach().cpu().clone().contiguous()
            for prefix, part in parts.items()
            for name, value in part.state_dict().items()
        }

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights as weights() gives them."""
        for prefix, part in ((PROJECTION, self.projection), ("tower.", self.tower)):
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )


def load_tower(clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put a trained tower into the CLIP that it was trained from."""
    visual: Any = clip.visual
    visual.load_state_dict(
        {k.removeprefix("tower."): v for k, v in weights.items() if k.startswith("tower.")}
    )


def normalisation(tower: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std [3, 1, 1] of the images that the tower was trained on."""
    found: Any = tower.preprocess_cfg
    mean, std = (torch.tensor(found[key], device=device) for key in ("mean", "std"))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def _width_and_patches(tower: nn.Module, side: int, device: torch.device) -> tuple[int, int]:
    tokens = visual_tokens(tower, torch.zeros(1, 3, side, side, device=device))
    return tokens.shape[2], tokens.shape[1] - 1


def _check_latents(teacher: Denoiser) -> None:
    side = teacher.resolution
    pixels = torch.zeros(1, 3, side, side, device=teacher.device)
    mean, _ = teacher.encode_posterior(pixels)
    if tuple(mean.shape[1:]) != teacher.latent_shape:
        raise InputError(
            f": its VAE makes latents of {tuple(mean.shape[1:])} from {side} pixels, and its "
            f"network takes {teacher.latent_shape}: they are not of one model",
            "teacher",
        )
