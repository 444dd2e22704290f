"""Tables and report.html, made of a drawn world and made-up scores, and seen by a real browser."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffitm.evaluation import evaluate
from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.report import charts, html, terminal
from diffitm.report.looks import Key, Look
from diffitm.report.published_figures import LABEL
from diffitm.report.table import TableLine, cell, latex, make_table, markdown
from diffitm.shapes.layouts import write_world
from diffitm.store import pair_table
from diffitm.store.score_store import Store, open_store
from diffitm.tasks.registry import GDBENCH, find_task
from tests import browser
from tests.tiny import read_images, score_row, write_scores

STEPS = [10, 210, 410, 610, 810]


def scored_world(root: Path) -> tuple[dict[str, str], list[Store]]:
    """Every task of a drawn world under two diffusion models and a CLIP, with random scores; one
    image is unreadable."""
    data, out = root / "data", str(root / "out")
    write_world(str(data), 12)
    examples = {
        name: pair_table.write_examples(name, find_task(name)().examples(str(data)), out, None)[0]
        for name in GDBENCH
    }
    base = {"kind": "diffusion", "protocol": "diffusionitm", "seed": 0, "root": str(data)}
    stores = [
        open_store(out, "base", base | {"timesteps": STEPS}),
        open_store(out, "base", base | {"timesteps": STEPS[::2]}),
        open_store(out, "CLIP tiny", {"kind": "clip", "weights": "abc", "root": str(data)}),
    ]
    rng = np.random.default_rng(0)
    for store in stores:
        work = pair_table.write_work(
            list(examples.values()), store, str(root / f"{store.name}.parquet")
        )
        steps = len(store.config.get("timesteps", []))
        lines = []
        for row in read_images(work.uri):
            for text in row.texts:
                if row.image.startswith("pets/images/Blue_circle"):
                    lines.append(score_row(row.image, text, failure="unreadable <image>"))
                elif store.similarity:
                    value = float(rng.normal())
                    lines.append(score_row(row.image, text, similarity=value))
                else:
                    lines.append(score_row(row.image, text, rng.uniform(1, 9, steps).tolist()))
        write_scores(store, lines)
    return examples, stores


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """A folder with report.html and results.json, and what they show."""
    root = tmp_path_factory.mktemp("report")
    examples, stores = scored_world(root)
    evaluation = evaluate.evaluate(examples, stores)
    evaluation.speeds = [evaluate.Speed("base, 5 timesteps", 10, 50, 2.0, 0.2)]
    provenance = {"commit": "abc", "note": "<script>alert(1)</script>"}
    samples = {name: {"a <red> circle": [png(32), png(512)]} for name in ("base", "base + x")}
    logs = {"base + x": [{"step": 1, "loss": 0.5}, {"step": 2, "accuracy/coco_neg_text": 0.7}]}
    places = (str(root / "data"), str(root / "out"))
    pictures = {"base + x": png(1500)}
    table = make_table(evaluation)
    html.write_report(evaluation, table, provenance, *places, samples, logs, pictures)
    evaluate.write_results(evaluation, provenance, str(root / "out"))
    return root / "out", evaluation


def test_page_is_one_file(written: tuple[Path, Evaluation]) -> None:
    """Nothing is fetched, text of data is escaped, and every section is there."""
    page = (written[0] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(["']?http|@import""", page)
    assert "<script>alert" not in page
    assert "unreadable &lt;image&gt;" in page
    ids = set(re.findall(r'<h2 id="(\w+)"', page))
    links = set(re.findall(r'<a href="#(\w+)"', page))
    assert ids == links == {
        "comparison", "tests", "groups", "bias", "timesteps", "numbers", "denoising", "images",
        "training", "variance", "speed", "examples", "failures", "provenance",
    }  # fmt: skip
    assert page.count("data:image/jpeg;base64,") > 20
    assert "#010203" not in page


def test_generated_images_and_training_curves(written: tuple[Path, Evaluation]) -> None:
    """Each model's images below its prompt, none larger than it is shown; a chart for each curve."""
    page = (written[0] / "report.html").read_text()
    assert page.count("a &lt;red&gt; circle, by base + x, seed 1") == 1
    shown = re.findall(r'by base( \+ x)?, seed \d" src="data:image/(\w+);base64,([^"]+)"', page)
    assert [kind for _, kind, _ in shown] == ["png", "jpeg", "png", "jpeg"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for *_, data in shown]
    assert sizes == [(32, 32), (256, 256)] * 2
    assert 'aria-label="Training: loss"' in page
    assert 'aria-label="Training: coco_neg_text"' in page


