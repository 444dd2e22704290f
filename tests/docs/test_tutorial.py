"""The blocks of docs/tutorial.md and README.md do what the pages say that they do."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.docs.markdown import blocks
from tests.pipeline import ROOT, TIMEOUT

MATCH = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Reader:
    """Someone who does what a page says in an empty folder: variables and files stay from block to block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {}
        self.printed = ""

    def python(self, text: str) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(text, self.names)
        self.printed = out.getvalue()

    def bash(self, text: str) -> None:
        """With the commands of this interpreter, and this checkout."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "140"}
        call = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            call, cwd=self.folder, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        self.printed = done.stdout

    def text(self, text: str) -> None:
        """What the block before printed; '...' is anything."""
        assert doctest.OutputChecker().check_output(text, self.printed, MATCH), self.printed

    def follow(self, page: Path) -> list[str]:
        """Do what the blocks say; the languages of those that were done or compared."""
        done = []
        for block in blocks(page):
            do = getattr(self, block.language, None)
            if block.title:
                (self.folder / block.title).write_text(block.text)
            elif do is not None:
                try:
                    do(block.text)
                except Exception as error:
                    raise AssertionError(f"{page.name}, line {block.line}: {error!r}") from error
                done.append(block.language)
        return done


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path)


def test_a_page_that_lies_is_seen(reader: Reader) -> None:
    page = reader.folder / "page.md"
    page.write_text("# Page\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 7"):
        reader.follow(page)
    page.write_text("```bash\nfalse | true\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 1"):
        reader.follow(page)


def test_readme(reader: Reader) -> None:
    """Its five lines of Python, with pictures of their names."""
    for name, colour in {"a.png": "red", "b.png": "blue"}.items():
        Image.new("RGB", (64, 64), colour).save(reader.folder / name)
    assert "python" in reader.follow(ROOT / "README.md")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # five runs of Ray, each with a time-out of its own
def test_tutorial(reader: Reader) -> None:
    done = reader.follow(ROOT / "docs" / "tutorial.md")
    assert {"python", "bash", "text"} == set(done)
