"""The actor pool leaves processors for the readers, whatever the cluster is."""

from __future__ import annotations

import pytest

from diffitm.distributed import session
from diffitm.errors import InputError

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


def test_falling_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 16})
    with pytest.raises(InputError, match="--actors 4, --max-actors 2"):
        session.choose_pool(4, 2, None, None)
