"""Crops of images and references into Parquet, shards and folders."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.training.crops import Views, Whole, random_box
from diffitm.training.image_pool import in_shard, read_images, split
from tests.tiny import write_image


def png(seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (30, 31)])
def test_boxes_have_share_and_ratio(size: tuple[int, int]) -> None:
    for seed in range(200):
        left, top, right, bottom = random_box(size, 0.9, seed)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        across, down = right - left, bottom - top
        assert 0.85 <= across * down / (size[0] * size[1]) <= 1
        assert 0.7 <= across / down <= 1.4


def test_boxes_follow_their_seed() -> None:
    boxes = [random_box((640, 480), 0.5, seed) for seed in range(20)]
    assert boxes == [random_box((640, 480), 0.5, seed) for seed in range(20)]
    assert len(set(boxes)) == 20


def test_a_strip_gives_its_centre() -> None:
    """No box of that ratio covers nine tenths of it."""
    assert random_box((100, 20), 0.9, 0) == (36, 0, 63, 20)
    assert random_box((20, 100), 0.9, 0) == (0, 36, 20, 63)


def test_boxes_are_anywhere_of_any_size() -> None:
    """From a fifth of the area on, from 3:4 to 4:3 as often tall as wide, from edge to edge."""
    boxes = [random_box((1000, 1000), 0.2, seed) for seed in range(1000)]
    left, top, right, bottom = np.array(boxes).T
    across, down = right - left, bottom - top
    areas, ratios = across * down / 1e6, across / down
    assert 0.198 < areas.min() < 0.21 and areas.max() > 0.95
    assert 0.745 < ratios.min() < 0.76 and 1.31 < ratios.max() < 1.34
    assert abs(np.log(ratios).mean()) < 0.02 and abs(np.median(areas) - 0.57) < 0.05
    found = []
    for start, end in ((left, right), (top, bottom)):
        assert start.min() == 0 and end.max() == 1000
        places = start / np.maximum(1000 - (end - start), 1)
        assert abs(places.mean() - 0.5) < 0.04 and places.std() > 0.25
        found.append(places)
    assert abs(np.corrcoef(*found)[0, 1]) < 0.1
    first = np.random.default_rng([8, 1])  # whose first box fits
    area, ratio = first.uniform(0.2, 1) * 1e6, np.exp(first.uniform(np.log(3 / 4), np.log(4 / 3)))
    sides = [round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))]
    assert [boxes[8][2] - boxes[8][0], boxes[8][3] - boxes[8][1]] == sides


def test_sides_of_what_is_seen() -> None:
    assert Whole(16, "crop").sides == (16,)
    assert Views(16, 8, 1.0).sides == (16, 8)
    assert Views(16, 8, 1.0, both=False).sides == (8,)
    image = Image.open(io.BytesIO(png())).convert("RGB")
    (cut,) = Whole(16, "crop")(image, 0)
    assert np.array_equal(cut, images.to_pixels(image, 16, "crop"))
    assert not np.array_equal(cut, images.to_pixels(image, 16, "squash"))


def test_clip_sees_the_teachers_crop() -> None:
    image = Image.open(io.BytesIO(png())).convert("RGB")
    teacher, clip = Views(16, 8, 0.5)(image, 7)
    assert teacher.shape == (16, 16, 3) and clip.shape == (8, 8, 3)
    shrunk = np.asarray(Image.fromarray(teacher).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(clip, shrunk)
    assert not np.array_equal(Views(16, 8, 0.5)(image, 8)[0], teacher)


def test_without_a_crop_the_whole_is_seen() -> None:
    image = Image.open(io.BytesIO(png())).convert("RGB")
    one, two = Views(16, 8, 1.0)(image, 1), Views(16, 8, 1.0)(image, 2)
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[0], Whole(16, "squash")(image, 0)[0])
    (alone,) = Views(16, 8, 1.0, both=False)(image, 3)
    assert np.array_equal(alone, one[1])


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.jpg", ".hidden.png"):
        write_image(tmp_path / name)
    (tmp_path / "note.txt").write_text("no image")
    assert read_images(str(tmp_path)) == (["a/c.jpg", "b.png"], {})


@pytest.mark.parametrize("form", ["struct", "binary", "large"])
def test_parquet_with_embedded_images(tmp_path: Path, form: str) -> None:
    data = [png(i) for i in range(7)]
    if form == "struct":
        column = pa.array([{"bytes": d, "path": "x.png"} for d in data])
    else:
        column = pa.array(data, pa.binary() if form == "binary" else pa.large_binary())
    parquet.write_table(pa.table({"image": column}), tmp_path / "x.parquet", row_group_size=3)
    found, _ = read_images(str(tmp_path))
    assert read_images(str(tmp_path / "x.parquet")) == (found, {})
    assert found == [f"x.parquet#row={i}" for i in range(7)]
    for i in (0, 2, 3, 6):
        image, _ = images.load(str(tmp_path), found[i])
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data[i]))))
    with pytest.raises(ValueError, match="no such row"):
        images.load(str(tmp_path), "x.parquet#row=7")


def test_parquet_with_paths(tmp_path: Path) -> None:
    """A row without one is told."""
    file = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"image": ["a.png", None, "b.png"]}), file)
    lost = {"x.parquet, row 1: the row names no image": 1}
    assert read_images(str(file)) == (["a.png", "b.png"], lost)


def test_parquet_without_images(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"caption": ["a"]}), file)
    with pytest.raises(InputError, match=r"has none of image, .* it has caption"):
        read_images(str(file))
    parquet.write_table(pa.table({"image": [1]}), file)
    with pytest.raises(InputError, match="the image is a number where a path is expected: 1"):
        read_images(str(file))
    parquet.write_table(pa.table({"img": [png()]}), file)
    with pytest.raises(InputError, match="images themselves must be in a column image, not img"):
        read_images(str(file))


def test_a_null_image_is_unreadable(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"image": pa.array([png(), None], pa.binary())}), file)
    with pytest.raises(ValueError, match="empty"):
        images.load(str(tmp_path), "x.parquet#row=1")


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_images_of_a_shard(tmp_path: Path) -> None:
    """Captions and notes aside; a broken member is found when it is decoded, not here."""
    shard = tmp_path / "0.tar"
    write_shard(shard, {"a.png": png(1), "a.txt": b"caption", "b.json": b"{", "b.jpg": b"broken"})
    found, lost = in_shard(str(shard))
    assert lost == [] and len(found) == 2
    image, _ = images.load(str(tmp_path), found[0])
    assert image.size == (30, 20)
    with pytest.raises(ValueError, match="not an image"):
        images.load(str(tmp_path), found[1])


def test_a_shard_that_breaks_off_gives_what_comes_before(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, {f"{i}.png": png(i) for i in range(5)})
    shard.write_bytes(shard.read_bytes()[:4000])
    found, (failure,) = in_shard(str(shard))
    assert failure.startswith(
        f"0.tar, behind {len(found)} samples: it is no whole, uncompressed tar"
    )
    assert 1 <= len(found) < 5
    assert images.load(str(tmp_path), found[0])[0].size == (30, 20)


def test_a_shard_that_cannot_be_read_now_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might give more another time, and a resume would see other images."""

    def fails(*_: object) -> bytes:
        raise OSError("timed out")

    write_shard(tmp_path / "0.tar", {"a.png": png()})
    monkeypatch.setattr("diffitm.core.storage.read_range", fails)
    with pytest.raises(InputError, match=r"0.tar: cannot be read: timed out"):
        in_shard(str(tmp_path / "0.tar"))


def test_a_reference_cannot_redirect_a_uri() -> None:
    with pytest.raises(ValueError, match=r"a name with '\?' cannot be read from a URI"):
        images.load("s3://bucket/data", "a.jpg?endpoint_override=elsewhere&scheme=http")


def test_split() -> None:
    paths = [str(i) for i in range(100)]
    trained, held = split([*paths, "3"], None, 10)
    assert len(held) == 10 and len(trained) == 90
    assert sorted([*trained, *held], key=int) == paths
    some, same = split(paths, 20, 10)
    assert same == held and len(some) == 20 and set(some) < set(trained)
    assert max(int(b) - int(a) for a, b in itertools.pairwise(some)) <= 6
    assert split(paths, None, 0) == (paths, [])


def test_split_of_too_few() -> None:
    with pytest.raises(InputError, match="held_out 3: there are only 3 images"):
        split(["a", "b", "c"], None, 3)
