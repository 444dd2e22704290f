"""What is there in the end, and what is missing."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

from diffitm.core import storage
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.images import is_image
from diffitm.datasets import recipe
from diffitm.datasets.image_fetch import fetched_ids, read_dead
from diffitm.datasets.recipe import DatasetRecipe, Hub, ImageList
from diffitm.datasets.unpack import write_note

log = logging.getLogger("diffitm")


class Outcome(NamedTuple):
    """What became of one step."""

    name: str
    good: bool
    text: str


def write_classes(root: Path) -> bool:
    """Make pets/classes.txt from the file names, if the authors' could not be fetched."""
    folder = root / "pets"
    names = {p.stem.rpartition("_")[0] for p in folder.glob("images/*") if is_image(p.name)}
    if not names or (folder / "classes.txt").exists():
        return False
    lines = sorted(name.replace("_", " ").lower() for name in names)
    text = "\n".join(lines) + "\n"
    storage.write_text(str(folder / "classes.txt"), text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    note = {"url": "made from the file names", "size": len(text), "sha256": sha256}
    write_note("pets/classes.txt", root, note)
    log.info("pets/classes.txt: made from the file names, %d classes", len(lines))
    return True


def lacking_images(source: DatasetRecipe, root: Path) -> tuple[list[str], str, int]:
    """What the image lists of a data set lack, a line about them, and how many links are dead."""
    for step in source.steps:
        if isinstance(step, ImageList) and (root / step.csv).is_file():
            wanted = dict(recipe.image_addresses(step, root))
            there, dead = fetched_ids(root / step.folder), read_dead(root / step.folder)
            have = sum(name in there for name in wanted)
            gone = sum(name not in there and url in dead for name, url in wanted.items())
            left = len(wanted) - have - gone
            line = f"{have:,} of {len(wanted):,} images, {gone:,} dead links (svo/dead_links.csv)"
            lack = f"{left:,} images were not fetched yet: run the same command again"
            return [lack] if left else [], line, gone
    return [], "", 0


def report(chosen: dict[str, DatasetRecipe], outcomes: list[Outcome], root: Path) -> None:
    """Print what is there and what is missing. Raises InputError if anything is that can be had,
    Incomplete if only images with dead links are."""
    errors, dead = [], 0
    for name, source in chosen.items():
        try:
            lacking, line, gone = lacking_images(source, root)
        except InputError as error:
            lacking, line, gone = [str(error)], "", 0
        dead += gone
        lacking += recipe.missing(source, root)
        names = [
            step.repo if isinstance(step, Hub) else getattr(step, "to", "") for step in source.steps
        ]
        failed = [o for o in outcomes if not o.good and o.name in names]
        size = sum(_size(root / folder) for folder in {name, *(n.partition("/")[0] for n in names)})
        state = "incomplete" if lacking or failed else "complete"
        _print(f"{name:<11} {state:<11} {size / 1e6:>10,.1f} MB  {line or source.licence}")
        problems = [f"{o.name}: {o.text}" for o in failed] + lacking
        if lacking and source.by_hand:
            problems.append(f"by hand: {source.by_hand}")
        for problem in problems:
            _print(f"    {problem}")
        if problems:
            errors.append(f"{name}: {problems[-1 if source.by_hand else 0]}")
    if errors:
        raise InputError("not complete\n" + "\n".join(f"  {error}" for error in errors))
    if dead:
        raise Incomplete(f"{dead:,} images have dead links; they are listed in svo/dead_links.csv")


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(
        os.lstat(os.path.join(where, name)).st_size
        for where, _, names in os.walk(folder)
        for name in names
    )


def _print(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
