"""Files by path or URI (local, s3://, gs://, ...): pyarrow's file systems, fsspec where it has none."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs, parquet

from diffitm.core.errors import InputError

STORES = ("s3", "gs", "gcs", "abfs", "abfss")
# A busy server may be silent for longer than the 3 seconds that pyarrow waits. A folder that is there
# is not made again, for which the rights may be lacking.
PATIENT = {
    "request_timeout": 60.0,
    "connect_timeout": 10.0,
    "check_directory_existence_before_creation": True,
}
AT_ONCE = 16  # requests
_KEY = re.compile(r"[?&]\w*(secret|token|password|key)\w*=", re.IGNORECASE)


def absolute(uri: str) -> str:
    """The URI as it is, a local path made absolute."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that serves a URI, and the path within it.

    Names in an object store are taken as they are, without %-decoding; its client is kept open.
    Raises InputError for a scheme that neither pyarrow nor fsspec knows, for a wrong URI, and for a path
    that is not UTF-8, which pyarrow takes none of.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:
        told = uri.encode("utf-8", "backslashreplace").decode()
        raise InputError(f"{told}: this path is not UTF-8; rename it") from None
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return fs.LocalFileSystem(), absolute(uri)
    refuse_credentials(uri)
    if scheme not in STORES:
        return _open(uri)
    path, query, options = rest.partition("?")
    bucket, _, name = path.partition("/")
    if not bucket:
        raise InputError(f"{uri}: names no bucket; {scheme}://BUCKET/PATH is right")
    found, top = _open(f"{scheme}://{bucket}{query}{options}")
    return found, f"{top}/{name}".strip("/")


@functools.lru_cache(maxsize=256)
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        found, path = fs.FileSystem.from_uri(uri)
        if isinstance(found, fs.S3FileSystem):
            found = _s3(uri, found.region)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError) as error:
        if uri.startswith(tuple(f"{scheme}:" for scheme in STORES)):
            raise InputError(f"cannot open {uri!r}: {error}") from error
        return _through_fsspec(uri)
    return found, path


def _s3(uri: str, region: str) -> fs.S3FileSystem:
    """The client that a URI's query describes, with PATIENT; its endpoint may be the environment's."""
    options: dict[str, Any] = dict(parse_qsl(urlsplit(uri).query))
    options |= {k: v == "true" for k, v in options.items() if k.startswith("allow_")}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        **{"endpoint_override": endpoint, "region": region, **options, **PATIENT}
    )


def _through_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
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


def has_credentials(uri: str) -> bool:
    """Whether a URI holds a password or key (s3://KEY:SECRET@bucket, ?client_secret=..)."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return False
    host = rest.partition("/")[0]
    # A secret key may hold a slash that should have been written as %2F; a bucket has no port.
    is_store = scheme.rpartition(":")[2] in STORES and ":" in host
    told = rest.partition("?")[0] if is_store else host
    return ":" in told.rpartition("@")[0] or _KEY.search(uri) is not None


def refuse_credentials(uri: str) -> None:
    """Raises InputError for a URI that holds a password or key: they would reach logs and results."""
    if has_credentials(uri):
        scheme = uri.partition("://")[0]
        raise InputError(
            f"a {scheme}:// URI holds credentials: give them by the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_KEY) or by the "
            "machine's role, and the URI without them"
        )


def without_query(uri: str) -> str:
    """The path or URI without a URI's query."""
    return uri.partition("?")[0] if "://" in uri else uri


