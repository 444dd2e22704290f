"""Parts of a diffusers folder on this machine: their tokenizers, schedule and files, checked as they are
read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

from diffitm.models.noise_schedule import FLOW_TIME, PREDICTIONS
from diffitm.models.weight_files import WeightsError, check_whole, few

log = logging.getLogger("diffitm")
# Files of a tokenizer that is no CLIP's, one of which it has.
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
UNBOUND = 10**9  # transformers gives a tokenizer without a length one above
PADDING = 128  # rows that an embedding may have beyond its tokenizer's words
MORE_PADDING = 1024  # the same of language models
# Their configs hold no betas, or such as mean something else.
_OTHER_SCHEDULES = (
    *("EDM", "FlowMatch", "ScoreSde", "KarrasVe", "VQDiffusion", "DDPMWuerstchen", "CogVideoX"),
    *("CosineDPM", "Consistency", "CMStochastic", "IPNDM", "Amused"),
)
# What samples on DDPM's schedule, and is no kin of it by diffusers' list.
_KIN = ("DDIMInverse", "DDIMParallel", "DDPMParallel", "LCM", "TCD", "SASolver", "RePaint")
TOKENIZER_CONFIG = "tokenizer_config.json"
MARKS = 2  # around a text's tokens
BETAS = ("beta_start", "beta_end", "beta_schedule")


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file, with a byte order mark or without. Raises OSError that names it."""
    if not file.is_file():
        raise OSError(f"there is no {file}")
    try:
        check_whole(file)
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except WeightsError as error:
        raise OSError(str(error)) from error
    except ValueError as error:
        raise OSError(f"{file} is no JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise OSError(f"{file} holds no settings by name")
    return found


def check_settings(folder: Path, parts: tuple[str, ...]) -> None:
    """Whether the small files of the parts are whole. Raises OSError that names one which is not."""
    for part in parts:
        for file in sorted((folder / part).glob("[!.]*.json")):
            read_json(file)
            if file.read_bytes().startswith(b"\xef\xbb\xbf"):  # which diffusers does not take
                raise OSError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
        for file in sorted((folder / part).glob("[!.]*.txt")):
            try:
                check_whole(file)
            except WeightsError as error:
                raise OSError(str(error)) from error


def read_tokenizer(
    location: str,
    part: str,
    revision: str | None,
    encoder: Mapping[str, Any],
    kind: Any = CLIPTokenizer,
) -> Any:
    """A tokenizer of a kind of transformers', and whether it fits the settings (config.json) of its text
    encoder.

    Raises OSError where it lacks its words, or has others than the encoder has embeddings for.
    """
    folder, is_clip = Path(location) / part, kind is CLIPTokenizer
    if Path(location).is_dir():
        _check_tokenizer_files(folder, is_clip)
        _check_length(folder / TOKENIZER_CONFIG)
    try:
        tokenizer = kind.from_pretrained(location, subfolder=part, revision=revision)
    except ImportError as error:  # of what reads a vocabulary of sentencepiece
        raise OSError(f"its {part} cannot be read here: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # of settings that are of another kind
        raise OSError(f"its {part} cannot be read: {type(error).__name__}: {error}") from error
    encoder = encoder.get("text_config") or encoder
    words, rows = len(tokenizer), int(encoder["vocab_size"])
    if not words <= rows < words + (PADDING if is_clip else MORE_PADDING):
        raise OSError(
            f"its {part} has {words} words, its text encoder embeddings for {rows}: parts of two models"
        )
    if not is_clip:
        if tokenizer.pad_token is None:
            raise OSError(f"its {part} has no pad_token, which fills short texts")
        return tokenizer
    length, places = tokenizer.model_max_length, int(encoder["max_position_embeddings"])
    if UNBOUND > length > places:
        raise OSError(
            f"its {part} gives texts {length} tokens, its text encoder takes {places}: parts of two models"
        )
    if length > UNBOUND:
        tokenizer.model_max_length = places
    return tokenizer


def _check_tokenizer_files(folder: Path, is_clip: bool) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if not is_clip:
        if names.isdisjoint(VOCABULARIES):
            raise OSError(
                f"{folder} has none of {', '.join(VOCABULARIES)}: a download that broke off?"
            )
        return
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        there = ", ".join(sorted(names)) or "nothing"
        raise OSError(
            f"{folder} has neither tokenizer.json nor vocab.json with merges.txt, but {there}: "
            "a download that broke off?"
        )
    if "tokenizer.json" not in names:
        _check_merges(folder)


def _check_merges(folder: Path) -> None:
    """Whether the merges make the words: of a file that was cut off other tokens come, without a word."""
    words = read_json(folder / "vocab.json")
    file = folder / "merges.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OSError(f"{file} is not in UTF-8: {error}") from error
    made = {line.replace(" ", "", 1) for line in lines}
    lost = [w for w in words if len(w.removesuffix("</w>")) > 1 and w not in made and w[0] != "<"]
    if lost:
        raise OSError(
            f"{file} makes {len(made):,} words, and not {len(lost):,} of the {len(words):,} in vocab.json "
            f"({few(lost)}): a download that broke off?"
        )


def _check_length(file: Path) -> None:
    """Whether a tokenizer's settings give a length that texts can have."""
    length = read_json(file).get("model_max_length") if file.is_file() else None
    if length is None:
        return
    if isinstance(length, bool) or not isinstance(length, int | float) or length <= MARKS:
        raise OSError(
            f"{file} gives model_max_length {length!r}, not the number of tokens that its text encoder "
            "takes (77 of a CLIP)"
        )


def read_schedule(location: str, revision: str | None) -> DDPMScheduler:
    """The training schedule, whatever sampling scheduler the folder names. Raises OSError."""
    found = DDPMScheduler.load_config(location, subfolder="scheduler", revision=revision)
    config = {key: value for key, value in found.items() if value is not None}  # null is no value
    _check_schedule(config)
    scheduler = DDPMScheduler.from_config(config)
    kept = scheduler.alphas_cumprod
    steps = scheduler.config.num_train_timesteps
    if len(kept) != steps:
        raise OSError(f"its scheduler gives {len(kept)} betas for num_train_timesteps {steps}")
    if not bool(((kept >= 0) & (kept <= 1)).all()):
        given = ", ".join(f"{key} {scheduler.config[key]}" for key in BETAS)
        raise OSError(f"its scheduler's betas are not all between 0 and 1: {given}")
    return scheduler


def read_flow(location: str, revision: str | None) -> dict[str, Any]:
    """The settings of a scheduler that is one of a rectified flow of 1000 steps. Its shift, which spreads a
    sampler's steps, changes no noise. Raises OSError."""
    config = DDPMScheduler.load_config(location, subfolder="scheduler", revision=revision)
    name, steps = str(config.get("_class_name")), config.get("num_train_timesteps", FLOW_TIME)
    if not name.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
        raise OSError(f"the scheduler {name} is not that of a flow model (FlowMatch..)")
    if steps != FLOW_TIME:
        raise OSError(
            f"its scheduler_config.json gives num_train_timesteps {steps!r}, flow models have {FLOW_TIME}"
        )
    if config.get("invert_sigmas"):
        raise OSError("its scheduler_config.json gives invert_sigmas, which is not supported")
    return dict(config)


def _check_schedule(config: Mapping[str, Any]) -> None:
    """Raises OSError that names the setting which DDPM's schedule does not have."""
    name = str(config.get("_class_name"))
    if name.startswith(_OTHER_SCHEDULES):
        raise OSError(
            f"the scheduler {name} gives no betas of DDPM's, only DDPM's schedule is supported"
        )
    for key in ("snr_shift_scale", "use_flow_sigmas"):
        if config.get(key):
            raise OSError(
                f"its scheduler_config.json gives {key} {config[key]!r}, only DDPM's plain schedule is "
                "supported"
            )
    steps = config.get("num_train_timesteps", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OSError(
            f"its scheduler_config.json gives num_train_timesteps {steps!r}, not a number such as 1000"
        )
    for key in ("beta_start", "beta_end"):
        value = config.get(key, 0.5)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise OSError(
                f"its scheduler_config.json gives {key} {value!r}, not a number between 0 and 1"
            )
    prediction = config.get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS:
        raise OSError(
            f"its scheduler_config.json gives prediction_type {prediction!r}, which is not one of "
            f"{', '.join(PREDICTIONS)}"
        )


def strange_scheduler(config: Mapping[str, Any]) -> str | None:
    """The scheduler's class where it is none that is known to sample on DDPM's schedule."""
    name = config.get("_class_name")
    known = (*DDPMScheduler._compatibles, *(f"{kin}Scheduler" for kin in _KIN))
    return None if name is None or name in known else str(name)


def schedule_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's config does not say, and what is taken for it: DDPM's defaults, as diffusers
    takes them."""
    defaults = dict(DDPMScheduler().config)
    lacking = ["prediction_type", "num_train_timesteps"]
    if config.get("trained_betas") is None:
        lacking += BETAS
    return {name: defaults[name] for name in lacking if config.get(name) is None}


def tokenizer_defaults(folder: Path, part: str, encoder: Mapping[str, Any]) -> list[str]:
    """What is taken where a tokenizer says not its length or its padding, and texts that it cuts short."""
    tokenizer = read_tokenizer(str(folder), part, None, encoder)
    length, places = tokenizer.model_max_length, int(encoder["max_position_embeddings"])
    file = folder / part / TOKENIZER_CONFIG
    if not file.is_file():
        return [
            f"its {part} has no tokenizer_config.json: texts have {length} tokens, as the "
            f"text encoder takes, and are filled with {tokenizer.pad_token!r}"
        ]
    settings = read_json(file)
    others = folder / part / "special_tokens_map.json"
    taken = []
    if "pad_token" not in settings and not (others.is_file() and "pad_token" in read_json(others)):
        taken.append(f"pad_token {tokenizer.pad_token!r}")
    if settings.get("model_max_length") is None:
        taken.append(f"model_max_length {length}")
    lines = []
    if taken:
        lines.append(
            f"{part}/{TOKENIZER_CONFIG} does not say all, so there is taken: {', '.join(taken)}"
        )
    if length < places:
        lines.append(
            f"{part}/{TOKENIZER_CONFIG} gives texts model_max_length {length} tokens, its text encoder "
            f"takes {places}: texts are cut earlier"
        )
    return lines
