"""Protocols: at which timesteps errors are measured, and which kind of error counts."""

from __future__ import annotations

import numpy as np

from diffitm.core.errors import InputError

TRAINED = 1000  # timesteps of a model with a table, and a flow model's where there is noise alone
PROTOCOLS = ("diffusionitm", "paper", "diffusion-classifier")  # of models with a table of timesteps
FLOW_PROTOCOLS = ("snr", "selfbench", "sigma")  # of flow models
OF_NORM = ("diffusionitm", "snr", "selfbench")  # protocols whose error is the l2 norm
# First and last place in a schedule of 1000 steps, and that schedule's shift.
SELF_BENCH = (20, 980, 3.0)
DIGITS = 4  # of a flow model's timestep, so that no machine's last bit names another store


def error_of_protocol(protocol: str) -> str:
    """The kind of error that a protocol averages: the l2 norm, or the mean squared error."""
    return "l2" if protocol in OF_NORM else "mse"


def choose_protocol(protocol: str, flow: bool) -> str:
    """The protocol of a model with or without a flow; 'auto' is the first of either kind.

    Raises InputError for one of the other kind.
    """
    own, others = (FLOW_PROTOCOLS, PROTOCOLS) if flow else (PROTOCOLS, FLOW_PROTOCOLS)
    if protocol in others:
        has = "is a flow model" if flow else "has a table of timesteps"
        raise InputError(
            f"{protocol} is not for a model that {has}: give {' or '.join(own)}", "protocol"
        )
    return own[0] if protocol == "auto" else protocol


def plan_timesteps(protocol: str, count: int, seed: int = 0, total: int = 1000) -> list[int]:
    """The timesteps of a protocol; `count` asked for, `total` training timesteps T.

    - diffusionitm: range(10, 990, 1000 // count), as DiffusionITM's code does. Another number can
      come out than was asked for (250 gives 245), so print the length of the list.
    - paper: `count` uniform draws from [0, T) (DiffusionITM, section 3); the first n of a longer
      list are the draws of a shorter one.
    - diffusion-classifier: `count` strata of T // count timesteps from 0 on, their mid-points, as the
      code of Li et al. 2023 has them (64 of 1000 end at 952).

    Raises InputError for an unknown protocol or a count that the protocol cannot give.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if not 1 <= count <= total:
        raise InputError(f"timesteps: {count} is out of range, must be 1 to {total}")
    if protocol == "diffusionitm":
        steps = list(range(10 * total // 1000, 990 * total // 1000, total // count))
        return steps or [0]
    if protocol == "paper":
        import torch  # its generator alone; an evaluation needs no torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, total, (total,), generator=generator)[:count].tolist()
    stride = total // count
    return list(range(stride // 2, total, stride))[:count]


def plan_flow(protocol: str, count: int) -> list[float]:
    """A flow model's timesteps, 1000 sigma, by a protocol; `count` asked for.

    - snr: where the ratio of signal to noise is that of the diffusionitm protocol's timesteps on Stable
      Diffusion's schedule, so that both kinds of models are measured at equal noise: (1 - sigma) / sigma
      is sqrt(abar / (1 - abar)). As many as that protocol gives.
    - selfbench: places 20, 20 + 1000 // count, .. below 980 of 1000 steps of the schedule with shift 3, from
      noise on, as the code of Self-Bench has them (Jeong et al. 2025, with 30).
    - sigma: `count` strata of [0, 1], their mid-points.

    Raises InputError for an unknown protocol or a count that is out of range.
    """
    if protocol not in FLOW_PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is not one of {', '.join(FLOW_PROTOCOLS)}")
    if not 1 <= count <= TRAINED:
        raise InputError(f"timesteps: {count} is out of range, must be 1 to {TRAINED}")
    if protocol == "sigma":
        sigma = (np.arange(count) + 0.5) / count
    elif protocol == "selfbench":
        first, end, shift = SELF_BENCH
        plain = 1 - np.arange(first, end, TRAINED // count) / TRAINED
        sigma = shift * plain / (1 + (shift - 1) * plain)
    else:
        abar = _stable_diffusion()[plan_timesteps("diffusionitm", count)]
        sigma = np.sqrt(1 - abar) / (np.sqrt(abar) + np.sqrt(1 - abar))
    return [round(float(value), DIGITS) for value in TRAINED * sigma]


def planned(protocol: str, count: int, seed: int = 0) -> tuple[float, ...]:
    """The timesteps of any protocol, as plan_timesteps or plan_flow has them. Raises InputError."""
    if protocol in FLOW_PROTOCOLS:
        return tuple(plan_flow(protocol, count))
    return tuple(plan_timesteps(protocol, count, seed))


def _stable_diffusion() -> np.ndarray:
    """abar [1000] of the schedule that all of Stable Diffusion 1, 2 and XL were trained on."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINED) ** 2
    found: np.ndarray = np.cumprod(1 - betas)
    return found
