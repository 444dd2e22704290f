"""The training schedule against plain formulas and against a sampling scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffitm.models.noise_schedule import FlowSchedule, NoiseSchedule
from tests import tiny


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and timesteps, the first and last among them."""
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator)
    return z0, eps, torch.tensor([0, 10, 500, 999])


def plain_abar() -> np.ndarray:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def test_noised_latent(drawn: tuple[torch.Tensor, ...]) -> None:
    """z_t = sqrt(abar) z0 + sqrt(1 - abar) eps, a timestep for each row."""
    z0, eps, steps = drawn
    abar = plain_abar()[steps.numpy()].reshape(-1, 1, 1, 1)
    expected = np.sqrt(abar) * z0.numpy() + np.sqrt(1 - abar) * eps.numpy()
    found = tiny.schedule().add_noise(z0, eps, steps)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_targets(drawn: tuple[torch.Tensor, ...]) -> None:
    """epsilon, v, sample and flow as their papers define them."""
    z0, eps, steps = drawn
    abar = plain_abar()[steps.numpy()].reshape(-1, 1, 1, 1)
    velocity = np.sqrt(abar) * eps.numpy() - np.sqrt(1 - abar) * z0.numpy()
    expected = {"epsilon": eps, "v_prediction": velocity, "sample": z0, "flow": eps - z0}
    for prediction, value in expected.items():
        found = tiny.schedule(prediction).target(z0, eps, steps)
        np.testing.assert_allclose(found.numpy(), np.asarray(value), atol=1e-5, err_msg=prediction)


def test_flow_schedule(drawn: tuple[torch.Tensor, ...]) -> None:
    """z_t = (1 - sigma) z0 + sigma eps, and eps - z0 points from the latent to the noise."""
    z0, eps, _ = drawn
    sigma = torch.linspace(0, 1, 5)
    schedule = NoiseSchedule(1 - sigma, sigma, "flow")
    assert schedule.timesteps == 5
    steps = torch.tensor([0, 1, 2, 4])
    s = sigma[steps].view(-1, 1, 1, 1)
    noised = schedule.add_noise(z0, eps, steps)
    torch.testing.assert_close(noised, z0 + s * (eps - z0))
    torch.testing.assert_close(noised, z0 + s * schedule.target(z0, eps, steps))


def test_velocity_gives_the_noise_back(drawn: tuple[torch.Tensor, ...]) -> None:
    """eps = sqrt(abar) v + sqrt(1 - abar) z_t: the identity that v-prediction rests on."""
    z0, eps, steps = drawn
    schedule = tiny.schedule("v_prediction")
    signal, sigma = schedule.at(steps, z0)
    velocity, noised = schedule.target(z0, eps, steps), schedule.add_noise(z0, eps, steps)
    torch.testing.assert_close(signal * velocity + sigma * noised, eps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("timestep", [0, 10, 110, 510, 999])
def test_same_as_a_fresh_euler_scheduler(timestep: int) -> None:
    """The published code's add_noise and scale_model_input give the same z_t, on a scheduler that
    has not seen another timestep (it remembers the first one)."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = EulerDiscreteScheduler(**settings)
    generator = torch.Generator().manual_seed(timestep)
    z0, eps = torch.randn(2, 1, 4, 6, 6, generator=generator)
    steps = torch.tensor([timestep])
    noisy = euler.add_noise(z0, eps, steps)
    expected = EulerDiscreteScheduler(**settings).scale_model_input(noisy, steps[0])
    found = tiny.schedule().add_noise(z0, eps, steps)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prediction", "target", "clean"),
    [
        ("epsilon", 2.0, (5 - 0.8 * 3) / 0.6),
        ("v_prediction", 0.6 * 2 - 0.8 * 7, 0.6 * 5 - 0.8 * 3),
        ("sample", 7.0, 3.0),
        ("flow", 2.0 - 7.0, 5 - 0.8 * 3),
    ],
)
def test_numbers_by_hand(prediction: str, target: float, clean: float) -> None:
    """Latent 7 and noise 2, then an answer of 3 to z_t = 5; signal 0.6 and sigma 0.8 at timestep 1."""
    schedule = NoiseSchedule(torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.8]), prediction)
    at = torch.tensor([1])
    latent, noise, noised, answer = (torch.full((1, 1, 1, 1), v) for v in (7.0, 2.0, 5.0, 3.0))
    assert schedule.add_noise(latent, noise, at).item() == pytest.approx(0.6 * 7 + 0.8 * 2)
    assert schedule.target(latent, noise, at).item() == pytest.approx(target)
    assert schedule.clean(noised, answer, at).item() == pytest.approx(clean)


def test_unknown_prediction() -> None:
    with pytest.raises(ValueError, match="'noise' is not one of"):
        NoiseSchedule(torch.ones(2), torch.ones(2), "noise")


def test_a_flow_without_a_table(drawn: tuple[torch.Tensor, ...]) -> None:
    """Timesteps are 1000 sigma, real numbers that are not rounded; z0 comes back of the true velocity."""
    z0, eps, _ = drawn
    schedule, steps = FlowSchedule(), torch.tensor([0.5, 65.9656, 500, 1000])
    s = (steps / 1000).view(-1, 1, 1, 1)
    noised, target = schedule.add_noise(z0, eps, steps), schedule.target(z0, eps, steps)
    torch.testing.assert_close(noised, (1 - s) * z0 + s * eps)
    torch.testing.assert_close(target, eps - z0)
    torch.testing.assert_close(schedule.clean(noised, target, steps), z0, atol=1e-5, rtol=0)
    schedule.check(steps)


def test_timesteps_that_a_schedule_has_not() -> None:
    for step in (0.0, -1.0, 1000.5):
        with pytest.raises(ValueError, match="is no noise of a flow model"):
            FlowSchedule().check(torch.tensor([500, step]))
    with pytest.raises(ValueError, match="timestep 1000 is beyond the model's last, 999"):
        tiny.schedule().check(torch.tensor([1000]))
    with pytest.raises(ValueError, match="takes whole numbers"):
        tiny.schedule().check(torch.tensor([10.5]))
