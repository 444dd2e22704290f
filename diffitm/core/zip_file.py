"""Files inside of a zip, read in place by its list of contents, which is read once."""

from __future__ import annotations

import functools
import struct
import zipfile
import zlib

from diffitm.core import storage

LOCAL = struct.Struct(
    "<4s22xHH"
)  # of a local header: its mark, lengths of the name and of what follows
MARK = b"PK\x03\x04"
ENCRYPTED = 1  # a flag


def zip_member(uri: str, name: str) -> bytes:
    """The content of a file in a zip; one range of the archive is read.

    Raises FileNotFoundError for a name that is not in it, OSError or ValueError for what cannot be read.
    """
    known = zip_members(uri)
    if name not in known:
        raise FileNotFoundError(f"the archive has no {name}")
    member = known[name]
    if member.flag_bits & ENCRYPTED:
        raise ValueError("it is encrypted in its archive")
    head = storage.read_range(uri, member.header_offset, LOCAL.size)
    if len(head) < LOCAL.size or not head.startswith(MARK):
        raise ValueError("the archive is cut off or was changed")
    _, name_size, extra_size = LOCAL.unpack(head)
    start = member.header_offset + LOCAL.size + name_size + extra_size
    data = _content(member, storage.read_range(uri, start, member.compress_size))
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise ValueError("it is spoilt in its archive")
    return data


def _content(member: zipfile.ZipInfo, data: bytes) -> bytes:
    if member.compress_type == zipfile.ZIP_STORED:
        return data
    if member.compress_type == zipfile.ZIP_DEFLATED:
        try:
            # No more than it says: a small member may unpack to any size.
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
        except zlib.error as error:
            raise ValueError(f"it is spoilt in its archive: {error}") from error
    raise ValueError("its archive is neither stored nor deflated")


def zip_members(uri: str) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by name. Raises OSError or ValueError."""
    return _members(uri, storage.stamp(storage.parent(uri), [storage.name(uri)]))


@functools.lru_cache(maxsize=16)
def _members(uri: str, stamp: str | None) -> dict[str, zipfile.ZipInfo]:
    """`stamp` changes with the file, where it is known."""
    found, path = storage.filesystem(uri)
    try:
        with found.open_input_file(path) as stream, zipfile.ZipFile(stream) as archive:
            return {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{storage.name(uri)} is no whole zip: {error}") from error
