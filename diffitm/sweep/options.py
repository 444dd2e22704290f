"""Options of pipelines/sweep.py: those of the search, and those of the pipeline that is swept."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

from diffitm.core.config import (
    OnRay,
    convert,
    field_of,
    find_outside,
    keys,
    make,
    option,
    parse,
    read_yaml,
    types_of,
)
from diffitm.core.errors import InputError, suggest
from diffitm.sweep.space import Axis, read_axis

PAIR = re.compile(r"(?:--)?([A-Za-z][\w-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class SweepConfig(OnRay):
    """Options of the search."""

    out: str = option("out/sweep", "folder or URI for trials, table, report and the best setting")
    search: Literal["grid", "random", "optuna"] = option(
        "grid", "every combination of values; or settings drawn; or proposed by Optuna's TPE"
    )
    samples: int = option(8, "settings of search=random and search=optuna", at_least=1)
    search_seed: int = option(0, "of the settings that are drawn", at_least=0)
    parallel: int | None = option(
        None, "trials at a time (default: as many as fit on the cluster as it is now)", at_least=1
    )
    early_stopping: bool = option(
        True, "ASHA: of the trainings that came as far, only the best go on"
    )
    grace: int = option(1, "validations before a training can be stopped", at_least=1)
    reduction: int = option(3, "ASHA lets the best 1/REDUCTION go on", at_least=2)
    store: str | None = option(
        None, "timesteps: OUT of a gdbench run whose stored errors are read (default: this OUT)"
    )


@dataclass(frozen=True)
class Kind:
    """What can be swept: a pipeline's config class, the defaults of a sweep, further options that are
    no field of it (name -> type), those that stand for another one, and the axes where the user
    names none."""

    name: str
    config: type
    defaults: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    stand_for: dict[str, str] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()

    @property
    def types(self) -> dict[str, Any]:
        return types_of(self.config) | self.more


@dataclass(frozen=True)
class Sweep:
    """A sweep as asked for: the search, the options that all trials share, and the axes."""

    kind: Kind
    config: SweepConfig
    fixed: dict[str, Any]
    axes: tuple[Axis, ...]


def read_sweep(
    kinds: dict[str, Kind], arguments: Sequence[str] | None = None, description: str = ""
) -> Sweep:
    """`KIND [--config FILE] key=value ...` as a sweep; words win over the file.

    Raises InputError with every problem found.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(words):
        parse(SweepConfig, ["--help"], description)
    values, file, rest = _pairs(words)
    if len(rest) != 1 or rest[0] not in kinds:
        given = " ".join(rest) or "nothing"
        hint = suggest(rest[0], kinds) if rest else ""
        raise InputError(f"say what to sweep: {', '.join(kinds)}; {given} was given{hint}")
    kind = kinds[rest[0]]
    from_file = {} if file is None else read_yaml(file)
    mine, theirs = types_of(SweepConfig), kind.types
    problems, search, options = [], {}, dict[str, Any]()
    for where, (key, value) in [
        *((f"{file}: ", item) for item in from_file.items()),
        *(("", item) for item in values.items()),
    ]:
        name = field_of(str(key), {**theirs, **mine})
        if name in mine:
            search[name] = value
        elif name in theirs:
            options[name] = _listed(value, theirs[name]) if not where else value
        else:
            known = keys({**mine, **theirs})
            problems.append(f"{where}unknown key {key!r}{suggest(str(key), known)}")
    return _checked(kind, search, options, problems)


def _pairs(words: list[str]) -> tuple[dict[str, str], str | None, list[str]]:
    """key=value words (also as --key value), the file of --config, and all other words."""
    values, rest, file = dict[str, str](), [], None
    while words:
        word = words.pop(0)
        found = PAIR.fullmatch(word)
        if word.startswith("--") and not found and words:
            found = PAIR.fullmatch(f"{word}={words.pop(0)}")
        if found is None:
            rest.append(word)
        elif found[1] == "config":
            file = found[2]
        else:
            values[found[1]] = found[2]
    return values, file, rest


def _listed(value: str, kind: Any) -> Any:
    """A word's value: with commas outside of brackets it is a list."""
    parts = re.split(r",(?![^()]*\))", value)
    if get_origin(kind) is list:
        return [part for part in parts if part]
    values = [_scalar(part, kind) for part in parts]
    return values if len(values) > 1 else values[0]


def _scalar(value: str, kind: Any) -> Any:
    if kind is bool and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    return value


def _checked(
    kind: Kind, search: dict[str, Any], options: dict[str, Any], problems: list[str]
) -> Sweep:
    """Raises InputError with the problems, and with those of the values."""
    types, fixed, axes = kind.types, dict[str, Any](), []
    for name, value in {**kind.defaults, **options}.items():
        try:
            found = read_axis(name, types[name], value)
        except InputError as error:
            problems.append(error.on_command_line())
            continue
        if isinstance(found, Axis):
            axes.append(found)
            continue
        try:
            fixed[name] = convert(found, types[name])
        except InputError as error:
            problems.append(f"{name.rstrip('_')}: {error}")
        except (TypeError, ValueError) as error:
            problems.append(f"{name.rstrip('_')}: {found!r} is not {error}")
    named = {*fixed, *(axis.name for axis in axes)}
    for name, other in kind.stand_for.items():
        if {name, other} <= named:
            problems.append(f"{name}: stands for {other}; give one of both")
        named |= {other} if name in named else set()
    axes += [axis for axis in kind.axes if axis.name not in named]
    words = {"true": True, "false": False}
    search = {k: words.get(str(v).lower(), v) for k, v in search.items()}
    try:
        config = make(SweepConfig, search, problems)
    except InputError as error:
        raise InputError(error.on_command_line()) from None
    problems += find_outside(config)
    ranges = [str(axis) for axis in axes if axis.how]
    if ranges and config.search == "grid":
        problems.append(f"{ranges[0]}: a grid needs values; ranges need search=random or optuna")
    if problems:
        raise InputError("\n".join(problems))
    return Sweep(kind, config, fixed, tuple(sorted(axes, key=lambda axis: axis.name)))


def values_of(sweep: Sweep, fixed: dict[str, Any], name: str) -> tuple[Any, ...]:
    """All values of an option, whether swept or not."""
    axes = {axis.name: axis for axis in sweep.axes}
    return axes[name].extremes if name in axes else (fixed[name],)
