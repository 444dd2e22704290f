"""Score images against texts, and models on benchmarks, from Python: in this process, without Ray."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from diffitm.core import images as image_files
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.lease import held
from diffitm.core.schema import SCORES, PairRow, block_rows, read_block
from diffitm.metrics.score import averaged, conditional_score, normalised_score, other_dtype
from diffitm.scoring.custom import CustomSpec, find_scorer, is_own
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.protocols import choose_protocol, error_of_protocol, planned
from diffitm.scoring.racing import RacePlan, Racing
from diffitm.scoring.scorer import RowScorer
from diffitm.scoring.specs import ClipSpec, DiffusionSpec, DptSpec, Spec

if TYPE_CHECKING:
    import pandas as pd

    from diffitm.evaluation.examples import Examples
    from diffitm.evaluation.race_table import Races
    from diffitm.evaluation.races import RaceOptions
    from diffitm.scoring.diffusion import DiffusionScorer
    from diffitm.store.score_store import Store

log = logging.getLogger("diffitm")
T = TypeVar("T")
Picture = str | Path | Image.Image | np.ndarray
Kind = Literal["auto", "conditional", "normalised"]
AT_ONCE = 16  # images
TEXTS_AT_ONCE = 64  # of each
REPORT_EVERY = 10.0  # seconds between two lines of a log


class ImageTextScorer:
    """A loaded model that scores images against texts; load_scorer makes one.

    `name` is the model's in tables, `timesteps` are those of a diffusion model, none of another.
    """

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device = spec, device
        self.rows: RowScorer = spec.build(device)
        self.name: str = spec.label
        self.timesteps: tuple[float, ...] = getattr(spec, "timesteps", ())

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        score: Kind = "auto",
    ) -> np.ndarray:
        """Scores, higher is better.

        Args:
            images: paths, URIs, PIL images or uint8 arrays [H, W, 3].
            texts: captions; one that is longer than the model reads is cut, which is logged by name.
            score: of a diffusion model 'normalised' (minus the error with the text, plus that without
                one: DiffusionITM, eq. 5), which compares images as well as texts, or 'conditional'
                (minus the error with the text), which compares the texts of an image at fewer forwards.
                'auto' is normalised. Other models have one kind.

        Returns:
            float32 [images, texts].

        Raises:
            InputError: an image that cannot be read or a text that the model refuses, by its place.
        """
        if score != "auto" and not self.timesteps:
            raise InputError(f"{score!r}: only diffusion models have more than one kind", "score")
        images, texts = _listed(images), _listed(texts)
        if not self.timesteps:
            return self._table(images, texts, "similarity")[..., 0]
        error: Any = error_of_protocol(self.spec.protocol)  # type: ignore[attr-defined]
        if score == "conditional":
            errors = averaged(self.errors(images, texts, error).astype(float))
            return conditional_score(errors).astype(np.float32)
        errors = averaged(self.errors(images, [*texts, ""], error).astype(float))
        return normalised_score(errors[:, :-1], errors[:, -1:]).astype(np.float32)

    def errors(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        error: Literal["l2", "mse", "l1", "huber"] = "l2",
    ) -> np.ndarray:
        """A diffusion model's noise-prediction errors by timestep; the text '' is the unconditional one.

        Returns:
            float32 [images, texts, timesteps].

        Raises:
            InputError: as a call; a model without such errors.
        """
        if not self.timesteps:
            raise InputError(f"{self.name} has no errors by timestep, only a score", "scorer")
        return self._table(_listed(images), _listed(texts), error)

    def best(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        k: int = 1,
        *,
        of: Literal["image", "text"] = "image",
        racing: float = 0.01,
    ) -> np.ndarray:
        """The best texts of each image, or images of each text, by the normalised score of a diffusion model,
        found by a race: those that are worse beyond doubt are scored no further.

        Args:
            images: as a call's.
            texts: as a call's, each once.
            k: how many are the best.
            of: 'image' for the texts of each image, 'text' for the images of each text.
            racing: the probability that the k best of one are others than in full.

        Returns:
            int [images, k], numbers of texts, or [texts, k], numbers of images, in the order of the scores
            as far as they were scored. Of fewer than k candidates all, in the order given.

        Raises:
            InputError: as a call; a model without errors by timestep.
        """
        if not self.timesteps:
            raise InputError(f"{self.name} has no errors by timestep to race by", "scorer")
        images, texts = _listed(images), _listed(texts)
        self._check(texts)
        if k < 1:
            raise InputError(f"{k}: must be at least 1", "k")
        if len(set(texts)) < len(texts) or "" in texts:
            raise InputError(": each text once, and none of them empty", "texts")
        from diffitm.scoring.race_block import BlockRaces, all_with_all

        block = all_with_all(len(images), texts, k, of)
        error = error_of_protocol(self.spec.protocol)  # type: ignore[attr-defined]
        races = BlockRaces(
            cast("DiffusionScorer", self.rows),
            block,
            RacePlan(Racing(racing), self.timesteps, error),
            lambda names: (self._load(images[int(name)], int(name)) for name in names),
        )
        for number, reason in enumerate(races.refused):
            if reason is not None:
                raise InputError(f"[{number}] {texts[number]!r:.60}: {reason}", "texts")
        found = []
        for run in races.run():
            if not run.finite:
                raise InputError(
                    f"{self.name} gives errors that are not finite{self._hint}", "scorer"
                )
            found.append(run.race.best())
        return np.array(found, int).reshape(len(found), len(found[0]) if found else k)

    @property
    def _hint(self) -> str:
        return other_dtype(getattr(self.spec, "dtype", None), "dtype")

    def _check(self, texts: list[str]) -> None:
        """Raises InputError for what is no text; logs what is cut."""
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"[{number}]: {text!r:.60} is no text", "texts")
        for number in self.rows.cut(texts):
            log.warning(
                "texts[%d] %r: is longer than the model reads, and cut", number, texts[number]
            )

    def _table(self, images: list[Picture], texts: list[str], kind: str) -> np.ndarray:
        """Values of the score store's column, float32 [images, texts, timesteps or 1]."""
        self._check(texts)
        out = np.zeros((len(images), len(texts), len(self.timesteps) or 1), np.float32)
        unique = list(dict.fromkeys(texts))
        if not images or not unique:
            return out
        place = [unique.index(text) for text in texts]
        blocks = [range(s, min(s + AT_ONCE, len(images))) for s in range(0, len(images), AT_ONCE)]
        for block in progress(blocks, self.name, len(images)):
            loaded = [self._load(images[number], number) for number in block]
            rows = [PairRow(number, str(number), unique) for number in block]
            lines = {(x["row"], x["text"]): x for x in self.rows.score_loaded(rows, [loaded])}
            for number in block:
                values = [_value(lines[number, text], kind, text) for text in unique]
                out[number] = np.stack(values)[place]
        wrong = np.argwhere(~np.isfinite(out).all(2))
        if len(wrong):
            text = "%s: %d of %d pairs are NaN or infinite%s; such as images[%d] with texts[%d]"
            log.warning(text, self.name, len(wrong), out[..., 0].size, self._hint, *wrong[0])
        return out

    def _load(self, picture: Picture, number: int) -> Loaded:
        try:
            return Loaded(self.rows.prepare(read_image(picture)), None, None)
        except Exception as error:  # whatever a decoder raises
            what = repr(str(picture)) if isinstance(picture, str | Path) else type(picture).__name__
            gone = isinstance(error, FileNotFoundError)
            why = "there is no such file" if gone else f"{type(error).__name__}: {error}"
            raise InputError(f"[{number}] {what}: {why}", "images") from error


