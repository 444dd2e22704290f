"""The front door: images and texts to scores, models to figures, from Python."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffitm
from diffitm.core import images, lease
from diffitm.core.errors import InputError
from diffitm.models.embedded import SHAPES
from diffitm.shapes.layouts import write_world
from diffitm.store.join import read_scored
from diffitm.store.score_store import read_store
from tests.scoring.test_compiled import stand_in
from tests.scoring.test_custom import CODE

STEPS = 3


@pytest.fixture(scope="module")
def scorer() -> diffitm.ImageTextScorer:
    return diffitm.load_scorer("shapes", timesteps=STEPS)


@pytest.fixture(scope="module")
def clip() -> diffitm.ImageTextScorer:
    return diffitm.load_scorer("clip:shapes")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(str(root), 10)
    return root


@pytest.fixture(scope="module")
def files(world: Path) -> list[str]:
    return sorted(str(path) for path in (world / "clevr" / "images").iterdir())[:3]


TEXTS = ["a red circle", "a large blue square", "a red circle"]


def test_import_is_quick() -> None:
    """Neither torch nor Ray before something is asked for."""
    code = "import sys, diffitm; dir(diffitm); print(*{'torch', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_there_is() -> None:
    for name in diffitm.__all__:
        assert getattr(diffitm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffitm.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["shapes", "clip:shapes"])
def test_the_same_scores_as_an_evaluation(
    name: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of every example of a task; the rows of the table come from what is stored."""
    fixture = "scorer" if name == "shapes" else "clip"
    model: diffitm.ImageTextScorer = request.getfixturevalue(fixture)
    table = diffitm.evaluate(model, "winoground", str(world), out=str(tmp_path))
    assert set(table["task"]) == {"winoground"} and len(table) > 3
    assert table["value"].between(0, 1).all() and (table["low"] <= table["value"]).all()
    (store,) = (tmp_path / "scores").iterdir()
    (examples,) = (tmp_path / "examples").iterdir()
    items = list(read_scored(str(examples), read_store(str(store)), "l2"))
    assert len(items) == 10
    for item in items[:3]:
        paths = [str(world / image) for image in item.example.images]
        for kind, expected in item.scores().items():
            found = model(paths, item.example.texts, "auto" if kind == "cosine" else kind)  # type: ignore[arg-type]
            np.testing.assert_allclose(found, expected, atol=2e-5)
            assert found.dtype == np.float32


def test_images_of_every_kind(scorer: diffitm.ImageTextScorer, files: list[str]) -> None:
    """A path, a Path, a picture, an array: the same image, the same scores; one alone is a list of one."""
    picture = Image.open(files[0])
    kinds = [files[0], Path(files[0]), picture, np.asarray(picture.convert("RGB"))]
    scores = scorer(kinds, TEXTS)
    assert scores.shape == (4, 3)
    np.testing.assert_allclose(scores, scores[:1].repeat(4, 0), atol=1e-5)
    assert (scores[:, 0] == scores[:, 2]).all(), "a text that comes again has the same score"
    np.testing.assert_allclose(scorer(files[0], TEXTS[0]), scores[:1, :1], atol=1e-5)


def test_transparency_is_white(clip: diffitm.ImageTextScorer) -> None:
    """As in a file."""
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    found = clip([clear, Image.new("RGB", (32, 32), "white")], ["a red circle"])
    assert found[0] == found[1]


def test_errors_by_timestep(scorer: diffitm.ImageTextScorer, files: list[str]) -> None:
    """Their means are the scores; of every kind of error."""
    errors = scorer.errors(files, [*TEXTS, ""])
    assert errors.shape == (3, 4, STEPS) and len(scorer.timesteps) == STEPS
    assert errors.dtype == np.float32 and (errors > 0).all()
    means = errors.astype(float).mean(-1)
    np.testing.assert_allclose(scorer(files, TEXTS), means[:, 3:] - means[:, :3], atol=1e-5)
    np.testing.assert_allclose(scorer(files, TEXTS, "conditional"), -means[:, :3], atol=1e-5)
    elements = scorer.errors(files, TEXTS)[0, 0] ** 2 / scorer.errors(files, TEXTS, "mse")[0, 0]
    np.testing.assert_allclose(elements, elements[0], rtol=1e-5)
    assert scorer.errors(files, TEXTS, "l1").shape == scorer.errors(files, TEXTS, "huber").shape


def test_the_mean_squared_error_of_diffusion_classifier(files: list[str]) -> None:
    """The protocol's own error, and its crop."""
    scorer = diffitm.load_scorer("shapes", protocol="diffusion-classifier", timesteps=2)
    errors = scorer.errors(files, TEXTS, "mse").astype(float).mean(-1)
    np.testing.assert_allclose(scorer(files, TEXTS, "conditional"), -errors, atol=1e-6)
    assert scorer.spec.resize == "crop"  # type: ignore[attr-defined]


