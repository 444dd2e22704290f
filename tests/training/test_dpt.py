"""DPT's update step against plain code, where its gradients reach, its draws, options and files."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from diffitm.commands import finetune, grounding
from diffitm.commands.workers.dpt import ProbeModule, TuneModule
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.distributed.trainer import hand_over
from diffitm.models.denoiser import Condition
from diffitm.models.dpt import DptAdapter, load_adapter
from diffitm.models.dpt_file import LORA, AdapterShape, find_adapter, save_adapter
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.shapes.training import write_training
from diffitm.training.dpt import step
from diffitm.training.dpt.expressions import Expression, GroundingWeights
from diffitm.training.dpt.step import Dpt
from diffitm.training.dpt.weights import save_weights
from diffitm.training.job import DptJob
from diffitm.training.lora.options import FinetuneConfig, find_problems, negatives_of
from diffitm.training.lora.step import Posterior
from diffitm.training.rows import TrainingRow, drop_equal, read_rows, usable
from diffitm.training.sampler import BatchSampler, Item, draw_noise, images_in, seed_of
from tests import plain_dpt, plain_grounding, tiny
from tests.ranks import Ranks
from tests.training_runs import norm

SHAPE = (4, 8, 8)
CAPTIONS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"))


def items() -> list[Item]:
    return [
        Item(
            i, f"{i}", CAPTIONS[i], f"{i}-", CAPTIONS[(i + 1) % 3], seed_of("t", i),
            random_image=f"{i}+", random_caption=CAPTIONS[(i + 2) % 3],
        )
        for i in range(2)
    ]  # fmt: skip


def posteriors(count: int = 2) -> list[Posterior]:
    """Of the own, the hard and the random images."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(count, *SHAPE, generator=generator) for _ in range(6)]
    return [Posterior(draw[i], 0.1 * draw[i + 3].abs()) for i in range(3)]


def without_dropout(adapter: DptAdapter) -> DptAdapter:
    for module in adapter.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return adapter


def dpt(
    folder: Path, name: str = "up1", rank: int | None = None, boxes: bool = False, **options: Any
) -> Dpt:
    """On a tiny model; a LoRA's B starts at zero, where half of the gradients vanish."""
    channels = {"bottom0": 32, "mid": 64, "up0": 64, "up1": 32}[name]
    adapter = without_dropout(DptAdapter(AdapterShape(name, channels, tiny.WIDTH, boxes), 5))
    made = Dpt(StableDiffusion(str(folder)), adapter, rank, **options)
    for key, parameter in made.unet.named_parameters():
        if "lora_" in key:
            generator = torch.Generator().manual_seed(3)
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


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


SAID = [
    Expression(
        "0", "a red circle and a blue square", ((0.3, 0.4, 0.2, 0.3), (0.7, 0.6, 0.3, 0.2)),
        (((0, 12),), ((17, 30),)),
    ),
    Expression("1", "a green cross to the left", ((0.2, 0.5, 0.2, 0.2),), (((0, 13),),)),
]  # fmt: skip
TOKENS = [[[1, 2, 3], [5, 6, 7]], [[1, 2, 3]]]
LENGTHS = [9, 8]  # with the beginning and the end


def plain_boxes(made: Dpt, name: str, own: list[Posterior], which: list[int]) -> list[Tensor]:
    """The losses of boxes of these examples, one after the other."""
    assert isinstance(made.denoiser, StableDiffusion)
    model, state = made.denoiser, dict(made.adapter.named_parameters())
    examples = []
    for i in which:
        seed, said = items()[i].seed, SAID[i]
        drawn = draw_noise([seed], SHAPE, model.schedule)
        at = int(drawn.timesteps[0])
        clean = own[0].mean[i] + own[0].std[i] * drawn.posterior[0]
        noised = model.schedule.signal[at] * clean + model.schedule.sigma[at] * drawn.noise[0]
        hidden, _ = plain_dpt.encoded(model, said.caption)
        map, _ = plain_dpt.read(model, name, noised, at, hidden)
        read = plain_dpt.outputs(state, map, at)[10:]
        boxes = plain_dpt.linear(state, "grounding.of_boxes.0", read).relu()
        boxes = plain_dpt.linear(state, "grounding.of_boxes.2", boxes).relu()
        aligned = [
            plain_dpt.linear(state, f"grounding.of_{kind}", values)
            for kind, values in (("queries", read), ("tokens", hidden[0]))
        ]
        examples.append(
            (
                plain_dpt.linear(state, "grounding.of_classes", read),
                plain_dpt.linear(state, "grounding.of_boxes.4", boxes).sigmoid(),
                *(vectors / vectors.norm(dim=1, keepdim=True) for vectors in aligned),
                [torch.tensor(box) for box in said.boxes],
                TOKENS[i],
                LENGTHS[i],
            )
        )
    return list(plain_grounding.losses(examples))


