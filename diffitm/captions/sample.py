"""An image with the .txt and .json that lie beside it, in a folder or in a shard."""

from __future__ import annotations

from typing import Any

from diffitm.captions.json_file import parse_json
from diffitm.captions.row import NO_TEXT, CaptionRow, Reading, is_blank, make_row, shown

TEXTS = ("txt", "json")


def sample_row(
    reading: Reading, place: str, image: str, txt: bytes | None, json: bytes | None
) -> CaptionRow:
    """The row of a sample: its text is the .txt or, where that is empty or not there, `caption` of the
    .json, which may hold a source and negatives too. A text that cannot be read is a failure."""
    text, known = None, dict[str, Any]()
    try:
        if txt is not None:
            text = txt.decode("utf-8-sig").strip()
            text = "" if is_blank(text) else text
        if json is not None:
            known = parse_json(json.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        ending = "json" if text is not None else "txt"
        failure = f"its .{ending} is not UTF-8 (at byte {error.start:,})"
        return CaptionRow(place, image, failure=failure)
    except (ValueError, RecursionError) as error:
        return CaptionRow(place, image, failure=f"its .json cannot be read: {error}")
    if not isinstance(known, dict):
        return CaptionRow(place, image, failure=f"its .json is no object: {shown(known)}")
    source = known.get(reading.columns.source) if reading.columns.source is not None else None
    negatives = (None, None)
    if reading.negatives:
        negatives = (known.get("negative_captions"), known.get("negative_images"))
    row = make_row(reading, place, image, text or known.get("caption"), source, negatives)
    if row.failure == NO_TEXT:
        there = [f".{name}" for name, data in (("txt", txt), ("json", json)) if data is not None]
        told = f"no caption in its {' and '.join(there)}" if there else "neither a .txt nor a .json"
        return row._replace(failure=f"{NO_TEXT}: {told}")
    return row
