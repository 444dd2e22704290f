"""Boxes of phrases: MDETR's annotations, where a box is in what the model sees, and the losses against plain
code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffitm.core.errors import InputError
from diffitm.core.images import to_pixels
from diffitm.models.dpt import DptAdapter
from diffitm.models.dpt_file import AdapterShape
from diffitm.models.dpt_grounding import CLASSES, Boxes
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.shapes.drawing import World
from diffitm.shapes.masks import draw_mask
from diffitm.shapes.training import expressions, write_training
from diffitm.shapes.world import Scene, Thing, bounds
from diffitm.training.dpt import grounding
from diffitm.training.dpt.annotations import read_annotations
from diffitm.training.dpt.expressions import (
    Expression,
    ExpressionsFile,
    GroundingWeights,
    StoredExpressions,
    digest_of,
    seen_box,
    write_expressions,
)
from diffitm.training.dpt.grounding import Target, grounding_losses
from diffitm.training.dpt.locating import Locator, located
from diffitm.training.dpt.step import targets_of
from tests import plain_grounding, tiny

CAPTION = "a red circle to the left of a blue square"
BOXES = ((0.25, 0.5, 0.3, 0.4), (0.7, 0.5, 0.2, 0.3))
SPANS = (((0, 12),), ((28, 41),))

# Losses -------------------------------------------------------------------------------------------


def drawn(queries: int, counts: list[int], length: int = 8) -> tuple[list[Tensor], list[Target]]:
    """Leaves (logits, boxes before the sigmoid, vectors of queries and of tokens) and the boxes of examples,
    each named by one to three tokens of a text of six in `length`."""
    generator = torch.Generator().manual_seed(1)
    rows, leaves = len(counts), []
    for shape in ((queries, CLASSES), (queries, 4), (queries, 8), (length, 8)):
        leaves.append(torch.randn(rows, *shape, generator=generator).requires_grad_())
    targets = []
    for count in counts:
        boxes = 0.3 + 0.4 * torch.rand(count, 4, generator=generator)
        tokens = torch.zeros(count, length, dtype=torch.bool)
        for n in range(count):
            tokens[n, 1 + n : 2 + 2 * n] = True
        targets.append(Target(boxes, tokens, torch.arange(length) < 6))
    return leaves, targets


def found_of(leaves: list[Tensor]) -> tuple[Boxes, Tensor]:
    logits, boxes, queries, tokens = leaves
    made = Boxes(logits, boxes.sigmoid(), normalize(queries, dim=-1))
    return made, normalize(tokens, dim=-1)


@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0], [1], [3, 3]])
def test_losses_equal_plain_code(counts: list[int]) -> None:
    """Values and gradients, of examples with several boxes, one and none; padding counts nothing."""
    leaves, targets = drawn(5, counts)
    found, tokens = found_of(leaves)
    made = grounding_losses(found, tokens, targets, GroundingWeights(1, 5, 2, 3))
    plain = plain_grounding.losses(
        [
            (
                *(found.logits[i], found.boxes[i], found.aligned[i], tokens[i], list(t.boxes)),
                [row.nonzero()[:, 0].tolist() for row in t.tokens],
                6,
            )
            for i, t in enumerate(targets)
        ]
    )
    for mine, theirs in zip((made.classes, made.l1, made.giou, made.alignment), plain, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)
    total = plain[0] + 5 * plain[1] + 2 * plain[2] + 3 * plain[3]
    torch.testing.assert_close(made.total, total, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(made.total, leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(total, leaves, allow_unused=True)
    for leaf, one, two in zip(leaves, ours, theirs, strict=True):
        zero = torch.zeros_like(leaf)
        one, two = (zero if grad is None else grad for grad in (one, two))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    if not sum(counts):
        assert float(made.l1 + made.giou + made.alignment) == 0 < float(made.classes)


def test_a_value_that_is_not_finite_reaches_the_loss() -> None:
    """So that the run can say which rows it was of; the assignment does not fail before."""
    leaves, targets = drawn(5, [2])
    with torch.no_grad():
        leaves[1][0, 3, 0] = torch.nan
        leaves[0][:] = torch.nan
    found, tokens = found_of(leaves)
    assert grounding_losses(found, tokens, targets, GroundingWeights()).total.isnan()


def test_more_boxes_than_queries() -> None:
    """As many as there are queries are matched, each with another."""
    leaves, targets = drawn(3, [5], length=12)
    found, _ = found_of(leaves)
    query, box = grounding.match(found, 0, targets[0])
    assert sorted(query.tolist()) == [0, 1, 2] and len(set(box.tolist())) == 3


def test_tokens_of_phrases(sd: StableDiffusion) -> None:
    """Those whose characters a span has, whatever the text's case and spaces; none of what the model cuts;
    the classes are their places, all alike."""
    texts = [CAPTION, CAPTION.upper().replace(" ", "  "), f"{CAPTION} and {CAPTION}"]
    spans = [SPANS, (((0, 15),), ((36, 52),)), (((0, 12),), ((46, 58),), ((28, 41), (46, 52)))]
    said = [
        Expression("x.png", text, BOXES[:1] * len(own), own)
        for text, own in zip(texts, spans, strict=True)
    ]
    plain, loud, long = targets_of(sd, said)
    assert [row.nonzero()[:, 0].tolist() for row in plain.tokens] == [[1, 2, 3], [8, 9, 10]]
    assert torch.equal(plain.tokens[0], loud.tokens[0])
    assert plain.read.sum() == 12 and long.read.all()
    assert [row.sum() for row in long.tokens] == [3, 3, 5]
    assert plain.classes.shape == (2, CLASSES)
    assert plain.classes[1, 8:11].tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert plain.classes[1].sum() == pytest.approx(1, abs=1e-5)


def test_a_phrase_that_is_cut(sd: StableDiffusion) -> None:
    """Its box has no token; its query's loss of classes is 0, and nothing is divided by it."""
    text = f"{CAPTION} and {CAPTION} and a green cross"
    begin = text.index("a green")
    said = Expression("x.png", text, BOXES[:1], (((begin, len(text)),),))
    (target,) = targets_of(sd, [said])
    assert not target.tokens.any()
    leaves, _ = drawn(5, [1], length=16)
    found, tokens = found_of(leaves)
    made = grounding_losses(found, tokens, [target], GroundingWeights())
    assert made.total.isfinite() and made.alignment == 0 < made.l1


