"""Candidate lists as a user makes them: real runs on the shapes world, killed and resumed."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from tests import pipeline

pytestmark = pytest.mark.slow
SCENES, BROKEN = 130, "1007.jpg"
NAME = "val_top10_RN50x64.json"
PREFIX = "datasets/flickr30k/images/"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's images, one of them cut off, and its captions by image."""
    root = tmp_path_factory.mktemp("data")
    pipeline.captioned_world(root, SCENES, BROKEN)
    for name in (NAME, NAME.replace(".json", "_text.json")):
        (root / "flickr30k" / name).unlink()
    return root


def options(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    chosen = ("--clip", "shapes", "--images", data / "flickr30k" / "images", "--prefix", PREFIX)
    chosen += ("--captions", data / "captions.json", "--out", out, *more)
    return chosen


def run(data: Path, out: Path, *more: object, code: int = 3) -> subprocess.CompletedProcess[str]:
    """Exits with 3: an image is unreadable."""
    return pipeline.run(*options(data, out, *more), script="candidates", code=code)


@pytest.fixture(scope="module")
def lists(data: Path) -> Path:
    """Lists made in one go, where the tasks look for them."""
    done = run(data, data / "flickr30k" / NAME, "--actors", 1)
    assert "image retrieval: 645 queries, 129 candidates, recall ceiling" in done.stdout
    assert "text retrieval: 129 queries, 650 candidates, recall ceiling" in done.stdout
    assert "1 unreadable images (5 queries)" in done.stdout
    assert "incomplete: 1 images or captions could not be used; they are listed in" in done.stderr
    return data / "flickr30k"


def files(folder: Path) -> list[bytes]:
    return [(folder / NAME.replace(".json", f"{e}.json")).read_bytes() for e in ("", "_text")]


def info(folder: Path, ending: str = "") -> dict:
    return json.loads((folder / NAME.replace(".json", f"{ending}.info.json")).read_text())


def test_the_tasks_read_them(data: Path, lists: Path) -> None:
    """Gold first and once, the broken image nowhere, insertions as the sidecar says."""
    captions = json.loads((data / "captions.json").read_text())
    for task, ending in ((Flickr30kImage(), ""), (Flickr30kText(), "_text")):
        examples = list(task.examples(str(data)))
        told = info(lists, ending)
        assert len(examples) == SCENES - 1
        assert [f["image"] for f in told["failures"]] == [PREFIX + BROKEN]
        assert told["recall_ceiling"] == 1 - len(told["inserted"]) / told["queries"]
        for example in examples:
            images = [image.removeprefix("flickr30k/images/") for image in example.images]
            assert len(images) * len(example.texts) == 10
            assert BROKEN not in images
            true = [t in captions[i] for i in images for t in example.texts]
            assert true == [True] + [False] * 9
    assert info(lists)["recall_ceiling"] > 0.9, "the embedded CLIP finds most of its images"
    assert {"clip", "weights", "provenance", "low", "high"} <= set(info(lists))


def test_equals_the_embeddings_in_numpy(lists: Path) -> None:
    """The lists as a sort of all stored embeddings' products gives them."""
    (work,) = (lists / "work").iterdir()
    tables = {
        k: pq.read_table(work / k / "embeddings").sort_by("position") for k in ("images", "texts")
    }
    images = tables["images"].filter(tables["images"]["embedding"].is_valid())
    matrix = {
        k: np.stack([np.frombuffer(e, "<f4").astype(float) for e in t["embedding"].to_pylist()])
        for k, t in (("images", images), ("texts", tables["texts"]))
    }
    assert np.abs(np.linalg.norm(matrix["images"], axis=1) - 1).max() < 1e-5
    scores = matrix["texts"] @ matrix["images"].T
    found = list(json.loads((lists / NAME).read_text()).values())
    names = [f"{PREFIX}{1000 + p}.jpg" for p in images["position"].to_pylist()]
    readable = [names.index(line[0]) for line in found]
    asked = [c for c in range(650) if c // 5 != 7]
    for c, line, gold in zip(asked, found, readable, strict=True):
        best = [g for g in np.argsort(-scores[c], kind="stable")[:10] if g != gold]
        assert line == [names[g] for g in [gold, *best[:9]]]


@pytest.mark.long
def test_killed(data: Path, lists: Path, tmp_path: Path) -> None:
    """Killed while searching, with other actors and blocks: the same bytes."""
    out, log = tmp_path / "new" / "folder" / NAME, tmp_path / "log"
    more = ("--actors", 2, "--block-size", 20)
    process = pipeline.start(*options(data, out, *more), log=log, script="candidates")
    deadline = time.monotonic() + pipeline.TIMEOUT
    while committed(out.parent, "texts/top10/checkpoint") < 4:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    pipeline.kill(process)
    assert not out.exists()
    assert committed(out.parent, "texts/top10/checkpoint") < 33
    done = run(data, out, *more)
    assert "embedding images: all 130 are done already" in done.stderr
    assert "image retrieval: going on where it stopped" in done.stderr
    assert files(out.parent) == files(lists)


def committed(folder: Path, stage: str) -> int:
    found = folder.glob(f"work/*/{stage}/*.parquet")
    return sum(not path.name.endswith(".pending.parquet") for path in found)


@pytest.mark.long
def test_other_settings_do_not_mix(data: Path, lists: Path) -> None:
    """Without insertion and with other captions kept: only the text search is done again; another
    captions file gets a work folder of its own."""
    inserted = set(info(lists, "_text")["inserted"])
    before = json.loads(files(lists)[1])
    out = lists.parent / "flickr30k" / "other.json"
    done = run(data, out, "--no-insert-gold", "--keep-other-captions")
    assert done.stderr.count("are done already") == 3
    kept = json.loads((out.parent / "other_text.json").read_text())
    told = json.loads((out.parent / "other_text.info.json").read_text())
    assert (told["gold_inserted"], told["other_captions_kept"]) == (False, True)
    assert told["left_out"] == told["queries"] - len(kept) > 0
    assert not set(kept) & inserted, "a caption beaten by strangers stays beaten"
    captions = json.loads((data / "captions.json").read_text())
    true = [len(set(line) & set(captions[i.removeprefix(PREFIX)])) for i, line in kept.items()]
    assert max(true) > 1
    assert any(kept[i] != before[i] for i in kept)
    fewer = data / "fewer.json"
    fewer.write_text(json.dumps(dict(list(captions.items())[:6])))
    run(data, out, "--captions", fewer, code=0)
    assert len(list((out.parent / "work").iterdir())) == 2
    assert json.loads((out.parent / "other.info.json").read_text())["short_lists"] == 30
