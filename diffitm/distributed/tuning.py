"""What a worker of Ray Train runs: the loop of a tuning run."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffitm.distributed.loading import Loader
from diffitm.matching.plan import make_plan, plan_timesteps
from diffitm.models.denoiser import Condition
from diffitm.models.load import load_denoiser
from diffitm.models.lora import load_lora, lora_weights
from diffitm.schema import Example
from diffitm.scoring import DenoiserScorer, scaled
from diffitm.tasks.find import find_task
from diffitm.training.cached import Cache, CachedLoader
from diffitm.training.draw import Item, Loaded, images_in
from diffitm.training.job import Job, Validation
from diffitm.training.result import AVERAGED, BEST, HISTORY, STATE, WEIGHTS
from diffitm.training.tune import Losses, Posterior, Tuner
from diffitm.training.validate import credits


@dataclass
class Progress:
    """How far a worker is: steps done, the lines of the log, validation accuracy of the base model and
    the best one since."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    base: float = 0.0
    best: float = -1.0
    best_step: int = 0


class Run:
    """One worker's model, optimiser and place in the run."""

    def __init__(self, job: Job, monitor: Any) -> None:
        context = ray.train.get_context()
        self.job, self.monitor = job, monitor
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        torch.manual_seed(job.seed)
        denoiser = load_denoiser(job.source, job.dtype, str(self.device), job.variant)
        texts = self._on_device(Cache(job.texts)) if job.texts else None
        self.tuner = Tuner(denoiser, job.objective, job.rank, job.seed, job.checkpointing, texts)
        self.parameters = self.tuner.parameters
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=job.rate, betas=(0.9, 0.999), weight_decay=job.weight_decay
        )
        self.rates = get_scheduler(job.schedule, self.optimizer, job.warmup, job.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=job.dtype == "fp16")
        self.ema = EMAModel(self.parameters, decay=job.ema) if job.ema else None
        self.loader: Loader | CachedLoader
        if job.latents:
            self.loader = CachedLoader(job, job.latents, self.rank, self.world)
        else:
            self.loader = Loader(job, self.rank, self.world, denoiser.resolution)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] | None = None

    def resume(self) -> None:
        """Go on from the checkpoint that Ray Train hands over, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            path = Path(folder)
            load_lora(self.tuner.unet, load_file(path / WEIGHTS))
            if (path / BEST).exists():
                self.best = load_file(path / BEST)
            state = torch.load(path / STATE, map_location=self.device, weights_only=True)
            known = json.loads((path / HISTORY).read_text())
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**known)

    def train(self) -> None:
        """All steps that are left. Stops on every worker alike when a loss is not finite."""
        self.resume()
        job, begin, since = self.job, time.perf_counter(), self.progress.step
        if self.progress.step == 0 and job.validation is not None:
            self._validate(job.validation)
        for batches in self.loader.steps(self.progress.step):
            logged = self._step(batches)
            if logged is None:
                return
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == job.steps
            if step % job.log_every == 0 or last:
                seconds = time.perf_counter() - begin
                done = (step - since) * job.size * job.micro
                self._log(logged | self._costs(seconds, done))
                begin, since, self.loader.waited = time.perf_counter(), step, 0.0
            check = job.validation
            if check is not None and (step % check.every == 0 or last):
                self._validate(check)
            if step % job.checkpoint_every == 0 or last:
                self._save()

    def _step(self, batches: list[Loaded]) -> dict[str, float] | None:
        """One update of the weights; what is logged of it, None if it had to stop."""
        self.optimizer.zero_grad(set_to_none=False)
        sums = torch.zeros(5, dtype=torch.float64)  # loss, E+, contrast, share held, weight
        for items, found, failures in batches:
            for failure in failures:
                self.monitor.lose.remote(failure)
            good = [i for i in items if i.image in found and i.negative_image in found]
            if not good:
                continue
            losses = self._losses(good, found)
            if not torch.isfinite(losses.loss):
                where = ", ".join(f"row {i.position} ({i.image})" for i in good)
                text = f"step {self.progress.step + 1}: the loss of {where} is {losses.loss.item()}"
                ray.get(self.monitor.stop.remote(text))
            self.scaler.scale(losses.loss / self.job.micro).backward()
            values = (losses.loss.detach(), losses.right, losses.contrast, losses.held)
            sums += torch.tensor([*(float(v) for v in values), 1.0], dtype=torch.float64)
        total = self._reduce(sums)
        if not torch.isfinite(total).all():
            return None
        if total[4] == 0:
            why = next((f for *_, failures in batches for f in failures), "see failures.json")
            text = f"step {self.progress.step + 1}: none of its images could be read: {why}"
            ray.get(self.monitor.stop.remote(text))
            return None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.job.clip)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            ray.get(self.monitor.stop.remote(f"step {self.progress.step + 1}: gradient {norm:g}"))
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rate = self.rates.get_last_lr()[0]
        self.rates.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        names = ("loss", "right", "contrast", "held")
        means = (total[:4] / max(1.0, float(total[4]))).tolist()
        return dict(zip(names, means, strict=True)) | {"norm": float(norm), "rate": rate}

    def _losses(self, items: list[Item], found: dict[str, Any]) -> Losses:
        """Images are encoded once; negatives of the same image need no latents of their own."""
        right = [item.image for item in items]
        wrong = [item.negative_image for item in items]
        unique = images_in(items)
        mean, deviation = self._posteriors([found[path] for path in unique])
        place = {path: i for i, path in enumerate(unique)}

        def pick(paths: list[str]) -> Posterior:
            rows = torch.tensor([place[path] for path in paths], device=self.device)
            return Posterior(mean.clone()[rows], deviation.clone()[rows])

        return self.tuner.losses(items, pick(right), pick(wrong) if wrong != right else None)

    def _posteriors(self, images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of latents [N, C, h, w], of pixels or as they were cached."""
        if self.job.latents:
            mean, deviation = (torch.stack(p).to(self.device) for p in zip(*images, strict=True))
            return mean, deviation
        pixels = torch.stack([scaled(image) for image in images])
        return self.tuner.denoiser.encode_posterior(pixels.to(self.device))

    def _on_device(self, cache: Cache) -> Callable[[Sequence[str]], Condition]:
        def read(texts: Sequence[str]) -> Condition:
            return {name: value.to(self.device) for name, value in cache(texts).items()}

        return read

    def _reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds gradients and sums up over the workers: one exchange a step."""
        if self.world == 1:
            return sums
        gradients = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        flat = torch.cat([*gradients, sums.float().to(self.device)])
        torch.distributed.all_reduce(flat)
        sizes = [len(g) for g in gradients]
        for parameter, part in zip(self.parameters, flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return flat[sum(sizes) :].double().cpu()

    def _costs(self, seconds: float, examples: int) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        if not peak:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rates = {
            "examples_per_second": examples / seconds,
            "seconds_per_update": seconds * self.job.size * self.job.micro / max(1, examples),
            "waiting": self.loader.waited / seconds,
        }
        return rates | {"peak_bytes": float(peak)}

    def _log(self, values: dict[str, float]) -> None:
        line = {"step": self.progress.step, **values}
        self.progress.history.append(line)
        if self.rank == 0:
            self.monitor.add.remote(line)

    def _validate(self, check: Validation) -> None:
        """Accuracy of the tasks, examples shared out over the workers; keeps the best weights."""
        self.tuner.unet.eval()
        with self._averaged():
            found = {name: self._accuracy(name, check) for name in check.tasks}
            mean = float(np.mean([value for value in found.values() if value is not None] or [0.0]))
            if self.progress.step == 0:
                self.progress.base = mean
            elif mean > self.progress.best:
                self.progress.best, self.progress.best_step = mean, self.progress.step
                self.best = lora_weights(self.tuner.unet)
        self._log({f"accuracy/{name}": value for name, value in found.items() if value is not None})

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the present ones, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        yield
        self.ema.restore(self.parameters)

    def _accuracy(self, name: str, check: Validation) -> float | None:
        task = find_task(name)()
        chosen = spread(list(task.examples(check.root)), check.examples)[self.rank :: self.world]
        steps = plan_timesteps("diffusionitm", check.timesteps)
        plan = make_plan(steps, self.tuner.denoiser.latent_shape)
        scorer = DenoiserScorer(self.tuner.denoiser, plan, check.root, self.job.resize)
        values = [c for c in credits(task, chosen, scorer) if c is not None]
        sums = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1]) if sums[1] else None

    def _save(self) -> None:
        """A checkpoint with everything that the rest of the run depends on. Randomness needs no
        state: it is a function of seed, epoch and row."""
        line = self.progress.history[-1] if self.progress.history else {"step": 0}
        if self.rank != 0:
            ray.train.report(line)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            save_file(lora_weights(self.tuner.unet), path / WEIGHTS)
            if self.best is not None:
                save_file(self.best, path / BEST)
            if self.ema is not None:
                with self._averaged():
                    save_file(lora_weights(self.tuner.unet), path / AVERAGED)
            state = {
                "optimizer": self.optimizer.state_dict(),
                "rates": self.rates.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
            }
            torch.save(state, path / STATE)
            (path / HISTORY).write_text(json.dumps(vars(self.progress)))
            ray.train.report(line, checkpoint=ray.train.Checkpoint.from_directory(path))


def spread(examples: list[Example], most: int) -> list[Example]:
    """At most so many, evenly spread."""
    if most >= len(examples):
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    torch.set_num_threads(max(1, int(settings["cpus"])))
    Run(settings["job"], settings["monitor"]).train()
