"""The linear segmentation probe: its data, its head, its counts, its intervals and what it finds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import interpolate

from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.metrics.intervals import BLOCK, RESAMPLES
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.clip_tokens import patch_features
from diffitm.probes import linear
from diffitm.probes.labelled import read_classes, read_mask, read_pair, read_split
from diffitm.probes.segmentation import (
    SegmentationResult,
    clip_encoder,
    evaluate,
    interval,
    paired,
    probe,
)
from diffitm.shapes.drawing import World
from diffitm.shapes.masks import CLASSES, draw_mask, write_masks
from diffitm.shapes.world import SIZE, render, sample_scene
from tests import tiny_clip

SCENES = 100
GREY = np.full((8, 12, 3), 128, np.uint8)
EMPTY = np.zeros((8, 12), np.uint8)


def save(root: Path, split: str, name: str, pixels: np.ndarray, mask: np.ndarray | None) -> None:
    for kind, values in (("images", pixels), ("masks", mask)):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
        if values is not None:
            Image.fromarray(values).save(root / split / kind / f"{name}.png")


def two_halves(root: Path) -> None:
    """Black to the left of somewhere is class 0, white class 2; the last row is ignored."""
    for split in ("train", "val"):
        for number in range(6):
            pixels, mask = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40), np.uint8)
            pixels[:, 10 * (number % 3 + 1) :], mask[:, 10 * (number % 3 + 1) :] = 255, 2
            mask[-1] = 255
            save(root, split, str(number), pixels, mask)


def mean_colour(pictures: Sequence[Image.Image]) -> Tensor:
    """The mean of each of 2 x 4 patches, [B, 2, 4, 1]."""
    pixels = np.stack([images.to_pixels(picture, 32, "squash") for picture in pictures])
    means = pixels.reshape(len(pixels), 2, 16, 4, 8, 3).mean((2, 4, 5))
    return torch.from_numpy(means).float()[..., None]


def raw_patches(pictures: Sequence[Image.Image]) -> Tensor:
    """Pixels as the embedded CLIP's patches hold them, [B, 8, 8, 48]."""
    pixels = np.stack([images.to_pixels(picture, 32, "squash") for picture in pictures])
    cut = pixels.reshape(len(pixels), 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(cut.reshape(len(pixels), 8, 8, 48) / np.float32(255))


def result(
    seed: int, number: int = 30, quality: float = 0.7, name: str = "x"
) -> SegmentationResult:
    """Random confusion matrices of images of 200 pixels; labels are the same for every seed."""
    labels = np.random.default_rng(0).integers(0, 4, (number, 200))
    rng = np.random.default_rng([1, seed])
    guesses = np.where(rng.random(labels.shape) < quality, labels, rng.integers(0, 4, labels.shape))
    matrices = np.zeros((number, 4, 4), int)
    np.add.at(matrices, (np.arange(number)[:, None], labels, guesses), 1)
    counts = (matrices.diagonal(axis1=1, axis2=2), matrices.sum(1), matrices.sum(2))
    return SegmentationResult(name, list("abcd"), [str(i) for i in range(number)], *counts)


# Data


def test_split_pairs_images_with_masks(tmp_path: Path) -> None:
    save(tmp_path, "val", "b", GREY, EMPTY)
    save(tmp_path, "val", "a", GREY, EMPTY)
    Image.fromarray(GREY).save(tmp_path / "val/images/c.d.jpg")
    Image.fromarray(EMPTY).save(tmp_path / "val/masks/c.d.png")
    (tmp_path / "val/images/notes.txt").write_text("")
    pairs = read_split(tmp_path.as_uri(), "val")
    expected = [("a.png", "a.png"), ("b.png", "b.png"), ("c.d.jpg", "c.d.png")]
    assert pairs == [(f"val/images/{i}", f"val/masks/{m}") for i, m in expected]
    image, mask = read_pair(tmp_path.as_uri(), pairs[0])
    assert (image.size, mask.shape) == ((12, 8), (8, 12))


def test_palette_masks_give_numbers(tmp_path: Path) -> None:
    mask = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12), "P")
    mask.putpalette([7] * 768)
    mask.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path), "m.png").ravel(), np.arange(96))


