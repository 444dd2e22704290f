"""How the images of a block of contests are read and encoded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffitm.core import images, outside
from diffitm.core.errors import Unavailable
from diffitm.core.schema import RaceBlock
from diffitm.scoring import image_reader, race_block
from diffitm.scoring import scorer as scorer_module
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.race_block import BlockRaces, all_with_all
from diffitm.scoring.racing import RacePlan, Racing
from tests import tiny

STEPS = [10, 500, 900]
NAMES = [f"{number}.png" for number in range(7)]


class Counted(tiny.Fixed):
    """Writes down how many images it encodes at once."""

    def __init__(self) -> None:
        super().__init__(tiny.schedule())
        self.sizes: list[int] = []

    def encode_posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.sizes.append(len(pixels))
        return super().encode_posterior(pixels)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiffusionScorer:
    """Seven images below its root; four are held at once, the VAE takes two."""
    monkeypatch.setattr(race_block, "IMAGES_AT_ONCE", 4)
    for number, name in enumerate(NAMES):
        tiny.write_image(tmp_path / name, number)
    model = Counted()
    return DiffusionScorer(model, make_plan(STEPS, model.latent_shape), str(tmp_path), batch_size=8)


def block() -> RaceBlock:
    return all_with_all(len(NAMES), ["a", "bb"], 1, "image")._replace(images=NAMES)


def races(found: DiffusionScorer, **how: Any) -> BlockRaces:
    return BlockRaces(found, block(), RacePlan(Racing(0.05), found.timesteps, "l2"), **how)


def test_the_next_images_are_read_while_these_are_encoded(
    found: DiffusionScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "THREADS", 2)
    fifth, real, encode = threading.Event(), images.read, found.latents

    def load(folder: str, name: str) -> Any:
        if name == NAMES[4]:
            fifth.set()
        return real(folder, name)

    def latents(pixels: list[torch.Tensor]) -> torch.Tensor:
        assert fifth.wait(60), "the fifth image is read only once the first are encoded"
        return encode(pixels)

    monkeypatch.setattr(images, "read", load)
    monkeypatch.setattr(found, "latents", latents)
    assert len(races(found).latents) == len(NAMES)
    assert found.denoiser.sizes == [2, 2, 2, 1]  # type: ignore[attr-defined]
    assert found.loading.spent() > 0


def test_images_of_the_caller_are_read_no_sooner_than_they_are_held(found: DiffusionScorer) -> None:
    """And encoded in the same batches."""
    read = list[tuple[str, int]]()
    sizes: list[int] = found.denoiser.sizes  # type: ignore[attr-defined]

    def load(name: str) -> image_reader.Loaded:
        read.append((name, len(sizes)))
        return image_reader.Loaded(found.prepare(images.load(found.root, name)[0]), None, None)

    mine = races(found, load=lambda names: map(load, names))
    torch.testing.assert_close(mine.latents, races(found).latents, rtol=0, atol=0)
    assert [name for name, _ in read] == NAMES
    assert [encoded for _, encoded in read] == [0] * 4 + [2] * 3


def test_a_block_of_which_all_images_are_away(
    found: DiffusionScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the block, not of those that are held; only the first is waited for."""
    monkeypatch.setattr(outside, "DELAYS", (0.0, 0.0))
    monkeypatch.setattr(scorer_module, "THREADS", 1)
    asked, there, real = list[str](), set[str](), images.read

    def load(folder: str, name: str) -> Any:
        asked.append(name)
        if name not in there:
            raise ConnectionError("no route")
        return real(folder, name)

    monkeypatch.setattr(images, "read", load)
    with pytest.raises(Unavailable, match=r"none of 7 images could be read"):
        races(found)
    assert [asked.count(name) for name in NAMES] == [3, *[1] * 6]
    there.add(NAMES[6])
    asked.clear()
    one = races(found)
    assert len(one.latents) == 1
    assert [failure is None for failure in one.failures[: 2 * len(NAMES)]] == [False] * 12 + [
        True
    ] * 2
    assert [asked.count(name) for name in NAMES] == [3, *[1] * 6]
