"""A Self-Bench of one's own: models make pictures of prompts, and each model is scored on all of them."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from diffitm.commands import gdbench
from diffitm.commands.entrance import entered
from diffitm.commands.models import find_sources, make_specs, open_stores, paths_read
from diffitm.core import storage
from diffitm.core.config import option
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint, record
from diffitm.core.registry import load
from diffitm.evaluation.examples import write_examples
from diffitm.evaluation.options import MOST, GdbenchConfig, ModelOptions, check_models
from diffitm.models.denoiser import Denoiser
from diffitm.models.families import FAMILIES
from diffitm.models.loading import ModelSource
from diffitm.report.matrix import Generated
from diffitm.scoring.specs import DiffusionSpec, Spec
from diffitm.tasks import selfbench
from diffitm.tasks.registry import find_task
from diffitm.tasks.selfbench import Prompt

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other pictures
OF_CORRECT = "-correct"  # how tasks of a model's correct pictures end
OF_PICTURES = (
    *("weights", "variant", "lora", "dtype", "prediction_type", "vae", "resolution"),
    "around_texts",
)


@dataclass(frozen=True)
class SelfbenchConfig(ModelOptions):
    """Options of pipelines/selfbench.py."""

    prompts: str = option(
        "shapes", "GenEval's evaluation_metadata.jsonl or lines of its form; shapes: of that world"
    )
    tags: list[str] = option([], "prompts of these tags alone, such as colors position")
    limit: int | None = option(None, "at most this many prompts a tag, evenly spread", at_least=1)
    samples: int = option(4, "pictures of a prompt", at_least=1)
    sampling_steps: int = option(25, "steps of the sampler for a picture", at_least=1)
    guidance: list[float] = option(
        [9.0], "classifier-free guidance of the pictures, one or one for each --model"
    )
    picture_seed: int = option(0, "base seed of the pictures", at_least=0, at_most=MOST)
    pictures_at_once: int = option(
        1, "pictures of a prompt in one batch; more may change a colour by 1 of 255", at_least=1
    )
    labels: str | None = option(
        None, "a table with image and correct (true or false): also score the correct ones alone"
    )
    out: str = option("out/selfbench", "folder or URI for pictures, scores and the report")


class Maker(NamedTuple):
    """A model that makes pictures: its spec, guidance, and the folder below OUT."""

    spec: DiffusionSpec
    guidance: float
    folder: str

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return self.folder.rpartition("/")[2]


def run(config: SelfbenchConfig) -> None:
    """Make the pictures that are missing, score every model on all of them and report.

    Raises InputError for bad input before anything is made, Incomplete as gdbench does.
    """
    _check(config)
    prompts = read_prompts(config)
    out = storage.absolute(config.out)
    with entered(config, out, paths_read(config)):
        _run(config, prompts, out)


def read_prompts(config: SelfbenchConfig) -> list[tuple[Prompt, tuple[str, ...]]]:
    """The chosen prompts, each with the texts that its pictures are compared with. Raises InputError."""
    if config.prompts == "shapes":
        from diffitm.shapes.prompts import shape_prompts

        found = selfbench.make_prompts(shape_prompts(), "shapes")
    else:
        found = selfbench.read_prompts(storage.absolute(config.prompts))
    kept = selfbench.chosen(found, config.tags, config.limit)
    # Among all of the file, so that a picture has the same candidates whatever was chosen.
    tags = {prompt.tag for prompt in kept}
    known = [prompt.index for prompt in found if prompt.tag in tags]
    texts = dict(zip(known, selfbench.candidates(found, tags), strict=True))
    return [(prompt, texts[prompt.index]) for prompt in kept]


def _run(config: SelfbenchConfig, prompts: list[tuple[Prompt, tuple[str, ...]]], out: str) -> None:
    """See run; OUT is held."""
    sources = find_sources(config)
    for source in sources.models:
        check_makes(source)
    specs, pool = make_specs(config, sources, out, out)
    makers = find_makers(config, sources.models, specs)
    lines = [selfbench.choices(prompts, maker.folder, config.samples) for maker in makers]
    labels = None
    if config.labels:
        known = [line["image"] for own in lines for line in own]
        # Those of prompts that were not chosen this time, too.
        known += [picture for maker in makers for picture in pictures_of(maker, out)]
        labels = selfbench.read_labels(storage.absolute(config.labels), known)
    settings = {maker.folder: keep_settings(config, maker, prompts, out) for maker in makers}
    for maker in makers:
        make_pictures(config, maker, [prompt for prompt, _ in prompts], out, pool)
    generated: dict[str, Generated] = {}  # by the file of the task
    for maker, own in zip(makers, lines, strict=True):
        generated |= write_tasks(maker, own, labels, out)
    options = {f.name: getattr(config, f.name) for f in fields(ModelOptions)}
    scored = GdbenchConfig(**options, tasks=list(generated), data=out, out=out)
    examples = write_examples(scored.tasks, out, out)
    stores = open_stores(specs, out, out)
    prepared = gdbench.Prepared(scored, out, out, examples, specs, stores, pool)
    more = {"selfbench": record(asdict(config))["config"], "pictures": settings}
    gdbench.score_and_report(prepared, list(generated.values()), more)


def _check(config: SelfbenchConfig) -> None:
    """All problems of the options together."""
    problems = check_models(config)
    if not config.model:
        problems.append("give a --model, whose pictures all others are scored on, too")
    counts = len(config.guidance), len(dict.fromkeys(config.model))
    if counts[0] not in (1, counts[1]):
        problems.append(
            f"--guidance: {counts[0]} for {counts[1]} of --model; give one, or one each"
        )
    problems += [
        f"--guidance {guidance}: must be 0 or more"
        for guidance in config.guidance
        if not guidance >= 0
    ]
    if config.labels and not storage.exists(storage.absolute(config.labels)):
        problems.append(f"--labels: there is no file {storage.absolute(config.labels)}")
    if problems:
        raise InputError("\n".join(problems))


def check_makes(source: ModelSource) -> None:
    """Raises InputError for a model that makes no pictures of texts."""
    kind = load(FAMILIES[source.family].denoiser)
    if kind.generate is Denoiser.generate:
        able = [
            n for n, f in FAMILIES.items() if load(f.denoiser).generate is not Denoiser.generate
        ]
        raise InputError(
            f"{source.name!r}: a {source.family} makes no pictures of texts here, as do {', '.join(able)}",
            source.field,
        )


def find_makers(
    config: SelfbenchConfig, models: Sequence[ModelSource], specs: Sequence[Spec]
) -> list[Maker]:
    """Each model and LoRA once, whatever the timesteps that it is scored at; models whose names end alike are
    called by all of their names. Raises InputError for two of the same name."""
    guidances = dict(zip((m.name for m in models), config.guidance * len(models), strict=False))
    found: dict[str, Maker] = {}
    labels: dict[str, str] = {}
    makers = {spec.label: spec for spec in specs if isinstance(spec, DiffusionSpec)}
    ends = Counter(map(_name, makers.values()))
    for spec in makers.values():
        name, guidance = _name(spec), guidances[spec.source.name]
        if ends[name] > 1:
            name = _name(spec, whole=True)
        if labels.setdefault(name, spec.label) != spec.label:
            raise InputError(
                f"pictures of {labels[name]} and {spec.label} both lie in {name}: rename one"
            )
        found.setdefault(name, Maker(spec, guidance, selfbench.folder_of(guidance, name)))
    for name in found:
        if (other := f"{name}{OF_CORRECT}") in found:
            raise InputError(
                f"the correct pictures of {labels[name]} and all of {labels[other]} are both the task "
                f"by_{other}: rename one"
            )
    return list(found.values())


def pictures_of(maker: Maker, out: str) -> list[str]:
    """The pictures that lie in a model's folder, by their paths below `out`."""
    names = storage.sizes(storage.join(out, maker.folder), recursive=True)
    return [f"{maker.folder}/{name}" for name in names if name.endswith(".png")]


