"""Archives: what they may hold, and where it goes."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffitm.commands import prepare
from diffitm.datasets.client import Client
from diffitm.datasets.network import RefusedError
from diffitm.datasets.recipe import DatasetRecipe, Download, Need, Rule
from diffitm.datasets.unpack import (
    SPARE,
    UnsafeError,
    note_members,
    place,
    read_note,
    target,
    unpack,
    unpacked,
    write_note,
)
from tests.loopback import (
    CONTENT,
    Handler,
    Server,
    tarred,
    zipped,
)

ALL = (Rule(r"(?:.*/)?([^/]+\.jpg)", r"out/\1"),)


def test_unpack_maps_and_skips(tmp_path: Path) -> None:
    members = {"top/images/a.jpg": b"a", "top/b.mat": b"no", "__MACOSX/top/._a.jpg": b"no"}
    made = zipped(tmp_path / "a.zip", members)
    assert unpack(made, tmp_path, ALL, 100) == {"out/a.jpg": 1}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jpg"]
    info = tarfile.TarInfo("images/b.jpg")
    assert unpack(tarred(tmp_path / "b.tar.gz", (info, b"bb")), tmp_path, ALL, 100) == {
        "out/b.jpg": 2
    }
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"bb"


def test_unpack_goes_on(tmp_path: Path) -> None:
    """A member that is whole is left alone, one of ours of another size is written again, and
    somebody else's is not touched."""
    made = zipped(tmp_path / "a.zip", {"a.jpg": b"aaaa", "b.jpg": b"bbbb"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").write_bytes(b"kept")
    (tmp_path / "out" / "b.jpg").write_bytes(b"b")
    with pytest.raises(UnsafeError, match=r"b\.jpg is there with 1 bytes instead of 4: move"):
        unpack(made, tmp_path, ALL, 100)
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"b"
    unpack(made, tmp_path, ALL, 100, {"out/b.jpg": 1})
    assert (tmp_path / "out" / "a.jpg").read_bytes() == b"kept"
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"bbbb"


def test_a_link_in_the_place_of_a_member_is_replaced(tmp_path: Path) -> None:
    """However large what it leads to is; that file stays as it is."""
    made = zipped(tmp_path / "a.zip", {"a.jpg": b"aaaa"})
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").symlink_to(other)
    assert unpack(made, tmp_path, ALL, 100) == {"out/a.jpg": 4}
    assert not (tmp_path / "out" / "a.jpg").is_symlink()
    assert ((tmp_path / "out" / "a.jpg").read_bytes(), other.read_bytes()) == (b"aaaa", b"mine")


def test_limits_are_met_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many members, bytes and as much disk as allowed, and one less."""
    members = {"a.jpg": b"aaaa", "b.jpg": b"bb"}
    for made in (
        zipped(tmp_path / "a.zip", members),
        tarred(tmp_path / "a.tar.gz", *((tarfile.TarInfo(name), c) for name, c in members.items())),
    ):
        assert unpack(made, tmp_path, ALL, 6, members=2) == {"out/a.jpg": 4, "out/b.jpg": 2}
        with pytest.raises(UnsafeError, match="more than 1 members"):
            unpack(made, tmp_path, ALL, 6, members=1)
        with pytest.raises(UnsafeError, match="more than 5"):
            unpack(made, tmp_path, ALL, 5)
    for spare, fits in ((0, True), (-1, False)):
        usage = SimpleNamespace(free=6 + SPARE + spare)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if fits:
            unpack(tmp_path / "a.zip", tmp_path, ALL, 6)
            continue
        with pytest.raises(UnsafeError, match="no space left on device for 6 bytes"):
            unpack(tmp_path / "a.zip", tmp_path, ALL, 6)


def test_the_first_rule_that_matches_a_whole_name_places_it() -> None:
    rules = (Rule(r"a/(.*)\.jpg", r"one/\1.jpg"), Rule(r".*\.jpg", "two.jpg"))
    assert target("a/x.jpg", rules) == "one/x.jpg"
    assert target("b/x.jpg", rules) == "two.jpg"
    assert target("a/x.jpg.txt", rules) is None
    assert target("__MACOSX/a/x.jpg", rules) is None


def test_notes_that_say_too_little_are_none(tmp_path: Path) -> None:
    """What is read of a manifest has a size and a digest; of members, all must be there."""
    write_note("d/f", tmp_path, {"url": "u", "size": 1, "sha256": "0"})
    assert read_note("d/f", tmp_path) == {"url": "u", "size": 1, "sha256": "0"}
    write_note("d/f", tmp_path, {"url": "u", "size": 1})
    assert read_note("d/f", tmp_path) is None
    assert read_note("d/g", tmp_path) is None
    (tmp_path / "a").write_bytes(b"12")
    note_members("x.zip", tmp_path, {"a": 2})
    assert unpacked("x.zip", tmp_path) == 1
    note_members("x.zip", tmp_path, {"a": 3})
    assert unpacked("x.zip", tmp_path) == 0


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:evil.jpg", "C:/evil.jpg"],
)
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UnsafeError, match=r"a\.zip: member .*evil\.jpg' has an unsafe name"):
        unpack(zipped(tmp_path / "a.zip", {"good.jpg": b"1", name: b"2"}), root, ALL, 100)
    info = tarfile.TarInfo(name)
    with pytest.raises(UnsafeError, match=r"a\.tar\.gz: member .*evil\.jpg' has an unsafe name"):
        unpack(tarred(tmp_path / "a.tar.gz", (info, b"2")), root, ALL, 100)
    assert not list(tmp_path.rglob("evil.jpg"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", ["good.jpg", "/etc/passwd", "../../x"])
def test_links_and_devices_in_tar(tmp_path: Path, kind: bytes, target: str) -> None:
    info = tarfile.TarInfo("link.jpg")
    info.type, info.linkname = kind, target
    made = tarred(tmp_path / "a.tar.gz", (tarfile.TarInfo("good.jpg"), b"1"), (info, b""))
    with pytest.raises(UnsafeError, match=r"^a\.tar\.gz: .*link\.jpg"):
        unpack(made, tmp_path, ALL, 100)
    assert not (tmp_path / "out" / "link.jpg").exists()


def test_link_in_zip(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeError, match=r"'link\.jpg' is a link"):
        unpack(tmp_path / "a.zip", tmp_path, ALL, 100)


def test_bombs(tmp_path: Path) -> None:
    """Declared sizes are checked before a byte is written, skipped members count too."""
    bomb = zipped(tmp_path / "a.zip", {"a.jpg": bytes(5_000_000)})
    with pytest.raises(UnsafeError, match="declares 5,000,000 bytes, more than 1,000,000"):
        unpack(bomb, tmp_path, ALL, 1_000_000)
    info = tarfile.TarInfo("skipped.bin")
    with pytest.raises(UnsafeError, match="unpacks to more than 1,000,000"):
        unpack(tarred(tmp_path / "a.tar.gz", (info, bytes(5_000_000))), tmp_path, ALL, 1_000_000)
    many = zipped(tmp_path / "b.zip", {f"{i}.jpg": b"1" for i in range(12)})
    with pytest.raises(UnsafeError, match="more than 10 members"):
        unpack(many, tmp_path, ALL, 1_000_000, members=10)
    assert len(list(tmp_path.rglob("*.jpg"))) == 10


def test_a_zip_that_lies_about_a_size(tmp_path: Path) -> None:
    """A member larger than it declares is cut off and refused."""
    made = zipped(tmp_path / "a.zip", {"a.jpg": bytes(100_000)})
    data = bytearray(made.read_bytes())
    where = data.index(b"PK\x01\x02") + 24
    data[where : where + 4] = (10).to_bytes(4, "little")
    made.write_bytes(data)
    with pytest.raises(UnsafeError, match=r"a\.zip"):
        unpack(made, tmp_path, ALL, 10**6)
    assert not list(tmp_path.rglob("*.jpg"))


def test_broken_archives_and_collisions(tmp_path: Path) -> None:
    made = tarred(tmp_path / "a.tar.gz", (tarfile.TarInfo("a.jpg"), CONTENT))
    made.write_bytes(made.read_bytes()[:50_000])
    with pytest.raises(UnsafeError, match=r"a\.tar\.gz: the archive is broken"):
        unpack(made, tmp_path, ALL, 10**6)
    (tmp_path / "b.zip").write_bytes(b"PK no")
    with pytest.raises(UnsafeError, match=r"b\.zip: the archive is broken"):
        unpack(tmp_path / "b.zip", tmp_path, ALL, 10**6)
    with pytest.raises(UnsafeError, match=r"two members would become out/a\.jpg"):
        unpack(zipped(tmp_path / "c.zip", {"x/a.jpg": b"1", "y/a.jpg": b"2"}), tmp_path, ALL, 10**6)
    with pytest.raises(UnsafeError, match=r"d\.zip: holds none of the files"):
        unpack(zipped(tmp_path / "d.zip", {"readme": b"1"}), tmp_path, ALL, 10**6)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "a.jpg"]


def test_place_trusts_only_what_it_can_check(
    server: Server, client: Client, tmp_path: Path
) -> None:
    """Fetched once; a file that somebody changed, or their own, is not overwritten."""
    checksum = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
    step = Download("d/f.bin", (f"{server.url}/good.bin",), len(CONTENT), checksum)
    assert place(client, step, tmp_path) == "100,000 bytes fetched"
    assert place(client, step, tmp_path) == "there already"
    assert server.visits["/good.bin"] == 1
    (tmp_path / "d/f.bin").write_bytes(CONTENT[::-1])
    with pytest.raises(RefusedError, match=r"f\.bin changed since it came: move it away"):
        place(client, step, tmp_path)
    (tmp_path / "d/f.bin").unlink()
    assert place(client, step, tmp_path) == "100,000 bytes fetched"
    other = tmp_path / "other"
    (other / "d").mkdir(parents=True)
    (other / "d/f.bin").write_bytes(b"mine")
    with pytest.raises(RefusedError, match=r"f\.bin is not the published file .* move it away"):
        place(client, step, other)
    assert (other / "d/f.bin").read_bytes() == b"mine"
    (other / "d/f.bin").write_bytes(CONTENT)
    assert place(client, step, other) == "there already"


def test_place_tries_the_second_address(server: Server, client: Client, tmp_path: Path) -> None:
    urls = (f"{server.url}/404", f"{server.url}/good.bin")
    assert place(client, Download("f", urls), tmp_path) == "100,000 bytes fetched"
    with pytest.raises(RefusedError, match=r"/404: 404 Not Found; .*/410: 410 Gone"):
        place(client, Download("g", (f"{server.url}/404", f"{server.url}/410")), tmp_path)


def test_place_unpacks_once(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = zipped(tmp_path / "made.zip", {"x/1.jpg": b"1", "x/2.jpg": b"22"}).read_bytes()
    monkeypatch.setattr(Handler, "on_zip", lambda self: self.answer(data), raising=False)
    root = tmp_path / "root"
    step = Download("d/a.zip", (f"{server.url}/zip",), rules=ALL, unpacked=1000)
    assert place(client, step, root).endswith("bytes fetched, 2 files unpacked")
    assert not (root / "d/a.zip").exists()
    assert place(client, step, root) == "there already, 2 files"
    (root / "out/2.jpg").unlink()
    assert unpacked("d/a.zip", root) == 0
    place(client, step, root, keep=True)
    assert (root / "out/2.jpg").read_bytes() == b"22"
    assert (root / "d/a.zip").exists()
    assert server.visits["/zip"] == 2


def test_an_archive_brought_by_hand_is_unpacked_and_kept(client: Client, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    zipped(tmp_path / "d/a.zip", {"1.jpg": b"1"})
    step = Download("d/a.zip", ("http://127.0.0.1:9/nowhere",), rules=ALL, unpacked=1000)
    assert place(client, step, tmp_path) == "there already, 1 files unpacked"
    assert (tmp_path / "d/a.zip").exists()


def test_data_brought_by_hand_is_not_fetched(tmp_path: Path) -> None:
    """But an archive that was begun is, though enough of its files seem to be there."""
    listed = Download("d/c.txt", ("http://127.0.0.1:9/c",))
    step = Download("d/a.zip", ("http://127.0.0.1:9/a",), rules=ALL, unpacked=1000)
    chosen = {"d": DatasetRecipe((listed, step), (Need("d/images"),), "-")}
    assert prepare._needed(chosen, tmp_path) == [listed, step]
    (tmp_path / "d/images").mkdir(parents=True)
    (tmp_path / "d/images/1.jpg").touch()
    assert prepare._needed(chosen, tmp_path) == [listed]
    (tmp_path / "d/a.zip.part").touch()
    assert prepare._needed(chosen, tmp_path) == [listed, step]
