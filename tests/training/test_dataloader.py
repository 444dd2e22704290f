"""Images that processes beside the loop decode: the same whatever their number, from any update on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffitm.core import images
from diffitm.training.crops import Views
from diffitm.training.dataloader import Images, Loader
from diffitm.training.rows import TrainingRow
from diffitm.training.sampler import BatchSampler, images_in
from tests.tiny import write_image

VIEW = Views(16, 8, 0.5)
STEPS, SIZE, MICRO = 3, 2, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, the one named 4 cut off."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(2 * STEPS * SIZE * MICRO):
        write_image(folder / f"{i}.png", size=(30 + i, 40))
    broken = folder / "4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


def schedule() -> BatchSampler:
    count = STEPS * SIZE * MICRO
    rows = [TrainingRow(f"{i}.png", "c", ("n",), (f"{count + i}.png",)) for i in range(count)]
    return BatchSampler(rows, range(count), SIZE, MICRO, "hard-image", False, 0)


def load(root: Path, rank: int, world: int, processors: float, start: int = 0) -> list[Any]:
    job: Any = SimpleNamespace(
        root=str(root), sampler=schedule, steps=STEPS, grad_accum_steps=MICRO
    )
    return list(Loader(job, rank, world, VIEW, processors).steps(start))


@pytest.mark.parametrize(("world", "processors"), [(1, 2.9), (2, 0.5)])
def test_each_micro_batch_in_its_order(root: Path, world: int, processors: float) -> None:
    """Items, the pixels that a single image has, and why one cannot be read."""
    parts = [load(root, rank, world, processors) for rank in range(world)]
    for step in range(STEPS):
        whole = schedule().batches(step)
        for number, batch in enumerate(whole):
            items, found, failures = parts[number % world][step][number // world]
            assert items == batch
            own = {item.image: item.seed for item in batch}
            for path in set(images_in(batch)) - {"4.png"}:
                image, _ = images.load(str(root), path)
                expected = VIEW(image, own.get(path, 0))
                assert all(map(np.array_equal, found.pop(path), expected))
            lost = [path for path in images_in(batch) if path == "4.png"]
            assert [failure.split(":")[0] for failure in failures] == lost
            assert not found


def test_a_resumed_loop_goes_on_where_it_stopped(root: Path) -> None:
    items = [[batch[0] for batch in step] for step in load(root, 0, 1, 1.0, start=2)]
    assert items == [schedule().batches(2)]


def test_a_worker_without_a_micro_batch(root: Path) -> None:
    """It takes part in all updates and starts no process."""
    assert load(root, 3, 4, 1.0) == [[]] * STEPS


def test_images_of_an_object_store_are_read_at_once(root: Path) -> None:
    """In threads, with the answers in their order."""
    request = [(f"{i}.png", i) for i in (5, 4, 3)]
    local = Images(str(root), VIEW)
    remote = Images(f"file://{root}", VIEW)
    assert (local.threads, remote.threads) == (1, 8)
    one, other = local[request], remote[request]
    assert one[1] == other[1] and [bool(f) for f in one[1]] == [False, True, False]
    assert all(map(np.array_equal, one[0], other[0]))
    assert [tuple(t.shape) for t in one[0]] == [(2, 16, 16, 3), (2, 8, 8, 3)]
