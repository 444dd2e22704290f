"""LoRA weights of a U-Net or transformer and its text encoders, merged into their weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.denoiser import Denoiser
from diffitm.models.lora_formats import (
    PARTS,
    TRANSFORMER,
    Place,
    find_module,
    from_kohya,
    place_of,
    refuse_others,
    refuse_transformers,
)
from diffitm.models.weight_cache import on_disk
from diffitm.models.weight_files import WeightsError, few, read_weights, tensors_of

Key = tuple[str, str]  # a part and a module of it
# Of attention; four are those of a text's own tokens in joint attention, and the last is q, k, v and the
# MLP's input in one, of FLUX.2's single blocks.
PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "to_qkv_mlp_proj",
)
_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_CONFIG = "adapter_config.json"
_IS_DOWN = re.compile(
    r"(.+?)\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)(?:\.[\w-]+)?\.weight"
)
CLOSE = 1e-3  # of two scales that are the same, as half precision has them
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
    except (OSError, ValueError) as error:
        raise InputError(f": {file} cannot be read: {error}", "lora") from error
    try:
        refuse_others(tensors)
    except InputError as error:
        raise InputError(f": {file} {error.message}", "lora") from error
    scale = _stated_scale(settings, file)
    _check_stated(tensors, settings, scale, file)
    return tensors, scale


def _check_stated(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object], scale: float | None, file: Path
) -> None:
    """Raises InputError where what is stated of a file is not what it holds: it is another's, then."""
    if scale is None:
        return
    found_downs = ((_IS_DOWN.fullmatch(key), tensor) for key, tensor in tensors.items())
    downs = {match[1]: tensor for match, tensor in found_downs if match and tensor.ndim}
    ranks = {len(tensor) for tensor in downs.values()}
    stated = {int(_number(v, k, file)) for k, v in settings.items() if k.rpartition(".")[2] == "r"}
    if not ranks <= stated:
        found, given = (", ".join(map(str, sorted(values))) for values in (ranks, stated))
        raise InputError(
            f": {file}: its tensors have rank {found}, its {_CONFIG} or metadata gives r {given}: they "
            "are of two LoRAs",
            "lora",
        )
    for stem, down in downs.items():
        alpha = tensors.get(f"{stem}.alpha")
        if alpha is None or alpha.numel() != 1:
            continue
        own = float(alpha) / max(len(down), 1)
        if abs(own - scale) > CLOSE * abs(scale):
            raise InputError(
                f": {file}: its {stem}.alpha is {float(alpha):g}, a scale of {own:g}; its {_CONFIG} or "
                f"metadata gives {scale:g}: take away what is not this LoRA's",
                "lora",
            )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    beside = file.parent / _CONFIG
    settings = json.loads(beside.read_text()) if beside.is_file() else {}
    found = read_weights(file)
    if isinstance(found, list) and all(isinstance(value, Tensor) for value in found):
        raise WeightsError(
            f"it is a cloneofsimo file, a list of {len(found)} tensors without names"
        )
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        settings = settings or metadata
    if not isinstance(settings, dict):
        raise WeightsError(
            f"its {_CONFIG} or lora_adapter_metadata is no JSON object but {type(settings).__name__}"
        )
    is_empty = isinstance(found, dict | list) and not found
    return {} if is_empty else tensors_of(found, file), settings


def _stated_scale(settings: dict[str, object], file: Path) -> float | None:
    """What an adapter_config.json states, or the metadata, there for each part."""
    scales = set[float]()
    for start in ("", *(f"{part}." for part in (*PARTS, TRANSFORMER))):
        own = {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start)}
        for key in ("use_dora", "rank_pattern", "alpha_pattern"):
            if own.get(key):
                raise InputError(f"{file}: {key} = {own[key]!r} is not supported, only plain LoRA")
        if "lora_alpha" in own and "r" in own:
            rank = _number(own["r"], f"{start}r", file)
            if rank <= 0:
                raise InputError(f": {file}: {start}r = {own['r']!r} is not above 0", "lora")
            alpha = _number(own["lora_alpha"], f"{start}lora_alpha", file)
            scales.add(alpha / (rank**0.5 if own.get("use_rslora") else rank))
    if len(scales) > 1:
        text = " and ".join(f"{scale:g}" for scale in sorted(scales))
        raise InputError(f"{file}: its metadata states other scales for other parts, {text}")
    return scales.pop() if scales else None


