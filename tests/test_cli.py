"""What an operator reads: exit codes, logs without secrets, the summary of a run."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from diffitm.core.errors import Incomplete, InputError
from diffitm.evaluation import evaluate
from diffitm.report.terminal import print_summary
from diffitm.store.pair_table import Left, WorkTable
from diffitm.store.run_summary import Done, write_summary
from diffitm.store.score_store import open_store
from diffitm.store.work_table import OpenWork, finish
from diffitm.training.run_folder import check_complete
from tests.pipeline import environment

SCRIPT = """
import logging, os, signal, sys, time, warnings
from diffitm.cli import execute
from diffitm.core.errors import Incomplete, InputError, Unavailable

def run():
    {body}

execute(run)
"""
SECRETS = {
    "HF_TOKEN": "hf_abcdefghijkl",
    "AWS_ACCESS_KEY_ID": "AKIAABCDEFGH",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "AWS_SESSION_TOKEN": "session/of/AKIAABCDEFGH/x",
    "db_password": "correct horse",
    "MY_SECRET": "swordfish-9",
}


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Execute a pipeline of one line in a process of its own."""
    script = SCRIPT.format(body=body)
    more = {**SECRETS, "SHORT_KEY": "visible"}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**more),
    )


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("pass", 0, ""),
        ("raise InputError('--model x: no')", 2, "error: --model x: no\n"),
        ("raise InputError('x: no', 'held_out')", 2, "error: --held-out x: no\n"),
        ("raise OSError(28, 'full')", 2, "error: no space left on device ([Errno 28] full); mend"),
        (
            "raise OSError(13, 'no', 'OUT/a')",
            2,
            "error: OUT/a: permission denied; mend it and give",
        ),
        ("raise OSError(30, 'no', 'OUT/a')", 2, "error: OUT/a: read-only file system; mend"),
        (
            "raise RuntimeError('task failed\\n[Errno 30] Read-only file system: OUT')",
            2,
            "error: read-only file system ([Errno 30] Read-only file system: OUT)",
        ),
        ("raise FileNotFoundError(2, 'gone', 'x')", 1, "Traceback (most recent call last)"),
        (
            "raise RuntimeError('I/O error: No space left on device (os error 28)')",
            2,
            "error: no space left on device (I/O error: No space left",
        ),
        (
            'exec(\'try:\\n  open("/proc/1/mem", "x")\\nexcept OSError:\\n  {}[1]\')',
            1,
            "Traceback (most recent call last)",
        ),
        ("raise Incomplete('2 images')", 3, "incomplete: 2 images\n"),
        (
            "raise Unavailable('s3 is away')",
            75,
            "unavailable: s3 is away; the same command goes on",
        ),
        (
            "raise KeyboardInterrupt",
            130,
            "interrupted; the same command goes on where it stopped\n",
        ),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", 130, "interrupted; the same"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 130, "interrupted; the same"),
        ("raise ValueError('a bug')", 1, "Traceback (most recent call last)"),
    ],
)
def test_exit_codes(body: str, code: int, told: str) -> None:
    done = run(body)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(told)
    assert ("Traceback" in done.stderr) == (code == 1)
    assert bool(done.stderr) == bool(code)


def test_a_traceback_names_the_error() -> None:
    assert run("raise ValueError('a bug')").stderr.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(
    "body",
    [
        "print(text)",
        "print(text, file=sys.stderr)",
        "logging.getLogger('diffitm').info('%s', text)",
        "logging.getLogger('other').error('%s', text)",
        "warnings.warn(text)",
        "raise InputError(text)",
        "raise Incomplete(text)",
        "raise ValueError(text)",
    ],
)
def test_no_secret_is_printed(body: str) -> None:
    """Values of the environment and keys in URIs, wherever they are printed; the rest stays."""
    text = "first s3://key:word@bucket/x visible {SECRETS} last"
    found = " ".join(f"{{os.environ[{name!r}]}}" for name in SECRETS)
    done = run(f"text = f{text.replace('{SECRETS}', found)!r}; {body}")
    shown = done.stdout + done.stderr
    assert f"first s3://***@bucket/x visible {' '.join(['***'] * len(SECRETS))} last" in shown
    for value in (*SECRETS.values(), "key:word"):
        assert value not in shown


