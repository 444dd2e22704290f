"""The steps of pipelines/prepare.py: check, lock the folder, fetch what it lacks, report."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

from diffitm.commands.stages.fetch import Reach, fetch_images, start_archives, wait_archives
from diffitm.core.errors import InputError
from diffitm.datasets import recipe
from diffitm.datasets.hub import fetch_hub
from diffitm.datasets.options import DataConfig, check, warn_of_proxies
from diffitm.datasets.recipe import DatasetRecipe, Download, Hub, ImageList
from diffitm.datasets.status import Outcome, report, write_classes
from diffitm.datasets.unpack import STATE, brought

log = logging.getLogger("diffitm")


def run(config: DataConfig) -> None:
    """Fetch what the tasks lack and say what is there.

    Raises InputError for what is left to do, Incomplete if only images with dead links lack.
    """
    chosen = check(config)
    root = Path(config.data).expanduser().absolute()
    warn_of_proxies(config)
    with _locked(root) as marker:
        reach = Reach(str(root), str(marker), config.allow_private, config.proxy)
        outcomes = _fetch(chosen, reach, config)
        if "pets" in chosen and write_classes(root):
            outcomes = [outcome for outcome in outcomes if outcome.name != "pets/classes.txt"]
        for outcome in outcomes:
            log.info("%s: %s", outcome.name, outcome.text)
        report(chosen, outcomes, root)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[Path]:
    """Makes the data root, and keeps a second run out of it; yields a file that all nodes must see."""
    state = root / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise InputError(f"--data {root}: cannot be written to: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--data {root}: another run of prepare works on this folder"
            ) from None
        except OSError:
            log.warning("%s cannot be locked: start no second run of prepare on it", root)
        marker = state / f"marker-{uuid.uuid4().hex}"
        marker.touch()
        try:
            yield marker
        finally:
            marker.unlink(missing_ok=True)


def _fetch(chosen: dict[str, DatasetRecipe], reach: Reach, config: DataConfig) -> list[Outcome]:
    """All steps: archives and the Hub side by side, then the images, whose list is an archive's."""
    root = Path(reach.root)
    steps = _needed(chosen, root)
    downloads = [step for step in steps if isinstance(step, Download)]
    if not all(isinstance(step, Hub) for step in steps):
        from diffitm.distributed.session import connect

        connect(config.ray)
    started = start_archives(downloads, reach, config.keep_archives)
    outcomes = [
        fetch_hub(step, source, root, config.keep_archives)
        for source in chosen.values()
        for step in source.steps
        if isinstance(step, Hub)
    ]
    outcomes += wait_archives(started, root)
    for step in steps:
        if isinstance(step, ImageList) and (root / step.csv).is_file():
            outcomes.append(fetch_images(step, reach, config))
    return outcomes


def _needed(chosen: dict[str, DatasetRecipe], root: Path) -> list[Download | Hub | ImageList]:
    """All steps, less the archives of data that the user brought and that lack nothing."""
    steps: list[Download | Hub | ImageList] = []
    for name, source in chosen.items():
        own = [s for s in source.steps if isinstance(s, Download) and brought(s, root)]
        if own and not recipe.missing(source, root):
            log.info("%s: its files are there already, not fetched from here", name)
            steps += [step for step in source.steps if step not in own]
        else:
            steps += source.steps
    return list(dict.fromkeys(steps))  # images that several sets share are one step
