"""Train the embedded default: `python -m tools.shapes.train --work DIR`.

Stages, each resumed from its own checkpoint in the work folder: the VAE; CLIP, and its text tower alone
once more; a text encoder that learns what stands where (layout.py); the U-Net with it, on the VAE's cached
latents; the text encoder again, which learns what disorder is, and the U-Net with that; then the export as
fp16 safetensors in the standard layouts. What a step does is a function of (seed, stage, step, process), so
a resumed run repeats an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTokenizer

from diffitm import shapes
from diffitm.shapes.language import training_caption
from diffitm.shapes.world import render
from tools.shapes import architecture as arch
from tools.shapes.layout import (
    OrderLoss,
    TextLoss,
    accuracy,
    layout_set,
    mixed_set,
    training_scene,
)
from tools.shapes.losses import ClipLoss, DiffusionLoss, VaeLoss, pixels

log = logging.getLogger("tools.shapes.train")
SEED = 20
CAPTIONS = 6
EVERY = 250  # steps, a checkpoint
LOGGED = 100  # steps, a line of the log
# Of a stage's captions, the share in disorder, and of those the share that is another scene's.
DISORDERED = {"diffusion": (0.25, 0.5), "text_on": (0.5, 0.0), "diffusion_on": (0.2, 1.0)}
MOST = {"diffusion": 20.0, "diffusion_on": 5.0}  # weight of an item's error
UNSEEN = 500  # scenes that the text encoder's reading is measured on


@dataclass(frozen=True)
class Stage:
    """How a stage is trained.

    `number` is part of its seed, `size` the batch of one process, `decay` how far the averages of the weights
    look back, `flat` the share of the steps before the rate begins to fall.
    """

    number: int
    steps: int
    size: int
    rate: float
    decay: float
    flat: float = 0.0


STAGES = {
    "vae": Stage(0, 5000, 24, 1.5e-3, 0.999),
    "clip": Stage(1, 2500, 128, 1e-3, 0.999),
    "clip_text": Stage(2, 800, 256, 1e-3, 0.0),
    "text": Stage(3, 600, 64, 1e-3, 0.0),
    "diffusion": Stage(4, 6000, 64, 1e-3, 0.996),
    "text_on": Stage(7, 900, 64, 1e-3, 0.0),
    "diffusion_on": Stage(6, 1800, 64, 6e-4, 0.996),
    "flow": Stage(5, 4100, 64, 1.5e-3, 0.999, 0.62),
}


def training_set(path: Path, count: int, tokenizer: CLIPTokenizer) -> dict[str, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and token ids int16 [N, CAPTIONS, 16], drawn once and kept."""
    if not path.exists():
        images, texts = [], []
        for index in range(count):
            scene, rng = training_scene(SEED, index)
            picture = Image.fromarray(render(scene))
            images.append(np.asarray(picture.resize((arch.PIXELS,) * 2, Image.Resampling.BICUBIC)))
            for i in range(CAPTIONS):
                text = training_caption(scene, rng)
                texts.append(f"{text.capitalize()}." if i == 0 else text)
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=arch.LENGTH)
        tokens = np.array(ids.input_ids, np.int16).reshape(count, CAPTIONS, arch.LENGTH)
        np.savez(path, images=np.stack(images), tokens=tokens)
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def fit(
    stage: str,
    module: nn.Module,
    data: dict[str, np.ndarray],
    work: Path,
    seed: int,
    snapshots: tuple[int, ...] = (),
) -> None:
    """Train to the stage's number of steps; the averaged weights end in {stage}.safetensors."""
    plan, rank = STAGES[stage], dist.get_rank()
    steps, rate = plan.steps, plan.rate
    model = DistributedDataParallel(module)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(plan.decay)
    )
    optimizer = torch.optim.AdamW(module.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3)
    checkpoint, first = work / f"{stage}.ckpt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start, total = time.time(), 0.0
    for step in range(first, steps):
        rng = np.random.default_rng([seed, plan.number, step, rank])
        torch.manual_seed(int(rng.integers(2**31)))
        fallen = max(0.0, (step / steps - plan.flat) / (1 - plan.flat))
        warm = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * fallen))
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.02 + 0.98 * warm)
        optimizer.zero_grad(set_to_none=True)
        loss = model(data, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(module)
        total += loss.item()
        done = step + 1
        if rank == 0 and done % LOGGED == 0:
            pace = (time.time() - start) / (done - first)
            left = (steps - done) * pace / 60
            log.info("%s %d/%d loss %.4f, %.1f min left", stage, done, steps, total / LOGGED, left)
            total = 0.0
        if rank == 0 and (done % EVERY == 0 or done == steps or done in snapshots):
            states: dict[str, Any] = {"module": module, "average": average, "optimizer": optimizer}
            _save({k: v.state_dict() for k, v in states.items()} | {"step": done}, checkpoint)
        if rank == 0 and (done == steps or done in snapshots):
            name = stage if done == steps else f"{stage}-{done}"
            weights = {k: v.contiguous() for k, v in average.module.state_dict().items()}
            save_file(weights, work / f"{name}.safetensors")
    dist.barrier()


def _save(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def standardise(vae: Any, images: np.ndarray) -> None:
    """Fold a per-channel shift and scale into the VAE, so that latents have mean 0 and std 1."""
    latents = encode(vae, images[:8192])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, back = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        channels = len(mean)
        quant.weight[:channels] /= std.view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()
        back.bias += (back.weight[:, :, 0, 0] @ mean.unsqueeze(1)).squeeze(1)
        back.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: Any, images: np.ndarray) -> torch.Tensor:
    """Posterior means float32 [N, 4, 8, 8]."""
    parts = np.array_split(images, max(1, len(images) // 256))
    return torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in parts])


def run(rank: int, args: argparse.Namespace) -> None:
    """One training process through all stages."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    work: Path = args.work
    if rank == 0:
        _prepare(work, args.scenes)
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    data = training_set(work / "data.npz", args.scenes, tokenizer)
    placed = layout_set(work / "layout.npz", SEED, range(args.scenes), tokenizer)
    mixed = _mixed_sets(work, args.scenes, tokenizer)
    stages: dict[str, Callable[[], nn.Module]] = {
        "vae": lambda: VaeLoss(STAGES["vae"].size),
        "clip": lambda: ClipLoss(tokenizer, STAGES["clip"].size, halved=0.75),
        "clip_text": lambda: clip_text(tokenizer, work),
        "text": lambda: TextLoss(tokenizer, STAGES["text"].size),
        "diffusion": lambda: diffusion(tokenizer, work),
        "text_on": lambda: OrderLoss(
            _load(TextLoss(tokenizer, STAGES["text_on"].size), work / "text.safetensors")
        ),
        "diffusion_on": lambda: diffusion_on(tokenizer, work),
    }
    ordered = {"mixed" if k == "tokens" else k: v for k, v in mixed.pop("text_on").items()}
    captions = {"text": placed, "text_on": placed | ordered, **mixed}
    for stage, build in stages.items():
        torch.manual_seed(args.seed)
        if stage == "diffusion":
            if rank == 0 and not (work / "latents.npy").exists():
                vae = _load(VaeLoss(0), work / "vae.safetensors").vae
                standardise(vae, data["images"])
                save_file(vae.state_dict(), work / "vae-standard.safetensors")
                np.save(work / "latents.npy", encode(vae, data["images"]).numpy())
            dist.barrier()
            latents = np.load(work / "latents.npy")
            for drawn in mixed.values():
                drawn["latents"] = latents
        if not (work / f"{stage}.safetensors").exists():
            snapshots = tuple(args.snapshots) if stage == "diffusion" else ()
            fit(stage, build(), captions.get(stage, data), work, args.seed, snapshots)
            if rank == 0 and stage == "text":
                unseen = range(args.scenes, args.scenes + UNSEEN)
                read = layout_set(work / "unseen.npz", SEED, unseen, tokenizer)
                text = _load(TextLoss(tokenizer, 0), work / "text.safetensors")
                log.info("read right: mentions %.4f, places %.4f", *accuracy(text, read))
        dist.barrier()
    dist.destroy_process_group()


def spawn(process: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `process` as so many as are asked for, each with its rank."""
    args.work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        process, (args,), args.processes
    )


