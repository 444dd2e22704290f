"""Hard negatives for a captions file: by rule, by a language model, and CLIP's near images.

Each kind is a stage of its own below work/, named by all that it depends on, so that an interrupted
run goes on and another model or seed does not undo the rest.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffitm import negatives
from diffitm.captions.read import find_absent, image_root, listed
from diffitm.captions.row import CaptionRow
from diffitm.commands.entrance import entered
from diffitm.commands.stages import embed, propose
from diffitm.commands.weights import share
from diffitm.core import storage
from diffitm.core.config import OnActors, find_outside, lacking, option
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import fingerprint, record
from diffitm.distributed import session
from diffitm.distributed.item_stage import work_folder
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import whole_files
from diffitm.negatives import merge, rules
from diffitm.retrieval import candidate_lists
from diffitm.retrieval.candidate_lists import FOUND
from diffitm.training.rows import TrainingRow

if TYPE_CHECKING:
    from diffitm.models.causal_lm import LanguageSource
    from diffitm.models.clip import ClipSource

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other negatives
PROMPT = Path(negatives.__file__).with_name("prompt.txt")


@dataclass(frozen=True)
class NegativesConfig(OnActors):
    """Options of pipelines/negatives.py."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "softneg-sd15": {"kinds": ["rules", "llm"], "llm": "meta-llama/Llama-3.1-8B-Instruct"}
    }

    preset: str | None = option(None, "softneg-sd15: rules and LLaMA, see docs/negatives.md")
    captions: str = option("", "a table, a folder of images or .tar shards: see docs/data.md")
    out: str = option("", "file to write, .tsv or .parquet; its .info.json lies beside it")
    kinds: list[Literal["rules", "llm", "images"]] = option(["rules"], "rules, llm, images")
    llm: str | None = option(None, "kind llm: folder, URI or Hub id of an instruct model")
    prompt: str | None = option(None, "kind llm: text file with {caption} (default: our own)")
    temperature: float = option(
        0.0, "kind llm: 0 takes the likeliest word, above it samples", at_least=0
    )
    max_new_tokens: int = option(
        80, "kind llm: tokens after which an answer is cut off", at_least=1
    )
    batch_size: int | None = option(
        None, "kind llm: prompts of a forward, less to save memory", at_least=1
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "kind llm: auto is bf16 on a GPU, else fp32"
    )
    clip: str | None = option(
        None, "kind images: shapes, NAME:TAG, NAME:FILE or a folder, or their URIs"
    )
    images: str | None = option(
        None, "kind images: where a table's image paths start (default: its own folder)"
    )
    near: int = option(3, "kind images: near images of an image", at_least=1)
    keep_given: bool = option(True, "keep the negatives that the file has already")
    seed: int = option(0, "of rules, and of samples at a temperature above 0", at_least=0)


@dataclass(frozen=True)
class Inputs:
    """What was checked before work starts; `places` are image paths below `root`, by image."""

    rows: list[TrainingRow]
    captions: list[str]
    template: str
    language: LanguageSource | None
    clip: ClipSource | None
    root: str
    places: dict[str, str]
    lost: list[CaptionRow]


def run(config: NegativesConfig) -> None:
    """Make the negatives that are missing and write them with what they are.

    Raises InputError for bad input, before anything is made where that is possible; Incomplete at the
    end if images could not be read.
    """
    _check(config)
    read = [("--images", config.images), ("--clip", config.clip), ("--llm", config.llm)]
    if config.clip:
        captions = storage.absolute(config.captions)
        read[0] = ("--images", image_root(captions, config.images, "captions"))
    read.append(("--clip", (config.clip or "").partition(":")[2]))
    out = storage.absolute(config.out)
    with entered(config, out, read, is_file=True):
        _run(config, out)


