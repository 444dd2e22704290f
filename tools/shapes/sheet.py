"""The shapes world as a contact sheet: an example of every task, read by the tasks' own readers.

`python -m tools.shapes.sheet sheet.png` draws a world of its own; `--data DIR` takes one that
`diffitm.shapes.layouts` wrote, or any other data root.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from diffitm.core import images
from diffitm.core.schema import Example
from diffitm.shapes.layouts import write_world
from diffitm.tasks.registry import GDBENCH, find_task

MOST_IMAGES, MOST_TEXTS = 10, 6
TILE, ROW = 0.72, 1.25  # inches
SCENES = 20
WRONG_TEXT, RIGHT_TEXT = "#A33A00", "#00664B"


def draw(root: str, path: str, tasks: list[str]) -> None:
    """Write a picture with a row a task: images, a green frame around the right one, and texts."""
    from matplotlib.figure import Figure

    width = MOST_IMAGES * TILE + 5.2
    figure = Figure(figsize=(width, ROW * len(tasks)), facecolor="white", dpi=110)
    for i, name in enumerate(tasks):
        top = 1 - i / len(tasks)
        example = next(e for e in find_task(name)().examples(root) if e.failure is None)
        _row(figure, name, example, root, top, 1 / len(tasks), width)
    figure.savefig(path)


def _row(
    figure: Any, name: str, example: Example, root: str, top: float, height: float, width: float
) -> None:
    both, graded = example.direction == "both", find_task(name).graded
    figure.text(0.1 / width, top - 0.1 * height, name, weight="bold", va="top", size=10)
    for k, reference in enumerate(example.images[:MOST_IMAGES]):
        place = ((0.1 + k * TILE) / width, top - 0.9 * height, 0.66 / width, 0.6 * height)
        axes = figure.add_axes(place, xticks=[], yticks=[])
        axes.imshow(images.load(root, reference)[0].resize((96, 96), Image.Resampling.BICUBIC))
        right = graded and (both or example.direction == "text" or k == example.gold)
        for spine in axes.spines.values():
            spine.set(color=RIGHT_TEXT if right else WRONG_TEXT, linewidth=2.5 if right else 0.8)
    left = 0.3 + min(len(example.images), MOST_IMAGES) * TILE
    for k, text in enumerate(example.texts[:MOST_TEXTS]):
        right = both or example.direction == "image" or k == example.gold
        mark, colour = ("+ ", RIGHT_TEXT) if right else ("- ", WRONG_TEXT)
        if not graded:
            mark, colour = "", "black"
        more = " ..." if k == MOST_TEXTS - 1 < len(example.texts) - 1 else ""
        at = top - (0.22 + 0.13 * k) * height
        figure.text(left / width, at, mark + text + more, color=colour, va="top", size=8)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="picture to write (.png, .svg, .pdf)")
    parser.add_argument("--data", help="data root (default: a small world drawn for the purpose)")
    parser.add_argument("--tasks", nargs="+", default=list(GDBENCH), help="which tasks")
    args = parser.parse_args()
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    if args.data:
        draw(args.data, args.out, args.tasks)
        return
    with tempfile.TemporaryDirectory() as root:
        write_world(root, SCENES)
        draw(root, args.out, args.tasks)


if __name__ == "__main__":
    main()
