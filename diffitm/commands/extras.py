"""What a run makes beside the scores: images that its models generate, and probes of its CLIPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffitm.commands.run_record import LOG, RunArtifacts, log_of
from diffitm.commands.stages.probe import find_probes
from diffitm.core import storage
from diffitm.evaluation.options import GdbenchConfig
from diffitm.models.lora import unpinned
from diffitm.scoring.specs import ClipSpec, DiffusionSpec, DptSpec, Spec
from diffitm.training.run_folder import PICTURES

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool


class Extras:
    """Images of `config`'s prompts by the specs that are diffusion models, its probes of those that are
    CLIPs; all of it below OUT.

    Raises InputError for a probe's folder, function or package that is not there.
    """

    def __init__(self, config: GdbenchConfig, specs: Sequence[Spec], out: str) -> None:
        from diffitm.commands.stages.sample import Sampling, samples_folder

        self.out = out
        self.prompts = list(dict.fromkeys(config.prompts))
        self.sampling = Sampling(config.samples, config.sampling_steps, config.guidance)
        self.painted: dict[str, DiffusionSpec | DptSpec] = {
            s.label: s for s in specs if isinstance(s, DiffusionSpec)
        }
        corrected = (s for s in specs if isinstance(s, DptSpec))
        self.painted |= {s.label: replace(s, correction=config.dpt_correction) for s in corrected}
        self.clips = {s.label: s.source for s in specs if isinstance(s, ClipSpec)}
        self.probes = find_probes(
            config.segmentation, config.scenes, config.clip_benchmark, config.clip_benchmark_root,
            config.mllm, out,
        )  # fmt: skip
        folders = {
            label: samples_folder(spec, self.prompts, self.sampling)
            for label, spec in self.painted.items()
        }
        tuned = {label: clip.folder for label, clip in self.clips.items() if clip.folder}
        self.artifacts = RunArtifacts(
            samples=folders if self.prompts else {},
            logs={s.label: log for s in specs if (log := _log(s)) is not None}
            | {label: storage.join(folder, LOG) for label, folder in tuned.items()},
            pictures={label: storage.join(folder, PICTURES) for label, folder in tuned.items()},
            probes={n: [p.file(c) for p in self.probes] for n, c in self.clips.items()}
            if self.probes
            else {},
        )

    def make(self, pool: ActorPool) -> None:
        """What OUT does not hold yet."""
        from diffitm.commands.stages.probe import probe
        from diffitm.commands.stages.sample import sample

        for clip in self.clips.values():
            probe(self.probes, clip, self.out, pool)
        for label, folder in self.artifacts.samples.items():
            where = storage.join(self.out, folder)
            sample(where, label, self.painted[label], self.prompts, self.sampling, pool)


def _log(spec: Spec) -> str | None:
    """Where the log of a LoRA or an adapter is."""
    if isinstance(spec, DptSpec):
        return log_of(spec.adapter.uri)
    return log_of(unpinned(spec.lora)) if isinstance(spec, DiffusionSpec) and spec.lora else None
