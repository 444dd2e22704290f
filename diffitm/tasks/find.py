"""A task by its name: one of ours, an installed package's or the user's own."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from diffitm.errors import InputError
from diffitm.registry import TASKS, find, load
from diffitm.tasks.base import Task

ENTRY_POINTS = "diffitm.tasks"


def find_task(name: str) -> type[Task]:
    """A task's class: one of ours, an installed package's ('diffitm.tasks' entry point), or the
    user's own as 'package.module:Class' or 'folder/file.py:Class'.

    Raises InputError if there is none, or it is not a task.
    """
    installed: dict[str, EntryPoint] = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name in TASKS or (name not in installed and ":" not in name):
        known: type[Task] = find(TASKS | dict.fromkeys(installed, ""), name, "task")
        return known
    try:
        found = installed[name].load() if name in installed else load(name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"task {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"task {name!r} is not a subclass of diffitm.tasks.base.Task")
    return found
