"""Which errors another try may mend, and how often it is tried."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from urllib3.exceptions import ProtocolError

from diffitm.core import outside
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_cuda_error, is_outside, is_transient, patiently


def answered(status: int) -> Exception:
    error = ProtocolError("no")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient", "away"),
    [
        (ConnectionResetError("x"), True, True),
        (TimeoutError("x"), True, True),
        (Unavailable("x"), True, True),
        (OSError(errno.EIO, "x"), True, True),
        (OSError(errno.ENOSPC, "x"), False, False),
        (OSError("not an image"), False, False),
        (FileNotFoundError(errno.ENOENT, "x"), False, False),
        (PermissionError(errno.EACCES, "x"), False, False),
        (OSError("AWS Error SLOW_DOWN during GetObject"), True, True),
        (OSError("google::cloud::Status(UNAVAILABLE)"), True, True),
        (OSError("AWS Error ACCESS_DENIED during GetObject"), False, True),
        (answered(503), True, True),
        (answered(404), False, False),
        (ProtocolError("no answer"), True, True),
        (ValueError("AWS Error"), False, False),
        (InputError("x"), False, False),
        (caused(ValueError("x"), ConnectionError("y")), True, True),
        (caused(ValueError("x"), KeyError("y")), False, False),
    ],
)
def test_who_is_to_blame(error: Exception, transient: bool, away: bool) -> None:
    """The file and its reader, or the network, a disk or a server; refused keys are outside, too."""
    assert (is_transient(error), is_outside(error)) == (transient, away)


def test_errors_of_a_gpu() -> None:
    assert is_cuda_error(RuntimeError("CUDA error: an illegal memory access"))
    assert is_cuda_error(caused(ValueError("x"), RuntimeError("NCCL error")))
    assert not is_cuda_error(RuntimeError("CUDA error: out of memory"))
    assert not is_cuda_error(RuntimeError("shapes differ"))
    assert not is_cuda_error(ValueError("CUDA error"))


def test_tries_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it goes well, at most once more than there are waits; own errors are raised at once."""
    waits, calls = list[float](), list[Exception | str]()
    monkeypatch.setattr(outside, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(outside, "DELAYS", (1.0, 2.0))

    def call() -> str:
        value = calls.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    calls[:] = [ConnectionError("x"), "good"]
    assert (patiently(call), waits) == ("good", [1.0])
    calls[:], waits[:] = [ConnectionError("x")] * 2 + ["good"], []
    assert (patiently(call), waits) == ("good", [1.0, 2.0])
    calls[:], waits[:] = [ConnectionError("x")] * 3, []
    with pytest.raises(ConnectionError):
        patiently(call)
    assert (calls, waits) == ([], [1.0, 2.0])
    calls[:], waits[:] = [ValueError("own"), "good"], []
    with pytest.raises(ValueError, match="own"):
        patiently(call)
    assert (calls, waits) == (["good"], [])
