"""A diffusers folder's weights in one file, by the names of the original code, as trainers share them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
OF_VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model of a diffusers folder, SD 1.x, 2.x or SDXL, in one file: safetensors, or pickled as Lightning
    does where it ends in .ckpt. An SD 2.x is told by its text encoder's gelu."""
    weights = {f"model.diffusion_model.{k}": v for k, v in _unet(_read(folder, "unet")).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in _vae(_read(folder, "vae")).items()}
    text = _read(folder, "text_encoder")
    if (folder / "text_encoder_2").is_dir():
        weights |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text.items()}
        second = _open_clip(_read(folder, "text_encoder_2"))
        weights |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    elif json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu":
        weights |= {f"cond_stage_model.model.{k}": v for k, v in _open_clip(text).items()}
    else:
        weights |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    weights = {k: v.to(dtype).contiguous() for k, v in weights.items()}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": weights, "global_step": 7}, file)
    else:
        save_file(weights, file)
    return file


def _read(folder: Path, part: str) -> Weights:
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    if part.startswith("text_encoder"):  # Transformers 5 leaves the first name out
        own = ("text_model.", "text_projection.")
        weights = {k if k.startswith(own) else f"text_model.{k}": v for k, v in weights.items()}
    return weights


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    return name


def _unet(weights: Weights) -> Weights:
    layers = 1 + max(
        int(m[1]) for k in weights if (m := re.match(r"down_blocks\.0\.resnets\.(\d)", k))
    )
    attended = {m[1] for k in weights if (m := re.match(r"up_blocks\.(\d)\.attentions", k))}

    def place(match: re.Match[str]) -> str:
        side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
            return f"input_blocks.{(layers + 1) * block + layer + 1}.{int(kind == 'attentions')}"
        if kind == "upsamplers":
            last = (layers + 1) * block + layers
            return f"output_blocks.{last}.{1 + (match[2] in attended)}"
        return f"output_blocks.{(layers + 1) * block + layer}.{int(kind == 'attentions')}"

    found = {}
    for key, tensor in weights.items():
        name = _renamed(key, AROUND)
        if "resnets" in key:
            name = _renamed(name, RESNET)
        name = re.sub(r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)", place, name)
        found[name.replace(".op.conv.", ".op.")] = tensor
    return found


def _vae(weights: Weights) -> Weights:
    blocks = 1 + max(
        int(m[1]) for k in weights if (m := re.match(r"encoder\.down_blocks\.(\d)", k))
    )
    found = {}
    for key, tensor in weights.items():
        name = _renamed(key, OF_VAE)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        for ours, theirs in (("resnets", "block"), ("upsamplers.0", "upsample")):
            name = re.sub(
                rf"up_blocks\.(\d)\.{re.escape(ours)}",
                lambda m, theirs=theirs: f"up.{blocks - 1 - int(m[1])}.{theirs}",
                name,
            )
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):  # convolutions there
            tensor = tensor[:, :, None, None]
        found[name] = tensor
    return found


def _open_clip(weights: Weights) -> Weights:
    """A text encoder of transformers by open_clip's names, which has queries, keys and values in one."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    of_layer = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    found: dict[str, Any] = {names[k]: v for k, v in weights.items() if k in names}
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    found["text_projection"] = weights.get("text_projection.weight", torch.eye(width)).T
    for key, tensor in weights.items():
        if not (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)):
            continue
        layer, part, kind = match.groups()
        above = f"transformer.resblocks.{layer}"
        if part in of_layer:
            found[f"{above}.{of_layer[part]}.{kind}"] = tensor
        elif part == "self_attn.q_proj":
            three = [weights[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[f"{above}.attn.in_proj_{kind}"] = torch.cat(three)
    return found
