"""One frozen dataclass a pipeline, filled from a YAML file and the command line.

A field is an option: `data: str` is --data. Lists take several values, booleans have --no-x.
All errors are reported together, each with the bad value and what would be right.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from diffitm.core import storage
from diffitm.core.errors import InputError, flag, suggest

C = TypeVar("C")


MOST = 2**31 - 1  # of a number that has a least one, unless it says otherwise


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with a default, the help line of its option and the bounds of its number,
    which find_outside holds it to."""
    if at_most is None and at_least is not None:
        at_most = MOST
    metadata = {"help": help, "at_least": at_least, "above": above, "at_most": at_most}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class OnRay:
    """Options of every pipeline that runs on Ray and writes an OUT."""

    ray: str | None = option(
        None, "address of a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )
    takeover: bool = option(
        False, "write to an OUT whose last run died on another machine, without waiting for it"
    )
    verbose: bool = option(False, "show Ray's own log, as on clusters")


@dataclasses.dataclass(frozen=True)
class OnActors(OnRay):
    """Options of every pipeline whose stages run on a pool of actors."""

    actors: int | None = option(
        None, "actors (default: one a GPU, else one a processor)", at_least=1
    )
    max_actors: int | None = option(None, "let the pool grow to this many", at_least=1)
    cpus_per_actor: float | None = option(
        None,
        "processors (and threads) of an actor (default: 1, less on a tiny cluster)",
        at_least=0,
    )
    gpus_per_actor: float | None = option(
        None, "GPU share of an actor (default: 1 if there are any)", at_least=0
    )


ON_ACTORS = frozenset(field.name for field in dataclasses.fields(OnActors))
ON_RAY = frozenset(field.name for field in dataclasses.fields(OnRay))  # no result depends on them


def parse(config: type[C], arguments: Sequence[str] | None = None, description: str = "") -> C:
    """Build the config from --config FILE (YAML) and the options, which win over the file.

    A config with PRESETS (name -> values) takes those of --preset where neither says otherwise.
    Raises InputError with every problem found.
    """
    fields = types_of(config)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--OPTION VALUE ..]", description=description, allow_abbrev=False
    )
    of_ray = parser.add_argument_group("where it runs")
    parser.add_argument("--config", help="YAML file with any of the options below")
    for name, kind in fields.items():
        _add(of_ray if name in ON_ACTORS else parser, name, kind, _help(config, name, kind))
    words = sys.argv[1:] if arguments is None else arguments
    known, unknown = parser.parse_known_args([_hyphenated(word) for word in words])
    values = {k: v for k, v in vars(known).items() if k != "config" and v is not None}
    problems = _unknown(unknown, [flag(name) for name in fields])
    from_file = read_yaml(known.config) if known.config else {}
    from_file = {field_of(str(key), fields): value for key, value in from_file.items()}
    problems += [
        f"{known.config}: unknown key {key!r}{suggest(str(key), keys(fields))}"
        for key in from_file
        if key not in fields
    ]
    merged = {**{k: v for k, v in from_file.items() if k in fields}, **values}
    return make(config, merged, problems)


def keys(fields: Iterable[str]) -> list[str]:
    """Fields as files and words have them: Python's word lambda stands as it is."""
    return [name.rstrip("_") for name in fields]


def make(config: type[C], merged: dict[str, Any], problems: Sequence[str] = ()) -> C:
    """The config of these values, field -> value, with those of its preset where they are silent.

    Raises InputError with every problem found, `problems` first.
    """
    fields, problems = types_of(config), list(problems)
    presets: dict[str, dict[str, Any]] = getattr(config, "PRESETS", {})
    if (preset := merged.get("preset")) is not None and preset not in presets:
        problems.append(f"--preset {preset}: must be one of {', '.join(presets)}")
    merged = {**presets.get(str(preset), {}), **merged}
    checked = {}
    for name, value in merged.items():
        try:
            checked[name] = convert(value, fields[name])
        except InputError as error:
            problems.append(f"{flag(name)}: {error}")
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {value!r} is not {error}")
    if problems:
        raise InputError("\n".join(problems))
    return config(**checked)


