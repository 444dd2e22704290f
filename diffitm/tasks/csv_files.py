"""CSV that is read strictly: a broken quote or a row of another length is an error that says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from diffitm.captions.delimited import of_text, read_records
from diffitm.core.errors import InputError

# (what was found, what is expected) -> the error
Malformed = Callable[[Any, str], InputError]


def malformed_in(where: str) -> Malformed:
    """Errors about a file."""

    def error(found: Any, expected: str) -> InputError:
        return InputError(
            f"{where}: expects {expected}, found {json.dumps(found, default=str)[:120]}"
        )

    return error


def csv_rows(text: str, where: str, delimiter: str = ",") -> list[list[str]]:
    """The rows that are not empty, the header too. Raises InputError that names file and line."""
    return [fields for _, fields in read_records(of_text(text), where, delimiter)]


def csv_table(
    text: str, where: str, malformed: Malformed, delimiter: str = ","
) -> list[dict[str, str]]:
    """The rows below the header, by column. Raises InputError."""
    header, *rows = csv_rows(text, where, delimiter) or [[]]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise malformed(row, f"{len(header)} columns in row {number}")
    return [dict(zip(header, row, strict=True)) for row in rows]
