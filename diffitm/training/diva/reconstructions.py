"""Pictures of what CLIP's tokens tell the teacher: images rebuilt from noise in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.training.diva.step import Diva
from diffitm.training.lora.step import Posterior

LEVEL = 0.7  # of the schedule: most of the image is noise
GAP, SIDE = 4, 96


def row_of_pictures(diva: Diva, pixels: Tensor, posterior: Posterior, seed: int) -> list[Tensor]:
    """Of one image, uint8 [1, 3, H, W] at CLIP's size: CLIP's input, the noised latents decoded, what the
    teacher makes of them in one step with the text alone, and with the tokens; [3, h, w] in [-1, 1]."""
    teacher = diva.teacher
    at = int(LEVEL * teacher.schedule.timesteps)
    noised, steps, _ = diva.noised(posterior, [seed], at)
    columns = [pixels.float() / 127.5 - 1, teacher.decode(noised)]
    for blind in (True, False):
        with torch.autocast(teacher.device.type, teacher.dtype, enabled=diva.autocast):
            condition = diva.conditions(pixels, [seed], blind)
            predicted = teacher.predict(noised, steps, condition)
        clean = teacher.schedule.clean(noised, predicted.float(), steps)
        columns.append(teacher.decode(clean))
    return [column[0].cpu() for column in columns]


def write_pictures(rows: Sequence[Sequence[Tensor]], path: Path) -> None:
    """The rows of row_of_pictures as a PNG."""
    Image.fromarray(_grid([[_cell(pixels) for pixels in row] for row in rows])).save(path)


def _cell(pixels: Tensor) -> np.ndarray:
    """Pixels [3, H, W] in [-1, 1] as uint8 [SIDE, SIDE, 3]."""
    values = ((pixels.cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(values.permute(1, 2, 0).numpy())
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _grid(cells: list[list[np.ndarray]]) -> np.ndarray:
    step = SIDE + GAP
    shape = (len(cells) * step - GAP, len(cells[0]) * step - GAP, 3)
    out = np.full(shape, 255, np.uint8)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            out[row * step :, column * step :][:SIDE, :SIDE] = cell
    return out
