"""Pictures that a model makes of prompts, each a file of its own and of its own seed, in a Ray Data stage."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from diffitm.core import images, storage
from diffitm.distributed.item_stage import ItemStage, run_items
from diffitm.distributed.session import ActorPool
from diffitm.models.loading import load_denoiser
from diffitm.scoring.batching import Batch
from diffitm.scoring.specs import DiffusionSpec

LOOKS = 16  # pictures that are looked at side by side
END = b"IEND\xaeB`\x82"  # of a PNG
PICTURES = pa.schema([("row", pa.int64()), ("position", pa.int64()), ("path", pa.string())])


class Picture(NamedTuple):
    """A picture to make: its path below the root, its prompt, the seed of its noise."""

    path: str
    prompt: str
    seed: int


class Sampler(NamedTuple):
    """How pictures are made: steps of the sampler, guidance, and so many of a prompt in one batch."""

    steps: int
    guidance: float
    at_once: int


class PictureActor:
    """Loads the model once; makes the pictures that are not there whole."""

    def __init__(
        self, spec: DiffusionSpec, how: Sampler, root: str, device: str, counter: Any
    ) -> None:
        self.how, self.root, self.counter = how, root, counter
        self.batch = Batch(how.at_once, "--pictures-at-once")
        self.denoiser = load_denoiser(spec.source, spec.dtype, device, spec.variant, spec.lora)

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = []
        for group in table.to_pylist():
            asked = [Picture(*json.loads(name)) for name in group["names"]]
            # A row comes again after a failure of its actor.
            left = [picture for picture in asked if not is_whole(self.root, picture.path)]
            for _, same in itertools.groupby(left, key=lambda picture: picture.prompt):
                self._make(list(same))
            places = enumerate(asked, group["start"])
            lines += [{"row": group["row"], "position": n, "path": p.path} for n, p in places]
            self.counter.add.remote(len(asked))
        return pa.Table.from_pylist(lines, PICTURES)

    def _make(self, pictures: list[Picture]) -> None:
        """Pictures of one prompt, each written under another name and then renamed."""

        def made(start: int, end: int) -> list[Any]:
            seeds = [picture.seed for picture in pictures[start:end]]
            how, prompt = self.how, pictures[0].prompt
            return self.denoiser.generate(prompt, seeds, how.steps, how.guidance)

        drawn = itertools.chain.from_iterable(self.batch.run(len(pictures), made))
        for picture, image in zip(pictures, drawn, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            storage.write_bytes(storage.join(self.root, picture.path), buffer.getvalue())


def is_whole(root: str, path: str) -> bool:
    """Whether a file below the root is a whole PNG. A decoder alone would not miss its last bytes."""
    try:
        data = images.read(root, path)
        images.decode(data)
    except Exception:  # whatever a decoder raises
        return False
    return data.endswith(END)


def lacking(root: str, folder: str, pictures: Sequence[Picture]) -> list[Picture]:
    """Those of a folder's pictures that are not there, or not whole."""
    there = storage.sizes(storage.join(root, folder), recursive=True)

    def good(picture: Picture) -> bool:
        known = picture.path.removeprefix(f"{folder}/") in there
        return known and is_whole(root, picture.path)

    with ThreadPoolExecutor(LOOKS) as pool:
        whole = list(pool.map(good, pictures))
    return [picture for picture, found in zip(pictures, whole, strict=True) if not found]


def make(
    name: str,
    spec: DiffusionSpec,
    how: Sampler,
    root: str,
    pictures: Sequence[Picture],
    pool: ActorPool,
) -> None:
    """Make pictures of a model. What a stopped run has made is known by the pictures themselves, so its own
    table is done away with."""
    work = storage.join(root, "work", "pictures", name)
    storage.delete_folder(work)
    stage = ItemStage(
        f"{spec.label}: pictures",
        storage.join(work, "made"),
        PICTURES,
        PictureActor,
        (spec, how, root),
        items_per_row=how.at_once,
    )
    run_items(stage, [json.dumps(picture) for picture in pictures], pool)
    storage.delete_folder(work)
