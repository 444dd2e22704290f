"""Every kind of image file that occurs comes out as sane RGB, or as a readable error."""

from __future__ import annotations

import functools
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from diffitm.core import images

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = images.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def halves(left: object, right: object, mode: str) -> Image.Image:
    """32x16: `left` and `right` half."""
    image = Image.new(mode, (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


def test_exif_orientation() -> None:
    """Orientation 6 is turned upright: what was left is at the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = pixels(encoded(halves(RED, BLUE, "RGB"), "JPEG", exif=exif, quality=95, subsampling=0))
    assert found.shape == (32, 16, 3)
    np.testing.assert_allclose(found[2, 8], RED, atol=8)
    np.testing.assert_allclose(found[-3, 8], BLUE, atol=8)


def test_palette() -> None:
    found = pixels(encoded(halves(RED, BLUE, "RGB").convert("P", palette=Image.Palette.ADAPTIVE)))
    assert found[8, 4].tolist() == list(RED)
    assert found[8, 28].tolist() == list(BLUE)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette_with_transparency(form: str) -> None:
    """A transparent palette entry is white, not the colour that hides behind it."""
    image = Image.new("P", (32, 16), 0)
    image.putpalette([*BLACK, *BLUE] + [0] * 762)
    image.paste(1, (16, 0, 32, 16))
    found = pixels(encoded(image, form, transparency=0))
    assert found[8, 4].tolist() == list(WHITE)
    assert found[8, 28].tolist() == list(BLUE)


def test_alpha_is_laid_on_white() -> None:
    found = pixels(encoded(halves((255, 0, 0, 0), (0, 0, 255, 128), "RGBA")))
    assert found[8, 4].tolist() == list(WHITE)
    np.testing.assert_allclose(found[8, 28], (127, 127, 255), atol=1)


def test_grey_with_alpha() -> None:
    found = pixels(encoded(halves((0, 0), (100, 255), "LA")))
    assert found[8, 4].tolist() == list(WHITE)
    assert found[8, 28].tolist() == [100] * 3


def test_rgb_with_a_transparent_colour() -> None:
    found = pixels(encoded(halves(BLACK, BLUE, "RGB"), transparency=BLACK))
    assert found[8, 4].tolist() == list(WHITE)
    assert found[8, 28].tolist() == list(BLUE)


def test_grey_and_one_bit() -> None:
    grey = pixels(encoded(halves(0, 200, "L")))
    assert (grey[8, 4].tolist(), grey[8, 28].tolist()) == ([0] * 3, [200] * 3)
    bits = pixels(encoded(halves(0, 1, "1")))
    assert (bits[8, 4].tolist(), bits[8, 28].tolist()) == ([0] * 3, [255] * 3)


def test_cmyk_jpeg() -> None:
    """No cyan, all magenta and yellow is red; no ink is white."""
    found = pixels(encoded(halves((0, 255, 255, 0), (0, 0, 0, 0), "CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(found[8, 4], RED, atol=12)
    np.testing.assert_allclose(found[8, 28], WHITE, atol=12)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (np.array([0, 32768, 65535], np.uint16), "PNG"),
        (np.array([0, 32768, 65535], np.uint16), "TIFF"),
        (np.array([0, 32768, 65535], np.int32), "TIFF"),
        (np.array([0.0, 0.5, 1.0], np.float32), "TIFF"),
        (np.array([0.0, 128.0, 255.0], np.float32), "TIFF"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "I TIFF", "F TIFF to 1", "F TIFF to 255"],
)
def test_deep_images_are_scaled_not_clipped(values: np.ndarray, form: str) -> None:
    found = pixels(encoded(Image.fromarray(np.tile(values, (4, 1))), form))
    np.testing.assert_allclose(found[0, :, 0], [0, 128, 255], atol=1)
    assert (found == found[..., :1]).all()


def test_truncated_jpeg() -> None:
    """Half a file is an error, not an image that is grey below."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        images.decode(data[: len(data) // 2])


def test_empty_file() -> None:
    with pytest.raises(ValueError, match="the file is empty"):
        images.decode(b"")


@pytest.mark.parametrize("data", [b"<html>404</html>", bytes(64)], ids=["HTML", "zeros"])
def test_not_an_image(data: bytes) -> None:
    """The text tells what is wrong and is the same each time (no address of a Python object)."""
    with pytest.raises(ValueError, match="not an image") as raised:
        images.decode(data)
    assert "0x" not in str(raised.value)


def test_image_too_large_to_be_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        images.decode(encoded(Image.new("RGB", (16, 16))))


def test_split_crop() -> None:
    assert images.split_crop("a/b.jpg") == ("a/b.jpg", None)
    assert images.split_crop("a/b.jpg#xywh=1,2,30,40") == ("a/b.jpg", (1, 2, 30, 40))
    assert images.split_crop("a#b.jpg") == ("a#b.jpg", None)


def test_load_crops_and_hashes(tmp_path: Path) -> None:
    """The crop is cut out of the upright image; the digest is that of the file."""
    values = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3).astype(np.uint8)
    data = encoded(Image.fromarray(values))
    (tmp_path / "a.png").write_bytes(data)
    image, digest = images.load(str(tmp_path), "a.png#xywh=5,3,10,7")
    assert digest == hashlib.sha256(data).hexdigest()
    np.testing.assert_array_equal(np.asarray(image), values[3:10, 5:15])
    whole, same = images.load(str(tmp_path), "a.png")
    assert same == digest
    np.testing.assert_array_equal(np.asarray(whole), values)


@pytest.mark.parametrize(
    "box", ["30,0,5,5", "0,20,5,5", "-5,0,5,5", "0,-9,5,5", "0,0,0,5", "0,0,5,-2"]
)
def test_crop_outside_of_the_image(tmp_path: Path, box: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (30, 20))))
    with pytest.raises(ValueError, match=r"outside of the image \(30x20\)"):
        images.load(str(tmp_path), f"a.png#xywh={box}")


