"""The actor pool leaves processors for the readers, whatever the cluster is."""

from __future__ import annotations

import socket

import pytest
import ray
from ray.exceptions import AuthenticationError

from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed import session

# cluster resources, (actors, max_actors, cpus, gpus) asked for -> (actors, cpus, gpus)
CASES = [
    ({"CPU": 4}, (None, None, None, None), (2, 1.0, 0.0)),
    ({"CPU": 2}, (None, None, None, None), (1, 0.0, 0.0)),
    ({"CPU": 3}, (None, 2, None, None), (1, 0.5, 0.0)),
    ({"CPU": 8, "GPU": 8}, (None, None, None, None), (8, 0.75, 1.0)),
    ({"CPU": 64, "GPU": 4}, (None, None, None, None), (4, 1.0, 1.0)),
    ({"CPU": 64, "GPU": 4}, (None, None, 2.0, 0.5), (8, 2.0, 0.5)),
    ({"CPU": 16}, (3, 5, 2.0, None), (3, 2.0, 0.0)),
]


@pytest.mark.parametrize(("resources", "asked", "expected"), CASES)
def test_defaults(
    monkeypatch: pytest.MonkeyPatch, resources: dict, asked: tuple, expected: tuple
) -> None:
    """Actors together leave at least two processors free, or take none of a tiny cluster."""
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: resources)
    pool = session.choose_pool(*asked)
    assert (pool.min_actors, pool.cpus, pool.gpus) == expected
    assert pool.max_actors * pool.cpus <= max(0, resources["CPU"] - session.SPARE_CPUS)


@pytest.mark.parametrize(
    "asked", [(3, None, 1.0, None), (3, None, None, None), (1, None, 2.5, 0.0)]
)
def test_refused(monkeypatch: pytest.MonkeyPatch, asked: tuple) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 4})
    with pytest.raises(InputError, match="leaves none for the readers"):
        session.choose_pool(*asked)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [((8, None, None, 1.0), (8, 0.25, 1.0)), ((8, None, None, 0.0), (8, 1.0, 0.0))],
)
def test_a_cluster_that_can_grow(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: tuple,
    expected: tuple,
) -> None:
    """Its head has room for no actor: what is asked for stays, so that nodes come up, with a warning."""
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 4})
    with pytest.raises(InputError, match="--actors 8"):
        session.choose_pool(*asked)
    monkeypatch.setattr(session, "_joined", True)
    pool = session.choose_pool(*asked)
    assert (pool.min_actors, pool.cpus, pool.gpus) == expected
    assert "--actors 8" in caplog.text
    assert "unless the cluster grows" in caplog.text


def test_falling_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 16})
    with pytest.raises(InputError, match="--actors 4, --max-actors 2"):
        session.choose_pool(4, 2, None, None)


def test_no_cluster_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is none, where nothing listens, or that wants a token: the error says which."""
    monkeypatch.setattr(session, "_joined", False)
    monkeypatch.setattr(session, "PATIENCE", 0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=rf"--ray {closed}: .*refused.*ray start --head"):
        session.connect(closed)
    with pytest.raises(InputError, match=r"--ray nonsense: .*Invalid address.*host:port"):
        session.connect("nonsense")

    with pytest.raises(InputError, match=r"--ray here:70000: .*port 70000 is above 65535"):
        session.connect("here:70000")

    def init(**_: object) -> None:
        raise ConnectionError("failed to connect") from AuthenticationError(
            "RPC: the token is missing"
        )

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: .*token is missing.*RAY_AUTH_TOKEN"):
        session.connect(None)


def test_a_head_that_is_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    heads = []
    monkeypatch.setattr(
        session.time, "sleep", lambda _: heads.append(socket.create_server(("127.0.0.1", port)))
    )
    session._await(f"127.0.0.1:{port}")
    (head,) = heads
    head.close()


def test_a_ray_that_does_not_start_in_time_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ..")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Unavailable, match="the machine is too busy"):
        session.connect(None)
