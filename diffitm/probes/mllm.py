"""The user's own evaluation of a multimodal language model that sees through this image tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from diffitm.core.errors import InputError
from diffitm.core.registry import load

Measured = tuple[float, float | None, float | None]  # the value and its interval, if it has one


class Hook(NamedTuple):
    """A function of (model name, folder) and where it was found."""

    place: str
    function: Callable[[str, str], Any]


def find_hook(place: str) -> Hook:
    """The function at 'folder/file.py:name' or 'package.module:name'.

    Raises InputError if it cannot be imported or called.
    """
    if not all(place.rpartition(":")):
        raise InputError(
            f"{place!r}: expected 'file.py:function' or 'package.module:function'", "mllm"
        )
    try:
        function = load(place)
    except Exception as error:  # the file is the user's: its import can raise anything
        shown = f"{type(error).__name__}: {error}"
        raise InputError(f"{place!r} cannot be imported: {shown}", "mllm") from error
    if not callable(function):
        raise InputError(f"{place!r} is {_short(function)}, expected a function", "mllm")
    return Hook(place, function)


def run_hook(hook: Hook, name: str, folder: str) -> dict[str, Measured]:
    """What the function measures of the model called `name`, whose image tower lies in `folder`
    (transformers' save_pretrained, which CLIPVisionModel.from_pretrained loads).

    The function returns a mapping of metric names to numbers, or to (value, low, high) with a 95%
    interval. Raises InputError if it raises, or returns anything else.
    """
    try:
        found = hook.function(name, folder)
    except Exception as error:
        shown = f"{type(error).__name__}: {error}"
        raise InputError(f"{hook.place!r} failed on {name!r}: {shown}", "mllm") from error
    if not isinstance(found, Mapping) or not found:
        expected = "expected a mapping of metric names to numbers"
        raise InputError(f"{hook.place!r} returned {_short(found)}, {expected}", "mllm")
    return {_metric(hook, key): _measured(hook, key, value) for key, value in found.items()}


def _metric(hook: Hook, key: Any) -> str:
    if not isinstance(key, str) or not key:
        raise InputError(f"{hook.place!r} returned the key {_short(key)}, expected a name", "mllm")
    return key


def _measured(hook: Hook, key: str, value: Any) -> Measured:
    numbers = value if isinstance(value, tuple | list) else (value,)
    if all(_is_finite(number) for number in numbers):
        if len(numbers) == 1:
            return float(numbers[0]), None, None
        if len(numbers) == 3 and numbers[1] <= numbers[2]:
            return float(numbers[0]), float(numbers[1]), float(numbers[2])
    expected = "expected a finite number, or (value, low, high) of them"
    raise InputError(f"{hook.place!r} returned {key!r}: {_short(value)}, {expected}", "mllm")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return repr(value)[:120]