def test_crop_that_sticks_out_is_black_there(tmp_path: Path) -> None:
    """As in ARO's code, whose boxes can begin before the image."""
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (30, 20), "red")))
    crop, _ = images.load(str(tmp_path), "a.png#xywh=-2,0,5,5")
    assert [crop.getpixel((x, 0)) for x in (1, 2)] == [(0, 0, 0), (255, 0, 0)]
    with pytest.raises(ValueError, match="larger than the image"):
        images.load(str(tmp_path), "a.png#xywh=0,0,100000,5")


def test_name_that_looks_like_a_crop() -> None:
    assert images.split_crop("a#xywh=z.jpg") == ("a#xywh=z.jpg", None)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        images.load(str(tmp_path), "nowhere.png")


def test_squash_ignores_the_aspect_ratio() -> None:
    """Both halves of a wide image are there, each half as wide as the square."""
    found = images.to_pixels(halves(RED, BLUE, "RGB"), 16, "squash")
    assert found.shape == (16, 16, 3)
    assert found[8, 1].tolist() == list(RED)
    assert found[8, 14].tolist() == list(BLUE)
    expected = halves(RED, BLUE, "RGB").resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("upright", [False, True])
def test_crop_takes_the_centre(upright: bool) -> None:
    """Red, white, blue thirds: the crop of the short side is white alone."""
    image = Image.new("RGB", (48, 16), WHITE)
    image.paste(RED, (0, 0, 16, 16))
    image.paste(BLUE, (32, 0, 48, 16))
    if upright:
        image = image.transpose(Image.Transpose.ROTATE_90)
    found = images.to_pixels(image, 8, "crop")
    assert found.shape == (8, 8, 3)
    inner = found[1:-1] if upright else found[:, 1:-1]
    assert (inner == 255).all()


@pytest.mark.parametrize("size", [(31, 97), (97, 31), (5, 5), (64, 64), (1, 7)])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_always_square(size: tuple[int, int], resize: str) -> None:
    assert images.to_pixels(Image.new("RGB", size), 33, resize).shape == (33, 33, 3)


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "a/..", "a/../b.png#xywh=0,0,1,1"])
def test_no_name_leads_out_of_the_root(tmp_path: Path, name: str) -> None:
    """Nor back into it: dots within a name are letters."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for place in (tmp_path / "x.png", root / "b.png", root / "a..b.png"):
        place.write_bytes(encoded(Image.new("RGB", (4, 4))))
    with pytest.raises(ValueError, match="leads out of the data root"):
        images.load(str(root), name)
    assert images.problem(str(root), name.partition("#")[0]) == (
        "ValueError: the path leads out of the data root"
    )
    assert images.load(str(root), "a..b.png")[0].size == (4, 4)
    with pytest.raises(ValueError, match=r"a name with '\?' cannot be read"):
        images.load(root.as_uri(), "b.png?x=1")


def test_images_inside_of_archives_and_tables(tmp_path: Path) -> None:
    """By their bytes, and by their row over several row groups; the digest is the image's own."""
    files = [encoded(Image.new("RGB", (4 + n, 4), (n, 0, 0))) for n in range(5)]
    (tmp_path / "a.tar").write_bytes(b"its head" + files[0] + files[1] + b"tail")
    reference = images.member_of("a.tar", 8 + len(files[0]), len(files[1]))
    image, digest = images.load(str(tmp_path), reference)
    assert (image.size, digest) == ((5, 4), hashlib.sha256(files[1]).hexdigest())
    rows = {
        "plain.parquet": pa.table({"image": files, "other": files[::-1]}),
        "struct.parquet": pa.table({"image": [{"bytes": f, "path": "x"} for f in files]}),
    }
    for name, table in rows.items():
        parquet.write_table(table, tmp_path / name, row_group_size=2)
        for n in range(5):
            image, digest = images.load(str(tmp_path), images.row_of(name, n))
            assert (image.size, digest) == ((4 + n, 4), hashlib.sha256(files[n]).hexdigest())
        with pytest.raises(ValueError, match="no such row"):
            images.load(str(tmp_path), images.row_of(name, 5))
    crop, _ = images.load(str(tmp_path), f"{images.row_of('plain.parquet', 3)}#xywh=0,0,2,3")
    assert crop.size == (2, 3)


