"""The update step of DIVA, its options, and what does not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.clip_tokens import (
    find_tower,
    image_side,
    patch_features,
    patch_grid,
    visual_tokens,
)
from diffitm.models.denoiser import Denoiser
from diffitm.models.loading import load_denoiser, resolve
from diffitm.training.diva.options import DivaConfig, find_problems, micro_batch
from diffitm.training.diva.recap import parse_recap
from diffitm.training.diva.reconstructions import row_of_pictures, write_pictures
from diffitm.training.diva.step import Diva, load_tower
from diffitm.training.lora.step import Posterior
from diffitm.training.run_folder import open_run, release_on_refusal
from diffitm.training.sampler import seed_of
from tests import tiny, tiny_clip
from tests.tiny import write_dit, write_sd, write_sdxl

RECAPS = ("class-only", "random:0.5", "random:0.5:replaced", "pool:3", "all")
TEACHERS = {"sd": write_sd, "sdxl": write_sdxl, "dit": write_dit}
CLIPS = {"vit": tiny_clip.vit, "siglip": tiny_clip.siglip}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Denoiser:
    return load_denoiser(resolve(str(folder)))


def diva(teacher: Denoiser, clip: Any = None, recap: str = "random:0.5", **more: Any) -> Diva:
    return Diva(clip or tiny_clip.vit(), "tiny", teacher, parse_recap(recap), **more)


def batch(teacher: Denoiser, count: int = 3) -> tuple[Tensor, Posterior]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mean, deviation = teacher.encode_posterior(pixels.float() / 127.5 - 1)
    return pixels, Posterior(mean.clone(), deviation.clone())


@pytest.mark.parametrize("kind", CLIPS)
def test_tokens_begin_with_the_embedding(kind: str) -> None:
    """open_clip's own, and the patches come through the same norm and projection."""
    clip = CLIPS[kind]()
    tower, pixels = find_tower(clip, kind), torch.randn(2, 3, 32, 32)
    tokens = visual_tokens(tower, pixels)
    assert image_side(tower) == 32 and patch_grid(tower) == (4, 4)
    assert tokens.shape[:2] == (2, 17)
    torch.testing.assert_close(tokens[:, 0], clip.encode_image(pixels))
    features = patch_features(tower, pixels)
    assert features.shape[:3] == (2, 4, 4)
    patches = features.flatten(1, 2)
    if kind == "vit":
        patches = patches @ tower.proj
    torch.testing.assert_close(tokens[:, 1:], patches)


def test_towers_without_dense_tokens() -> None:
    text = tiny_clip.TEXT
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    with pytest.raises(InputError, match="clip 'rn': has no dense tokens here; a ViT"):
        find_tower(model, "rn")


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("recap", RECAPS)
def test_gradients_reach_the_tower_and_nothing_else(
    teacher: Denoiser, kind: str, recap: str
) -> None:
    clip = CLIPS[kind]()
    found = diva(teacher, clip, recap)
    for loss, _ in found.losses(*batch(teacher), [1, 2, 3]):
        loss.backward()
    untouched = [n for n, p in found.tower.named_parameters() if p.grad is None or not p.grad.any()]
    # The bias of keys moves all of a softmax's inputs alike: its gradient is 0 but for rounding.
    assert untouched == []
    assert all(p.grad is not None and p.grad.any() for p in found.projection.parameters())
    parts = (teacher.unet, teacher.vae, teacher.text_encoder)  # type: ignore[attr-defined]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    visual = set(map(id, clip.visual.parameters()))
    assert all(p.grad is None for p in clip.parameters() if id(p) not in visual)


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_kind_of_teacher(tmp_path: Path, kind: str) -> None:
    """Each is told of the image, its error reaches all that is trained, and it draws pictures."""
    teacher = load_denoiser(resolve(str(TEACHERS[kind](tmp_path)), "--teacher"))
    found = diva(teacher)
    pixels, posterior = batch(teacher)
    errors = found.errors(pixels, posterior, [1, 2, 3])
    assert not torch.allclose(errors, found.errors(pixels, posterior, [1, 2, 3], blind=True))
    errors.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in found.parameters)
    first = Posterior(posterior.mean[:1], posterior.std[:1])
    columns = row_of_pictures(found, pixels[:1], first, 1)
    assert all(c.shape == (3, 32, 32) and c.abs().max() <= 1 for c in columns)


