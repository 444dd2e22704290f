"""The site of docs/ builds, and what lies outside of docs/ is found from there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import ROOT

pytest.importorskip("mkdocs", reason="no mkdocs (pip install 'diffitm[docs]')")
pytest.importorskip("mkdocstrings", reason="no mkdocstrings (pip install 'diffitm[docs]')")

from tools import docs_site

REMOTE = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"')


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the repository."""
    call = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder / "out" / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    heavy = shutil.ignore_patterns("*.safetensors", "__pycache__", "out", ".*")
    shutil.copytree(ROOT, folder, ignore=heavy, dirs_exist_ok=True)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_broken_anchor_ends_the_build(site: Path) -> None:
    page = site / "docs" / "decisions.md"
    kept = page.read_text()
    page.write_text(kept + "\n[gone](gdbench.md#no-such-heading) [gone](../no/such/file.py)\n")
    done = build(site)
    page.write_text(kept)
    assert done.returncode == 1
    assert "no-such-heading" in done.stderr and "no/such/file.py" in done.stderr


def test_pages(site: Path) -> None:
    """The README is the first page; the API's docstrings are there; nothing is asked of other servers."""
    pages = {path.name: path.read_text() for path in (site / "out" / "site").glob("*.html")}
    assert 'src="demo.png"' in pages["index.html"]
    assert 'href="tutorial.html"' in pages["index.html"]
    assert 'id="diffitm.api.load_scorer"' in pages["api.html"]
    assert 'id="diffitm.scoring.scorer.Scorer' in pages["api.html"]
    assert [name for name, text in pages.items() if REMOTE.search(text)] == []


def test_links() -> None:
    """Of a page in docs/, of one outside; addresses, blocks of code and files that are not there stay."""
    text = "[a](../benchmarks/README.md#x) [b](gdbench.md) [c](../diffitm/negatives/prompt.txt)"
    assert docs_site.relink(text, "negatives.md") == (
        "[a](benchmarks.md#x) [b](gdbench.md) [c](files/diffitm/negatives/prompt.txt)"
    )
    text = "[a](docs/gdbench.md) [b](https://docs/gdbench.md) [c](docs/none.md) [d](#here)"
    assert docs_site.relink(text, "index.md") == text.replace("docs/gdbench.md", "gdbench.md", 1)
    block = "```\n[a](docs/gdbench.md)\n```"
    assert docs_site.relink(block, "index.md") == block