def lacking(config: Any, examples: dict[str, str]) -> list[str]:
    """A problem for each option without a value, field -> an example of one."""
    return [
        f"give {flag(name)}, such as {flag(name)} {example}"
        for name, example in examples.items()
        if not getattr(config, name)
    ]


def find_outside(config: Any) -> list[str]:
    """A problem for each number that is outside of its option's bounds; None is no number."""
    problems = []
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata
        least, above, most = (bounds.get(name) for name in ("at_least", "above", "at_most"))
        if value is None or (least is None and above is None):
            continue
        if most is not None and value > most:
            problems.append(f"{flag(field.name)} {value}: must be at most {most}")
        elif least is not None and not value >= least:
            problems.append(f"{flag(field.name)} {value}: must be at least {least}")
        elif above is not None and not value > above:
            problems.append(f"{flag(field.name)} {value:g}: must be above {above}")
    return problems


def field_of(key: str, fields: Iterable[str]) -> str:
    """The field that a key of a YAML file means."""
    name = key.replace("-", "_")
    return f"{name}_" if f"{name}_" in fields else name


def _unknown(words: list[str], flags: list[str]) -> list[str]:
    """A problem for each unknown option; the values that follow one are not told again."""
    problems, after_option = [], False
    for word in words:
        if word.startswith("-"):
            problems.append(f"unknown option {word!r}{suggest(word.split('=')[0], flags)}")
        elif not after_option:
            problems.append(f"unexpected argument {word!r}")
        after_option = word.startswith("-") or after_option
    return problems


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file. Raises InputError that names it."""
    try:
        values = yaml.safe_load(storage.read_text(path))
    except FileNotFoundError:
        raise InputError(f"--config: there is no file {path!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {path!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"{path}: must hold 'option: value' lines, got {type(values).__name__}")
    return values or {}


def types_of(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _help(config: type, name: str, kind: Any) -> str:
    """An option's line: what it is, the words it takes, its default where it has one."""
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    text, default = field.metadata.get("help", ""), field.default
    if field.default_factory is not dataclasses.MISSING:
        default = " ".join(str(v) for v in field.default_factory())
    words = [str(word) for word in _words(kind) if str(word) not in text]
    if words:
        text += f" [{', '.join(map(str, _words(kind)))}]"
    if default not in (None, "") and default is not False and "(default:" not in text:
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _words(kind: Any) -> list[Any]:
    """The words that an option may have, [] for one that takes any value."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for inner in get_args(kind) for word in _words(inner)]


def _add(parser: argparse._ActionsContainer, name: str, kind: Any, text: str) -> None:
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag(name), dest=name, action=action, default=None, help=text)
    elif get_origin(kind) is list:
        parser.add_argument(flag(name), dest=name, nargs="+", default=None, help=text)
    else:
        parser.add_argument(flag(name), dest=name, default=None, help=text)


def _hyphenated(word: str) -> str:
    """An option's name with hyphens, as it may be typed with the underscores of a config file, too."""
    name, mark, value = word.partition("=")
    return name.replace("_", "-") + mark + value if name.startswith("--") else word


def convert(value: Any, kind: Any) -> Any:
    """The value as its field's type.

    Raises ValueError, whose text completes 'x is not ...', and InputError for a URI that holds credentials.
    """
    if get_origin(kind) in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        *others, kind = (k for k in get_args(kind) if k is not type(None))
        for other in others:
            with contextlib.suppress(ValueError):
                return convert(value, other)
    if get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [convert(v, get_args(kind)[0]) for v in values]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(map(str, get_args(kind)))}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("a number")
        try:
            number = kind(value)
        except (TypeError, ValueError):
            raise ValueError("a whole number" if kind is int else "a number") from None
        if kind is int and isinstance(value, float) and value != number:
            raise ValueError("a whole number")
        return number
    if not isinstance(value, str):
        raise ValueError("text")
    storage.refuse_credentials(value)
    return value
