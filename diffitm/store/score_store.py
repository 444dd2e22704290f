"""The score store: a folder of append-only Parquet files for one model under one protocol.

Scores of other settings lie in other folders, because the folder's name holds the fingerprint of
everything that a score depends on; _config.json in it says what that is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as ds

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.core.schema import SCORES

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
        raced = ds.field("positions").is_valid()
        return not self.similarity and self.dataset().head(1, ["row"], filter=raced).num_rows > 0

    def dataset(self) -> ds.Dataset:
        """All rows written so far; files that a kill cut off are left out."""
        found, _ = storage.filesystem(self.uri)
        whole, _ = storage.readable_parquet(self.uri)
        return ds.dataset(whole, schema=SCORES, filesystem=found, format="parquet")


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