def _run(config: NegativesConfig, out: str) -> None:
    """See run, with OUT held."""
    given = _read(config)
    rows, captions = given.rows, given.captions
    log.info("%s rows, %s captions", f"{len(rows):,}", f"{len(captions):,}")
    session.connect(config.ray, verbose=config.verbose)
    work = storage.join(storage.parent(out), "work")
    language = share(given.language, work) if given.language else None
    given = replace(given, language=language, clip=share(given.clip, work) if given.clip else None)
    made: dict[str, dict[str, str]] = {}
    answers: dict[str, tuple[str, str | None]] = {}
    if "rules" in config.kinds:
        made = propose.by_rule(out, captions, config.seed, _pool(config, 0.0))
    if given.language:
        answers = _answers(config, given.language, given, out)
    near, unreadable = _near(config, given, out) if given.clip else ({}, {})
    check = rules.checker(given.template)
    done, kinds, rejected = merge.mine(rows, made, answers, near, check)
    merge.write_rows(out, done, kinds)
    info = {
        "sha256": hashlib.sha256(storage.read_bytes(out)).hexdigest(),
        "rows": len(rows),
        "captions": len(captions),
        "negative_captions": dict(Counter(kind for line in kinds for kind in line)),
        "negative_images": sum(len(row.negative_images) for row in done),
        "rows_without_negative_caption": sum(not row.negative_captions for row in done),
        "rows_without_negative_image": sum(not row.negative_images for row in done),
        "rejected": dict(Counter(f"{item.kind}: {item.reason}" for item in rejected)),
        "unreadable_images": unreadable,
        "lost": listed(given.lost),
        "llm": _told(given.language) if given.language else None,
        "prompt": given.template if given.language else None,
        "clip": _told(given.clip) if given.clip else None,
        "provenance": record(asdict(config)),
        "rejected_captions": [asdict(item) for item in rejected],
    }
    info_uri = _info_uri(out)
    candidate_lists.write_info(info_uri, info)
    _tell(info)
    print(f"  negatives {out}\n  info {info_uri}")
    if count := len(unreadable) + len(given.lost):
        raise Incomplete(
            f"{count:,} images or captions could not be used; they are listed in {info_uri}"
        )


def _check(config: NegativesConfig) -> None:
    """All problems of the options together."""
    problems = lacking(config, {"captions": "FILE", "out": "FILE.parquet"})
    problems += find_absent(config.captions, "captions")
    for name in ("prompt", "images"):
        value = getattr(config, name)
        if value and not storage.exists(storage.absolute(value)):
            problems.append(f"--{name}: there is no file or folder {storage.absolute(value)}")
    if config.out and not storage.without_query(config.out).endswith((".tsv", ".parquet")):
        problems.append(f"--out {config.out}: must end in .tsv or .parquet")
    out = storage.absolute(config.out)
    if config.captions and storage.absolute(config.captions) in (out, _info_uri(out)):
        problems.append(f"--out {config.out}: would replace the captions file {config.captions}")
    for kind, needed, others in (
        ("llm", ("llm",), ("prompt",)),
        ("images", ("clip",), ("images",)),
    ):
        asked = kind in config.kinds
        problems += [
            f"--kinds {kind} needs --{o}" for o in needed if asked and not getattr(config, o)
        ]
        useless = [o for o in (*needed, *others) if getattr(config, o) and not asked]
        problems += [f"--{o} is for --kinds {kind}, which is not asked for" for o in useless]
    problems += find_outside(config)
    if problems:
        raise InputError("\n".join(problems))


def _read(config: NegativesConfig) -> Inputs:
    """Read and check everything that a run needs."""
    template = _template(config.prompt)
    source = storage.absolute(config.captions)
    rows, lost = merge.read_pairs(source)
    if not config.keep_given:
        rows = [replace(row, negative_captions=(), negative_images=()) for row in rows]
    lines = merge.first_lines(rows)
    if storage.without_query(config.out).endswith(".tsv"):
        for number, row in enumerate(rows):
            for image in row.negative_images:
                if image not in lines:
                    raise InputError(
                        f"{config.captions}, row {number}: negative image {image!r} is the image of "
                        "no row, so a .tsv cannot name it; give an --out that ends in .parquet"
                    )
    language, clip, root, places = None, None, "", dict[str, str]()
    if config.llm:
        from diffitm.models.causal_lm import resolve_language_model

        language = resolve_language_model(config.llm)
    if config.clip:
        from diffitm.models.clip import resolve_clip

        clip, root = resolve_clip(config.clip), image_root(source, config.images, "captions")
        if len(lines) < 2:
            raise InputError(f"--captions {config.captions}: near images need two images or more")
        places = dict(zip(lines, embed.located(root, list(lines)), strict=True))
    captions = list(dict.fromkeys(row.caption for row in rows))
    return Inputs(rows, captions, template, language, clip, root, places, lost)