def test_done_adds_up() -> None:
    """Counts and times; of memory the most, of batch sizes the smallest that there is."""
    one = Done(pairs=2, busy=1.5, memory=7, batch_size=0, smaller=("a",))
    two = Done(pairs=3, busy=0.5, memory=5, batch_size=8, smaller=("b",))
    three = Done(batch_size=4)
    both = one + two + three
    assert (both.pairs, both.busy, both.memory, both.batch_size) == (5, 2.0, 7, 4)
    assert both.smaller == ("a", "b")
    assert one + Done() == one


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file and the table, of a model and in total; a clip has no U-Net."""
    shared = {"busy": 8.0, "waited": 2.0, "loading": 2.5, "seconds": 5.0}
    first = Done(
        *(100, 1000, 3), **shared, inside=6.0, begun=11, finished=10, memory=3 * 10**9,
        batch_size=16, smaller=("batch size 32 -> 16",),
    )  # fmt: skip
    second = Done(50, 50, 0, **shared, begun=4, finished=4, batch_size=64)
    lines = write_summary(["SD", "CLIP x"], [first, second], str(tmp_path))
    found = json.loads((tmp_path / "summary.json").read_text())
    sd, clip = found["models"]
    assert (sd["model"], sd["pairs"], sd["forwards"], sd["failures"]) == ("SD", 100, 1000, 3)
    assert (sd["retries"], sd["out_of_memory"], sd["batch_size"]) == (1, 1, 16)
    assert (sd["forwards_per_second"], sd["forwards_per_second_of_an_actor"]) == (200, 125)
    shares = (sd["unet_share"], sd["waiting_share"], sd["loading_share"])
    assert shares == (0.75, 0.16, 0.2)
    assert (clip["unet_share"], clip["gpu_memory_bytes"], clip["retries"]) == (None, 0, 0)
    total = found["total"]
    assert (total["pairs"], total["seconds"], total["unet_share"]) == (150, 10, 6 / 16)
    assert total["gpu_memory_bytes"] == 3 * 10**9
    print_summary(lines)
    shown = capsys.readouterr().out
    sd_line = next(line for line in shown.splitlines() if "SD" in line).split()
    assert sd_line == "SD 100 1,000 5 s 200.0 125.0 75% 16% 20% 1 3 3.0 GB 16".split()
    assert "total" in shown


def test_summary_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line; nothing is divided by nothing."""
    lines = write_summary(["SD"], [Done()], str(tmp_path))
    print_summary(lines)
    assert capsys.readouterr().out == "summary: nothing needed scoring\n"
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["total"]["forwards_per_second"] is None
    assert found["models"][0]["batch_size"] is None


def test_speeds_read_old_and_new_notes(tmp_path: Path) -> None:
    """What a work table of an earlier version says, beside one of now."""
    config = {"kind": "clip", "version": 1}
    store = open_store(str(tmp_path), "m", config)
    folders = [tmp_path / "work" / store.name / f"{number:04d}" for number in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
    old = {"pairs": 10, "forwards": 40, "failures": 0, "busy": 2.0, "actors": 1, "rate": 30.0}
    (folders[0] / "done").write_text(json.dumps(old))
    table = WorkTable(str(folders[1] / "work.parquet"), 3, 30)
    finish(
        OpenWork(str(folders[1]), table, Left(3, 30, 0)),
        Done(30, 120, busy=4.0, smaller=("x",), begun=2),
    )
    (speed,) = evaluate.speeds(str(tmp_path), [store])
    assert (speed.pairs, speed.forwards, speed.seconds) == (40, 160, 6.0)


def test_a_finished_training_tells_its_lost_images(tmp_path: Path) -> None:
    (tmp_path / "failures.json").write_text("{}")
    check_complete(str(tmp_path))
    (tmp_path / "failures.json").write_text('{"a.jpg: no image": 3}')
    with pytest.raises(
        Incomplete, match=r"1 images, texts or shards .* listed in .*failures\.json"
    ):
        check_complete(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "library", "command"),
    [
        (InputError("3: only 2", "held_out"), "held_out 3: only 2", "--held-out 3: only 2"),
        (InputError(": no file x", "data"), "data: no file x", "--data: no file x"),
        (InputError("-1: below 0", "lambda_"), "lambda_ -1: below 0", "--lambda -1: below 0"),
        (InputError("all is wrong"), "all is wrong", "all is wrong"),
    ],
)
def test_the_field_of_an_error(error: InputError, library: str, command: str) -> None:
    """A field in Python, an option on the command line; Ray hands it on whole."""
    error = pickle.loads(pickle.dumps(error))
    assert (str(error), error.on_command_line()) == (library, command)
