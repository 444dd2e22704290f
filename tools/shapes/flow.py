"""Train the embedded flow transformer: `python -m tools.shapes.flow --work DIR`.

It takes the VAE and the text encoder of the embedded diffusion model as they are in --out, the scenes and
captions that say where (layout.py), and learns the flow from noise to latents. Resumable as the stages of
train.py are; then the export as fp16 safetensors, without the parts that it shares.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffitm import shapes
from tools.shapes import architecture as arch
from tools.shapes.layout import layout_set
from tools.shapes.train import SEED, STAGES, encode, fit, spawn, training_set

log = logging.getLogger("tools.shapes.flow")
STAGE = "flow"
DROPPED = 0.1  # of the captions
# Of two draws in three, mean and deviation of sigma's logit; the others are uniform. Things are so large that
# half of the noise does not hide where they stand, so sigmas above that are drawn more often.
SIGMAS, CENTRED = (0.6, 1.0), 0.65


class FlowLoss(nn.Module):
    """The squared error of the velocity eps - z0 at (1 - sigma) z0 + sigma eps; the text encoder is fixed."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.transformer = arch.build_transformer()
        self.text_encoder = CLIPTextModel.from_pretrained(
            model / "text_encoder", dtype=torch.float32
        ).requires_grad_(False)
        empty = CLIPTokenizer.from_pretrained(model / "tokenizer")("", padding="max_length")
        self.empty = torch.tensor(empty.input_ids)

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        size = STAGES[STAGE].size
        chosen = rng.integers(len(data["latents"]), size=size)
        latents = torch.from_numpy(data["latents"][chosen])
        captions = rng.integers(data["tokens"].shape[1], size=size)
        tokens = torch.from_numpy(data["tokens"][chosen, captions]).long()
        dropped = torch.from_numpy(rng.random(size) < DROPPED)
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        centred = 1 / (1 + np.exp(-rng.normal(*SIGMAS, size)))
        drawn = np.where(rng.random(size) < CENTRED, centred, rng.random(size))
        sigma = torch.from_numpy(drawn.astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        with torch.no_grad():
            text = self.text_encoder(tokens, output_hidden_states=True)
        velocity = self.transformer(
            hidden_states=torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1)),
            timestep=1000 * sigma,
            encoder_hidden_states=text.hidden_states[-2],
            pooled_projections=text.pooler_output,
            return_dict=False,
        )[0]
        return (velocity - (noise - latents)).square().mean()


def run(rank: int, args: argparse.Namespace) -> None:
    """One training process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    if rank == 0:
        prepare(args.work, args.out / "diffusion", args.scenes)
    dist.barrier()
    with np.load(args.work / "layout.npz") as drawn:
        data = {"tokens": drawn["tokens"], "latents": np.load(args.work / "latents.npy")}
    if not (args.work / f"{STAGE}.safetensors").exists():
        torch.manual_seed(args.seed)
        fit(STAGE, FlowLoss(args.out / "diffusion"), data, args.work, args.seed)
    dist.destroy_process_group()


def prepare(work: Path, model: Path, scenes: int) -> None:
    """Draw and encode what all processes read."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    layout_set(work / "layout.npz", SEED, range(scenes), tokenizer)
    if not (work / "latents.npy").exists():
        images = training_set(work / "data.npz", scenes, tokenizer)["images"]
        vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
        np.save(work / "latents.npy", encode(vae, images).numpy())


def export(work: Path, out: Path) -> None:
    """Write what of the diffusers folder is the flow model's own, in fp16."""
    state = load_file(work / f"{STAGE}.safetensors")
    prefix = "transformer."
    transformer = arch.build_transformer()
    transformer.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    folder = out / "flow"
    transformer.to(torch.float16).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index(), indent=2) + "\n")


def index() -> dict[str, Any]:
    """model_index.json of a Stable Diffusion 3 with one CLIP and no T5."""
    none = [None, None]
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": none,
        "image_encoder": none,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": none,
        "text_encoder_3": none,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": none,
        "tokenizer_3": none,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "diffitm-shapes-flow"
    parser.add_argument("--work", type=Path, default=default, help="checkpoints and cached data")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(shapes.__file__).parent / "weights",
        help="with the embedded diffusion model",
    )
    parser.add_argument("--processes", type=int, default=2, help="one-thread gloo processes")
    parser.add_argument("--scenes", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and draws")
    args = parser.parse_args()
    spawn(run, args)
    export(args.work, args.out)


if __name__ == "__main__":
    main()