def test_classes(tmp_path: Path) -> None:
    two_halves(tmp_path)
    root = str(tmp_path)
    pairs = read_split(root, "train")
    assert read_classes(root, pairs) == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text('["sky", "sea", "land", "none"]')
    assert read_classes(root, pairs) == ["sky", "sea", "land", "none"]
    (tmp_path / "classes.json").write_text('["sky", "sea"]')
    with pytest.raises(
        InputError, match=r"masks/0\.png: class 2, but .*classes\.json names 2 \(0 to"
    ):
        read_classes(root, pairs)
    for text, message in (("{", "not JSON"), ("{}", "expected a list of class names, found {}")):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_classes(root, pairs)


def test_empty_split_and_image_without_mask(tmp_path: Path) -> None:
    two_halves(tmp_path)
    (tmp_path / "val/masks/3.png").unlink()
    with pytest.raises(InputError, match=r"val/images/3\.png has no mask: .*val/masks/3\.png"):
        evaluate(tiny_clip.vit(), "tiny", str(tmp_path))
    with pytest.raises(InputError, match=r"test/images holds no image"):
        read_split(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (GREY, r"masks/a\.png: a mask of mode RGB, expected one 8-bit class number"),
        (EMPTY[:, :6], r"masks/a\.png: 6x8, but its image has 12x8"),
        (b"<html>", r"masks/a\.png: unreadable mask: UnidentifiedImageError"),
    ],
)
def test_wrong_masks(tmp_path: Path, mask: Any, message: str) -> None:
    save(tmp_path, "train", "a", GREY, None if isinstance(mask, bytes) else mask)
    if isinstance(mask, bytes):
        (tmp_path / "train/masks/a.png").write_bytes(mask)
    with pytest.raises(InputError, match=message):
        read_pair(str(tmp_path), read_split(str(tmp_path), "train")[0])


def test_unreadable_image(tmp_path: Path) -> None:
    save(tmp_path, "train", "a", GREY, EMPTY)
    (tmp_path / "train/images/a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"images/a\.png: unreadable image: .*empty"):
        read_pair(str(tmp_path), read_split(str(tmp_path), "train")[0])


# Drawn scenes


def test_drawn_masks_are_exact() -> None:
    """A mask holds the pixels that the thing covers by more than half, as the picture shows."""
    rng = np.random.default_rng(5)
    for scene in (sample_scene(rng, 1) for _ in range(40)):
        (thing,) = scene.things
        picture, bare = render(scene).astype(float), render(replace(scene, things=())).astype(float)
        colour = picture[int(thing.y * SIZE), int(thing.x * SIZE)]
        full = np.abs(colour - bare).sum(-1)
        cover = np.abs(picture - bare).sum(-1) / full
        clear = (full > 100) & (np.abs(cover - 0.5) > 0.03)
        assert clear.mean() > 0.7
        expected = np.where(cover > 0.5, CLASSES.index(thing.shape), 0)
        np.testing.assert_array_equal(draw_mask(scene)[clear], expected[clear])


def test_masks_hold_every_thing() -> None:
    for scene in (World("", 0).scene(World("", 0).rng(k)) for k in range(20)):
        mask = draw_mask(scene)
        found = {CLASSES[mask[int(thing.y * SIZE), int(thing.x * SIZE)]] for thing in scene.things}
        assert found == {thing.shape for thing in scene.things}
        assert set(np.unique(mask)) == {0, *(CLASSES.index(shape) for shape in found)}


def test_written_scenes(tmp_path: Path) -> None:
    """The same from run to run, other scenes in val than in train, written once."""
    for name in ("one", "two"):
        write_masks(str(tmp_path / name), 5)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 22
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )
    assert json.loads((tmp_path / "one/classes.json").read_text()) == CLASSES
    drawn = [(tmp_path / "one" / f).read_bytes() for f in files if f.parent.name == "images"]
    assert len(set(drawn)) == 10
    image = tmp_path / "one/train/images/00000.png"
    image.unlink()
    write_masks(str(tmp_path / "one"), 5)
    assert not image.exists()
    write_masks(str(tmp_path / "one"), 6)
    assert image.exists()


# The head


