"""Probes beside the scores: their files, rows, paired tests and place in the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffitm.commands.stages.probe import Probe, add_probes, find_probes, measure
from diffitm.evaluation.evaluate import Evaluation, ResultRow, write_results
from diffitm.models.clip import resolve_clip
from diffitm.probes.segmentation import SegmentationResult
from diffitm.report.html import write_report
from diffitm.report.table import make_table, markdown
from diffitm.shapes.masks import write_masks


def segmented(model: str, right: int) -> SegmentationResult:
    """Ten images of one class with so many of 10 pixels right."""
    ten = np.full((10, 1), 10)
    names = [f"{i}.png" for i in range(10)]
    return SegmentationResult(model, ["thing"], names, np.full((10, 1), right), ten, ten)


def write(out: Path, name: str, model: str, right: int) -> str:
    result = segmented(model, right)
    figures = {"mIoU": (result.miou, 0.1, 0.9), "pixel accuracy": (result.accuracy, None, None)}
    note = {
        "task": "segmentation",
        "raw": False,
        "n": 10,
        "figures": figures,
        "segmentation": result.to_json(),
    }
    (out / "probes").mkdir(exist_ok=True)
    (out / "probes" / name).write_text(json.dumps(note))
    return f"probes/{name}"


def evaluation(out: Path) -> Evaluation:
    """Two CLIPs on one task, and their probes."""
    found = Evaluation()
    for model in ("CLIP a", "CLIP b"):
        shared = {"group": "all", "metric": "pair", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
        found.rows.append(
            ResultRow(**shared, chance=0.25, model=model, task="mmvp_vlm", score="cosine")
        )
    files = {"CLIP a": [write(out, "a.json", "a", 4)], "CLIP b": [write(out, "b.json", "b", 9)]}
    add_probes(found, str(out), files)
    return found


@pytest.mark.parametrize("place", ["{folder}/myeval.py:run", "myeval:run"])
def test_a_changed_function_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whether it is given as a file or as a module."""
    monkeypatch.syspath_prepend(tmp_path)
    file, states = tmp_path / "myeval.py", []
    for value in (1, 2):
        file.write_text(f"def run(name, folder):\n    return {{'x': {value}}}\n")
        hook = place.format(folder=tmp_path)
        (found,) = find_probes(None, 10, [], "", hook, str(tmp_path))
        states.append(found.state)
    assert None not in states and len(set(states)) == 2


def test_rows_and_paired_tests(tmp_path: Path) -> None:
    found = evaluation(tmp_path)
    rows = [r for r in found.rows if r.score == "probe"]
    assert [(r.model, r.metric, r.n) for r in rows[:2]] == [
        ("CLIP a", "mIoU", 10),
        ("CLIP a", "pixel accuracy", 10),
    ]
    # 4 of 10 right, 10 predicted, 10 labelled: 4 / 16; and 9 / 11.
    assert [r.value for r in rows if r.metric == "mIoU"] == pytest.approx([4 / 16, 9 / 11])
    (test,) = found.comparisons
    assert test.difference == pytest.approx(4 / 16 - 9 / 11) and test.n == 10
    assert (test.first, test.second, test.metric) == ("CLIP a", "CLIP b", "mIoU")
    write_results(found, {}, str(tmp_path))
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == len(found.rows)


def test_table_shows_them_in_the_clips_columns(tmp_path: Path) -> None:
    table = make_table(evaluation(tmp_path))
    assert table.columns == ["CLIP a", "CLIP b"] and not table.published
    text = markdown(table)
    assert "| segmentation | mIoU | 10 | 25.0 [10.0, 90.0] | 81.8 [10.0, 90.0] |" in text


def test_numbers_of_a_users_function_stay_as_they_are(tmp_path: Path) -> None:
    found = Evaluation()
    figures = {"MME": (1510.7, None, None), "POPE": (0.86, 0.8, 0.9)}
    note = {"task": "mllm: x.py:f", "raw": True, "figures": figures, "segmentation": None}
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "x.json").write_text(json.dumps(note))
    add_probes(found, str(tmp_path), {"CLIP a": ["probes/x.json"]})
    text = markdown(make_table(found))
    assert "| MME |  | 1511 |" in text and "| POPE |  | 0.86 [0.8, 0.9] |" in text


def test_report_has_reconstruction_and_picture(tmp_path: Path) -> None:
    found = evaluation(tmp_path)
    logs = {
        "CLIP b": [
            {"step": 0, "reconstruction": 0.2, "reconstruction_without_tokens": 0.3},
            {"step": 9, "reconstruction": 0.1},
        ]
    }
    Image.new("RGB", (400, 30)).save(tmp_path / "x.png")
    pictures = {"CLIP b": (tmp_path / "x.png").read_bytes()}
    given = (make_table(found), {}, str(tmp_path), str(tmp_path), {}, logs, pictures)
    write_report(found, *given)
    page = (tmp_path / "report.html").read_text()
    assert '<h2 id="reconstruction">' in page and "Reconstructions under CLIP b" in page
    assert all(f">{value}<" in page for value in ("0.2000", "0.1000", "0.3000"))
    assert "reconstruction of held-out images" in page


def test_file_follows_what_the_result_depends_on() -> None:
    clip = resolve_clip("shapes")
    probe = Probe("clip-benchmark", "cifar10", "data")
    assert probe.file(clip) == Probe(**asdict(probe)).file(clip)
    others = [Probe("clip-benchmark", "cifar100", "data"), Probe("mllm", "cifar10", "data")]
    assert len({p.file(clip) for p in [probe, *others]}) == 3
    assert probe.task == "clip-benchmark: cifar10"


def test_segmentation_on_drawn_scenes(tmp_path: Path) -> None:
    write_masks(str(tmp_path), 20)
    found = measure(Probe("segmentation", str(tmp_path)), resolve_clip("shapes"), "cpu")
    value, low, high = found["figures"]["mIoU"]
    assert 0 < low < value < high < 1
    assert json.loads(json.dumps(found))["segmentation"]["names"]


def test_a_users_function(tmp_path: Path) -> None:
    """It gets the CLIP's name and a folder that transformers loads."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from transformers import CLIPVisionModel\n"
        "def evaluate(name, folder):\n"
        "    model = CLIPVisionModel.from_pretrained(folder)\n"
        "    return {'layers': model.config.num_hidden_layers, name: (0.5, 0.4, 0.6)}\n"
    )
    found = measure(Probe("mllm", f"{file}:evaluate"), resolve_clip("shapes"), "cpu")
    assert found["figures"]["layers"][0] == 3
    assert tuple(found["figures"]["shapes"]) == (0.5, 0.4, 0.6)