def parent(uri: str) -> str:
    """The folder that a path or URI lies in; a URI's query stays at its end."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return path.rstrip("/").rpartition("/")[0] + mark + query


def name(uri: str) -> str:
    """The last part of a path or URI."""
    return without_query(uri).rstrip("/").rpartition("/")[2]


def below(uri: str, root: str) -> str:
    """The way from `root` to a path or URI below it; another one as it is."""
    start = f"{without_query(root).rstrip('/')}/"
    return without_query(uri).removeprefix(start) if without_query(uri).startswith(start) else uri


def exists(uri: str) -> bool:
    """Whether there is a file or folder. Raises InputError if the place cannot be looked at."""
    found, path = filesystem(uri)
    try:
        return found.get_file_info(path).type != fs.FileType.NotFound
    except OSError as error:
        raise InputError(f"{uri} cannot be looked at: {error}") from error


def is_file(uri: str) -> bool:
    """Whether there is a file, not a folder. Raises OSError."""
    found, path = filesystem(uri)
    return bool(found.get_file_info(path).type == fs.FileType.File)


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


def versions(uris: list[str]) -> list[tuple[int, int]]:
    """Size and time of each file, by one request a file."""
    found = []
    for uri in uris:
        where, path = _by_folder(uri)
        info = where.get_file_info(path)
        found.append((int(info.size or 0), int(info.mtime_ns or 0)))
    return found


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
    with found.open_input_file(path) as file:  # of an object store in one request
        return file.read()


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Bytes of a file from a place on. Raises OSError."""
    found, path = _by_folder(uri)
    with found.open_input_file(path) as file:
        return file.read_at(size, offset)