def test_head_is_the_minimum() -> None:
    """Against scipy's optimiser on the objective written out, in float64."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    inputs = rng.normal(size=(200, 4)) * [1, 10, 0.1, 0] + labels[:, None] * [0.5, 3, 0.1, 0] + 5
    head = linear.fit(torch.from_numpy(inputs).float(), torch.from_numpy(labels), 3)
    scaled = (inputs - inputs.mean(0)) / [*inputs.std(0)[:3], 1]

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(4, 3), flat[12:]
        likelihood = log_softmax(scaled @ weight + bias, 1)[np.arange(200), labels]
        return -likelihood.mean() + linear.L2 / 2 * (weight**2).sum()

    found = minimize(objective, np.zeros(15), tol=1e-10).x
    np.testing.assert_allclose(head.weight, found[:12].reshape(4, 3), atol=5e-3)
    expected = log_softmax(scaled @ found[:12].reshape(4, 3) + found[12:], 1)
    logits = head(torch.from_numpy(inputs).float())
    np.testing.assert_allclose(log_softmax(logits.numpy(), 1), expected, atol=5e-3)
    assert np.abs(head.weight[3]).max() == 0  # the constant feature


@pytest.mark.parametrize("size", [(32, 48), (13, 7), (4, 6), (3, 2)])
def test_features_at_pixels_are_interpolated_features(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the head is trained on what its interpolated logits are made of."""
    features = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    scaled = interpolate(features.permute(2, 0, 1)[None], size, mode="bilinear")[0]
    found = linear.at_pixels(features, size, np.arange(size[0] * size[1]))
    torch.testing.assert_close(found, scaled.flatten(1).T, atol=1e-5, rtol=1e-5)
    weight, bias = torch.randn(5, 3), torch.randn(3)
    head = linear.Head(torch.zeros(5), torch.ones(5), weight, bias)
    logits = (features @ weight + bias).permute(2, 0, 1)[None]
    expected = interpolate(logits, size, mode="bilinear")[0].argmax(0)
    monkeypatch.setattr(linear, "CHUNK", 50)
    assert (head.predict(features, size) == expected.numpy()).mean() > 0.99


@pytest.mark.parametrize("build", [tiny_clip.vit, tiny_clip.siglip])
def test_encoder_squashes_and_normalises(build: Any) -> None:
    """With the model's own constants, which differ between the two."""
    model = build()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    config = model.visual.preprocess_cfg
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy((small - config["mean"]) / config["std"]).permute(2, 0, 1).float()
    with torch.no_grad():
        found = clip_encoder(model, "tiny", "cpu")([picture])
        torch.testing.assert_close(found, patch_features(model.visual, pixels[None]))
    assert found.shape == (1, 4, 4, 32)


# The result


def test_counts_and_ignored_pixels(tmp_path: Path) -> None:
    """Against a confusion matrix in plain loops; ignored pixels count nowhere."""
    two_halves(tmp_path)
    found = probe(mean_colour, "colour", str(tmp_path), batch_size=4)
    assert found.classes == ["0", "1", "2"]
    assert found.names == [f"val/images/{i}.png" for i in range(6)]
    assert found.labelled.sum(1).tolist() == [19 * 40] * 6
    assert found.predicted.sum(1).tolist() == [19 * 40] * 6
    assert found.miou > 0.9 and found.accuracy > 0.95
    assert np.isnan(found.iou[1])
    assert found.miou == pytest.approx((found.iou[0] + found.iou[2]) / 2)
    again = probe(mean_colour, "colour", str(tmp_path), batch_size=64)
    np.testing.assert_array_equal(found.correct, again.correct)


def test_iou_is_that_of_the_summed_confusion_matrix() -> None:
    """The mean leaves out a class that is predicted, but nowhere labelled."""
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 9, (5, 4, 4))
    matrices[:, 3] = 0
    counts = (matrices.diagonal(axis1=1, axis2=2), matrices.sum(1), matrices.sum(2))
    found = SegmentationResult("x", list("abcd"), list("01234"), *counts)
    total = matrices.sum(0)
    for k in range(3):
        union = total[k].sum() + total[:, k].sum() - total[k, k]
        assert found.iou[k] == pytest.approx(total[k, k] / union)
    assert found.predicted[:, 3].sum() > 0 and np.isnan(found.iou[3])
    assert found.miou == pytest.approx(found.iou[:3].mean())
    assert found.accuracy == pytest.approx(np.trace(total) / total.sum())


def test_nothing_but_ignored_pixels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path, split, "a", GREY, np.full((8, 12), 255, np.uint8))
    with pytest.raises(InputError, match="no pixel of train has a class"):
        probe(mean_colour, "colour", str(tmp_path))
    save(tmp_path, "train", "a", GREY, EMPTY)
    with pytest.raises(InputError, match="no pixel of val has a class"):
        probe(mean_colour, "colour", str(tmp_path))


