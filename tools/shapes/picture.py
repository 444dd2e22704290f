"""The picture of the README: what a score is, and what comes of it, on the embedded world and models.

`diffitm gdbench --model shapes --clip shapes --data shapes --out out/demo`, then
`python -m tools.shapes.picture out/demo docs/demo.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import diffitm
from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.report.looks import PALETTE
from diffitm.tasks.registry import find_task

BARS = [
    ("winoground", "text", "Winoground\ntext"),
    ("winoground", "image", "Winoground\nimage"),
    ("flickr30k", "R@1", "Flickr30K\nimages R@1"),
    ("mmvp_vlm", "pair", "MMVP-VLM\npair"),
]
KINDS = [
    ("conditional", "diffusion, naive", PALETTE[0][0]),
    ("normalised", "diffusion, normalised", PALETTE[1][0]),
    ("cosine", "CLIP", PALETTE[2][0]),
]
NONE, RIGHT, WRONG = "#666666", "#00664B", "#A33A00"
SIDE = 256  # pixels


def world_of(run: Path) -> str:
    """The drawn world of a run. Raises InputError for a folder without one."""
    found = [path for path in sorted(run.glob("shapes-*")) if path.is_dir()]
    if not found or not (run / "results.json").is_file():
        raise InputError(f"{run}: is no OUT of gdbench with --data shapes")
    return str(found[0])


def draw(run: Path, path: str) -> None:
    """Write the picture: an image, the errors with its captions and without, accuracies."""
    from matplotlib.figure import Figure

    root = world_of(run)
    example = next(find_task("winoground")().examples(root))
    figure = Figure(figsize=(11, 3.6), facecolor="white", dpi=130, layout="constrained")
    image, errors, bars = figure.subplots(1, 3, width_ratios=[1, 1.35, 2])
    _image(image, example, root)
    _errors(errors, example, root)
    _bars(bars, json.loads((run / "results.json").read_text())["rows"])
    for axes in (errors, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _image(axes: Any, example: Example, root: str) -> None:
    picture, _ = images.load(root, example.images[0])
    axes.imshow(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    axes.set(xticks=[], yticks=[], title="Which caption is right?")
    for place, text, colour in zip((-0.06, -0.15), example.texts, (RIGHT, WRONG), strict=True):
        axes.text(0.5, place, text, color=colour, ha="center", va="top", transform=axes.transAxes)


def _errors(axes: Any, example: Example, root: str) -> None:
    """What each text takes off the error of noise prediction, by timestep."""
    scorer = diffitm.load_scorer("shapes")
    picture, _ = images.load(root, example.images[0])
    right, wrong, none = scorer.errors(picture, [*example.texts, ""])[0]
    axes.axhline(0, color=NONE, linewidth=1)
    for error, colour, name in [(right, RIGHT, "right"), (wrong, WRONG, "wrong")]:
        label = f"{name}: score {np.mean(none - error):+.2f}"
        axes.plot(scorer.timesteps, none - error, "o-", color=colour, markersize=4, label=label)
    axes.set(title="How much each caption helps\nto predict the noise", xlabel="timestep")
    axes.set_ylabel("error without text, less that with it")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # for the legend
    axes.legend(frameon=False, loc="upper left", fontsize=9, handlelength=1.2)


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy in %, with 95% intervals and chance."""
    shown = [r for r in rows if r["group"] == "all" and r["model"] in ("shapes", "CLIP shapes")]
    found = {(r["task"], r["metric"], r["score"]): r for r in shown}
    width = 0.8 / len(KINDS)
    for i, (task, metric, _) in enumerate(BARS):
        for k, (score, name, colour) in enumerate(KINDS):
            row = found.get((task, metric, score)) or found[task, metric, "conditional"]
            value, low, high = (100 * row[field] for field in ("value", "low", "high"))
            axes.bar(
                i + (k - 1) * width, value, width, color=colour, label=name if not i else None,
                yerr=[[value - low], [high - value]], error_kw={"linewidth": 0.8, "capsize": 2},
            )  # fmt: skip
        axes.hlines(
            100 * row["chance"], i - 0.45, i + 0.45, color="black", linestyle=":",
            label=None if i else "chance",
        )  # fmt: skip
    axes.set(
        ylim=(0, 125),
        yticks=range(0, 101, 20),
        ylabel="% right",
        title="Small embedded models, drawn scenes",
    )
    axes.set_xticks(range(len(BARS)), [label for _, _, label in BARS])
    axes.legend(frameon=False, ncols=2, loc="upper right", fontsize=8)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="OUT of a gdbench run with --data shapes")
    parser.add_argument("out", help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args()
    draw(args.run, args.out)


if __name__ == "__main__":
    main()
