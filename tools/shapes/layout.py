"""What stands where: captions with the layout that they tell, and what teaches a text encoder to read it.

Noise prediction alone does not teach a small text encoder left from right. So it first learns to
let one layer of cross-attention, which is what a U-Net has, find in its tokens what each mention is and
what stands at each place; later also whether the words are in order. That layer is then thrown away.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextModel, CLIPTokenizer

from diffitm.shapes.language import (
    OPPOSITE,
    PLACES,
    Caption,
    disordered,
    garbled,
    is_placed,
    layout_caption,
    training_caption,
)
from diffitm.shapes.world import COLOURS, SHAPES, SIZES, Scene, Thing, sample_scene
from tools.shapes import architecture as arch

CAPTIONS = 12  # of a scene
GARBLED = 0.12  # of the captions
PHOTO = 0.25  # of the captions that say where, behind 'a photo of', as MMVP-VLM and others put it
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}
SLOTS = 2 + len(PLACES)  # the mentions in their order, then the places
UNKNOWN = -1


def training_scene(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """A scene of the training set and the generator that drew it; every fifth has one thing."""
    rng = np.random.default_rng([seed, index])
    return sample_scene(rng, 1 if index % 5 == 0 else 2, distinct=index % 4 != 0), rng


def layout_set(
    path: Path, seed: int, indices: range, tokenizer: CLIPTokenizer
) -> dict[str, np.ndarray]:
    """Captions that say where, drawn once and kept.

    Token ids int16 [N, CAPTIONS, 16]; of each caption the class of every slot's shape, colour and size int8
    [N, CAPTIONS, SLOTS, 3] (UNKNOWN where it has none, the number of classes at an empty place), and
    bool of the same shape: whether the caption says so.
    """
    if not path.exists():
        texts, found = [], []
        for index in indices:
            scene, _ = training_scene(seed, index)
            rng = np.random.default_rng([seed, index, 1])
            for _ in range(CAPTIONS):
                caption, things = layout_caption(scene, rng)
                wrong = rng.random() < GARBLED
                texts.append(garbled(caption, rng) if wrong else _styled(caption, rng))
                classes, said = _slots(scene, caption, things)
                found.append((classes, said & (not wrong)))
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=arch.LENGTH)
        shape = (len(indices), CAPTIONS)
        np.savez(
            path,
            tokens=np.array(ids.input_ids, np.int16).reshape(*shape, arch.LENGTH),
            classes=np.stack([c for c, _ in found]).reshape(*shape, SLOTS, len(ATTRIBUTES)),
            said=np.stack([s for _, s in found]).reshape(*shape, SLOTS, len(ATTRIBUTES)),
        )
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def mixed_set(
    path: Path,
    seed: int,
    count: int,
    tokenizer: CLIPTokenizer,
    disordered_share: float,
    others: float,
) -> dict[str, np.ndarray]:
    """Token ids int16 [N, CAPTIONS, 16] and bool [N, CAPTIONS], whether the words are in disorder, drawn once
    and kept: every other caption says where.

    A share is in disorder, and of those the share `others` is another scene's: words in disorder are not to
    be relied upon.
    """
    if not path.exists():
        texts, moved = [], []
        for index in range(count):
            scene, _ = training_scene(seed, index)
            rng = np.random.default_rng([seed, index, 2])
            for number in range(CAPTIONS):
                wrong, told = rng.random() < disordered_share, scene
                if wrong and rng.random() < others:
                    told, _ = training_scene(seed, int(rng.integers(count)))
                if number % 2 == 0:
                    text = training_caption(told, rng)
                else:
                    caption, _ = layout_caption(told, rng)
                    text = caption.text() if wrong else _styled(caption, rng)
                texts.append(disordered(text, rng) if wrong else text)
                moved.append(wrong)
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=arch.LENGTH)
        tokens = np.array(ids.input_ids, np.int16).reshape(count, CAPTIONS, -1)
        np.savez(path, tokens=tokens, disordered=np.array(moved).reshape(count, CAPTIONS))
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def _styled(caption: Caption, rng: np.random.Generator) -> str:
    style = str(rng.choice(["front", "photo", "is"])) if rng.random() < 0.4 else "plain"
    words = caption.text(style).split()
    if rng.random() < 0.15:
        words = ["the" if word in ("a", "an") else word for word in words]
    if rng.random() < PHOTO and words[0] in ("a", "an", "the") and len(words) <= arch.LENGTH - 5:
        words = words if "photo" in words else ["a", "photo", "of", *words]
    text = " ".join(words)
    return f"{text.capitalize()}." if rng.random() < 0.2 else text


def _slots(scene: Scene, caption: Caption, things: list[Thing]) -> tuple[np.ndarray, np.ndarray]:
    """The classes of all slots, and which of them the caption says."""
    classes = np.full((SLOTS, len(ATTRIBUTES)), UNKNOWN, np.int8)
    said = np.zeros(classes.shape, bool)
    named = [[getattr(m, name) is not None for name in ATTRIBUTES] for m in caption.mentions]
    for k, thing in enumerate(things):
        classes[k], said[k] = _classes(thing), named[k]
    for k, place in enumerate(PLACES, start=2):
        there = [thing for thing in scene.things if is_placed(thing, place)]
        if not there:
            classes[k] = [len(values) for values in ATTRIBUTES.values()]
        elif len(there) == 1:
            classes[k] = _classes(there[0])
            told = _told(caption, place)
            if told is not None and things[told] is there[0]:
                said[k] = named[told]
    return classes, said


def _classes(thing: Thing) -> list[int]:
    return [values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()]


def _told(caption: Caption, place: str) -> int | None:
    """Which mention the caption puts at a place."""
    if place in (caption.place, caption.relation):
        return 0
    return 1 if OPPOSITE[place] == caption.relation else None


class TextLoss(nn.Module):
    """Cross-entropy of every slot's attributes, read off the tokens by one layer of cross-attention."""

    def __init__(self, tokenizer: CLIPTokenizer, size: int) -> None:
        super().__init__()
        self.size = size
        self.text_encoder = arch.build_text_encoder(tokenizer)
        width = self.text_encoder.config.hidden_size
        self.queries = nn.Parameter(torch.randn(SLOTS, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            nn.Linear(width, len(values) + 1) for values in ATTRIBUTES.values()
        )

    def read(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Logits [B, SLOTS, classes] of each attribute, from token ids [B, 16]."""
        hidden = self.text_encoder(tokens).last_hidden_state
        queries = self.queries.expand(len(tokens), -1, -1)
        seen = self.norm(self.attention(queries, hidden, hidden, need_weights=False)[0])
        return [head(seen) for head in self.heads]

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(len(data["tokens"]), size=self.size)
        captions = rng.integers(CAPTIONS, size=self.size)
        logits = self.read(torch.from_numpy(data["tokens"][chosen, captions]).long())
        classes = torch.from_numpy(data["classes"][chosen, captions]).long()
        losses = [
            F.cross_entropy(found.flatten(0, 1), classes[..., k].flatten(), ignore_index=UNKNOWN)
            for k, found in enumerate(logits)
        ]
        return torch.stack(losses).mean()


class OrderLoss(nn.Module):
    """TextLoss, and whether a caption's words are in order, read off the tokens by another such layer.

    Tokens of captions in order are held where they were, both what comes out and those of the last layer
    but one, which a flow model reads: so a network that knows them has only to learn what disorder looks
    like. One that can't see it mistrusts every caption a little.
    """

    def __init__(self, text: TextLoss) -> None:
        super().__init__()
        self.size, self.text = text.size, text
        self.before = copy.deepcopy(text.text_encoder).requires_grad_(False)
        width = self.before.config.hidden_size
        self.query = nn.Parameter(torch.randn(1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 1)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B] of disorder, from the text encoder's tokens [B, 16, width]."""
        query = self.query.expand(len(hidden), -1, -1)
        seen = self.attention(query, hidden, hidden, need_weights=False)[0]
        return self.head(seen).flatten()

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(len(data["mixed"]), size=self.size)
        captions = rng.integers(CAPTIONS, size=self.size)
        tokens = torch.from_numpy(data["mixed"][chosen, captions]).long()
        wrong = torch.from_numpy(data["disordered"][chosen, captions])
        hidden = _layers(self.text.text_encoder, tokens)
        order = F.binary_cross_entropy_with_logits(self.read(hidden[-1]), wrong.float())
        held = F.mse_loss(hidden[:, ~wrong], _layers(self.before, tokens[~wrong]))
        return self.text(data, rng) + order + 20 * held


def _layers(text_encoder: CLIPTextModel, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [2, B, 16, width]: of the last layer but one, and what comes out."""
    out = text_encoder(tokens, output_hidden_states=True)
    return torch.stack([out.hidden_states[-2], out.last_hidden_state])


@torch.no_grad()
def accuracy(text: TextLoss, data: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of what captions say that is read right: about the mentions, and about places."""
    tokens = torch.from_numpy(data["tokens"]).long().flatten(0, 1)
    found = torch.stack([logits.argmax(-1) for logits in text.read(tokens)], -1).numpy()
    said = data["said"].reshape(found.shape)
    right = found == data["classes"].reshape(found.shape)
    shares = [right[:, part][said[:, part]].mean() for part in (slice(2), slice(2, None))]
    return float(shares[0]), float(shares[1])