def test_loss_is_the_mean_squared_error_of_the_noise(teacher: Denoiser) -> None:
    """Against diffusers' U-Net and a condition made by hand."""
    found = diva(teacher, recap="all", prompt="a red square", repeats=1)
    pixels, posterior = batch(teacher, 1)
    noised, at, target = plain_noised(teacher, posterior, 5)
    hidden = teacher.encode_texts(["a red square"])["hidden"].clone()
    tokens = visual_tokens(found.tower, found.normalised(pixels))
    condition = hidden.mean(1, keepdim=True) + found.projection(tokens)
    unet: UNet2DConditionModel = teacher.unet  # type: ignore[attr-defined]
    expected = ((unet(noised, at, condition).sample - target) ** 2).mean()
    torch.testing.assert_close(found.errors(pixels, posterior, [5])[0], expected)
    blind = ((unet(noised, at, hidden).sample - target) ** 2).mean()
    torch.testing.assert_close(found.errors(pixels, posterior, [5], blind=True)[0], blind)


def plain_noised(
    teacher: Denoiser, posterior: Posterior, seed: int, at: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, timestep and noise of one image, from the draws of its seed in their order."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1000, (1,), generator=generator)
    noise, sample = torch.randn(2, 1, *teacher.latent_shape, generator=generator)
    step = step if at is None else torch.tensor([at])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[step].float()
    latents = posterior.mean + posterior.std * sample
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise, step, noise


def test_what_the_teacher_is_asked(teacher: Denoiser) -> None:
    """A sample of the posterior, noised to the timestep that the seed draws, or to a given one."""
    posterior = Posterior(batch(teacher, 1)[1].mean, torch.full((1, 4, 8, 8), 0.5))
    for given in (None, 300):
        found = diva(teacher).noised(posterior, [5], given)
        for ours, plain in zip(found, plain_noised(teacher, posterior, 5, given), strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_texts_meet_the_tokens(tmp_path: Path) -> None:
    """SDXL: the projected tokens and the text's in the hidden states, its pooled text unchanged."""
    teacher = load_denoiser(resolve(str(write_sdxl(tmp_path))))
    found = diva(teacher, recap="all", prompt="a red square")
    text = teacher.encode_texts(["a red square"])
    tokens = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    condition = found.condition(tokens, [1, 2])
    assert condition.keys() == {"hidden", "pooled"}
    torch.testing.assert_close(condition["pooled"], text["pooled"].repeat(2, 1))
    expected = found.projection(tokens) + text["hidden"][0].mean(0)
    torch.testing.assert_close(condition["hidden"], expected)
    blind = found.conditions(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [1, 2], blind=True)
    for name, value in text.items():
        torch.testing.assert_close(blind[name], value.expand_as(blind[name]))
        assert len(blind[name]) == 2


def test_an_image_is_independent_of_its_batch(teacher: Denoiser) -> None:
    found = diva(teacher)
    pixels, posterior = batch(teacher)
    together = found.errors(pixels, posterior, [1, 2, 3])
    alone = Posterior(posterior.mean[1:2], posterior.std[1:2])
    torch.testing.assert_close(found.errors(pixels[1:2], alone, [2])[0], together[1])


def test_repeats_draw_anew_and_are_reduced(teacher: Denoiser) -> None:
    """The mean, or the published code's five times the first plus the others."""
    given = (*batch(teacher), [1, 2, 3])
    mean = [(float(a.detach()), float(b)) for a, b in diva(teacher, repeats=2).losses(*given)]
    published = [
        (float(a.detach()), float(b))
        for a, b in diva(teacher, repeats=2, reduce="published").losses(*given)
    ]
    errors = [error for _, error in mean]
    assert errors[0] != errors[1] and errors == pytest.approx([e for _, e in published])
    for repeat, error in enumerate(errors):
        seeds = [seed_of(seed, "repeat", repeat) for seed in (1, 2, 3)]
        expected = diva(teacher).errors(*given[:2], seeds).mean()
        assert error == pytest.approx(float(expected.detach()), rel=1e-5)
    assert [loss for loss, _ in mean] == pytest.approx([e / 2 for e in errors])
    assert [loss for loss, _ in published] == pytest.approx([5 * errors[0], errors[1]])


def test_clip_gets_its_own_normalisation(teacher: Denoiser) -> None:
    """SigLIP's constants for SigLIP, and the teacher's pixels are not made of CLIP's."""
    pixels = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.all(diva(teacher, tiny_clip.siglip()).normalised(pixels) == 1)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = [(1 - m) / s for m, s in zip(mean, std, strict=True)]
    found = diva(teacher).normalised(pixels)[0, :, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weights_go_around(teacher: Denoiser) -> None:
    one, two = diva(teacher, seed=1), diva(teacher, tiny_clip.vit(seed=1), seed=2)
    given = (*batch(teacher), [1, 2, 3])
    assert not torch.allclose(one.errors(*given), two.errors(*given))
    two.load(one.weights())
    torch.testing.assert_close(one.errors(*given), two.errors(*given))
    other = tiny_clip.vit(seed=3)
    load_tower(other, one.weights())
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other.encode_image(pixels), one.clip.encode_image(pixels))  # type: ignore[operator]


def test_checkpointing_changes_no_gradient(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        teacher = load_denoiser(resolve(str(folder)))
        found = diva(teacher, checkpointing=checkpointing)
        assert found.tower.transformer.grad_checkpointing == checkpointing  # type: ignore[union-attr]
        for loss, _ in found.losses(*batch(teacher), [1, 2, 3]):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters]))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_a_checkpoint_for_another_image_size(tmp_path: Path, kind: str, ending: str) -> None:
    """open_clip would stretch the positions of its own ViT without a word."""
    config = tiny_clip.vit_config() if kind == "vit" else tiny_clip.siglip_config()
    written = tiny_clip.write(tmp_path / "clip", config)
    assert load_clip(resolve_clip(str(written))).model is not None
    file = written / "open_clip_model.safetensors"
    weights = load_file(file)
    name = "visual.positional_embedding" if kind == "vit" else "visual.trunk.pos_embed"
    axis = 0 if kind == "vit" else 1
    fewer = 3 * 3 + (kind == "vit")  # patches, and a class token
    weights[name] = weights[name].narrow(axis, 0, fewer).clone()
    save_file(weights, file)
    if ending == ".bin":
        file.unlink()
        torch.save(weights, written / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match=r"(?s)they are for another image size|size mismatch"):
        load_clip(resolve_clip(str(written)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(folder: Path, teacher: Denoiser, dtype: str) -> None:
    """The trained weights stay float32, and their gradients are nearly those of float32."""
    gradients = []
    for model in (teacher, load_denoiser(resolve(str(folder)), dtype)):
        found = diva(model, repeats=1)
        for loss, _ in found.losses(*batch(teacher), [1, 2, 3]):
            loss.backward()
        assert {p.dtype for p in found.parameters} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters]))  # type: ignore[union-attr]
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.99


