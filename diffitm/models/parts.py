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

from diffitm.models.weight_files import WeightsError, check_whole

log = logging.getLogger("diffitm")
UNBOUND = 10**9  # transformers gives a tokenizer without a length one above
PADDING = 128  # rows that an embedding may have beyond its tokenizer's words
_OTHER_SCHEDULES = ("EDM", "FlowMatch")  # their configs hold no betas
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
        for file in sorted((folder / part).glob("*.json")):
            read_json(file)
            if file.read_bytes().startswith(b"\xef\xbb\xbf"):  # which diffusers does not take
                raise OSError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
        for file in sorted((folder / part).glob("*.txt")):
            try:
                check_whole(file)
            except WeightsError as error:
                raise OSError(str(error)) from error


def read_tokenizer(
    location: str, part: str, revision: str | None, encoder: Mapping[str, Any]
) -> CLIPTokenizer:
    """A tokenizer, and whether it fits the settings (config.json) of its text encoder.

    Raises OSError where it lacks its words, or has others than the encoder has embeddings for.
    """
    folder = Path(location) / part
    if Path(location).is_dir():
        _check_tokenizer_files(folder)
    tokenizer = CLIPTokenizer.from_pretrained(location, subfolder=part, revision=revision)
    words, rows = len(tokenizer), int(encoder["vocab_size"])
    if not words <= rows < words + PADDING:
        raise OSError(
            f"its {part} has {words} words, its text encoder embeddings for {rows}: parts of two models"
        )
    length, places = tokenizer.model_max_length, int(encoder["max_position_embeddings"])
    if UNBOUND > length > places:
        raise OSError(
            f"its {part} gives texts {length} tokens, its text encoder takes {places}: parts of two models"
        )
    if length > UNBOUND:
        tokenizer.model_max_length = places
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        there = ", ".join(sorted(names)) or "nothing"
        raise OSError(
            f"{folder} has neither tokenizer.json nor vocab.json with merges.txt, but {there}: "
            "a download that broke off?"
        )


def read_schedule(location: str, revision: str | None) -> DDPMScheduler:
    """The training schedule, whatever sampling scheduler the folder names. Raises OSError."""
    config = DDPMScheduler.load_config(location, subfolder="scheduler", revision=revision)
    name = str(config.get("_class_name"))
    if name.startswith(_OTHER_SCHEDULES):
        raise OSError(f"the scheduler {name} gives no betas, only DDPM's schedule is supported")
    return DDPMScheduler.from_config(config)


def schedule_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's config does not say, and what is taken for it: DDPM's defaults, as diffusers
    takes them."""
    defaults = dict(DDPMScheduler().config)
    lacking = ["prediction_type", "num_train_timesteps"]
    if config.get("trained_betas") is None:
        lacking += BETAS
    return {name: defaults[name] for name in lacking if config.get(name) is None}


def tokenizer_defaults(folder: Path, part: str, encoder: Mapping[str, Any]) -> str | None:
    """What is taken where a tokenizer says neither its length nor its padding."""
    if (folder / part / "tokenizer_config.json").is_file():
        return None
    tokenizer = read_tokenizer(str(folder), part, None, encoder)
    return (
        f"its {part} has no tokenizer_config.json: texts have {tokenizer.model_max_length} tokens, as the "
        f"text encoder takes, and are filled with {tokenizer.pad_token!r}"
    )