def _name(spec: DiffusionSpec, whole: bool = False) -> str:
    """The last part of a model's name and, of a LoRA's, the last two without the ending, or the whole."""
    name = spec.source.name
    parts = [name.strip("/").replace("/", "--") if whole else storage.name(name)]
    if spec.lora_name:
        lora = spec.lora_name.removesuffix(".safetensors").rstrip("/").split("/")
        parts.append("-".join(lora if whole else lora[-2:]))
    return re.sub(r"[^\w.-]+", "_", "+".join(parts)).strip("._") or "model"


def keep_settings(
    config: SelfbenchConfig, maker: Maker, prompts: Sequence[tuple[Prompt, Any]], out: str
) -> dict[str, Any]:
    """What a folder's pictures depend on, noted there. Raises InputError where it holds pictures of other
    settings or prompts."""
    known = maker.spec.store_config()
    settings: dict[str, Any] = {
        "version": VERSION,
        **{key: known[key] for key in OF_PICTURES if key in known},
        "sampling_steps": config.sampling_steps,
        "guidance": maker.guidance,
        "picture_seed": config.picture_seed,
    }
    own = {str(prompt.index): fingerprint(prompt.fields)[:12] for prompt, _ in prompts}
    folder = storage.join(out, maker.folder)
    where = storage.join(folder, selfbench.SETTINGS)
    # Beside the tasks, too: pictures that somebody deleted were scored, and scores know them by their paths.
    kept = storage.join(out, "tasks", f"{maker.folder.replace('/', '_')}.json")
    notes = [uri for uri in (where, kept) if storage.exists(uri)]
    if where not in notes and pictures_of(maker, out):
        raise InputError(
            f"{folder} holds pictures and no {selfbench.SETTINGS}, so others than this command's: give "
            "another --out"
        )
    for uri in notes:
        there = json.loads(storage.read_text(uri))
        for key in dict.fromkeys([*there["settings"], *settings]):
            if (had := there["settings"].get(key)) != (asked := settings.get(key)):
                raise InputError(
                    f"{folder} holds pictures of {key} {had}, or did, not {asked}: give another --out, or "
                    f"the same settings (noted in {uri})"
                )
        for index, digest in own.items():
            if there["prompts"].get(index, digest) != digest:
                raise InputError(
                    f"{folder} holds pictures of another prompt {index}, or did, than {config.prompts} has: "
                    f"give another --out (noted in {uri})"
                )
        own = {**there["prompts"], **own}
    for uri in (kept, where):
        storage.write_text(uri, json.dumps({"settings": settings, "prompts": own}, indent=1))
    return settings