def main_rows(page_rows: list[list[Any]]) -> dict[tuple[str, str], list[Any]]:
    return {(row[0], row[1]): row[2:] for row in page_rows}


READ = """[...document.querySelectorAll('#main tbody tr')].map(
  row => [...row.cells].map(cell => cell.dataset.value ?? cell.textContent))"""
CLICK = "document.querySelectorAll('#main th button')[{}].click()"
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"
COLUMNS = """getComputedStyle(document.querySelector('#numbers').parentElement.querySelector('.panels'))
  .gridTemplateColumns.split(' ').length"""
LETTERS = """Math.min(...[...document.querySelectorAll('svg text')].filter(
  text => !text.closest('details:not([open])')).map(text => {
    const {a, b} = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
  }))"""
SHOWN_CONTENTS = """['nav.aside', 'details.contents'].map(
  name => document.querySelector(name).checkVisibility())"""
BARS = """(() => {
  const rights = [...document.querySelectorAll('#comparison ~ figure .block')].map(
    block => block.getBoundingClientRect());
  const main = document.querySelector('main').getBoundingClientRect();
  return (Math.max(...rights.map(r => r.right)) - Math.min(...rights.map(r => r.left))) / main.width;
})()"""
CURRENT = """new Promise(done => {{
  document.getElementById("{}").scrollIntoView();
  scrollBy(0, 300);
  setTimeout(() => done([...document.querySelectorAll('.contents a[aria-current]')].map(
    a => a.hash).concat(document.querySelector('nav.aside').getBoundingClientRect().top === 0)), 500);
}})"""
HEAD = """(() => {
  const box = document.querySelector('#main').parentElement;
  box.scrollTop = 200;
  return box.querySelector('th').getBoundingClientRect().top - box.getBoundingClientRect().top;
})()"""


def test_browser(written: tuple[Path, Evaluation], tmp_path: Path) -> None:
    """No problem while loading; numbers equal results.json; a click sorts, another turns it round."""
    out, _ = written
    scripts = [READ, CLICK.format(3), READ, CLICK.format(3), READ, CLICK.format(0), READ, WIDTHS]
    seen = browser.visit(out / "report.html", scripts, tmp_path / "profile")
    assert seen["problems"] == []
    first, _, up, _, down, _, by_name, widths = seen["results"]
    stored = json.loads((out / "results.json").read_text())["rows"]
    columns = [
        ("base, 5 timesteps", "conditional"),
        ("base, 5 timesteps", "normalised"),
        ("base, 3 timesteps", "conditional"),
        ("base, 3 timesteps", "normalised"),
        ("CLIP tiny", "cosine"),
    ]
    compared = 0
    for row in stored:
        if row["group"] != "all":
            continue
        shown = main_rows(first)[row["task"], row["metric"]]
        place = 1 + columns.index((row["model"], row["score"]))
        if row["value"] is not None:
            assert float(shown[place]) == row["value"]
            compared += 1
    assert compared > 60
    for rows, sign in ((up, 1), (down, -1)):
        values = [float(row[3]) for row in rows if row[3] not in ("=", "-")]
        assert values == sorted(values, key=lambda v: sign * v)
        assert sorted(map(str, rows)) == sorted(map(str, first))
    names = [row[0] for row in by_name]
    assert names == sorted(names, key=lambda name: name.lower())
    assert widths[0] <= widths[1]


def test_numbers_and_intervals_stand_apart(written: tuple[Path, Evaluation]) -> None:
    """So that numbers are below each other; what is '=' or '-' keeps its place."""
    page = (written[0] / "report.html").read_text()
    assert re.search(r">\d+\.\d <span class=\"bounds\">\[\d+\.\d, \d+\.\d\]</span></td>", page)
    assert '=<span class="bounds"></span></td>' in page


