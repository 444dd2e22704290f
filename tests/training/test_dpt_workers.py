"""A training of DPT as workers run it: its job, its resume, any number of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffitm.commands import finetune, grounding
from diffitm.commands.workers.dpt import ProbeModule, TuneModule
from diffitm.core.errors import InputError
from diffitm.distributed.trainer import hand_over
from diffitm.models.dpt import DptAdapter
from diffitm.models.dpt_file import AdapterShape, save_adapter
from diffitm.models.loading import resolve
from diffitm.shapes.training import write_training
from diffitm.training.dpt import step
from diffitm.training.dpt.expressions import StoredExpressions
from diffitm.training.job import DptJob
from diffitm.training.lora.options import FinetuneConfig
from diffitm.training.rows import drop_equal, read_rows
from tests.ranks import Ranks
from tests.training_runs import norm

BOXED = AdapterShape("up1", 48, 96, grounding=True)  # of the embedded model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dpt") / "data"
    write_training(str(root), 20)
    return root


def job(root: Path, adapter: Path | None = None, **more: Any) -> DptJob:
    config = FinetuneConfig(
        objective="dpt", model="shapes", batch_size=1, effective_batch=3, steps=2, lr=1e-3,
        checkpoint_every=100, log_every=1, stage="tune" if adapter else "probe",
        adapter=str(adapter) if adapter else None, grounding="shapes" if adapter else None,
    )  # fmt: skip
    rows, _ = drop_equal(read_rows(str(root / "coco_neg" / "train_neg_clip.tsv"))[0])
    file = hand_over(str(root.parent / "out"), rows, range(len(rows)))
    made = finetune._job(config, resolve("shapes"), "all", file, str(root), None, 0)
    assert isinstance(made, DptJob)
    if adapter is not None:
        images = {row.image for row in rows[1:]}  # an image without an expression trains, too
        said = grounding.read(config, str(root), images)
        data = grounding.handed_over(said, config, made, str(root.parent / "out"))
        made = replace(made, grounding=data)
    return replace(made, **more)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (AdapterShape("up1", 48, 768, True), "of 48 channels and texts 768 wide; this model has 48 and 96"),
        (AdapterShape("up1", 32, 96), "up1 of 32 channels and texts 96 wide; this model has 48 and 96"),
        (AdapterShape("up3", 48, 96), "is an adapter of up3: the maps of this U-Net are bottom0, bottom1"),
    ],
)  # fmt: skip
def test_a_tuning_with_another_models_adapter(
    world: Path, tmp_path: Path, shape: AdapterShape, told: str
) -> None:
    """It is refused by the settings of the model, before anything is loaded."""
    save_adapter(DptAdapter(shape).state_dict(), shape, str(tmp_path), tuned=False)
    with pytest.raises(InputError) as caught:
        job(world, tmp_path)
    message = caught.value.on_command_line()
    assert message.startswith(f"--adapter '{tmp_path}'") and told in message, message


def test_expressions_are_encoded_beforehand_with_the_other_texts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run with --cache-latents would lack them."""
    asked: dict[str, list[str]] = {}

    def keep(out: str, kind: str, names: list[str], *others: Any) -> str:
        asked[kind] = names
        return kind

    monkeypatch.setattr("diffitm.commands.stages.encode.encode", keep)
    monkeypatch.setattr("diffitm.distributed.session.choose_pool", lambda *limits: None)
    save_adapter(DptAdapter(BOXED, 2).state_dict(), BOXED, str(tmp_path), tuned=False)
    made = job(world, tmp_path)
    encoded = finetune.encoded(made, str(tmp_path / "out"))
    assert (encoded.latents, encoded.texts) == ("image", "text")
    assert made.grounding is not None
    captions = {one.caption for one in StoredExpressions(made.grounding.file)}
    finetune.encoded(replace(made, grounding=None), str(tmp_path / "out"))
    assert captions - set(asked["text"])
    finetune.encoded(made, str(tmp_path / "out"))
    assert captions < set(asked["text"]) and asked["text"] == sorted(set(asked["text"]))


@pytest.fixture
def _own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, which share torch's generator as processes do not."""
    lock, plain = threading.Lock(), step.drawn_from

    @contextlib.contextmanager
    def alone(device: torch.device, seed: int) -> Iterator[None]:
        with lock, plain(device, seed):
            yield

    monkeypatch.setattr(step, "drawn_from", alone)


@pytest.mark.usefixtures("_own_draws")
@pytest.mark.parametrize("stage", ["probe", "tune"])
def test_on_any_number_of_workers_and_after_a_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The same losses and weights, with dropout, of a tuning with boxes; one group of two workers goes on
    from the checkpoint of another's."""
    kind, adapter = (ProbeModule, None) if stage == "probe" else (TuneModule, tmp_path)
    if adapter:
        save_adapter(DptAdapter(BOXED, 2).state_dict(), BOXED, str(tmp_path), tuned=False)
    runs = []
    for name, groups in (("alone", [(1, 2)]), ("two", [(2, 1), (2, 2)])):
        (tmp_path / name).mkdir()
        ranks = Ranks(tmp_path / name, monkeypatch)
        for workers, steps in groups:
            made = job(world, adapter, steps=steps)
            assert ranks.train(kind, made, workers) == [steps] * workers
        runs.append(ranks)
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-4)
    ours, theirs = runs[1].weights(), runs[0].weights()
    assert norm({k: ours[k] - theirs[k] for k in theirs}) < 1e-4 * norm(theirs)
    has_lora = any(key.startswith("unet.") for key in ours)
    assert has_lora == (stage == "tune")
    has_boxes = "adapter.grounding.of_boxes.0.weight" in ours
    assert has_boxes == (stage == "tune")
    assert all(("of_giou" in line) == has_boxes for line in runs[1].monitor.lines)
