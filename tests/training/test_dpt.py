"""DPT's update step against plain code, where its gradients reach, its draws, options and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.models.denoiser import Condition
from diffitm.models.dpt import DptAdapter, load_adapter
from diffitm.models.dpt_file import LORA, AdapterShape, find_adapter
from diffitm.models.folder import Folder
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.training.dpt import step
from diffitm.training.dpt.expressions import GroundingWeights
from diffitm.training.dpt.step import Dpt
from diffitm.training.dpt.weights import save_weights
from diffitm.training.lora.options import FinetuneConfig, find_problems, negatives_of
from diffitm.training.rows import TrainingRow, usable
from diffitm.training.sampler import BatchSampler, images_in
from tests import plain_dpt, tiny
from tests.dpt_parts import CAPTIONS, SAID, SHAPE, dpt, items, posteriors, without_dropout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize(
    ("prediction", "name", "tunes"),
    [("epsilon", "up1", False), ("epsilon", "up1", True), ("v_prediction", "mid", True)],
)
def test_losses_equal_plain_code(tmp_path: Path, prediction: str, name: str, tunes: bool) -> None:
    """Values and gradients of everything that is trained, one pair after the other."""
    folder = tiny.write_sd(tmp_path, prediction)
    made, own = dpt(folder, name, 2 if tunes else None), posteriors()
    found = made.losses(items(), *own)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters]
    latents = [[(p.mean[i], p.std[i]) for p in own] for i in range(2)]
    assert isinstance(made.denoiser, StableDiffusion)
    state = dict(made.adapter.named_parameters())
    texts, images, error = plain_dpt.losses(made.denoiser, state, name, items(), latents)
    total = texts + images + (error if tunes else 0)
    torch.testing.assert_close(found.of_texts, texts.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.of_images, images.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, total, rtol=1e-4, atol=1e-5)
    if tunes:
        torch.testing.assert_close(found.error, error.detach(), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(total, made.parameters)
    for mine, plain in zip(gradients, expected, strict=True):
        # As a whole: a ReLU of the 2,048 that is at its kink may be on either side of it.
        assert (mine - plain).norm() < 2e-3 * plain.norm() + 1e-6


def reached(made: Dpt, loss: Tensor) -> set[str]:
    """The U-Net's modules, as deep as its blocks, whose LoRA gets a gradient that is not 0."""
    named = [(k, p) for k, p in made.unet.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {
        ".".join(key.split(".")[: 1 if key.startswith("mid") else 2])
        for (key, _), grad in zip(named, grads, strict=True)
        if grad is not None and bool(grad.abs().max() > 0)
    }


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("bottom0", {"mid_block", "up_blocks.1"}),
        ("mid", {"up_blocks.1"}),
        ("up0", {"up_blocks.1"}),
        ("up1", set()),
    ],
)
def test_where_gradients_reach(folder: Path, name: str, behind: set[str]) -> None:
    """Those of matching and of boxes end at the map, the denoising error's are everywhere; what is frozen has
    none."""
    made = dpt(folder, name, rank=2, boxes=True, grounding=GroundingWeights())
    found = made.losses(items(), *posteriors(), SAID)
    assert found.grounding is not None
    boxes = reached(made, found.grounding.total)
    found.loss.backward()
    everywhere = {"down_blocks.0", "mid_block", "up_blocks.1"}
    assert reached_all(made) == everywhere
    frozen = [p for k, p in made.unet.named_parameters() if "lora_" not in k]
    parts = [*made.denoiser.vae.parameters(), *made.denoiser.text_encoder.parameters()]
    assert all(p.grad is None for p in frozen + parts)
    # Without the error: the same five pairs, read up to the map alone.
    maps, nothing = made._read(made._pairs(items(), *posteriors()), whole=False)
    assert nothing is None
    assert reached(made, maps.square().sum()) == boxes == everywhere - behind


def reached_all(made: Dpt) -> set[str]:
    return {
        ".".join(key.split(".")[: 1 if key.startswith("mid") else 2])
        for key, p in made.unet.named_parameters()
        if p.grad is not None and bool(p.grad.abs().max() > 0)
    }


def test_a_probe_trains_the_adapter_alone(folder: Path) -> None:
    """An update of it lowers the loss and changes nothing of the model."""
    made = dpt(folder)
    before = {k: v.clone() for k, v in made.unet.state_dict().items()}
    assert {id(p) for p in made.parameters} == {id(p) for p in made.adapter.parameters()}
    first = made.losses(items(), *posteriors())
    assert first.error is None
    optimizer = torch.optim.SGD(made.parameters, lr=0.01)
    first.loss.backward()
    assert all(p.grad is None for p in made.unet.parameters())
    optimizer.step()
    assert made.losses(items(), *posteriors()).loss < first.loss
    assert all(torch.equal(v, before[k]) for k, v in made.unet.state_dict().items())


