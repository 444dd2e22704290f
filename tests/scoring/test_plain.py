"""The scores of the `diffusionitm` preset equal those of the published algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffitm.core.schema import Example, PairRow
from diffitm.metrics.score import averaged, conditional_score, normalised_score
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import resolve
from diffitm.scoring.protocols import plan_timesteps
from diffitm.scoring.specs import DiffusionSpec
from diffitm.shapes.layouts import write_world
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from tests.plain import BATCH, Errors, Plain, list_pairs, published_timesteps

COUNT = 10
DECISIONS = BATCH + 1  # one full batch of the published code and one that is not
CANDIDATES = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of four are too small to share, and OpenMP's waiting is slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("world"))
    write_world(folder, scenes=10)
    return folder


def published(root: str, examples: Sequence[Example], image_retrieval: bool) -> Errors:
    plain = Plain(str(SHAPES / "diffusion"), published_timesteps(COUNT))
    decisions = [
        list_pairs([str(Path(root) / image) for image in example.images], example.texts)
        for example in examples
    ]
    return plain.score(decisions, image_retrieval)


def ours(root: str, examples: Sequence[Example]) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines of the store by (image, text), every image with the empty text too."""
    texts: dict[str, list[str]] = {}
    for example in examples:
        for image in example.images:
            texts.setdefault(image, [""]).extend(example.texts)
    rows = [PairRow(i, image, list(dict.fromkeys(t))) for i, (image, t) in enumerate(texts.items())]
    steps = tuple(plan_timesteps("diffusionitm", COUNT))
    spec = DiffusionSpec(resolve("shapes"), root, "diffusionitm", steps)
    return {(line["image"], line["text"]): line for line in spec.build("cpu").score(rows)}


def errors(
    lines: dict[tuple[str, str], dict[str, Any]], examples: Sequence[Example], empty: bool = False
) -> np.ndarray:
    """L2 errors [decisions, candidates, timesteps], with the text or with the empty one."""
    pairs = [list_pairs(example.images, example.texts) for example in examples]
    return np.array(
        [[lines[image, "" if empty else text]["l2"] for image, text in one] for one in pairs]
    )


def test_text_retrieval_equals_the_published_algorithm(root: str) -> None:
    found = list(Flickr30kText().examples(root))[:DECISIONS]
    examples = [Example(e.id, e.images, e.texts[:CANDIDATES], "text") for e in found]
    plain = published(root, examples, image_retrieval=False)
    l2 = errors(ours(root, examples), examples)
    assert l2.shape == (DECISIONS, CANDIDATES, COUNT)
    np.testing.assert_allclose(l2, plain.conditional.numpy(), rtol=1e-4)
    score = conditional_score(averaged(l2))
    np.testing.assert_allclose(score, plain.naive().numpy(), atol=1e-4, rtol=0)


def test_image_retrieval_equals_the_published_algorithm(root: str) -> None:
    found = list(Flickr30kImage().examples(root))[:DECISIONS]
    examples = [Example(e.id, e.images[:CANDIDATES], e.texts, "image") for e in found]
    plain = published(root, examples, image_retrieval=True)
    lines = ours(root, examples)
    l2, empty = errors(lines, examples), errors(lines, examples, empty=True)
    assert plain.unconditional is not None
    np.testing.assert_allclose(l2, plain.conditional.numpy(), rtol=1e-4)
    np.testing.assert_allclose(empty, plain.unconditional.numpy(), rtol=1e-4)
    naive, normalised = averaged(l2), normalised_score(averaged(l2), averaged(empty))
    np.testing.assert_allclose(conditional_score(naive), plain.naive().numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(normalised, plain.normalised().numpy(), atol=1e-4, rtol=0)
    # The term is more than rounding, so the comparison above means something.
    assert np.ptp(normalised + naive) > 0.01
