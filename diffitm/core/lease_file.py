"""A small file that one of several writers makes or replaces: by links and locks on a disk, by conditional
writes in S3 and Google's storage, and elsewhere by a second look."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs

from diffitm.core import storage
from diffitm.core.errors import InputError

SETTLES = (
    2.0  # seconds after which a store without conditional writes shows which writer was the last
)


class Content(NamedTuple):
    """What the file held, and what of it must still be true for a replacement."""

    data: bytes
    tag: Any


class LeaseFile(Protocol):
    """The file. Every method raises OSError or InputError where the place cannot be reached."""

    def read(self) -> Content | None:
        """None where there is none."""

    def create(self, data: bytes) -> bool:
        """Whether it was made, and not by another meanwhile."""

    def replace(self, data: bytes, found: Content) -> bool:
        """Whether it was replaced, and was still what was found."""

    def delete(self, found: Content) -> None:
        """Unless it is no more what was found, or gone."""


def open_file(uri: str) -> LeaseFile:
    """The file at a path or URI."""
    scheme, mark, _ = uri.partition("://")
    if not mark or scheme == "file":
        return OnDisk(Path(storage.filesystem(uri)[1]))
    if scheme in ("s3", "gs", "gcs"):
        store, path = _conditional(uri)
        return InStore(store, path, Plain(uri))
    return Plain(uri)


class OnDisk:
    """A file of a disk, shared ones too: a hard link is made by one alone, and who replaces or deletes
    the file holds its lock, so that it is never away in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Content | None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        return Content(data, data)

    def create(self, data: bytes) -> bool:
        part = self._part()
        part.write_bytes(data)
        try:
            os.link(part, self.path)
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        return True

    def replace(self, data: bytes, found: Content) -> bool:
        part = self._part()
        part.write_bytes(data)
        try:
            with self._locked(found) as locked:
                if locked is None:
                    return False
                part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        if not locked:
            time.sleep(SETTLES)
            now = self.read()
            return now is not None and now.data == data
        return True

    def delete(self, found: Content) -> None:
        with self._locked(found) as locked:
            if locked is not None:
                self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, found: Content) -> Iterator[bool | None]:
        """Whether the file could be locked, on a disk that knows no locks it could not; None where it
        is not what was found."""
        try:
            file = self.path.open("r+b")
        except FileNotFoundError:
            yield None
            return
        with file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                locked = False
            try:
                # Another may have put a new file there while this one waited for the old one's lock.
                is_there = os.path.samestat(os.fstat(file.fileno()), self.path.stat())
            except FileNotFoundError:
                is_there = False
            yield locked if is_there and file.read() == found.data else None

    def _part(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}")


class Plain:
    """A file of a store whose writes know no condition: the last writer has it, which a look a while
    later shows."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self) -> Content | None:
        try:
            data = storage.read_bytes(self.uri)
        except FileNotFoundError:
            return None
        return Content(data, data)

    def create(self, data: bytes) -> bool:
        storage.write_bytes(self.uri, data)
        time.sleep(SETTLES)
        now = self.read()
        return now is not None and now.data == data

    def replace(self, data: bytes, found: Content) -> bool:
        now = self.read()
        return now is not None and now.data == found.data and self.create(data)

    def delete(self, found: Content) -> None:
        now = self.read()
        if now is not None and now.data == found.data:
            storage.delete(self.uri)


class InStore:
    """A file of S3 or Google's storage, through obstore; through pyarrow, which reads more kinds of
    credentials, where that is refused."""

    def __init__(self, store: Any, path: str, plain: Plain) -> None:
        self.store, self.path, self.plain = store, path, plain

    def read(self) -> Content | None:
        from obstore.exceptions import BaseError, NotFoundError

        try:
            answer = self.store.get(self.path)
            return Content(bytes(answer.bytes()), answer.meta["e_tag"])
        except (FileNotFoundError, NotFoundError):
            return None
        except BaseError:
            return self.plain.read()

    def create(self, data: bytes) -> bool:
        return self._put(data, "create", None)

    def replace(self, data: bytes, found: Content) -> bool:
        if not isinstance(found.tag, str):  # pyarrow found it
            return self.plain.replace(data, found)
        return self._put(data, {"e_tag": found.tag}, found)

    def _put(self, data: bytes, mode: Any, found: Content | None) -> bool:
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        with contextlib.suppress(BaseError):
            if self._knows_conditions:
                try:
                    self.store.put(self.path, data, mode=mode)
                except (AlreadyExistsError, PreconditionError):
                    return False
                return True
        return self.plain.create(data) if found is None else self.plain.replace(data, found)

    @functools.cached_property
    def _knows_conditions(self) -> bool:
        """Whether the server refuses to make what is there: some take a conditional write and say nothing.
        Asked of a file beside, as a look after the write would come too early to see the last writer."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        beside = f"{self.path}.{secrets.token_hex(6)}"
        self.store.put(beside, b"asks for conditions", mode="create")
        try:
            self.store.put(beside, b"asks for conditions", mode="create")
        except (AlreadyExistsError, PreconditionError):
            return True
        finally:
            self.store.delete(beside)
        return False

    def delete(self, found: Content) -> None:
        self.plain.delete(found)


def _conditional(uri: str) -> tuple[Any, str]:
    """obstore's client of a bucket, and the path in it. Raises InputError for a wrong URI."""
    from obstore.store import GCSStore, S3Store

    storage.refuse_credentials(uri)
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    bucket, _, path = place.partition("/")
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    if scheme != "s3":
        return GCSStore(bucket), path
    config: dict[str, Any] = {}
    if region := options.get("region"):
        config["region"] = region
    if host := options.get("endpoint_override"):
        config["endpoint"] = f"{options.get('scheme', 'https')}://{host}"
    try:
        return S3Store(bucket, client_options={"allow_http": True}, **config), path
    except ValueError as error:
        raise InputError(f"cannot open {storage.without_query(uri)!r}: {error}") from error