def test_errors_that_are_no_numbers(
    scorer: diffitm.ImageTextScorer,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Are told with another dtype and the first of them."""
    rows: Any = scorer.rows
    real = rows.denoiser.predict

    def overflow(noised: Tensor, steps: Tensor, condition: Any) -> Tensor:
        found: Tensor = real(noised, steps, condition)
        return torch.where(steps[:, None, None, None] > 100, found / 0, found)

    monkeypatch.setattr(rows.denoiser, "predict", overflow)
    monkeypatch.setattr(scorer, "spec", dataclasses.replace(scorer.spec, dtype="fp16"))  # type: ignore[type-var]
    assert not np.isfinite(scorer(files[:1], TEXTS[:2])).any()
    hint = "3 of 3 pairs are NaN or infinite in fp16: try dtype bf16 or fp32"
    assert caplog.messages == [f"shapes: {hint}; such as images[0] with texts[0]"]
    with pytest.raises(InputError, match="not finite in fp16: try dtype bf16 or fp32"):
        scorer.best(files[:1], TEXTS[:2])


def test_compiled(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are those without it."""
    sizes = stand_in(monkeypatch)
    compiled = diffitm.load_scorer("shapes", timesteps=STEPS, batch_size=4, compile=True)
    plain = diffitm.load_scorer("shapes", timesteps=STEPS, batch_size=4)
    np.testing.assert_allclose(compiled.errors(files, TEXTS), plain.errors(files, TEXTS), rtol=1e-5)
    assert set(sizes) == {4}


def test_nothing(scorer: diffitm.ImageTextScorer, files: list[str]) -> None:
    assert scorer([], TEXTS).shape == (0, 3)
    assert scorer(files, []).shape == (3, 0)
    assert scorer.errors([], []).shape == (0, 0, STEPS)
    assert scorer.errors([], TEXTS).shape == (0, 3, STEPS)
    assert scorer.errors([np.zeros((8, 8, 3), np.uint8)], []).shape == (1, 0, STEPS)


def test_an_image_that_cannot_be_read(
    scorer: diffitm.ImageTextScorer, files: list[str], tmp_path: Path
) -> None:
    """By its place and name."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    for picture, text in (
        (tmp_path / "none.jpg", r"images \[1\] '.*none.jpg': there is no such file"),
        (broken, r"images \[1\] '.*broken.jpg': ValueError: the file is not an image"),
        (np.zeros((4, 4), np.uint8), r"images \[1\] ndarray: .* not uint8 \(4, 4\)"),
        (3, r"images \[1\] int:"),
    ):
        with pytest.raises(diffitm.InputError, match=text):
            scorer([files[0], picture], TEXTS)  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["scorer", "clip"])
def test_a_text_that_is_cut(
    name: str, files: list[str], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said by place; one that just fits is not."""
    long = " ".join(["red"] * 300)
    with caplog.at_level(logging.WARNING, "diffitm"):
        found = request.getfixturevalue(name)(files[0], ["a red circle", long])
    assert np.isfinite(found).all()
    (line,) = [x for x in caplog.messages if "longer than the model reads" in x]
    assert line.startswith("texts[1] 'red red")


def test_texts_that_are_none(scorer: diffitm.ImageTextScorer, files: list[str]) -> None:
    with pytest.raises(diffitm.InputError, match=r"texts \[1\]: 3 is no text"):
        scorer(files, ["a", 3])  # type: ignore[list-item]


def test_kinds_that_a_model_lacks(clip: diffitm.ImageTextScorer, files: list[str]) -> None:
    with pytest.raises(diffitm.InputError, match="score 'conditional': only diffusion models"):
        clip(files, TEXTS, "conditional")
    with pytest.raises(diffitm.InputError, match="has no errors by timestep"):
        clip.errors(files, TEXTS)


def test_names(tmp_path: Path) -> None:
    """A folder of either kind, a scorer of one's own; what is none is said."""
    assert diffitm.load_scorer(str(SHAPES / "clip")).name.startswith("CLIP ")
    assert len(diffitm.load_scorer(str(SHAPES / "diffusion"), timesteps=[5, 500]).timesteps) == 2
    (tmp_path / "mine.py").write_text(CODE)
    red = diffitm.load_scorer(f"{tmp_path}/mine.py:Red")
    found = red([Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4))], ["a", "bbb"])
    assert found.tolist() == [[256, 258], [1, 3]]
    for name, text in (
        ("nothing", "model 'nothing' is neither"),
        ("ViT-B-32:no", "is no file and no"),
    ):
        with pytest.raises(diffitm.InputError, match=text):
            diffitm.load_scorer(name)