def test_a_prompt_that_the_teacher_refuses(tmp_path: Path) -> None:
    teacher = load_denoiser(resolve(str(write_dit(tmp_path)), "--teacher"))
    with pytest.raises(InputError, match=r"prompt 'a photo of a .': the text names no class .*''"):
        diva(teacher, prompt="a photo of a .")


def test_tokens_one_to_one_need_as_many(teacher: Denoiser) -> None:
    """The tiny text has 16 tokens, the tiny CLIP 16 patches and the class token."""
    with pytest.raises(InputError, match=r"all has 17 tokens of 16 patches .* the text has 16"):
        diva(teacher, recap="all", add="tokens")
    found = diva(teacher, recap="random:0.94", add="tokens")
    assert torch.isfinite(found.errors(*batch(teacher), [1, 2, 3])).all()


def test_a_recap_that_keeps_nothing(teacher: Denoiser) -> None:
    with pytest.raises(InputError, match=r"random:0.05: keeps none of this CLIP's 16 patch tokens"):
        diva(teacher, recap="random:0.05")


def test_a_vae_of_another_latent_size(folder: Path) -> None:
    teacher = load_denoiser(resolve(str(folder)))
    teacher.latent_shape = (4, 16, 16)
    with pytest.raises(InputError, match=r"makes latents of \(4, 8, 8\) .* takes \(4, 16, 16\)"):
        diva(teacher)


