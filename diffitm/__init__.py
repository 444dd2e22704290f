"""diffitm: measure and use what text-to-image diffusion models know about images and words.

scorer = diffitm.load_scorer("shapes")
scores = scorer(images=["a.png", "b.png"], texts=["a cat", "a dog"])
table = diffitm.evaluate(scorer, ["winoground"], data="shapes")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"  # of the package, too: pyproject.toml reads it here
# Where the names are; __init__.pyi has them for type checkers.
_PLACES = {
    "Denoiser": "diffitm.models.denoiser",
    "Example": "diffitm.core.schema",
    "ImageTextScorer": "diffitm.api",
    "InputError": "diffitm.core.errors",
    "Scorer": "diffitm.scoring.scorer",
    "Task": "diffitm.tasks.base",
    "evaluate": "diffitm.api",
    "load_scorer": "diffitm.api",
}


__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: torch alone takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffitm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
