"""One run at a time in an OUT: a file that the run holds and renews, on a disk and in object stores."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.lease_file import LeaseFile, open_file

log = logging.getLogger("diffitm")
RENEWED = 15.0  # seconds between two renewals
EXPIRES = 75.0  # seconds without one after which the run that held it is taken for dead
LOOKS = 1.0  # seconds between two looks at another run's lease
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A run, as its lease tells it. `number` changes with each renewal; the time is for people."""

    id: str
    host: str
    machine: str  # its id, which containers of one machine share until it is booted again
    process: str  # number and start
    job: str | None
    time: str
    number: int = 0

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        number = self.process.partition(" ")[0]
        return f"{job}process {number} on {self.host}, last heard of at {self.time}"

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this machine and its process is gone."""
        here = bool(self.machine) and self.machine == _machine() and self.host == _host()
        return here and _process(int(self.process.partition(" ")[0])) != self.process

    def renewed(self) -> Holder:
        """The same run, now."""
        return Holder(**{**asdict(self), "time": _now(), "number": self.number + 1})


def myself() -> Holder:
    """This process as the holder of a lease."""
    job = None
    with contextlib.suppress(KeyError, ValueError, TypeError):
        job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    process = _process(os.getpid()) or str(os.getpid())
    return Holder(secrets.token_hex(8), _host(), _machine(), process, job, _now())


def _host() -> str:
    return socket.gethostname()


def _machine() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def _process(number: int) -> str | None:
    """A living process's number with the time of its start, which a later one of that number has not."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in "ZX" else f"{number} {stat[19]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def held(out: str, takeover: bool = False, is_file: bool = False) -> Iterator[None]:
    """Hold the lease of an OUT, which lies in the folder, or beside what `is_file`, while the block
    runs; `takeover` does not wait whether another run lives.

    Raises InputError where another run holds it or the place cannot be written to, and, in the main
    thread, when another one takes it over meanwhile.
    """
    uri = (
        f"{storage.without_query(out)}.lease{out[len(storage.without_query(out)) :]}"
        if is_file
        else None
    )
    lease = _Lease(open_file(uri or storage.join(out, "lease.json")), out, takeover)
    lease.take()
    lease.start()
    try:
        yield
    except KeyboardInterrupt:
        if lease.taken_by is None:
            raise
        text = f"was taken over by {lease.taken_by}; this run ends, and what it has written stays"
        raise InputError(f"{out}: {text}", "out") from None
    finally:
        lease.release()


@dataclass
class _Lease:
    file: LeaseFile
    out: str
    takeover: bool
    holder: Holder = field(default_factory=myself)
    taken_by: Holder | None = None

    def __post_init__(self) -> None:
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._renew_on, daemon=True)

    def take(self) -> None:
        """Raises InputError where another run lives, and where the place cannot be written to."""
        try:
            self._take()
        except OSError as error:
            raise InputError(
                f"{storage.without_query(self.out)}: cannot be written to: {error}", "out"
            ) from error

    def _take(self) -> None:
        while True:
            found = self.file.read()
            if found is None:
                if self.file.create(self._data()):
                    return
                continue
            other = _parse(found.data)
            if other is not None and not (self.takeover or other.is_dead):
                if self._lives(other):
                    raise InputError(
                        f"{self.out}: another run works on it ({other}). Wait for "
                        "its end, stop it, or give another --out; --takeover if you know that it died",
                        "out",
                    )
                log.info(
                    "%s was left by a run that died (%s)", storage.without_query(self.out), other
                )
            if self.file.replace(self._data(), found):
                return

    def _lives(self, other: Holder) -> bool:
        """Whether the holder renews its lease, or gives it back, within EXPIRES seconds."""
        if other.machine == _machine() and other.host == _host():
            return True  # is_dead knows
        text = "%s is held by another run (%s); waiting up to %.0f s to see whether it lives"
        log.info(text, storage.without_query(self.out), other, EXPIRES)
        end = time.monotonic() + EXPIRES
        while time.monotonic() < end:
            time.sleep(LOOKS)
            found = self.file.read()
            if found is None:
                return False
            now = _parse(found.data)
            if now is not None and now != other:
                return True
        return False

    def start(self) -> None:
        self.thread.start()

    def _renew_on(self) -> None:
        while not self.stopped.wait(RENEWED):
            try:
                self.renew()
            except (OSError, InputError) as error:
                log.debug("the lease of %s was not renewed: %s", self.out, error)
            if self.taken_by is not None:
                # A signal, because it ends what the main thread waits for.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def renew(self) -> None:
        """Write it anew, unless another run has it by now."""
        found = self.file.read()
        other = _parse(found.data) if found is not None else None
        if found is not None and other is not None and other.id != self.holder.id:
            self.taken_by = other
            return
        self.holder = self.holder.renewed()
        if found is None:
            self.file.create(self._data())
        else:
            self.file.replace(self._data(), found)

    def release(self) -> None:
        self.stopped.set()
        if self.thread.ident is not None:
            self.thread.join()
        with contextlib.suppress(OSError, InputError):
            found = self.file.read()
            other = _parse(found.data) if found is not None else None
            if found is not None and other is not None and other.id == self.holder.id:
                self.file.delete(found)

    def _data(self) -> bytes:
        return json.dumps(asdict(self.holder), indent=1).encode()


def _parse(data: bytes) -> Holder | None:
    """None for what is no lease, such as one that was cut off."""
    try:
        values: dict[str, Any] = json.loads(data)
        return Holder(**values)
    except (ValueError, TypeError):
        return None