def _template(path: str | None) -> str:
    """The prompt's text. Raises InputError if it has no place for the caption."""
    uri = storage.absolute(path) if path else str(PROMPT)
    try:
        text = storage.read_text(uri).rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt: {uri} cannot be read: {error}") from error
    if text.count("{caption}") != 1:
        found = text.count("{caption}")
        raise InputError(
            f"--prompt {uri}: must hold {{caption}} once, where it goes; found {found}"
        )
    return text


def _info_uri(out: str) -> str:
    name = storage.without_query(out).rpartition("/")[2].rpartition(".")[0]
    return storage.join(storage.parent(out), f"{name}.info.json")


def _told(source: LanguageSource | ClipSource) -> dict[str, Any]:
    """A model for the .info.json."""
    return {k: v for k, v in asdict(source).items() if k != "weights"}


def _pool(config: NegativesConfig, gpus: float | None) -> ActorPool:
    return session.choose_pool(config.actors, config.max_actors, config.cpus_per_actor, gpus)


def _answers(
    config: NegativesConfig, source: LanguageSource, given: Inputs, out: str
) -> dict[str, tuple[str, str | None]]:
    """A language model's answers: caption -> text and problem."""
    pool = _pool(config, config.gpus_per_actor)
    if not (pool.gpus or config.actors or config.cpus_per_actor):
        # One copy of the model with all processors: copies for each would fill the memory.
        cpus = pool.max_actors * pool.cpus
        pool = ActorPool(1, 1, cpus if cpus < 1 else float(int(cpus)), 0.0)
    dtype = config.dtype if config.dtype != "auto" else ("bf16" if pool.gpus else "fp32")
    sampling = (config.temperature, config.seed if config.temperature else 0)
    asked = propose.Question(source, given.template, dtype, *sampling, config.max_new_tokens)
    return propose.by_model(out, given.captions, asked, config.batch_size, pool)


def _near(
    config: NegativesConfig, given: Inputs, out: str
) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Each image's near images, and the unreadable images with their reasons."""
    assert given.clip is not None
    names, pool = list(given.places), _pool(config, config.gpus_per_actor)
    truth = _related(given.rows, names)
    settings = {
        "version": VERSION,
        "clip": [given.clip.digest, given.clip.quick_gelu],
        "images": given.root,
        "related": fingerprint([list(given.places.values()), truth]),
        "device": pool.device,
        "groups": embed.GROUP["image"],
    }
    work = work_folder(out, "negatives-images", settings)
    places = list(given.places.values())
    gallery = embed.embed(work, "image", places, truth, given.clip, given.root, pool)
    failed = embed.failures(gallery)
    if len(failed) == len(names):
        raise InputError(f"no image of {config.captions} could be read: {failed[0]}")
    folder = embed.search(
        "near images", f"near{config.near}", gallery, gallery, config.near, 0, pool
    )
    found = embed.in_order(whole_files(folder, FOUND))
    near = {names[image]: [names[other] for other in others] for image, others in found}
    return near, [{"image": names[i], "reason": reason} for i, reason in failed.items()]


def _related(rows: Iterable[TrainingRow], names: list[str]) -> list[list[int]]:
    """For each image itself and the others that have a caption of the same words."""
    place = {name: i for i, name in enumerate(names)}
    said: dict[str, set[int]] = {}
    for row in rows:
        said.setdefault(rules.normal(row.caption), set()).add(place[row.image])
    related = [{i} for i in range(len(names))]
    for same in said.values():
        if len(same) > 1:
            for i in same:
                related[i] |= same
    return [sorted(others) for others in related]


def _tell(info: dict[str, Any]) -> None:
    """What was made and what was left out."""
    counts = ", ".join(f"{n:,} {kind}" for kind, n in info["negative_captions"].items())
    print(f"{info['rows']:,} rows: negative captions {counts or 'none'}")
    print(f"  {info['negative_images']:,} negative images")
    for reason, count in sorted(info["rejected"].items(), key=lambda item: -item[1]):
        print(f"  left out: {count:,} {reason}")
    if info["unreadable_images"]:
        print(f"  {len(info['unreadable_images']):,} unreadable images")
    if info["lost"]:
        print(f"  left out of the captions: {len(info['lost']):,}")
