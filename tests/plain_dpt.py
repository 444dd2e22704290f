"""DPT written from its formulas, one example, one pair and one head after the other, without batches."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.training.sampler import Item, draw_noise

WIDTH, HEADS = 256, 8
State = Mapping[str, Tensor]
# The modules of a U-Net of two blocks on each way, by DPT's names for their maps.
BLOCKS = {
    "bottom0": "down_blocks.0", "bottom1": "down_blocks.1", "mid": "mid_block",
    "up0": "up_blocks.0", "up1": "up_blocks.1",
}  # fmt: skip


def position(row: int, column: int, height: int, width: int) -> list[float]:
    """DETR's sine embedding of a place, counted from 0."""
    out = []
    for place, count in ((row, height), (column, width)):
        angle = (place + 1) / (count + 1e-6) * 2 * math.pi
        for i in range(WIDTH // 2):
            part = angle / 10000 ** (2 * (i // 2) / (WIDTH // 2))
            out.append(math.cos(part) if i % 2 else math.sin(part))
    return out


def time(state: State, step: int) -> Tensor:
    """diffusers' embedding of a timestep, cosines first, then two linear layers."""
    rates = [math.exp(-math.log(10000) * i / (WIDTH // 2)) for i in range(WIDTH // 2)]
    waves = [math.cos(step * r) for r in rates] + [math.sin(step * r) for r in rates]
    hidden = linear(state, "time_embedding.linear_1", torch.tensor(waves))
    return linear(state, "time_embedding.linear_2", hidden * hidden.sigmoid())


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q, k, v = (
        x @ weight[i * WIDTH : (i + 1) * WIDTH].T + bias[i * WIDTH : (i + 1) * WIDTH]
        for i, x in enumerate((queries, keys, values))
    )
    heads, size = [], WIDTH // HEADS
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        weights = (q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(1)
        heads.append(weights @ v[:, own])
    return linear(state, f"{name}.out_proj", torch.cat(heads, 1))


def forward(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.linear.3", linear(state, f"{name}.linear.0", x).relu())


def queries(state: State, map: Tensor, step: int) -> Tensor:
    """The adapter without dropout: its matching queries [10, D] of a map [C, h, w]."""
    out = outputs(state, map, step)[:10]
    return linear(state, "head.2", linear(state, "head.0", out).relu())


def outputs(state: State, map: Tensor, step: int) -> Tensor:
    """What all queries have read: the ten of matching, then the hundred of boxes if there are any."""
    channels, height, width = map.shape
    weight = state["input_proj.weight"].view(WIDTH, channels)
    values, places = [], []
    for row in range(height):
        for column in range(width):
            values.append(weight @ map[:, row, column] + state["input_proj.bias"])
            places.append(torch.tensor(position(row, column, height, width)) + time(state, step))
    memory, at = torch.stack(values), torch.stack(places)
    found = attention(state, "encoder.attention", memory + at, memory + at, memory)
    memory = norm(state, "encoder.norm1", memory + found)
    memory = norm(state, "encoder.norm2", memory + forward(state, "encoder", memory))
    asked = state["queries"]
    if "grounding.queries" in state:
        asked = torch.cat([asked, state["grounding.queries"]])
    targets = torch.zeros_like(asked)
    found = attention(state, "decoder.among", targets + asked, targets + asked, targets)
    targets = norm(state, "decoder.norm1", targets + found)
    found = attention(state, "decoder.to_memory", targets + asked, memory + at, memory)
    targets = norm(state, "decoder.norm2", targets + found)
    targets = norm(state, "decoder.norm3", targets + forward(state, "decoder", targets))
    return norm(state, "norm", targets)


def score(state: State, map: Tensor, step: int, pooled: Tensor) -> Tensor:
    """max_i cos(q_i, p)."""
    cosines = [
        (query * pooled).sum() / (query.norm() * pooled.norm())
        for query in queries(state, map, step)
    ]
    best = cosines[0]
    for cosine in cosines[1:]:
        best = torch.maximum(best, cosine)
    return best


def encoded(model: StableDiffusion, text: str) -> tuple[Tensor, Tensor]:
    """The text encoder's states [1, L, D] and its own pooled output [D]."""
    ids = model.tokenizer(
        [text], padding="max_length", truncation=True, max_length=model.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    with torch.no_grad():
        out = model.text_encoder(ids)
    return out.last_hidden_state, out.pooler_output[0]


def read(
    model: StableDiffusion, name: str, noised: Tensor, step: int, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The map [C, h, w] of a whole forward of one latent [C, h, w], and the prediction."""
    kept: list[Tensor] = []

    def keep(block: torch.nn.Module, given: object, made: object) -> None:
        kept.append(made[0] if isinstance(made, tuple) else made)  # type: ignore[arg-type]

    handle = model.unet.get_submodule(BLOCKS[name]).register_forward_hook(keep)
    predicted = model.unet(noised[None], step, hidden).sample[0]
    handle.remove()
    return kept[0][0], predicted


def pair(
    model: StableDiffusion, state: State, name: str, seed: int, mean: Tensor, deviation: Tensor,
    text: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s(z_t, t, y) and the denoising error of an image's latent with a text, at what the seed draws."""
    drawn = draw_noise([seed], model.latent_shape, model.schedule)
    step, noise = int(drawn.timesteps[0]), drawn.noise[0]
    signal, sigma = model.schedule.signal[step], model.schedule.sigma[step]
    clean = mean + deviation * drawn.posterior[0]
    hidden, pooled = encoded(model, text)
    map, predicted = read(model, name, signal * clean + sigma * noise, step, hidden)
    target = noise
    if model.schedule.prediction == "v_prediction":
        target = signal * noise - sigma * clean
    return score(state, map, step, pooled), ((predicted - target) ** 2).mean()


def losses(
    model: StableDiffusion, state: State, name: str, items: list[Item],
    latents: list[list[tuple[Tensor, Tensor]]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """L_i2t, L_t2i and the error of the right pairs, means over the examples; of each example the latents'
    mean and deviation of its own image, of the hard and of the random one."""
    texts, images, errors = [], [], []
    for item, (own, hard, other) in zip(items, latents, strict=True):
        y, seed = item.caption, item.seed
        right, error = pair(model, state, name, seed, *own, y)
        captions = [
            pair(model, state, name, seed, *own, text)[0]
            for text in (item.negative_caption, item.random_caption)
        ]
        pictures = [pair(model, state, name, seed, *latent, y)[0] for latent in (hard, other)]
        tau = state["logit_scale"].exp()
        for kind, wrong in ((texts, captions), (images, pictures)):
            total = (tau * right).exp() + (tau * wrong[0]).exp() + (tau * wrong[1]).exp()
            kind.append(-((tau * right).exp() / total).log())
        errors.append(error)
    one, two, three = (torch.stack(kind).mean() for kind in (texts, images, errors))
    return one, two, three
