"""Rows of WebDataset shards: images stay in their tar files and are read from there by place."""

from __future__ import annotations

import fnmatch
import json
import re
import tarfile
from collections.abc import Iterator

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import member_of
from diffitm.training.rows import LISTS, TrainingRow

IMAGES = ("jpg", "jpeg", "png", "webp")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
Sample = dict[str, str]  # ending -> the reference of an image, else content


def is_webdataset(uri: str) -> bool:
    """Whether a path, glob or range of shards ({0000..0009}) is meant."""
    return storage.without_query(uri).endswith(".tar")


def shards(uri: str) -> list[str]:
    """The shards that a path, a glob in the last part or one range stands for, sorted.

    Raises InputError if there is none or one is missing.
    """
    found = RANGE.search(uri)
    if found is not None:
        if "/" in uri[found.end() :]:
            raise InputError(f"{uri}: a range of shards must be in the file's name", "data")
        first, last = found.groups()
        names = [
            f"{uri[: found.start()]}{number:0{len(first)}}{uri[found.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
    elif set(storage.without_query(uri)) & set("*?["):
        folder, pattern = storage.parent(uri), storage.without_query(uri).rpartition("/")[2]
        known = (path.rpartition("/")[2] for path in storage.files(folder, ".tar"))
        names = [storage.join(folder, name) for name in fnmatch.filter(known, pattern)]
    else:
        names = [uri]
    missing = [name for name in names if not storage.exists(name)]
    if missing or not names:
        raise InputError(f": there is no shard {missing[0] if missing else uri}", "data")
    return names


def read_shards(uri: str) -> list[TrainingRow]:
    """A row for each sample: its image (.jpg, .jpeg, .png, .webp), its caption (.txt, or `caption` of
    its .json) and, of the .json, negative_captions and the keys in negative_images.

    Raises InputError that names shard, sample and what is right.
    """
    samples: dict[tuple[str, str], Sample] = {}
    for shard in shards(uri):
        for key, ending, value in members(shard):
            sample = samples.setdefault((shard, key), {})
            if ending in sample:
                raise InputError(f"{shard}: sample {key} has two of {ending}")
            sample[ending] = value
    if not samples:
        raise InputError(f"{uri}: the shards hold no sample")
    return [_row(shard, key, samples) for shard, key in samples]


def members(shard: str, texts: bool = True) -> Iterator[tuple[str, str, str]]:
    """(key, ending, reference of an image or content) of a shard's members; without `texts` images alone.

    Raises InputError, after what comes before, where the shard cannot be read, or a text is not UTF-8.
    """
    found, path = storage.filesystem(shard)
    name = storage.without_query(shard).rpartition("/")[2]
    wanted = (*IMAGES, "txt", "json") if texts else IMAGES
    try:
        with (
            found.open_input_stream(path, compression=None, buffer_size=2**20) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                folder, _, last = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = last.partition(".")
                ending = ending.lower()
                if not member.isreg() or ending not in wanted:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if ending in IMAGES:
                    yield key, "image", member_of(name, member.offset_data, member.size)
                else:
                    data = archive.extractfile(member)
                    yield key, ending, _decoded(data.read() if data else b"", shard, member.name)
            end = archive.offset
        # tarfile takes a broken header for the end, which is a block of zeros.
        if storage.read_range(shard, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it breaks off at byte {end:,}")
    except (tarfile.TarError, OSError) as error:
        where = shard
        if isinstance(error, OSError):
            raise InputError(f"{where}: cannot be read: {error}") from error
        raise InputError(f"{where}: is no whole, uncompressed tar: {error}") from error


def _decoded(content: bytes, shard: str, member: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"{shard}: {member}"
        raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start:,}") from error


def _row(shard: str, key: str, samples: dict[tuple[str, str], Sample]) -> TrainingRow:
    where, sample = f"{shard}: sample {key}", samples[shard, key]
    try:
        known = json.loads(sample.get("json", "{}"))
    except ValueError as error:
        raise InputError(f"{where}: .json cannot be read: {error}") from error
    known = known if isinstance(known, dict) else {}
    caption = sample.get("txt", known.get("caption") or "")
    lists = [known.get(name) or [] for name in LISTS]
    for name, value in zip(LISTS, lists, strict=True):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{where}: expects a list of texts in {name}, found {str(value)[:80]}")
    if not isinstance(caption, str):
        raise InputError(f"{where}: expects a text in caption, found {str(caption)[:80]}")
    others = tuple(_image_of(other, shard, samples, where) for other in lists[1])
    return TrainingRow(sample.get("image", ""), caption.strip(), tuple(lists[0]), others)


def _image_of(key: str, shard: str, samples: dict[tuple[str, str], Sample], where: str) -> str:
    """The image of a sample of this shard or, if one alone has the key, of another."""
    found = samples.get((shard, key)) or {}
    if "image" not in found:
        others = [sample for (_, other), sample in samples.items() if other == key]
        found = others[0] if len(others) == 1 else {}
    if "image" not in found:
        raise InputError(f"{where}: negative_images names {key}, which is no sample with an image")
    return str(found["image"])
