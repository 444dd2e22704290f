"""Files by path or URI (local, s3://, gs://, ...): pyarrow's file systems, fsspec where it has none."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from diffitm.errors import InputError


def absolute(uri: str) -> str:
    """The URI as it is, a local path made absolute."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


@functools.lru_cache(maxsize=256)  # to open an object store anew for every image is slow
def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that serves a URI, and the path within it.

    Raises InputError for a scheme that neither pyarrow nor fsspec knows.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), absolute(uri)
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        try:
            found, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"cannot open {uri!r}: {error}") from error
        return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def join(root: str, *parts: str) -> str:
    """Path or URI of something below `root`; a URI's query (an S3 endpoint, say) stays at its end."""
    path, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def public(uri: str) -> str:
    """The path or URI without the keys that it can hold (s3://KEY:SECRET@bucket)."""
    scheme, mark, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else uri


def bare(uri: str) -> str:
    """The path or URI without a URI's query."""
    return uri.partition("?")[0] if "://" in uri else uri


def parent(uri: str) -> str:
    """The folder that a path or URI lies in; a URI's query stays at its end."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return path.rstrip("/").rpartition("/")[0] + mark + query


def exists(uri: str) -> bool:
    found, path = filesystem(uri)
    return found.get_file_info(path).type != fs.FileType.NotFound


def stamp(root: str, names: list[str]) -> str | None:
    """What changes when any of the local files below `root` does: a digest of their sizes and times.

    None elsewhere, where it would take a request a file.
    """
    if "://" in root:
        return None
    total = hashlib.sha256()
    for name in names:
        try:
            found = os.stat(os.path.join(root, name))
            total.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
        except OSError:
            total.update(f"{name} -\n".encode())
    return total.hexdigest()


def _by_folder(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a file by its folder, so that it is kept open from one file to the next."""
    folder, _, name = uri.rpartition("/")
    if not folder.partition("://")[2] or "?" in uri:
        return filesystem(uri)
    found, path = filesystem(folder)
    return found, f"{path}/{name}"


def read_bytes(uri: str) -> bytes:
    """The file's content. Raises FileNotFoundError or another OSError."""
    found, path = _by_folder(uri)
    with found.open_input_stream(path, compression=None) as stream:
        return stream.read()


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Bytes of a file from a place on. Raises OSError."""
    found, path = _by_folder(uri)
    with found.open_input_file(path) as file:
        return file.read_at(size, offset)


def read_text(uri: str) -> str:
    return read_bytes(uri).decode("utf-8-sig")


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all: beside it, synced and renamed; an object store's put is atomic."""
    found, path = filesystem(uri)
    if not isinstance(found, fs.LocalFileSystem):
        with found.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode())


@contextmanager
def replacing(uri: str) -> Iterator[Any]:
    """A stream of bytes that becomes the file when it is whole."""
    found, path = filesystem(uri)
    part = f"{path}.part"
    with found.open_output_stream(part, compression=None, buffer_size=2**20) as sink:
        yield sink
    found.move(part, path)


def make_folder(uri: str) -> None:
    found, path = filesystem(uri)
    found.create_dir(path, recursive=True)


def files(uri: str, suffix: str = "", recursive: bool = False) -> list[str]:
    """Sorted paths (in the file system's own form) of the files in a folder; empty if there is none."""
    found, path = filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    infos = found.get_file_info(selector)
    return sorted(i.path for i in infos if i.type == fs.FileType.File and i.path.endswith(suffix))


def readable_parquet(uri: str) -> tuple[list[str], list[str]]:
    """The Parquet files in a folder that are whole, and those that a kill left cut off."""
    found, _ = filesystem(uri)
    whole, broken = [], []
    for path in files(uri, ".parquet"):
        try:
            with found.open_input_file(path) as stream:
                parquet.read_metadata(stream)
            whole.append(path)
        except (pa.ArrowInvalid, OSError):
            broken.append(path)
    return whole, broken
