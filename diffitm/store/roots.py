"""Scores of images that lie below another root now: taken over where their content is the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import Unavailable
from diffitm.core.images import encoded, split_crop
from diffitm.core.outside import is_outside, patiently
from diffitm.core.provenance import fingerprint
from diffitm.core.schema import SCORES
from diffitm.store.pair_table import connect
from diffitm.store.score_store import Store

log = logging.getLogger("diffitm")
READERS = 16
SAMPLE = 64  # images that are looked at first, spread over all
AT_ONCE = 1024  # images whose content is compared between two looks at the result


def take_over(stores: Iterable[Store], known: Sequence[Store], root: str) -> None:
    """Give each store without scores those that a known one of the same settings but another root has of
    images which are below `root` with the content that was scored.

    A score depends on the image and not on where it lies, so data that was moved, copied or is given
    under another spelling costs a look at its images, once; a changed image is scored anew.
    Raises Unavailable where images cannot be read for now.
    """
    same: dict[tuple[str, str], bool] = {}
    for store in stores:
        if storage.files(store.uri, ".parquet"):
            continue
        for other in known:
            if other.uri != store.uri and _without_root(other) == _without_root(store):
                _take(other, store, root, same)


def _without_root(store: Store) -> dict[str, Any]:
    return {key: value for key, value in store.config.items() if key != "root"}


def _take(other: Store, store: Store, root: str, same: dict[tuple[str, str], bool]) -> None:
    """Copy the rows of images that are the same; `same` holds what was compared already."""
    with connect(scores=other.dataset()) as connection:
        scored = connection.execute(
            "SELECT DISTINCT image, digest FROM scores "
            "WHERE digest IS NOT NULL AND failure IS NULL ORDER BY image"
        ).fetchall()
    files = sorted({(split_crop(image)[0], digest) for image, digest in scored})
    sample = files[:: max(1, len(files) // SAMPLE)]
    _compare(sample, root, same)
    if any(same[file] for file in sample):
        _compare(files, root, same)
    kept = [i for i, digest in scored if same.get((split_crop(i)[0], digest))]
    where = other.config["root"]
    if not kept:
        log.info("%s: none of the images scored in %s is here as it was", root, where)
        return
    path = storage.join(store.uri, f"taken-{fingerprint(other.config)[:12]}.parquet")
    wanted = pc.is_in(pc.field("image"), pa.array(kept)) & pc.field("failure").is_null()
    with storage.replacing(path) as sink, parquet.ParquetWriter(sink, SCORES) as writer:
        for batch in other.dataset().to_batches(filter=wanted):
            writer.write_batch(batch)
    count = sum(same.get(file, False) for file in files)
    text = "%s: %s: the scores of %s of %s images scored in %s hold"
    log.info(text, store.model, root, f"{count:,}", f"{len(files):,}", where)


def _compare(
    files: Sequence[tuple[str, str]], root: str, same: dict[tuple[str, str], bool]
) -> None:
    """Put into `same` whether each image below the root has the digest."""

    def is_same(file: tuple[str, str]) -> bool:
        image, digest = file
        try:
            data = patiently(lambda: encoded(root, image))
        except (OSError, ValueError) as error:
            if is_outside(error):
                raise Unavailable(f"{root}: {image} cannot be compared: {error}") from error
            return False
        return hashlib.sha256(data).hexdigest() == digest

    new = [file for file in files if file not in same]
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            same.update(zip(part, pool.map(is_same, part), strict=True))
            if start:
                log.info("%s: %s of %s images compared", root, f"{start:,}", f"{len(new):,}")
