"""--compile: batches of one shape, errors as without it, and a model that goes on where compiling fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import conv2d, scaled_dot_product_attention

from diffitm.core.schema import PairRow
from diffitm.models.denoiser import Condition
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.batching import Batch
from diffitm.scoring.compiled import CompiledPredict
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from tests import tiny

TEXTS = ["a red circle", "a blue square", "a green cross"]
STEPS = [10, 300, 500, 900]
IMAGES = 4
Predict = Callable[[Tensor, Tensor, Condition], Tensor]


class Rows(tiny.Fixed):
    """Each row's answer is of what is given for it alone, and a batch of more than `most` is too large."""

    def __init__(self, most: int = 100) -> None:
        super().__init__(tiny.schedule())
        self.most = most

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        if len(noised) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        told = timesteps[:, None, None, None] + condition["hidden"][:, :, None, None]
        return noised * 2 + told


def batch_of(count: int) -> tuple[Tensor, Tensor, Condition]:
    steps = torch.arange(count)
    return torch.randn(count, 2, 4, 4), steps, {"hidden": torch.randn(count, 1)}


def stand_in(
    patch: pytest.MonkeyPatch, error: Callable[[int], Exception | None] = lambda count: None
) -> list[int]:
    """Instead of compiling, the sizes of what compiled code is called with; a call raises its `error`."""
    sizes = list[int]()

    def compile_(predict: Predict, dynamic: bool) -> Predict:
        assert dynamic is False

        def call(noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            sizes.append(len(noised))
            assert {len(timesteps), *map(len, condition.values())} == {len(noised)}
            assert all(x.is_contiguous() for x in (noised, timesteps, *condition.values()))
            if raised := error(len(noised)):
                raise raised
            return predict(noised, timesteps, condition)

        return call

    patch.setattr(torch, "compile", compile_)
    return sizes


@pytest.mark.parametrize("count", [8, 7, 4, 1])
def test_batches_are_filled(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Compiled code is of one shape; answers are those of each row."""
    sizes = stand_in(monkeypatch)
    noised, *others = batch_of(count)
    given = (noised.to(memory_format=torch.channels_last), *others)
    assert torch.equal(CompiledPredict(Rows(), Batch(8))(*given), Rows().predict(*given))
    assert sizes == [8]


def test_batches_that_were_halved_are_filled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Out of memory is no failure of compiling: the smaller batch is the shape from then on."""
    sizes, model = stand_in(monkeypatch), Rows(most=4)
    for i in range(IMAGES):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    found = {}
    for compiled in (False, True):
        plan = make_plan(STEPS[:3], model.latent_shape)
        scorer = DiffusionScorer(model, plan, str(tmp_path), batch_size=8, compiled=compiled)
        causes = list[str]()
        if scorer.compiled:
            scorer.compiled.tell = causes.append
        lines = scorer.score([PairRow(i, f"{i}.png", TEXTS) for i in range(IMAGES)][:3])
        found[compiled] = [line["l2"].tolist() for line in lines]
        assert causes == []
    assert found[True] == found[False]
    assert sizes == [8, *[4] * 7]  # 27 forwards: one fails, 6 full ones, the last is of 3


class BrokenError(Exception):
    """As the compiler's errors: the cause is what it was raised from."""


def broken(count: int) -> Exception:
    error = BrokenError("backend='inductor' raised:")
    error.__cause__ = RuntimeError("no compiler\nwas found\n\nSet TORCH_LOGS to hear more")
    return error


def test_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, once, and the model answers without it."""
    sizes, causes = stand_in(monkeypatch, broken), list[str]()
    predict = CompiledPredict(Rows(), Batch(8))
    predict.tell = causes.append
    for count in (8, 7, 8):
        given = batch_of(count)
        assert torch.equal(predict(*given), Rows().predict(*given))
    assert causes == ["RuntimeError: no compiler was found"]
    assert sizes == [8]


def test_the_cause_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, broken)
    CompiledPredict(Rows(), Batch(2))(*batch_of(2))
    (line,) = caplog.messages
    assert line.startswith("--compile failed") and line.endswith("no compiler was found")


def test_what_the_forward_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that fails without compiling, too, says nothing of the compiler."""
    stand_in(monkeypatch, broken)
    model = Rows()
    predict, causes = CompiledPredict(model, Batch(2)), list[str]()
    predict.tell = causes.append
    monkeypatch.setattr(model, "predict", lambda *given: {}["weights"])
    with pytest.raises(KeyError, match="weights"):
        predict(*batch_of(2))
    assert causes == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_memory_that_ends_in_compiling(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    """Is told apart from a compiler that fails: the batch is halved, and compiled again."""

    def spent(count: int) -> Exception | None:
        memory = torch.OutOfMemoryError("CUDA out of memory")
        outer = BrokenError("backend='inductor' raised:")
        outer.__cause__ = memory
        return (outer if wrapped else memory) if count > 2 else None

    sizes, batch = stand_in(monkeypatch, spent), Batch(8)
    predict, given = CompiledPredict(Rows(), batch), batch_of(8)

    def part(start: int, end: int) -> Tensor:
        return predict(
            given[0][start:end], given[1][start:end], {"hidden": given[2]["hidden"][start:end]}
        )

    assert torch.equal(torch.cat(list(batch.run(8, part))), Rows().predict(*given))
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own error, of a machine that has no C++ compiler."""
    import torch._inductor.config as settings

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    given = batch_of(4)
    with settings.patch({"cpp.cxx": (None, "no-such-compiler")}), torch.inference_mode():
        found = CompiledPredict(Rows(), Batch(4))(*given)
    assert torch.equal(found, Rows().predict(*given))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "diffitm"]
    assert "No working C++ compiler" in line and "no-such-compiler" in line


@pytest.mark.slow
@pytest.mark.parametrize("write", [tiny.write_sd, tiny.write_sdxl, tiny.write_dit])
def test_every_family_is_one_graph(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """As torch traces it, so that nothing of a forward stays outside of what is compiled."""
    model = load_denoiser(resolve(str(write(tmp_path))))
    torch._dynamo.reset()
    traced = torch.compile(model.predict, dynamic=False, fullgraph=True, backend="eager")
    given = (
        torch.randn(2, *model.latent_shape),
        torch.tensor([1, 900]),
        model.encode_texts(["cat", ""]),
    )
    with torch.inference_mode():
        torch.testing.assert_close(traced(*given), model.predict(*given))


class Net(tiny.Fixed):
    """A convolution and attention to the condition."""

    def __init__(self) -> None:
        super().__init__(tiny.schedule())
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(2, 2, 3, 3, generator=generator)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        found = conv2d(noised, self.weight, padding=1).flatten(2).mT
        key = (condition["hidden"] + timesteps[:, None])[:, None].repeat(1, 1, 2)
        found = found + scaled_dot_product_attention(found, key, key)
        return found.mT.reshape_as(noised).sigmoid()


@pytest.mark.slow
def test_really_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By torch, twice as the batch was halved once; a batch of another layout or length is no other code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    model, batch = Net(), Batch(8)
    predict = CompiledPredict(model, batch)
    predict.tell = pytest.fail
    with torch.inference_mode():
        for batch.size, count in ((8, 8), (8, 5), (4, 4), (4, 3), (8, 1)):
            noised, *others = batch_of(count)
            noised = noised if count % 2 else noised.to(memory_format=torch.channels_last)
            expected = model.predict(noised, *others)
            torch.testing.assert_close(predict(noised, *others), expected)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.long
def test_compiled_errors(sd: StableDiffusion, tmp_path: Path) -> None:
    """A U-Net really compiled, as an actor does it: the errors are those without it, to the rounding that
    another size of batches has, too."""
    torch._dynamo.reset()
    counters.clear()
    for i in range(IMAGES):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    rows = [PairRow(i, f"{i}.png", TEXTS) for i in range(IMAGES)]
    plan = make_plan(STEPS, sd.latent_shape)

    def scored(size: int, compiled: bool) -> Tensor:
        scorer = DiffusionScorer(sd, plan, str(tmp_path), batch_size=size, compiled=compiled)
        assert scorer.measure_rate() > 0
        if scorer.compiled:
            scorer.compiled.tell = pytest.fail
        lines: list[dict[str, Any]] = scorer.score(rows)
        return torch.from_numpy(np.array([line["l2"] for line in lines]))

    reference, other = scored(10, compiled=False), scored(10, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(other, reference, rtol=1e-5, atol=0)
