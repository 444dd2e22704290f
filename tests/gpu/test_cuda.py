"""What only a CUDA device can show: the numbers of the processor, memory that ends, a GPU that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from diffitm.distributed.devices import actor_device
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import add_lora
from diffitm.scoring.batching import Batch
from diffitm.scoring.compiled import CompiledPredict
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import pair_errors
from tests.models.test_precision import overflowing
from tests.pipeline import ROOT, environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = ["a red cube", "a blue sphere", ""]
CRASH = """
import torch
from diffitm.core.outside import is_cuda_error
try:
    torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")].cpu()
except Exception as error:
    print(is_cuda_error(error), type(error).__name__)
"""


def errors(device: str, dtype: str, batch: int = 7) -> np.ndarray:
    """l2 [pairs, timesteps] of two images with three texts."""
    model = load_denoiser(resolve("shapes"), dtype, device)
    side = model.resolution
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    plan = make_plan([10, 500, 900], model.latent_shape)
    pairs = torch.tensor([(i, t) for i in range(2) for t in range(len(TEXTS))])
    latents, condition = model.encode_images(pixels), model.encode_texts(TEXTS)
    return pair_errors(model, latents, condition, plan, pairs, Batch(batch)).l2.numpy()


def test_a_gpu_is_chosen() -> None:
    assert actor_device(0.5) == "cuda"


def test_errors_are_those_of_the_processor() -> None:
    """In fp32 without TF32; half precisions to their own accuracy, and whatever the batch."""
    reference = errors("cpu", "fp32")
    np.testing.assert_allclose(errors("cuda", "fp32"), reference, rtol=1e-4)
    np.testing.assert_allclose(errors("cuda", "fp32", 1), errors("cuda", "fp32", 18), rtol=1e-5)
    np.testing.assert_allclose(errors("cuda", "fp16"), reference, rtol=0.02)
    np.testing.assert_allclose(errors("cuda", "bf16"), reference, rtol=0.05)


def test_products_of_attention_beyond_fp16(tmp_path: Path) -> None:
    """As those of Stable Diffusion 2: the GPU's fused attention holds none of them in fp16."""
    model: Any = load_denoiser(resolve(str(overflowing(tmp_path))), "fp16", "cuda")
    noised = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    given = (
        noised.to("cuda"),
        torch.tensor([100, 900], device="cuda"),
        model.encode_texts(TEXTS[:2]),
    )
    found = model.predict(*given)
    assert found.isfinite().all()
    model.unet.set_attn_processor(AttnProcessor())  # with its upcast
    torch.testing.assert_close(found, model.predict(*given), rtol=0.02, atol=0.02)


def test_channels_come_last_in_half_precision() -> None:
    """And the errors are the same each time."""
    model: Any = load_denoiser(resolve("shapes"), "fp16", "cuda")
    for weight in (model.unet.conv_in.weight, model.vae.encoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(errors("cuda", "fp16"), errors("cuda", "fp16"))


def test_compiled_errors() -> None:
    """Those without it, to fp16's rounding, and of batches that are filled up."""
    model = load_denoiser(resolve("shapes"), "fp16", "cuda")
    batch = Batch(8)
    predict = CompiledPredict(model, batch)
    predict.tell = pytest.fail
    noised = torch.randn(6, *model.latent_shape, device="cuda")
    given = (noised, torch.arange(6, device="cuda") * 150, model.encode_texts(TEXTS * 2))
    with torch.inference_mode():
        found, expected = predict(*given), model.predict(*given)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_clip_is_that_of_the_processor() -> None:
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    embedded = []
    for device in ("cpu", "cuda"):
        clip = load_clip(resolve_clip("shapes"), device)
        side = clip.model.visual.image_size
        side = side if isinstance(side, int) else side[0]
        with torch.inference_mode():
            sized = torch.nn.functional.interpolate(pixels, (side, side)).to(device)
            embedded.append(clip.model.encode_image(sized).float().cpu())
    torch.testing.assert_close(*embedded, rtol=1e-3, atol=1e-4)


def test_memory_that_ends_halves_the_batch() -> None:
    """A real OutOfMemoryError of CUDA; what fits is done once."""
    share = 2**30 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        batch, done = Batch(64), []

        def work(start: int, end: int) -> int:
            torch.empty((end - start) * 40 * 2**20, dtype=torch.uint8, device="cuda")
            done.append((start, end))
            return end - start

        assert sum(batch.run(64, work)) == 64
        assert batch.size == 16
        assert done == [(0, 16), (16, 32), (32, 48), (48, 64)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_gpu_that_fails_is_known_by_its_error() -> None:
    """An index out of range on the device, which ends CUDA in its process."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.stdout.startswith("True"), done.stdout + done.stderr


def test_time_in_the_model_is_counted() -> None:
    batch = Batch(4)
    with batch.timed(torch.device("cuda")):
        torch.ones(2000, 2000, device="cuda") @ torch.ones(2000, 2000, device="cuda")
    torch.cuda.synchronize()
    assert 0 < batch.spent() < 10
    assert batch.spent() == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gradients_reach_a_lora(dtype: str) -> None:
    model = load_denoiser(resolve("shapes"), dtype, "cuda")
    parameters = add_lora(model.unet, 2, 0)
    model.unet.to("cuda")
    noised = torch.randn(2, *model.latent_shape, device="cuda")
    condition = model.encode_texts(TEXTS[:2])
    condition = {name: value.clone() for name, value in condition.items()}
    model.predict(
        noised, torch.tensor([10, 500], device="cuda"), condition
    ).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_images_are_generated() -> None:
    model = load_denoiser(resolve("shapes"), "fp16", "cuda")
    first, again = (model.generate("a red cube", [3], 2, 2.0)[0] for _ in range(2))
    assert np.abs(np.asarray(first).astype(int) - np.asarray(again)).max() <= 2


def test_the_real_gpu_of_a_stage(tmp_path: Path) -> None:
    """Ray gives an actor its GPU, and the actor's torch sees it."""
    import pyarrow as pa
    import ray

    from diffitm.distributed.item_stage import ItemStage, run_items
    from diffitm.distributed.session import choose_pool, connect

    schema = pa.schema([("row", pa.int64()), ("position", pa.int64()), ("device", pa.string())])

    class Told:
        def __init__(self, device: str, counter: object) -> None:
            self.device = f"{device} {torch.cuda.get_device_name()}"

        def __call__(self, table: pa.Table) -> pa.Table:
            lines = [
                {"row": group["row"], "position": group["start"] + i, "device": self.device}
                for group in table.to_pylist()
                for i in range(len(group["names"]))
            ]
            return pa.Table.from_pylist(lines, schema)

    connect(None)
    try:
        pool = choose_pool(None, None, None, None)
        assert pool.gpus == 1.0
        stage = ItemStage("telling", str(tmp_path / "made" / "rows"), schema, Told, ())
        folder = run_items(stage, ["a", "b"], pool)
        from diffitm.distributed.stages import whole_files

        devices = set(whole_files(folder, schema).to_table()["device"].to_pylist())
        assert devices == {f"cuda {torch.cuda.get_device_name()}"}
    finally:
        ray.shutdown()
