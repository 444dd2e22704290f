"""Two runs at one OUT: one works, the other is refused; what a dead one left is taken over."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffitm.core import lease, lease_file, storage
from diffitm.core.errors import InputError
from tests.objects import Objects, reachable, serve
from tests.pipeline import ROOT, environment

HOLD = """
import sys, time
from diffitm.core.lease import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    with serve(tmp_path_factory.mktemp("objects") / "served") as objects, reachable(objects):
        yield objects


@pytest.fixture(params=["disk", "conditional", "unconditional", "endpoint in the URI", "pyarrow"])
def out(request: pytest.FixtureRequest, bucket: Objects, tmp_path: Path) -> Iterator[str]:
    """An OUT on every kind of place."""
    name = re.sub(r"\W+", "-", request.node.name)
    bucket.server.conditional = request.param != "unconditional"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_file, "SETTLES", 0.3)
        if request.param == "pyarrow":
            patch.setattr(lease_file, "_conditional", lambda uri: (Refusing(), "x"))
        if request.param == "endpoint in the URI":
            patch.delenv("AWS_ENDPOINT_URL")
            yield bucket.whole_uri(name)
        else:
            yield str(tmp_path / "out") if request.param == "disk" else bucket.uri(name)
    bucket.server.conditional = True


class Refusing:
    """obstore with credentials of a kind that it does not read."""

    def get(self, *_: object, **__: object) -> None:
        from obstore.exceptions import GenericError

        raise GenericError("no credentials")

    put = get


def refuses(out: str, why: str) -> None:
    with pytest.raises(InputError, match=why), lease.held(out):
        pass


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is on another host."""
    monkeypatch.setattr(lease, "_host", lambda: "another-host")


def test_the_second_is_refused_and_the_first_unharmed(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease.held(out):
        before = storage.read_text(storage.join(out, "lease.json"))
        refuses(out, rf"another run works on it .*process {os.getpid()} on")
        assert storage.read_text(storage.join(out, "lease.json")) == before
    assert not storage.exists(storage.join(out, "lease.json"))
    with lease.held(out):
        pass


def test_a_run_elsewhere_that_renews_its_lease_lives(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWED", 0.3)
    monkeypatch.setattr(lease, "LOOKS", 0.1)
    with lease.held(out):
        another(monkeypatch)
        with pytest.raises(InputError, match="another run works on it"), lease.held(out):
            pass


def test_a_run_elsewhere_that_does_not_is_dead(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while its lease is taken; it notices, and ends if it was alive after all."""
    monkeypatch.setattr(lease, "EXPIRES", 0.5)
    monkeypatch.setattr(lease, "LOOKS", 0.1)
    first = lease._Lease(lease.open_file(storage.join(out, "lease.json")), out, False)
    first.take()
    another(monkeypatch)
    with lease.held(out):
        first.renew()
        assert first.taken_by is not None and first.taken_by.host == "another-host"
        first.release()
        assert storage.exists(storage.join(out, "lease.json"))  # it is not the first one's any more


def test_takeover(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait."""
    first = lease._Lease(lease.open_file(storage.join(out, "lease.json")), out, False)
    first.take()
    another(monkeypatch)
    monkeypatch.setattr(lease, "_Lease", type("L", (lease._Lease,), {"_lives": None}))
    with lease.held(out, takeover=True):
        found = json.loads(storage.read_text(storage.join(out, "lease.json")))
        assert found["host"] == "another-host"


def test_many_at_once(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight that start together, and find what a dead one left, one works."""
    dead = {"id": "x", "host": "gone", "machine": "m", "process": "1 2", "job": None, "time": "t"}
    storage.write_text(storage.join(out, "lease.json"), json.dumps(dead))
    # Longer than a busy machine keeps a thread from running.
    monkeypatch.setattr(lease, "EXPIRES", 1.5)
    monkeypatch.setattr(lease, "LOOKS", 0.1)
    start, end = threading.Barrier(8), threading.Barrier(8)

    def one(_: int) -> bool:
        start.wait()
        try:
            with lease.held(out):
                end.wait()
                return True
        except InputError:
            end.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(8))) == 1


def test_a_late_writer(out: str) -> None:
    """What was found a while ago and is another's by now is not replaced, whatever the place knows."""
    one, other = (lease.open_file(storage.join(out, "lease.json")) for _ in range(2))
    assert one.create(b"dead")
    old = [file.read() for file in (one, other)]
    assert old[0] is not None and old[1] is not None
    assert one.replace(b"one", old[0])
    assert not other.replace(b"other", old[1])
    found = other.read()
    assert found is not None and found.data == b"one"
    assert [name for name in storage.files(out) if not name.endswith("lease.json")] == []


@pytest.mark.parametrize("knows_locks", [True, False])
def test_the_file_on_a_disk_is_never_away_while_it_is_replaced(
    knows_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight that replace it again and again one has it, and none finds it gone."""
    file = lease_file.OnDisk(tmp_path / "lease.json")
    rounds = 200
    if not knows_locks:
        rounds = 3
        monkeypatch.setattr(lease_file, "SETTLES", 0.5)
        monkeypatch.setattr(lease_file.fcntl, "flock", no_locks)

    def one(number: int) -> bool:
        found = file.read()
        start.wait()
        assert found is not None
        has = file.replace(f"{number} of {turn}".encode(), found)
        assert file.read() is not None
        return has

    assert file.create(b"dead")
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for turn in range(rounds):
            assert sum(pool.map(one, range(8))) == 1, turn
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_killed_run_on_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    call = [sys.executable, "-c", HOLD, str(tmp_path)]
    env = environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(call, stdout=subprocess.PIPE, env=env, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {process.pid} on"), lease.held(str(tmp_path)):
        pass
    process.kill()  # not waited for, so that it stays as a zombie
    deadline = time.monotonic() + 20
    while lease._process(process.pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with lease.held(str(tmp_path)):
        pass
    process.wait()


def test_a_run_that_is_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a message that says by whom."""
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    other = lease.Holder("x", "thief", "m", "12 3", "job-7", "now")
    begin = time.monotonic()

    def lose() -> None:
        (tmp_path / "lease.json").write_text(json.dumps(vars(other)))
        time.sleep(20)

    with (
        pytest.raises(InputError, match="was taken over by job job-7, process 12 on thief"),
        lease.held(str(tmp_path)),
    ):
        lose()
    assert time.monotonic() - begin < 10
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "thief"


def test_a_file_that_is_no_lease_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"id": "cut o')
    with lease.held(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["process"]


def test_a_lease_beside_a_file(tmp_path: Path) -> None:
    with lease.held(str(tmp_path / "lists.json"), is_file=True):
        assert [path.name for path in tmp_path.iterdir()] == ["lists.json.lease"]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(str(tmp_path / "file" / "out"), r"out .*file/out: cannot be written to")
