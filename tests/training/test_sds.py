"""The update step of SDS-CLIP against plain code, its options, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from diffitm.commands import sds as command
from diffitm.commands.workers.sds import SdsModule
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.distributed.trainer import hand_over
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.clip_export import write_open_clip, write_transformers
from diffitm.models.denoiser import Denoiser
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.noise_schedule import PREDICTIONS, FlowSchedule, NoiseSchedule
from diffitm.training.diva.options import DivaConfig, find_problems
from diffitm.training.diva.sds import SdsClip, contrastive, load_norms, norms_of
from diffitm.training.job import SdsJob
from diffitm.training.module import Worker
from diffitm.training.rows import TrainingRow
from tests import tiny_clip
from tests.tiny import write_dit, write_sd

CAPTIONS = ["a red square", "a blue circle", "a red circle"]
SEEDS = [1, 2, 3]
GIVEN = DivaConfig(clip="shapes", teacher="shapes", data="shapes", objective="sds-clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Denoiser:
    return load_denoiser(resolve(str(folder)))


def resnet() -> Any:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": tiny_clip.TEXT}
    return tiny_clip.build(config)


CLIPS = {"vit": tiny_clip.vit, "siglip": tiny_clip.siglip, "resnet": resnet}


def sds(teacher: Denoiser, clip: Any = None, weight: float = 0.5, **more: Any) -> SdsClip:
    return SdsClip(clip or tiny_clip.vit(), open_clip.get_tokenizer("ViT-B-32", context_length=16),
                   teacher, weight, **more)  # fmt: skip


def pixels(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def plain_contrast(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    n, total = len(images), torch.zeros(())
    for i in range(n):
        by_text = [torch.dot(images[i], b) / images[i].norm() / b.norm() for b in texts]
        by_image = [torch.dot(texts[i], b) / texts[i].norm() / b.norm() for b in images]
        for row in (by_text, by_image):
            total = total + torch.log(sum(torch.exp(scale * c) for c in row)) - scale * row[i]
    return total / (2 * n)


def test_the_contrastive_loss_is_its_formula() -> None:
    images, texts = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    texts.requires_grad_()
    found = contrastive(images, texts, torch.tensor(5.0))
    plain = plain_contrast(images, texts, 5.0)
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        torch.autograd.grad(found, [images, texts]),
        torch.autograd.grad(plain, [images, texts]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert contrastive(images[:1], texts[:1], torch.tensor(5.0)).item() == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_noise_that_a_prediction_means(prediction: str) -> None:
    """The target of every kind of prediction means the noise itself."""
    schedule: Any = FlowSchedule()
    if prediction != "flow":
        schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.99, 0.01, 10), prediction)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([1, 5, 9])
    noised, target = schedule.add_noise(latents, noise, at), schedule.target(latents, noise, at)
    torch.testing.assert_close(schedule.noise(noised, target, at), noise, atol=1e-4, rtol=1e-4)


def plain_error(teacher: Any, latents: Tensor, caption: str, seed: int) -> tuple[Tensor, ...]:
    """Of one image, from diffusers' U-Net: the error, z_t and what is wrong with the noise."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1000, (1,), generator=generator)
    noise = torch.randn(1, *teacher.latent_shape, generator=generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[step].float()
    noised = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    hidden = teacher.encode_texts([caption])["hidden"].clone()
    wrong = teacher.unet(noised, step, hidden).sample - noise
    return (wrong**2).mean(), noised, wrong, abar.sqrt()


@pytest.mark.parametrize("jacobian", [True, False])
def test_errors_and_gradients_equal_plain_code(teacher: Denoiser, jacobian: bool) -> None:
    """One image at a time; without the Jacobian the gradient of z_t is 2 (eps_hat - eps) / (C h w)."""
    made = sds(teacher, jacobian=jacobian)
    embedding = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = made.errors(embedding, CAPTIONS, SEEDS)
    (slope,) = torch.autograd.grad(found.sum(), [embedding])
    weight, bias = made.projection.weight, made.projection.bias
    for i in range(3):
        latents = (weight @ embedding[i] + bias).view(1, *teacher.latent_shape)
        error, noised, wrong, signal = plain_error(teacher, latents, CAPTIONS[i], SEEDS[i])
        torch.testing.assert_close(found[i], error, atol=1e-5, rtol=1e-4)
        (plain,) = torch.autograd.grad(error, [embedding], retain_graph=True)
        if not jacobian:
            by_latents = signal.view(1, 1, 1, 1) * 2 * wrong.detach() / noised.numel()
            plain = torch.zeros_like(plain)
            plain[i] = weight.T @ by_latents.flatten()
        torch.testing.assert_close(slope[i], plain[i], atol=1e-6, rtol=1e-3)
    assert slope.norm() > 1e-4


def test_without_the_jacobian_the_network_is_passed_by(teacher: Denoiser) -> None:
    """Its gradient is another one than the equation's."""
    slopes = []
    for jacobian in (True, False):
        made = sds(teacher, jacobian=jacobian)
        embedding = torch.ones(3, 24, requires_grad=True)
        made.errors(embedding, CAPTIONS, SEEDS).sum().backward()
        slopes.append(embedding.grad)
    assert not torch.allclose(*slopes, rtol=0.1)  # type: ignore[misc]


def module_of(
    tmp_path: Path, folder: Path, weight: float, clip: str = "", **more: Any
) -> tuple[SdsModule, list[Any]]:
    """A module of one worker and its update of 2 micro-batches of 2 rows."""
    rows = []
    (tmp_path / "images").mkdir(exist_ok=True)
    for i, image in enumerate(pixels(4)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
        rows.append(TrainingRow(f"{i}.png", [*CAPTIONS, "a green square"][i]))
    written = clip or str(tiny_clip.write(tmp_path / "clip", tiny_clip.vit_config()))
    job = SdsJob(
        source=resolve(str(folder)), variant=None, dtype="fp32", rows=hand_over(
            str(tmp_path / "out"), rows, range(4)
        ), root=str(tmp_path / "images"), micro_batch_size=2, grad_accum_steps=2, steps=1,
        optimizer="sgd", lr=1.0, lr_scheduler="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1e9, checkpointing=False, seed=0, checkpoint_every=1, log_every=1,
        validation=None, latents=None, clip=resolve_clip(written), projection_lr=1.0, weight=weight,
        jacobian=True,
    )  # fmt: skip
    module = SdsModule(replace(job, **more), Worker(0, 1, torch.device("cpu"), 1.0, None))
    batches = [
        (
            items,
            {
                item.image: [pixels(4)[int(item.image[0])].permute(1, 2, 0).numpy()]
                for item in items
            },
        )
        for items in job.sampler().batches(0)
    ]
    return module, batches


def update_of(module: SdsModule, batches: list[Any]) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
    """What is logged of each micro-batch, and the update's gradients."""
    module.gather(batches)
    logged = []
    for items, images in batches:
        ((loss, values),) = module.losses(items, images)
        (loss / module.job.grad_accum_steps).backward()
        logged.append(values)
    return logged, [p.grad for part, _ in module.groups for p in part]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_update_is_that_of_all_its_examples(tmp_path: Path, folder: Path, weight: float) -> None:
    """The contrast is over both micro-batches: loss and gradients as if they were one."""
    module, batches = module_of(tmp_path, folder, weight)
    logged, gradients = update_of(module, batches)
    gradients = [gradient.clone() for gradient in gradients]
    made, parameters = module.sds, [p for part, _ in module.groups for p in part]
    items = [item for some, _ in batches for item in some]
    images, texts = [], []
    for item in items:
        pixel = pixels(4)[int(item.image[0])][None]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in made.clip.visual.preprocess_cfg.values()
                     if isinstance(v, tuple | list) and len(v) == 3)  # fmt: skip
        images.append(made.clip.encode_image((pixel / 255 - mean) / std)[0])
        texts.append(made.clip.encode_text(made.tokenizer([item.caption]))[0])
    scale = float(made.clip.logit_scale.exp())
    contrast = plain_contrast(torch.stack(images), torch.stack(texts), scale)
    loss, errors = contrast, torch.zeros(())
    if weight:
        weights = made.projection.weight, made.projection.bias
        for item, image in zip(items, images, strict=True):
            latents = (weights[0] @ image + weights[1]).view(1, *made.teacher.latent_shape)
            errors = errors + plain_error(made.teacher, latents, item.caption, item.seed)[0] / 4
        loss = loss + weight * errors
    plain = torch.autograd.grad(loss, parameters)
    for found, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    means = [sum(float(v) for v in column) / 2 for column in zip(*logged, strict=True)]
    told = [loss, contrast, errors] if weight else [loss]
    assert means == pytest.approx([float(v.detach()) for v in told], rel=1e-4)
    assert len(module.names) == len(means)


@pytest.mark.parametrize("kind", CLIPS)
def test_norms_learn_and_nothing_else(teacher: Denoiser, kind: str) -> None:
    """Layer norms of both towers, batch norms of a ResNet, whose statistics stay; the projection."""
    clip = CLIPS[kind]()
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    made = sds(teacher, clip)
    trained = set(norms_of(clip))
    assert {n.split(".")[0] for n in trained} >= {"visual"} and len(trained) < len(before)
    if kind == "resnet":
        assert "visual.bn1.weight" in trained and "visual.layer1.0.bn1.bias" in trained
    image, text = made.embed(pixels(), CAPTIONS)
    made.errors(image, CAPTIONS, SEEDS).mean().backward(retain_graph=True)
    by_error = {n for n, p in clip.named_parameters() if p.grad is not None and p.grad.any()}
    assert by_error and all(n.startswith("visual.") for n in by_error)
    contrastive(image, text, torch.tensor(5.0)).backward()
    learned = {n for n, p in clip.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == trained
    assert all(p.grad is not None and p.grad.any() for p in made.projection.parameters())
    parts = (teacher.unet, teacher.vae, teacher.text_encoder)  # type: ignore[attr-defined]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    with torch.no_grad():
        for parameter in made.parts()[0]:
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    changed = {k for k, v in clip.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == trained


def test_a_weight_of_zero_leaves_the_projection(tmp_path: Path, folder: Path) -> None:
    """The control: no denoising, and the projection is no part of what learns."""
    module, batches = module_of(tmp_path, folder, 0.0)
    (norms, _), *others = module.groups
    assert others == [] and len(norms) == len(module.sds.norms)
    update_of(module, batches)
    assert all(p.grad is None for p in module.sds.projection.parameters())


def test_weights_go_around(teacher: Denoiser, tmp_path: Path) -> None:
    """Into another SdsClip, and as stock open_clip's and transformers' files."""
    folder = tiny_clip.write(tmp_path / "clip", tiny_clip.vit_config())
    source = resolve_clip(str(folder))
    one, two = sds(teacher, load_clip(source).model), sds(teacher, load_clip(source).model, seed=1)
    with torch.no_grad():
        for parameter in one.parts()[0]:
            parameter += 0.1 * torch.randn(parameter.shape)
    image, _ = one.embed(pixels(), CAPTIONS)
    assert not torch.allclose(two.embed(pixels(), CAPTIONS)[0], image, atol=1e-3)
    two.load(one.weights())
    torch.testing.assert_close(two.embed(pixels(), CAPTIONS)[0], image)
    given = (image.detach(), CAPTIONS, SEEDS)
    torch.testing.assert_close(two.errors(*given), one.errors(*given))
    save_file(one.weights(), tmp_path / "w.safetensors")
    tuned = load_clip(source).model
    load_norms(tuned, load_file(tmp_path / "w.safetensors"))
    out = str(tmp_path / "out")
    write_open_clip(tuned, source, out)
    assert write_transformers(tuned, source, f"{out}/transformers") is None
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs = CLIPModel.from_pretrained(f"{out}/transformers")
    normal = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = one.clip.encode_image(normal)
        torch.testing.assert_close(
            stock.eval().encode_image(normal), expected, atol=1e-5, rtol=1e-5
        )
        found = theirs.get_image_features(normal).pooler_output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        tokens = one.tokenizer(CAPTIONS)
        torch.testing.assert_close(stock.encode_text(tokens), one.clip.encode_text(tokens))


def test_weights_of_another_width(teacher: Denoiser) -> None:
    weights = sds(teacher, tiny_clip.vit(embed_dim=16)).weights()
    with pytest.raises(InputError, match=r"embeddings of 16 into latents of 256; here they are 24"):
        sds(teacher).load(weights)


def test_towers_of_two_widths(teacher: Denoiser) -> None:
    clip = tiny_clip.vit()
    clip.text_projection = torch.nn.Parameter(torch.randn(16, 20))
    with pytest.raises(InputError, match="images have embeddings of 24, its texts of 20"):
        sds(teacher, clip)


def test_a_teacher_of_classes_knows_no_captions(tmp_path: Path) -> None:
    dit = write_dit(tmp_path / "dit")
    with pytest.raises(InputError, match="teacher: cannot be told of captions: the text names no"):
        module_of(tmp_path, dit, 0.5)


def test_data_without_captions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    config = replace(GIVEN, data=str(tmp_path / "images"), out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"a\.png|caption|text"):
        command.build_plan(config)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--recap", "all"], "--recap all: only diva takes it, not sds-clip"),
        (["--crop-scale", "1"], "--crop-scale 1.0: only diva takes it"),
        (["--cache-latents"], "--cache-latents True: only diva takes it"),
        (["--effective-batch", "1"], "--effective-batch 1: sds-clip contrasts an update's"),
        (["--control", "--lambda", "0"], "--control: is the run with --lambda 0 itself"),
        (["--lambda", "-1"], "--lambda -1.0: must be at least 0"),
        (["--objective", "diva", "--no-jacobian"], "--jacobian False: only sds-clip takes it"),
        (["--objective", "diva", "--control"], "--control True: only sds-clip takes it, not diva"),
    ],
)
def test_problems(options: list[str], problem: str) -> None:
    given = ["--preset", "sds-shapes", *options]
    if "diva" in options:
        given = ["--clip", "shapes", "--teacher", "shapes", "--data", "shapes", *options]
    (found,) = find_problems(parse(DivaConfig, given))
    assert problem in found


def test_the_control_is_the_same_but_for_lambda() -> None:
    config = parse(DivaConfig, ["--preset", "sds-shapes", "--control", "--out", "out/x/"])
    control = command.control_of(config)
    assert (control.lambda_, control.control, control.out) == (0, False, "out/x-control")
    assert replace(control, lambda_=config.lambda_, control=True, out="out/x/") == config


def test_before_and_after_as_a_table(tmp_path: Path) -> None:
    for name, after in (("a", 0.75), ("b", 0.5)):
        (tmp_path / name).mkdir()
        lines = ['{"step": 0, "accuracy/x": 0.25}', '{"step": 1, "loss": 3}']
        (tmp_path / name / "log.jsonl").write_text(
            "\n".join([*lines, f'{{"step": 2, "accuracy/x": {after}}}'])
        )
    table = command.before_after({n: str(tmp_path / n) for n in "ab"})
    assert table.splitlines()[0].endswith("| before | a | b |")
    assert table.splitlines()[2] == "| x | 25.0 | 75.0 | 50.0 |"
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 1, "loss": 3}')
    assert command.before_after({"a": str(tmp_path / "a")}) == ""
