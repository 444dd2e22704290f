"""What the embedded model draws for some captions: `python -m tools.shapes.drawn docs/drawn.png`.

Guidance of 3, 25 steps, four noises; each column begins with the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from diffitm.models.embedded import SHAPES

CAPTIONS = (
    "a red circle to the left of a blue cross",
    "a blue cross to the left of a red circle",
    "a green square above a white triangle",
    "a green square below a white triangle",
    "a large purple cross and a small yellow circle",
    "a small purple cross and a large yellow circle",
    "a yellow triangle at the top",
    "a yellow triangle at the bottom",
    "a red cross to the right of a green circle",
    "a yellow square",
)
NOISES = 4
GUIDANCE, STEPS, SIDE = 3.0, 25, 64


def pictures(folder: str) -> np.ndarray:
    """What the model of a diffusers folder draws: uint8 [captions, NOISES, 32, 32, 3]."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    texts = [text for text in CAPTIONS for _ in range(NOISES)]
    noises = [torch.Generator().manual_seed(k) for _ in CAPTIONS for k in range(NOISES)]
    drawn = pipeline(
        texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noises
    ).images
    side = drawn[0].width
    return np.stack([np.asarray(one) for one in drawn]).reshape(-1, NOISES, side, side, 3)


def draw(folder: str, path: str) -> None:
    """Write the sheet, two columns of captions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = pictures(folder)
    rows = (len(CAPTIONS) + 1) // 2
    figure = Figure(figsize=(7.2, 1.05 * rows), facecolor="white", dpi=110)
    canvas = FigureCanvasAgg(figure)
    for i, text in enumerate(CAPTIONS):
        left, top = 0.5 * (i // rows), 1 - (i % rows) / rows
        figure.text(left + 0.01, top - 0.03 / rows, text, va="top", size=8.5)
        for k, picture in enumerate(drawn[i]):
            place = (left + 0.01 + 0.12 * k, top - 0.97 / rows, 0.115, 0.76 / rows)
            axes = figure.add_axes(place, xticks=[], yticks=[])
            axes.imshow(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    canvas.draw()
    sheet = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="picture to write, .png")
    parser.add_argument("--model", default=str(SHAPES / "diffusion"), help="diffusers folder")
    args = parser.parse_args()
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    draw(args.model, args.out)


if __name__ == "__main__":
    main()
