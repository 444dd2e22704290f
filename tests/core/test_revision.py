"""Which code ran: the commit, however it travels, and the id of the package's files, as git has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from diffitm.core import revision
from diffitm.core.provenance import record
from tests.pipeline import ROOT

# git's order is not that of names: the folder "a" comes after the files "a-b" and "a.py".
FILES = ("a/x.py", "a.py", "a-b", "ab", "a0", "deep/er/y.txt", "deep/z", "é.py", "B", "_")
COMMIT = "c0ffee" + 34 * "0"


def git(root: Path, *arguments: str) -> str:
    name = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.autocrlf=false")
    done = subprocess.run(
        ["git", *name, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _not_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(revision.JOB, raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose commit has a package `pkg`, with what git ignores beside its files."""
    root = tmp_path / "checkout"
    for name in FILES:
        path = root / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")
    (root / "pkg" / "a.py").chmod(0o755)
    (root / "pkg" / "link").symlink_to("a.py")
    (root / ".gitignore").write_text("__pycache__/\n.*cache/\n")
    for name in (".git_archival.txt", ".gitattributes"):
        shutil.copy(ROOT / name, root / name)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    for name in ("pkg/__pycache__", "pkg/deep/__pycache__", "pkg/.cache", "pkg/empty/er"):
        (root / name).mkdir(parents=True)
        if "cache" in name:
            (root / name / "x.pyc").write_bytes(b"\0")
    return root


@pytest.fixture
def upload(checkout: Path, tmp_path: Path) -> Path:
    """The checkout as Ray uploads it: without .git."""
    ignored = shutil.ignore_patterns(".git")
    shutil.copytree(checkout, tmp_path / "upload", symlinks=True, ignore=ignored)
    return tmp_path / "upload"


def test_the_id_is_that_of_git(checkout: Path, upload: Path) -> None:
    expected = git(checkout, "rev-parse", "HEAD:pkg")
    assert revision.tree_id(checkout / "pkg") == expected == revision.tree_id(upload / "pkg")
    assert revision.tree_id(checkout / "pkg/deep") == git(checkout, "rev-parse", "HEAD:pkg/deep")


@pytest.mark.parametrize("change", ["content", "name", "mode", "more", "less"])
def test_any_change_has_another_id(checkout: Path, change: str) -> None:
    """And it is again what git has of the changed files."""
    package, before = checkout / "pkg", revision.tree_id(checkout / "pkg")
    changes = {
        "content": lambda: (package / "a/x.py").write_text("content of a/x.pY\n"),
        "name": lambda: (package / "ab").rename(package / "ac"),
        "mode": lambda: (package / "ab").chmod(0o755),
        "more": lambda: (package / "empty/er/file").write_text(""),
        "less": lambda: (package / "deep/z").unlink(),
    }
    changes[change]()
    git(checkout, "add", "-A")
    assert revision.tree_id(package) == git(checkout, "write-tree", "--prefix=pkg/") != before


def test_the_package_itself(tmp_path: Path) -> None:
    """Of this checkout as it is: nothing in it is ignored by git and counted here, or the reverse."""
    env = os.environ | {
        "GIT_INDEX_FILE": str(tmp_path / "index"),
        "GIT_OBJECT_DIRECTORY": str(tmp_path),
    }
    for command in (["add", "diffitm"], ["write-tree", "--prefix=diffitm/"]):
        done = subprocess.run(["git", *command], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"not a checkout: {done.stderr}")
    assert record({})["tree"] == done.stdout.strip()


def test_commit_of_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's word counts, whatever a job was submitted with."""
    monkeypatch.setenv(revision.JOB, json.dumps({"metadata": {"commit": COMMIT}}))
    head = git(checkout, "rev-parse", "HEAD")
    assert revision.revision(checkout / "pkg")[:2] == (head, False)
    (checkout / "pkg" / "ab").write_text("changed")
    assert revision.revision(checkout / "pkg")[:2] == (head, True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"metadata": {"commit": COMMIT}}, (COMMIT, False)),
        ({"metadata": {"commit": f"{COMMIT}-dirty"}}, (COMMIT, True)),
        ({"metadata": {"commit": ""}}, (None, None)),
        ({"metadata": {"job_name": "x"}}, (None, None)),
        ({"metadata": None}, (None, None)),
        ([], (None, None)),
    ],
)
def test_commit_of_a_job(
    upload: Path,
    settings: object,
    expected: tuple[str | None, bool | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The placeholder in the upload's file for `git archive` is no commit."""
    assert revision.JOB == RAY_JOB_CONFIG_JSON_ENV_VAR
    monkeypatch.setenv(revision.JOB, json.dumps(settings))
    assert revision.revision(upload / "pkg")[:2] == expected
    monkeypatch.setenv(revision.JOB, "no JSON")
    assert revision.revision(upload / "pkg")[:2] == (None, None)


def test_commit_of_an_archive(checkout: Path, tmp_path: Path) -> None:
    """What the image is built from; the file that holds the commit is not a part of the package."""
    git(checkout, "archive", "HEAD", "-o", str(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "x.tar") as archive:
        archive.extractall(tmp_path / "image", filter="tar")
    head, tree = git(checkout, "rev-parse", "HEAD", "HEAD:pkg").splitlines()
    assert revision.revision(tmp_path / "image/pkg") == (head, False, tree)
