"""Published figures beside ours: of the same set, metric, protocol and model alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.report import published_figures
from diffitm.report.html import write_report
from diffitm.report.published_figures import SELF_BENCH_TIMESTEPS, SOURCES
from diffitm.report.table import make_table, markdown
from diffitm.tasks.registry import find_task

FILES = Path(published_figures.__file__).parent / "published"
CLIP, SD = "CLIP ViT-B-32:openai", "stabilityai/stable-diffusion-2-base"
VL_COMPO, PLOTS = f"published: {CLIP} (vl_compo)", f"published: {CLIP} (Self-Bench)"


def row(**more: Any) -> ResultRow:
    known: dict[str, Any] = {
        "model": CLIP, "task": "whatsup_a", "group": "all", "metric": "accuracy", "score": "cosine",
        "value": 0.3, "low": 0.2, "high": 0.4, "n": 412, "chance": 0.25, "protocol": "cosine",
        "timesteps": 0,
    }  # fmt: skip
    return ResultRow(**(known | more))


def titles(*rows: ResultRow, real: bool = True, **settings: Any) -> list[str]:
    made = Evaluation(rows=list(rows), settings={r.model: settings for r in rows})
    return [column.title for column in make_table(made, real).published]


def test_a_column_for_each_model_and_source() -> None:
    other = row(model="CLIP ViT-L-14:openai", value=0.2)
    parts = [row(task="valse", group="piece=plurals", n=851)]
    table = make_table(Evaluation(rows=[row(), other, *parts]), True)
    assert [column.title for column in table.published] == [
        VL_COMPO, "published: CLIP ViT-L-14:openai (vl_compo)",
        PLOTS, "published: CLIP ViT-L-14:openai (Self-Bench)",
    ]  # fmt: skip
    lines = {line.task: table.texts(line)[-4:] for line in table.lines}
    assert lines == {
        "whatsup_a": ["30.58", "26.46", "31", "27"], "valse": ["57.58", "", "", ""]
    }  # fmt: skip
    assert VL_COMPO in markdown(table)


def test_nothing_stands_beside_another_set_metric_or_model() -> None:
    assert titles(row()) == [VL_COMPO, PLOTS]
    assert titles(row(), real=False) == []
    for other in (
        row(n=411), row(metric="pair accuracy"), row(group="preposition=on"), row(task="whatsup"),
        row(model="CLIP ViT-B-32:laion2b_s34b_b79k"), row(model="ViT-B-32:openai"),
        row(score="probe"),
    ):  # fmt: skip
        assert titles(other) == []


def test_a_diffusion_model_needs_the_published_protocol() -> None:
    """Its timesteps, its sampled latents, its error; nothing of it is a race."""
    known = {"timesteps": SELF_BENCH_TIMESTEPS, "latent_seed": 0, "error": "l2"}
    made = row(model=SD, score="conditional", protocol="diffusionitm", timesteps=30)
    assert SELF_BENCH_TIMESTEPS[:2] == [32, 65] and SELF_BENCH_TIMESTEPS[-1] == 989
    assert titles(made, **known) == ["published: SD 2.0 (Self-Bench)"]
    assert titles(row(**{**vars(made), "racing": "0.01"}), **known) == []
    for other in (
        {"timesteps": list(range(10, 990, 33))}, {"latent_seed": None}, {"error": "mse"},
        {"weighted": True},
    ):  # fmt: skip
        assert titles(made, **(known | other)) == []


@pytest.mark.parametrize("source", SOURCES)
def test_files_of_figures(source: str) -> None:
    """Tasks of ours, with as many examples as they tell; a figure with decimals is a share of so many."""
    lines = list(csv.DictReader((FILES / f"{source}.csv").open()))
    totals: dict[str, int] = {}
    for line in lines:
        n = int(line["n"])
        if line["metric"] in ("accuracy", "group"):
            totals[line["task"]] = totals.get(line["task"], 0) + n
        for figure in list(line.values())[4:]:
            if "." in figure:
                right = round(float(figure) * n / 100)
                assert float(figure) == pytest.approx(100 * right / n, abs=0.00501)
    for task, total in totals.items():
        assert find_task(task).published in (None, total)


def test_the_report_says_where_they_stand(tmp_path: Path) -> None:
    made = Evaluation(rows=[row(), row(task="whatsup_b", n=408)])
    write_report(made, make_table(made, True), {}, str(tmp_path), str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert page.count(SOURCES["vl_compo"]) == page.count(SOURCES["self_bench"]) == 1
    assert 'data-value="30.88"' in page
