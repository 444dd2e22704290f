"""The actor that Ray Data holds: builds a stage's worker on its node, and outlives what fails there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_cuda_error, is_transient
from diffitm.distributed import devices
from diffitm.distributed.attempts import RETRIES, SHORT, Place, Verdict

STARTS = 1 + RETRIES  # tries of an actor to build its worker
Worker = Callable[[pa.Table], pa.Table]


def here() -> Place:
    """Where this process runs."""
    context = ray.get_runtime_context()
    node = context.get_node_id()
    gpus = ", ".join(f"GPU {number}" for number in ray.get_gpu_ids())
    inside = f"{node[:8]}, {gpus}" if gpus else node[:8]
    return Place(node, f"node {ray.util.get_node_ip_address()} ({inside})")


class WorkerSpec(NamedTuple):
    """What the actors of a stage hold: `build` makes the worker on a device, `schema` is that of what
    the worker returns, `column` has the id of a row, `gpus` are those of an actor."""

    build: Callable[[str], Worker]
    schema: pa.Schema
    column: str
    gpus: float


def describe(table: pa.Table, column: str) -> str:
    """What people can know some rows by: the id of the first, and the images where a row has several."""
    first = table[column][0]
    if "images" in table.schema.names:
        images = table["images"][0].as_py()
        return f"block {first} of {len(images)} images from {images[0]} on"
    return f"{column} {first} and the {len(table) - 1} after it"


class StageActor:
    """Passes blocks on to the worker that it builds.

    What the user must mend ends the run: an InputError of a block, or one that every actor meets
    while it starts. What a node or something outside is to blame for costs no row: it is tried again
    after a while; a GPU that failed takes its process with it, as CUDA does not recover in one; a
    block that fails here time and again, and not elsewhere, comes back as no rows at all, which leaves
    it to the run's next round. `attempts` is a handle of Attempts, which knows of the other actors.
    """

    def __init__(self, spec: WorkerSpec, attempts: Any) -> None:
        self.spec, self.attempts = spec, attempts
        context = ray.get_runtime_context()
        self.place, self.actor = here(), context.get_actor_id()
        self.restarted = context.was_current_actor_reconstructed
        self.worker: Worker | None = None
        self.ending: Exception | None = (
            None  # raised by the first block: Ray replaces a failed start
        )
        verdict = self._ask("start", self.start)
        if verdict.why is not None:
            self.ending = InputError(verdict.why)
            return
        # Blocks wait for one that was restarted.
        time.sleep(min(verdict.delay, SHORT) if self.restarted else verdict.delay)
        self._build()

    @property
    def start(self) -> str:
        """Name of this actor's start."""
        return f"the start of actor {self.actor[:8]}"

    def _build(self) -> None:
        """Make the worker, if need be with several tries. Where they do not help, a new actor fails, so
        that Ray starts another, perhaps elsewhere; a restarted one, for which blocks wait, has none."""
        for number in range(STARTS):
            try:
                device = devices.actor_device(self.spec.gpus)
                devices.take_processors(self.spec.gpus)
                self.worker = self.spec.build(device)
            except Exception as error:
                verdict = self._fail(self.start, error)
                if self.ending is not None:
                    return
                time.sleep(verdict.delay)
                self._end_process_after(error)
                if verdict.leave or number == STARTS - 1:
                    if self.restarted:
                        return
                    raise
            else:
                self.attempts.load.remote(self.start, self.actor, self.place)
                return

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            return self._pass_on(table)
        except (InputError, Unavailable) as error:
            ray.get(self.attempts.give_up.remote(error))
            raise

    def _pass_on(self, table: pa.Table) -> pa.Table:
        """What the worker makes of a block."""
        if self.ending is not None:
            raise self.ending
        if len(table) == 0:
            return self.spec.schema.empty_table()
        what = describe(table, self.spec.column)
        while True:
            verdict = self._ask("begin", what)
            if verdict.why is not None:
                raise InputError(verdict.why)
            if self.worker is None and not verdict.leave:
                self._build()
            if self.ending is not None:
                raise self.ending
            if self.worker is None or verdict.leave:
                return self.spec.schema.empty_table()
            try:
                rows = self.worker(table)
            except Exception as error:
                if not (is_cuda_error(error) or is_transient(error)):
                    raise
                verdict = self._fail(what, error)
                if self.ending is not None:
                    raise self.ending from error
                time.sleep(verdict.delay)
                self._end_process_after(error)
                if verdict.leave:
                    return self.spec.schema.empty_table()
            else:
                self.attempts.end.remote(what, self.actor, self.place)
                return rows

    def _ask(self, method: str, what: str, *more: Any) -> Verdict:
        handle = getattr(self.attempts, method)
        return ray.get(handle.remote(what, self.actor, self.place, *more))

    def _fail(self, what: str, error: Exception) -> Verdict:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        transient, crash = is_transient(error), is_cuda_error(error)
        verdict = self._ask("fail", what, cause, transient, crash)
        if verdict.why is None:
            sys.stderr.write(f"{self.place.name}: {what} failed: {cause}\n")
        elif isinstance(error, InputError):
            self.ending = InputError(f"{error.message} (on {self.place.name})", error.field)
        else:
            self.ending = Unavailable(verdict.why) if transient or crash else error
        return verdict

    def _end_process_after(self, error: Exception) -> None:
        if is_cuda_error(error) and (self.restarted or self.worker is not None):
            sys.stderr.flush()
            os._exit(1)
        if is_cuda_error(error):
            raise error
