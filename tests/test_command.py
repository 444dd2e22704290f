"""The command `diffitm`: sub-commands, their help, and what the doctor tells."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffitm import __version__, cli
from diffitm.commands import doctor
from diffitm.core.registry import load
from diffitm.shapes.layouts import write_world
from tests.hub import serving
from tests.pipeline import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py"))


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["diffitm", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_each_script_is_a_command() -> None:
    """Of the same name; the places of every command are there."""
    assert set(SCRIPTS) | {"doctor"} == set(cli.COMMANDS)
    for command in cli.COMMANDS.values():
        assert callable(load(command.read)) and callable(load(command.run))


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_what_there_is(
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert re.findall(r"^  (\w+)", out, re.MULTILINE) == list(cli.COMMANDS)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, capsys, "--version") == (0, f"diffitm {__version__}\n", "")


def test_an_unknown_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "gdbanch", "--model", "x")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown command 'gdbanch'; did you mean 'gdbench'?")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command's name and what it is for."""
    code, out, _ = call(monkeypatch, capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: diffitm {name} ")
    assert " ".join(cli.COMMANDS[name].about.split()[:4]) in " ".join(out.split())


def test_errors_have_the_codes_of_the_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    handler = ("gdbench", "--out", str(tmp_path))
    code, _, err = call(monkeypatch, capsys, *handler)
    assert code == 2 and "error: give at least one --model" in err
    code, _, err = call(monkeypatch, capsys, "sweep", "lambada", f"out={tmp_path}")
    assert code == 2 and "did you mean 'lambda'" in err
    code, _, err = call(monkeypatch, capsys, "prepare", "winogrund", "--data", str(tmp_path))
    assert code == 2 and "winogrund" in err


def test_installed_as_a_command() -> None:
    """As pip puts it beside the interpreter, from another folder; nothing heavy is imported for it."""
    command = Path(sys.executable).parent / "diffitm"
    done = subprocess.run([command], capture_output=True, text=True, cwd="/", check=True)
    assert "doctor" in done.stdout


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line[10:] for line in lines}


def test_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ten lines; the token's value in none of them."""
    monkeypatch.setenv("HF_TOKEN", "hf_a-secret-token")
    write_world(str(tmp_path), 10)
    (tmp_path / "winoground").rename(tmp_path / "away")
    doctor.run(doctor.DoctorConfig(data=str(tmp_path)))
    told = report(capsys)
    assert list(told) == "diffitm packages machine GPU Ray Hub token cache data next".split()
    assert torch.__version__.partition("+")[0] in told["packages"]
    assert told["token"] == "there is one for gated models"
    assert "secret" not in str(told)
    assert "HF_HUB_OFFLINE" in told["Hub"]
    assert "clevr" in told["data"] and "winoground" not in told["data"]
    assert told["next"] == f"diffitm gdbench --check --data {tmp_path}"


def test_a_sick_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What fails has its line; the others are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    doctor.run(doctor.DoctorConfig(data=str(tmp_path / "none")))
    told = report(capsys)
    assert told["GPU"] == "failed: ZeroDivisionError: division by zero"
    assert told["data"].startswith("failed: InputError: data: there is no folder")
    assert len(told) == 10


def test_the_doctor_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as the Hub's address is read at the import."""
    with serving(tmp_path) as hub:
        code = "from diffitm.commands.doctor import hub; print(hub())"
        env = {"PATH": "", "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith(f"{hub.url} answers ("), done.stderr
