"""Image bytes to sane RGB pixels."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffitm.core import storage
from diffitm.core.parquet_cell import parquet_cell
from diffitm.core.zip_file import zip_member

CROP = re.compile(r"(.*)#xywh=(-?\d+),(-?\d+),(-?\d+),(-?\d+)", re.DOTALL)


MEMBER = re.compile(r"(.*)#bytes=(\d+),(\d+)", re.DOTALL)


def member_of(archive: str, offset: int, size: int) -> str:
    """The reference of an image inside of an uncompressed archive."""
    return f"{archive}#bytes={offset},{size}"


ROW = re.compile(r"(.*)#row=(\d+)(?:,column=(.+?))?(?:,item=(\d+))?", re.DOTALL)


def row_of(table: str, row: int, column: str = "image", item: int | None = None) -> str:
    """The reference of an image inside of a Parquet file; `item` is its place in a column of lists."""
    named = "" if column == "image" else f",column={column}"
    return f"{table}#row={row}{named}" + ("" if item is None else f",item={item}")


IN_ZIP = re.compile(r"(.*?\.zip)/(.+)", re.DOTALL | re.IGNORECASE)
ARRAY = b"\x93NUMPY"  # how a .npy file begins


def holder(reference: str) -> str:
    """The path of the file that holds an image: its own, or that of the archive or table that it is in."""
    path = split_crop(reference)[0]
    for form in (MEMBER, ROW, IN_ZIP):
        found = form.fullmatch(path)
        path = found[1] if found is not None else path
    return path


ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".avif"),
)


def is_image(path: str) -> bool:
    """Whether a file name has the ending of an image, hidden files aside."""
    name = path.rsplit("/", 1)[-1].lower()
    return name.endswith(ENDINGS) and not name.startswith(".")


def is_litter(path: str) -> bool:
    """Whether a path below a folder is of what systems leave there: hidden (._x.jpg, .DS_Store),
    Thumbs.db, __MACOSX."""
    *folders, name = path.split("/")
    hidden = any(part.startswith(".") for part in (*folders, name))
    return hidden or "__MACOSX" in folders or name.lower() in ("thumbs.db", "desktop.ini")


def list_files(root: str) -> tuple[list[str], dict[str, str]]:
    """Sorted paths below a folder of all files in it and below, litter aside, and what else is named as an
    image, with why it is no file. What a link leads to and lies below the folder itself is listed there
    alone.

    Raises InputError if the place cannot be looked at.
    """
    start = f"{storage.filesystem(root)[1].rstrip('/')}/"
    found, others = storage.tree(root)
    paths = [path.removeprefix(start) for path in found]
    reasons = {
        path.removeprefix(start): "it is a link that leads to no file"
        if os.path.islink(path)
        else "it is no file but a pipe, a socket or a device"
        for path in others
        if is_image(path)
    }
    if "://" not in root:
        top = os.path.realpath(root)
        folders = {path.rpartition("/")[0] for path in (*paths, *reasons)}
        places = {folder: os.path.realpath(os.path.join(root, folder)) for folder in folders}
        own = {os.path.normpath(os.path.join(top, folder)): folder for folder in folders}
        twice = {f for f, place in places.items() if own.get(place, f) != f}
        paths = [path for path in paths if path.rpartition("/")[0] not in twice]
        reasons = {p: why for p, why in reasons.items() if p.rpartition("/")[0] not in twice}
    return (
        [path for path in paths if not is_litter(path)],
        {path: why for path, why in reasons.items() if not is_litter(path)},
    )


def split_crop(reference: str) -> tuple[str, tuple[int, int, int, int] | None]:
    """'x.jpg#xywh=1,2,30,40' -> ('x.jpg', (1, 2, 30, 40)); without a fragment the crop is None."""
    found = CROP.fullmatch(reference)
    if found is None:
        return reference, None
    left, top, width, height = (int(side) for side in found.groups()[1:])
    return found[1], (left, top, width, height)


def load(root: str, reference: str) -> tuple[Image.Image, str]:
    """RGB image of a reference below `root`, and the sha256 of its file.

    Raises OSError or ValueError with a message that names what is wrong.
    """
    return opened(read(root, reference), reference)


def read(root: str, reference: str) -> bytes:
    """The encoded image that a reference below `root` is of or cut from. Raises OSError or ValueError."""
    return encoded(root, split_crop(reference)[0])


def opened(data: bytes, reference: str) -> tuple[Image.Image, str]:
    """What load returns, of what read returned."""
    image, (_, crop) = decode(data), split_crop(reference)
    if crop is not None:
        _check_crop(crop, image.size)
        left, top, width, height = crop
        image = image.crop((left, top, left + width, top + height))
    return image, hashlib.sha256(data).hexdigest()


def encoded(root: str, path: str) -> bytes:
    """The file of an image, or its bytes inside of a Parquet file, a tar or a zip ('x.zip/folder/y.jpg').

    Raises OSError or ValueError.
    """
    _check_inside(path)
    if "://" in root and "?" in path:  # it would become options of the connection
        raise ValueError("a name with '?' cannot be read from a URI")
    member, row = MEMBER.fullmatch(path), ROW.fullmatch(path)
    if row is not None:
        item = None if row[4] is None else int(row[4])
        return parquet_cell(storage.join(root, row[1]), int(row[2]), row[3] or "image", item)
    if member is not None:
        return storage.read_range(storage.join(root, member[1]), int(member[2]), int(member[3]))
    if (zipped := IN_ZIP.fullmatch(path)) is not None:
        return zip_member(storage.join(root, zipped[1]), zipped[2])
    return storage.read_bytes(storage.join(root, path))


def _check_inside(path: str) -> None:
    if ".." in path.split("/"):
        raise ValueError("the path leads out of the data root")


def _check_crop(crop: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """A crop must meet the image; what lies outside becomes black, as in ARO's code."""
    left, top, width, height = crop
    across = left < size[0] and left + width > 0
    down = top < size[1] and top + height > 0
    if not (across and down and min(width, height) > 0):
        raise ValueError(f"crop {crop} lies outside of the image ({size[0]}x{size[1]})")
    if max(width - size[0], height - size[1], -left, -top) > max(size):
        raise ValueError(f"crop {crop} is larger than the image ({size[0]}x{size[1]}) by far")


