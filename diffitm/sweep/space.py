"""What a sweep turns: options with several values, or with a range of numbers."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from diffitm.core.config import convert
from diffitm.core.errors import InputError

TRIES = 1000  # draws for a setting that is not there yet: whole numbers can run out
RANGES = ("uniform", "loguniform", "randint")
RANGE = re.compile(r"(\w+)\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*\)")


@dataclass(frozen=True)
class Axis:
    """An option of a pipeline and what it is set to: one of `values`, or a number drawn from `low` to
    `high` (both included by randint) in the manner of `how`: uniform, loguniform or randint."""

    name: str
    values: tuple[Any, ...] = ()
    how: str = ""
    low: float = 0.0
    high: float = 0.0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all of them where settings are checked."""
        if not self.how:
            return self.values
        return (int(self.low), int(self.high)) if self.how == "randint" else (self.low, self.high)

    def __str__(self) -> str:
        name = self.name.rstrip("_")
        if self.how:
            return f"{name} {self.how}({self.low:g}, {self.high:g})"
        return f"{name} {', '.join(map(str, self.values))}"


def read_axis(name: str, kind: Any, value: Any) -> Axis | Any:
    """The axis that a value means, or the value if it is a single one.

    `kind` is the option's type. A list means several values, unless the option takes a list; text of
    the form loguniform(1e-5, 1e-3) means a range. Raises InputError that names the option.
    """
    found = RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        return _range(name, kind, *found.groups())
    if get_origin(kind) is list or not isinstance(value, list):
        return value
    problems, values = [], []
    for item in value:
        try:
            values.append(convert(item, kind))
        except InputError as error:
            problems.append(f"{name.rstrip('_')}: {error}")
        except (TypeError, ValueError) as error:
            problems.append(f"{name.rstrip('_')}: {item!r} is not {error}")
    if problems or not values:
        raise InputError("\n".join(problems) or f"{name.rstrip('_')}: give at least one value")
    values = list(dict.fromkeys(values))
    return Axis(name, tuple(values)) if len(values) > 1 else values[0]


def _range(name: str, kind: Any, how: str, first: str, last: str) -> Axis:
    text = f"{name.rstrip('_')}: {how}({first}, {last})"
    if how not in RANGES:
        raise InputError(f"{text}: a range is {', '.join(f'{r}(LOW, HIGH)' for r in RANGES)}")
    try:
        low, high = float(first), float(last)
    except ValueError:
        raise InputError(f"{text}: both ends must be numbers") from None
    number = {*get_args(kind), kind} & {int, float}
    if not number or (how == "randint") != (number == {int}):
        whole = "randint" if number == {int} else "uniform or loguniform"
        raise InputError(f"{text}: " + (f"use {whole}" if number else "the option is no number"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{text}: the first number must be the smaller")
    if how == "loguniform" and low <= 0:
        raise InputError(f"{text}: must start above 0")
    if how == "randint" and (low != int(low) or high != int(high)):
        raise InputError(f"{text}: both ends must be whole numbers")
    return Axis(name, (), how, low, high)


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every setting of the values; of ranges, those of their ends."""
    for values in itertools.product(*(axis.extremes for axis in axes)):
        yield dict(zip([axis.name for axis in axes], values, strict=True))


def draw(axes: Sequence[Axis], samples: int, seed: int) -> list[dict[str, Any]]:
    """So many settings at random, no two alike; all there are, where that is fewer."""
    rng = random.Random(seed)
    if not any(axis.how for axis in axes):
        every = list(grid(axes))
        return rng.sample(every, min(samples, len(every)))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(TRIES * samples):
        setting = {axis.name: _drawn(axis, rng) for axis in axes}
        found[str(setting)] = setting
        if len(found) == samples:
            break
    return list(found.values())


def _drawn(axis: Axis, rng: random.Random) -> Any:
    if axis.how == "randint":
        return rng.randint(int(axis.low), int(axis.high))
    if axis.how == "loguniform":
        return math.exp(rng.uniform(math.log(axis.low), math.log(axis.high)))
    return rng.uniform(axis.low, axis.high) if axis.how else rng.choice(axis.values)


def describe(setting: dict[str, Any], axes: Sequence[Axis]) -> str:
    """A setting in words: 'lambda 0.5, lr 0.0001'."""
    told = []
    for axis in axes:
        value = setting[axis.name]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        told.append(f"{axis.name.rstrip('_')} {shown}")
    return ", ".join(told) or "the given setting"