def _prepare(work: Path, scenes: int) -> None:
    """Draw what all processes read."""
    arch.write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    training_set(work / "data.npz", scenes, tokenizer)
    layout_set(work / "layout.npz", SEED, range(scenes), tokenizer)
    _mixed_sets(work, scenes, tokenizer)


def _mixed_sets(
    work: Path, scenes: int, tokenizer: CLIPTokenizer
) -> dict[str, dict[str, np.ndarray]]:
    """The captions of each stage of the U-Net, and of the text encoder's second."""
    return {
        stage: mixed_set(work / f"{stage}.npz", SEED, scenes, tokenizer, *shares)
        for stage, shares in DISORDERED.items()
    }


def clip_text(tokenizer: CLIPTokenizer, work: Path) -> ClipLoss:
    """CLIP, its image tower and temperature fixed; half of the captions are as they are.

    From bags alone disorder looks better to it than the caption; published ones prefer the caption.
    """
    loss: ClipLoss = _load(
        ClipLoss(tokenizer, STAGES["clip_text"].size, halved=0.25, shuffled=0.25),
        work / "clip.safetensors",
    )
    loss.clip.visual.requires_grad_(False)
    loss.clip.logit_scale.requires_grad_(False)
    return loss


def diffusion(tokenizer: CLIPTokenizer, work: Path) -> DiffusionLoss:
    """A new U-Net, with the text encoder that knows what stands where."""
    text = _load(TextLoss(tokenizer, 0), work / "text.safetensors")
    size = STAGES["diffusion"].size
    return DiffusionLoss(tokenizer, text.text_encoder, size, MOST["diffusion"])


