"""Actors that outlive their nodes, and give up on the block that ends them time and again."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray

from diffitm.errors import InputError

RETRIES = 3
MOST = 20  # times that a thing may be begun, whatever ended it


class Attempts:
    """On which nodes each thing was begun without being done."""

    def __init__(self) -> None:
        self.begun: dict[str, list[str]] = {}

    def begin(self, what: str, node: str) -> str | None:
        """Why it must not be begun once more, if so."""
        nodes = self.begun.setdefault(what, [])
        nodes.append(node)
        if len(nodes) <= 1 + RETRIES:
            return None
        living = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
        if sum(each in living for each in nodes) > 1 + RETRIES:
            return f"ended its process {1 + RETRIES} times, for want of memory or by a crash"
        return f"was lost {MOST} times, with its process or its node" if len(nodes) > MOST else None

    def end(self, what: str) -> None:
        self.begun.pop(what, None)


class Bounded:
    """Passes blocks on to the actor that it makes of its class and arguments.

    Raises InputError where a block, or the start of the actor, has ended the process 1 + RETRIES
    times other than with its node, or was lost MOST times; `column` names a block's rows in it. Ray's
    own bounds cannot be used: the loss of a node takes it several seconds to see, and several retries.
    """

    def __init__(self, actor: type, arguments: tuple[Any, ...], attempts: Any, column: str) -> None:
        self.attempts, self.column = attempts, column
        self.node = ray.get_runtime_context().get_node_id()
        this = ray.get_runtime_context().get_actor_id()
        self._begin(this, "the start of an actor")
        self.actor = actor(*arguments)
        attempts.end.remote(this)

    def __call__(self, table: pa.Table) -> pa.Table:
        first = table[self.column][:1].to_pylist()
        what = f"{self.column} {first[0]} and the {len(table) - 1} after it" if first else "no row"
        self._begin(what, what)
        made = self.actor(table)
        self.attempts.end.remote(what)
        return made

    def _begin(self, key: str, what: str) -> None:
        why = ray.get(self.attempts.begin.remote(key, self.node))
        if why is not None:
            raise InputError(f"{what}: {why}")