def test_rows_in_the_order_of_their_names_read_each_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is many megabytes. Threads that ask for its images at once read it once, too, and a file that
    was replaced is read anew."""
    place = tmp_path / "x.parquet"
    groups = list[int]()
    whole = parquet.ParquetFile.read_row_group

    def counted(file: parquet.ParquetFile, group: int, **more: Any) -> pa.Table:
        groups.append(group)
        return whole(file, group, **more)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    for first in (0, 5000):
        files = [str(first + n).encode() for n in range(1200)]
        parquet.write_table(pa.table({"image": files}), place, row_group_size=100)
        names = sorted(images.row_of("x.parquet", n) for n in range(1200))
        wanted = [str(first + int(name.partition("row=")[2])).encode() for name in names]
        assert [images.read(str(tmp_path), name) for name in names] == wanted
        assert sorted(groups) == list(range(12))
        groups.clear()
    place.rename(tmp_path / "y.parquet")
    with ThreadPoolExecutor(8) as pool:
        names = [images.row_of("y.parquet", n) for n in range(500, 508)]
        list(pool.map(functools.partial(images.read, str(tmp_path)), names))
    assert groups == [5]


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ("29,19,1,1", True), ("-4,-4,5,5", True), ("-5,0,6,5", True), ("0,-5,5,5", False),
        ("30,0,1,1", False), ("0,20,1,1", False), ("0,0,60,5", True), ("0,0,61,5", False),
        ("0,0,5,50", True), ("0,0,5,51", False), ("-30,0,31,5", True), ("-31,0,32,5", False),
        ("0,-30,5,31", True), ("0,-31,5,32", False),
    ],
)  # fmt: skip
def test_crops_at_their_bounds(tmp_path: Path, box: str, fits: bool) -> None:
    """They must meet the 30x20 image, and stick out by no more than its longer side."""
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (30, 20))))
    sides = tuple(map(int, box.split(",")))
    assert (images.problem(str(tmp_path), "a.png", [(0, 0, 1, 1), sides]) is None) == fits
    if fits:
        assert images.load(str(tmp_path), f"a.png#xywh={box}")[0].size == sides[2:]
        return
    with pytest.raises(ValueError, match="crop"):
        images.load(str(tmp_path), f"a.png#xywh={box}")


def test_problems_are_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    assert images.problem(str(tmp_path), "a.jpg") is None
    assert "truncated" in (images.problem(str(tmp_path), "b.jpg") or "")
    assert "FileNotFoundError" in (images.problem(str(tmp_path), "c.jpg") or "")


def test_names_of_images() -> None:
    names = ["a.jpg", "d.x/a.JPEG", "a.Png", "a.gif", "a.AVIF", "a.heic", "d/.a.jpg", "jpg"]
    assert [images.is_image(name) for name in names] == [True] * 5 + [False] * 3
    litter = [".d/a.jpg", "d/._a.jpg", ".DS_Store", "d/Thumbs.db", "__MACOSX/a.jpg", "a.b/c.jpg"]
    assert [images.is_litter(name) for name in litter] == [True] * 5 + [False]


def test_integers_that_are_bytes_are_not_scaled() -> None:
    values = np.array([0, 128, 255], np.int32)
    assert pixels(encoded(Image.fromarray(np.tile(values, (4, 1))), "TIFF"))[0, :, 0].tolist() == [
        0, 128, 255,
    ]  # fmt: skip
