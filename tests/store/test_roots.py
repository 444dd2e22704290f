"""Scores stay with their images when the data root is spelt otherwise, linked to or moved, and only then."""

import logging
import os
from pathlib import Path

import pytest

from diffitm.core.images import load
from diffitm.store.roots import known_root
from diffitm.store.score_store import open_store
from tests.tiny import score_row, write_image, write_scores

CONFIG = {"kind": "clip", "version": 1, "weights": "w"}


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, str]:
    """A root of three images, and an OUT with scores of all; one of a crop."""
    root, out = tmp_path / "data", str(tmp_path / "out")
    for number in range(3):
        write_image(root / "a" / f"{number}.png", number)
    store(root, out, ["a/0.png", "a/1.png#xywh=0,0,2,2", "a/2.png"])
    return root, out


def store(root: Path, out: str, images: list[str]) -> None:
    made = open_store(out, "CLIP x", {**CONFIG, "root": str(root)})
    digests = {image: load(str(root), image)[1] for image in images}
    write_scores(made, [score_row(image, "t", digest=digests[image]) for image in images])


def test_other_spellings_of_the_same_place(
    scored: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = scored
    link = root.parent / "link"
    link.symlink_to(root)
    for name in (str(root), f"{root}/", f"{root.parent}/./data", f"{root}/a/..", str(link)):
        assert known_root(name, out) == str(root)


def test_a_copy_elsewhere_goes_on(
    scored: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = scored
    moved = tmp_path / "moved"
    os.rename(root, moved)
    with caplog.at_level(logging.INFO):
        assert known_root(str(moved), out) == str(root)
    assert f"3 images are those scored in {root}" in caplog.text


def test_a_part_of_it_and_more_go_on(scored: tuple[Path, str]) -> None:
    root, out = scored
    (root / "a" / "2.png").unlink()
    write_image(root / "b.png", 7)
    moved = root.rename(root.with_name("moved"))
    assert known_root(str(moved), out) == str(root)


def test_one_changed_image_is_other_data(
    scored: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    root, out = scored
    moved = root.rename(root.with_name("moved"))
    write_image(moved / "a" / "1.png", 9)
    with caplog.at_level(logging.INFO):
        assert known_root(str(moved), out) == str(moved)
    assert "a/1.png is another image than the one scored in" in caplog.text


def test_other_names_are_other_data(scored: tuple[Path, str], tmp_path: Path) -> None:
    _, out = scored
    write_image(tmp_path / "other" / "x.png", 0)
    assert known_root(str(tmp_path / "other"), out) == str(tmp_path / "other")
    assert known_root(str(tmp_path / "other"), str(tmp_path / "new")) == str(tmp_path / "other")


def test_spellings_of_a_uri(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    open_store(out, "CLIP x", {**CONFIG, "root": "s3://bucket/data"})
    for name in ("s3://bucket/data/", "S3://bucket//data", "s3://bucket/data?region=x"):
        assert known_root(name, out) == "s3://bucket/data"
    assert known_root("s3://bucket/data2?region=x", out) == "s3://bucket/data2"


def test_a_new_store_says_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = str(tmp_path)
    open_store(out, "x", {**CONFIG, "root": "/a"})
    open_store(out, "x", {**CONFIG, "root": "/b", "weights": "v"})
    with caplog.at_level(logging.INFO):
        open_store(out, "x", {**CONFIG, "root": "/c"})
        open_store(out, "x", {**CONFIG, "root": "/c"})
        open_store(out, "y", {**CONFIG, "root": "/c", "weights": "u"})
    assert [r.message.partition("; ")[2] for r in caplog.records].count("") == 0
    assert len(caplog.records) == 1 and caplog.records[0].message.endswith(" are of root /a")
