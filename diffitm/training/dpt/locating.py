"""How well an adapter finds the boxes that expressions name, on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from diffitm.core.schema import PairRow
from diffitm.models.denoiser import Denoiser
from diffitm.models.dpt import DptAdapter, MapReader
from diffitm.scoring.diffusion import to_input
from diffitm.scoring.dpt import TIMESTEP
from diffitm.scoring.image_reader import load_images
from diffitm.scoring.noise_plan import make_plan
from diffitm.training.dpt.expressions import Expression
from diffitm.training.dpt.grounding import corners, match
from diffitm.training.dpt.step import targets_of
from diffitm.training.module import Worker

BATCH = 16
BEST = (1, 5, 10)  # queries of a box that are looked at, as in MDETR's evaluation
FOUND = 0.5  # overlap of a box that counts as found


class Locator:
    """A denoiser with an adapter that has learned boxes, at one timestep and with one noise for all images,
    as DPT's score has them. Images below `root` become the model's input by `resize`."""

    def __init__(self, denoiser: Denoiser, adapter: DptAdapter, root: str, resize: str) -> None:
        self.denoiser, self.adapter, self.root, self.resize = denoiser, adapter, root, resize
        self.reader = MapReader(denoiser, adapter.shape.map)
        self.plan = make_plan([TIMESTEP], denoiser.latent_shape)

    @torch.inference_mode()
    def overlaps(self, expressions: Sequence[Expression]) -> Tensor:
        """Of each box the intersection over union with that of the query which training would match it with,
        and then with those of the ten queries that are surest to be of the tokens which name it, surest
        first, [boxes, 11] on the CPU. Images that cannot be read are left out."""
        found = [torch.zeros(0, 1 + max(BEST))]
        for start in range(0, len(expressions), BATCH):
            found += self._batch(expressions[start : start + BATCH])
        return torch.cat(found)

    def _batch(self, expressions: Sequence[Expression]) -> list[Tensor]:
        rows = [PairRow(i, one.image, [one.caption]) for i, one in enumerate(expressions)]
        loaded = load_images(
            rows, self.root, lambda image: to_input(image, self.denoiser, self.resize)
        )
        good = [i for i, one in enumerate(loaded) if one.failure is None]
        if not good:
            return []
        device, said = self.denoiser.device, [expressions[i] for i in good]
        pixels = torch.stack([loaded[i].value for i in good]).to(device)
        at = self.plan.timesteps.to(device).expand(len(good))
        noise = self.plan.noise.to(device).expand(len(good), -1, -1, -1)
        noised = self.denoiser.schedule.add_noise(self.denoiser.encode_images(pixels), noise, at)
        condition = self.denoiser.encode_texts([one.caption for one in said])
        maps, _ = self.reader(noised, at, condition)
        boxes = self.adapter.find(maps, at)
        overlaps = []
        for i, target in enumerate(targets_of(self.denoiser, said)):
            sure = target.classes @ boxes.logits[i].softmax(-1).T
            every = box_iou(corners(target.boxes), corners(boxes.boxes[i]))
            query, box = match(boxes, i, target)
            matched = every.new_zeros(len(every), 1)  # of a box beyond the queries' number
            matched[box, 0] = every[box, query]
            surest = every.gather(1, sure.topk(max(BEST)).indices)
            overlaps.append(torch.cat([matched, surest], 1).cpu())
        return overlaps


def located(
    locator: Locator, expressions: Sequence[Expression], worker: Worker
) -> dict[str, float]:
    """Over all workers: the mean overlap of boxes with those of their surest queries and of the matched ones,
    and shares of boxes that the surest ones find; {} where no image could be read. All workers must
    call it alike."""
    overlaps = locator.overlaps(expressions[worker.rank :: worker.world])
    hits = [float((overlaps[:, 1 : 1 + best].amax(1) >= FOUND).sum()) for best in BEST]
    matched, surest = overlaps[:, :2].sum(0).tolist()
    *sums, count = worker.summed([surest, matched, *hits, len(overlaps)]).tolist()
    if not count:
        return {}
    names = ["boxes/iou", "boxes/iou_matched", *(f"boxes/precision_at_{best}" for best in BEST)]
    return {name: total / count for name, total in zip(names, sums, strict=True)}
