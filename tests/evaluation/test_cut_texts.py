"""Texts that a model cuts are told by task, with a warning where candidates become the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

import diffitm
from diffitm.commands.gdbench import GdbenchConfig, report_again
from diffitm.commands.run_record import RunArtifacts, RunRecord, read_record
from diffitm.evaluation.cut_texts import CutTexts, count_cut, cut_note
from diffitm.evaluation.evaluate import Evaluation
from diffitm.evaluation.examples import write_examples
from diffitm.models.clip import resolve_clip
from diffitm.report.table import latex, make_table, markdown
from diffitm.scoring.specs import ClipSpec
from diffitm.store.score_store import open_store

LONG = "a red circle and " * 40
CHOICES = [
    {"image": "a.png", "texts": ["a red circle", "a blue circle"], "right": 0},
    {"image": "a.png", "texts": [f"{LONG}a cross", f"{LONG}a square"], "right": 0},
    {"image": "a.png", "texts": [f"a cross and {LONG}", "a square"], "right": 0},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (tmp_path / "short.jsonl").write_text(json.dumps(CHOICES[0]))
    return tmp_path


@pytest.fixture
def spec(root: Path) -> ClipSpec:
    return ClipSpec(resolve_clip("shapes"), str(root), 8)


def test_counts(root: Path, spec: ClipSpec, caplog: pytest.LogCaptureFixture) -> None:
    """By task, of its distinct texts; a task without such texts is not told."""
    tasks = [str(root / "long.jsonl"), str(root / "short.jsonl")]
    examples = write_examples(tasks, str(root), str(root / "out"))
    files = {name: part.uri for name, part in examples.items()}
    with caplog.at_level(logging.WARNING, "diffitm"):
        (found,) = count_cut([spec, spec], files)
    tokens = found.tokens
    assert found == CutTexts("shapes", "long", tokens, texts=6, cut=3, alike=1)
    assert "by which 1 example has candidates that are the same to it" in caplog.text


def test_told_in_tables() -> None:
    cut = [CutTexts("A", "valse", 64, 100, 9, 4), CutTexts("A", "cola", 64, 20, 2, 0)]
    cut.append(CutTexts("B", "valse", 77, 100, 1, 0))
    text = (
        "A reads 64 tokens of a text and cuts 9 of 100 of valse (by which 4 examples have candidates "
        "that are the same to it), 2 of 20 of cola. B reads 77 tokens of a text and cuts 1 of 100 of valse."
    )
    assert cut_note(cut) == text
    assert cut_note([]) == ""
    table = make_table(Evaluation(cut_texts=cut))
    assert text in markdown(table)
    assert text in latex(table)


def test_kept_for_later_reports(
    root: Path, spec: ClipSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    """run.json keeps the counts, so a report without a model tells them."""
    out, uri = str(root / "out"), str(root / "long.jsonl")
    scorer = diffitm.load_scorer("clip:shapes", device="cpu")
    diffitm.evaluate(scorer, uri, str(root), out=out)
    examples = write_examples([uri], str(root), out)
    files = {name: part.uri for name, part in examples.items()}
    store = open_store(out, spec.label, spec.store_config())
    made = RunRecord(
        out=out,
        examples=files,
        stores=[store],
        root=str(root),
        drawn=False,
        artifacts=RunArtifacts({}, {}, {}, {}),
        provenance={"config": {"error": "auto"}},
        cut_texts=tuple(count_cut([spec], files)),
    )
    made.write()
    assert read_record(out).cut_texts == made.cut_texts
    report_again(GdbenchConfig(out=out, report_only=True), out)
    assert "cuts 3 of 6" in capsys.readouterr().out
    for name in ("table.md", "table.tex", "report.html"):
        assert "cuts 3 of 6" in (root / "out" / name).read_text()
    (line,) = json.loads((root / "out" / "results.json").read_text())["cut_texts"]
    assert line["alike"] == 1
