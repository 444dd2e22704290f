"""Samples of WebDataset shards: images stay in their tar files and are read from there by place."""

from __future__ import annotations

import fnmatch
import logging
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Self

from diffitm.captions.row import CaptionRow, Reading
from diffitm.captions.sample import TEXTS, sample_row
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import is_image, is_litter, member_of

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
PADDING = 2**20  # bytes of zeros at an archive's end: some writers fill up larger records
log = logging.getLogger("diffitm")


class _Header(tarfile.TarInfo):
    """A member's header. What is none is an error behind zeros too, where tarfile looks on for one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"it breaks off at byte {archive.offset:,}") from None


class Member(NamedTuple):
    """A file of a sample: its last ending, and the reference of an image or the content of a text that is
    wanted."""

    ending: str
    value: str | bytes | None


def is_webdataset(uri: str) -> bool:
    """Whether a path, glob or range of shards ({0000..0009}) is meant."""
    return storage.without_query(uri).lower().endswith(".tar")


def shards(uri: str, field: str = "data") -> list[str]:
    """The shards that a path, a glob in the last part or one range stands for, sorted.

    Raises InputError if there is none or one is missing.
    """
    found = RANGE.search(uri)
    if found is not None:
        if "/" in uri[found.end() :]:
            raise InputError(f"{uri}: a range of shards must be in the file's name", field)
        first, last = found.groups()
        names = [
            f"{uri[: found.start()]}{number:0{len(first)}}{uri[found.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
    elif set(storage.without_query(uri)) & set("*?["):
        folder, pattern = storage.parent(uri), storage.without_query(uri).rpartition("/")[2]
        known = (path.rpartition("/")[2] for path in storage.files(folder))
        kept = (name for name in known if is_webdataset(name) and not is_litter(name))
        names = [storage.join(folder, name) for name in fnmatch.filter(kept, pattern)]
    else:
        names = [uri]
    missing = [name for name in names if not storage.exists(name)]
    if missing or not names:
        raise InputError(f": there is no shard {missing[0] if missing else uri}", field)
    return names


def read_shards(names: list[str], reading: Reading) -> Iterator[CaptionRow]:
    """The rows of several shards, see read_shard; negative images are those of the samples that a .json
    names, of the same shard or of the one other that has such a sample."""
    rows = ((shard, key, row) for shard in names for key, row in _keyed(shard, reading))
    placed = (
        (shard, key, row._replace(place=f"{storage.name(shard)}, {row.place}"))
        for shard, key, row in rows
    )
    if not reading.negatives:
        yield from (row for _, _, row in placed)
        return
    known = list(placed)
    images = {(shard, key): row.image for shard, key, row in known if row.failure is None}
    shards_of: dict[str, list[str]] = {}
    for shard, key in images:
        shards_of.setdefault(key, []).append(shard)
    for shard, _, row in known:
        others = list[str]()
        for key in row.negative_images:
            where = [shard] if (shard, key) in images else shards_of.get(key, [])
            if len(where) != 1:
                failure = f"negative_images names {key}, which is no sample with an image"
                row = row._replace(failure=row.failure or failure)
            others += [images[where[0], key]] if len(where) == 1 else []
        yield row._replace(negative_images=tuple(others))


def read_shard(shard: str, reading: Reading) -> Iterator[CaptionRow]:
    """A row a sample: its image, its text (.txt, else `caption` of its .json) and, of the .json,
    negative_captions and, as keys of samples, negative_images.

    A sample is all members of one name up to its first dot. Where that holds other images with texts, or
    none that is named KEY.jpg alone, the name up to its last dot is a sample's. Without texts of their
    own each image is a row. A shard that breaks off ends with a failure. Raises InputError for one that
    cannot be read now: another time it might give more.
    """
    yield from (row for _, row in _keyed(shard, reading))


def _keyed(shard: str, reading: Reading) -> Iterator[tuple[str, CaptionRow]]:
    """The rows of a shard with the names of their samples."""
    keys: dict[str, dict[str, list[Member]]] = {}
    broken = None
    with_texts = reading.texts is None or reading.columns.source is not None
    try:
        for key, stem, member in read_members(shard, with_texts):
            keys.setdefault(key, {}).setdefault(stem, []).append(member)
    except tarfile.TarError as error:
        broken = f"it is no whole, uncompressed tar: {error}"
    except OSError as error:
        raise InputError(f"{shard}: cannot be read: {error}") from error
    fields = list[str]()
    for key, stems in keys.items():
        samples = dict(_samples(key, stems))
        for name, members in samples.items():
            yield from ((name, row) for row in _rows(f"sample {name}", members, reading))
        fields += [s for s in stems if s not in samples and any(map(_is_picture, stems[s]))]
    if fields:
        text = "%s: left out %s images that are fields of other samples, such as %s"
        log.warning(text, shard, f"{len(fields):,}", fields[0])
    if broken is not None:
        yield "", CaptionRow(f"behind {len(keys):,} samples", failure=broken)


def _samples(key: str, stems: dict[str, list[Member]]) -> Iterator[tuple[str, list[Member]]]:
    """The samples that the members of a key are, by name."""
    own = stems.get(key, [])
    found = {stem: [m.ending in TEXTS for m in m_s] for stem, m_s in stems.items()}
    pictured = [stem for stem, members in stems.items() if any(map(_is_picture, members))]
    if key in pictured:
        pictured = [stem for stem in pictured if stem == key or any(found[stem])]
    elif len(pictured) == 1 and not any(found[pictured[0]]):
        # KEY.rgb.jpg with KEY.txt.
        yield pictured[0], [*stems[pictured[0]], *own]
        return
    for stem in pictured:
        yield stem, stems[stem]
    if not pictured or (key not in pictured and any(found.get(key, []))):
        yield key, [member for stem in stems if stem not in pictured for member in stems[stem]]


def _is_picture(member: Member) -> bool:
    return is_image(f"x.{member.ending}")


def _rows(place: str, members: list[Member], reading: Reading) -> Iterator[CaptionRow]:
    pictures = [member for member in members if _is_picture(member)]
    texts = {ending: [m.value for m in members if m.ending == ending] for ending in TEXTS}
    if not pictures:
        there = ", ".join(f".{member.ending}" for member in members)
        yield CaptionRow(place, failure=f"it has no image, only {there}")
    elif reading.texts is not None:
        for picture in pictures:
            yield sample_row(reading, place, str(picture.value), None, _first(texts["json"]))
    elif len(pictures) > 1:
        endings = " and ".join(f".{picture.ending}" for picture in pictures)
        failure = f"it has {len(pictures)} images: {endings}"
        yield CaptionRow(place, str(pictures[0].value), failure=failure)
    elif twice := [ending for ending, values in texts.items() if len(values) > 1]:
        yield CaptionRow(place, str(pictures[0].value), failure=f"it has two .{twice[0]}")
    else:
        contents = (_first(texts[ending]) for ending in TEXTS)
        yield sample_row(reading, place, str(pictures[0].value), *contents)


def _first(values: list[str | bytes | None]) -> bytes | None:
    return values[0] if values and isinstance(values[0], bytes) else None


def read_members(shard: str, texts: bool) -> Iterator[tuple[str, str, Member]]:
    """(name up to the first dot, up to the last, member) of a shard's members, those of archives that
    were written one behind the other too.

    Raises tarfile.TarError in the end for zeros that may stand where members were.
    """
    found, path = storage.filesystem(shard)
    name = storage.name(shard)
    linked, begin, next_one, holes = 0, 0, 0, list[str]()
    with (
        found.open_input_stream(path, compression=None, buffer_size=2**20) as stream,
        tarfile.open(
            fileobj=stream,
            mode="r|",
            errors="backslashreplace",
            ignore_zeros=True,
            tarinfo=_Header,
        ) as archive,
    ):
        for member in archive:
            # Between members there may also be a header for all that follow.
            if member.offset > next_one and _are_zeros(shard, next_one):
                if not _is_end(next_one - begin, member.offset - begin):
                    holes.append(f"{next_one:,} to {member.offset:,}")
                begin = member.offset
            next_one = archive.offset
            place = member.name.removeprefix("./")
            if not member.isreg() or is_litter(place):
                linked += not (member.isreg() or member.isdir())
                continue
            folder, _, last = place.rpartition("/")
            stem, dot, ending = last.rpartition(".")
            stem, ending = (stem, ending.lower()) if dot else (last, "")
            value: str | bytes | None = None
            if is_image(f"x.{ending}"):
                value = member_of(name, member.offset_data, member.size)
            elif texts and ending in TEXTS:
                data = archive.extractfile(member)
                value = data.read() if data else b""
            key, start = stem.partition(".")[0], f"{folder}/" if folder else ""
            yield start + key, start + stem, Member(ending, value)
        end = archive.offset
    if linked:
        log.warning("%s: left out %s members that are links or devices", shard, f"{linked:,}")
    if end == next_one or not _are_zeros(shard, end):
        raise tarfile.ReadError(f"it breaks off at byte {end:,}")
    if end - next_one > (PADDING if next_one else RECORD):
        holes.append(f"{next_one:,} to {end:,}")
    elif not next_one:
        log.warning("%s: it is an empty archive", shard)
    if holes:
        raise tarfile.ReadError(f"it has zeros where members may have been, bytes {holes[0]}")


def _are_zeros(shard: str, start: int) -> bool:
    return not storage.read_range(shard, start, BLOCK).strip(b"\0")


def _is_end(start: int, end: int) -> bool:
    """Whether zeros between two members are the end of an archive behind which another one begins: two
    blocks, or as many as fill up a record."""
    size = end - start
    return size == 2 * BLOCK or (end % RECORD == 0 and 2 * BLOCK <= size < RECORD + 2 * BLOCK)
