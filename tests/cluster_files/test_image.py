"""clusters/Dockerfile, read, and what it bakes: weights that are found without the Hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import COMMIT, serving
from tests.pipeline import ROOT

HF_TOKEN = "hf_" + "x" * 20
LOAD = """
from diffitm.models.loading import load_denoiser, resolve
source = resolve("org/tiny").fetched()
load_denoiser(source)
print(source.digest)
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """What a Dockerfile says, a line each: ('RUN', 'pip install ..')."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def image_problems(text: str) -> list[str]:
    """The names of what is wrong with the Dockerfile."""
    steps = instructions(text)
    kinds = [kind for kind, _ in steps]
    installs = [body for kind, body in steps if kind == "RUN" and "pip install" in body]
    bake = next((i for i, (_, body) in enumerate(steps) if "clusters/bake.py" in body), -1)
    kept = [body for kind, body in steps if kind in ("ARG", "ENV", "COPY", "ADD")]
    checks = {
        "pinned": all("-c constraints.txt" in body or "--no-deps" in body for body in installs),
        "autoscalers": all(f" {name}==" in str(installs) for name in ("boto3", "google-api-python-client")),
        "packages first": " . " not in str(steps[: steps.index(("RUN", installs[0]))]),
        "no secret": not re.search(r"(?i)token|secret|password", " ".join(kept))
        and steps[bake][1].startswith("--mount=type=secret,id=hf_token,uid=1000 "),
        "no root": "USER" not in kinds and "sudo" not in text,
        "without weights": all(("ARG", f'{name}=""') in steps[:bake] for name in ("MODELS", "CLIPS")),
        "offline": ("ENV", "HF_HUB_OFFLINE=${MODELS:+1}") in steps[bake:],
    }  # fmt: skip
    return [name for name, holds in checks.items() if not holds]


BROKEN: dict[str, Callable[[str], str]] = {
    "pinned": lambda text: text.replace("-c constraints.txt ", ""),
    "autoscalers": lambda text: text.replace("boto3==", "moto=="),
    "packages first": lambda text: text.replace(
        "pyproject.toml constraints.txt README.md LICENSE", "."
    ),
    "no secret": lambda text: text.replace('ARG CLIPS=""', 'ARG CLIPS=""\nARG HF_TOKEN'),
    "no root": lambda text: text + "USER root\n",
    "without weights": lambda text: text.replace('MODELS=""', 'MODELS="org/name"'),
    "offline": lambda text: text.replace("ENV", "LABEL"),
}


def test_image() -> None:
    assert image_problems((ROOT / "clusters" / "Dockerfile").read_text()) == []


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_image_is_seen(problem: str) -> None:
    text = (ROOT / "clusters" / "Dockerfile").read_text()
    assert problem in image_problems(BROKEN[problem](text))


@pytest.mark.slow
def test_baked_weights_need_no_hub(sd_folder: Path, tmp_path: Path) -> None:
    """The cache has all that a model is loaded from; the token that fetched it is not in there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {**kept, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    bake = [sys.executable, "clusters/bake.py", "--models", "org/tiny", "--clips", "--variant", ""]
    with serving(sd_folder) as hub:
        env["HF_ENDPOINT"] = hub.url
        fetching = env | {"HF_TOKEN": HF_TOKEN}
        done = subprocess.run(bake, cwd=ROOT, env=fetching, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Bearer {HF_TOKEN}" in hub.tokens
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if HF_TOKEN.encode() in path.read_bytes()]
    assert HF_TOKEN not in done.stdout + done.stderr
    load = [sys.executable, "-c", LOAD]
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(load, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{COMMIT}\n"), done.stderr