def problem(root: str, path: str, crops: Iterable[tuple[int, int, int, int]] = ()) -> str | None:
    """Why a file below `root` is no readable image with these crops, None if it is one. JPEGs are
    read at an eighth of their size, which is enough to find a truncated one."""
    try:
        data = encoded(root, path)
        image = _array(data) if data.startswith(ARRAY) else Image.open(io.BytesIO(data))
        for crop in crops:
            _check_crop(crop, image.size)
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
    except Exception as error:  # whatever a decoder raises
        return f"{type(error).__name__}: {error}"
    return None


def decode(data: bytes) -> Image.Image:
    """Decode whole, upright, as RGB: palettes, alpha (on white), grey, CMYK and 16 bits included; a .npy
    file as OpenCV's arrays are, uint8 [H, W, 3] in the order blue, green, red."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(ARRAY):
        return _array(data)
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("the file is not an image of a known kind") from None
    image.load()
    return to_rgb(image)


def _array(data: bytes) -> Image.Image:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] != 3:
        raise ValueError(f"an array is uint8 [H, W, 3], not {values.dtype} {values.shape}")
    return Image.fromarray(np.ascontiguousarray(values[..., ::-1]))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of an image of any mode; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep(image: Image.Image) -> Image.Image:
    """16-bit integers and floats in [0, 1], which PIL's own conversion would clip."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0
    else:
        scale = 1 / 257 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
    grey = (values * scale).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")


def to_pixels(image: Image.Image, size: int, resize: str) -> np.ndarray:
    """uint8 [size, size, 3]: 'squash' ignores the aspect ratio (DiffusionITM), 'crop' resizes the
    short side and takes the centre (Diffusion Classifier). Both bicubic."""
    if resize == "squash":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