# Where a box is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("size", [(120, 60), (64, 100), (80, 80)])
def test_boxes_follow_the_picture(resize: str, size: tuple[int, int]) -> None:
    """A white box is where the white pixels are; None where there are none."""
    width, height = size
    for left, top, across, down in ((40, 20, 30, 25), (0, 0, 20, 20), (5, 40, 60, 20)):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top : top + down, left : left + across] = 255
        seen = to_pixels(Image.fromarray(pixels), 64, resize)[..., 0] > 127
        found = seen_box((left, top, across, down), size, resize)
        assert (found is None) == (not seen.any())
        if found is None:
            continue
        rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
        expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        x, y, w, h = (64 * value for value in found)
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        assert edges == pytest.approx(expected, abs=1.01)


def test_boxes_beyond_the_picture() -> None:
    assert seen_box((-10, 10, 30, 500), (40, 40), "squash") == (0.25, 0.625, 0.5, 0.75)
    assert seen_box((50, 10, 30, 5), (40, 40), "squash") is None
    assert seen_box((10, 10, 0, 5), (40, 40), "squash") is None
    assert seen_box((0, 0, 20, 20), (120, 40), "crop") is None
    assert seen_box((30, 0, 20, 20), (120, 40), "crop") == (0.125, 0.25, 0.25, 0.5)


# Annotations --------------------------------------------------------------------------------------


def image(**other: Any) -> dict[str, Any]:
    plain = {"id": 7, "file_name": "a.jpg", "caption": CAPTION, "width": 100, "height": 50}
    return plain | {"dataset_name": "refcoco", "tokens_positive_eval": [[[0, 12]]]} | other


def annotation(**other: Any) -> dict[str, Any]:
    plain = {"image_id": 7, "bbox": [10, 20, 30, 10], "tokens_positive": [[0, 12]]}
    return plain | {"id": 3, "area": 300, "iscrowd": 0, "category_id": 1} | other


def written(path: Path, images: Any, annotations: Any) -> str:
    path.write_text(json.dumps({"info": [], "images": images, "annotations": annotations}))
    return str(path)


def test_annotations(tmp_path: Path) -> None:
    """An expression an image; its boxes in the picture, without those of crowds and those outside."""
    uri = written(
        tmp_path / "a.json",
        [image(), image(id="8", file_name="b.jpg", caption="a red circle")],
        [
            annotation(),
            annotation(bbox=[60.5, 0, 60, 50], tokens_positive=[[28, 41], [2, 5]]),
            annotation(iscrowd=1),
            annotation(image_id="8", bbox=[200, 0, 5, 5]),
        ],
    )
    found = read_annotations(uri, "coco/train2014/", "squash", "grounding")
    assert found.outside == 1
    one, two = found.expressions
    assert one.image == "coco/train2014/a.jpg" and one.caption == CAPTION
    assert one.boxes == (
        pytest.approx((0.25, 0.5, 0.3, 0.2)),
        pytest.approx((0.8025, 0.5, 0.395, 1)),
    )
    assert one.spans == (((0, 12),), ((28, 41), (2, 5)))
    assert two == Expression("coco/train2014/b.jpg", "a red circle", (), ())
    cropped = read_annotations(uri, "", "crop", "grounding").expressions
    assert cropped[0].boxes[0] == pytest.approx((0.15, 0.5, 0.3, 0.2))


