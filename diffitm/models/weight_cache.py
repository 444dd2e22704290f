"""What each machine keeps of models: one copy of what it has loaded of an object store, by its content."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint

log = logging.getLogger("diffitm")
Listed = Mapping[str, tuple[int, int]]  # a file's path in its folder -> size and time


def cache_folder() -> Path:
    """DIFFITM_CACHE, else diffitm/ in XDG_CACHE_HOME or ~/.cache. Nothing in it is ever deleted."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFITM_CACHE") or Path(above, "diffitm")) / "models"


def content_digest(paths: Sequence[Path]) -> str:
    """sha256 over the contents of files."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def on_disk(
    uri: str, listed: Listed, digest_of: Callable[[Path], str], digest: str | None = None
) -> tuple[Path, str]:
    """A local folder with these files of the folder `uri`, and the digest of its content.

    `digest_of` takes that of a local folder. A copy that is known by the files' sizes and times, or by
    the `digest` that is asked for, is not fetched again.

    Raises InputError if the files have another digest, or cannot be fetched.
    """
    cache = cache_folder()
    names = fingerprint(sorted(listed))[:8]
    note = cache / fingerprint([storage.without_query(uri), sorted(listed.items())])[:32]
    with alone(cache, note.name):
        known = digest or (note.read_text() if note.exists() else None)
        if known is not None and (cache / f"{known}-{names}").is_dir():
            return cache / f"{known}-{names}", known
        with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as part:
            _fetch(uri, listed, Path(part, "copy"))
            found = digest_of(Path(part, "copy"))
            if digest is not None and found != digest:
                raise InputError(f"{storage.without_query(uri)} changed while the run was going on")
            kept = cache / f"{found}-{names}"
            try:
                Path(part, "copy").rename(kept)
            except OSError:
                if not kept.is_dir():  # else another URI has the same content
                    raise
        note.write_text(found)
    return cache / f"{found}-{names}", found


@contextmanager
def alone(cache: Path, name: str) -> Iterator[None]:
    """One process of the machine at a time."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(uri: str, listed: Listed, to: Path) -> None:
    size = sum(bytes_ for bytes_, _ in listed.values())
    log.info("%s: fetching %.1f MB to %s", storage.without_query(uri), size / 1e6, cache_folder())
    for name in listed:
        if ".." in name.split("/"):
            raise InputError(
                f"{storage.without_query(uri)}: the name {name!r} leads out of the folder"
            )
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(storage.join(uri, name), str(to / name))
        except OSError as error:
            raise InputError(
                f"{storage.without_query(uri)}: {name} cannot be fetched: {error}"
            ) from error
