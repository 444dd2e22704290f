"""Images with a class for every pixel: SPLIT/images/NAME.jpg or .png and SPLIT/masks/NAME.png.

Masks are PNGs of class numbers (mode L or P), 255 is ignored; classes.json, a list of names, is
optional. ADE20K's and VOC's masks are such PNGs already (ADE20K's 0 means no class: subtract one in
uint8, so that it becomes 255).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from diffitm.core import images, storage
from diffitm.core.errors import InputError

IGNORED = 255
THREADS = 4
Pair = tuple[str, str]  # paths of an image and its mask below the root


def read_split(root: str, split: str) -> list[Pair]:
    """The images of 'train' or 'val' with their masks, by name. Reads no pixels.

    Raises InputError for a split without images and for an image without a mask.
    """
    names = [name for name in _names(root, f"{split}/images") if images.is_image(name)]
    if not names:
        where = storage.join(root, split, "images")
        raise InputError(f"{where} holds no image ({', '.join(images.ENDINGS)})")
    pairs = [
        (f"{split}/images/{name}", f"{split}/masks/{name.rpartition('.')[0]}.png") for name in names
    ]
    there = set(_names(root, f"{split}/masks"))
    for image, mask in pairs:
        if mask.rpartition("/")[2] not in there:
            wanted = storage.join(root, mask)
            raise InputError(f"{storage.join(root, image)} has no mask: {wanted} is not there")
    return pairs


def read_classes(root: str, pairs: Sequence[Pair]) -> list[str]:
    """The names in classes.json; without it '0', '1', ... up to the largest class of any mask.

    Reads all masks, so that a wrong one is found before anything is computed. Raises InputError for
    a mask that `read_mask` refuses, and for a class that classes.json does not name.
    """
    path = storage.join(root, "classes.json")
    named = _read_names(path) if storage.exists(path) else None

    def largest(pair: Pair) -> int:
        mask = read_mask(root, pair[1])
        found = int(mask[mask != IGNORED].max(initial=0))
        if named is not None and found >= len(named):
            where = storage.join(root, pair[1])
            known = f"{path} names {len(named)} (0 to {len(named) - 1}; {IGNORED} is ignored)"
            raise InputError(f"{where}: class {found}, but {known}")
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        count = max(pool.map(largest, pairs)) + 1
    return [str(number) for number in range(count)] if named is None else named


def read_mask(root: str, path: str) -> np.ndarray:
    """Class numbers uint8 [H, W]. Raises InputError for what is no PNG of mode L or P."""
    where = storage.join(root, path)
    try:
        mask: Image.Image = Image.open(io.BytesIO(storage.read_bytes(where)))
        mask.load()
    except Exception as error:  # whatever a decoder raises
        raise InputError(f"{where}: unreadable mask: {type(error).__name__}: {error}") from error
    if mask.mode not in ("L", "P"):
        expected = "one 8-bit class number a pixel (mode L or P)"
        raise InputError(f"{where}: a mask of mode {mask.mode}, expected {expected}")
    return np.asarray(mask)


def read_pair(root: str, pair: Pair) -> tuple[Image.Image, np.ndarray]:
    """An RGB image and its mask, uint8 [H, W].

    Raises InputError for an unreadable file and for a mask of another size than its image.
    """
    try:
        image, _ = images.load(root, pair[0])
    except Exception as error:  # whatever a decoder raises
        where = storage.join(root, pair[0])
        raise InputError(f"{where}: unreadable image: {type(error).__name__}: {error}") from error
    mask = read_mask(root, pair[1])
    height, width = mask.shape
    if image.size != (width, height):
        where = storage.join(root, pair[1])
        raise InputError(
            f"{where}: {width}x{height}, but its image has {image.width}x{image.height}"
        )
    return image, mask


def _names(root: str, folder: str) -> list[str]:
    return [path.rsplit("/", 1)[-1] for path in storage.files(storage.join(root, folder))]


def _read_names(path: str) -> list[str]:
    try:
        found = json.loads(storage.read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(n, str) for n in found):
        shown = json.dumps(found)[:120]
        raise InputError(f"{path}: expected a list of class names, found {shown}")
    return found
