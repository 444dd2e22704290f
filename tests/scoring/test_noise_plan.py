"""Timesteps and noise of the protocols."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffitm.core.errors import InputError
from diffitm.models.noise_schedule import FlowSchedule
from diffitm.scoring.noise_plan import NoisePlan, make_plan, standard_noise
from diffitm.scoring.pair_errors import pair_errors
from diffitm.scoring.protocols import (
    FLOW_PROTOCOLS,
    choose_protocol,
    plan_flow,
    plan_timesteps,
    planned,
)
from tests import tiny

NOISE_SHA256 = "8f99abeaf19cb7cf4f2a561596a6f5dbae24f6585711fd8b580a8504029ae329"


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 1), (10, 10), (50, 49), (250, 245), (256, 327), (1000, 980)]
)
def test_published_grid(asked: int, given: int) -> None:
    """The published code gives another number than was asked for; it starts at 10."""
    steps = plan_timesteps("diffusionitm", asked)
    assert len(steps) == given
    assert steps == list(range(10, 990, 1000 // asked))


def test_published_ten_values() -> None:
    assert plan_timesteps("diffusionitm", 10) == [*range(10, 911, 100)]


def test_paper_draws_are_uniform_and_nested() -> None:
    """A shorter plan is the start of a longer one, so stored errors can be reused."""
    long = plan_timesteps("paper", 1000, seed=3)
    assert plan_timesteps("paper", 10, seed=3) == long[:10]
    assert plan_timesteps("paper", 10, seed=4) != long[:10]
    assert 0 <= min(long) < 10
    assert 990 <= max(long) < 1000
    assert abs(sum(long) / 1000 - 499.5) < 30
    assert len(set(long)) < 1000, "draws are with replacement"


def test_diffusion_classifier_grid() -> None:
    assert plan_timesteps("diffusion-classifier", 4) == [125, 375, 625, 875]
    assert plan_timesteps("diffusion-classifier", 1) == [500]
    assert plan_timesteps("diffusion-classifier", 1000) == list(range(1000))
    published = plan_timesteps("diffusion-classifier", 64)
    assert (len(published), published[0], published[-1]) == (64, 7, 952)


@pytest.mark.parametrize("protocol", ["diffusionitm", "paper", "diffusion-classifier"])
@pytest.mark.parametrize("count", [0, -3, 1001])
def test_count_out_of_range(protocol: str, count: int) -> None:
    with pytest.raises(InputError, match=rf"timesteps: {count} is out of range.* 1 to 1000"):
        plan_timesteps(protocol, count)


def test_unknown_protocol_lists_the_known() -> None:
    with pytest.raises(InputError, match="'papr' is not one of diffusionitm, paper"):
        plan_timesteps("papr", 10)


@pytest.mark.parametrize("protocol", ["diffusionitm", "paper", "diffusion-classifier"])
@pytest.mark.parametrize("total", [100, 50])
def test_short_training_schedules(protocol: str, total: int) -> None:
    """A model of fewer training timesteps gets timesteps that it has."""
    steps = plan_timesteps(protocol, 10, total=total)
    assert steps
    assert 0 <= min(steps) <= max(steps) < total


def test_plans_of_short_schedules_by_hand() -> None:
    """The published grid in proportion; draws from 0 to T - 1 of the generator of that seed."""
    assert plan_timesteps("diffusionitm", 10, total=100) == list(range(1, 99, 10))
    assert plan_timesteps("diffusionitm", 50, total=50) == list(range(49))
    assert plan_timesteps("diffusion-classifier", 4, total=100) == [12, 37, 62, 87]
    drawn = torch.randint(0, 50, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    assert plan_timesteps("paper", 7, total=50) == drawn[:7]
    assert plan_timesteps("diffusionitm", 5, total=5) == [0, 1, 2, 3]
    assert plan_timesteps("diffusionitm", 1, total=1) == [0]


def test_plans_begin_at_seed_zero_and_timestep_zero() -> None:
    plan = make_plan([0, 3], (1, 2, 2))
    assert torch.equal(plan.noise, standard_noise(2, (1, 2, 2), seed=0))
    assert plan.noise.shape == (2, 1, 2, 2)


def test_noise_table_is_the_convention() -> None:
    """The hash in the specification, at Stable Diffusion's 4x64x64."""
    table = standard_noise(1000, (4, 64, 64))
    assert table.dtype == torch.float32
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == NOISE_SHA256


