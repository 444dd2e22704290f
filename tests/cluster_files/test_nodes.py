"""What the launcher does on a node with each file: Ray's own updater, its commands noted and not run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.updater import NodeUpdater
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_provider import NodeProvider

from tests.cluster_files.test_files import IMAGE, LAUNCHER, load
from tests.pipeline import ROOT

SECRET = "0123456789abcdef"
SOCKET = "chown $USER /var/run/docker.sock"


class Node(NodeProvider):
    """A node that has just come up."""

    def external_ip(self, node_id: str) -> str:
        return "192.0.2.1"

    def node_tags(self, node_id: str) -> dict[str, str]:
        return {}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        pass

    def is_terminated(self, node_id: str) -> bool:
        return False


class Notes(list[str]):
    """In the place of subprocess: the commands, of ssh what it runs on the node."""

    DEVNULL = None

    def check_call(self, command: list[str], **_: Any) -> None:
        self.append(command[-1] if command[0] == "ssh" else " ".join(command))

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.check_call(command)
        return b'["HOME=/home/ray"]' if "Config.Env" in command[-1] else b"/home/ray"


def commands(config: dict[str, Any], kind: str) -> list[str]:
    """What runs on a 'head' or 'worker' node until Ray is up, in its order."""
    config, notes = prepare_config(config), Notes()
    setup = config["setup_commands"] + config[f"{kind}_setup_commands"]
    NodeUpdater(
        "node", config["provider"], Node({}, "diffitm"), config["auth"], "diffitm",
        config["file_mounts"], config["initialization_commands"], setup,
        config[f"{kind}_start_ray_commands"], "hash", "contents", kind == "head",
        process_runner=notes, docker_config=config["docker"],
    ).run()  # fmt: skip
    return notes


def at(notes: list[str], *parts: str) -> int:
    """The place of the first command that has all the parts."""
    return next(i for i, note in enumerate(notes) if all(part in note for part in parts))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launcher's home folder with a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    return tmp_path


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("name", LAUNCHER)
def test_a_node_comes_up(name: str, kind: str, home: Path) -> None:
    """The user may speak to Docker before it must; image and token arrive, and nothing is installed."""
    notes = commands(load(name), kind)
    first_that_must = next(
        i for i, note in enumerate(notes) if re.search(r"docker (?!inspect -f .*\|\| true)", note)
    )
    assert at(notes, SOCKET) == first_that_must
    assert "docker" in notes[at(notes, SOCKET) + 1]  # the registry's login
    run = at(notes, "docker run")
    assert at(notes, SOCKET) + 1 < at(notes, f"docker pull {IMAGE}") < run
    assert at(notes, "rsync", f"{home}/.ray/auth_token ") < run
    assert ":/home/ray/.ray/auth_token " in notes[run] and f" {IMAGE} " in notes[run]
    assert "--env RAY_AUTH_MODE=token" in notes[run]
    assert at(notes, "docker exec", "ray start") == len(notes) - 1
    assert not [note for note in notes if "pip" in note or SECRET in note]


def test_another_order_would_be_seen(home: Path) -> None:
    """Without the commands, Docker is asked before the user may speak to it, or an image is not had."""
    config = load("cluster.yaml")
    config["initialization_commands"].pop(0)
    with pytest.raises(StopIteration):
        at(commands(config, "head"), SOCKET)
    config = load("cluster.yaml")
    del config["setup_commands"]  # then come the launcher's own
    assert [note for note in commands(config, "worker") if "pip install" in note]


@pytest.mark.parametrize("name", LAUNCHER)
def test_without_an_image(name: str, home: Path) -> None:
    """The block of the docs in place of the image: Ray's images, and the checkout installed on each node."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    block = yaml.safe_load(re.search(r"```yaml\n(docker:.*?)```", text, re.S)[1])
    config = load(name)
    config["docker"].pop("image")
    config["docker"] |= block.pop("docker")
    config["file_mounts"] |= block.pop("file_mounts")
    config["initialization_commands"].pop()
    config |= block
    validate_config(prepare_config(config))
    notes = commands(config, "worker")
    run, install = at(notes, "docker run"), at(notes, "pip install")
    assert "rayproject/ray:2.60.0-py311-gpu" in notes[run] and "auth_token" in notes[run]
    assert "rayproject/ray:2.60.0-py311-cpu" in str(commands(config, "head"))
    assert "-c /tmp/build/constraints.txt /tmp/build boto3==" in notes[install]
    assert all((ROOT / place).is_dir() for place in config["file_mounts"].values() if place == ".")
    assert run < install < at(notes, "ray start")