def diffusion_on(tokenizer: CLIPTokenizer, work: Path) -> DiffusionLoss:
    """The U-Net so far, with the text encoder that knows disorder, too."""
    ordered = _load(OrderLoss(TextLoss(tokenizer, 0)), work / "text_on.safetensors")
    loss: DiffusionLoss = _load(diffusion(tokenizer, work), work / "diffusion.safetensors")
    loss.text_encoder.load_state_dict(ordered.text.text_encoder.state_dict())
    loss.size, loss.most = STAGES["diffusion_on"].size, MOST["diffusion_on"]
    return loss


def _load(module: nn.Module, path: Path) -> Any:
    from safetensors.torch import load_file

    module.load_state_dict(load_file(path))
    return module.eval()


def export_diffusion(work: Path, out: Path) -> None:
    """Write the diffusers folder in fp16."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    trained = DiffusionLoss(tokenizer, arch.build_text_encoder(tokenizer), 0, 0.0)
    trained = _load(trained, work / "diffusion_on.safetensors")
    pipeline = StableDiffusionPipeline(
        vae=_load(arch.build_vae(), work / "vae-standard.safetensors"),
        text_encoder=trained.text_encoder,
        tokenizer=tokenizer,
        unet=trained.unet,
        scheduler=arch.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out / "diffusion")
    # diffusers loads its parts in float32 unless told otherwise, transformers as the config says.
    config = out / "diffusion" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    # save_pretrained writes the tokenizer in a newer form only; older readers want these two.
    arch.write_tokenizer(out / "diffusion" / "tokenizer")


def export_clip(work: Path, out: Path) -> None:
    """Write the open_clip folder in fp16, its tokenizer beside the config."""
    tokenizer = arch.write_tokenizer(out / "clip")
    clip = _load(ClipLoss(tokenizer, 0, 0.0), work / "clip_text.safetensors").clip
    state = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    save_file(state, out / "clip" / "open_clip_model.safetensors")
    normal = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": arch.clip_config(tokenizer), "preprocess_cfg": normal}
    (out / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "diffitm-shapes"
    parser.add_argument("--work", type=Path, default=default, help="checkpoints and cached data")
    parser.add_argument("--out", type=Path, default=Path(shapes.__file__).parent / "weights")
    parser.add_argument("--processes", type=int, default=2, help="one-thread gloo processes")
    parser.add_argument("--scenes", type=int, default=40000)
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of weights and draws, not of scenes"
    )
    parser.add_argument(
        "--snapshots", type=int, nargs="*", default=[], help="also keep the denoiser at these steps"
    )
    args = parser.parse_args()
    spawn(run, args)
    export_diffusion(args.work, args.out)
    export_clip(args.work, args.out)


if __name__ == "__main__":
    main()