@pytest.mark.parametrize(
    ("images", "annotations", "told"),
    [
        ("x", [], "has no list 'images': MDETR's annotations have 'images' and 'annotations'"),
        ([image()], None, "has no list 'annotations'"),
        ([], [], "'images' is empty"),
        (["a.jpg"], [], 'images[0] is no object: "a.jpg"'),
        ([image(caption=" ")], [], 'images[0]: caption " ": must be a text'),
        ([image(caption="\ud800")], [], 'images[0]: caption "\\ud800": must be a text'),
        ([image(file_name=None)], [], "images[0]: file_name null: must be the path of an image"),
        ([image(width=0)], [], "images[0]: width 0: must be the image's pixels across"),
        ([image(height="50")], [], 'images[0]: height "50": must be the image\'s pixels down'),
        ([image(id=1.5)], [], "images[0]: id 1.5: must be a number or text that no other image has"),
        ([image(), image()], [], "images[1]: id 7: must be a number or text that no other image has"),
        ([image()], [annotation(), 3], "annotations[1] is no object: 3"),
        ([image()], [annotation(image_id=9)], "annotations[0]: image_id 9: must be the id of one of 'i"),
        ([image()], [annotation(bbox=[1, 2, 3])], "annotations[0]: bbox [1, 2, 3]: must be left, top, wi"),
        ([image()], [annotation(bbox=[1, 2, -3, 4])], "bbox [1, 2, -3, 4]: must be left, top, width"),
        ([image()], [annotation(bbox=[1, 2, float("nan"), 4])], "bbox [1, 2, NaN, 4]: must be left"),
        ([image()], [annotation(bbox=[1, 2, "3", 4])], 'bbox [1, 2, "3", 4]: must be left'),
        ([image()], [annotation(tokens_positive=[])], "tokens_positive []: must be pairs [from, to] of"),
        ([image()], [annotation(tokens_positive=[[0, 42]])], "of characters of the caption's 41: \"a red"),
        ([image()], [annotation(tokens_positive=[[5, 5]])], "tokens_positive [[5, 5]]: must be pairs"),
        ([image()], [annotation(tokens_positive=[[0, 1.5]])], "tokens_positive [[0, 1.5]]: must be pairs"),
        ([image()], [{"image_id": 7, "bbox": [1, 2, 3, 4]}], "tokens_positive null: must be pairs"),
    ],
)  # fmt: skip
def test_annotations_that_are_not_mdetrs(
    tmp_path: Path, images: Any, annotations: Any, told: str
) -> None:
    uri = written(tmp_path / "a.json", images, annotations)
    with pytest.raises(InputError) as caught:
        read_annotations(uri, "", "squash", "grounding")
    message = caught.value.on_command_line()
    assert message.startswith(f"--grounding: {uri}") and told in message, message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*x\.json: MDETR's annotations have"):
        read_annotations(str(tmp_path / "x.json"), "", "squash", "grounding")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json is no JSON"):
        read_annotations(str(tmp_path / "x.json"), "", "squash", "grounding")


# Expressions --------------------------------------------------------------------------------------


def test_expressions_there_and_back(tmp_path: Path) -> None:
    """And which one is drawn is the seed's; a file with others is refused."""
    said = [
        Expression("a.png", CAPTION, BOXES, SPANS),
        Expression("b.png", "x", (), ()),
        Expression("a.png", "a red circle", BOXES[:1], SPANS[:1]),
    ]
    uri = str(tmp_path / "expressions.parquet")
    write_expressions(uri, said, digest_of(said))
    stored = StoredExpressions(ExpressionsFile(uri, digest_of(said)))
    assert list(stored) == said
    assert {stored.draw("a.png", seed) for seed in range(20)} == {said[0], said[2]}
    assert stored.draw("a.png", 5) == stored.draw("a.png", 5)
    assert stored.draw("b.png", 1) == said[1] and stored.draw("c.png", 1) is None
    assert digest_of(said[:2]) != digest_of(said)
    with pytest.raises(InputError, match="has other expressions than this run"):
        StoredExpressions(ExpressionsFile(uri, digest_of(said[:2])))


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_bounds_are_what_is_drawn(shape: str, size: str) -> None:
    thing = Thing(shape, "red", size, 0.4, 0.55)
    mask = draw_mask(Scene((thing,), "plain", 0), 400) > 0
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert [400 * side for side in bounds(thing)] == pytest.approx(seen, abs=2.01)


