"""What every pipeline script shares: the options, the log, and errors as messages."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from diffitm.config import parse
from diffitm.errors import InputError

C = TypeVar("C")
BAD_INPUT, INTERRUPTED = 2, 130


def main(config: type[C], run: Callable[[C], None], description: str | None) -> None:
    """Parse the command line and run; exits 2 for bad input, 130 when interrupted."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("diffitm").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        run(parse(config, description=description or ""))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        cause = _known_cause(error)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _known_cause(error: BaseException) -> str | None:
    """A message for failures inside of workers that the user can mend."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return "no space left in the --out folder; free some and run the same command again"
    mark = "diffitm.errors.InputError: "
    if mark in text:
        return text.split(mark, 1)[1].split("\n", 1)[0]
    return None
