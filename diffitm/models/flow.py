"""What rectified-flow models in the diffusers layout share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import LatentDiffusion
from diffitm.models.noise_schedule import FlowSchedule, Schedule
from diffitm.models.parts import read_flow

GUIDANCE = 1.0  # what a network that takes one is told, as it is when it is trained further
PATCH = 2  # a network's token is so many latents high and wide
SIDE = 128  # of latents, where the network's settings do not say it: the pipelines'


class FlowDiffusion(LatentDiffusion):
    """A network that predicts eps - z0 of z = (1 - sigma) z0 + sigma eps on latents of a shifted VAE.

    Its predict takes timesteps of 1000 sigma, whatever the network itself is given.
    """

    shifts: ClassVar[bool] = True
    patch: ClassVar[int] = PATCH

    def read_schedule(self, folder: Folder) -> Schedule:
        """See LatentDiffusion."""
        self.sampling = read_flow(folder.location, folder.revision)
        return FlowSchedule()

    def sampler(self) -> Any:
        """See LatentDiffusion: the folder's own kind, Euler's steps or (of Sana) DPM-Solver++."""
        is_solver = self.sampling.get("use_flow_sigmas")
        kind = DPMSolverMultistepScheduler if is_solver else FlowMatchEulerDiscreteScheduler
        return kind.from_config(self.sampling)

    def take_resolution(self, side: int) -> None:
        """See Denoiser."""
        factor = self.resolution // self.latent_shape[-1]
        cell = factor * self.patch
        if side < cell or side % cell:
            raise InputError(f"{side}: this model takes multiples of {cell} pixels", "resolution")
        self.resolution = side
        self.latent_shape = (self.latent_shape[0], side // factor, side // factor)


def side_of(network: Mapping[str, Any]) -> int:
    """The side of latents by the network's settings."""
    return int(network.get("sample_size") or SIDE)


def check_packed(network: Any, channels: int) -> None:
    """Raises OSError if the network does not take a VAE's latents of so many channels, packed by `pack`."""
    if network.in_channels != PATCH**2 * channels:
        raise OSError(
            f"its network takes {network.in_channels} channels, its VAE gives {PATCH**2 * channels} packed: "
            "parts of two models, or one that also takes an image"
        )


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to tokens of 2 x 2, [B, hw / 4, 4 C]."""
    b, c, h, w = latents.shape
    cells = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: Tensor, side: int) -> Tensor:
    """Square latents [B, C, side, side] of what pack gives."""
    cells = tokens.view(len(tokens), side // PATCH, side // PATCH, -1, PATCH, PATCH)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, side, side)
