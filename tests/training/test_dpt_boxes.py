"""DPT's boxes in its update step, against plain code, and where they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffitm.commands import grounding
from diffitm.core.errors import InputError
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.training.dpt.expressions import GroundingWeights
from diffitm.training.dpt.step import Dpt
from diffitm.training.dpt.weights import save_weights
from diffitm.training.lora.options import FinetuneConfig, find_problems
from diffitm.training.lora.step import Posterior
from diffitm.training.sampler import draw_noise
from tests import plain_dpt, plain_grounding
from tests.dpt_parts import SAID, SHAPE, dpt, items, posteriors

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
    sd_folder: Path, name: str, tunes: bool, which: list[int]
) -> None:
    """Beside matching: an image with its expression, of those that have one. The plain code has all hundred
    and ten queries in one sequence, as published."""
    weights = GroundingWeights()
    made, own = dpt(sd_folder, name, 2 if tunes else None, True, grounding=weights), posteriors()
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


def test_without_expressions_nothing_is_of_boxes(sd_folder: Path) -> None:
    """The loss is that of matching; of an adapter that has learned boxes and is tuned without them what is of
    boxes stays as it is."""
    made = dpt(sd_folder, boxes=True, grounding=GroundingWeights())
    found = made.losses(items(), *posteriors(), [None, None])
    assert found.grounding is None
    torch.testing.assert_close(found.loss.detach(), found.of_texts + found.of_images)
    plain = dpt(sd_folder, rank=2, boxes=True)
    assert made.adapter.grounding is not None and plain.adapter.grounding is not None
    frozen = {id(p) for p in plain.adapter.grounding.parameters()}
    assert frozen and not frozen & {id(p) for p in plain.parameters}
    plain.losses(items(), *posteriors()).loss.backward()
    assert all(p.grad is not None for p in plain.parameters)


def test_boxes_begin_with_a_probe_that_learned_them(sd_folder: Path, tmp_path: Path) -> None:
    """Another probe's adapter has no heads for them; one with heads is tuned with boxes and without."""
    said: dict[str, Any] = {
        "objective": "dpt",
        "model": "shapes",
        "data": "shapes",
        "stage": "tune",
    }
    for boxes, told in ((False, 1), (True, 0)):
        adapter = str(tmp_path / str(boxes))
        save_weights(dpt(sd_folder, boxes=boxes).weights(), adapter, "up1", 4)
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
