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
    for folder in (folders[3], folders[7]):
        assert f"{folder} {SAID}" in " ".join(done.stdout.split())
    assert SAID in (out / "report.html").read_text() and SAID in (out / "table.md").read_text()
    again = pipeline.run("--model", *folders, *words, "--timesteps", 2)
    assert again.stderr.count("0 forwards needed") == len(NAMES)
    wrong = pipeline.run("--model", folders[1], *words, "--protocol", "diffusionitm", code=2)
    assert "--protocol diffusionitm is not for a model that is a flow model" in wrong.stderr


def test_a_transformer_is_tuned_and_compared(tmp_path: Path) -> None:
    """With texts of other lengths that were encoded beforehand, and a validation by its own protocol."""
    folder = families.write("Sana", tmp_path / "sana")
    words = "--data", "shapes", "--scenes", 20
    tuned = tmp_path / "tuned"
    pipeline.run(
        "--model", folder, *words, "--steps", 2, "--batch-size", 2, "--effective-batch", 4, "--lr", "1e-2",
        "--cache-latents", "--validate-every", 1, "--validation-examples", 4, "--workers", 1, "--out", tuned,
        script="finetune",
    )  # fmt: skip
    lora = tuned / "pytorch_lora_weights.safetensors"
    out = tmp_path / "out"
    pipeline.run(
        "--model", folder, *words, "--tasks", "winoground", "--limit", 4, "--timesteps", 2, "--actors", 1,
        "--lora", "none", lora, "--out", out,
    )  # fmt: skip
    names = {row["model"] for row in pipeline.rows(out)}
    assert names == {str(folder), f"{folder} + {lora}"}
    base, other = (pipeline.scores(out, name)["l2"].to_pylist() for name in sorted(names))
    assert base != other
