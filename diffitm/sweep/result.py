"""What a sweep leaves: a table of its settings, and the best one as a config file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import yaml
from pyarrow import parquet
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import redact
from diffitm.sweep.space import Axis, describe

NOTE = "sweep.json"
WIDTH = 160


@dataclass(frozen=True)
class TrialResult:
    """A setting and what it reached.

    `accuracy` is what settings are compared by: of a training the validation's, the best so far (of
    weights that are kept at their best, at update `at_step`) or the last one; of a score that of the
    half of the examples that chooses, with `measured` of the other half. `base` is the accuracy before
    training, `curve` (update, accuracy) of every validation, `tasks` the values of each task,
    `timesteps` and `weights` those of a score. `state` is done, stopped early or failed, `unread` what
    of a training's images could not be used.
    """

    MEASURED: ClassVar[tuple[str, ...]] = (
        *("accuracy", "measured", "base", "step", "at_step", "curve"),
        *("tasks", "timesteps", "weights", "folder", "unread"),
    )
    setting: dict[str, Any]
    state: str
    failure: str | None = None
    seconds: float = 0.0
    accuracy: float | None = None
    measured: float | None = None
    base: float | None = None
    step: int | None = None
    at_step: int | None = None
    curve: list[list[float]] | None = None
    tasks: dict[str, dict[str, float]] | None = None
    timesteps: list[int] | None = None
    weights: list[float] | None = None
    folder: str | None = None
    unread: str | None = None

    @property
    def rank(self) -> tuple[bool, float, int]:
        """The best first: what is done, which alone can be the best, by accuracy, of equals the one
        with fewer timesteps."""
        accuracy = -1.0 if self.accuracy is None else self.accuracy
        return self.state != "done", -accuracy, len(self.timesteps or ())


class Tried(NamedTuple):
    """A line a setting, what their accuracy is of, and what input could not be used."""

    rows: list[TrialResult]
    title: str
    lost: str


def open_sweep(out: str, settings: dict[str, Any]) -> None:
    """Begin a sweep in OUT, or find the same one there. Raises InputError if that is another one."""
    path = storage.join(out, NOTE)
    if not storage.exists(path):
        storage.write_text(path, json.dumps(settings, indent=2))
        return
    old, wanted = json.loads(storage.read_text(path)), settings
    if old != wanted:
        keys = [k for k in {**old, **wanted} if old.get(k) != wanted.get(k)]
        told = "; ".join(f"{k} was {old.get(k)} and is {wanted.get(k)}" for k in keys)
        raise InputError(f"{out} holds another sweep ({told}): give another out=")


def ranked(rows: Sequence[TrialResult], axes: Sequence[Axis]) -> list[TrialResult]:
    """The rows, best first; of equals in the order of the axes' values."""
    order = {axis.name: axis.values for axis in axes}

    def place(row: TrialResult) -> list[int]:
        values = row.setting.items()
        return [order[k].index(v) if v in order.get(k, ()) else 0 for k, v in values]

    return sorted(sorted(rows, key=place), key=lambda row: row.rank)


def write_table(rows: Sequence[TrialResult], axes: Sequence[Axis], out: str) -> str:
    """OUT/table.parquet: a column an axis, and what each setting reached; tasks as JSON."""
    lines = []
    for row in rows:
        line = asdict(row)
        setting = {axis.name.rstrip("_"): line["setting"][axis.name] for axis in axes}
        del line["setting"]
        line["tasks"] = json.dumps(line["tasks"])
        lines.append({**setting, **line})
    path = storage.join(out, "table.parquet")
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(lines), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())
    return path


def write_best(name: str, values: dict[str, Any], note: str, out: str) -> tuple[str, str]:
    """OUT/<name>: options that a pipeline takes with --config. Its path and text."""
    options = {k.rstrip("_"): v for k, v in values.items()}
    text = f"# {redact(note)}\n" + "".join(_line(k, v) for k, v in sorted(options.items()))
    path = storage.join(out, name)
    storage.write_text(path, text)
    return path, text


def _line(name: str, value: Any) -> str:
    """An option's line of YAML, a list in one line as well."""
    if isinstance(value, list):
        return f"{name}: {yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
    return yaml.safe_dump({name: value}, default_flow_style=False)


def cells(row: TrialResult, axes: Sequence[Axis]) -> dict[str, str]:
    """A row as text, column -> cell."""
    found = {a.name.rstrip("_"): describe(row.setting, [a]).split(" ", 1)[1] for a in axes}
    if row.timesteps is not None:
        found["timesteps"] = str(len(row.timesteps))
    found["accuracy"] = "" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
    if row.measured is not None:
        found["measured"] = f"{100 * row.measured:.1f}"
    if row.base is not None and row.accuracy is not None:
        found["gain"] = f"{100 * (row.accuracy - row.base):+.1f}"
    if row.step is not None:
        found["update"] = str(row.at_step)
    found["state"] = row.failure or row.state
    return found


def print_table(rows: Sequence[TrialResult], axes: Sequence[Axis], title: str) -> None:
    """The settings, best first."""
    lines = [cells(row, axes) for row in rows]
    heads = dict.fromkeys(name for line in lines for name in line)
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in heads:
        numeric = name in ("timesteps", "accuracy", "measured", "gain", "update")
        shown.add_column(name, justify="right" if numeric else "left")
    for line in lines:
        shown.add_row(*(line.get(name, "") for name in heads))
    Console(width=WIDTH, highlight=False, markup=False).print(shown)
