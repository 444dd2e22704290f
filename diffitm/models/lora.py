"""LoRA weights of a U-Net, in the four layouts that are about, merged into its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.denoiser import Denoiser
from diffitm.models.weight_cache import on_disk

# diffusers ('unet.<module>.lora_A.weight' or '.lora.down.weight') and PEFT ('base_model.model.<module>...').
_PLAIN = re.compile(
    r"(?:unet\.|base_model\.model\.)?(?P<module>.+?)\."
    r"(?P<side>lora_A|lora_B|lora\.down|lora\.up)(?:\.[\w-]+)?\.weight"
)
# The older attention-processor file: '<block>.attn1.processor.to_q_lora.down.weight'.
_PROCESSOR = re.compile(
    r"(?:unet\.)?(?P<block>.+)\.processor\.(?P<name>to_q|to_k|to_v|to_out)_lora\."
    r"(?P<side>down|up)\.weight"
)
_ALPHA = re.compile(r"(?:unet\.|base_model\.model\.)?(?P<module>.+)\.alpha")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_DOWN = ("lora_A", "lora.down", "down")
_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_CONFIG = "adapter_config.json"
_PIN = "#sha256="  # of a URI: which content is meant


def lora_file(path: str) -> Path:
    """The weights file that a path means: itself, or the known name in a folder. That of a URI is a copy
    on this machine.

    Raises InputError if there is none.
    """
    if "://" in path:
        return _copy(path)
    given = Path(path).expanduser()
    candidates = [given, *(given / name for name in _FILES)]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        raise InputError(_nothing(path), "lora")
    return found


def _nothing(path: str) -> str:
    return f": {path!r} is neither a file nor a folder with one of {', '.join(_FILES)}"


def _copy(uri: str) -> Path:
    uri, _, digest = uri.partition(_PIN)
    folder: str = uri
    names: tuple[str, ...] = _FILES
    if storage.name(uri).endswith((".safetensors", ".bin")):
        folder, names = storage.parent(uri), (storage.name(uri),)
    there = storage.sizes(folder)
    name = next((name for name in names if name in there), None)
    if name is None:
        raise InputError(_nothing(storage.without_query(uri)), "lora")
    listed = {n: there[n] for n in (name, _CONFIG) if n in there}
    return on_disk(folder, listed, lambda copy: digest_of(copy / name), digest or None)[0] / name


def locate(path: str) -> str:
    """What stands for a LoRA file on every machine: its absolute path, or its URI with its content's
    digest. Raises InputError if there is none."""
    file = lora_file(path)
    if "://" not in path:
        return str(file.absolute())
    is_file = storage.name(path) == file.name
    return (path if is_file else storage.join(path, file.name)) + _PIN + digest_of(file)


def unpinned(located: str) -> str:
    """The path or URI alone."""
    return located.partition(_PIN)[0]


def digest_of(file: Path) -> str:
    """sha256 of a LoRA file and of the adapter_config.json beside it, which may hold its scale."""
    total = hashlib.sha256(file.read_bytes())
    if (beside := file.parent / _CONFIG).is_file():
        total.update(beside.read_bytes())
    return total.hexdigest()


def read_lora(path: str) -> tuple[dict[str, Tensor], float | None]:
    """The tensors of a LoRA file, and the scale (alpha / r) that its config or metadata states.

    Raises InputError if there is no such file, it cannot be read or is no plain LoRA.
    """
    file = lora_file(path)
    try:
        tensors, settings = _read(file)
    except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise InputError(f": {file} cannot be read: {error}", "lora") from error
    return tensors, _stated_scale(settings, file)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    beside = file.parent / _CONFIG
    settings = json.loads(beside.read_text()) if beside.is_file() else {}
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        settings = settings or {k.removeprefix("unet."): v for k, v in metadata.items()}
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return tensors, settings


def _stated_scale(settings: dict[str, object], file: Path) -> float | None:
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise InputError(f"{file}: {key} = {settings[key]!r} is not supported, only plain LoRA")
    if "lora_alpha" not in settings or "r" not in settings:
        return None
    rank = float(str(settings["r"]))
    return float(str(settings["lora_alpha"])) / (rank**0.5 if settings.get("use_rslora") else rank)


def lora_unet(denoiser: Denoiser) -> nn.Module:
    """The U-Net whose weights a LoRA changes.

    Raises InputError for a model without one.
    """
    unet: nn.Module | None = getattr(denoiser, "unet", None)
    if unet is None:
        name = type(denoiser).__name__
        raise InputError(
            f": a {name} takes no LoRA and cannot be tuned, only Stable Diffusion's U-Net can",
            "model",
        )
    return unet


def merge_lora(unet: nn.Module, tensors: Mapping[str, Tensor], scale: float | None = None) -> int:
    """Add scale * up @ down to each weight; how many tensors were used, which is all of them.

    `scale` None means alpha / r where the file holds alpha, else 1 (the old files carry no alpha).
    Raises InputError that lists the keys which do not fit the U-Net; nothing is changed then.
    """
    pairs, alphas = match_lora(unet, tensors)
    modules = dict(unet.named_modules())
    for name, pair in pairs.items():
        weight = modules[name].weight
        rank = len(pair["down"])
        factor = scale if scale is not None else alphas.get(name, rank) / rank
        delta = pair["up"].float().flatten(1) @ pair["down"].float().flatten(1)
        merged = weight.float() + factor * delta.to(weight.device).view(weight.shape)
        with torch.no_grad():
            weight.copy_(merged.to(weight.dtype))
    return 2 * len(pairs) + len(alphas)


def match_lora(
    unet: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """The tensors 'down' and 'up' of each module of the U-Net that has some, and the alphas by module.

    Raises InputError that lists the keys which do not fit.
    """
    tensors = _from_kohya(unet, tensors)
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for key, tensor in tensors.items():
        if match := _PROCESSOR.fullmatch(key):
            module = _of_processor(match)
        elif (match := _PLAIN.fullmatch(key)) or (match := _ALPHA.fullmatch(key)):
            module = match["module"]
        else:
            strange.append(key)
            continue
        if "side" not in match.groupdict():
            alphas[module] = float(tensor)
            continue
        side = "down" if match["side"] in _DOWN else "up"
        pairs.setdefault(module, {})[side] = tensor
    modules = dict(unet.named_modules())
    strange += [name for name, pair in pairs.items() if not _fits(modules.get(name), pair)]
    strange += [f"{name}.alpha" for name in alphas if name not in pairs]
    if strange or not pairs:
        shown = ", ".join(strange[:5]) or "no LoRA tensor at all"
        raise InputError(
            f"the LoRA weights do not fit this U-Net: {len(strange)} of {len(tensors)} keys, "
            f"such as {shown}"
        )
    return pairs, alphas


def _from_kohya(unet: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Kohya's names (lora_unet_down_blocks_0_.. or lora_unet_input_blocks_4_..) as diffusers has them.

    Raises InputError for a part of the text encoder, which scoring does not merge, and for names that
    diffusers does not know.
    """
    if not all(key.startswith("lora_") for key in tensors):
        return tensors
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    texts = [key for key in tensors if not key.startswith("lora_unet_")]
    if texts:
        raise InputError(
            f"{len(texts)} of {len(tensors)} keys, such as {texts[0]}, are of the text encoder, which "
            "stays as it is here: give a LoRA of the U-Net alone"
        )
    config: Any = unet.config
    try:
        renamed, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(tensors), unet_config=config
        )
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"the LoRA's keys, as kohya has them, are strange: {' '.join(str(error).split())}"
        ) from error
    for key, alpha in (alphas or {}).items():
        match = _PROCESSOR.fullmatch(key.removesuffix(".alpha"))
        renamed[f"{_of_processor(match)}.alpha" if match else key] = torch.tensor(alpha)
    return renamed


