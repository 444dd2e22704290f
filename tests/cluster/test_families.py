"""Transformer families in the pipeline as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families, pipeline

pytestmark = pytest.mark.slow
NAMES = (
    *("PixArt-Sigma", "SD3", "Sana", "FLUX.1-dev"),
    *("Qwen-Image", "Lumina2", "Z-Image", "FLUX.2-dev", "FLUX.2-klein"),
)
SAID = "is distilled and was not trained without a text"
TURBO = "is named as the turbo models are, which were trained at timesteps 999, 749, 499, 249 alone: 2 of"


def test_models_of_both_kinds_in_one_command(tmp_path: Path) -> None:
    """Each by the protocol of its kind, in one table; a protocol of the other kind is refused by name."""
    folders = [families.write(name, tmp_path / name) for name in NAMES]
    folders[0] = folders[0].rename(tmp_path / "sd-turbo")
    out = tmp_path / "out"
    words = (
        "--data", "shapes", "--scenes", 10, "--tasks", "clevr", "winoground", "--limit", 4,
        "--actors", 1, "--out", out,
    )  # fmt: skip
    done = pipeline.run("--model", *folders, *words, "--timesteps", 2)
    rows = {row["model"]: row for row in pipeline.rows(out)}
    protocols = {name: (row["protocol"], row["timesteps"]) for name, row in rows.items()}
    assert protocols == {
        str(folders[0]): ("diffusionitm", 2),
        **{str(folder): ("snr", 2) for folder in folders[1:]},
    }
    assert all(row["failures"] == 0 for row in pipeline.rows(out))
    assert f"{folders[0]} {TURBO}" in done.stdout + done.stderr
    assert f"{folders[3]} {SAID}" in done.stdout
    assert SAID in (out / "report.html").read_text() and SAID in (out / "table.md").read_text()
    again = pipeline.run("--model", *folders, *words, "--timesteps", 2)
    assert again.stderr.count("0 forwards needed") == len(NAMES)
    wrong = pipeline.run("--model", folders[1], *words, "--protocol", "diffusionitm", code=2)
    assert "--protocol diffusionitm is not for a model that is a flow model" in wrong.stderr
