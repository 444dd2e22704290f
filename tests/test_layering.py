"""Imports go down only: Ray is imported in diffitm/distributed and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("diffitm", "pipelines") for p in (ROOT / top).rglob("*.py"))
BELOW = ("matching", "metrics", "models", "probes", "tasks", "shapes", "training")
LEAVES = ("config", "registry", "storage", "schema", "errors")


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def outside_of_distributed() -> list[Path]:
    return [p for p in SOURCES if not name(p).startswith("diffitm.distributed")]


def test_sources_are_found() -> None:
    names = {name(p) for p in SOURCES}
    assert {"diffitm.matching.plan", "diffitm.distributed.score", "pipelines.gdbench"} <= names
    score = next(p for p in SOURCES if name(p) == "diffitm.distributed.score")
    assert "ray" in imported(score)


@pytest.mark.parametrize("path", outside_of_distributed(), ids=name)
def test_only_distributed_imports_ray(path: Path) -> None:
    assert not {m for m in imported(path) if m.split(".")[0] == "ray"}


@pytest.mark.parametrize("path", outside_of_distributed(), ids=name)
def test_imports_go_down_only(path: Path) -> None:
    """Only scripts import diffitm.distributed; the leaves import no layer; nothing a script."""
    modules = imported(path)
    assert not {m for m in modules if m.split(".")[0] == "pipelines"}
    if name(path).startswith("diffitm"):
        assert not {m for m in modules if m.startswith("diffitm.distributed")}
    if name(path) in {f"diffitm.{leaf}" for leaf in LEAVES}:
        layers = (*BELOW, "report", "results", "pairs", "store")
        assert not {m for m in modules if m.startswith(tuple(f"diffitm.{l}" for l in layers))}
    if name(path).startswith(tuple(f"diffitm.{layer}" for layer in BELOW)):
        above = ("diffitm.report", "diffitm.results", "diffitm.command")
        assert not {m for m in modules if m.startswith(above)}


def test_importing_the_library_leaves_ray_out() -> None:
    """In a fresh process, every module below diffitm/distributed."""
    modules = [name(p) for p in outside_of_distributed() if name(p).startswith("diffitm")]
    code = f"import sys, {', '.join(modules)}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