def test_a_checkpoint_of_another_width(tmp_path: Path) -> None:
    written = tiny_clip.write(tmp_path / "clip", tiny_clip.vit_config(embed_dim=24))
    note = json.loads((written / "open_clip_config.json").read_text())
    note["model_cfg"]["embed_dim"] = 32
    (written / "open_clip_config.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match=r"(?s)cannot be loaded: .*size mismatch"):
        load_clip(resolve_clip(str(written)))


def test_images_that_are_no_squares(tmp_path: Path) -> None:
    """open_clip takes a side, or a list of two from JSON."""
    config = tiny_clip.vit_config()
    for sides in ([32, 32], [32, 40]):
        config["vision_cfg"]["image_size"] = sides
        folder = tiny_clip.write(tmp_path / str(sides[1]), config)
        tower = find_tower(load_clip(resolve_clip(str(folder))).model, "x")
        if sides == [32, 32]:
            assert image_side(tower) == 32
            continue
        with pytest.raises(InputError, match="images of 32 x 40 pixels, not squares"):
            image_side(tower)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_network_for_other_texts(tmp_path: Path, kind: str) -> None:
    folder = TEACHERS[kind](tmp_path)
    width = 40 if kind == "sd" else 48
    more = {} if kind == "sd" else tiny.sdxl_added()
    tiny.unet(cross_attention_dim=width, **more).save_pretrained(folder / "unet")
    with pytest.raises(InputError, match=rf"its U-Net takes {width}: parts of two models"):
        load_denoiser(resolve(str(folder)))


def test_pictures(teacher: Denoiser, tmp_path: Path) -> None:
    from PIL import Image

    pixels, posterior = batch(teacher, 1)
    found = diva(teacher, recap="all")
    with torch.no_grad():
        row = row_of_pictures(found, pixels, posterior, 1)
        noised, at, _ = plain_noised(teacher, posterior, 1, 700)
        signal, sigma = teacher.schedule.signal[700], teacher.schedule.sigma[700]
        expected = [pixels[0] / 127.5 - 1, teacher.decode(noised)[0]]
        tokens = visual_tokens(found.tower, found.normalised(pixels))
        for condition in (found.text, found.condition(tokens, [1])):
            clean = (noised - sigma * teacher.predict(noised, at, condition)) / signal
            expected.append(teacher.decode(clean)[0])
    for ours, plain in zip(row, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)
    assert (row[2] - row[3]).abs().max() > 1e-2
    values = [[-1.0, 0.0, 1.0], [1.5, -0.5, -2.0]]
    rows = [[torch.full((3, 32, 32), value) for value in line] for line in values]
    rows[1][1][1:] = 1.0  # red alone is darker
    write_pictures(rows, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert picture.shape == (2 * 96 + 4, 3 * 96 + 8, 3)
    bytes_ = [[0, 128, 255], [255, 64, 0]]
    for line, top in zip(bytes_, (0, 100), strict=True):
        for value, left in zip(line, (0, 100, 200), strict=True):
            cell = picture[top : top + 96, left : left + 96]
            assert (cell[..., 0] == value).all()
            assert (cell[..., 1:] == (255 if value == 64 else value)).all()
    assert (picture[96:100] == 255).all() and (picture[:, 96:100] == 255).all()


GIVEN = DivaConfig(clip="shapes", teacher="shapes", data="shapes")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"clip": ""}, "give --clip"),
        ({"teacher": ""}, "give --teacher"),
        ({"recap": "random:0"}, "--recap 'random:0'"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"crop_scale": 0.0}, "--crop-scale 0"),
        ({"crop_scale": 1.5}, "--crop-scale 1.5"),
        ({"cache_latents": True}, "add --crop-scale 1"),
        ({"workers": "4:x"}, "--workers 4:x: must be a number of processes, or MIN:MAX such as"),
        ({"workers": 0}, "--workers 0: must be a number"),
        ({"steps": 10, "epochs": 3.0}, "--epochs 3: --steps 10 decides"),
        ({"held_out": -1}, "--held-out -1"),
        ({"lr": 0.0}, "--lr 0"),
        ({"track": ["wandbb"]}, "--track wandbb"),
    ],
)
def test_problems(changed: dict[str, Any], problem: str) -> None:
    (found,) = find_problems(replace(GIVEN, **changed))
    assert problem in found


