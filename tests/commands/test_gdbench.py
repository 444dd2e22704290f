"""Bad input to the main pipeline is told before Ray starts, with what would be right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffitm.commands.gdbench import GdbenchConfig, run
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.core.lease import held
from diffitm.distributed import session
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import add_lora, lora_weights, save_lora
from diffitm.shapes.layouts import write_world

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "gdbench.py"


def message(*options: object) -> str:
    """What the pipeline says of these options."""
    with pytest.raises(InputError) as raised:
        run(parse(GdbenchConfig, [str(option) for option in options]))
    return raised.value.on_command_line()


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(str(tmp_path / "data"), 10)
    return tmp_path / "data"


def test_all_problems_at_once(tmp_path: Path) -> None:
    """An unknown task, a count out of range and a bad batch size are told together."""
    told = message(
        "--model", "shapes", "--tasks", "winogruond", "--timesteps", 2000, "--batch-size", 0,
        "--out", tmp_path,
    )  # fmt: skip
    assert "'winogruond'; did you mean 'winoground'?" in told
    assert "timesteps: 2000 is out of range, must be 1 to 1000" in told
    assert "--batch-size 0: must be at least 1" in told


def test_unknown_option_and_value() -> None:
    with pytest.raises(InputError) as raised:
        parse(GdbenchConfig, ["--modle", "shapes", "--dtype", "fp8", "--timesteps", "many"])
    told = str(raised.value)
    assert "unknown option '--modle'; did you mean '--model'?" in told
    assert "dtype: 'fp8' is not one of auto, fp32, bf16, fp16" in told
    assert "timesteps: ['many'] is not a whole number" in told


def test_nothing_to_score(tmp_path: Path) -> None:
    assert "give at least one --model, --clip or --scorer" in message("--out", tmp_path)


def test_missing_data(tmp_path: Path, world: Path) -> None:
    out = ("--model", "shapes", "--out", tmp_path / "out")
    assert f"there is no folder {tmp_path / 'none'}" in message(*out, "--data", tmp_path / "none")
    (world / "clevr" / "captions" / "spatial.json").unlink()
    told = message(*out, "--data", world, "--tasks", "clevr")
    assert "task clevr needs" in told
    assert "captions/spatial.json (from the GDBench authors' CLEVR2 archive)" in told


def test_image_folder_missing(tmp_path: Path, world: Path) -> None:
    """A wrong image folder is told before anything is scored, not as thousands of failures."""
    (world / "flickr30k" / "images").rename(world / "flickr30k" / "pictures")
    told = message("--model", "shapes", "--out", tmp_path, "--data", world, "--tasks", "flickr30k")
    assert "task flickr30k needs its images, such as" in told
    assert "flickr30k/images/1000.jpg" in told


def test_model_folder(tmp_path: Path, world: Path) -> None:
    out = ("--out", tmp_path / "out", "--data", world)
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json" in message("--model", tmp_path / "empty", *out)
    assert "neither a folder nor a Hub id" in message("--model", "./nowhere", *out)
    assert "did you mean 'ViT-B-32'?" in message("--clip", "ViT-B32:openai", *out)


def test_report_only_without_a_run(tmp_path: Path) -> None:
    assert "holds no run; give the --out of one" in message("--report-only", "--out", tmp_path)


def test_an_out_that_another_run_holds(tmp_path: Path) -> None:
    """Nothing of it is touched. --report-only and --check need no lease."""
    with held(str(tmp_path)):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
        told = message("--model", "shapes", "--tasks", "clevr", "--scenes", 10, "--out", tmp_path)
        assert f"--out {tmp_path}: another run works on it" in told
        assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
        assert "holds no run" in message("--report-only", "--out", tmp_path)


def test_exit_code_and_one_line(tmp_path: Path) -> None:
    """The script prints the message without a traceback and exits with 2."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", "shapes", "--tasks", "clever", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "error: unknown task 'clever'; did you mean 'clevr'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_file(tmp_path: Path) -> None:
    """A YAML file fills the options, the command line wins, unknown keys are told with the near one."""
    file = tmp_path / "run.yaml"
    file.write_text("model: [shapes]\ntimesteps: 20\nseed: 3\n")
    config = parse(GdbenchConfig, ["--config", str(file), "--timesteps", "5"])
    assert (config.model, config.timesteps, config.seed) == (["shapes"], [5], 3)
    file.write_text(json.dumps({"timestep": 20}))
    with pytest.raises(InputError, match="unknown key 'timestep'; did you mean 'timesteps'"):
        parse(GdbenchConfig, ["--config", str(file)])


def test_models_are_looked_at_before_actors_start(
    tmp_path: Path, world: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that was cut off, and a LoRA of another model, each named with its file."""
    monkeypatch.setattr(session, "connect", lambda *_, **__: None)
    monkeypatch.setattr(session, "choose_pool", lambda *_: session.ActorPool(1, 1, 1.0, 0.0))
    monkeypatch.setattr(session, "is_elsewhere", lambda _: False)
    options = ("--data", world, "--tasks", "clevr", "--out", tmp_path / "out")
    add_lora(unet := load_denoiser(resolve("shapes")).unet, 2, 0)
    save_lora(lora_weights(unet), str(tmp_path / "lora"), 2)
    told = message("--model", sd_folder, "--lora", tmp_path / "lora", *options)
    assert told.startswith(f"--lora {tmp_path}/lora/pytorch_lora_weights.safetensors: the LoRA")
    assert "do not fit this U-Net" in told
    model = shutil.copytree(sd_folder, tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert f"{weights} is no whole safetensors file" in message("--model", model, *options)