@pytest.mark.parametrize(
    ("name", "tunes", "which"), [("up1", False, [0, 1]), ("mid", True, [1]), ("up1", True, [0, 1])]
)
def test_losses_with_boxes_equal_plain_code(
    folder: Path, name: str, tunes: bool, which: list[int]
) -> None:
    """Beside matching: an image with its expression, of those that have one. The plain code has all hundred
    and ten queries in one sequence, as published."""
    weights = GroundingWeights()
    made, own = dpt(folder, name, 2 if tunes else None, True, grounding=weights), posteriors()
    said = [SAID[i] if i in which else None for i in range(2)]
    found = made.losses(items(), *own, said)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters]
    latents = [[(p.mean[i], p.std[i]) for p in own] for i in range(2)]
    assert isinstance(made.denoiser, StableDiffusion) and found.grounding is not None
    state = dict(made.adapter.named_parameters())
    texts, images, error = plain_dpt.losses(made.denoiser, state, name, items(), latents)
    classes, l1, giou, alignment = plain_boxes(made, name, own, which)
    torch.testing.assert_close(found.grounding.giou, giou.detach(), rtol=1e-3, atol=1e-4)
    total = texts + images + classes + 5 * l1 + 2 * giou + alignment + (error if tunes else 0)
    torch.testing.assert_close(found.loss, total, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(total, made.parameters, allow_unused=True)
    for mine, plain in zip(gradients, expected, strict=True):
        assert (mine - plain).norm() < 2e-3 * plain.norm() + 1e-5


def test_without_expressions_nothing_is_of_boxes(folder: Path) -> None:
    """The loss is that of matching; of an adapter that has learned boxes and is tuned without them what is of
    boxes stays as it is."""
    made = dpt(folder, boxes=True, grounding=GroundingWeights())
    found = made.losses(items(), *posteriors(), [None, None])
    assert found.grounding is None
    torch.testing.assert_close(found.loss.detach(), found.of_texts + found.of_images)
    plain = dpt(folder, rank=2, boxes=True)
    assert made.adapter.grounding is not None and plain.adapter.grounding is not None
    frozen = {id(p) for p in plain.adapter.grounding.parameters()}
    assert frozen and not frozen & {id(p) for p in plain.parameters}
    plain.losses(items(), *posteriors()).loss.backward()
    assert all(p.grad is not None for p in plain.parameters)


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
    model, made = StableDiffusion(str(folder)), dpt(folder)
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
    made = Dpt(StableDiffusion(str(folder)), adapter)
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


def test_boxes_begin_with_a_probe_that_learned_them(folder: Path, tmp_path: Path) -> None:
    """Another probe's adapter has no heads for them; one with heads is tuned with boxes and without."""
    said: dict[str, Any] = {
        "objective": "dpt",
        "model": "shapes",
        "data": "shapes",
        "stage": "tune",
    }
    for boxes, told in ((False, 1), (True, 0)):
        adapter = str(tmp_path / str(boxes))
        save_weights(dpt(folder, boxes=boxes).weights(), adapter, "up1", 4)
        config = FinetuneConfig(**said, adapter=adapter, grounding="shapes")
        assert (
            find_problems(config)
            == [
                f"--grounding shapes: the probe of --adapter {adapter} learned no boxes; give one that was "
                "trained with --grounding, or leave it out"
            ][:told]
        )
        assert not find_problems(FinetuneConfig(**said, adapter=adapter))


def test_expressions_are_of_the_rows_images(tmp_path: Path) -> None:
    """Those of others are left out, and a file that has none of them is refused."""
    image = {"id": 1, "file_name": "a.jpg", "caption": "x", "width": 5, "height": 5}
    uri = tmp_path / "a.json"
    uri.write_text(
        json.dumps({"images": [image, image | {"id": 2, "file_name": "b.jpg"}], "annotations": []})
    )
    config = FinetuneConfig(objective="dpt", grounding=str(uri), grounding_images="coco")
    said = grounding.read(config, "/root", {"coco/b.jpg", "coco/c.jpg"})
    assert [one.image for one in said.train] == ["coco/b.jpg"] and said.check is None
    told = r"none of its images is one of the rows'; it has 'coco/a\.jpg' and they 'a\.jpg': --grounding-im"
    with pytest.raises(InputError, match=told):
        grounding.read(config, "/root", {"a.jpg"})
    both = replace(config, grounding_validation=str(uri))
    assert len(grounding.read(both, "/root", {"coco/a.jpg"}).check or ()) == 2


# Workers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dpt") / "data"
    write_training(str(root), 20)
    return root


def job(root: Path, adapter: Path | None = None, **more: Any) -> DptJob:
    config = FinetuneConfig(
        objective="dpt", model="shapes", batch_size=1, effective_batch=3, steps=2, lr=1e-3,
        checkpoint_every=100, log_every=1, stage="tune" if adapter else "probe",
        adapter=str(adapter) if adapter else None, grounding="shapes" if adapter else None,
    )  # fmt: skip
    rows, _ = drop_equal(read_rows(str(root / "coco_neg" / "train_neg_clip.tsv"))[0])
    file = hand_over(str(root.parent / "out"), rows, range(len(rows)))
    made = finetune._job(config, resolve("shapes"), "all", file, str(root), None, 0)
    assert isinstance(made, DptJob)
    if adapter is not None:
        images = {row.image for row in rows[1:]}  # an image without an expression trains, too
        said = grounding.read(config, str(root), images)
        data = grounding.handed_over(said, config, made, str(root.parent / "out"))
        made = replace(made, grounding=data)
    return replace(made, **more)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (AdapterShape("up1", 48, 768, True), "up1 of 48 channels and texts 768 wide; this model has 48 and 96"),
        (AdapterShape("up1", 32, 96), "up1 of 32 channels and texts 96 wide; this model has 48 and 96"),
        (AdapterShape("up3", 48, 96), "is an adapter of up3: the maps of this U-Net are bottom0, bottom1"),
    ],
)  # fmt: skip
def test_a_tuning_with_another_models_adapter(
    world: Path, tmp_path: Path, shape: AdapterShape, told: str
) -> None:
    """It is refused by the settings of the model, before anything is loaded."""
    save_adapter(DptAdapter(shape).state_dict(), shape, str(tmp_path), tuned=False)
    with pytest.raises(InputError) as caught:
        job(world, tmp_path)
    message = caught.value.on_command_line()
    assert message.startswith(f"--adapter '{tmp_path}'") and told in message, message


