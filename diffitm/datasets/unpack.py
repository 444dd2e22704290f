"""From a published file to the layout that the readers expect: fetched unless it is there and whole,
archives unpacked member by member, none of which may lead out of the data root."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any

from diffitm.core import storage
from diffitm.datasets.client import Client
from diffitm.datasets.download import digests, save
from diffitm.datasets.network import BrokenError, RefusedError
from diffitm.datasets.recipe import Download, Rule

MEMBERS = 500_000
STATE = ".prepare"  # below the data root: manifest, lists of members, downloads under way
SPARE = 2**28  # bytes of disk that unpacking leaves free
BY_HAND = "found in place"  # what the manifest says of a file that the user put there
Opener = Callable[[], IO[bytes]]


class UnsafeError(Exception):
    """An archive is broken or holds what must not be unpacked: names the archive and the member."""


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: name, declared size in bytes, how to open it."""

    name: str
    size: int
    open: Opener


def unpack(
    archive: Path,
    root: Path,
    rules: tuple[Rule, ...],
    most: int,
    ours: Mapping[str, int] = MappingProxyType({}),
    members: int = MEMBERS,
) -> dict[str, int]:
    """Unpack the members that a rule names; {path below `root`: size in bytes} of all of them.

    A member that is there with its size is left alone, so an interrupted run goes on; a file of
    another size is replaced only if `ours` (path -> size) says that it came from here before.
    `most` bounds the bytes of the whole archive and `members` their number. Raises UnsafeError.
    """
    done: dict[str, int] = {}
    total = count = 0
    try:
        for member in _members(archive, root, most):
            count, total = count + 1, total + member.size
            if count > members:
                raise UnsafeError(f"{archive.name}: more than {members:,} members")
            if total > most:
                raise UnsafeError(f"{archive.name}: unpacks to more than {most:,} bytes")
            to = target(member.name, rules)
            if to is None:
                continue
            if to in done:
                raise UnsafeError(f"{archive.name}: two members would become {to}")
            check_free(root / to, member.size, ours.get(to))
            _write(member, root / to, archive)
            done[to] = member.size
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
    ) as bad:
        raise UnsafeError(f"{archive.name}: the archive is broken: {bad}") from bad
    if not done:
        raise UnsafeError(f"{archive.name}: holds none of the files that are wanted")
    return done


def _members(archive: Path, root: Path, most: int) -> Iterator[Member]:
    if archive.suffix == ".zip":
        yield from _zip(archive, root, most)
    else:
        yield from _tar(archive, root)


def _zip(archive: Path, root: Path, most: int) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        declared = sum(info.file_size for info in infos)
        if declared > most:
            raise UnsafeError(f"{archive.name}: declares {declared:,} bytes, more than {most:,}")
        if declared + SPARE > shutil.disk_usage(root).free:
            raise UnsafeError(f"{archive.name}: no space left on device for {declared:,} bytes")
        for info in infos:
            _check_name(info.filename, archive)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnsafeError(f"{archive.name}: {info.filename!r} is a link or a device")
            if info.flag_bits & 1:
                raise UnsafeError(f"{archive.name}: {info.filename!r} is encrypted")
            if not info.is_dir():
                yield Member(info.filename, info.file_size, lambda info=info: file.open(info))  # type: ignore[misc]


def _tar(archive: Path, root: Path) -> Iterator[Member]:
    with tarfile.open(archive, "r|*") as file:
        for info in file:
            _check_name(info.name, archive)
            try:
                tarfile.data_filter(info, str(root))
            except tarfile.FilterError as error:
                raise UnsafeError(f"{archive.name}: {error}") from error
            if not (info.isreg() or info.isdir()):
                raise UnsafeError(f"{archive.name}: {info.name!r} is a link or a device")
            if info.isreg():
                yield Member(info.name, info.size, lambda info=info: _content(file, info))  # type: ignore[misc]