def make_pictures(
    config: SelfbenchConfig, maker: Maker, prompts: Sequence[Prompt], out: str, pool: ActorPool
) -> None:
    """The pictures that are not there whole, and each prompt's metadata.jsonl."""
    from diffitm.commands.stages.pictures import Picture, Sampler, lacking, make

    there = storage.sizes(storage.join(out, maker.folder), recursive=True)
    for prompt in prompts:
        name = f"{selfbench.place_of(prompt.index)}/{selfbench.METADATA}"
        if name not in there:
            text = f"{json.dumps(prompt.fields)}\n"
            storage.write_text(storage.join(out, maker.folder, name), text)
    asked = [
        Picture(
            f"{maker.folder}/{selfbench.picture_of(prompt.index, number)}",
            prompt.text,
            selfbench.picture_seed(config.picture_seed, prompt.index, number),
        )
        for prompt in prompts
        for number in range(config.samples)
    ]
    left = lacking(out, maker.folder, asked)
    if not left:
        log.info("%s: all %s pictures are there", maker.spec.label, f"{len(asked):,}")
        return
    how = Sampler(config.sampling_steps, maker.guidance, config.pictures_at_once)
    make(maker.name, maker.spec, how, out, left, pool)


def write_tasks(
    maker: Maker, lines: Sequence[dict[str, Any]], labels: dict[str, bool] | None, out: str
) -> dict[str, Generated]:
    """A model's pictures as a task of choices, and its correct ones as another: their files."""
    shown: dict[str, list[str]] = {}
    tags: dict[str, str] = {}
    for line in lines:
        prompt = line["texts"][line["right"]]
        if tags.setdefault(line["tag"], prompt) == prompt:  # the first of each tag
            shown.setdefault(prompt, []).append(line["image"])
    sets = [("", list(lines))]
    if labels is not None:
        right = [line for line in lines if labels.get(line["image"])]
        labelled = sum(line["image"] in labels for line in lines)
        text = "%s: %s of %s pictures are labelled, %s of them correct"
        counts = (f"{n:,}" for n in (labelled, len(lines), len(right)))
        log.info(text, maker.spec.label, *counts)
        if right:
            sets.append((OF_CORRECT, right))
    found = {}
    for end, kept in sets:
        uri = storage.join(out, "tasks", f"by_{maker.name}{end}.jsonl")
        storage.write_text(uri, "".join(f"{json.dumps(line)}\n" for line in kept))
        named = find_task(uri).name
        found[uri] = Generated(named, maker.spec.label, bool(end), {} if end else shown)
    return found
