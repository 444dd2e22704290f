"""Candidate lists of a CLIP: embed images and captions, search each among the others, write lists.

Embeddings are made in groups of a fixed size, each always in one forward of one shape, so that they
do not depend on actors or restarts; the same kind of processor and threads give the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from pyarrow import parquet

from diffitm import candidates, nearest, pairs, scoring, storage
from diffitm.candidates import FOUND, Captions, Side
from diffitm.config import option
from diffitm.distributed import session
from diffitm.distributed.session import Pool
from diffitm.distributed.stages import Stage, run_stage, whole_files
from diffitm.errors import InputError
from diffitm.nearest import EMBEDDINGS
from diffitm.provenance import fingerprint, record

if TYPE_CHECKING:
    from diffitm.models.clip import ClipSource

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other embeddings or lists
GROUP = {"image": 32, "text": 256}  # items of a forward; a part of what an embedding depends on
GROUPS_PER_BLOCK, BLOCKS_PER_ACTOR = 16, 8
QUERIES = {"cpu": 4096, "cuda": 16384}
GALLERY = {"cpu": 1024, "cuda": 8192}  # items of a step of the search
LOOKED_AT = 20
WORK = pa.schema(
    [
        ("row", pa.int64()),
        ("start", pa.int64()),
        ("names", pa.list_(pa.string())),
        ("truth", pa.list_(pa.list_(pa.int64()))),
    ]
)


@dataclass(frozen=True)
class Config:
    """Options of pipelines/candidates.py."""

    clip: str = option("", "the CLIP: shapes, NAME:TAG, NAME:FILE or a folder")
    images: str = option("", "folder or URI that the image paths start from")
    captions: str = option("", "JSON of rows {image, caption} or {image: captions}, or tsv, csv")
    out: str = option("out/candidates/val_top10.json", "image lists; text lists end in _text.json")
    top_k: int = option(10, "candidates of a list")
    prefix: str | None = option(
        None,
        "put before image paths in the lists (default: the way from the data root, which is the "
        "folder above --out's, if --images is below it)",
    )
    insert_gold: bool = option(
        True, "the right one replaces the last candidate where it is missing"
    )
    keep_other_captions: bool = option(
        False, "keep an image's other true captions in its text list"
    )
    block_size: int | None = option(None, "queries searched at once: memory, never the result")
    actors: int | None = option(None, "actors (default: one a GPU, else one a processor)")
    max_actors: int | None = option(None, "let the pool grow to this many")
    cpus_per_actor: float | None = option(None, "processors (and threads) of an actor")
    gpus_per_actor: float | None = option(None, "GPU share of an actor (default: 1 if any)")
    ray: str | None = option(None, "address of a Ray cluster (default: RAY_ADDRESS, else local)")


@dataclass(frozen=True)
class Gallery:
    """Embedded items on disk: the folder, its whole shards (in the file system's own form)."""

    folder: str
    shards: list[str]
    size: int


def run(config: Config) -> None:
    """Embed what is missing, search, and write both lists and their .info.json.

    Raises InputError for bad input, before anything is embedded where that is possible.
    """
    _check(config)
    from diffitm.models.clip import resolve_clip

    source = resolve_clip(config.clip)
    known = candidates.read_captions(storage.absolute(config.captions))
    root = storage.absolute(config.images)
    known = _found(root, known)
    log.info("%s images, %s captions", f"{len(known.images):,}", f"{len(known.captions):,}")
    session.connect(config.ray)
    pool = session.choose_pool(
        config.actors, config.max_actors, config.cpus_per_actor, config.gpus_per_actor
    )
    out = storage.absolute(config.out)
    work = _work_folder(out, source, root, known, pool.device)
    pictures = _embed(work, "image", known.images, known.of_image, source, root, pool)
    texts = _embed(work, "text", known.captions, known.of_caption, source, root, pool)
    failed = _failures(pictures)
    if len(failed) == len(known.images):
        raise InputError(f"no image of {config.captions} could be read: {failed[0]}")
    prefix = _way(root, out) if config.prefix is None else config.prefix
    named = [prefix + path for path in known.images]
    note = {
        "clip": source.name,
        "weights": source.digest,
        "other_captions_kept": config.keep_other_captions,
        "provenance": record(asdict(config)),
    }
    for side, queries, gallery in (
        (Side("image", known.captions, named, known.of_caption, failed), texts, pictures),
        (Side("text", named, known.captions, known.of_image, failed), pictures, texts),
    ):
        found = _search(config, side, queries, gallery, pool)
        _write(config, out, side, found, note)
    if failed:
        print(f"{len(failed)} unreadable images are tried again once {work} is deleted")


def _check(config: Config) -> None:
    """All problems of the options together."""
    problems = []
    for name, example in (("clip", "RN50x64:openai"), ("images", "DIR"), ("captions", "FILE")):
        if not getattr(config, name):
            problems.append(f"give --{name}, such as --{name} {example}")
    if config.images and not storage.exists(storage.absolute(config.images)):
        problems.append(f"--images: there is no folder {storage.absolute(config.images)}")
    if config.captions and not storage.exists(storage.absolute(config.captions)):
        problems.append(f"--captions: there is no file {storage.absolute(config.captions)}")
    if not _name(config.out).endswith(".json") or _name(config.out).endswith("_text.json"):
        problems.append(f"--out {config.out}: must end in .json, and not in _text.json")
    out = storage.absolute(config.out)
    written = [out, *(_beside(out, end) for end in ("_text.json", ".info.json", "_text.info.json"))]
    if config.captions and storage.absolute(config.captions) in written:
        problems.append(f"--out {config.out}: would replace the captions file {config.captions}")
    least = {"top_k": 2, "block_size": 1, "actors": 1, "max_actors": 1}
    least |= {"cpus_per_actor": 0, "gpus_per_actor": 0}
    for key, bound in least.items():
        value = getattr(config, key)
        if value is not None and not bound <= value < 2**31:
            problems.append(f"--{key.replace('_', '-')} {value}: must be at least {bound}")
    if problems:
        raise InputError("\n".join(problems))


def _name(uri: str) -> str:
    return uri.partition("?")[0] if "://" in uri else uri


def _beside(out: str, ending: str) -> str:
    """The file beside `out` whose name has another ending than .json."""
    name = _name(out)
    return name.removesuffix(".json") + ending + out[len(name) :]


def _found(root: str, known: Captions) -> Captions:
    """The captions with image paths that lie below the root: as they are, or their last part (the
    Karpathy files name a folder of their own). A wrong folder is told before anything is embedded.
    """
    for bare in (False, True):
        paths = [path.rpartition("/")[2] if bare else path for path in known.images]
        looked = [storage.join(root, path.split("#")[0]) for path in paths[:LOOKED_AT]]
        if any(map(storage.exists, looked)):
            if len(set(paths)) < len(paths):
                raise InputError(f"--images {root}: two images have the same name without folder")
            return replace(known, images=paths)
    raise InputError(f"--images {root} lacks the captions file's images, such as {known.images[0]}")


def _way(root: str, out: str) -> str:
    """From the data root, the folder above that of `out`, to the images; '' if they lie elsewhere."""
    data = storage.parent(storage.parent(out))
    return f"{root[len(data) :].strip('/')}/" if root.startswith(f"{data.rstrip('/')}/") else ""


def _work_folder(out: str, source: ClipSource, root: str, known: Captions, device: str) -> str:
    """Named by everything that an embedding depends on."""
    settings = {
        "version": VERSION,
        "clip": [source.digest, source.quick_gelu],
        "images": root,
        "captions": known.digest,
        "device": device,
        "groups": GROUP,
    }
    name = f"candidates-{fingerprint(settings)[:12]}"
    folder = storage.join(storage.parent(out), "work", name)
    note = storage.join(folder, "_config.json")
    if not storage.exists(note):
        storage.write_text(note, json.dumps(settings, indent=1))
    return folder


class EmbedActor:
    """Loads the CLIP once; embeds groups of images or captions."""

    def __init__(self, kind: str, source: ClipSource, root: str, device: str, counter: Any) -> None:
        from diffitm.models.clip import ClipScorer

        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        self.kind, self.root, self.counter = kind, root, counter
        self.failure: InputError | None = None
        try:
            self.clip = ClipScorer(source, root, device)
        except InputError as error:  # Ray would try a constructor again; a call fails at once
            self.failure = error

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.failure is not None:
            raise self.failure
        return pa.concat_tables(self._group(**line) for line in table.to_pylist())

    def _group(self, row: int, start: int, names: list[str], truth: list[list[int]]) -> pa.Table:
        failures, values = self._images(names) if self.kind == "image" else self._texts(names)
        if values is not None:
            what = "image" if self.kind == "image" else "caption"
            values = nearest.on_grid(values[: len(names)], lambda i: f"{what} {names[i]!r}")
        self.counter.add.remote(len(names))
        positions = range(start, start + len(names))
        return nearest.to_table(row, positions, truth, failures, values)

    def _images(self, names: list[str]) -> tuple[list[str | None], np.ndarray | None]:
        rows = [scoring.Work(i, name, []) for i, name in enumerate(names)]
        loaded = scoring.load_images(rows, self.root, self.clip.preprocess)
        good = [item.value for item in loaded if item.failure is None]
        failures = [item.failure for item in loaded]
        if not good:
            return failures, None
        pixels = torch.zeros(GROUP["image"], *good[0].shape)
        for i, item in enumerate(loaded):
            if item.failure is None:
                pixels[i] = item.value
        return failures, self.clip.encode_images(pixels).cpu().numpy()

    def _texts(self, names: list[str]) -> tuple[list[str | None], np.ndarray]:
        padded = names + [""] * (GROUP["text"] - len(names))
        values = self.clip.encode_texts(padded)["embedding"].cpu().numpy()
        return [None] * len(names), values


class SearchActor:
    """Searches blocks of queries, streaming the gallery past each."""

    def __init__(self, gallery: Gallery, k: int, kept: bool, device: str, counter: Any) -> None:
        self.gallery, self.k, self.kept, self.device = gallery, k, kept, device
        self.counter = counter

    def __call__(self, table: pa.Table) -> pa.Table:
        positions, queries = nearest.read_embeddings(table)
        truth = dict(zip(table["position"].to_pylist(), table["truth"].to_pylist(), strict=True))
        excluded = [[] if self.kept else truth[p][1:] for p in positions.tolist()]
        best: dict[int, list[int]] = {p: [] for p in truth}  # unreadable queries stay empty
        if len(positions):
            blocks = nearest.gallery_blocks(
                self.gallery.folder, self.gallery.shards, GALLERY[self.device]
            )
            found = nearest.top_k(queries, excluded, blocks, self.k, self.device)
            best |= {p: [c for c in line if c >= 0] for p, line in _lines(positions, found)}
        self.counter.add.remote(len(truth))
        columns = {"position": list(best), "candidates": list(best.values())}
        return pa.table(columns, schema=FOUND)


def _lines(positions: np.ndarray, found: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    return zip(positions.tolist(), found.tolist(), strict=True)


def _embed(
    work: str, kind: str, names: list[str], truth: list[list[int]],
    source: ClipSource, root: str, pool: Pool,
) -> Gallery:  # fmt: skip
    """Embed all items that are not embedded yet."""
    base = storage.join(work, f"{kind}s")
    folder, table = storage.join(base, "embeddings"), storage.join(base, "work.parquet")
    if not storage.exists(table):
        _write_groups(table, names, truth, GROUP[kind])
    groups = -(-len(names) // GROUP[kind])
    rows = min(GROUPS_PER_BLOCK, -(-groups // (BLOCKS_PER_ACTOR * pool.min_actors)))
    inputs = [storage.filesystem(table)[1]]
    what = f"embedding {'images' if kind == 'image' else 'captions'}"
    stage = Stage(what, folder, EMBEDDINGS, inputs, "row", rows, -(-groups // rows), len(names))
    run_stage(stage, EmbedActor, (kind, source, root), pool)
    return Gallery(folder, storage.readable_parquet(folder)[0], len(names))


def _write_groups(uri: str, names: list[str], truth: list[list[int]], size: int) -> None:
    storage.make_folder(storage.parent(uri))
    found, path = storage.filesystem(uri)
    with found.open_output_stream(path + ".part") as sink, parquet.ParquetWriter(sink, WORK) as to:
        for row, s in enumerate(range(0, len(names), size)):
            columns = [[row], [s], [names[s : s + size]], [truth[s : s + size]]]
            to.write_table(pa.table(dict(zip(WORK.names, columns, strict=True)), schema=WORK))
    found.move(path + ".part", path)


def _search(config: Config, side: Side, queries: Gallery, gallery: Gallery, pool: Pool) -> str:
    """Search all queries that are not searched yet; the folder of what was found."""
    kept = config.keep_other_captions and side.direction == "text"
    folder = storage.join(
        storage.parent(queries.folder), f"top{config.top_k}{'-kept' if kept else ''}", "found"
    )
    most = config.block_size or QUERIES[pool.device]
    rows = min(most, -(-queries.size // (BLOCKS_PER_ACTOR * pool.min_actors)))
    what, blocks = f"{side.direction} retrieval", -(-queries.size // rows)
    stage = Stage(what, folder, FOUND, queries.shards, "position", rows, blocks, queries.size)
    run_stage(stage, SearchActor, (gallery, config.top_k, kept), pool)
    return folder


def _failures(gallery: Gallery) -> dict[int, str]:
    """Unreadable items by position, and why."""
    table = whole_files(gallery.folder, EMBEDDINGS).to_table(
        columns=["position", "failure"], filter=ds.field("failure").is_valid()
    )
    return dict(sorted(zip(*(column.to_pylist() for column in table.columns), strict=True)))


def _write(config: Config, out: str, side: Side, found: str, note: dict[str, Any]) -> None:
    """Write a list with its .info.json and say what it holds."""
    ending = "_text" if side.direction == "text" else ""
    uri, info_uri = _beside(out, f"{ending}.json"), _beside(out, f"{ending}.info.json")
    lines = _in_order(whole_files(found, FOUND))
    info = candidates.write_lists(uri, lines, side, config.top_k, config.insert_gold)
    candidates.write_info(
        info_uri, {"clip": note["clip"], "weights": note["weights"], **info, **note}
    )
    ceiling = "no query left"
    if info["queries"]:
        ceiling = f"recall ceiling {100 * info['recall_ceiling']:.1f}% "
        ceiling += f"({100 * info['low']:.1f} to {100 * info['high']:.1f})"
    lost = sum(failure["queries"] for failure in info["failures"])
    print(
        f"{side.direction} retrieval: {info['queries']:,} queries, {info['gallery']:,} candidates, "
        f"{ceiling}, {len(info['inserted']):,} gold inserted, {info['left_out']:,} left out, "
        f"{len(info['failures']):,} unreadable images ({lost:,} queries)"
    )
    print(f"  list {uri}\n  info {info_uri}")


def _in_order(found: ds.Dataset) -> Iterator[tuple[int, list[int]]]:
    """What was found by query position; DuckDB sorts on disk where it must."""
    connection = pairs.connect(found=found)
    query = "SELECT position, candidates FROM found ORDER BY position"
    for batch in connection.sql(query).to_arrow_reader(pairs.BATCH):
        yield from zip(batch["position"].to_pylist(), batch["candidates"].to_pylist(), strict=True)