def _value(line: dict[str, Any], kind: str, text: str) -> np.ndarray:
    if line["failure"] is not None:
        raise InputError(f"{text!r}: {line['failure']}", "texts")
    if kind == "similarity":
        return np.array([line["similarity"]], np.float32)
    if kind == "mse":
        return np.asarray(line["l2"], np.float64) ** 2 / line["elements"]
    return np.asarray(line[kind])


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | Path | Image.Image | np.ndarray) else list(values)


def read_image(picture: Picture) -> Image.Image:
    """An upright RGB image of a path, a URI, a PIL image or a uint8 array [H, W, 3].

    Raises OSError or ValueError for what is none.
    """
    if isinstance(picture, str | Path):
        return image_files.decode(storage.read_bytes(str(picture)))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"an array is uint8 [H, W, 3], not {picture.dtype} {picture.shape}")
        return Image.fromarray(picture)
    return image_files.to_rgb(picture)


def load_scorer(
    name: str,
    *,
    device: str | None = None,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    protocol: Literal[
        "auto", "diffusionitm", "paper", "diffusion-classifier", "snr", "selfbench", "sigma"
    ] = "auto",
    timesteps: int | Sequence[float] = 10,
    seed: int = 0,
    resize: Literal["auto", "squash", "crop"] = "auto",
    lora: str | None = None,
    dpt: str | None = None,
    dpt_timestep: int = 500,
    variant: str | None = None,
    single_file_config: str | None = None,
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None,
    resolution: int | None = None,
    empty: Literal["text", "zeros"] = "text",
    batch_size: int = 64,
    compile: bool = False,
) -> ImageTextScorer:
    """Load what scores images against texts.

    Args:
        name: a diffusion model ('shapes', a diffusers folder, a model in one file, a URI of these, a Hub
            id), a CLIP ('NAME:TAG' or 'NAME:FILE' of open_clip, 'hf-hub:org/name', a folder with
            open_clip_config.json, 'clip:' and any of these, such as 'clip:shapes'), or a scorer of one's own
            ('file.py:Class').
        device: torch's; a GPU where there is one.
        dtype: of a diffusion model; 'auto' is fp16 on a GPU, bf16 of transformers, else fp32.
        protocol: how timesteps and noise are chosen, as in gdbench.
        timesteps: how many to ask the protocol for, or these; of flow models 1000 sigma.
        seed: of the noise.
        resize: 'squash' to a square or 'crop' the centre; 'auto' crops for diffusion-classifier.
        lora: a LoRA file for a diffusion model's U-Net.
        dpt: an adapter of finetune --objective dpt, file, folder or URI: the score is then DPT's, of one
            forward a pair; an adapter that was trained with a LoRA brings it.
        dpt_timestep: of that score.
        variant: of a diffusion model's files, such as 'fp16'.
        single_file_config: diffusers folder or Hub id whose configs a model in one file has; None for a Hub
            id that diffusers tells by the weights.
        prediction_type: what a diffusion model predicts, where its scheduler's config does not say it.
        resolution: side of images in pixels, of flow models; None for the model's own.
        empty: what no text is to a diffusion model: the encoded empty text, or zeros.
        batch_size: of forwards; one that does not fit a GPU's memory is halved.
        compile: a diffusion model by torch.compile, for batches of that size, which takes a minute or more at
            the first; smaller ones are filled up to it, so it is to be what a call has (images x texts x
            timesteps).

    Raises:
        InputError: a name that means nothing, weights that cannot be loaded, or an option out of range.
    """
    device = device or _device()
    if is_own(name):
        return ImageTextScorer(CustomSpec(find_scorer(name), ""), device)
    if _is_clip(name):
        from diffitm.models.clip import resolve_clip

        clip = resolve_clip(name.removeprefix("clip:")).fetched()
        return ImageTextScorer(ClipSpec(clip, "", batch_size), device)
    from diffitm.models.distilled import tell_untrained
    from diffitm.models.dpt_file import check_adapter, find_adapter
    from diffitm.models.families import FAMILIES
    from diffitm.models.loading import check_config_used, resolve
    from diffitm.models.lora import locate
    from diffitm.models.model_check import check_loadable, settled

    found = resolve(name, variant=variant, single_file_config=single_file_config)
    check_config_used(single_file_config, found)
    source = settled(found.fetched(), prediction_type, resolution)
    adapter = find_adapter(dpt, "dpt") if dpt else None
    if adapter and lora:
        text = ": an adapter brings the LoRA that it was trained with; leave it out"
        raise InputError(text, "lora")
    loras = [locate(lora)] if lora else []
    source = check_loadable(source, [adapter.lora] if adapter and adapter.lora else loras, variant)
    if resize == "auto":
        resize = "crop" if protocol == "diffusion-classifier" else "squash"
    family = FAMILIES[source.family]
    precision: str = dtype
    if dtype == "auto":
        precision = family.half if device.startswith("cuda") else "fp32"
    if adapter:
        check_adapter(adapter, source, "dpt")
        dpt_spec = DptSpec(
            source, adapter, "", dpt_timestep, seed, precision, resize,
            variant=variant, batch_size=batch_size,
        )  # fmt: skip
        return ImageTextScorer(dpt_spec, device)
    chosen = choose_protocol(protocol, family.flow)
    steps = planned(chosen, timesteps, seed) if isinstance(timesteps, int) else tuple(timesteps)
    spec = DiffusionSpec(
        source=source,
        root="",
        protocol=chosen,
        timesteps=tuple(map(float, steps)) if family.flow else steps,
        seed=seed,
        dtype=precision,
        resize=resize,
        variant=variant,
        lora=locate(lora) if lora else None,
        lora_name=lora,
        batch_size=batch_size,
        compiled=compile,
        empty=empty,
    )
    tell_untrained(spec.label, spec.timesteps)
    return ImageTextScorer(spec, device)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_clip(name: str) -> bool:
    if name.startswith(("clip:", "hf-hub:")):
        return True
    if storage.exists(storage.join(name, "open_clip_config.json")):
        return True
    model, colon, _ = name.partition(":")
    if not colon or "://" in name:
        return False
    import open_clip

    return model in open_clip.list_models()


