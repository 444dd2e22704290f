"""Hard negatives as a user makes them: real runs on the shapes world, killed and resumed."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffitm.negatives.merge import read_pairs
from diffitm.negatives.rules import SWAPS, rules
from diffitm.tasks.perturb import KINDS
from tests import pipeline
from tests.tiny_language import write_llama

pytestmark = pytest.mark.slow
SCENES, BROKEN, NEAR = 40, "1007.jpg", 3
PREFIX = "datasets/flickr30k/images/"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's images, one of them cut off, its captions by image, and a random tiny Llama."""
    root = tmp_path_factory.mktemp("data")
    captions = pipeline.captioned_world(root, SCENES, BROKEN)
    write_llama(root / "llm", list(itertools.chain(*captions.values())), chat=True)
    return root


def options(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    chosen = ("--captions", data / "captions.json", "--out", out)
    chosen += ("--kinds", "rules", "llm", "images", "--llm", data / "llm", "--temperature", 2)
    chosen += ("--max-new-tokens", 24, "--clip", "shapes", "--images", data / "flickr30k/images")
    chosen += ("--near", NEAR, *more)
    return chosen


def run(data: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Exits with 3: an image is unreadable."""
    return pipeline.run(*options(data, out, *more), script="negatives", code=3)


@pytest.fixture(scope="module")
def made(data: Path) -> Path:
    """Negatives made in one go."""
    done = run(data, data / "once" / "negatives.tsv")
    assert "200 rows: negative captions" in done.stdout
    assert "1 unreadable images" in done.stdout
    return data / "once"


def info(folder: Path) -> dict:
    return json.loads((folder / "negatives.info.json").read_text())


def test_captions(data: Path, made: Path) -> None:
    """The rows in the file's order with the captions of the rules; each answer used or told why not."""
    given, rows, told = (
        read_pairs(str(data / "captions.json"))[0],
        read_pairs(str(made / "negatives.tsv"))[0],
        info(made),
    )
    assert [(r.image, r.caption) for r in rows] == [(r.image, r.caption) for r in given]
    answered = {item["caption"]: item for item in told["rejected_captions"]}
    for row in rows:
        by_rule = list(rules(row.caption, 0).values())
        lost = {i["text"] for i in told["rejected_captions"] if i["caption"] == row.caption}
        kept = [text for text in by_rule if text not in lost]
        assert list(row.negative_captions[: len(kept)]) == kept
        assert len(row.negative_captions) > len(kept) or row.caption in answered
    assert set(told["negative_captions"]) <= {*SWAPS, *KINDS, "llm"}
    assert sum(told["rejected"].values()) == len(told["rejected_captions"])
    assert {"llm: cut off", "llm: other words"} <= set(told["rejected"])
    assert told["prompt"].count("{caption}") == 1
    assert told["provenance"]["config"]["temperature"] == 2


def test_near_images(made: Path) -> None:
    """As a sort of the stored embeddings' products gives them, none that shares a caption."""
    (work,) = made.glob("work/negatives-images-*/images/embeddings")
    table = pq.read_table(work).sort_by("position")
    rows, _ = read_pairs(str(made / "negatives.tsv"))
    names = list(dict.fromkeys(row.image for row in rows))
    content = table["embedding"].to_pylist()
    good = [i for i, item in enumerate(content) if item is not None]
    assert [names[i] for i in range(SCENES) if i not in good] == [BROKEN]
    matrix = {i: np.frombuffer(content[i], "<f4").astype(float) for i in good}
    said = {name: {row.caption for row in rows if row.image == name} for name in names}
    for row in rows:
        if row.image == BROKEN:
            assert row.negative_images == ()
            continue
        here = names.index(row.image)
        others = [i for i in good if i != here and not said[names[i]] & said[row.image]]
        others.sort(key=lambda i: (-matrix[here] @ matrix[i], i))
        assert list(row.negative_images) == [names[i] for i in others[:NEAR]]


@pytest.mark.long
def test_killed_while_the_model_answers(data: Path, made: Path, tmp_path: Path) -> None:
    """What was answered stays as it is, the rest follows, and the result is the same."""
    out, log = tmp_path / "new" / "negatives.tsv", tmp_path / "log"
    process = pipeline.start(*options(data, out), log=log, script="negatives")
    deadline = time.monotonic() + pipeline.TIMEOUT
    while len(committed(out.parent)) < 3:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    pipeline.kill(process)
    assert not out.exists()
    before = committed(out.parent)
    rows = {row for path in before for row in pq.read_table(path)["row"].to_pylist()}
    assert 3 <= len(rows) < 25, "of 25 groups"
    done = run(data, out)
    assert "captions by rule: all 200 are done already" in done.stderr
    assert "captions by the language model: going on where it stopped" in done.stderr
    assert set(before) <= set(committed(out.parent))
    assert out.read_bytes() == (made / "negatives.tsv").read_bytes()
    for name in ("rejected_captions", "negative_captions", "unreadable_images", "sha256"):
        assert info(out.parent)[name] == info(made)[name]


def committed(folder: Path) -> list[Path]:
    """Files of the answers' checkpoint."""
    found = folder.glob("work/negatives-llm-*/checkpoint/*.parquet")
    return sorted(path for path in found if not path.name.endswith(".pending.parquet"))
