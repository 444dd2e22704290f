"""A run's examples: the data root, and each task's examples as a file below OUT."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.evaluation.evaluate import present
from diffitm.store import pair_table
from diffitm.tasks.registry import SETS, find_task

log = logging.getLogger("diffitm")


class Examples(NamedTuple):
    """A task's examples as written: the file, and what identifies its content."""

    uri: str
    identity: str


def data_root(data: str, scenes: int, out: str, tasks: Iterable[str] = ()) -> str:
    """The data root: a folder or URI, or for 'shapes' the world, drawn below `out` if it is not there, with
    the files of `tasks`.

    Raises InputError if there is none.
    """
    if data != "shapes":
        root = storage.absolute(data)
        if not storage.exists(root):
            raise InputError(f": there is no folder {root}", "data")
        return root
    from diffitm.shapes.layouts import VERSION, write_world
    from diffitm.shapes.sets import write_sets

    root = storage.join(out, f"shapes-{scenes}-v{VERSION}")
    write_world(root, scenes)
    if not SETS.keys().isdisjoint(tasks):
        write_sets(root, scenes)
    return root


def write_examples(
    tasks: Sequence[str], root: str, out: str, limit: int | None = None
) -> dict[str, Examples]:
    """The examples of every task, by its name; at most `limit` of each. Raises InputError with all that
    is missing."""
    examples, problems = {}, []
    chosen = dict[str, str]()
    for name in tasks:
        task = find_task(name)()
        if (other := chosen.setdefault(task.name, name)) != name:
            problems.append(f"tasks {other} and {name} are both named {task.name}; rename one")
            continue
        folder = storage.join(out, "examples")
        try:
            uri, count = pair_table.write_examples(task.name, task.examples(root), folder, limit)
        except InputError as error:
            problems.append(error.on_command_line())
            continue
        absent = present(root, uri) if count else None
        if count == 0:
            where = storage.join(root, task.folder)
            problems.append(f"task {task.name}: its files below {where} hold no example")
        elif absent is not None:
            problems.append(
                f"task {task.name} needs its images, such as {absent} (from {task.source})"
            )
        else:
            log.info("%s: %s examples", task.name, f"{count:,}")
            examples[name] = Examples(uri, f"{task.version}-{storage.without_query(uri)}")
    if problems:
        hint = "--check tells what DATA has, --tasks chooses, diffitm prepare fetches"
        raise InputError("\n".join([*problems, hint]))
    return examples
