"""MDETR's annotations: COCO's JSON whose images have a caption, and whose boxes say which words name them.

Kamath et al. 2021; the files finetune_refcoco_train.json and the like.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import encodable
from diffitm.training.dpt.expressions import Box, Expression, Span, seen_box

FORM = "MDETR's annotations have 'images' and 'annotations', such as finetune_refcoco_train.json"
IMAGE: dict[str, str] = {
    "id": "a number or text that no other image has",
    "file_name": "the path of an image",
    "caption": "a text",
    "width": "the image's pixels across",
    "height": "the image's pixels down",
}


@dataclass(frozen=True)
class Annotations:
    """The expressions of a file in their order, and how many of its boxes have nothing inside of the picture
    that the model sees."""

    expressions: list[Expression]
    outside: int


def read_annotations(uri: str, folder: str, resize: str, field: str) -> Annotations:
    """An expression for each of a file's images, whose paths start in `folder` below the data root.

    A box is cut at the edges of the picture that the model sees (`resize`, as of core.images.to_pixels),
    and left out if nothing of it is left; so are boxes of crowds.

    Raises InputError that names the file, the place in it, its value and what would be right.
    """
    found = _load(uri, field)
    expressions: dict[Any, _Entry] = {}
    for place, image in enumerate(found["images"]):
        where = f"{uri}: images[{place}]"
        entry = _entry(image, where, folder, field)
        if expressions.setdefault(image["id"], entry) is not entry:
            raise _wrong(where, "id", image["id"], IMAGE["id"], field)
    outside = 0
    for place, annotation in enumerate(found["annotations"]):
        where = f"{uri}: annotations[{place}]"
        if not isinstance(annotation, dict):
            raise InputError(f": {where} is no object: {_told(annotation)}", field)
        key = annotation.get("image_id")
        owner = expressions.get(key) if isinstance(key, int | str) else None
        if owner is None:
            raise _wrong(where, "image_id", key, "the id of one of 'images'", field)
        box = _box(annotation.get("bbox"), where, field)
        spans = _spans(annotation.get("tokens_positive"), owner.caption, where, field)
        if annotation.get("iscrowd"):
            continue
        seen = seen_box(box, owner.size, resize)
        outside += seen is None
        if seen is not None:
            owner.boxes.append(seen)
            owner.spans.append(spans)
    return Annotations([entry.expression() for entry in expressions.values()], outside)


@dataclass(frozen=True)
class _Entry:
    """One of 'images', and what was found of its boxes so far."""

    path: str
    caption: str
    size: tuple[int, int]
    boxes: list[Box]
    spans: list[tuple[Span, ...]]

    def expression(self) -> Expression:
        return Expression(self.path, self.caption, tuple(self.boxes), tuple(self.spans))


def _load(uri: str, field: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_text(uri))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f": there is no file {uri}: {FORM}", field) from None
    except OSError as error:
        raise InputError(f": {uri} cannot be read: {error}", field) from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise InputError(f": {uri} is no JSON: {error}", field) from error
    for name in ("images", "annotations"):
        if not isinstance(found, dict) or not isinstance(found.get(name), list):
            raise InputError(f": {uri} has no list {name!r}: {FORM}", field)
    if not found["images"]:
        raise InputError(f": {uri}: 'images' is empty: {FORM}", field)
    return dict(found)


def _entry(image: Any, where: str, folder: str, field: str) -> _Entry:
    if not isinstance(image, dict):
        raise InputError(f": {where} is no object: {_told(image)}", field)
    for name, right in IMAGE.items():
        value = image.get(name)
        if not _fits(name, value):
            raise _wrong(where, name, value, right, field)
    path = "/".join(filter(None, (folder.strip("/"), image["file_name"])))
    return _Entry(path, image["caption"], (image["width"], image["height"]), [], [])


def _fits(name: str, value: Any) -> bool:
    """Whether a value of an image is as it should be."""
    if name in ("width", "height"):
        return type(value) is int and value > 0
    if name == "id" and type(value) is int:
        return True
    return isinstance(value, str) and bool(value.strip()) and encodable(value) == value


def _box(value: Any, where: str, field: str) -> Sequence[float]:
    right = "left, top, width and height in pixels, none of the last two below 0"
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise _wrong(where, "bbox", value, right, field)
    if min(value[2:]) < 0:
        raise _wrong(where, "bbox", value, right, field)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spans(value: Any, caption: str, where: str, field: str) -> tuple[Span, ...]:
    """The characters that name a box."""
    right = f"pairs [from, to] of characters of the caption's {len(caption)}: {_told(caption)}"
    if not isinstance(value, list) or not value:
        raise _wrong(where, "tokens_positive", value, right, field)
    for span in value:
        whole = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not whole or not 0 <= span[0] < span[1] <= len(caption):
            raise _wrong(where, "tokens_positive", value, right, field)
    return tuple((begin, end) for begin, end in value)


def _wrong(where: str, name: str, value: Any, right: str, field: str) -> InputError:
    return InputError(f": {where}: {name} {_told(value)}: must be {right}", field)


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