def test_long_parts_are_folded(written: tuple[Path, Evaluation]) -> None:
    page = (written[0] / "report.html").read_text()
    number = len(written[1].comparisons)
    assert number > 30
    assert f"<details><summary>{number} tests</summary>" in page
    for title in ("Conditional error of base, 5 timesteps", "flickr30k"):
        assert f"<details><summary>{title}</summary>" in page
    assert re.search(r"<details><summary>\d+ more</summary>", page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(written: tuple[Path, Evaluation], tmp_path: Path, scheme: str) -> None:
    """At 400 pixels only tables scroll sideways, curves stand one below the other, letters are not
    small, and the contents are folded."""
    scripts = [WIDTHS, COLUMNS, LETTERS, SHOWN_CONTENTS]
    seen = browser.visit(written[0] / "report.html", scripts, tmp_path / "profile", 400, scheme)
    assert seen["problems"] == []
    widths, panel_columns, letters, contents = seen["results"]
    assert widths == [400, 400]
    assert panel_columns == 1
    assert letters >= 10
    assert contents == [False, True]


def test_wide_screen(written: tuple[Path, Evaluation], tmp_path: Path) -> None:
    """At 1300 pixels the bars take the page's width and curves stand in three columns; the contents at
    the side follow and mark the section, and a table's head stays."""
    scripts = [WIDTHS, COLUMNS, LETTERS, SHOWN_CONTENTS, BARS, CURRENT.format("numbers"), HEAD]
    seen = browser.visit(written[0] / "report.html", scripts, tmp_path / "profile", 1300)
    assert seen["problems"] == []
    widths, panel_columns, letters, contents, bars, current, head = seen["results"]
    assert widths[0] <= widths[1] == 1300
    assert panel_columns == 3
    assert letters >= 10
    assert contents == [True, False]
    assert bars > 0.95
    assert current == ["#numbers", "#numbers", True]
    assert head == 0


def test_contents_lead_somewhere(written: tuple[Path, Evaluation], tmp_path: Path) -> None:
    """Every link of every contents, at the side and folded, and no two parts have the same name."""
    script = """[[...document.querySelectorAll('.contents a')].map(
      link => document.querySelectorAll(link.hash).length),
      [...document.querySelectorAll('[id]')].map(part => part.id)]"""
    seen = browser.visit(written[0] / "report.html", [script], tmp_path / "profile")
    found, ids = seen["results"][0]
    assert found == [1] * 28
    assert len(ids) == len(set(ids))


def test_pictures_shrink_to_a_page_that_can_be_sent(
    written: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in size, then in number, counted; the page says so."""
    out, evaluation = written
    whole = (out / "report.html").read_text()
    assert len(whole.encode()) < html.MOST_BYTES
    assert "To keep this page" not in whole
    rng = np.random.default_rng(0)
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (512, 512, 3), np.uint8)).save(noise, format="PNG")
    table = make_table(evaluation)
    text = len(re.sub(r"data:image/[^\"]+", "", whole).encode())

    def report(room: int, images: int) -> str:
        monkeypatch.setattr(html, "MOST_BYTES", text + room)
        samples = {"base": {"a prompt": [noise.getvalue()] * images}}
        path = html.write_report(
            evaluation, table, {}, str(out.parent / "data"), str(tmp_path), samples
        )
        assert Path(path).stat().st_size <= text + room
        return Path(path).read_text()

    smaller = report(300_000, 8)
    assert "pictures are smaller." in smaller
    assert "left out" not in smaller
    fewer = report(60_000, 8)
    said = re.search(r"(\d+) examples are left out, (\d+) of (\d+) pictures are left out", fewer)
    assert said is not None
    cases, left_out, number = map(int, said.groups())
    blank = fewer.count('<span class="noimage">left out</span>')
    assert blank == left_out
    assert fewer.count("data:image/") == number - left_out
    model = evaluation.cases[0].model
    shown = fewer.count('<div class="case">')
    assert shown + cases == len([c for c in evaluation.cases if c.model == model])


def test_a_page_that_cannot_be_short_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(html, "MOST_BYTES", 1000)
    table = make_table(Evaluation(rows=[a_row()]))
    html.write_report(Evaluation(rows=[a_row()]), table, {}, "", str(tmp_path))
    assert "tables and charts of 1 models alone are too long" in caplog.text


def test_long_names_leave_charts_and_titles_readable(tmp_path: Path) -> None:
    """Titles of columns lose their middles, unless that makes two the same; legends have all of it."""
    long = "models/" + "x" * 200
    names = [f"{long}/a/b.safetensors: naive", f"{long}/a/b.safetensors: normalised"]
    shown = html.short_titles(["task", *names])
    assert shown[0] == "task"
    assert all(len(name) < 50 and "…" in name for name in shown[1:])
    same = [f"{'x' * 30}{i}{'y' * 50}" for i in range(2)]
    assert html.short_titles([*same, names[0]]) == [*same, shown[1]]
    rows = [
        a_row(model=f"{long}{i}", score=score)
        for i in range(9)
        for score in ("conditional", "normalised")
    ]
    table = make_table(Evaluation(rows=rows))
    page = Path(html.write_report(Evaluation(rows=rows), table, {}, "", str(tmp_path))).read_text()
    assert page.count(f"<span>{long}") == 9
    assert 'id="pattern-1"' in page and 'fill="url(#pattern-1)"' in page


def a_row(**changed: Any) -> ResultRow:
    known: dict[str, Any] = {
        "model": "sd", "task": "winoground", "group": "all", "metric": "image", "score": "normalised",
        "value": 0.25, "low": 0.2, "high": 0.3, "n": 400, "chance": 0.25,
        "protocol": "diffusionitm", "timesteps": 10,
    }  # fmt: skip
    return ResultRow(**(known | changed))


def test_published_figures_stand_beside_their_like_alone() -> None:
    """Real data at 10 timesteps of their protocol; never beside 250, drawn scenes or another one."""
    like = Evaluation(
        rows=[a_row(), a_row(model="clip", score="cosine", protocol="cosine", timesteps=0)]
    )
    table = make_table(like, real_data=True)
    assert table.head()[-1] == LABEL
    assert table.texts(table.lines[0])[-1] == "9.0 (10.3, 9.8)"
    for other, real in (
        (a_row(), False),
        (a_row(timesteps=245), True),
        (a_row(protocol="paper"), True),
    ):
        assert LABEL not in make_table(Evaluation(rows=[other]), real).head()
    mixed = Evaluation(rows=[a_row(), a_row(model="long", timesteps=245)])
    assert LABEL not in make_table(mixed, True).head()


def test_cells() -> None:
    """Percent with interval, another n told, effect sizes with sign and p, nothing scored."""
    assert cell(a_row(), 400) == "25.0 [20.0, 30.0]"
    assert cell(a_row(), 390) == "25.0 [20.0, 30.0] (n=400)"
    assert cell(None, 1) == "-"
    assert cell(a_row(value=None, low=None, high=None), 400) == "-"
    effect = a_row(unit="effect size", value=-0.5, low=-0.81, high=0.1, p=0.0304)
    assert cell(effect, 400) == "-0.50 [-0.81, +0.10] p=.030"
    assert cell(a_row(unit="effect size", value=1.0, low=None, high=None), 400) == "+1.00"


def test_equal_sign_only_where_normalising_changes_nothing() -> None:
    """A metric that another model lacks altogether is '-', not '='."""
    rows = [
        a_row(model="a", score="conditional", metric="own"),
        a_row(model="b", score="conditional", metric="shared"),
        a_row(model="a", score="conditional", metric="shared"),
    ]
    table = make_table(Evaluation(rows=rows))
    texts = {line.metric: table.texts(line)[3:7] for line in table.lines}
    assert texts["own"][1:] == ["=", "-", "-"]
    assert texts["shared"][1::2] == ["=", "="]


def test_names_survive_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup of LaTeX, Markdown and the terminal in a model's name stays text."""
    name = r"runs/[lora]/a[/b]_~^<x>|\ $"
    evaluation = Evaluation(rows=[a_row(model=name), a_row(model="other")])
    table = make_table(evaluation)
    terminal.print_results(evaluation, table)
    shown = "".join(capsys.readouterr().out.split())
    assert "[lora]" in shown
    line = latex(table).splitlines()[2]
    assert r"\_\textasciitilde{}\textasciicircum{}\textless{}x\textgreater{}\textbar{}" in line
    head = markdown(table).splitlines()[0]
    assert r"&lt;x>\|\\ $" in head


def test_looks_of_many_models_differ() -> None:
    found = [Look(i) for i in range(64)]
    assert len({(look.colour, look.marker) for look in found}) == 64
    assert len({(look.colour, look.pattern) for look in found}) == 64


def test_axes_keep_their_numbers() -> None:
    """Coordinates are rounded, labels are not, and both ends of a range have one."""
    points = [(value, "a", 0.5, True) for value in (0.00003, 0.0001, 0.12345)]
    svg = charts.setting_points(points, None, "lr", "Accuracy by lr").svg
    for label in ("3e-05", "0.0001", "0.12345"):
        assert f">{label}</text>" in svg


def test_one_legend_where_all_charts_have_the_same() -> None:
    a, b, c = (Key(name, Look(i), "line") for i, name in enumerate("abc"))
    one = charts.grid([charts.Panel("1", (a, b)), charts.Panel("2", (a,))])
    assert one.keys == (a, b)
    assert [panel.keys for panel in one.panels] == [(), ()]
    each = charts.grid([charts.Panel("1", (a, b)), charts.Panel("2", (a, c))])
    assert each.keys == ()
    assert [panel.keys for panel in each.panels] == [(a, b), (a, c)]


def test_published_bias_is_shown_when_asked_for() -> None:
    rows = [
        a_row(
            task="mmbias",
            group="pair=Buddhist-Jewish",
            metric=metric,
            unit="effect size",
            value=value,
        )
        for metric, value in (("effect size", 1.69), ("effect size, published pooling", 10.14))
    ]
    assert len(make_table(Evaluation(rows=rows)).lines) == 1
    shown = make_table(Evaluation(rows=rows), published_bias=True).lines
    assert [line.metric for line in shown] == ["effect size", "effect size, published pooling"]


def test_markdown_and_latex() -> None:
    """The same cells in both; what is special in LaTeX is escaped."""
    evaluation = Evaluation(rows=[a_row(group="collapsed_tag=A&B_%"), a_row(metric="text")])
    table = make_table(evaluation)
    lines = markdown(table).splitlines()
    assert lines[0] == "| task | metric | n | diffusion naive | diffusion normalised | chance |"
    assert len({line.count("|") for line in lines}) == 1
    tex = latex(table)
    assert tex.startswith(r"\begin{tabular}{llrrrr}")
    assert "25.0 [20.0, 30.0]" in tex
    assert all(line.count(" & ") == 5 for line in tex.splitlines() if line.endswith(r"\\"))


def test_a_group_of_everything_is_not_repeated() -> None:
    rows = [a_row(), a_row(group="num_main_preds=1"), a_row(group="collapsed_tag=Object", n=100)]
    found = [line.group for line in make_table(Evaluation(rows=rows)).lines]
    assert found == ["all", "collapsed_tag=Object"]


def test_terminal_shows_tasks_tests_and_failures(
    written: tuple[Path, Evaluation], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = written[1]
    terminal.print_results(evaluation, make_table(evaluation))
    text = capsys.readouterr().out
    for name in GDBENCH:
        assert name in text
    assert f"failures {len(evaluation.failures)}" in text
    assert "Paired tests" in text


def test_nothing_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in which every example failed still has a report and a table."""
    row = a_row(value=None, low=None, high=None, n=0, failures=3, score="conditional")
    failure = {"model": "sd", "task": "winoground", "example": "0", "failure": "no"}
    evaluation = Evaluation(rows=[row], failures=[failure])
    table = make_table(evaluation)
    path = html.write_report(evaluation, table, {}, "", str(tmp_path))
    assert "winoground, 0: no" in Path(path).read_text()
    many = Evaluation(rows=[row], failures=[failure] * 20)
    html.write_report(many, table, {}, "", str(tmp_path))
    assert "<details><summary>20 examples, all of them in" in Path(path).read_text()
    terminal.print_results(evaluation, table)
    assert "failures 1" in capsys.readouterr().out


def test_labels_may_hold_anything(tmp_path: Path) -> None:
    """Dollars are not mathematics, angle brackets no markup."""
    rows = [
        a_row(task="t", group=f"kind={name}", metric="R@1 <b>$x_1$", value=math.pi / 4, n=3)
        for name in ("$\\frac{", "<i>&", "ä 猫")
    ]
    rows.append(a_row(task="t", metric="R@1 <b>$x_1$", n=9))
    table = make_table(Evaluation(rows=rows))
    page = Path(html.write_report(Evaluation(rows=rows), table, {}, "", str(tmp_path))).read_text()
    assert "<i>" not in page
    assert "R@1 <b>" not in page


def test_line_of_effects_is_no_share() -> None:
    row = a_row(unit="effect size")
    assert not TableLine("t", "g", "m", 1, 0.0, {"a": row}).is_share
    assert TableLine("t", "g", "m", 1, 0.0, {"a": None}).is_share
