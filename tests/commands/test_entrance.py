"""Folders that the nodes of a cluster do not share are refused before a run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffitm.commands import entrance
from diffitm.commands.entrance import check_shared
from diffitm.core.errors import InputError
from diffitm.distributed import session


class Nodes:
    """The cluster beside this node: what each of them finds at a path."""

    def __init__(self, **look: Callable[[str], object]) -> None:
        self.look = look

    def other_nodes(self) -> dict[str, str]:
        return {f"id of {name}": name for name in self.look}

    def ask_nodes(self, nodes: dict[str, str], function: object, path: str) -> dict[str, object]:
        assert list(nodes.values()) == list(self.look)
        return {name: look(path) for name, look in self.look.items()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the other nodes, and whether this process is a job's driver."""

    def join(job: bool = False, **look: Callable[[str], object]) -> None:
        nodes = Nodes(**look)
        monkeypatch.setattr(session, "other_nodes", nodes.other_nodes)
        monkeypatch.setattr(session, "ask_nodes", nodes.ask_nodes)
        if job:
            monkeypatch.setenv(entrance.JOB, "{}")

    return join


def absent(path: str) -> None:
    """A node with a disk of its own."""


def empty(path: str) -> list[str]:
    """A node with a folder of that name."""
    return []


def test_this_machine_alone(cluster: Callable[..., None], tmp_path: Path) -> None:
    cluster()
    check_shared([("--out", str(tmp_path / "out")), ("--data", "s3://bucket/data")], writable=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [absent, empty])
def test_a_folder_that_one_node_does_not_see(
    cluster: Callable[..., None], tmp_path: Path, other: Callable[[str], object]
) -> None:
    """Although it has one of that name; nothing is left behind."""
    cluster(near=entrance.look, far=other)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=rf"^--out {out}: node far does not see it; give a URI"):
        check_shared([("--out", str(out))], writable=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_all_nodes_see(cluster: Callable[..., None], tmp_path: Path) -> None:
    cluster(job=True, near=entrance.look, far=entrance.look)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text("[]")
    check_shared([("--data", str(tmp_path / "data")), ("--lora", f"{tmp_path}/data/a.json")])
    check_shared([("--out", str(tmp_path / "out"))], writable=True)


def test_a_file_of_another_size(cluster: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_text("old")
    cluster(far=lambda path: 4)
    with pytest.raises(InputError, match=r"^--lora .*node far does not see it"):
        check_shared([("--lora", str(tmp_path / "lora.bin"))])


def test_a_job_alone(
    cluster: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other node shows that the folder is shared: what the mounts say of it counts."""
    cluster(job=True)
    with pytest.raises(InputError, match="is a disk of this job's own node; give a URI"):
        check_shared([("--data", str(tmp_path))])
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none / ext4 rw 0 0\nfs-1 {tmp_path} nfs4 rw 0 0\nx {tmp_path}/b ext4 r 0 0")
    monkeypatch.setattr(entrance, "MOUNTS", mounts)
    check_shared([("--data", f"{tmp_path}/a")])
    with pytest.raises(InputError, match="own node"):
        check_shared([("--data", f"{tmp_path}/b/c")])


def test_the_package_of_a_job(cluster: Callable[..., None]) -> None:
    cluster(job=True, far=entrance.look)
    path = "/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1/out/gdbench"
    with pytest.raises(InputError, match=f"^--out {path}: lies in the package of this job"):
        check_shared([("--out", path)], writable=True)
