"""What a worker of Ray Train runs: the loop that every tuning run shares."""

from __future__ import annotations

import contextlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from ray.train import CheckpointUploadMode
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.distributed.actors import here
from diffitm.distributed.devices import gradient_group, processors, worker_device
from diffitm.distributed.worker_group import EXCHANGE
from diffitm.training.gradient_sync import Gradients
from diffitm.training.job import Training
from diffitm.training.module import TrainModule, Worker
from diffitm.training.run_folder import AVERAGED, BEST, HISTORY, STATE, WEIGHTS
from diffitm.training.sampler import Item, Loaded

MOMENTUM = 0.9  # of SGD
ASK_EVERY = 10.0  # seconds between questions whether to make room for a larger group


@dataclass
class Progress:
    """How far a worker is: steps done, the lines of the log, validation accuracy of the base model and
    the best one since, unreadable images of all workers (path and reason -> how often)."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    base: float = 0.0
    best: float = -1.0
    best_step: int = 0
    lost: dict[str, int] = field(default_factory=dict)


class TrainLoop:
    """One worker's part of a run: takes the steps of a module, logs, validates, keeps checkpoints.

    Stops on every worker alike, also when a loss is not finite.
    """

    def __init__(
        self, kind: type[TrainModule], job: Training, monitor: Any, processors: float
    ) -> None:
        context, device = ray.train.get_context(), worker_device()
        rank, world = context.get_world_rank(), context.get_world_size()
        self.job, self.monitor = job, monitor
        self.worker = Worker(rank, world, device, processors, monitor)
        self.group = gradient_group(device, EXCHANGE)
        torch.manual_seed(job.seed)
        self.module = kind(job, self.worker)
        groups = self.module.groups
        self.parameters = [parameter for part, _ in groups for parameter in part]
        self.gradients = Gradients(part for part, _ in groups)
        self.optimizer = make_optimizer(job, groups)
        self.lr_scheduler = get_scheduler(
            job.lr_scheduler,
            self.optimizer,
            num_warmup_steps=job.warmup_steps,
            num_training_steps=job.steps,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=job.dtype == "fp16")
        self.ema = EMAModel(self.parameters, decay=job.ema) if job.ema else None
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.asked, self.ending = time.monotonic(), False
        self.written: Path | None = None

    def resume(self) -> None:
        """Go on from the checkpoint that Ray Train hands over, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            path = Path(folder)
            self.module.load(load_file(path / WEIGHTS))
            if (path / BEST).exists():
                self.best = load_file(path / BEST)
            state = torch.load(path / STATE, map_location=self.worker.device, weights_only=True)
            progress = json.loads((path / HISTORY).read_text())
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["rates"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**progress)
        if self.worker.rank == 0:
            self.monitor.restore.remote(self.progress.lost)

    def train(self) -> int:
        """All steps that are left, or until there is room for a larger group of workers; the steps that
        are done. Stops on every worker alike, also when a loss is not finite."""
        self.resume()
        job, begin, since = self.job, time.perf_counter(), self.progress.step
        if self.progress.step == 0:
            self._validate()
        for batches in self.module.loader.steps(self.progress.step):
            logged = self._step(batches)
            if logged is None:
                break
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == job.steps
            if step % job.log_every == 0 or last:
                seconds = time.perf_counter() - begin
                done = (step - since) * job.micro_batch_size * job.grad_accum_steps
                self.log(logged | self._costs(seconds, done))
                begin, since, self.module.loader.waited = time.perf_counter(), step, 0.0
            self._validate()
            if step % job.checkpoint_every == 0 or last or self.ending:
                self._save(last)
            if self.ending:
                break
        return self.progress.step

    def _step(self, batches: list[Loaded]) -> dict[str, float] | None:
        """One update of the weights; what is logged of it, None if it had to stop."""
        self.module.prepare(self.progress.step, self.gradients)
        self.gradients.zero()
        sums = self._backward(batches)
        if self.worker.world > 1:
            self.gradients.exchange(self.group)
        total, ending = self._totals(sums)
        if not torch.isfinite(total).all():
            return None
        if total[-1] == 0:
            for why in [failure for *_, failures in batches for failure in failures][:1]:
                text = f"step {self.progress.step + 1}: none of its images could be read: {why}"
                ray.get(self.monitor.stop.remote(text))
            return None
        self.ending = ending
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.job.max_grad_norm)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            ray.get(self.monitor.stop.remote(f"step {self.progress.step + 1}: gradient {norm:g}"))
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        means = (total[:-1] / total[-1]).tolist()
        return dict(zip(self.module.names, means, strict=True)) | {
            "norm": float(norm),
            "rate": rate,
        }

    def _backward(self, batches: list[Loaded]) -> Tensor:
        """Add up the gradients of this worker's micro-batches; the sums of `names`, and of how many losses
        they are, which is nan if one is not finite."""
        sums = torch.zeros(len(self.module.names) + 1, dtype=torch.float64)
        readable = self._readable(batches)
        self.module.gather(readable)
        for number, (good, images) in enumerate(readable, 1):
            for passed, (loss, values) in enumerate(self.module.losses(good, images), 1):
                if self.worker.world > 1 and (number, passed) == (
                    len(readable),
                    self.module.passes,
                ):
                    self.gradients.send(self.group)
                if not torch.isfinite(loss):
                    where = ", ".join(f"row {i.position} ({i.image})" for i in good)
                    text = f"step {self.progress.step + 1}: the loss of {where} is {loss.item()}"
                    ray.get(self.monitor.stop.remote(text))
                self.scaler.scale(loss / self.job.grad_accum_steps).backward()
                told = [*(float(v) for v in values), 1.0 if torch.isfinite(loss) else torch.nan]
                sums += torch.tensor(told, dtype=torch.float64)
        return sums

    def _readable(self, batches: list[Loaded]) -> list[tuple[list[Item], dict[str, Any]]]:
        """Of each micro-batch the items whose images could be read, and what was loaded of those; one
        without any is left out. What could not be read is told."""
        readable = []
        for items, images, failures in batches:
            for failure in failures:
                self.worker.lose(failure)
            good = [item for item in items if all(path in images for path in item.images)]
            if good:
                readable.append((good, images))
        return readable

    def _totals(self, sums: Tensor) -> tuple[Tensor, bool]:
        """The sums over all workers, and whether the group is to end after this step: the first worker
        asks, all hear of it at the same step."""
        asks = 0.0
        if self.worker.rank == 0 and time.monotonic() - self.asked > ASK_EVERY:
            self.asked = time.monotonic()
            asks = float(ray.get(self.monitor.should_end.remote()))
        total = self.worker.summed([*sums.tolist(), asks])
        return total[:-1], bool(total[-1])

    def _costs(self, seconds: float, examples: int) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if self.worker.device.type == "cuda" else 0
        if not peak:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rates = {
            "examples_per_second": examples / seconds,
            "seconds_per_update": seconds
            * self.job.micro_batch_size
            * self.job.grad_accum_steps
            / max(1, examples),
            "waiting": self.module.loader.waited / seconds,
        }
        return rates | {"peak_bytes": float(peak)}

    def log(self, values: dict[str, float]) -> None:
        """A line of the log, of the present step."""
        line = {"step": self.progress.step, **values}
        self.progress.history.append(line)
        if self.worker.rank == 0:
            self.monitor.add.remote(line)

    def _validate(self) -> None:
        """Measure what is due; keep the weights of the best quality."""
        step = self.progress.step
        if not self.module.measures(step):
            return
        with self.averaged():
            measured = self.module.measure(step)
            if measured.quality is not None and step == 0:
                self.progress.base = measured.quality
            elif measured.quality is not None and measured.quality > self.progress.best:
                self.progress.best, self.progress.best_step = measured.quality, step
                self.best = self.module.weights()
        if measured.values:
            self.log(measured.values)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the present ones, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        yield
        self.ema.restore(self.parameters)

    def _save(self, last: bool) -> None:
        """A checkpoint, which Ray Train uploads while the loop goes on; it is one of the run's once it is
        whole, and the group ends when all are. One that was cut off is written over by the next group,
        as its name is that of the update."""
        line = self.progress.history[-1] if self.progress.history else {"step": 0}
        checkpoint = None
        if self.worker.rank == 0:
            while self.written is not None and self.written.exists():
                time.sleep(
                    0.05
                )  # until the one before is uploaded: no more than two lie on this disk
            self.progress.lost = ray.get(self.monitor.save.remote(self.progress.step))
            self.written = Path(tempfile.mkdtemp(prefix="diffitm-checkpoint-"))
            self._write(self.written, last)
            checkpoint = ray.train.Checkpoint.from_directory(self.written)
        ray.train.report(
            line,
            checkpoint=checkpoint,
            checkpoint_dir_name=f"checkpoint_{self.progress.step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _write(self, path: Path, last: bool) -> None:
        """Everything that the rest of the run depends on. Randomness needs no state: it is a function of
        seed, epoch and row."""
        save_file(self.module.weights(), path / WEIGHTS)
        if self.best is not None:
            save_file(self.best, path / BEST)
        if self.ema is not None:
            with self.averaged():
                save_file(self.module.weights(), path / AVERAGED)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "rates": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }
        torch.save(state, path / STATE)
        (path / HISTORY).write_text(json.dumps(vars(self.progress)))
        if last:
            self._leave(path)

    def _leave(self, folder: Path) -> None:
        """What comes beside the weights must not cost them."""
        try:
            self.module.leave(folder)
        except Exception as error:
            self.worker.lose(f"at the end: {type(error).__name__}: {error}")


