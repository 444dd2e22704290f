"""What pip installs: one version, and every file that the code reads."""

from __future__ import annotations

import fnmatch
import subprocess
import tomllib

import pytest

import diffitm
from tests.pipeline import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files() -> list[str]:
    """Files of the package that are no Python, below diffitm/; those of git, as caches lie there, too."""
    listed = subprocess.run(
        ["git", "ls-files", "diffitm"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    names = [line.removeprefix("diffitm/") for line in listed.stdout.splitlines()]
    return [name for name in names if not name.endswith(".py")]


def test_a_wheel_has_every_file() -> None:
    """Of what is no Python, setuptools takes what the patterns name."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["diffitm"]
    assert package_files()
    globs = [pattern.replace("**/", "") for pattern in patterns]
    left_out = [n for n in package_files() if not any(fnmatch.fnmatch(n, g) for g in globs)]
    assert left_out == []


def test_one_version() -> None:
    """The package's is read from the code, and the newest heading of the changelog has it."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "diffitm.__version__"
    headings = [x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("## ")]
    assert headings[0].split()[1] in (diffitm.__version__, "Unreleased")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {diffitm.__version__}\n" in citation