def evaluate(
    scorer: ImageTextScorer | str,
    tasks: str | Sequence[str],
    data: str = "shapes",
    *,
    out: str | None = None,
    limit: int | None = None,
    scenes: int = 100,
    racing: float | None = None,
    racing_audit: float = 0.0,
) -> pd.DataFrame:
    """The figures of a model on tasks, as pipelines/gdbench.py computes them.

    Args:
        scorer: what load_scorer gives, or a name for it.
        tasks: names of tasks or suites, 'file.py:Class' of one's own, or the file of one, 'mine.jsonl'.
        data: the data root; 'shapes' draws the embedded world.
        out: a folder or URI that keeps examples and scores: what it holds is not scored again. Without
            one, nothing is kept.
        limit: examples of each task, evenly spread.
        scenes: that 'shapes' draws.
        racing: a diffusion model scores candidates only as far as their decision needs: the
            probability, such as 0.01, that one comes out otherwise than in full.
        racing_audit: share of the examples that is scored in full as well; what that found is logged.

    Returns:
        A row a figure: model, task, group, metric, score, value, low, high, n, failures and more.

    Raises:
        InputError: a task whose data is not there, an option out of range, another run that works on OUT,
            or as load_scorer.
    """
    if isinstance(scorer, str):
        scorer = load_scorer(scorer)
    options = None
    if racing is None and racing_audit:
        raise InputError("measures races: give racing", "racing_audit")
    if racing is not None:
        from diffitm.evaluation.races import RaceOptions

        options = RaceOptions(Racing(racing), racing_audit)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="diffitm-") as folder:
            return _evaluate(scorer, _listed(tasks), data, folder, limit, scenes, options)
    out = storage.absolute(out)
    with held(out):
        return _evaluate(scorer, _listed(tasks), data, out, limit, scenes, options)


