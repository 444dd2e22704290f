"""Scores go with their images: to another root, and only for those whose content is the same."""

import logging
from pathlib import Path

import pytest

from diffitm.core import storage
from diffitm.core.errors import Unavailable
from diffitm.core.images import load
from diffitm.store import roots
from diffitm.store.roots import take_over
from diffitm.store.score_store import Store, open_store, stores_of
from tests.tiny import score_row, write_image, write_scores

CONFIG = {"kind": "clip", "version": 1, "weights": "w"}
IMAGES = ("a/0.png", "a/1.png#xywh=0,0,2,2", "a/2.png")


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, str]:
    """A root of three images, and an OUT with a score of each; one of a crop."""
    root, out = tmp_path / "data", str(tmp_path / "out")
    for number in range(3):
        write_image(root / "a" / f"{number}.png", number)
    store = open_store(out, "CLIP x", {**CONFIG, "root": str(root)})
    rows = [
        score_row(image, "t", digest=load(str(root), image)[1], similarity=float(n))
        for n, image in enumerate(IMAGES)
    ]
    failed = score_row("a/0.png", "u", digest=rows[0]["digest"], failure="away")
    write_scores(store, [*rows, failed])
    return root, out


def taken(root: Path, out: str, **other: object) -> dict[str, float]:
    """Image -> score in the store of `root`, once it has taken over what it can."""
    known = list(stores_of(out))
    store = open_store(out, "CLIP x", {**CONFIG, "root": str(root), **other}, known)
    take_over([store], known, str(root))
    return scores(store)


def scores(store: Store) -> dict[str, float]:
    return {row["image"]: row["similarity"] for row in store.dataset().to_table().to_pylist()}


def test_data_that_was_moved(scored: tuple[Path, str], caplog: pytest.LogCaptureFixture) -> None:
    root, out = scored
    moved = root.rename(root.with_name("moved"))
    with caplog.at_level(logging.INFO):
        assert taken(moved, out) == dict(zip(IMAGES, range(3), strict=True))
    assert f"the scores of 3 of 3 images scored in {root} hold" in caplog.text
    caplog.clear()
    assert len(taken(moved, out)) == 3
    assert caplog.text == ""  # they were compared once


def test_a_changed_or_new_image_takes_over_nothing(scored: tuple[Path, str]) -> None:
    """Neither from the other root, nor to it."""
    root, out = scored
    other = root.rename(root.with_name("other"))
    write_image(other / "a" / "1.png", 9)
    (other / "a" / "2.png").unlink()
    write_image(other / "b.png", 7)
    assert taken(other, out) == {"a/0.png": 0}
    assert len(taken(root, out)) == 3


def test_a_link_that_leads_elsewhere_now(scored: tuple[Path, str], tmp_path: Path) -> None:
    root, out = scored
    link = tmp_path / "link"
    link.symlink_to(root)
    assert len(taken(link, out)) == 3
    link.unlink()
    write_image(tmp_path / "v2" / "a" / "0.png", 5)
    link.symlink_to(tmp_path / "v2")
    assert taken(tmp_path / "v2", out) == {}


def test_other_settings_take_over_nothing(scored: tuple[Path, str]) -> None:
    root, out = scored
    moved = root.rename(root.with_name("moved"))
    assert taken(moved, out, weights="v") == {}


def test_a_store_that_has_scores_takes_no_others(scored: tuple[Path, str]) -> None:
    root, out = scored
    moved = root.rename(root.with_name("moved"))
    store = open_store(out, "CLIP x", {**CONFIG, "root": str(moved)})
    write_scores(store, [score_row("a/0.png", "t", digest="d", similarity=5.0)])
    assert taken(moved, out) == {"a/0.png": 5}


def test_other_data_costs_a_look_at_a_few(
    scored: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = scored
    asked = []

    def encoded(place: str, image: str) -> bytes:
        asked.append(image)
        raise FileNotFoundError(image)

    monkeypatch.setattr(roots, "SAMPLE", 1)
    monkeypatch.setattr(roots, "encoded", encoded)
    assert taken(tmp_path / "else", out) == {}
    assert len(asked) == 1


def test_a_store_that_is_away_is_no_other_data(
    scored: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = scored

    def encoded(place: str, image: str) -> bytes:
        raise OSError("AWS Error SLOW_DOWN during GetObject")

    monkeypatch.setattr(roots, "patiently", lambda call: call())
    monkeypatch.setattr(roots, "encoded", encoded)
    with pytest.raises(Unavailable, match="cannot be compared"):
        taken(root.with_name("moved"), out)


def test_a_new_store_says_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = str(tmp_path)
    open_store(out, "x", {**CONFIG, "root": "/a"})
    known = list(stores_of(out))
    with caplog.at_level(logging.INFO):
        for weights in ("v", "u"):  # of one run, which are not known to each other
            open_store(out, "x", {**CONFIG, "root": "/a", "weights": weights}, known)
        open_store(out, "x", {**CONFIG, "root": "/c"}, known)
        open_store(out, "y", {**CONFIG, "root": "/a", "weights": "t"}, known)
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all(text.endswith(" are of weights w") for text in told)
    assert storage.folders(storage.join(out, "nowhere")) == []