def test_noise_belongs_to_the_position() -> None:
    """Position k has the same noise however many follow, and whatever the global generator did."""
    torch.manual_seed(11)
    few = standard_noise(3, (4, 8, 8))
    torch.manual_seed(12)
    many = standard_noise(20, (4, 8, 8))
    assert torch.equal(few, many[:3])
    assert not torch.equal(few, standard_noise(3, (4, 8, 8), seed=1))
    assert few.untyped_storage().nbytes() == few.nbytes, "the table itself is not kept"


@pytest.mark.parametrize(
    "shape", [(4, 8, 8), (4, 16, 12), (1, 1, 1), (1, 1, 3), (3, 3, 5), (2, 4, 4), (1, 5, 1)]
)
@pytest.mark.parametrize("positions", [1, 2, 7, 245, 990, 991, 999, 1000])
def test_a_short_table_is_the_start_of_the_whole(
    shape: tuple[int, int, int], positions: int
) -> None:
    """Bit for bit, also where slices are no multiple of what torch draws at once."""
    whole = torch.randn(1000, *shape, generator=torch.Generator().manual_seed(3))
    found = standard_noise(positions, shape, 3)
    assert torch.equal(found, whole[:positions])
    assert found.untyped_storage().nbytes() == found.nbytes


def test_no_more_noise_is_drawn_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randn = list[int](), torch.randn

    def counted(*shape: int, **options: torch.Generator) -> torch.Tensor:
        drawn.append((found := randn(*shape, **options)).numel())
        return found

    monkeypatch.setattr(torch, "randn", counted)
    for positions, shape in ((10, (4, 8, 8)), (1, (1, 3, 3)), (1000, (1, 3, 3)), (999, (1, 3, 3))):
        standard_noise(positions, shape)
    assert drawn == [2560, 16, 9000, 9000]


def test_noise_beyond_the_table() -> None:
    with pytest.raises(InputError, match="1001 is out of range"):
        standard_noise(1001, (1, 1, 1))


def test_make_plan_joins_both() -> None:
    plan = make_plan([5, 500], (4, 8, 8), seed=2)
    assert len(plan) == 2
    assert plan.timesteps.tolist() == [5, 500]
    assert torch.equal(plan.noise, standard_noise(2, (4, 8, 8), seed=2))


