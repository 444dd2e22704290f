"""CLIPs tuned by diva.py against the one that they were tuned from, on scenes that chose no setting.

    python -m diffitm.shapes.layouts WORLD --scenes 1000 --seed 23
    python -m benchmarks.fresh WORLD OUT1 OUT2 ..

Runs of one recap with several seeds are one row: mean accuracy in % and, in brackets, the 95% interval of
the difference from the base, examples as its units; for the segmentation probe (400 drawn scenes, below
WORLD) each seed's difference in points of mean IoU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.objectives import cell, mean
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.probes.segmentation import SegmentationResult, evaluate, paired
from diffitm.scoring.clip import ClipScorer
from diffitm.shapes.masks import write_masks
from diffitm.tasks.registry import find_task
from diffitm.training.validation import credits

TASKS = ("mmvp_vlm", "winoground", "pets", "flickr30k", "flickr30k_text")
Measured = tuple[dict[str, list[float | None]], SegmentationResult]


def measure(name: str, world: Path) -> Measured:
    """Credits of each example by task, and the segmentation probe."""
    clip, found = load_clip(resolve_clip(name)), {}
    for task in (find_task(task)() for task in TASKS):
        examples = list(task.examples(str(world)))
        found[task.name] = credits(task, examples, ClipScorer(clip, str(world)))
    return found, evaluate(clip.model, name, str(world / "masks"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", type=Path)
    parser.add_argument("clips", nargs="+", help="folders that diva.py wrote")
    args = parser.parse_args()
    write_masks(str(args.world / "masks"), 400)
    groups: dict[str, list[str]] = {}
    for clip in args.clips:
        settings = json.loads((Path(clip) / "training.json").read_text())["settings"]
        groups.setdefault(settings["recap"], []).append(clip)
    base, probed = measure("shapes", args.world)
    head = ["recap", "seeds", *TASKS, "segmentation mIoU"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    known = [f"{100 * mean(base[task]):.1f}" for task in TASKS]
    print(f"| {' | '.join(['base', '', *known, f'{100 * probed.miou:.1f}'])} |", flush=True)
    for recap, clips in groups.items():
        runs = [measure(clip, args.world) for clip in clips]
        cells = [cell([run[task] for run, _ in runs], base[task]) for task in TASKS]
        tests = [paired(result, probed) for _, result in runs]
        told = (f"{100 * t.value:+.1f} [{100 * t.low:+.1f}, {100 * t.high:+.1f}]" for t in tests)
        print(f"| {' | '.join([recap, str(len(clips)), *cells, ', '.join(told)])} |", flush=True)


if __name__ == "__main__":
    main()