def _content(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = file.extractfile(info)
    assert found is not None  # only regular files come here
    return found


def _check_name(name: str, archive: Path) -> None:
    """Raises UnsafeError for a name that leads, or could lead, out of the folder."""
    parts = PurePosixPath(name).parts
    drive = re.match(r"[A-Za-z]:", name)
    if not name or name.startswith("/") or drive or ".." in parts or "\\" in name or "\0" in name:
        raise UnsafeError(f"{archive.name}: member {name!r} has an unsafe name")


def target(name: str, rules: tuple[Rule, ...]) -> str | None:
    """Where a member or Hub file goes below the root; None for what is not wanted."""
    if "__MACOSX" in PurePosixPath(name).parts:
        return None
    for rule in rules:
        found = re.fullmatch(rule.pattern, name)
        if found:
            return found.expand(rule.to)
    return None


def check_free(to: Path, size: int, ours: int | None) -> None:
    """Raises UnsafeError if a file of another size is there that did not come from here."""
    if to.is_file() and to.stat().st_size not in (size, ours):
        text = f"{to} is there with {to.stat().st_size:,} bytes instead of {size:,}"
        raise UnsafeError(f"{text}: move it away to fetch the published one")


def _write(member: Member, to: Path, archive: Path) -> None:
    """Write a member beside its place and rename it; the declared size must be the real one."""
    if to.is_file() and not to.is_symlink() and to.stat().st_size == member.size:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    part, written = to.with_name(f".{to.name}.part"), 0
    try:
        with member.open() as source, part.open("wb") as file:
            while chunk := source.read(2**20):
                written += len(chunk)
                if written > member.size:
                    break
                file.write(chunk)
        if written != member.size:
            text = (
                f"{archive.name}: {member.name!r} is not of the {member.size:,} bytes it declares"
            )
            raise UnsafeError(text)
        os.replace(part, to)
    finally:
        part.unlink(missing_ok=True)


def place(client: Client, step: Download, root: Path, keep: bool = False) -> str:
    """Bring a file, or what is in an archive, to its place; what was done, in words.

    `keep` leaves the archive beside what came out of it; one that the user put there always stays.
    Raises RefusedError, BrokenError or UnsafeError with the reason.
    """
    if step.rules and (count := unpacked(step.to, root)):
        return f"there already, {count:,} files"
    to = root / step.to
    how = "there already" if whole(step, root) else _fetch(client, step, root)
    if not step.rules:
        return how
    members = unpack(to, root, step.rules, step.unpacked, placed(step.to, root))
    note_members(step.to, root, members)
    note = read_note(step.to, root)
    if not keep and note and note["url"] != BY_HAND:
        to.unlink()
    return f"{how}, {len(members):,} files unpacked"


def unpacked(name: str, root: Path) -> int:
    """How many members an archive has if all are in their places with their sizes, else 0."""
    members = placed(name, root)
    try:
        there = all((root / path).stat().st_size == size for path, size in members.items())
    except OSError:
        return 0
    return len(members) if there else 0


def placed(name: str, root: Path) -> dict[str, int]:
    """Files that came out of an archive or a Hub repository before, with sizes in bytes."""
    try:
        return dict(json.loads(_members_file(name, root).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def brought(step: Download, root: Path) -> bool:
    """Whether nothing of an archive passed through here: its files, if any, are the user's own."""
    archive = root / step.to
    begun = archive.exists() or archive.with_name(archive.name + ".part").exists()
    return bool(step.rules) and not begun and not _members_file(step.to, root).exists()


def whole(step: Download, root: Path) -> bool:
    """Whether the file is there and is the one that was fetched, or the published one.

    Raises RefusedError for a file that the user put there, or changed, and that is not the published.
    """
    path = root / step.to
    if not path.is_file():
        return False
    noted = read_note(step.to, root)
    kind, _, wanted = (step.checksum or "").partition(":")
    sums = digests(path, kind)
    if noted is not None:
        if noted["sha256"] == sums["sha256"]:
            return True
        raise RefusedError(f"{path} changed since it came: move it away to fetch it again")
    size = path.stat().st_size
    if (step.checksum and sums[kind] != wanted) or (step.size is not None and step.size != size):
        text = f"{path} is not the published file (its {kind} is {sums[kind]}, not {wanted})"
        raise RefusedError(f"{text}: move it away to fetch the published one")
    note = {"url": BY_HAND, "size": size, "sha256": sums["sha256"]}
    write_note(step.to, root, note)
    return True


def _fetch(client: Client, step: Download, root: Path) -> str:
    """Download from the first address that answers well."""
    reasons = []
    for url in step.urls:
        try:
            note = save(client, url, root / step.to, step.size, step.checksum, step.most)
        except (RefusedError, BrokenError) as error:
            reasons.append(f"{url}: {error}")
            continue
        write_note(step.to, root, note)
        return f"{note['size']:,} bytes fetched"
    raise RefusedError("; ".join(reasons))


def note_members(name: str, root: Path, members: dict[str, int]) -> None:
    """Record which files came out of an archive or a Hub repository, with sizes in bytes."""
    storage.write_text(str(_members_file(name, root)), json.dumps(members))


def _state(kind: str, name: str, root: Path) -> Path:
    return root / STATE / kind / (name.replace("/", "__") + ".json")


def _members_file(name: str, root: Path) -> Path:
    return _state("members", name, root)


def read_note(name: str, root: Path) -> dict[str, Any] | None:
    """What the manifest says of a file: url, size in bytes, sha256. None if it has no entry."""
    try:
        note = json.loads(_state("manifest", name, root).read_text())
        return note if {"size", "sha256"} <= note.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def write_note(name: str, root: Path, note: dict[str, Any]) -> None:
    storage.write_text(str(_state("manifest", name, root)), json.dumps(note, indent=1))
