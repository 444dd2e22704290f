"""Public zero-shot benchmarks through the clip-benchmark package: its data sets and its evaluations."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffitm.core.errors import InputError, suggest
from diffitm.models.clip import ClipSource, LoadedClip, load_clip

PACKAGE = "clip_benchmark"
INSTALL = "pip install 'diffitm[clip-benchmark]'"
WEBDATASET = "wds/"
RECALLS = [1, 5, 10]


def benchmark(
    clip: ClipSource | LoadedClip,
    dataset: str,
    root: str,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Metric -> value in [0, 1] of a CLIP on a data set of the package, test split, English.

    The kind of evaluation is the data set's: zero-shot classification (acc1, acc5,
    mean_per_class_recall or mean_average_precision), retrieval (recall at 1, 5 and 10) or the choice
    of captions. All in float32, where the package's own command would use mixed precision. `root`
    is where the data lies or where the package downloads it to; '{dataset}' and
    '{dataset_cleaned}' in it become the name, as in the package's command. 'wds/NAME' is a
    WebDataset at `root`, a folder or a URL.

    Raises InputError if the package or one that a data set needs is missing, for an unknown data
    set, and for one that cannot be built.
    """
    builder = _part("datasets.builder")
    short = dataset.removeprefix(WEBDATASET)
    task = builder.get_dataset_default_task(short)
    loaded = load_clip(clip, device) if isinstance(clip, ClipSource) else clip
    place = torch.device(device)
    root = root.replace("{dataset_cleaned}", short.replace("/", "-")).replace("{dataset}", short)
    data = _build(builder, dataset, task, root, loaded.preprocess)
    loader = _loader(builder, dataset, data, batch_size, workers)
    chosen = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()
    with chosen:  # the package takes 'cuda' alone
        found = _measure(_part(f"metrics.{task}"), task, data, loaded, loader, place.type)
    return {name: float(value) for name, value in found.items()}


def _measure(
    part: Any, task: str, data: Any, clip: LoadedClip, loader: DataLoader[Any], device: str
) -> dict[str, float]:
    """What the package's module for the task finds."""
    shared = {"device": device, "amp": False}
    if task == "zeroshot_classification":
        # Its evaluate() fails under numpy 2.4 (LAION-AI/CLIP_benchmark issue 147), its parts do not.
        names, templates = data.classes, data.templates
        weights = part.zero_shot_classifier(clip.model, clip.tokenizer, names, templates, **shared)
        logits, labels = part.run_classification(clip.model, weights, loader, **shared)
        if labels.ndim == 2:  # several labels an image
            precisions = part.average_precision_per_class(logits, labels)
            return {"mean_average_precision": float(precisions.mean())}
        return classification(logits, labels)
    if task == "zeroshot_retrieval":
        shared |= {"recall_k_list": RECALLS}
    found: dict[str, float] = part.evaluate(clip.model, loader, clip.tokenizer, **shared)
    return found


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """acc1, acc5 (of five or more classes) and mean_per_class_recall of logits [N, K] and labels
    [N], by the package's definitions: the recall is averaged over the classes that are there."""
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    found = {"acc1": float(right[:, 0].double().mean())}
    if logits.shape[1] >= 5:
        found["acc5"] = float(right.any(1).double().mean())
    total = labels.bincount()
    recall = labels.bincount(right[:, 0].double()) / total
    return found | {"mean_per_class_recall": float(recall[total > 0].mean())}


def _part(name: str) -> Any:
    """A module of the package. Raises InputError, with what to install, if it cannot be imported."""
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise InputError(f"the clip-benchmark package is needed ({error}): {INSTALL}") from error


def _build(builder: Any, dataset: str, task: str, root: str, preprocess: Any) -> Any:
    """The package's data set. Raises InputError."""
    try:
        return builder.build_dataset(
            dataset_name=dataset, root=root, transform=preprocess, split="test", task=task
        )
    except (Exception, SystemExit) as error:  # it exits where a download tool is missing
        if str(error).startswith("Unsupported dataset"):
            raise InputError(
                f"unknown data set {dataset!r}{suggest(dataset, _known(builder))}"
            ) from error
        shown = f"{type(error).__name__}: {error}"
        raise InputError(f"data set {dataset!r} at {root!r} cannot be built: {shown}") from error


def _known(builder: Any) -> set[str]:
    """The data sets that the package names: in its collections, and in the code that builds them."""
    named = set(re.findall(r'dataset_name == "([^"]+)"', inspect.getsource(builder.build_dataset)))
    return named.union(*builder.dataset_collection.values())


def _loader(
    builder: Any, dataset: str, data: Any, batch_size: int, workers: int
) -> DataLoader[Any]:
    if dataset.startswith(WEBDATASET):
        return DataLoader(data.batched(batch_size), batch_size=None, num_workers=workers)
    collate = builder.get_dataset_collate_fn(dataset)
    return DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate)
