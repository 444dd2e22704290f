"""Which code runs: the commit, and git's id of the package's files, which needs no git."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
CACHES = "__pycache__"  # in no commit, like the hidden files that editors and tools leave
# Ray hands the settings of a job to its driver by this variable.
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# `git archive` writes the commit into this file of the checkout (.gitattributes).
ARCHIVAL = ".git_archival.txt"
DIRTY = "-dirty"


class Revision(NamedTuple):
    """The commit, whether files were changed since (both None where nothing says them), and the id that
    `git rev-parse COMMIT:diffitm` prints for a commit with exactly these files of the package."""

    commit: str | None
    dirty: bool | None
    tree: str | None


def revision(package: Path = PACKAGE) -> Revision:
    """The revision of a package: its commit is git's in a checkout, else the one that the Ray job was
    submitted with, which has no .git, else that of `git archive`."""
    commit, dirty = _of_git(package.parent)
    if commit is None:
        told = _of_job() or _of_archive(package.parent)
        if told:
            commit, dirty = told.removesuffix(DIRTY), told.endswith(DIRTY)
    try:
        tree = tree_id(package)
    except OSError:  # a file that went away meanwhile
        tree = None
    return Revision(commit, dirty, tree)


def tree_id(folder: Path) -> str:
    """git's id of a folder with these files. Raises OSError for one that cannot be read."""
    return (_tree(folder) or _object("tree", b"")).hex()


def _tree(folder: Path) -> bytes | None:
    """The id as bytes; None of a folder without files, which git does not keep."""
    entries = []
    for path in folder.iterdir():
        if path.name == CACHES or path.name.startswith("."):
            continue
        mode, digest = _entry(path)
        if digest is not None:
            name = os.fsencode(path.name)
            # git compares a folder's name as if a slash followed it.
            order = name + b"/" * (mode == b"40000")
            entries.append((order, b"%s %s\0%s" % (mode, name, digest)))
    return _object("tree", b"".join(entry for _, entry in sorted(entries))) if entries else None


def _entry(path: Path) -> tuple[bytes, bytes | None]:
    """Mode and id of a folder's entry."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return b"120000", _object("blob", os.fsencode(os.readlink(path)))
    if stat.S_ISDIR(mode):
        return b"40000", _tree(path)
    return b"100755" if mode & stat.S_IXUSR else b"100644", _object("blob", path.read_bytes())


def _object(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content)).digest()


def _of_git(root: Path) -> tuple[str | None, bool | None]:
    if not (root / ".git").exists():
        return None, None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer about a checkout; None where it has none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _of_job() -> str | None:
    """The commit in the metadata that this process's Ray job was submitted with."""
    try:
        return str(json.loads(os.environ[JOB])["metadata"]["commit"])
    except (KeyError, TypeError, ValueError):
        return None


def _of_archive(root: Path) -> str | None:
    """The commit that `git archive` wrote, of which the files or an image come."""
    try:
        text = (root / ARCHIVAL).read_text()
    except OSError:
        return None
    line = re.search(r"^node: ([0-9a-f]{40,64})$", text, re.M)
    return line[1] if line else None
