"""Names to objects, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from diffitm.core.errors import InputError, suggest


def find(table: dict[str, str], name: str, what: str) -> Any:
    """The object that `name` stands for.

    Raises InputError, with the nearest known name, if there is none.
    """
    if name not in table:
        raise InputError(f"unknown {what} {name!r}{suggest(name, table)}")
    return load(table[name])


def load(place: str) -> Any:
    """The object at 'package.module:name' or 'folder/file.py:name'."""
    module, _, attribute = place.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), attribute)
    path = Path(module).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(f"diffitm_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, attribute)
