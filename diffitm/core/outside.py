"""Which errors come from outside of a run: the network, an object store, the Hub, a GPU."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from diffitm.core.errors import Unavailable

T = TypeVar("T")
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try of a request
# What a file itself is to blame for, on a disk or in an object store.
OWN = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
OWN_NUMBERS = {
    *(errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EFBIG, errno.EILSEQ),
}
# How pyarrow's clients of object stores put refusals that another try would not change.
OWN_WORDS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH")
STORES = ("AWS ERROR", "GOOGLE::CLOUD", "CURL")
BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP
# torch's AcceleratorError begins with the first; memory is another matter (scoring/batching.py).
CUDA = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error", "CUDA driver")
MEMORY = ("out of memory", "ALLOC_FAILED")


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        yield at
        at = at.__cause__ or at.__context__


def is_transient(error: BaseException) -> bool:
    """Whether the network or a server is to blame, so that the same request may do later."""
    return any(_is_transient(cause) for cause in causes(error))


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, Unavailable | ConnectionError | TimeoutError):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in BUSY
    if type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "urllib3",
        "requests",
        "aiohttp",
    ):
        return True  # no answer at all
    if not isinstance(error, OSError) or isinstance(error, OWN) or error.errno in OWN_NUMBERS:
        return False
    # Of a disk only a number says that the system failed; pyarrow's clients give words alone.
    refused = any(word in str(error).upper() for word in OWN_WORDS)
    return error.errno is not None or (_is_of_a_store(error) and not refused)


def is_outside(error: BaseException) -> bool:
    """Whether the network, a disk or a server is to blame and not the file that was asked for; refused
    keys count, as they may have run out."""
    return is_transient(error) or _is_of_a_store(error)


def _is_of_a_store(error: BaseException) -> bool:
    words = str(error).upper()
    return isinstance(error, OSError) and any(word in words for word in STORES)


def is_cuda_error(error: BaseException) -> bool:
    """Whether a GPU failed, other than for want of memory: its process is of no use any more."""
    return any(
        isinstance(cause, RuntimeError)
        and any(word in str(cause) for word in CUDA)
        and not any(word in str(cause) for word in MEMORY)
        for cause in causes(error)
    )


def patiently(call: Callable[[], T]) -> T:
    """What the call returns; tried again after a while where the network or a server is to blame."""
    for delay in DELAYS:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(delay)
    return call()