@pytest.mark.parametrize(
    ("workers", "effective", "most", "size"),
    [
        *((1, 32, 16, 16), (8, 32, 16, 4), (2, 40, 16, 10), (1, 7, 3, 1)),
        *((5, 32, 16, 4), ("1:8", 32, 16, 4), (64, 32, 16, 1)),
    ],
)
def test_micro_batches(workers: int | str, effective: int, most: int, size: int) -> None:
    """Any number of workers will do; where there are enough images, each has a micro-batch."""
    config = replace(GIVEN, workers=workers, effective_batch=effective, batch_size=most)
    assert find_problems(config) == []
    assert micro_batch(config) == size


OPENAI, META = ("openai", "tokens"), ("metaclip_fullcc", "mean")
WEBLI, DFN = ("webli", "mean"), ("dfn5b", "mean")
PUBLISHED = {  # of the paper and its code: model, (weights, how the text is added), recap
    "openai-224": ("ViT-L-14-quickgelu", OPENAI, "random:0.3:replaced"),
    "openai-336": ("ViT-L-14-336-quickgelu", OPENAI, "random:0.132:replaced"),
    "metaclip-l": ("ViT-L-14-quickgelu", META, "all"),
    "metaclip-h": ("ViT-H-14-quickgelu", META, "all"),
    "siglip-224": ("ViT-SO400M-14-SigLIP", WEBLI, "pool:6"),
    "siglip-384": ("ViT-SO400M-14-SigLIP-384", WEBLI, "pool:10"),
    "dfn-224": ("ViT-H-14-quickgelu", DFN, "all"),
    "dfn-378": ("ViT-H-14-378-quickgelu", DFN, "random:0.5:replaced"),
}


def test_presets_hold_what_was_published() -> None:
    assert DivaConfig.PRESETS.keys() == {"shapes", "sds-shapes", *PUBLISHED}
    for name, (model, (tag, add), recap) in PUBLISHED.items():
        config = parse(DivaConfig, ["--preset", name, "--data", "x"])
        assert (config.clip, config.add_prompt, config.recap) == (f"{model}:{tag}", add, recap)
        assert config.teacher == "stabilityai/stable-diffusion-2-1-base"
        assert (config.prompt, config.crop_scale) == ("a photo of a .", 0.9)
        assert (config.optimizer, config.lr, config.lr_schedule) == ("sgd", 1e-4, "cosine")
        assert (config.steps, config.warmup_steps, config.clip_norm) == (4600, 23, 1.0)
        assert (config.effective_batch, config.batch_size) == (640, 16)
        assert (config.repeats, config.repeats_reduce) == (2, "published")


def test_presets_are_plain_parameters() -> None:
    """Each a set of options that the command line can give, too."""
    for name, values in DivaConfig.PRESETS.items():
        given = [] if "data" in values else ["--data", "x"]
        config = parse(DivaConfig, ["--preset", name, *given])
        assert {key: getattr(config, key) for key in values} == values
        assert find_problems(config) == []
        model, _, tag = config.clip.partition(":")
        assert model == "shapes" or tag in open_clip.list_pretrained_tags_by_model(model), name


def test_a_refused_run_leaves_its_folder_to_others(tmp_path: Path) -> None:
    """But not once it has a checkpoint."""
    out = str(tmp_path)

    def refused(settings: dict[str, Any]) -> None:
        open_run(out, settings)
        with release_on_refusal(out):
            raise InputError("the recap does not fit")

    for recap in ("a", "b"):
        with pytest.raises(InputError, match="the recap does not fit"):
            refused({"pipeline": "diva.py", "recap": recap})
    state = tmp_path / "train" / "name" / "checkpoint_1" / "state.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    with pytest.raises(InputError, match="the recap does not fit"):
        refused({"pipeline": "diva.py", "recap": "b"})
    with pytest.raises(InputError, match=r"other settings \(recap was 'b' and is 'c'\)"):
        refused({"pipeline": "diva.py", "recap": "c"})


def test_a_folder_of_another_pipeline(tmp_path: Path) -> None:
    open_run(str(tmp_path), {"pipeline": "finetune.py", "lr": 1})
    with pytest.raises(InputError, match=r"holds a run of finetune.py: give another --out"):
        open_run(str(tmp_path), {"pipeline": "diva.py", "lr": 1})
