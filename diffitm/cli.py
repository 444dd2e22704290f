"""The command `diffitm` and the scripts of pipelines/: sub-commands, log, errors as messages, exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from diffitm import __version__
from diffitm.core.config import parse
from diffitm.core.errors import Incomplete, InputError, Unavailable, suggest
from diffitm.core.provenance import redact
from diffitm.core.registry import load

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


class Command(NamedTuple):
    """A sub-command: what --help says first, the places of what reads its options (a config's class, or a
    function of words and `about`) and of the function that is called with them."""

    about: str
    read: str
    run: str


COMMANDS = {
    "gdbench": Command(
        "Evaluate diffusion models, CLIPs and other scorers on GDBench; see docs/gdbench.md.",
        "diffitm.evaluation.options:GdbenchConfig",
        "diffitm.commands.gdbench:run",
    ),
    "score": Command(
        "Score your own images and texts; see docs/score.md.",
        "diffitm.commands.score:ScoreConfig",
        "diffitm.commands.score:run",
    ),
    "selfbench": Command(
        "Score models on pictures that they make of prompts (Self-Bench); see docs/selfbench.md.",
        "diffitm.commands.selfbench:SelfbenchConfig",
        "diffitm.commands.selfbench:run",
    ),
    "candidates": Command(
        "Pick each caption's and each image's top-k candidates with CLIP; see docs/gdbench.md.",
        "diffitm.commands.candidates:CandidatesConfig",
        "diffitm.commands.candidates:run",
    ),
    "negatives": Command(
        "Make hard negative captions and images for a captions file; see docs/negatives.md.",
        "diffitm.commands.negatives:NegativesConfig",
        "diffitm.commands.negatives:run",
    ),
    "finetune": Command(
        "Tune a diffusion model's LoRA for matching; see docs/finetuning.md.",
        "diffitm.training.lora.options:FinetuneConfig",
        "diffitm.commands.finetune:run",
    ),
    "diva": Command(
        "Tune a CLIP under a frozen diffusion model (DIVA, SDS-CLIP); see docs/diva.md.",
        "diffitm.training.diva.options:DivaConfig",
        "diffitm.commands.diva:run",
    ),
    "sweep": Command(
        "Sweep settings with Ray Tune: sweep lambda|timesteps|recap-density [--config FILE] key=value ... "
        "Keys are the options below and those of the command that is swept (finetune, gdbench, diva). "
        "Several values, lr=1e-5,1e-4, or a range, lr=loguniform(1e-5,1e-3), are swept. See docs/sweeps.md.",
        "diffitm.commands.sweep:read",
        "diffitm.commands.sweep:run",
    ),
    "prepare": Command(
        "Fetch published data into the layout that the tasks read: prepare TASK.. --data DIR. TASK is "
        "winoground, clevr, imagecode, pets, svo, aro, coco, flickr30k, mmbias, mmvp_vlm, a task of GDBench "
        "such as vg_relation, or all. docs/data.md says what each one fetches, its size and licence.",
        "diffitm.datasets.options:read",
        "diffitm.commands.prepare:run",
    ),
    "doctor": Command(
        "Tell what this machine or cluster has, and what to type next.",
        "diffitm.commands.doctor:DoctorConfig",
        "diffitm.commands.doctor:run",
    ),
}


def main() -> None:
    """The command `diffitm`: its first word names a sub-command."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] in ("-V", "--version"):
        print(f"diffitm {__version__}")
    elif words[0] not in COMMANDS:
        print(f"error: unknown command {words[0]!r}{suggest(words[0], COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    else:
        sys.argv = [f"diffitm {words[0]}", *words[1:]]
        start(words[0])


def usage() -> str:
    """What `diffitm --help` prints."""
    lines = [
        f"  {name:11} {command.about.split(';')[0].split(':')[0].rstrip('.')}"
        for name, command in COMMANDS.items()
    ]
    head = (
        "diffitm COMMAND [OPTIONS]; diffitm COMMAND --help lists the options. First: diffitm doctor"
    )
    return "\n".join([head, "", *lines])


def start(name: str) -> None:
    """Run a sub-command with the words of the command line, as execute() does."""
    execute(lambda: _call(COMMANDS[name], sys.argv[1:]))


def _call(command: Command, words: list[str]) -> None:
    reader = load(command.read)
    is_config = isinstance(reader, type)
    config = parse(reader, words, command.about) if is_config else reader(words, command.about)
    load(command.run)(config)


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
        if (problem := _of_the_disk(error)) is not None:
            return _fail(BAD_INPUT, f"error: {problem}; mend it and give the same command again")
        return _fail(UNEXPECTED, traceback.format_exc().rstrip())
    return 0


def _fail(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


FULL = (errno.ENOSPC, errno.EDQUOT)
# What a disk refuses, as the system puts it; of a task of Ray the text alone comes back.
_REFUSALS = {os.strerror(n): n for n in (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)}


def _of_the_disk(error: BaseException) -> str | None:
    """What a disk refused, where that is what went wrong: no space, or no right to write or read."""
    cause: BaseException | None = error
    while cause is not None:  # what it was raised from, not what was being handled meanwhile
        text = str(cause)
        for refusal, number in _REFUSALS.items():
            own = isinstance(cause, OSError) and cause.errno == number
            if own and cause.filename:  # type: ignore[attr-defined]
                return f"{cause.filename}: {refusal.lower()}"  # type: ignore[attr-defined]
            # Libraries tell of a full disk without its number.
            words = refusal if number in FULL else f"[errno {number}] {refusal}"
            if own or words.lower() in text.lower():
                lines = [line.strip() for line in text.splitlines() if refusal in line]
                return f"{refusal.lower()} ({lines[-1] if lines else text})"
        cause = cause.__cause__
    return None
