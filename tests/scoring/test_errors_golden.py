"""Parity with the published code: what it computed on the tiny model in data/golden_model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffitm.core.schema import PairRow
from diffitm.metrics.score import averaged, conditional_score, normalised_score
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.batching import Batch
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import NoisePlan
from diffitm.scoring.pair_errors import PairErrors, pair_errors
from diffitm.scoring.protocols import plan_timesteps
from tests.conftest import DATA

Golden = dict[str, np.ndarray]
TOLERANCE = 1e-4
PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(4))
IMAGES = ("0_landscape_rgb.png", "1_portrait_rgb.png", "2_square128_rgb.png")


@pytest.fixture(scope="module")
def plan(golden: Golden) -> NoisePlan:
    return NoisePlan(torch.from_numpy(golden["timesteps"]), torch.from_numpy(golden["noise"]))


@pytest.fixture(scope="module")
def errors(
    golden: Golden, golden_sd: StableDiffusion, golden_texts: list[str], plan: NoisePlan
) -> PairErrors:
    """All 3 images x (3 captions and the empty text), from pixels to errors."""
    latents = golden_sd.encode_images(torch.from_numpy(golden["pixels"]))
    return pair_errors(golden_sd, latents, golden_sd.encode_texts(golden_texts), plan, PAIRS)


def close(found: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE, rtol=0)


def test_timesteps_and_schedule(golden: Golden, golden_sd: StableDiffusion) -> None:
    assert plan_timesteps("diffusionitm", 10) == golden["timesteps"].tolist()
    close(golden_sd.schedule.signal**2, golden["alphas_cumprod"])
    assert golden_sd.schedule.prediction == "epsilon"
    assert golden_sd.latent_shape == golden["noise"].shape[1:]
    assert golden_sd.resolution == golden["pixels"].shape[-1]


def test_latents(golden: Golden, golden_sd: StableDiffusion) -> None:
    close(golden_sd.encode_images(torch.from_numpy(golden["pixels"])), golden["latents"])


def test_text_embeddings(
    golden: Golden, golden_sd: StableDiffusion, golden_texts: list[str]
) -> None:
    close(golden_sd.encode_texts(golden_texts)["hidden"], golden["text_embeds"])


def test_conditional_and_unconditional_errors(golden: Golden, errors: PairErrors) -> None:
    l2, mse = errors.l2.view(3, 4, 10), errors.mse.view(3, 4, 10)
    close(l2[:, :3], golden["err_cond"])
    close(l2[:, 3], golden["err_uncond"])
    close(l2[:, :3] - l2[:, 3:], golden["err_rel"])
    close(mse[:, :3], golden["mse_cond"])
    close(mse[:, 3], golden["mse_uncond"])


def test_scores(golden: Golden, errors: PairErrors) -> None:
    mean = averaged(errors.l2.numpy().reshape(3, 4, 10))
    close(conditional_score(mean[:, :3]), golden["score_cond"])
    close(normalised_score(mean[:, :3], mean[:, 3:]), golden["score_rel"])


def test_weighted_average(golden: Golden) -> None:
    """Weights need not sum to one; a zero weight takes a timestep out."""
    errors = golden["err_cond"]
    weights = np.array([2.0] * 5 + [0.0] * 5)
    np.testing.assert_allclose(averaged(errors, weights), errors[..., :5].mean(-1), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(
    golden: Golden,
    golden_sd: StableDiffusion,
    golden_texts: list[str],
    plan: NoisePlan,
    errors: PairErrors,
    batch_size: int,
) -> None:
    """Batches that cut through a pair's timesteps give the same errors, in any pair order."""
    latents = torch.from_numpy(golden["latents"])
    condition = golden_sd.encode_texts(golden_texts)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(1))
    found = pair_errors(golden_sd, latents, condition, plan, PAIRS[order], Batch(batch_size))
    for name in ("l2", "l1", "huber"):
        expected = getattr(errors, name)[order]
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=0)


def test_from_image_files(
    golden: Golden, golden_sd: StableDiffusion, golden_texts: list[str], plan: NoisePlan
) -> None:
    """The scorer that actors run reaches the published errors from the image files themselves."""
    scorer = DiffusionScorer(golden_sd, plan, str(DATA / "golden_images"))
    lines = scorer.score([PairRow(i, name, golden_texts) for i, name in enumerate(IMAGES)])
    assert [line["failure"] for line in lines] == [None] * 12
    found = np.array([line["l2"] for line in lines]).reshape(3, 4, 10)
    close(found[:, :3], golden["err_cond"])
    close(found[:, 3], golden["err_uncond"])
