"""A trained CLIP in forms that stock code loads: open_clip's folder and transformers' folder."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffitm.core import storage
from diffitm.models.clip import LOCAL, TOKENIZER_FILES, ClipSource, on_machine
from diffitm.models.clip_to_transformers import NoFormError, convert, make_processor

_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def write_open_clip(model: Any, source: ClipSource, out: str) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and, where it has its own, the
    tokenizer of a model that was loaded from `source` to the folder or URI `out`.

    `open_clip.create_model_and_transforms("local-dir:OUT")` and `--clip OUT` load all of it: weights,
    QuickGELU, preprocessing. `create_model_and_transforms(NAME, pretrained=FILE)` loads the weights
    (NAME: see stock_name). A name alone means OpenAI's mean and std and bicubic resizing of the
    shorter side, so SigLIP and DFN also need the arguments of stock_preprocessing.
    """
    config = open_clip.get_model_config(on_machine(source)[0])
    config["quick_gelu"] = bool(config.get("quick_gelu")) or source.quick_gelu
    used = {key: model.visual.preprocess_cfg[key] for key in _PREPROCESS}
    note = json.dumps({"model_cfg": config, "preprocess_cfg": used}, indent=2)
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with _folder(out) as folder:
        (folder / "open_clip_config.json").write_text(note)
        save_file(weights, folder / "open_clip_model.safetensors")
        (folder / "open_clip_model.safetensors").chmod(0o644)  # it is made for its owner alone
        if config["text_cfg"].get("hf_tokenizer_name"):
            _write_tokenizer(source, folder)


def stock_name(source: ClipSource) -> str | None:
    """The name under which open_clip makes the same model of the weights alone: ViT-L-14-quickgelu
    for 'ViT-L-14:openai'. None for a folder or a Hub repository, which have no name."""
    if source.pretrained is None:
        return None
    known = open_clip.get_model_config(source.model).get("quick_gelu", False)
    return source.model if known or not source.quick_gelu else f"{source.model}-quickgelu"


def stock_preprocessing(model: Any) -> dict[str, Any]:
    """Arguments of open_clip for the preprocessing of a model, where it is not that of a name alone."""
    used, alone = model.visual.preprocess_cfg, asdict(PreprocessCfg())
    found = {key: used[key] for key in _PREPROCESS[:4] if used[key] != alone[key]}
    return {f"image_{key}": tuple(v) if isinstance(v, list) else v for key, v in found.items()}


def write_transformers(model: Any, source: ClipSource, out: str) -> str | None:
    """Write a `save_pretrained` folder, or say why transformers has no form for the model.

    A ViT with a class token becomes a CLIPModel, which CLIPVisionModel and
    CLIPVisionModelWithProjection load, too; timm's SigLIP tower a SiglipModel (SiglipVisionModel).
    Weights are float32. Embeddings of both towers are compared with those of `model` (unit vectors,
    1e-4) before anything is written. CLIPModel has no logit bias.

    preprocessor_config.json makes the same pixels of an image that needs no resizing. Others differ by
    up to 2 of 255 levels, as transformers resizes tensors, not PIL images (with `backend="pil"` they
    do not differ), and an odd margin can be cropped one pixel aside.
    The tokenizer is the source's; OpenAI's becomes a CLIPTokenizer. open_clip also mends the text
    (ftfy, HTML; for SigLIP lower case without punctuation), transformers does not. OpenAI's tokens
    are padded by 0 there and by the end token here, which changes no embedding.
    """
    try:
        plain = copy.deepcopy(model).float().cpu().eval()
        made, processor = convert(plain), make_processor(plain)
    except NoFormError as reason:
        return str(reason)
    with _folder(out) as folder:
        made.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)
        processor.save_pretrained(folder)
        _write_tokenizer(source, folder)
    return None


def _write_tokenizer(source: ClipSource, folder: Path) -> None:
    """The files of a folder's own tokenizer as they are, else those that transformers saves."""
    where, _ = on_machine(source)
    tokenizer = open_clip.get_tokenizer(where)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        _openai_tokenizer(tokenizer).save_pretrained(folder)
    elif where.startswith(LOCAL):
        for name in TOKENIZER_FILES:
            if (found := Path(where.removeprefix(LOCAL)) / name).is_file():
                shutil.copyfile(found, folder / name)
    else:
        tokenizer.save_pretrained(folder)


def _openai_tokenizer(tokenizer: Any) -> Any:
    names = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(i, token): i for token, i in tokenizer.encoder.items()},
        merges=list(tokenizer.bpe_ranks),
        model_max_length=tokenizer.context_length,
    )


@contextmanager
def _folder(out: str) -> Iterator[Path]:
    """A local folder whose files are, or become, those of OUT."""
    if "://" not in out:
        folder = Path(storage.absolute(out))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir()):
            storage.write_bytes(storage.join(out, path.name), path.read_bytes())