def test_the_lora_alone(folder: Path) -> None:
    """The adapter gets no gradient, the LoRA the same as beside one that is trained."""
    both, alone = dpt(folder, rank=2), dpt(folder, rank=2, trains_adapter=False)
    assert len(alone.parameters) < len(both.parameters)
    for made in (both, alone):
        made.losses(items(), *posteriors()).loss.backward()
    assert all(p.grad is None for p in alone.adapter.parameters())
    for mine, theirs in zip(
        alone.parameters, both.parameters[-len(alone.parameters) :], strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_checkpointing_changes_no_gradient(folder: Path) -> None:
    plain, spare = dpt(folder, rank=2), dpt(folder, rank=2, checkpointing=True)
    spare.unet.train()  # where diffusers asks for it
    for made in (plain, spare):
        made.losses(items(), *posteriors()).loss.backward()
    for one, two in zip(plain.parameters, spare.parameters, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_texts_that_were_encoded_beforehand(folder: Path) -> None:
    """Their pooled output is a row of what was kept; nothing is encoded again."""
    model, made = StableDiffusion(Folder(str(folder))), dpt(folder)
    kept = {text: model.encode_texts([text])["hidden"][0] for text in CAPTIONS}

    def read(texts: Sequence[str]) -> Condition:
        return {"hidden": torch.stack([kept[text] for text in texts])}

    cached = dpt(folder, encode_texts=read)
    cached.denoiser.text_encoder.forward = None
    expected = made.losses(items(), *posteriors()).loss
    with pytest.raises(TypeError):
        cached.denoiser.encode_texts(CAPTIONS)
    torch.testing.assert_close(cached.losses(items(), *posteriors()).loss, expected)


def test_dropout_is_the_examples_own(folder: Path) -> None:
    """The same again, whatever was drawn before; of other examples another; none where it validates."""
    adapter = DptAdapter(AdapterShape("up1", 32, tiny.WIDTH))
    made = Dpt(StableDiffusion(Folder(str(folder))), adapter)
    first = made.losses(items(), *posteriors()).loss
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(made.losses(items(), *posteriors()).loss, first)
    assert torch.equal(torch.get_rng_state(), before)
    without_dropout(adapter)
    assert not torch.equal(made.losses(items(), *posteriors()).loss, first)


def test_what_was_right_is_counted() -> None:
    """A tie is none."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [2.0, 1.0, 1.0]])
    assert float(step._right(logits)) == 0.5


def test_weights_there_and_back(folder: Path, tmp_path: Path) -> None:
    """Through a checkpoint, and through the files: the adapter as we load it, the LoRA as diffusers does."""
    made, again = dpt(folder, rank=2), dpt(folder, rank=2)
    with torch.no_grad():
        for parameter in made.parameters:
            parameter += 0.01
    again.load(made.weights())
    expected = made.losses(items(), *posteriors()).loss
    torch.testing.assert_close(again.losses(items(), *posteriors()).loss, expected)
    save_weights(made.weights(), str(tmp_path), "up1", 2)
    file = find_adapter(str(tmp_path), "dpt")
    model = load_denoiser(resolve(str(folder)), lora=file.lora)
    adapter = without_dropout(load_adapter(file, model, "dpt"))
    merged = Dpt(model, adapter).losses(items(), *posteriors())
    torch.testing.assert_close(merged.loss, expected - found_error(made), rtol=1e-4, atol=1e-4)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA)
    noised, at, hidden = torch.randn(2, *SHAPE), torch.tensor([10, 700]), torch.randn(2, 16, 32)
    with torch.no_grad():
        ours, stock = (unet(noised, at, hidden).sample for unet in (made.unet, pipeline.unet))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def found_error(made: Dpt) -> Tensor:
    error = made.losses(items(), *posteriors()).error
    assert error is not None
    return error


# Rows and draws -----------------------------------------------------------------------------------


def test_draws_of_every_kind() -> None:
    """Hard ones of the row, random ones of other rows; the same again."""
    rows = [
        TrainingRow(f"{i}.jpg", f"text {i}", (f"no {i}", f"not {i}"), (f"{i}-a.jpg", f"{i}-b.jpg"))
        for i in range(6)
    ]
    sampler = BatchSampler(rows, range(6), 3, 2, "all", False, 4)
    found = [item for number in range(50) for items in sampler.batches(number) for item in items]
    again = [item for number in range(50) for items in sampler.batches(number) for item in items]
    assert found == again
    for item in found:
        row = rows[item.position]
        assert item.negative_caption in row.negative_captions
        assert item.negative_image in row.negative_images
        assert item.random_caption in {r.caption for r in rows} - {row.caption}
        assert item.random_image in {r.image for r in rows} - {row.image}
        assert len(item.images) == 3 and set(item.images) <= set(images_in(found))
    apart = [item.random_image != f"{item.random_caption[5:]}.jpg" for item in found]
    assert any(apart)  # text and image are drawn each for itself


def test_rows_without_image_negatives_are_refused() -> None:
    rows = [TrainingRow("a.jpg", "x", ("z",)), TrainingRow("b.jpg", "y", ("z",))]
    with pytest.raises(
        InputError, match="no row is usable with --objective dpt: 2 rows: no negative im"
    ):
        usable(rows, "all", "rows.csv")
    assert negatives_of(FinetuneConfig(objective="dpt")) == "all"


# Options ------------------------------------------------------------------------------------------


def test_presets() -> None:
    """The published settings: 48 a GPU, and 8 with 8 accumulations."""
    probe, tune = (parse(FinetuneConfig, ["--preset", f"dpt-{name}"]) for name in ("probe", "tune"))
    assert (probe.objective, probe.stage, probe.feature_map) == ("dpt", "probe", "up1")
    assert (probe.effective_batch, probe.steps, probe.lr, probe.seed) == (48, 60_000, 1e-4, 1337)
    assert (tune.batch_size, tune.effective_batch, tune.steps, tune.rank) == (8, 64, 5000, 4)
    assert (tune.lr_schedule, probe.lr_schedule, tune.warmup_steps) == ("cosine", "constant", 0)
    assert (tune.weight_decay, tune.clip_norm) == (1e-2, 1.0)
    assert tune.grounding_weights == probe.grounding_weights == [1, 5, 2, 1]
    assert GroundingWeights() == GroundingWeights(*probe.grounding_weights)
    assert tune.model == probe.model == "stabilityai/stable-diffusion-2-1-base"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"negatives": "hard-text"}, "--negatives hard-text: dpt has no use for it"),
        ({"lambda_": 2.0}, "--lambda 2.0: dpt has no use for it"),
        ({"adapter": "x"}, "--adapter is of --stage tune"),
        ({"train_adapter": False}, "--train-adapter is of --stage tune"),
        ({"rank": 8}, "--rank is of --stage tune"),
        ({"stage": "tune"}, "--stage tune begins with a probe's adapter"),
        ({"stage": "tune", "adapter": "/none"}, "--adapter '/none': there is no /none/dpt_adapter"),
        ({"stage": "tune", "feature_map": "mid"}, "--feature-map mid: --stage tune has the adapter's"),
        ({"objective": "hard-neg", "stage": "tune"}, "--stage is of --objective dpt"),
        ({"objective": "dtp"}, "'dtp' is unknown; did you mean 'dpt'?"),
        ({"objective": "hard-neg", "grounding": "x"}, "--grounding is of --objective dpt"),
        ({"objective": "hard-neg", "grounding_weights": [1.0]}, "--grounding-weights is of --obj"),
        ({"grounding_images": "x"}, "--grounding-images is of --grounding"),
        ({"grounding": "shapes", "data": "x"}, "--grounding shapes is of --data shapes: give a file"),
        ({"grounding": "shapes", "grounding_validation": "x"}, "--grounding shapes has its own"),
        (
            {"grounding": "x", "grounding_validation": "y", "validate_every": 0},
            "--grounding-validation y: --validate-every 0 measures none",
        ),
        (
            {"grounding": "x", "grounding_weights": [1.0, -5.0, 2.0]},
            "--grounding-weights 1 -5 2: must be four numbers of at least 0: classes, L1, GIoU",
        ),
    ],
)  # fmt: skip
def test_problems_of_options(options: dict[str, Any], told: str) -> None:
    config = FinetuneConfig(**{"objective": "dpt", "model": "shapes", "data": "shapes"} | options)
    assert any(told in problem for problem in find_problems(config)), find_problems(config)


def test_a_tuned_adapter_is_no_probe(folder: Path, tmp_path: Path) -> None:
    save_weights(dpt(folder, rank=2).weights(), str(tmp_path), "up1", 2)
    config = FinetuneConfig(
        objective="dpt", model="shapes", data="shapes", stage="tune", adapter=str(tmp_path)
    )
    assert find_problems(config) == [
        f"--adapter {tmp_path}: was tuned with a LoRA already; give a probe's"
    ]
