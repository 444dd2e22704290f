"""One Ray for the commands of a file, which run in the tests' process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module", autouse=True)
def _ray_ends() -> Iterator[None]:
    """Ray is started by the first command; the next file's tests may want another."""
    yield
    ray.shutdown()