def _evaluate(
    scorer: ImageTextScorer,
    tasks: list[str],
    data: str,
    out: str,
    limit: int | None,
    scenes: int,
    options: RaceOptions | None,
) -> pd.DataFrame:
    import pandas as pd

    from diffitm.evaluation.cut_texts import count_cut
    from diffitm.evaluation.evaluate import error_of
    from diffitm.evaluation.evaluate import evaluate as figures
    from diffitm.evaluation.examples import data_root, write_examples
    from diffitm.report.table import raced_note
    from diffitm.store.compaction import tidy
    from diffitm.store.score_store import open_store
    from diffitm.store.work_table import is_open
    from diffitm.tasks.registry import find_task, named

    tasks = named(tasks)
    root = data_root(data, scenes, out, tasks)
    examples = write_examples(tasks, root, out, limit)
    spec: Any = scorer.spec
    spec = dataclasses.replace(spec, root=root)
    store = open_store(out, spec.label, spec.store_config())
    scorer.rows.root = root
    plan = options.plan(store, error_of(store, "auto"), None) if options else None
    if options is None or plan is None:
        _score_missing(scorer, list(examples.values()), store, out)
    else:
        from diffitm.evaluation.race_table import Races

        races = Races(options, plan, {name: find_task(name)() for name in examples})
        _race_missing(scorer, examples, store, out, races)
    if not is_open(out, store):
        tidy(store)
    files = {name: part.uri for name, part in examples.items()}
    evaluation = figures(files, [store], racing=options)
    count_cut([spec], files)  # which warns
    if evaluation.races:
        log.info("%s", raced_note(evaluation.races))
    for line in evaluation.failures:
        log.warning("%s: example %s: %s", line["task"], line["example"], line["failure"])
    return pd.DataFrame([dataclasses.asdict(row) for row in evaluation.rows])


