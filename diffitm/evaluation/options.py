"""Options of the main pipeline, and what is wrong with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffitm.core.config import OnActors, find_outside, option
from diffitm.core.errors import InputError, flag
from diffitm.evaluation.races import RaceOptions
from diffitm.models.dpt_file import find_adapter
from diffitm.models.lora import lora_file
from diffitm.scoring.custom import find_scorer
from diffitm.scoring.protocols import FLOW_PROTOCOLS, TRAINED, choose_protocol, planned
from diffitm.scoring.racing import Racing, Rounds
from diffitm.tasks.registry import find_task, named

MOST = 2**63 - 1  # what a generator takes as a seed


@dataclass(frozen=True)
class ModelOptions(OnActors):
    """Options of what scores, and how."""

    model: list[str] = option(
        [], "diffusion models: shapes, a diffusers folder (or URI of one) or a Hub id"
    )
    clip: list[str] = option(
        [], "CLIP baselines: shapes, NAME:TAG, NAME:FILE or a folder, or their URIs"
    )
    scorer: list[str] = option(
        [],
        "other scorers: vqa:MODEL, itm:MODEL, file.py:Class or package.module:Class[:ARGUMENT] of your own",
    )
    protocol: Literal[
        "auto", "diffusionitm", "paper", "diffusion-classifier", "snr", "selfbench", "sigma"
    ] = option(
        "auto",
        "how timesteps and noise are chosen; auto: diffusionitm, of flow models (SD3, FLUX, ..) snr",
    )
    timesteps: list[int] = option(
        [10], "how many timesteps to ask the protocol for; several are compared"
    )
    timestep_list: list[float] = option(
        [],
        "these timesteps instead of the protocol's, such as a sweep's best; of flow models 1000 sigma",
    )
    timestep_weights: list[float] = option(
        [],
        "their weights in a score, such as those that a sweep has learned (default: all the same)",
    )
    seed: int = option(
        0, "seed of the noise (and of the timesteps of 'paper')", at_least=0, at_most=MOST
    )
    error: Literal["auto", "l2", "mse", "l1", "huber"] = option(
        "auto",
        "error that is averaged; auto: l2 norm for diffusionitm, snr and selfbench, mse otherwise",
    )
    resize: Literal["auto", "squash", "crop"] = option(
        "auto", "squash to a square, or crop the centre; auto: crop for diffusion-classifier"
    )
    latents: Literal["mean", "sample"] = option("mean", "posterior mean, or one seeded sample")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: on a GPU fp16 (bf16 for transformers such as SD3), else fp32"
    )
    variant: str | None = option(
        None,
        "weights variant, such as fp16, of a diffusers folder, or of those of its parts that have it",
    )
    single_file_config: str | None = option(
        None,
        "diffusers folder or Hub id whose configs and tokenizers models in one file have (default: a "
        "Hub id that diffusers tells by the weights)",
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        None,
        "what the diffusion models predict, where their scheduler's config does not say it or is wrong",
    )
    lora: list[str] = option(
        [],
        "LoRA files or URIs for the diffusion models, each a model of its own; none is the base",
    )
    dpt: list[str] = option(
        [],
        "DPT's score in place of errors: adapters that finetune --objective dpt left; none is the error",
    )
    dpt_timestep: int = option(500, "timestep of DPT's score", at_least=0, at_most=TRAINED - 1)
    resolution: int | None = option(
        None, "side of images in pixels for flow models: 512 costs a quarter of 1024", at_least=1
    )
    empty: Literal["text", "zeros"] = option(
        "text", "what no text is: the encoded empty text, or zeros, which SD3 was trained with"
    )
    batch_size: int = option(64, "forwards of the model in one batch", at_least=1)
    compile: bool = option(
        False,
        "compile the diffusion models (torch.compile) for batches of that size: takes a minute or more when "
        "an actor starts",
    )
    racing: float | None = option(
        None,
        "score candidates only as far as their decision needs: the probability, such as 0.01, that one comes "
        "out otherwise than in full",
    )
    n_samples: list[int] = option(
        [],
        "race by Diffusion Classifier's rounds instead: timesteps by the end of each, such as 16 64",
    )
    to_keep: list[int] = option([], "candidates kept after each of these rounds, such as 5 1")
    racing_audit: float = option(
        0.0,
        "share of examples, such as 0.05, that is scored in full as well, to measure how many come out alike",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class GdbenchConfig(ModelOptions):
    """Options of pipelines/gdbench.py."""

    tasks: list[str] = option(
        ["gdbench"],
        "which tasks: names, suites or all; of your own mine.jsonl (.csv, .tsv, .parquet, .tar), "
        "module:Class or file.py:Class",
    )
    data: str = option("shapes", "data root with a folder a task; shapes draws the embedded world")
    out: str = option("out/gdbench", "folder or URI for scores, results and the report")
    prompts: list[str] = option(
        [], "texts that every diffusion model generates images of, from the same seeds"
    )
    samples: int = option(4, "images of a prompt", at_least=1)
    sampling_steps: int = option(25, "steps of the sampler for an image", at_least=1)
    guidance: float = option(7.5, "classifier-free guidance of the images")
    dpt_correction: float = option(
        0.5,
        "self-correction of images by --dpt: how far latents follow the score's gradient at a step of DDIM",
        at_least=0,
    )
    segmentation: str | None = option(
        None,
        "shapes or a folder with train/ and val/: a linear probe of every CLIP's patch features",
    )
    clip_benchmark: list[str] = option(
        [], "data sets of the clip-benchmark package that every CLIP is measured on"
    )
    clip_benchmark_root: str = option("data/clip-benchmark", "where that package keeps them")
    mllm: str | None = option(
        None, "file.py:function of yours that measures a vision tower in a multimodal LLM"
    )
    limit: int | None = option(None, "at most this many examples a task, evenly spread", at_least=1)
    scenes: int = option(100, "scenes that --data shapes draws", at_least=10)
    published_bias: bool = option(
        False, "also show mmbias as the published code pools two of its pairs"
    )
    check: bool = option(
        False, "say which tasks DATA has, with all their images, and score nothing"
    )
    report_only: bool = option(False, "recompute everything from OUT's scores, without a model")


def lora_names(config: ModelOptions) -> list[str | None]:
    """Each --lora once; without any, or for 'none', the base model."""
    return [None if name == "none" else name for name in dict.fromkeys(config.lora or ["none"])]


def dpt_names(config: ModelOptions) -> list[str | None]:
    """Each --dpt once; without any, or for 'none', the error score."""
    return [None if name == "none" else name for name in dict.fromkeys(config.dpt or ["none"])]


def task_names(config: GdbenchConfig) -> list[str]:
    """The chosen tasks, each once; a suite stands for its tasks."""
    return named(config.tasks)


def check_options(config: GdbenchConfig) -> None:
    """Raises InputError with all problems of the options."""
    problems = check_models(config)
    if not config.clip and (config.segmentation or config.clip_benchmark or config.mllm):
        problems.append("--segmentation, --clip-benchmark and --mllm measure CLIPs: give a --clip")
    corrects = bool(config.prompts) and any(dpt_names(config))
    if config.dpt_correction != GdbenchConfig().dpt_correction and not corrects:
        text = "is of images by DPT: give a --dpt and --prompts"
        problems.append(f"--dpt-correction {config.dpt_correction:g}: {text}")
    problems += task_problems(config)
    if problems:
        raise InputError("\n".join(problems))


def check_models(config: ModelOptions) -> list[str]:
    """All problems of the options of what scores, and of the numbers."""
    problems = []
    if not config.model and not config.clip and not config.scorer:
        what = "--model, --clip or --scorer"
        problems.append(f"give at least one {what} (shapes is an embedded model and CLIP)")
    for name in config.scorer:
        try:
            find_scorer(name)
        except InputError as error:
            problems.append(error.on_command_line())
    problems += find_outside(config)
    for lora in lora_names(config):
        try:
            _ = lora and lora_file(lora)
        except InputError as error:
            problems.append(error.on_command_line())
    problems += _list_problems(config) + _race_problems(config) + _dpt_problems(config)
    if config.compile and not config.model:
        problems.append("--compile is of diffusion models: give a --model")
    for count in asked_timesteps(config):
        try:
            _planned(config, count, config.protocol in FLOW_PROTOCOLS)
        except InputError as error:
            problems.append(error.on_command_line())
    return problems


def plans(config: ModelOptions, flow: bool) -> list[tuple[float, ...]]:
    """The timesteps that a model, of flow or not, is really scored at, for each --timesteps.

    Raises InputError for a protocol or a --timestep-list of the other kind of model.
    """
    if not config.timestep_list:
        counts = asked_timesteps(config)
        return list(dict.fromkeys(_planned(config, count, flow) for count in counts))
    choose_protocol(config.protocol, flow)
    if flow:
        return [tuple(config.timestep_list)]
    for step in config.timestep_list:
        if not step.is_integer():
            raise InputError(f"{step:g}: models with a table take whole timesteps", "timestep_list")
    return [tuple(map(int, config.timestep_list))]


def _planned(config: ModelOptions, count: int, flow: bool) -> tuple[float, ...]:
    return planned(choose_protocol(config.protocol, flow), count, config.seed)


def asked_timesteps(config: ModelOptions) -> list[int]:
    """How many timesteps the protocol is asked for; of rounds those of the last one."""
    return config.n_samples[-1:] or config.timesteps


def race_rules(config: ModelOptions) -> Racing | Rounds | None:
    """By what examples are raced, None for not at all. Raises InputError."""
    if config.n_samples or config.to_keep:
        return Rounds(tuple(config.n_samples), tuple(config.to_keep))
    return None if config.racing is None else Racing(config.racing)


def race_options(config: ModelOptions) -> RaceOptions | None:
    """How examples are raced, None for not at all. Raises InputError."""
    rules = race_rules(config)
    return RaceOptions(rules, config.racing_audit) if rules else None


def _race_problems(config: ModelOptions) -> list[str]:
    """What is wrong with --racing, --n-samples and --to-keep."""
    try:
        rules = race_rules(config)
    except InputError as error:
        return [error.on_command_line()]
    if rules is None and config.racing_audit:
        return ["--racing-audit measures races: give --racing or --n-samples"]
    if rules is not None and not config.model:
        return ["--racing is of diffusion models: give a --model"]
    if not isinstance(rules, Rounds):
        return []
    found = []
    if config.racing is not None:
        found.append("--racing and --n-samples are two ways to race; give one")
    if config.protocol != "diffusion-classifier":
        found.append(f"--protocol {config.protocol}: --n-samples is of diffusion-classifier")
    if config.timestep_list:
        found.append("--timestep-list: --n-samples says the timesteps")
    if config.timesteps not in (ModelOptions().timesteps, config.n_samples[-1:]):
        found.append(f"--timesteps {config.timesteps}: --n-samples says the timesteps")
    return found


def _dpt_problems(config: ModelOptions) -> list[str]:
    """What is wrong with --dpt, and options of errors beside it where no error is asked for."""
    problems = []
    for name in filter(None, dpt_names(config)):
        try:
            find_adapter(name, "dpt")
        except InputError as error:
            problems.append(error.on_command_line())
    if config.dpt and not config.model:
        problems.append("--dpt is a score of diffusion models: give a --model")
    if not any(dpt_names(config)) and config.dpt_timestep != ModelOptions().dpt_timestep:
        problems.append(f"--dpt-timestep {config.dpt_timestep}: is of DPT's score: give a --dpt")
    if None in dpt_names(config):
        return problems
    raced = config.racing is not None or bool(config.n_samples)
    given = {"lora": config.lora, "compile": config.compile, "racing": raced}
    return problems + [
        f"{flag(name)} is of the error score (an adapter brings the LoRA that it was trained with): give "
        "--dpt none as well"
        for name, value in given.items()
        if value
    ]


def _list_problems(config: ModelOptions) -> list[str]:
    """What is wrong with --timestep-list and --timestep-weights."""
    listed, weights = config.timestep_list, config.timestep_weights
    found = [
        f"--timestep-list {step:g}: must be 0 to {TRAINED - 1}"
        for step in listed
        if not 0 <= step < TRAINED
    ]
    if len(listed) > TRAINED:
        found.append(f"--timestep-list: {len(listed)} are too many, at most {TRAINED}")
    if weights and len(weights) != len(listed):
        found.append(
            f"--timestep-weights: {len(weights)} for {len(listed)} of --timestep-list; give one each"
        )
    if weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        found.append("--timestep-weights: must be 0 or more, and not all of them 0")
    return found


def task_problems(config: GdbenchConfig) -> list[str]:
    """Tasks that cannot be found, and two of the same name."""
    problems, seen = [], set()
    for name in task_names(config):
        try:
            task = find_task(name)
        except InputError as error:
            problems.append(error.on_command_line())
            continue
        if task.name in seen:
            problems.append(f"two tasks have the name {task.name!r}; rename yours ({name})")
        seen.add(task.name)
    return problems