@pytest.mark.parametrize(
    ("timesteps", "noise", "text"),
    [
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, 2, 2), "N >= 1"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 1, 2, 2), r"must be \[N\]"),
        (torch.tensor([1, 2]), torch.zeros(3, 1, 2, 2), "3 noise tensors for 2 timesteps"),
        (torch.tensor([1, -2]), torch.zeros(2, 1, 2, 2), "timestep -2 is below 0"),
    ],
)
def test_plan_rejects(timesteps: torch.Tensor, noise: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NoisePlan(timesteps, noise)


def test_self_bench_has_the_published_thirty() -> None:
    """Places 20, 53, .. 977 of the shift-3 schedule, which a sampler of diffusers has, too."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = scheduler.timesteps[torch.arange(20, 980, 33)]
    found = plan_flow("selfbench", 30)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-3)
    assert (len(found), found[0], found[-1]) == (30, 993.2432, 65.9656)


def test_snr_is_that_of_stable_diffusion() -> None:
    """signal / sigma of each timestep of the diffusionitm grid, in the flow's own way to noise."""
    schedule = tiny.schedule()
    steps = plan_timesteps("diffusionitm", 10)
    sigma = torch.tensor(plan_flow("snr", 10), dtype=torch.float64) / 1000
    expected = (schedule.signal[steps] / schedule.sigma[steps]).double()
    torch.testing.assert_close((1 - sigma) / sigma, expected, rtol=1e-4, atol=0)
    assert len(plan_flow("snr", 250)) == 245


def test_sigma_has_mid_points() -> None:
    assert plan_flow("sigma", 4) == [125.0, 375.0, 625.0, 875.0]


@pytest.mark.parametrize("protocol", FLOW_PROTOCOLS)
def test_flow_plans_are_real_numbers(protocol: str) -> None:
    """Of noise, none of them clean; the same digits on every machine."""
    for count in (1, 7, 1000):
        steps = planned(protocol, count)
        assert steps == tuple(round(step, 4) for step in steps)
        FlowSchedule().check(torch.tensor(steps))
    assert make_plan(planned(protocol, 3), (1, 2, 2)).timesteps.dtype == torch.float32
    with pytest.raises(InputError, match="timesteps: 0 is out of range"):
        planned(protocol, 0)


def test_protocols_are_of_one_kind_of_model() -> None:
    assert choose_protocol("auto", True) == "snr"
    assert choose_protocol("auto", False) == "diffusionitm"
    assert choose_protocol("sigma", True) == "sigma"
    with pytest.raises(InputError, match="paper is not for a model that is a flow model: give snr"):
        choose_protocol("paper", True)
    with pytest.raises(InputError, match="snr is not for a model that has a table of timesteps"):
        choose_protocol("snr", False)


def test_callers_own_timesteps_and_noise() -> None:
    """A predictor of zero shows the caller's noise as its error, at the caller's timesteps."""
    model = tiny.Fixed(tiny.schedule())
    noise = torch.stack([torch.full((2, 4, 4), 1.0), torch.full((2, 4, 4), -3.0)])
    plan = NoisePlan(torch.tensor([7, 900]), noise)
    condition = model.encode_texts(["a"])
    found = pair_errors(model, torch.ones(1, 2, 4, 4), condition, plan, torch.tensor([[0, 0]]))
    assert found.elements == 32
    torch.testing.assert_close(found.l2, torch.tensor([[32**0.5, 3 * 32**0.5]]))
    torch.testing.assert_close(found.l1, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(found.huber, torch.tensor([[0.5, 2.5]]))
    torch.testing.assert_close(found.mse, torch.tensor([[1.0, 9.0]]))
    signal, sigma = model.schedule.signal[[7, 900]], model.schedule.sigma[[7, 900]]
    expected = signal.view(2, 1, 1, 1) + sigma.view(2, 1, 1, 1) * noise
    torch.testing.assert_close(model.seen[0], expected)


def test_plan_of_another_latent_shape() -> None:
    model = tiny.Fixed(tiny.schedule())
    plan = make_plan([1], (2, 8, 8))
    with pytest.raises(ValueError, match=r"noise has shape \(2, 8, 8\), the latents \(2, 4, 4\)"):
        pair_errors(
            model,
            torch.ones(1, 2, 4, 4),
            model.encode_texts(["a"]),
            plan,
            torch.tensor([[0, 0]]),
        )


def test_timestep_beyond_the_model() -> None:
    model = tiny.Fixed(tiny.schedule(total=100))
    plan = make_plan([99, 100], (2, 4, 4))
    with pytest.raises(ValueError, match="timestep 100 is beyond the model's last, 99"):
        pair_errors(
            model,
            torch.ones(1, 2, 4, 4),
            model.encode_texts(["a"]),
            plan,
            torch.tensor([[0, 0]]),
        )


def test_no_pairs() -> None:
    """Give no errors, and ask the model nothing."""
    model = tiny.Fixed(tiny.schedule())
    plan, condition = make_plan([1, 2, 3], (2, 4, 4)), model.encode_texts(["a"])
    for latents in (torch.ones(1, 2, 4, 4), torch.ones(0, 2, 4, 4)):
        for none in (torch.zeros(0, 2, dtype=torch.long), torch.tensor([], dtype=torch.long)):
            found = pair_errors(model, latents, condition, plan, none)
            assert found.l2.shape == found.l1.shape == found.huber.shape == (0, 3)
            assert found.mse.shape == (0, 3) and found.elements == 32
    assert not model.seen


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ([-1, 0], r"pairs\[1\] = \(-1, 0\): there is no image -1, rows are 0 to 1"),
        ([0, -2], r"pairs\[1\] = \(0, -2\): there is no text -2, rows are 0 to 0"),
        ([2, 0], "there is no image 2"),
        ([0, 1], "there is no text 1"),
    ],
)
def test_pairs_of_rows_that_are_not_there(pair: list[int], text: str) -> None:
    """A negative row is not counted from the end."""
    model = tiny.Fixed(tiny.schedule())
    plan, condition = make_plan([1], (2, 4, 4)), model.encode_texts(["a"])
    with pytest.raises(ValueError, match=text):
        pair_errors(model, torch.ones(2, 2, 4, 4), condition, plan, torch.tensor([[0, 0], pair]))