def make_optimizer(
    job: Training, groups: list[tuple[list[torch.nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """The job's optimizer of groups of parameters with a learning rate each."""
    options = [{"params": part, "lr": lr} for part, lr in groups]
    if job.optimizer == "sgd":
        return torch.optim.SGD(options, momentum=MOMENTUM, weight_decay=job.weight_decay)
    return torch.optim.AdamW(options, betas=(0.9, 0.999), weight_decay=job.weight_decay)


def work(kind: type[TrainModule], settings: dict[str, Any]) -> int | None:
    """A worker's part of the run: the steps that are done. Input that any worker cannot use ends it on
    all, without another try."""
    share, monitor, loop = settings["processors"], settings["monitor"], None
    torch.set_num_threads(max(1, int(share or 1)))
    context, place = ray.train.get_context(), here()
    ray.get(monitor.begin.remote(context.get_world_rank(), place.node, place.name))
    try:
        loop = TrainLoop(kind, settings["job"], monitor, processors(share))
    except InputError as error:
        ray.get(monitor.stop.remote(f"{error.on_command_line()} (on {place.name})"))
    failed = torch.tensor([float(loop is None)])
    if context.get_world_size() > 1:
        torch.distributed.all_reduce(failed)
    if loop is None or failed.any():
        return None
    try:
        return loop.train()
    except InputError as error:  # no other group would fare better
        ray.get(monitor.stop.remote(f"{error.on_command_line()} (on {place.name})"))
        raise