def _of_processor(match: re.Match[str]) -> str:
    """The module that a key of an attention processor's file is of."""
    name = match["name"] + (".0" if match["name"] == "to_out" else "")
    return f"{match['block']}.{name}"


def _fits(module: nn.Module | None, pair: dict[str, Tensor]) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d) or set(pair) != {"down", "up"}:
        return False
    down, up = pair["down"].flatten(1), pair["up"].flatten(1)
    flat = module.weight.flatten(1)
    return up.shape[1] == down.shape[0] and (up.shape[0], down.shape[1]) == tuple(flat.shape)


def add_lora(unet: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Give every attention projection a trainable LoRA of scale 1, which changes nothing yet.

    The rest of the U-Net stays frozen. The weights are float32 and a function of the seed.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(PROJECTIONS)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config)  # type: ignore[operator]
    found = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in found:
        parameter.data = parameter.data.float()
    return found


def lora_weights(unet: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors by diffusers' names, on the CPU."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(unet)
    return {f"unet.{name}": tensor.detach().float().cpu() for name, tensor in found.items()}


def load_lora(unet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of `lora_weights` into a U-Net that has its LoRA."""
    from peft import set_peft_model_state_dict

    plain = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(unet, plain)


def save_lora(tensors: Mapping[str, Tensor], folder: str, rank: int) -> None:
    """`pytorch_lora_weights.safetensors`, which StableDiffusionPipeline.load_lora_weights takes."""
    settings = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": PROJECTIONS}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    storage.write_bytes(storage.join(folder, _FILES[0]), data)
