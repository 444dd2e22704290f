"""Images that models generate for prompts, from the same seeds, in a Ray Data stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from diffitm.core.provenance import fingerprint
from diffitm.distributed.item_stage import ItemStage, run_items
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import whole_files
from diffitm.scoring.specs import DiffusionSpec, DptSpec

Paints = DiffusionSpec | DptSpec
VERSION = 1  # grows when the same settings would give other images
SAMPLES = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("prompt", pa.string()),
        ("images", pa.list_(pa.large_binary())),  # PNG, one a seed
    ]
)


@dataclass(frozen=True)
class Sampling:
    """How images are generated: seeds 0 to `count` - 1, steps of the sampler, guidance."""

    count: int
    steps: int
    guidance: float


class SampleActor:
    """Loads the model once; generates the images of a prompt in one batch."""

    def __init__(self, spec: Paints, how: Sampling, device: str, counter: Any) -> None:
        self.how, self.counter, self.painter = how, counter, spec.painter(device)

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = []
        for group in table.to_pylist():
            for position, prompt in enumerate(group["names"], group["start"]):
                images = []
                for image in self._generate(prompt):
                    buffer = io.BytesIO()
                    image.save(buffer, format="PNG")
                    images.append(buffer.getvalue())
                line = {"row": group["row"], "position": position, "prompt": prompt}
                lines.append({**line, "images": images})
            self.counter.add.remote(len(group["names"]))
        return pa.Table.from_pylist(lines, SAMPLES)

    def _generate(self, prompt: str) -> list[Any]:
        how = self.how
        return self.painter.generate(prompt, range(how.count), how.steps, how.guidance)


def samples_folder(spec: Paints, prompts: Sequence[str], how: Sampling) -> str:
    """The folder below OUT for these images, named by everything that they depend on."""
    known = spec.store_config()
    of_model = {key: known[key] for key in ("weights", "variant", "dtype")}
    asked = {"prediction_type": spec.source.prediction, "resolution": spec.source.resolution}
    of_model |= {key: value for key, value in asked.items() if value is not None}
    if isinstance(spec, DptSpec):
        of_model |= {"adapter": known["adapter"], "correction": spec.correction}
    else:
        more = ("lora", "around_texts")
        of_model |= {key: known[key] for key in more if key in known}
    settings = {"version": VERSION, **of_model, **asdict(how), "prompts": list(prompts)}
    return f"samples/{fingerprint(settings)[:12]}/images"


def sample(
    folder: str,
    name: str,
    spec: Paints,
    prompts: Sequence[str],
    how: Sampling,
    pool: ActorPool,
) -> None:
    """Generate the images of all prompts that the folder lacks."""
    stage = ItemStage(f"{name}: images", folder, SAMPLES, SampleActor, (spec, how))
    run_items(stage, list(prompts), pool)


def read_samples(folder: str) -> dict[str, list[bytes]]:
    """Prompt -> its images as PNG, in the prompts' order."""
    lines = whole_files(folder, SAMPLES).to_table().sort_by("position").to_pylist()
    return {line["prompt"]: line["images"] for line in lines}