def test_expressions_of_scenes(tmp_path: Path) -> None:
    """Drawn ones are read as MDETR's are; their words name the things whose boxes they have."""
    world = World(str(tmp_path), 3)
    scene = world.scene(world.rng(1))
    for text, found in expressions(scene):
        for own in found:
            ((begin, end),) = own["tokens_positive"]  # type: ignore[misc]
            words = text[begin:end].split()
            (thing,) = [t for t in scene.things if words == ["a", t.colour, t.shape]]
            left, top, across, down = own["bbox"]  # type: ignore[misc]
            assert left + across / 2 == pytest.approx(64 * thing.x, abs=0.1)
            assert top < 64 * thing.y < top + down
    write_training(str(tmp_path), 3)
    for split, scenes in (("train", 6), ("valid", 100)):
        read = read_annotations(str(tmp_path / f"grounding/{split}.json"), "", "crop", "grounding")
        assert [len(one.boxes) for one in read.expressions] == [1, 1, 2] * scenes
        assert read.outside == 0
        assert all((tmp_path / one.image).exists() for one in read.expressions)


# How well boxes are found -------------------------------------------------------------------------


def test_overlaps_of_the_surest_queries(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each box with the ten queries that are surest to be of its words, by plain code; an image that
    cannot be read is left out, and two workers have what one has."""
    for i in range(2):
        tiny.write_image(tmp_path / f"{i}.png", seed=i, size=(40, 32))
    said = [
        Expression("0.png", CAPTION, BOXES, SPANS),
        Expression("none.png", CAPTION, BOXES, SPANS),
        Expression("1.png", CAPTION, BOXES[:1], SPANS[:1]),
    ]
    adapter = DptAdapter(AdapterShape("mid", 64, tiny.WIDTH, grounding=True))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, CLASSES, generator=generator)
    boxes = 0.3 + 0.4 * torch.rand(100, 4, generator=generator)
    maps: list[Tensor] = []

    def find(found: Tensor, at: Tensor) -> Boxes:
        maps.append(found)
        assert at.tolist() == [500] * len(found)
        count = (len(found), -1, -1)
        return Boxes(logits.expand(*count), boxes.expand(*count), boxes.expand(*count))

    monkeypatch.setattr(adapter, "find", find)
    locator = Locator(sd, adapter, str(tmp_path), "squash")
    overlaps = locator.overlaps(said)
    probabilities, rows = logits.softmax(1), []
    for i, tokens in ((0, [1, 2, 3]), (1, [8, 9, 10]), (0, [1, 2, 3])):
        surest = sorted(range(100), key=lambda q: -float(probabilities[q, tokens].sum()))
        rows.append([plain_grounding.iou(BOXES[i], boxes[q].tolist()) for q in surest[:10]])
    wanted, tokens = [torch.tensor(box) for box in BOXES], [[1, 2, 3], [8, 9, 10]]
    chosen = plain_grounding.assigned(logits, boxes, wanted, tokens)
    alone = plain_grounding.assigned(logits, boxes, wanted[:1], tokens[:1])
    for row, i, q in zip(rows, (0, 1, 0), (*chosen, *alone), strict=True):
        row.insert(0, plain_grounding.iou(BOXES[i], boxes[q].tolist()))
    torch.testing.assert_close(overlaps, torch.tensor(rows), rtol=1e-4, atol=1e-5)
    assert [len(one) for one in maps] == [2] and maps[0].shape[1:] == (64, 4, 4)
    sums = torch.zeros(6, dtype=torch.float64)
    for rank in range(2):
        worker: Any = SimpleNamespace(
            rank=rank, world=2, summed=lambda v: sums.add_(torch.tensor(v))
        )
        found = located(locator, said, worker)
    assert found == pytest.approx(
        {
            "boxes/iou": np.mean([row[1] for row in rows]),
            "boxes/iou_matched": np.mean([row[0] for row in rows]),
            **{
                f"boxes/precision_at_{best}": np.mean([max(row[1:][:best]) >= 0.5 for row in rows])
                for best in (1, 5, 10)
            },
        },
        rel=1e-4,
    )
    worker = SimpleNamespace(rank=0, world=1, summed=torch.tensor)
    assert located(locator, said[1:2], worker) == {}