def read_text(uri: str) -> str:
    return read_bytes(uri).decode("utf-8-sig")


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all: beside it, synced and renamed; an object store's put is atomic.

    Raises InputError if an object store refuses it, OSError on a disk.
    """
    found, path = filesystem(uri)
    if not isinstance(found, fs.LocalFileSystem):
        try:
            with found.open_output_stream(path, compression=None) as stream:
                stream.write(data)
        except OSError as error:
            raise InputError(f"{uri} cannot be written: {error}") from error
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
    """Make a folder where folders are made; in an object store a name with slashes is enough."""
    found, path = filesystem(uri)
    if not isinstance(found, fs.S3FileSystem | fs.GcsFileSystem):
        found.create_dir(path, recursive=True)


def files(uri: str, suffix: str = "", recursive: bool = False) -> list[str]:
    """Sorted paths (in the file system's own form) of the files in a folder; empty if there is none.

    Raises InputError if the place cannot be looked at.
    """
    return sorted(info.path for info in _listed(uri, recursive) if info.path.endswith(suffix))


def tree(uri: str) -> tuple[list[str], list[str]]:
    """Sorted paths, as files() gives them, of the files in a folder and below, and of what else a local
    one has: links that lead nowhere, pipes, devices."""
    others = list[str]()
    found = [info.path for info in _listed(uri, True, others)]
    return sorted(found), sorted(others)


def folders(uri: str) -> list[str]:
    """Sorted names of the folders in a folder; none if there is no such folder.

    Raises InputError if the place cannot be looked at.
    """
    found, path = filesystem(uri)
    try:
        infos = found.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise InputError(f"{uri} cannot be looked at: {error}") from error
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def sizes(uri: str, recursive: bool = False) -> dict[str, tuple[int, int]]:
    """The files below a folder by their path from there: size and time of each, from one listing.

    Raises InputError if the place cannot be looked at.
    """
    start = f"{filesystem(uri)[1].rstrip('/')}/"
    return {i.path.removeprefix(start): (i.size, i.mtime_ns) for i in _listed(uri, recursive)}


class _Listed(NamedTuple):
    path: str
    size: int
    mtime_ns: int


def _listed(uri: str, recursive: bool, others: list[str] | None = None) -> list[_Listed]:
    found, path = filesystem(uri)
    try:
        if recursive and isinstance(found, fs.LocalFileSystem):
            return _walked(path, others)
        infos = found.get_file_info(
            fs.FileSelector(path, allow_not_found=True, recursive=recursive)
        )
    except OSError as error:
        raise InputError(f"{uri} cannot be looked at: {error}") from error
    try:
        return [
            _Listed(info.path, int(info.size or 0), int(info.mtime_ns or 0))
            for info in infos
            if info.type == fs.FileType.File
        ]
    except UnicodeDecodeError:  # a local name that is not UTF-8
        return _walked(path, others, deep=False)


def _walked(top: str, others: list[str] | None = None, deep: bool = True) -> list[_Listed]:
    """The files in a local folder and, if `deep`, below. A link to a folder that it lies in is not followed;
    what is neither is put into `others`."""
    found = list[_Listed]()

    def look(folder: str, above: frozenset[tuple[int, int]]) -> None:
        about = os.stat(folder)
        place = (about.st_dev, about.st_ino)
        if place in above:
            return
        with os.scandir(folder) as scan:
            for entry in scan:
                kind = _kind(entry)
                if kind == fs.FileType.Directory and not deep:
                    continue
                if kind == fs.FileType.Directory:
                    look(entry.path, above | {place})
                elif kind == fs.FileType.File:
                    with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                        about = entry.stat()
                        found.append(_Listed(entry.path, about.st_size, about.st_mtime_ns))
                elif others is not None:
                    others.append(entry.path)

    if os.path.isdir(top):
        look(top.rstrip("/") or "/", frozenset())
    return found


def _kind(entry: os.DirEntry[str]) -> fs.FileType:
    try:
        if entry.is_dir():
            return fs.FileType.Directory
        return fs.FileType.File if entry.is_file() else fs.FileType.Unknown
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself
            return fs.FileType.Unknown
        raise


def download(uri: str, to: str) -> None:
    """Copy a file to a local path, whose folder is there. Raises OSError."""
    found, path = filesystem(uri)
    fs.copy_files(path, to, source_filesystem=found, destination_filesystem=fs.LocalFileSystem())


def upload(path: str, uri: str) -> None:
    """Copy a local file. Raises OSError."""
    found, to = filesystem(uri)
    make_folder(parent(uri))
    fs.copy_files(path, to, source_filesystem=fs.LocalFileSystem(), destination_filesystem=found)


def delete(uri: str) -> None:
    """Delete a file."""
    found, path = filesystem(uri)
    found.delete_file(path)


def delete_files(uri: str, names: Iterable[str]) -> None:
    """Delete files of a folder, many at once; one that is not there is passed over."""
    found, path = filesystem(uri)

    def delete_one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            found.delete_file(f"{path}/{name}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(delete_one, names))


def delete_folder(uri: str) -> None:
    """Delete a folder with all that is in it, if there is one."""
    found, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        found.delete_dir(path)


def footers(uri: str, names: Iterable[str]) -> dict[str, parquet.FileMetaData]:
    """What the Parquet files of these names in a folder hold, in order; those that a kill cut off are left
    out.

    Raises OSError if an object store does not give a file.
    """
    found, folder = filesystem(uri)
    spoilt: tuple[type[Exception], ...] = (pa.ArrowInvalid, FileNotFoundError)
    if isinstance(found, fs.LocalFileSystem):
        spoilt = (pa.ArrowInvalid, OSError)

    def read(name: str) -> parquet.FileMetaData | None:
        try:
            with found.open_input_file(f"{folder}/{name}") as stream:
                return parquet.read_metadata(stream)
        except spoilt:
            return None

    asked = list(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(read, asked))
    return {name: a for name, a in zip(asked, answers, strict=True) if a is not None}


def readable_parquet(uri: str) -> tuple[list[str], list[str]]:
    """The Parquet files in a folder that are whole, and those that a kill left cut off.

    Raises OSError if an object store does not give a file.
    """
    paths = files(uri, ".parquet")
    whole = footers(uri, [path.rsplit("/", 1)[-1] for path in paths])
    return (
        [path for path in paths if path.rsplit("/", 1)[-1] in whole],
        [path for path in paths if path.rsplit("/", 1)[-1] not in whole],
    )
