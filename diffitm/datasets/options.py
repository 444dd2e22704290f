"""Options of pipelines/prepare.py."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from diffitm.core.config import find_outside, option, parse
from diffitm.core.errors import InputError
from diffitm.datasets import sources
from diffitm.datasets.client import check_proxy
from diffitm.datasets.recipe import DatasetRecipe

log = logging.getLogger("diffitm")


@dataclass(frozen=True)
class DataConfig:
    """Options of pipelines/prepare.py."""

    tasks: list[str] = option(
        [], "what to fetch; the bare names before the first option do the same"
    )
    data: str = option("", "data root: a folder of this machine, or one that all nodes share")
    connections: int = option(32, "most connections for svo's single images", at_least=1)
    per_host: int = option(4, "most connections to one host", at_least=1)
    retry_dead: bool = option(False, "try the links of svo/dead_links.csv again")
    keep_archives: bool = option(False, "do not delete an archive after unpacking it")
    allow_private: bool = option(
        False, "follow addresses into private networks (a mirror in your own network)"
    )
    proxy: str | None = option(
        None, "http://host:port of a proxy; it resolves names, so it must keep them public itself"
    )
    limit: int | None = option(None, "at most this many of svo's images in this run", at_least=1)
    ray: str | None = option(
        None, "address of a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )


def read(words: list[str], about: str) -> DataConfig:
    """The options of a command line."""
    return parse(DataConfig, with_tasks(words), about)


def with_tasks(arguments: list[str]) -> list[str]:
    """The command line with its leading bare words as --tasks."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, rest = arguments[:first], arguments[first:]
    if not names:
        return arguments
    return ["--tasks", *names, *rest]


def check(config: DataConfig) -> dict[str, DatasetRecipe]:
    """The chosen data sets; all problems of the options together."""
    problems, chosen = [], dict[str, DatasetRecipe]()
    try:
        names = list(sources.SOURCES) if config.tasks == ["all"] else config.tasks
        chosen = sources.find(names, sources.SOURCES)
    except InputError as error:
        problems.append(error.on_command_line())
    if not config.tasks:
        problems.append(f"name what to fetch: all, or some of {', '.join(sources.SOURCES)}")
    if not config.data:
        problems.append("--data: give the folder that the data goes to")
    elif "://" in config.data:
        problems.append(
            f"--data {config.data}: must be a folder, local or shared; fetch into one and copy it "
            "to the store with its own tool"
        )
    problems += find_outside(config)
    try:
        check_proxy(config.proxy)
    except InputError as error:
        problems.append(error.on_command_line())
    if problems:
        raise InputError("\n".join(problems))
    return chosen


def warn_of_proxies(config: DataConfig) -> None:
    found = [name for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if _environment(name)]
    if found and not config.proxy:
        log.warning("%s is not used; --proxy names a proxy to go through", ", ".join(found))


def _environment(name: str) -> str | None:
    return os.environ.get(name) or os.environ.get(name.lower())
