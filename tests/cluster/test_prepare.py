"""prepare.py as a user runs it, on Ray, against the loopback server of loopback.py."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from diffitm.core.images import decode
from tests.loopback import Handler, Server, picture, zipped
from tests.pipeline import ROOT, environment, kill

pytestmark = pytest.mark.slow
# The real script with another table of sources.
SCRIPT = r"""
import runpy, sys
from diffitm.datasets import sources
from diffitm.datasets.recipe import DatasetRecipe, Download, ImageList, Need, Rule
url = sys.argv.pop(1)
def images(name):
    return (Rule(r"(?:.*/)?([^/]+\.jpg)", name + r"/images/\1"),)
columns = (("pos_url", "pos_image_id"), ("neg_url", "neg_image_id"))
probes = ImageList("svo/svo_probes.csv", columns, "svo/images")
sources.SOURCES = {
    "pets": DatasetRecipe(
        (Download("pets/classes.txt", (url + "/404",)),
         Download("pets/images.tar.gz", (url + "/tar",), rules=images("pets"), unpacked=10**6)),
        (Need("pets/images", 3), Need("pets/classes.txt")), "none"),
    "mini": DatasetRecipe(
        (Download("mini/a.zip", (url + "/mini",), rules=images("mini"), unpacked=10**6),),
        (Need("mini/images", 2),), "none", by_hand="ask for the rest"),
    "svo": DatasetRecipe((Download("svo/svo_probes.csv", (url + "/probes",)), probes), (), "none"),
}
runpy.run_path("pipelines/prepare.py", run_name="__main__")
"""
COLUMNS = "pos_url,neg_url,pos_image_id,neg_image_id,sentence".split(",")


def probes(*urls: str) -> bytes:
    """svo_probes.csv with these addresses, two a row."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for i in range(0, len(urls), 2):
        writer.writerow([urls[i], urls[i + 1], i, i + 1, "a sentence, with a comma"])
    return text.getvalue().encode()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name in ("Egyptian_Mau_1.jpg", "Egyptian_Mau_2.jpg", "beagle_1.jpg", "beagle_1.mat"):
            info = tarfile.TarInfo(f"images/{name}")
            info.size = len(picture())
            file.addfile(info, io.BytesIO(picture()))
    return stream.getvalue()


@pytest.fixture
def routes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server with archives that come whole, and break off; images that are mended later."""
    mini = zipped(tmp_path / "mini.zip", {"a/1.jpg": picture(), "a/2.jpg": os.urandom(20_000)})
    content = mini.read_bytes()

    def broken(self: Handler) -> None:
        if self.visit == 1:
            self.answer(content, sent=9000, ETag='"m"')
        else:
            self.partial(content, '"m"')

    def slow(self: Handler) -> None:
        time.sleep(0.3)
        self.answer(picture())

    for name, route in {
        "tar": lambda self: self.answer(tar()),
        "mini": broken,
        "slow": slow,
        "mended": lambda self: self.answer(picture(), 200 if self.server.mended else 500),
        "probes": lambda self: self.answer(self.server.probes),
    }.items():
        monkeypatch.setattr(Handler, f"on_{name}", route, raising=False)
    server.mended = False  # type: ignore[attr-defined]
    return server


def command(server: Server, tmp_path: Path, *options: object) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    data = ["--data", tmp_path / "data"]
    return [sys.executable, str(script), server.url, *map(str, [*options, *data])]


def run(server: Server, tmp_path: Path, *options: object, code: int) -> str:
    done = subprocess.run(
        command(server, tmp_path, *options),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_whole_run(routes: Server, tmp_path: Path) -> None:
    """Archives, images, dead links; a second run asks only for what failed, a third for nothing."""
    good = [f"{routes.url}/picture?{i}" for i in range(30)]
    local = [f"{routes.url.replace('127.0.0.1', 'localhost')}/picture?l{i}" for i in range(10)]
    bad = [f"{routes.url}/{name}" for name in ("404", "410", "page", "mended")]
    routes.probes = probes(*good, *local, *bad)  # type: ignore[attr-defined]
    shown = run(routes, tmp_path, "pets", "mini", "svo", "--allow-private", code=2)
    data = tmp_path / "data"
    assert "svo         incomplete" in shown
    assert "40 of 44 images, 3 dead links" in shown
    assert "1 images were not fetched yet: run the same command again" in shown
    for task in ("pets", "mini"):
        assert f"{task:<11} complete" in shown
    assert (data / "pets/classes.txt").read_text() == "beagle\negyptian mau\n"
    assert len(list((data / "pets/images").iterdir())) == 3
    assert routes.visits["/mini"] == 2
    images = sorted((data / "svo/images").iterdir())
    assert [decode(p.read_bytes()).size for p in images] == [(8, 6)] * 40
    with (data / "svo/dead_links.csv").open(newline="") as file:
        dead = {row["image_id"]: row["reason"] for row in csv.DictReader(file)}
    assert dead["40"] == "404 Not Found"
    assert dead["41"] == "410 Gone"
    assert dead["42"] == "not an image: a web page"

    routes.mended = True  # type: ignore[attr-defined]
    asked = sum(routes.visits.values())
    shown = run(routes, tmp_path, "svo", "--allow-private", code=3)
    assert "incomplete: 3 images have dead links; they are listed in svo/dead_links.csv" in shown
    assert sum(routes.visits.values()) == asked + 1
    assert (data / "svo/images/43.jpg").exists()
    run(routes, tmp_path, "mini", "svo", "--allow-private", "--retry-dead", code=3)
    assert sum(routes.visits.values()) == asked + 4
    assert routes.visits["/page"] == 2


def test_private_addresses_are_not_asked(routes: Server, tmp_path: Path) -> None:
    shown = run(routes, tmp_path, "mini", code=2)
    assert "127.0.0.1 is not an address of the public internet" in shown
    assert "by hand: ask for the rest" in shown
    assert not routes.visits


@pytest.mark.long
def test_a_killed_run_goes_on(routes: Server, tmp_path: Path) -> None:
    """SIGKILL while images come: those that are there are whole and are not asked for again."""
    urls = [f"{routes.url}/slow?{i}" for i in range(60)]
    routes.probes = probes(*urls)  # type: ignore[attr-defined]
    options = ("svo", "--allow-private", "--per-host", 2)
    folder = tmp_path / "data" / "svo" / "images"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command(routes, tmp_path, *options),
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            start_new_session=True,
        )
        end = time.monotonic() + 120
        while len(list(folder.glob("*.jpg"))) < 8 and time.monotonic() < end:
            time.sleep(0.1)
        kill(process)
    kept = {p.name for p in folder.glob("*.jpg")}
    assert 8 <= len(kept) < 60, (tmp_path / "log").read_text()
    routes.visits.clear()
    run(routes, tmp_path, *options, code=0)
    assert len(list(folder.glob("*.jpg"))) == 60
    assert not {f"/slow?{name[:-4]}" for name in kept} & set(routes.visits)


@pytest.mark.long
def test_interrupt(routes: Server, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and the word that the same command goes on."""
    routes.probes = probes(*(f"{routes.url}/slow?{i}" for i in range(400)))  # type: ignore[attr-defined]
    process = subprocess.Popen(
        command(routes, tmp_path, "svo", "--allow-private", "--per-host", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not routes.visits["/slow?3"] and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown.decode()
    assert b"goes on where it stopped" in shown
