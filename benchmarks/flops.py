"""How much computing do scores take, how much of it is needed, and how much does the published code do?

    python -m benchmarks.flops [--data DIR] [--models "SD 2.1-base"] [--out FILE]

Needs neither a GPU nor weights. torch's own counter counts the FLOPs of each part at its published size, on
the meta device: matrix products, attention and convolutions, a multiply-add as 2; norms, activations and
softmax are not counted. How often a part is needed, and how often it is called, is counted where it is
called: in diffitm's own scorer over the work table of a task, and in the published algorithm over a few
decisions of it. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.published import MODELS, Part, count_flops
from diffitm.core import storage
from diffitm.core.schema import Example, block_rows
from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.noise_schedule import NoiseSchedule
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.protocols import plan_timesteps
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES
from diffitm.store.blocks import Cost, Sizes, cut, read_blocks
from diffitm.store.pair_table import write_examples
from diffitm.store.score_store import open_store
from diffitm.store.work_table import open_pairs
from diffitm.tasks.base import Task
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from diffitm.tasks.winoground import Winoground
from tests import tiny
from tests.plain import BATCH, Plain, list_pairs

FP16 = 2  # bytes
ASKED = (10, 50)  # timesteps; the published grid makes 10 and 49 of them
ACTORS = (1, 8)
RATE = 400.0  # forwards a second of an actor, as an H100 has with SD 2.1, for the size of blocks
TASKS: dict[str, Task] = {
    "Flickr30K text retrieval": Flickr30kText(),
    "Flickr30K image retrieval": Flickr30kImage(),
    "Winoground": Winoground(),
}
# The form of the published lists: 1,014 images with 5 captions, of which two appear twice.
IMAGES, CAPTIONS, REPEATED, CANDIDATES, ENTRIES = 1014, 5, 2, 10, 400


@dataclass
class Counts:
    """How many images, texts and noised latents go through the VAE, the text encoders and the network."""

    images: float = 0
    texts: float = 0
    forwards: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.images + other.images, self.texts + other.texts, self.forwards + other.forwards
        )

    def times(self, factor: float) -> Counts:
        return Counts(self.images * factor, self.texts * factor, self.forwards * factor)


@dataclass(frozen=True)
class Size:
    """What a part has and what a call with one item takes."""

    model: str
    part: str
    item: str
    parameters: int
    known: int | None
    flops: int


def measure(model: str, part: Part) -> Size:
    """Raises RuntimeError where the config gives another number of parameters than is known."""
    with torch.device("meta"):
        module = part.make().eval()
    parameters = sum(p.numel() for p in module.parameters())
    if part.known not in (None, parameters):
        raise RuntimeError(f"{model}, {part.name}: {parameters:,} parameters, not {part.known:,}")
    return Size(model, part.name, part.item, parameters, part.known, count_flops(module, part.call))


def total(counts: Counts, sizes: Iterable[Size]) -> float:
    """FLOPs of a model's parts, called this often."""
    return sum(getattr(counts, size.item) * size.flops for size in sizes)


def needed(examples: Sequence[Example], timesteps: int) -> Counts:
    """Each pair once at each timestep, and each image whose errors are compared with other images' with the
    empty text; each image and each text encoded once."""
    pairs = {(image, text) for e in examples for image in e.images for text in e.texts}
    empty = {image for e in examples if e.needs_unconditional for image in e.images}
    texts = {text for _, text in pairs} | ({""} if empty else set())
    images = {image for image, _ in pairs}
    return Counts(len(images), len(texts), (len(pairs) + len(empty)) * timesteps)


