"""Fixtures that several test files share: data folders, and tiny models built once a session."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Else the first ray.init of this process turns token mode on for all that follow, of which the pipelines that
# join a test's cluster know nothing. Pipelines themselves run with Ray's default.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import pytest
import torch

from diffitm.datasets.client import Client
from diffitm.models.folder import Folder
from diffitm.models.stable_diffusion import StableDiffusion
from tests import tiny
from tests.loopback import Server

# A shell's background jobs ignore it, and with them what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the authors' own files, which are not part of this repository."""
    folder = SHARED / "data" / "published"
    if not folder.is_dir():
        pytest.skip("the authors' published files are not on this machine (../shared)")
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the published code computed on data/golden_model."""
    with np.load(DATA / "scores.npz") as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="session")
def golden_texts() -> list[str]:
    """The golden captions, then the empty text."""
    return [*json.loads((DATA / "captions.json").read_text()), ""]


@pytest.fixture(scope="session")
def golden_sd() -> StableDiffusion:
    return StableDiffusion(Folder(str(DATA / "golden_model")))


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion in the diffusers layout; do not write into it."""
    return tiny.write_sd(tmp_path_factory.mktemp("sd") / "tiny")


@pytest.fixture(scope="session")
def sd(sd_folder: Path) -> StableDiffusion:
    """The tiny model loaded; do not change it."""
    return StableDiffusion(Folder(str(sd_folder)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors: threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture
def server() -> Iterator[Server]:
    """The server of tests/loopback.py, answering until the test ends."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def client() -> Client:
    """A client that may reach loopback."""
    return Client(allow_private=True)
