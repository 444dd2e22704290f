"""What every pipeline script shares: the options, the log, errors as messages, and exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from diffitm.core.config import parse
from diffitm.core.errors import Incomplete, InputError, Unavailable
from diffitm.core.provenance import redact

C = TypeVar("C")
UNEXPECTED, BAD_INPUT, INCOMPLETE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 75, 130
FORMAT = "%(asctime)s %(message)s"


class _Redacted:
    """A stream without the secrets of URIs and of the environment."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(redact(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main(config: type[C], run: Callable[[C], None], description: str | None) -> None:
    """Parse the command line and run, as execute() does."""
    execute(lambda: run(parse(config, description=description or "")))


def execute(run: Callable[[], None]) -> None:
    """Run a pipeline with its log and exit codes.

    Exits 2 for bad input, 3 when the run ended but could not use some of its input, 75 when something
    outside was away for long, 130 when it was interrupted (by SIGINT or SIGTERM), 1 after a traceback.
    """
    out: Any = _Redacted(sys.stdout)
    err: Any = _Redacted(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        _log_to(err)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send
        code = _run(run)
        if code:
            sys.exit(code)


def _log_to(stream: Any) -> None:
    logging.basicConfig(level=logging.WARNING, stream=stream)
    logging.getLogger("diffitm").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))


def _run(call: Callable[[], None]) -> int:
    """The exit code; what went wrong is printed."""
    try:
        call()
    except InputError as error:
        return _fail(BAD_INPUT, f"error: {error.on_command_line()}")
    except Incomplete as error:
        return _fail(INCOMPLETE, f"incomplete: {error}")
    except Unavailable as error:
        return _fail(UNAVAILABLE, f"unavailable: {error}; the same command goes on later")
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; the same command goes on where it stopped")
    except Exception as error:
        if _is_full_disk(error):
            text = "no space left in the --out folder; free some and run the same command again"
            return _fail(BAD_INPUT, f"error: {text}")
        return _fail(UNEXPECTED, traceback.format_exc().rstrip())
    return 0


def _fail(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


def _is_full_disk(error: BaseException) -> bool:
    """Whether there was no space, here or, of which the text alone comes back, in a task of Ray."""
    number = getattr(error, "errno", None)
    return number == errno.ENOSPC or "No space left on device" in str(error)
