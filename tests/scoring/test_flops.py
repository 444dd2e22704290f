"""benchmarks/flops.py counts the work by what is called: by hand, on tables that cross every batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import flops
from benchmarks.flops import Counts, Size
from diffitm.core.schema import Example, PairRow
from diffitm.models.folder import Folder
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from diffitm.tasks.winoground import Winoground
from tests import tiny

STEPS = [10, 500]
IMAGES, TEXTS, QUERIES = 70, 5, 11  # of the table below
# SD 2.1-base's, in TFLOP.
SIZES = [
    Size("m", part, item, 0, None, int(tflop * 1e12))
    for part, item, tflop in (
        ("VAE", "images", 1.12),
        ("text", "texts", 0.045),
        ("U-Net", "forwards", 0.80),
    )
]


def table() -> list[Example]:
    """Each image with its own texts and two that all share; then texts with ten images each, one of them
    with a pair that stood before."""
    images = [f"{i}.png" for i in range(IMAGES)]
    text = [
        Example(f"t{i}", (image,), (*(f"{i} {k}" for k in range(TEXTS)), "all", "each"), "text")
        for i, image in enumerate(images)
    ]
    image = [
        Example(f"i{q}", tuple(images[q : q + 10]), (f"query {q}" if q else "all",), "image")
        for q in range(QUERIES)
    ]
    return text + image


def test_what_a_table_needs() -> None:
    """Images, distinct texts and the empty one, pairs and the unconditional ones of the images compared."""
    compared = QUERIES + 9
    pairs = IMAGES * (TEXTS + 2) + (QUERIES - 1) * 10  # those of 'all' are there already
    texts = IMAGES * TEXTS + 2 + (QUERIES - 1) + 1
    assert flops.needed(table(), 2) == Counts(IMAGES, texts, 2 * (pairs + compared))
    only_text = [e for e in table() if e.direction == "text"]
    assert flops.needed(only_text, 1) == Counts(IMAGES, IMAGES * TEXTS + 2, IMAGES * (TEXTS + 2))


def test_diffitm_does_what_is_needed() -> None:
    """One actor to the item, over blocks of rows, batches of images, texts and forwards that do not fill;
    of three actors, each encodes again what the others have."""
    least = flops.needed(table(), len(STEPS))
    assert flops.done(table(), STEPS, warm=False) == least
    three = flops.done(table(), STEPS, actors=3, warm=False)
    assert (three.images, three.forwards) == (least.images, least.forwards)
    assert least.texts < three.texts <= least.texts + 2 * (2 + QUERIES)
    assert flops.total(three, SIZES) / flops.total(least, SIZES) <= 1.02


def test_a_start_and_a_small_cache_are_counted() -> None:
    """Two full batches and an empty text an actor; a cache of one text encodes a shared one anew for each
    block."""
    least = flops.needed(table(), len(STEPS))
    warm = flops.done(table(), STEPS, actors=2)
    cold = flops.done(table(), STEPS, actors=2, warm=False)
    assert warm.forwards == cold.forwards + 2 * 2 * 64
    assert warm.images == cold.images
    small = flops.done(table(), STEPS, TEXT_CACHE_BYTES, warm=False)
    assert small.texts > least.texts
    assert (small.images, small.forwards) == (least.images, least.forwards)


def test_the_counting_model_counts_as_a_real_one(sd_folder: Path, tmp_path: Path) -> None:
    """The same rows through a Stable Diffusion whose parts are watched."""
    files = [tiny.write_image(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    rows = [PairRow(i, file.name, ["", "red", f"{i}"]) for i, file in enumerate(files)]
    real, counting = StableDiffusion(Folder(str(sd_folder))), flops.Counting()
    found = flops.watch(real)
    for model in (real, counting):
        plan = make_plan(STEPS, model.latent_shape)
        scorer = DiffusionScorer(model, plan, str(tmp_path), batch_size=4)
        lines = scorer.score(rows[:3]) + scorer.score(rows[3:])
        assert [line["failure"] for line in lines] == [None] * 15
    assert found == counting.counts == Counts(5, 7, 30)


@pytest.mark.parametrize(
    ("direction", "expected"),
    # Six decisions of three pairs at two timesteps: the image at each, the text once, the empty one again.
    [("text", Counts(36, 18, 36)), ("image", Counts(36, 36, 72))],
)
def test_published_algorithm(direction: str, expected: Counts) -> None:
    def example(n: int) -> Example:
        if direction == "text":
            return Example(str(n), (f"{n}.png",), ("a", "b", f"{n}"), "text")
        return Example(str(n), ("a.png", "b.png", f"{n}.png"), (f"{n}",), "image")

    assert flops.published([example(n) for n in range(6)], STEPS) == expected


@pytest.mark.parametrize(
    ("module", "call", "expected"),
    [
        (nn.Linear(3, 5), lambda m: m(torch.zeros(2, 3)), 2 * 2 * 3 * 5),
        (
            nn.Conv2d(3, 4, 3, padding=1),
            lambda m: m(torch.zeros(1, 3, 8, 8)),
            2 * 8 * 8 * 3 * 4 * 9,
        ),
    ],
)
def test_a_multiply_add_is_two(module: nn.Module, call: Callable, expected: int) -> None:
    assert flops.count_flops(module.to("meta"), call) == expected


def test_attention_is_counted() -> None:
    """Two products of all with all, whatever kernel would do them."""
    attend = nn.functional.scaled_dot_product_attention
    count = flops.count_flops(nn.Identity(), lambda m: attend(*[m(torch.zeros(1, 2, 7, 4))] * 3))
    assert count == 2 * 2 * 2 * 7 * 7 * 4


def test_sizes_are_those_of_the_published_weights() -> None:
    """Another number of parameters than is known ends it."""
    (text,) = (p for p in flops.MODELS["SD 2.1-base"].parts if p.item == "texts")
    assert flops.measure("SD 2.1-base", text).flops / 1e12 == pytest.approx(0.045, abs=0.001)
    wrong = flops.Part("part", "texts", lambda: nn.Linear(3, 5), lambda m: m(torch.zeros(1, 3)), 15)
    with pytest.raises(RuntimeError, match="model, part: 20 parameters, not 15"):
        flops.measure("model", wrong)


def test_drawn_lists_have_the_published_form(tmp_path: Path) -> None:
    root = str(tmp_path)
    flops.write_lists(root)
    assert len(list(Flickr30kText().lists(root))) == 1014
    assert len(list(Flickr30kImage().lists(root))) == 5068
    for task, count in ((Flickr30kText(), 1014), (Flickr30kImage(), 1014), (Winoground(), 400)):
        examples = list(task.examples(root))
        assert len(examples) == count
        if task.name != "winoground":
            assert {len(set(e.images)) * len(set(e.texts)) for e in examples} == {10}
