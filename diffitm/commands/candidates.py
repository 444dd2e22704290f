"""Candidate lists of a CLIP: embed images and captions, search each among the others, write lists."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from diffitm.captions.read import find_absent, image_root, listed
from diffitm.commands.entrance import entered
from diffitm.commands.stages import embed
from diffitm.commands.weights import share
from diffitm.core import storage
from diffitm.core.config import OnActors, find_outside, lacking, option
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.distributed import session
from diffitm.distributed.item_stage import work_folder
from diffitm.distributed.stages import whole_files
from diffitm.retrieval import candidate_lists
from diffitm.retrieval.candidate_lists import FOUND, Captions, Side

if TYPE_CHECKING:
    from diffitm.models.clip import ClipSource

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other embeddings or lists


@dataclass(frozen=True)
class CandidatesConfig(OnActors):
    """Options of pipelines/candidates.py."""

    clip: str = option("", "the CLIP: shapes, NAME:TAG, NAME:FILE or a folder, or their URIs")
    images: str | None = option(
        None, "folder or URI that a table's image paths start from (default: the table's own)"
    )
    captions: str = option(
        "", "a table, a folder of images or .tar shards, or its URI: see docs/data.md"
    )
    out: str = option("out/candidates/val_top10.json", "image lists; text lists end in _text.json")
    top_k: int = option(10, "candidates of a list", at_least=2)
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
    block_size: int | None = option(
        None, "queries searched at once: memory, never the result", at_least=1
    )


def run(config: CandidatesConfig) -> None:
    """Embed what is missing, search, and write both lists and their .info.json.

    Raises InputError for bad input, before anything is embedded where that is possible; Incomplete at
    the end if images could not be read.
    """
    _check(config)
    captions = storage.absolute(config.captions)
    root = image_root(captions, config.images, "captions")
    read = [("--images" if config.images else "--captions", root), ("--clip", config.clip)]
    read.append(("--clip", config.clip.partition(":")[2]))
    out = storage.absolute(config.out)
    with entered(config, out, read, is_file=True):
        _run(config, captions, root, out)


def _run(config: CandidatesConfig, captions: str, root: str, out: str) -> None:
    """See run, with OUT held."""
    from diffitm.models.clip import resolve_clip
    from diffitm.models.text_limits import tell_long_texts

    source = resolve_clip(config.clip)
    known = candidate_lists.read_captions(captions)
    known = replace(known, images=embed.located(root, known.images))
    log.info("%s images, %s captions", f"{len(known.images):,}", f"{len(known.captions):,}")
    session.connect(config.ray, verbose=config.verbose)
    pool = session.choose_pool(
        config.actors, config.max_actors, config.cpus_per_actor, config.gpus_per_actor
    )
    source = share(source, storage.join(storage.parent(out), "work"))
    tell_long_texts(source, known.captions)
    work = _work_folder(out, source, root, known, pool.device)
    pictures = embed.embed(work, "image", known.images, known.of_image, source, root, pool)
    texts = embed.embed(work, "text", known.captions, known.of_caption, source, root, pool)
    failed = embed.failures(pictures)
    if len(failed) == len(known.images):
        raise InputError(f"no image of {config.captions} could be read: {failed[0]}")
    prefix = _way(root, out) if config.prefix is None else config.prefix
    named = [prefix + path for path in known.images]
    note = {
        "clip": source.name,
        "weights": source.digest,
        "other_captions_kept": config.keep_other_captions,
        "lost": listed(known.lost),
        "provenance": record(asdict(config)),
    }
    for side, queries, gallery in (
        (Side("image", known.captions, named, known.of_caption, failed), texts, pictures),
        (Side("text", named, known.captions, known.of_image, failed), pictures, texts),
    ):
        kept = config.keep_other_captions and side.direction == "text"
        found = embed.search(
            f"{side.direction} retrieval", f"top{config.top_k}{'-kept' if kept else ''}",
            queries, gallery, config.top_k, None if kept else 1, pool, config.block_size,
        )  # fmt: skip
        _write(config, out, side, found, note)
    where = _beside(out, ".info.json")
    if failed:
        print(f"{len(failed)} unreadable images are tried again once {work} is deleted")
    if known.lost:
        print(f"{len(known.lost):,} images or captions of {captions} were left out")
    if count := len(failed) + len(known.lost):
        raise Incomplete(
            f"{count:,} images or captions could not be used; they are listed in {where}"
        )


def _check(config: CandidatesConfig) -> None:
    """All problems of the options together."""
    needed = {"clip": "RN50x64:openai", "captions": "FILE"}
    problems = lacking(config, needed)
    if config.images and not storage.exists(storage.absolute(config.images)):
        problems.append(f"--images: there is no folder {storage.absolute(config.images)}")
    problems += find_absent(config.captions, "captions")
    if not storage.without_query(config.out).endswith(".json") or storage.without_query(
        config.out
    ).endswith("_text.json"):
        problems.append(f"--out {config.out}: must end in .json, and not in _text.json")
    out = storage.absolute(config.out)
    written = [out, *(_beside(out, end) for end in ("_text.json", ".info.json", "_text.info.json"))]
    if config.captions and storage.absolute(config.captions) in written:
        problems.append(f"--out {config.out}: would replace the captions file {config.captions}")
    problems += find_outside(config)
    if problems:
        raise InputError("\n".join(problems))


def _beside(out: str, ending: str) -> str:
    """The file beside `out` whose name has another ending than .json."""
    name = storage.without_query(out)
    return name.removesuffix(".json") + ending + out[len(name) :]


def _way(root: str, out: str) -> str:
    """From the data root, the folder above that of `out`, to the images; '' if they lie elsewhere."""
    data = storage.parent(storage.parent(out))
    return f"{root[len(data) :].strip('/')}/" if root.startswith(f"{data.rstrip('/')}/") else ""


def _work_folder(out: str, source: ClipSource, root: str, known: Captions, device: str) -> str:
    """Named by everything that an embedding depends on."""
    settings = {
        "version": VERSION,
        "clip": [source.digest, source.quick_gelu],
        "images": storage.without_query(root),
        "captions": known.digest,
        "device": device,
        "groups": embed.GROUP,
    }
    return work_folder(out, "candidates", settings)


def _write(
    config: CandidatesConfig, out: str, side: Side, found: str, note: dict[str, Any]
) -> None:
    """Write a list with its .info.json and say what it holds."""
    ending = "_text" if side.direction == "text" else ""
    uri, info_uri = _beside(out, f"{ending}.json"), _beside(out, f"{ending}.info.json")
    lines = embed.in_order(whole_files(found, FOUND))
    info = candidate_lists.write_lists(uri, lines, side, config.top_k, config.insert_gold)
    candidate_lists.write_info(
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
