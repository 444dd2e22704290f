"""The README's picture is drawn from what a run leaves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffitm.core.errors import InputError
from diffitm.models.embedded import SHAPES
from diffitm.shapes.layouts import write_world
from tools.shapes import drawn
from tools.shapes.picture import BARS, KINDS, draw


def test_picture(tmp_path: Path) -> None:
    """A text task has no normalised score of its own: its bar is that of the naive one. Other models that the
    run scored, too, are not shown."""
    write_world(str(tmp_path / "shapes-10-v2"), 10)
    with pytest.raises(InputError, match="is no OUT of gdbench"):
        draw(tmp_path, str(tmp_path / "picture.png"))
    figure = {"group": "all", "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25}
    rows = [
        {"task": task, "metric": metric, "score": score, "model": "shapes", **figure}
        for task, metric, _ in BARS
        for score, *_ in KINDS
        if metric != "text" or score != "normalised"
    ]
    found = []
    for more in ([], [row | {"model": "shapes-flow", "value": 0.9} for row in rows]):
        (tmp_path / "results.json").write_text(json.dumps({"rows": rows + more}))
        draw(tmp_path, str(tmp_path / "picture.png"))
        picture = Image.open(tmp_path / "picture.png")
        assert picture.width > 1000
        found.append(picture.tobytes())
    assert found[0] == found[1]


def test_what_the_model_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption's pictures differ by their noise, and are in the sheet."""
    monkeypatch.setattr(drawn, "CAPTIONS", ("a red circle", "a blue cross", "a white square"))
    monkeypatch.setattr(drawn, "STEPS", 4)
    model = str(SHAPES / "diffusion")
    found = drawn.pictures(model)
    assert found.shape == (3, drawn.NOISES, 32, 32, 3)
    assert all((one != other).any() for row in found for one, other in itertools.pairwise(row))
    drawn.draw(model, str(tmp_path / "drawn.png"))
    colours = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50
