"""The score store: a folder of Parquet files for one model under one protocol; manifest.py says which of them
hold its rows.

Scores of other settings lie in other folders, because the folder's name holds the fingerprint of
everything that a score depends on; _config.json in it says what that is.
"""

from __future__ import annotations

import bisect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.core.schema import SCORES
from diffitm.store.manifest import Contents, look

log = logging.getLogger("diffitm")


@dataclass(frozen=True)
class Store:
    """`uri` of the folder, `model` as the user named it, and what its scores depend on."""

    uri: str
    model: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return storage.name(self.uri)

    @property
    def similarity(self) -> str | None:
        """The kind of score where a pair has a single one, such as 'cosine'; None where it has errors by
        timestep."""
        if self.config["kind"] == "diffusion":
            return None
        return str(self.config.get("score", "cosine"))

    @property
    def steps(self) -> int:
        """How many errors a pair has, 1 where it has a single score."""
        return max(1, len(self.config.get("timesteps", [])))

    @property
    def has_parts(self) -> bool:
        """Whether races left pairs with a part of their errors."""
        if self.similarity:
            return False
        contents, raced = look(self.uri), ds.field("positions").is_valid()
        if any(file.raced for file in contents.listed):
            return True
        return self._files(contents.appended).head(1, ["row"], filter=raced).num_rows > 0

    @property
    def rows(self) -> int:
        """How many rows were written so far."""
        return look(self.uri).rows

    def dataset(self, images: pa.LargeStringArray | None = None) -> ds.Dataset:
        """All rows written so far, in the order in which they count; files that a kill cut off are left out.

        Of `images`, sorted, it holds at least all rows, and leaves out those row groups in which none of them
        can be. Raises InputError as manifest.look does, and for a file of the manifest that cannot be read.
        """
        contents = look(self.uri)
        try:
            return self._files(contents.names) if images is None else self._of(contents, images)
        except FileNotFoundError:
            if look(self.uri).manifest == contents.manifest:
                raise
            return self.dataset(images)  # it was compacted meanwhile

    def _of(self, contents: Contents, images: pa.LargeStringArray) -> ds.Dataset:
        found, folder = storage.filesystem(self.uri)
        footers = storage.footers(self.uri, (file.name for file in contents.listed))
        if lost := [file.name for file in contents.listed if file.name not in footers]:
            where = storage.join(self.uri, lost[0])
            if not storage.exists(where):
                raise FileNotFoundError(where)
            raise InputError(f"{where} cannot be read: restore the file")
        form, parts = ds.ParquetFileFormat(), []
        for name, footer in {**footers, **contents.appended}.items():
            if groups := _groups(footer, images):
                part = form.make_fragment(f"{folder}/{name}", found, row_groups=groups)
                parts.append(part)
        return ds.FileSystemDataset(parts, SCORES, form, found)

    def _files(self, names: Iterable[str]) -> ds.Dataset:
        found, folder = storage.filesystem(self.uri)
        paths = [f"{folder}/{name}" for name in names]
        return ds.dataset(paths, schema=SCORES, filesystem=found, format="parquet")


def _groups(footer: parquet.FileMetaData, images: pa.LargeStringArray) -> list[int]:
    """The row groups in which one of the sorted images may be, by their statistics."""
    column = footer.schema.names.index("image")
    found = []
    for group in range(footer.num_row_groups):
        about = footer.row_group(group).column(column).statistics
        if about is None or not about.has_min_max or among(images, about.min, about.max):
            found.append(group)
    return found


def among(images: pa.LargeStringArray, first: str, last: str) -> pa.LargeStringArray:
    """Those of the sorted images that are not before `first` and not behind `last`."""
    name = pa.LargeStringScalar.as_py
    start = bisect.bisect_left(images, first, key=name)
    return images[start : bisect.bisect_right(images, last, start, key=name)]


def open_store(out: str, model: str, config: dict[str, Any], known: Sequence[Store] = ()) -> Store:
    """The store of this configuration below `out`, created if need be; the log says what keeps `known`
    ones from serving.

    Raises InputError if the folder holds scores of another configuration.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-")
    uri = storage.join(out, "scores", f"{slug[:40]}-{fingerprint(config)[:12]}")
    note = storage.join(uri, "_config.json")
    if not storage.exists(note):
        if storage.files(uri, ".parquet"):
            raise InputError(
                f"{uri} holds scores but no _config.json: move it away or restore the file"
            )
        _say_why(known, model, config)
        storage.write_text(note, json.dumps({"model": model, **config}, indent=2))
        return Store(uri, model, config)
    store = read_store(uri)
    if store.config != config:
        keys = sorted({*store.config, *config})
        other = [k for k in keys if store.config.get(k) != config.get(k)]
        raise InputError(
            f"{uri} holds scores of another configuration ({', '.join(other)} differ); "
            "give another --out or move the folder away"
        )
    return Store(uri, model, config)


def stores_of(out: str) -> Iterator[Store]:
    """The score stores of an OUT, by name. Raises InputError for a folder whose _config.json is none."""
    base = storage.join(out, "scores")
    for name in storage.folders(base):
        uri = storage.join(base, name)
        if storage.exists(storage.join(uri, "_config.json")):
            yield read_store(uri)


def _say_why(known: Sequence[Store], model: str, config: dict[str, Any]) -> None:
    """Tell what keeps a new store from taking the scores of the most alike one of the same model; where it
    is the root alone, roots.take_over tells."""
    alike = []
    for store in known:
        if store.model == model and store.config["kind"] == config["kind"]:
            other = [key for key in config if store.config.get(key) != config[key]]
            alike.append((len(other), store.name, other, store.config))
    if alike:
        _, name, other, there = min(alike, key=lambda found: found[:2])
        told = ", ".join(f"{key} {_short(there.get(key))}" for key in other)
        if other != ["root"]:
            log.info("%s: scores anew; those in %s are of %s", model, name, told)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}.."


def read_store(uri: str) -> Store:
    """A store by its folder. Raises InputError if it is none."""
    note = storage.join(uri, "_config.json")
    try:
        config = json.loads(storage.read_text(note))
        return Store(uri, config.pop("model"), config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{note} is not the config of a score store: {error}") from error
