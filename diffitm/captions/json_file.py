"""The JSON files of the field: rows, images by path, COCO's captions, Karpathy's data set."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffitm.captions.row import CaptionRow, shown
from diffitm.core.errors import InputError

log = logging.getLogger("diffitm")
LAYOUTS = (
    '[{"image": .., "caption": ..}], {image: [captions]}, COCO\'s {"images": [..], "annotations": [..]} '
    'or Karpathy\'s {"images": [{"filename": .., "sentences": [..]}]}'
)
# Of tables whose columns, not rows, stand in an object.
NAMES = {"image", "images", "caption", "captions", "text", "texts", "file_name", "path", "data"}
Entry = tuple[str, Any]  # where it stands; an object, (image, texts) or a row with its failure


def parse_json(text: str) -> Any:
    """The content of a JSON text. Raises ValueError, of a name too that an object has twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        values = " and ".join(json.dumps(value, default=str)[:40] for k, value in pairs if k == key)
        raise ValueError(f"{shown(key)!r} is there twice in an object, with {values}; join the two")
    return found


def read_entries(text: str, where: str, captioned: bool = True) -> Iterator[Entry]:
    """What a JSON file holds of images and, if they are `captioned`, of captions.

    Raises InputError that names what is right.
    """
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        hint = "; JSON lines are named .jsonl" if "Extra data" in str(error) else ""
        raise InputError(f"{where} cannot be read: {error}{hint}") from error
    if isinstance(content, list):
        yield from ((f"entry {number}", entry) for number, entry in enumerate(content))
    elif not isinstance(content, dict):
        raise InputError(f"{where}: expects {LAYOUTS}; found {shown(content)}")
    elif isinstance(content.get("images"), list) and "annotations" in content:
        if captioned:
            _check_annotations(content["annotations"], where)
        yield from _coco(content)
    elif isinstance(content.get("images"), list) and any(
        isinstance(image, dict) and "sentences" in image for image in content["images"]
    ):
        yield from _karpathy(content["images"], where)
    elif set(content) & NAMES:
        raise InputError(f"{where}: expects {LAYOUTS}; found the keys {', '.join(content)[:80]}")
    else:
        yield from ((f"key {shown(key)!r}", (key, value)) for key, value in content.items())


def _check_annotations(annotations: Any, where: str) -> None:
    """Raises InputError for annotations that are no captions: of instances, or no list."""
    right = 'expects a list of {"image_id": .., "caption": ..}, as captions_*.json of COCO has it'
    if not isinstance(annotations, list):
        raise InputError(f"{where}: annotations is {shown(annotations)}; {right}")
    objects = [annotation for annotation in annotations if isinstance(annotation, dict)]
    if objects and not any("caption" in annotation for annotation in objects):
        keys = ", ".join(objects[0])[:80]
        raise InputError(f"{where}: none of its annotations has a caption, only {keys}; {right}")


def _coco(content: dict[str, Any]) -> Iterator[Entry]:
    """An entry an image, with its captions; annotations of no image are entries of their own."""
    captions: dict[str, list[Any]] = {}
    lost: list[Entry] = []
    known = {str(_of(image, "id")) for image in content["images"]}
    annotations = content["annotations"] if isinstance(content["annotations"], list) else []
    for number, annotation in enumerate(annotations):
        place, key = f"annotation {number}", str(_of(annotation, "image_id"))
        if key in known:
            captions.setdefault(key, []).append(_of(annotation, "caption"))
        else:
            text = f"its image_id {shown(_of(annotation, 'image_id'))} is of none of the images"
            lost.append((place, CaptionRow(place, failure=text)))
    seen: set[str] = set()
    for number, image in enumerate(content["images"]):
        place, key = f"image {number}", str(_of(image, "id"))
        if key in seen or _of(image, "id") is None:
            text = f"another image has its id {key}" if key in seen else "it has no id"
            yield place, CaptionRow(place, failure=text)
            continue
        seen.add(key)
        yield place, (_of(image, "file_name"), captions.get(key, []))
    yield from lost


def _karpathy(images: list[Any], where: str) -> Iterator[Entry]:
    splits = Counter(str(_of(image, "split")) for image in images)
    if len(splits) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in splits.items())
        log.info("%s: images of all its splits: %s", where, told)
    for number, image in enumerate(images):
        folder, name = _of(image, "filepath"), _of(image, "filename")
        if isinstance(folder, str) and folder and isinstance(name, str):
            name = f"{folder}/{name}"
        sentences = _of(image, "sentences")
        texts = [_of(s, "raw") for s in sentences] if isinstance(sentences, list) else sentences
        yield f"image {number}", (name, texts)


def _of(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None
