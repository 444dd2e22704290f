"""A model that runs out of memory: smaller batches, the same scores, and the driver is told."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffitm.commands.stages.score import ScoringActor, ScoringCounter, _Lines
from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.models.clip import resolve_clip
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring import batching
from diffitm.scoring.batching import TOLD, Batch
from diffitm.scoring.clip import ClipScorer
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.scorer import RowScorer
from diffitm.store.blocks import Cost
from diffitm.store.pair_table import Left
from diffitm.store.run_summary import Done
from tests import tiny

TEXTS = ["a red circle", "a blue square", "a green cross"]
STEPS = [10, 500, 900]
FORWARDS = 4 * 3 * 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def works() -> list[PairRow]:
    return [PairRow(i, f"{i}.png", TEXTS) for i in range(4)]


def limit(patch: pytest.MonkeyPatch, model: Any, name: str, most: int) -> list[int]:
    """Let a method of the model run out of memory with more than `most` items; the sizes tried."""
    real, tried = getattr(model, name), list[int]()

    def limited(items: Any, *rest: Any) -> Any:
        tried.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(items, *rest)

    patch.setattr(model, name, limited)
    return tried


def scorer(sd: StableDiffusion, root: Path, size: int) -> DiffusionScorer:
    return DiffusionScorer(sd, make_plan(STEPS, sd.latent_shape), str(root), batch_size=size)


def listen(found: DiffusionScorer | ClipScorer) -> list[str]:
    """What its batches tell from now on."""
    told: list[str] = []
    for batch in found.batches:
        batch.tell = told.append
    return told


def l2(found: RowScorer) -> np.ndarray:
    return np.array([line["l2"] for line in found.score(works())])


def test_forwards(sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved until they fit, for good, and only what failed is done again: the same errors."""
    expected = l2(scorer(sd, root, 4))
    tried = limit(monkeypatch, sd, "predict", 5)
    small = scorer(sd, root, 16)
    told = listen(small)
    np.testing.assert_allclose(l2(small), expected, rtol=1e-5)
    assert told == ["batch size 16 -> 8", "batch size 8 -> 4"]
    assert tried == [16, 8] + [4] * (FORWARDS // 4)
    np.testing.assert_allclose(l2(small), expected, rtol=1e-5)
    assert tried[11:] == [4] * (FORWARDS // 4)
    assert [batch.size for batch in small.batches] == [4, 4, 16]


def test_the_last_batch_of_a_block_may_be_the_one(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done before it stays; half of what was tried, not of what was allowed."""
    real, calls = sd.predict, list[int]()

    def predict(noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(noised))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(noised, *rest)

    expected = l2(scorer(sd, root, 32))
    monkeypatch.setattr(sd, "predict", predict)
    found = scorer(sd, root, 32)
    np.testing.assert_allclose(l2(found), expected, rtol=1e-5)
    assert calls == [32, 4, 2, 2]
    assert found.batches[0].size == 2


def test_images_and_texts(sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a batch of its own; that of the forwards stays."""
    expected = l2(scorer(sd, root, 16))
    images = limit(monkeypatch, sd, "encode_images", 1)
    texts = limit(monkeypatch, sd, "encode_texts", 2)
    small = scorer(sd, root, 16)
    told = listen(small)
    np.testing.assert_allclose(l2(small), expected, rtol=1e-5)
    sizes = [
        f"batch size of {what}" for what in ("texts 16 -> 1", "images 4 -> 2", "images 2 -> 1")
    ]
    assert told == sizes
    assert (images, texts) == ([4, 2, 1, 1, 1, 1], [3, 1, 1, 1])
    assert small.batches[0].size == 16


@pytest.mark.parametrize("name", ["predict", "encode_images", "encode_texts"])
def test_one_item_is_too_much(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    limit(monkeypatch, sd, name, 0)
    with pytest.raises(InputError, match=r"at a batch size.* of 1: --dtype fp16, a smaller model"):
        scorer(sd, root, 16).score(works())


def test_clip(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ClipScorer(resolve_clip("shapes"), str(root))
    expected = [line["similarity"] for line in found.score(works())]
    small = ClipScorer(resolve_clip("shapes"), str(root), batch_size=4)
    told = listen(small)
    tried = limit(monkeypatch, small.model, "encode_image", 1)
    limit(monkeypatch, small.model, "encode_text", 2)
    scored = [line["similarity"] for line in small.score(works())]
    np.testing.assert_allclose(scored, expected, atol=1e-6)
    assert told == ["batch size 4 -> 2", "batch size 2 -> 1", "batch size of texts 4 -> 1"]
    assert tried == [4, 2, 1, 1, 1, 1]
    limit(monkeypatch, small.model, "encode_image", 0)
    with pytest.raises(InputError, match="a GPU or one with more memory"):
        small.score(works())


def test_the_rate_is_measured_with_a_batch_that_fits(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit(monkeypatch, sd, "predict", 4)
    found = scorer(sd, root, 16)
    assert found.measure_rate() > 0
    assert tried == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert found.batches[0].size == 4


def test_what_failed_is_freed_before_the_next_try() -> None:
    """When the cache is emptied, nothing holds the tensors of the forward that failed."""
    alive, freed = list[weakref.ref[torch.Tensor]](), list[bool]()

    def work(start: int, end: int) -> int:
        part = torch.zeros(end - start)
        alive.append(weakref.ref(part))
        if end - start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return end - start

    batch = Batch(8)
    batch.tell = lambda line: freed.append(alive[-1]() is None)
    assert list(batch.run(9, work)) == [2, 2, 2, 2, 1]
    assert freed == [True, True]


def test_time_of_forwards(sd: StableDiffusion, root: Path) -> None:
    """Adds up since it was last asked for, and holds nothing but predict."""
    found = scorer(sd, root, 16)
    found.score(works())
    assert found.batches[0].spent() > 0
    assert found.batches[0].spent() == 0
    with found.batches[0].timed(torch.device("cpu")):
        pass
    assert 0 < found.batches[0].spent() < 0.1


def test_times_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all blocks since the last question, in seconds."""
    times = iter([1.0, 4.0, 10.0, 10.5])
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    batch = Batch(4)
    for _ in range(2):
        with batch.timed(torch.device("cpu")):
            pass
    assert [batch.spent(), batch.spent()] == [3.5, 0.0]


def test_ranges_cover_everything_once() -> None:
    assert list(Batch(4).run(10, lambda i, j: (i, j))) == [(0, 4), (4, 8), (8, 10)]
    assert list(Batch(4).run(0, lambda i, j: (i, j))) == []


class Remote:
    """A counter that is called as an actor is, in this process."""

    def __init__(self) -> None:
        self.counter, self.add = ScoringCounter(), self
        self.remote = self.counter.add
        self.read = SimpleNamespace(remote=lambda: Done)


class Spec:
    """Gives the scorer to the actor."""

    def __init__(self, made: RowScorer) -> None:
        self.made = made

    def build(self, device: str) -> RowScorer:
        return self.made


def test_the_driver_is_told(
    sd: StableDiffusion,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From an actor over the counter into the log, each change once however many actors it was."""
    limit(monkeypatch, sd, "predict", 4)
    monkeypatch.setattr("ray.get", lambda found: found())
    remote, lines = Remote(), _Lines("SD", Left(4, 12, 0), Cost(3), 2, 2)
    with caplog.at_level(logging.WARNING, "diffitm"):
        for _ in range(2):
            ScoringActor(Spec(scorer(sd, root, 8)), "SD", "cpu", remote)  # type: ignore[arg-type]
            lines.tell_troubles(remote.counter.read())
        remote.remote(Done(smaller=("batch size 4 -> 2",)))
        lines.tell_troubles(remote.counter.read())
    told = [record.message for record in caplog.records]
    assert told == [
        f"SD: an actor ran out of GPU memory, batch size {change}"
        for change in ("8 -> 4", "4 -> 2")
    ]


def test_the_time_left_is_that_of_finished_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """The first blocks are long: what is in work is no reason to fear for hours."""
    lines = _Lines("SD", Left(40, 120, 0), Cost(3), 2, 2)
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.tell(Done(actors=2, rate=24.0))
        lines.next_line = 0
        lines.tell(Done(actors=2, pairs=20, busy=7.0, loading=2.0, waited=1.0))
    assert caplog.messages == [
        "SD: 2 of 2 actors up, 12 forwards/s each: about 15 s",
        "SD: 20 of 120 pairs (17%), 12 forwards/s, 25 s left",
    ]


def test_a_model_that_never_fits_fails_in_words(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it measures its rate, before its first block."""
    limit(monkeypatch, sd, "predict", 0)
    monkeypatch.setattr("ray.get", lambda found: found())
    with pytest.raises(InputError, match="memory is too small"):
        ScoringActor(Spec(scorer(sd, root, 8)), "SD", "cpu", Remote())  # type: ignore[arg-type]


@pytest.mark.parametrize("told", TOLD)
def test_what_other_libraries_call_it(told: str) -> None:
    """Memory that cuBLAS, cuDNN or another process's share lacks is memory, too."""

    def work(start: int, end: int) -> int:
        if end - start > 2:
            raise RuntimeError(f"{told} when calling something")
        return end - start

    batch = Batch(8)
    assert list(batch.run(8, work)) == [2, 2, 2, 2]
    assert batch.size == 2


def test_other_errors_are_not_tried_again() -> None:
    def work(start: int, end: int) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(Batch(8).run(8, work))