def test_a_timestep_beyond_the_last() -> None:
    with pytest.raises(diffitm.InputError, match="timestep 1000 is beyond the model's last, 999"):
        diffitm.load_scorer("shapes", timesteps=[3, 1000])


def test_what_is_stored_is_not_scored_again(
    clip: diffitm.ImageTextScorer, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    score = clip.rows.score

    def counting(rows: Sequence[Any]) -> list[dict[str, Any]]:
        asked.append(len(rows))
        return score(rows)

    monkeypatch.setattr(clip.rows, "score", counting)
    first = diffitm.evaluate(clip, ["winoground"], str(world), out=str(tmp_path), limit=4)
    assert sum(asked) == 8
    again = diffitm.evaluate(clip, ["winoground"], str(world), out=str(tmp_path))
    assert sum(asked) == 20
    last = diffitm.evaluate(clip, ["winoground"], str(world), out=str(tmp_path))
    assert sum(asked) == 20
    assert last.equals(again) and not first.equals(again)
    assert list((tmp_path / "work").iterdir()) == []


def test_out_is_one_runs(clip: diffitm.ImageTextScorer, world: Path, tmp_path: Path) -> None:
    with lease.held(str(tmp_path)), pytest.raises(InputError, match="another run works on it"):
        diffitm.evaluate(clip, ["winoground"], str(world), out=str(tmp_path), limit=4)
    assert not (tmp_path / "scores").exists() and not (tmp_path / "lease.json").exists()
    assert len(diffitm.evaluate(clip, ["winoground"], str(world), out=str(tmp_path), limit=4))


@pytest.mark.parametrize("is_open", [False, True])
def test_small_files_are_joined(
    clip: diffitm.ImageTextScorer,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_open: bool,
) -> None:
    """At the end, unless a killed run's table could take back what it wrote last."""
    monkeypatch.setattr("diffitm.store.compaction.FEW", 0)
    wanted = diffitm.evaluate(clip, "winoground", str(world), out=str(tmp_path), limit=4)
    (store,) = (tmp_path / "scores").iterdir()
    assert [path.name[:8] for path in store.glob("*.parquet")] == ["compact-"]
    if is_open:
        (tmp_path / "work" / store.name / "0000").mkdir(parents=True)
        (tmp_path / "work" / store.name / "0000" / "table.json").write_text("{}")
    more = diffitm.evaluate(clip, "winoground", str(world), out=str(tmp_path))
    assert len(list(store.glob("*.parquet"))) == (2 if is_open else 1)
    assert len(more) == len(wanted)


@pytest.mark.parametrize(
    ("protocol", "error"), [("snr", "l2"), ("diffusionitm", "l2"), ("sigma", "mse")]
)
def test_the_error_of_a_protocol(
    scorer: diffitm.ImageTextScorer,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    error: Literal["l2", "mse"],
) -> None:
    """As an evaluation has it."""
    monkeypatch.setattr(scorer, "spec", dataclasses.replace(scorer.spec, protocol=protocol))
    wanted = -scorer.errors(files, TEXTS, error).mean(-1)
    np.testing.assert_allclose(scorer(files, TEXTS, "conditional"), wanted, rtol=1e-5)


def test_by_name_and_without_a_folder() -> None:
    table = diffitm.evaluate("clip:shapes", ["winoground", "clevr"], scenes=10, limit=5)
    assert set(table["task"]) == {"winoground", "clevr"}


def test_a_task_without_data(tmp_path: Path) -> None:
    with pytest.raises(diffitm.InputError, match="winoground"):
        diffitm.evaluate("clip:shapes", ["winoground"], str(tmp_path))
    with pytest.raises(diffitm.InputError, match="data: there is no folder"):
        diffitm.evaluate("clip:shapes", ["winoground"], str(tmp_path / "none"))


def test_a_broken_image_costs_its_own_example(
    clip: diffitm.ImageTextScorer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_world(str(tmp_path / "world"), 10)
    image = sorted((tmp_path / "world" / "clevr" / "images").iterdir())[0]
    image.write_bytes(image.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "diffitm"):
        table = diffitm.evaluate(clip, "clevr", str(tmp_path / "world"))
    whole = table[table["group"] == "all"].iloc[0]
    assert (whole["n"], whole["failures"]) == (9 * 14, 14)
    assert sum("unreadable image" in line for line in caplog.messages) == 14


def test_a_log_has_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Every ten seconds: how far, how fast, how long."""
    from diffitm import api

    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(api.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "diffitm"):
        assert list(api.progress([[1, 2], [3, 4], [5, 6], [7]], "model", 7)) == [
            [1, 2], [3, 4], [5, 6], [7]
        ]  # fmt: skip
    assert caplog.messages == ["model: 4 of 7 images, 0.3/s, 9 s left"]


def test_upright(clip: diffitm.ImageTextScorer, tmp_path: Path) -> None:
    """A file's orientation is followed, that of a PIL image too."""
    left = Image.new("RGB", (32, 32), "red")
    left.paste("blue", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    left.save(tmp_path / "a.png", exif=exif)
    turned = images.decode((tmp_path / "a.png").read_bytes())
    found = clip([tmp_path / "a.png", Image.open(tmp_path / "a.png"), turned], ["a red circle"])
    assert found[0] == found[1] == found[2]
    assert found[0] != clip(left, ["a red circle"])[0]


# --- races


@pytest.fixture(scope="module")
def long() -> diffitm.ImageTextScorer:
    return diffitm.load_scorer("shapes", timesteps=20)


def count_forwards(model: diffitm.ImageTextScorer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each batch that the model is asked for from now on."""
    asked, denoiser = list[int](), model.rows.denoiser  # type: ignore[attr-defined]
    predict = denoiser.predict

    def counted(noised: Any, *more: Any) -> Any:
        asked.append(len(noised))
        return predict(noised, *more)

    monkeypatch.setattr(denoiser, "predict", counted)
    return asked


@pytest.mark.parametrize("of", ["image", "text"])
def test_the_best_by_a_race(
    of: Any, long: diffitm.ImageTextScorer, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the full scores, at fewer forwards."""
    texts = ["a red circle", "a large blue square", "a green star", "a yellow triangle", "a dog"]
    scores = long(files, texts) if of == "image" else long(files, texts).T
    asked = count_forwards(long, monkeypatch)
    found = long.best(files, texts, 2, of=of, racing=0.05)
    assert sum(asked) < len(files) * (len(texts) + 1) * 20
    assert found.shape == (len(scores), 2) and found.dtype == int
    exact = long.best(files, texts, 2, of=of, racing=0.0)
    for row, wanted in zip(exact, np.argsort(-scores, axis=1)[:, :2], strict=True):
        assert set(row) == set(wanted)
    assert (np.sort(found) == np.sort(exact)).mean() > 0.7
    assert long.best(files, texts, 9, of=of).shape == scores.shape
    assert long.best([], texts, of="image").shape[0] == 0


def test_what_best_refuses(
    long: diffitm.ImageTextScorer, clip: diffitm.ImageTextScorer, files: list[str]
) -> None:
    for texts, k, racing, told in (
        (["a", "a"], 1, 0.1, "each text once"), (["a", ""], 1, 0.1, "each text once"),
        (["a", "b"], 0, 0.1, "k 0: must be at least 1"), (["a", "b"], 1, 1.0, "racing 1.0: must be"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            long.best(files, texts, k, racing=racing)
    with pytest.raises(InputError, match="no errors by timestep"):
        clip.best(files, ["a", "b"])
    with pytest.raises(InputError, match=r"images \[1\].*no such file"):
        long.best([files[0], "nowhere.png"], ["a", "b"])


def test_an_evaluation_by_races(
    long: diffitm.ImageTextScorer, world: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Fewer forwards; a full evaluation afterwards makes the others; a CLIP is not raced."""
    asked = count_forwards(long, monkeypatch)
    with caplog.at_level(logging.INFO):
        raced = diffitm.evaluate(
            long, "winoground", str(world), out=str(tmp_path), racing=0.1, racing_audit=0.6
        )
    assert "Raced (doubt 0.1) with" in caplog.text and "audited decisions" in caplog.text
    assert set(raced["racing"]) == {"doubt 0.1"} and set(raced["score"]) == {"normalised"}
    spent = sum(asked)
    whole = diffitm.evaluate(long, "winoground", str(world), out=str(tmp_path))
    assert sum(asked) == 10 * 6 * 20 and spent < sum(asked)
    assert set(whole["racing"]) == {None}
    again = diffitm.evaluate(
        long, "winoground", str(world), out=str(tmp_path), racing=0.1, racing_audit=0.6
    )
    assert sum(asked) == 10 * 6 * 20
    assert again.equals(raced)
    plain = diffitm.evaluate("clip:shapes", "winoground", str(world), racing=0.1)
    assert set(plain["racing"]) == {None}


def test_a_turbo_is_told_its_timesteps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its name; others are told and not refused."""
    turbo = tmp_path / "sd-turbo"
    turbo.symlink_to(SHAPES / "diffusion")
    diffitm.load_scorer(str(turbo), timesteps=(999, 249))
    assert "were trained at timesteps" not in caplog.text
    diffitm.load_scorer(str(turbo), timesteps=(999, 250))
    assert "1 of these 2 are others, such as 250" in caplog.text