@pytest.fixture
def _own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, which share torch's generator as processes do not."""
    lock, plain = threading.Lock(), step.drawn_from

    @contextlib.contextmanager
    def alone(device: torch.device, seed: int) -> Iterator[None]:
        with lock, plain(device, seed):
            yield

    monkeypatch.setattr(step, "drawn_from", alone)


@pytest.mark.usefixtures("_own_draws")
@pytest.mark.parametrize("stage", ["probe", "tune"])
def test_on_any_number_of_workers_and_after_a_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The same losses and weights, with dropout, of a tuning with boxes; one group of two workers goes on
    from the checkpoint of another's."""
    kind, adapter = (ProbeModule, None) if stage == "probe" else (TuneModule, tmp_path)
    if adapter:
        channels = AdapterShape("up1", 48, 96, grounding=True)
        save_adapter(DptAdapter(channels, 2).state_dict(), channels, str(tmp_path), tuned=False)
    runs = []
    for name, groups in (("alone", [(1, 2)]), ("two", [(2, 1), (2, 2)])):
        (tmp_path / name).mkdir()
        ranks = Ranks(tmp_path / name, monkeypatch)
        for workers, steps in groups:
            made = job(world, adapter, steps=steps)
            assert ranks.train(kind, made, workers) == [steps] * workers
        runs.append(ranks)
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-4)
    ours, theirs = runs[1].weights(), runs[0].weights()
    assert norm({k: ours[k] - theirs[k] for k in theirs}) < 1e-4 * norm(theirs)
    has_lora = any(key.startswith("unet.") for key in ours)
    assert has_lora == (stage == "tune")
    has_boxes = "adapter.grounding.of_boxes.0.weight" in ours
    assert has_boxes == (stage == "tune")
    assert all(("of_giou" in line) == has_boxes for line in runs[1].monitor.lines)