def _score_missing(
    scorer: ImageTextScorer, examples: Sequence[Examples], store: Store, out: str
) -> None:
    """Score the pairs that the store lacks."""
    from diffitm.store.blocks import Cost, cut, read_blocks
    from diffitm.store.pair_table import write_work

    folder = _work_folder(out)
    table = write_work([e.uri for e in examples], store, storage.join(folder, "work.parquet"))
    cost = Cost(
        1, TEXTS_AT_ONCE
    )  # so a block is of some images, and of one image with many texts a part
    size = AT_ONCE * TEXTS_AT_ONCE
    cut(table.uri, cost, cost.total(table.images, table.pairs), lambda left: size)
    blocks = (block_rows(one.to_pylist()[0]) for one in read_blocks(table.uri))
    _through(scorer, folder, blocks, table.images, scorer.rows.score, store)


def _race_missing(
    scorer: ImageTextScorer,
    examples: Mapping[str, Examples],
    store: Store,
    out: str,
    races: Races,
) -> None:
    """Score what the examples' races need and the store lacks."""
    from diffitm.evaluation.race_table import full_part, write_races
    from diffitm.scoring.race_block import BlockRaces

    def race(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        (line,) = lines
        block = BlockRaces(cast("DiffusionScorer", scorer.rows), read_block(line), races.plan)
        block.run()
        return block.lines()

    if full := full_part(examples, races, out):
        _score_missing(scorer, full, store, out)
    folder = _work_folder(out)
    table = write_races(examples, store, races, 1, storage.join(folder, "work.parquet"))
    found, path = storage.filesystem(table.uri)
    lines = parquet.read_table(path, filesystem=found).to_pylist()
    _through(scorer, folder, ([line] for line in lines), len(lines), race, store)


def _work_folder(out: str) -> str:
    return storage.join(out, "work", f"api-{time.time_ns():x}")


def _through(
    scorer: ImageTextScorer,
    folder: str,
    blocks: Iterable[Sequence[T]],
    total: int,
    score: Callable[[Sequence[T]], list[dict[str, Any]]],
    store: Store,
) -> None:
    """Score blocks of a work table in a folder, of `total` rows in all; each is a file of its own, whole or
    not there."""
    name = storage.name(folder)
    try:
        for number, block in enumerate(progress(blocks, scorer.name, total)):
            sink = pa.BufferOutputStream()
            parquet.write_table(pa.Table.from_pylist(score(block), SCORES), sink)
            file = storage.join(store.uri, f"{name}-{number:06d}.parquet")
            storage.write_bytes(file, sink.getvalue().to_pybytes())
    finally:
        storage.delete_folder(folder)


def progress(blocks: Iterable[T], name: str, total: int) -> Iterator[T]:
    """The blocks; meanwhile a bar on a terminal, a line every ten seconds in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _logged(blocks, name, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    text, rate = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (text, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total, rate="")
        for block in blocks:
            yield block
            bar.advance(task, len(block))  # type: ignore[arg-type]
            bar.update(task, rate=f"{bar.tasks[0].speed or 0:.1f} images/s")


def _logged(blocks: Iterable[T], name: str, total: int) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for block in blocks:
        yield block
        done += len(block)  # type: ignore[arg-type]
        now = time.monotonic()
        if now - last >= REPORT_EVERY and done < total:
            last, rate = now, done / (now - start)
            left = (total - done) / rate
            log.info("%s: %d of %d images, %.1f/s, %.0f s left", name, done, total, rate, left)