def _number(value: object, key: str, file: Path) -> float:
    """A setting. Raises InputError where it is no number."""
    with contextlib.suppress(ValueError):
        if math.isfinite(found := float(str(value))):
            return found
    raise InputError(
        f": {file}: {key} = {value!r} in its {_CONFIG} or metadata is no number", "lora"
    )


def lora_unet(denoiser: Denoiser) -> nn.Module:
    """The U-Net. Raises InputError for a model without one."""
    unet: nn.Module | None = getattr(denoiser, "unet", None)
    if unet is None:
        raise InputError(f": a {type(denoiser).__name__} has no U-Net", "model")
    return unet


def lora_network(denoiser: Denoiser) -> nn.Module:
    """The network whose LoRA is trained. Raises InputError for a model that takes none."""
    network: nn.Module | None = getattr(denoiser, "network", None)
    if network is None or not denoiser.takes_lora:
        raise InputError(f": a {type(denoiser).__name__} takes no LoRA", "model")
    return network


def merge_file(denoiser: Denoiser, path: str) -> None:
    """Merge a LoRA file into a model. Raises InputError that names the file."""
    network = lora_network(denoiser)
    tensors, scale = read_lora(path)
    with naming(path):
        merge_lora(network, tensors, scale, text_encoders(denoiser))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """The block's InputErrors begin with the LoRA's file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{unpinned(path)}: {error.message}", "lora") from error


def text_encoders(denoiser: Denoiser) -> list[nn.Module]:
    """The text encoders, which a LoRA may change too."""
    found = getattr(denoiser, "text_encoders", None) or [getattr(denoiser, "text_encoder", None)]
    return [encoder for encoder in found if encoder is not None]


def merge_lora(
    unet: nn.Module,
    tensors: Mapping[str, Tensor],
    scale: float | None = None,
    encoders: Sequence[nn.Module] = (),
) -> int:
    """Add scale * up @ down to each weight of the network and its text encoders; how many tensors were used,
    which is all of them.

    `scale` None means alpha / r where the file holds alpha, else 1 (the old files carry no alpha).
    Raises InputError that lists the keys which do not fit; nothing is changed then.
    """
    pairs, alphas = match_lora(unet, tensors, encoders)
    parts = dict(zip(PARTS, [unet, *encoders], strict=False))
    for (part, name), pair in pairs.items():
        weight = _weight(parts, part, name)
        rank = len(pair["down"])
        factor = scale if scale is not None else alphas.get((part, name), rank) / rank
        delta = pair["up"].float().flatten(1) @ pair["down"].float().flatten(1)
        merged = weight.float() + factor * delta.to(weight.device).view(weight.shape)
        with torch.no_grad():
            weight.copy_(merged.to(weight.dtype))
    return 2 * len(pairs) + len(alphas)


def match_lora(
    unet: nn.Module, tensors: Mapping[str, Tensor], encoders: Sequence[nn.Module] = ()
) -> tuple[dict[Key, dict[str, Tensor]], dict[Key, float]]:
    """The tensors 'down' and 'up' of each part's module that has some, and the alphas.

    Raises InputError that lists the keys which do not fit.
    """
    refuse_others(tensors)
    if isinstance(unet, UNet2DConditionModel):
        refuse_transformers(tensors)
    tensors = from_kohya(unet, tensors)
    parts = dict(zip(PARTS, [unet, *encoders], strict=False))
    pairs: dict[Key, dict[str, Tensor]] = {}
    alphas: dict[Key, float] = {}
    strange = []
    keys: dict[Place, str] = {}
    for key, tensor in tensors.items():
        place = place_of(key)
        if place is None:
            strange.append(key)
            continue
        _check_values(key, tensor, place.side)
        if place in keys:
            raise InputError(
                f"holds {_key((place.part, place.module))} twice, as {keys[place]} and {key}: give a file of "
                "one LoRA"
            )
        keys[place] = key
        if place.side == "alpha":
            alphas[place.part, place.module] = float(tensor)
        else:
            pairs.setdefault((place.part, place.module), {})[place.side] = tensor
    strange += [_key(k) for k, pair in pairs.items() if not _fits(parts, *k, pair)]
    strange += [f"{_key(k)}.alpha" for k in alphas if k not in pairs]
    if strange or not pairs:
        shown = few(strange, 5) or "no LoRA tensor at all"
        raise InputError(
            f"the LoRA weights do not fit this {_kind(unet)} or its text encoders: {len(strange)} of "
            f"{len(tensors)} keys, such as {shown}"
        )
    return pairs, alphas


def _kind(network: nn.Module) -> str:
    return "U-Net" if isinstance(network, UNet2DConditionModel) else "transformer"


def _check_values(key: str, tensor: Tensor, side: str) -> None:
    """Raises InputError where they are no weights, or no alpha."""
    if side == "alpha" and tensor.numel() != 1:
        raise InputError(f"{key} is of shape {list(tensor.shape)}, not one number")
    if side != "alpha" and not tensor.is_floating_point():
        raise InputError(
            f"{key} is of {str(tensor.dtype).removeprefix('torch.')}: quantised weights are not read, give "
            "the LoRA in float32, float16 or bfloat16"
        )
    if not bool(tensor.float().isfinite().all()):
        raise InputError(f"{key} holds NaN or infinite values: a training that diverged?")


def _key(key: Key) -> str:
    part, name = key
    return name if part == "unet" else f"{part}.{name}"


def _weight(parts: Mapping[str, nn.Module], part: str, name: str) -> Tensor:
    weight: Tensor = find_module(parts[part], name).weight  # type: ignore[union-attr, assignment]
    return weight


def _fits(parts: Mapping[str, nn.Module], part: str, name: str, pair: Mapping[str, Tensor]) -> bool:
    module = find_module(parts[part], name) if part in parts else None
    if not isinstance(module, nn.Linear | nn.Conv2d) or set(pair) != {"down", "up"}:
        return False
    if min(pair["down"].ndim, pair["up"].ndim) < 2 or not len(pair["down"]):
        return False
    down, up = pair["down"].flatten(1), pair["up"].flatten(1)
    flat = module.weight.flatten(1)
    return up.shape[1] == down.shape[0] and (up.shape[0], down.shape[1]) == tuple(flat.shape)


def add_lora(network: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Give every attention projection a trainable LoRA of scale 1, which changes nothing yet.

    The rest of the network stays frozen. The weights are float32 and a function of the seed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(PROJECTIONS)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)
    found = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in found:
        parameter.data = parameter.data.float()
    return found


@contextlib.contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """In its block the network works as before it had a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def lora_weights(network: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors by diffusers' names, on the CPU."""
    from peft import get_peft_model_state_dict

    part = PARTS[0] if isinstance(network, UNet2DConditionModel) else TRANSFORMER
    found = get_peft_model_state_dict(network)
    return {f"{part}.{name}": tensor.detach().float().cpu() for name, tensor in found.items()}


def restore_adapter(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of `lora_weights` into a network that has its LoRA."""
    from peft import set_peft_model_state_dict

    plain = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(network, plain)


def save_lora(tensors: Mapping[str, Tensor], folder: str, rank: int) -> None:
    """`pytorch_lora_weights.safetensors`, which a pipeline's load_lora_weights takes."""
    part = next(iter(tensors)).partition(".")[0]
    named = [name for name in PROJECTIONS if any(f".{name}.lora_A" in key for key in tensors)]
    settings = {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": named}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    storage.write_bytes(storage.join(folder, _FILES[0]), data)