class Counting(Denoiser):
    """Latents of one number, and a network that says 0: counts what it is given."""

    resolution, latent_shape = 8, (1, 1, 1)
    device, dtype = torch.device("cpu"), torch.float32
    text_bytes = 4

    def __init__(self) -> None:
        self.schedule = NoiseSchedule.from_alphas_cumprod(
            torch.linspace(0.99, 0.01, 1000), "epsilon"
        )
        self.counts = Counts()

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.counts.images += len(pixels)
        return torch.zeros(len(pixels), 1, 1, 1), torch.zeros(len(pixels), 1, 1, 1)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        self.counts.texts += len(texts)
        return {"hidden": torch.zeros(len(texts), 1)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.counts.forwards += len(noised)
        return torch.zeros_like(noised)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        raise NotImplementedError


def done(
    examples: Sequence[Example],
    steps: Sequence[int],
    text_bytes: int = 1,
    actors: int = 1,
    warm: bool = True,
) -> Counts:
    """What diffitm's actors compute for examples: their work table, in the blocks of a run, dealt to
    actors in turn, each with its cache of texts (of `text_bytes` each). `warm`: with the start of an actor,
    which times the bare model."""
    room = TEXT_CACHE_BYTES * Counting.text_bytes // text_bytes
    plan = make_plan(list(steps), Counting.latent_shape)
    models = [Counting() for _ in range(actors)]
    scorers = [DiffusionScorer(model, plan, "", text_cache_bytes=room) for model in models]
    loaded = Loaded(torch.zeros(3, Counting.resolution, Counting.resolution), None, None)
    for scorer in scorers if warm else ():
        scorer.measure_rate()
    with tempfile.TemporaryDirectory() as out:
        store = open_store(out, "counting", {"kind": "diffusion", "timesteps": list(steps)})
        written, _ = write_examples("counted", examples, f"{out}/examples", None)
        work = open_pairs(out, store, [written], [])
        cost = Cost(len(steps))
        total = cost.total(*work.left)
        cut(work.table.uri, cost, total, Sizes(actors, RATE).next)
        blocks = [block_rows(table.to_pylist()[0]) for table in read_blocks(work.table.uri)]
    for number, block in enumerate(blocks):
        scorers[number % actors].score_loaded(block, [[loaded] * len(block)])
    return sum((model.counts for model in models), Counts())


def watch(model: Any) -> Counts:
    """Counts what goes through the parts of a Stable Diffusion from now on."""
    found = Counts()

    def count(item: str, module: Any, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        items = given[0] if given else next(iter(named.values()))
        setattr(found, item, getattr(found, item) + len(items))

    parts = {"images": model.vae.encoder, "texts": model.text_encoder, "forwards": model.unet}
    for item, part in parts.items():
        part.register_forward_pre_hook(partial(count, item), with_kwargs=True)
    return found


def published(examples: Sequence[Example], steps: Sequence[int]) -> Counts:
    """What the published algorithm computes for examples with the same number of candidates each: counted
    in a tiny model over a batch of decisions and one that is not full, and reckoned up."""
    some = examples[: BATCH + 1]
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {}
        for image in dict.fromkeys(image for e in some for image in e.images):
            files[image] = f"{folder}/{len(files)}.png"
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(files[image])
        plain = Plain(str(tiny.write_sd(Path(folder, "model"))), steps)
        found = watch(plain)
        decisions = [list_pairs([files[image] for image in e.images], e.texts) for e in some]
        plain.score(decisions, image_retrieval=some[0].needs_unconditional)
    return found.times(len(examples) / len(some))


def write_lists(root: str, seed: int = 0) -> None:
    """Lists of the published form and size; which wrong candidates stand in them is drawn."""
    numbers = np.random.default_rng(seed)
    images = [f"datasets/flickr30k/images/{i}.jpg" for i in range(IMAGES)]
    own = {image: [f"{image} {k}" for k in range(CAPTIONS)] for image in images}
    own[images[-1]] = own[images[-1]][:-REPEATED]
    captions = [text for texts in own.values() for text in texts]

    def candidates(right: str, pool: Sequence[str], known: Sequence[str]) -> list[str]:
        drawn = numbers.choice(len(pool), CANDIDATES + CAPTIONS, replace=False)
        return [right, *[pool[n] for n in drawn if pool[n] not in known][: CANDIDATES - 1]]

    by_text = {t: candidates(image, images, [image]) for image in images for t in own[image]}
    by_image = {image: candidates(own[image][0], captions, own[image]) for image in images}
    names = ("id", "caption_0", "caption_1", "collapsed_tag", "num_main_preds")
    entries = [
        dict(zip(names, (n, f"{n} a", f"{n} b", "", 1), strict=True)) for n in range(ENTRIES)
    ]
    for task, file, content in (
        (Flickr30kImage, Flickr30kImage.file, by_text),
        (Flickr30kText, Flickr30kText.file, by_image),
        (Winoground, "data.json", entries),
    ):
        storage.write_text(storage.join(root, task.folder, file), json.dumps(content))


@dataclass(frozen=True)
class Line:
    """A task on a model: the FLOPs that it needs, and how often these are done: by diffitm with so many
    actors, and by the published algorithm."""

    model: str
    task: str
    timesteps: int
    needed: float
    done: dict[int, float]
    published: float


def compare(sizes: Sequence[Size], task: str, examples: list[Example], steps: list[int],
            theirs: Counts) -> Line:  # fmt: skip
    model = sizes[0].model
    least = total(needed(examples, len(steps)), sizes)
    ours = {n: done(examples, steps, FP16 * MODELS[model].text, n) for n in ACTORS}
    shares = {actors: total(counts, sizes) / least for actors, counts in ours.items()}
    return Line(model, task, len(steps), least, shares, total(theirs, sizes) / least)


def print_sizes(sizes: Sequence[Size]) -> None:
    print("| model | part | parameters, M | others' count | fp16, GB | TFLOP a call |")
    print("|---|---|---:|---:|---:|---:|")
    for s in sizes:
        known = "the same" if s.known else "not found"
        print(f"| {s.model} | {s.part} | {s.parameters / 1e6:,.1f} | {known} | "
              f"{s.parameters * FP16 / 1e9:.2f} | {s.flops / 1e12:.3f} |")  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the published lists; without it they are drawn")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--timesteps", nargs="*", type=int, default=ASKED, help="asked for")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    sizes = {name: [measure(name, part) for part in MODELS[name].parts] for name in args.models}
    print_sizes([size for found in sizes.values() for size in found])
    with tempfile.TemporaryDirectory() as drawn:
        if args.data is None:
            write_lists(drawn)
        examples = {name: list(task.examples(args.data or drawn)) for name, task in TASKS.items()}
    asked = [(task, plan_timesteps("diffusionitm", n)) for task in TASKS for n in args.timesteps]
    theirs = [published(examples[task], steps) for task, steps in asked]
    over = " | ".join(f"diffitm, {n} actor{'s' * (n > 1)}" for n in ACTORS)
    print(f"\n| model | task | timesteps | needed, PFLOP | {over} | published |")
    print(f"|---|---|---:|---:|{'---:|' * len(ACTORS)}---:|")
    lines = []
    for name, found in sizes.items():
        for (task, steps), counts in zip(asked, theirs, strict=True):
            line = compare(found, task, examples[task], steps, counts)
            lines.append(asdict(line))
            ours = " | ".join(f"{share:.3f}" for share in line.done.values())
            print(f"| {name} | {task} | {line.timesteps} | {line.needed / 1e15:,.1f} | {ours} | "
                  f"{line.published:.2f} |", flush=True)  # fmt: skip
    if args.out:
        parts = [asdict(size) for found in sizes.values() for size in found]
        result = {"torch": torch.__version__, "parts": parts, "tasks": lines}
        storage.write_text(args.out, json.dumps(result, indent=1))


def quiet() -> None:
    """No bars and warnings of the tiny model's making."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    main()