def test_json() -> None:
    before = result(1)
    after = SegmentationResult.from_json(json.load(io.StringIO(json.dumps(before.to_json()))))
    assert (after.model, after.classes, after.names) == (before.model, before.classes, before.names)
    assert (after.miou, after.accuracy, after.images) == (before.miou, before.accuracy, 30)
    assert interval(after) == interval(before)


def test_interval_is_a_bootstrap_of_images() -> None:
    """Against resamples one by one, of the same draws."""
    found = result(1)
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES // BLOCK):
        for times in rng.multinomial(30, np.full(30, 1 / 30), size=BLOCK):
            drawn = np.repeat(np.arange(30), times)
            correct, predicted, labelled = (
                values[drawn].sum(0) for values in (found.correct, found.predicted, found.labelled)
            )
            means.append((correct / (predicted + labelled - correct)).mean())
    assert interval(found) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    low, high = interval(found)
    assert low < found.miou < high
    assert interval(result(1, number=1)) == (0.0, 1.0)


def test_perfect_results_have_an_interval() -> None:
    low, high = interval(result(1, quality=1.0))
    assert high == pytest.approx(1.0)
    assert 0.8 < low < 0.95  # Wilson's for 30 of 30


def test_paired() -> None:
    better, worse = result(1, quality=0.75), result(2, quality=0.7)
    same = paired(better, better)
    assert same == (0.0, 0.0, 0.0, 1.0)
    found, reverse = paired(better, worse), paired(worse, better)
    assert found.value == pytest.approx(better.miou - worse.miou)
    assert found.low < found.value < found.high
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))
    assert reverse.p == found.p
    assert (found.low > 0) == (found.p < 0.05)
    assert paired(result(1, quality=0.9), worse).p == pytest.approx(2 / (RESAMPLES + 1))
    assert paired(result(1), result(2)).p > 0.05
    assert paired(result(1, number=1), result(2, number=1))[1:] == (-1.0, 1.0, 1.0)


def test_pairing_narrows_the_interval() -> None:
    """Images are easy or hard for both, so the difference is surer than either value."""
    labels = np.full((40, 2), 100)
    shares = np.random.default_rng(0).uniform(20, 95, (40, 1)).astype(int)
    one, two = (
        SegmentationResult(name, ["a", "b"], [str(i) for i in range(40)], right, labels, labels)
        for name, right in (("one", np.repeat(shares + 3, 2, 1)), ("two", np.repeat(shares, 2, 1)))
    )
    low, high = interval(one)
    found = paired(one, two)
    assert found.high - found.low < (high - low) / 4
    assert found.p < 0.01


def test_other_images_cannot_be_paired() -> None:
    other = replace(result(2, name="second"), names=[f"n{i}" for i in range(30)])
    relabelled = replace(result(2, name="second"), labelled=result(1).labelled + 1)
    for second in (other, relabelled):
        with pytest.raises(InputError, match="'x' and 'second' cannot be compared"):
            paired(result(1), second)


# What it finds


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SegmentationResult]:
    """The embedded CLIP, one of the same form with random weights, and plain pixels."""
    root = str(tmp_path_factory.mktemp("masks"))
    write_masks(root, SCENES)
    untrained = tiny_clip.vit(patch_size=4, width=96, layers=3, head_width=24, embed_dim=64)
    return {
        "trained": evaluate(load_clip(resolve_clip("shapes")).model, "trained", root),
        "untrained": evaluate(untrained, "untrained", root),
        "pixels": probe(raw_patches, "pixels", root),
    }


def test_trained_features_know_more_of_shapes(measured: dict[str, SegmentationResult]) -> None:
    trained, untrained, pixels = (measured[name] for name in ("trained", "untrained", "pixels"))
    assert trained.classes == CLASSES
    background = trained.labelled[:, 0].sum() / trained.labelled.sum()
    chance = background / len(CLASSES)  # of everything as background
    assert trained.miou > max(untrained.miou, pixels.miou) > chance
    assert trained.miou < 0.5
    for other in (untrained, pixels):
        found = paired(trained, other)
        assert found.low > 0 and found.p < 0.05


def test_evaluation_is_deterministic(tmp_path: Path) -> None:
    write_masks(str(tmp_path), 10)
    first, second = (evaluate(tiny_clip.vit(), "tiny", str(tmp_path)) for _ in range(2))
    assert first.to_json() == second.to_json()
