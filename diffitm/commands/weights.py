"""Weights of the Hub for all workers: the driver fetches them once, and mirrors them for other nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeVar

from diffitm.distributed import session
from diffitm.models.hub_weights import Weights


class HasWeights(Protocol):
    """A model's source, a dataclass."""

    @property
    def weights(self) -> Weights | None:
        """Files of the Hub, once they are fetched."""

    def fetched(self) -> Any:
        """The same with the weights on this machine."""


S = TypeVar("S", bound=HasWeights)


def share(source: S, work: str) -> S:
    """The source whose weights every worker finds: those of the Hub on this machine and, where there are
    others, in a mirror below `work`, a path or URI. To be called once Ray is there.

    Raises InputError for weights that cannot be had, Unavailable where the Hub does not answer.
    """
    fetched = source.fetched()
    if fetched.weights is not None and ("://" in work or session.other_nodes()):
        return replace(fetched, weights=fetched.weights.mirrored(work))
    return fetched
