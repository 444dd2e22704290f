"""The shapes world: scenes of one or two coloured shapes, drawn deterministically from a seed.

A scene is a value; its picture is a pure function of it. Backgrounds differ in visual difficulty
(plain, gradient, stripes, tiles, blobs): a diffusion model's error follows that difficulty, which
is why naive image retrieval fails and the normalised score is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.62, 0.15, 0.75),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUNDS = ("plain", "gradient", "stripes", "tiles", "blobs")
# (colour, shape) combinations that no training scene holds: they test whether attributes compose.
HELD_OUT = frozenset(
    {("red", "cross"), ("blue", "triangle"), ("yellow", "square"), ("green", "circle")}
)
RADIUS = {"small": 0.11, "large": 0.21}
# In radii from the centre: to either side, up, down.
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.86, 0.86, 0.86),
    "triangle": (0.9, 1.0, 0.8),
    "cross": (1.0, 1.0, 1.0),
}


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) in [0, 1] from the left and from the top."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def combination(self) -> tuple[str, str]:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `seed` fixes the texture and the colour jitter."""

    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def held_out(self) -> bool:
        """True when a thing has a colour and shape combination that training never saw."""
        return any(thing.combination in HELD_OUT for thing in self.things)

    def relation(self) -> str | None:
        """Where the first of two things lies, seen from the second."""
        if len(self.things) != 2:
            return None
        first, second = self.things
        dx, dy = first.x - second.x, first.y - second.y
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "above" if dy < 0 else "below"


def sample_scene(
    rng: np.random.Generator,
    objects: int = 2,
    held_out: bool | None = False,
    axis: str | None = None,
    distinct: bool = True,
) -> Scene:
    """Draw a scene.

    `held_out` False keeps the held-out combinations out, True demands one, None takes either.
    `axis` 'x' puts two things side by side, 'y' one above the other. `distinct` gives two things
    different colours, shapes and sizes, so that every swap of an attribute changes the scene.
    """
    while True:
        things = _sample_things(rng, objects, axis, distinct)
        scene = Scene(things, str(rng.choice(BACKGROUNDS)), int(rng.integers(2**31)))
        if held_out is None or scene.held_out == held_out:
            return scene


def _sample_things(
    rng: np.random.Generator, objects: int, axis: str | None, distinct: bool
) -> tuple[Thing, ...]:
    sizes = [str(rng.choice(SIZES)) for _ in range(objects)]
    colours = [str(c) for c in rng.choice(list(COLOURS), objects, replace=not distinct)]
    shapes = [str(s) for s in rng.choice(SHAPES, objects, replace=not distinct)]
    if distinct and objects == 2:
        sizes[1] = SIZES[1 - SIZES.index(sizes[0])]
    if objects == 1:
        radius = RADIUS[sizes[0]]
        x, y = rng.uniform(radius + 0.02, 0.98 - radius, 2)
        centres = [(float(x), float(y))]
    else:
        along = axis or str(rng.choice(["x", "y"]))
        near, far = rng.uniform(0.23, 0.29), rng.uniform(0.71, 0.77)
        if rng.random() < 0.5:
            near, far = far, near
        across = rng.uniform(0.35, 0.65, 2)
        ends = [(near, across[0]), (far, across[1])]
        centres = [(float(a), float(b)) if along == "x" else (float(b), float(a)) for a, b in ends]
    return tuple(
        Thing(shape, colour, size, x, y)
        for shape, colour, size, (x, y) in zip(shapes, colours, sizes, centres, strict=True)
    )


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The scene's picture, uint8 [size, size, 3]."""
    rng = np.random.default_rng(scene.seed)
    image = _BACKGROUND[scene.background](rng, size)
    centre = (np.arange(size) + 0.5) / size
    for thing in scene.things:
        distance = signed_distance(
            thing.shape, centre[None, :] - thing.x, centre[:, None] - thing.y, RADIUS[thing.size]
        )
        cover = np.clip(0.5 - distance * size, 0.0, 1.0)[..., None]
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1)
        image = image * (1 - cover) + colour * cover
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline, negative inside (exact or a lower bound)."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        slope = np.sqrt(0.8) * np.abs(x) - np.sqrt(0.2) * (y + radius)
        return np.maximum(slope, y - 0.8 * radius)
    arm = 0.34 * radius
    upright = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
    across = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
    return np.minimum(upright, across)


def bounds(thing: Thing) -> tuple[float, float, float, float]:
    """left, top, right and bottom of a thing's outline, in shares of the picture."""
    across, up, down = (RADIUS[thing.size] * reach for reach in REACH[thing.shape])
    return thing.x - across, thing.y - up, thing.x + across, thing.y + down


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A nearly grey colour, so that no background is taken for an object's colour."""
    return rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06, 3)


def _plain(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.broadcast_to(_muted(rng), (size, size, 3)).copy()


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    start, end = _muted(rng), _muted(rng)
    ramp = np.linspace(0, 1, size)
    ramp = np.broadcast_to(ramp[:, None] if rng.random() < 0.5 else ramp[None, :], (size, size))
    return start + (end - start) * ramp[..., None]


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    first, second = _muted(rng), _muted(rng)
    period, phase = rng.uniform(0.12, 0.25), rng.uniform(0, 1)
    place = (np.arange(size) + 0.5) / size
    across = place[:, None] if rng.random() < 0.5 else place[None, :]
    on = np.broadcast_to(np.floor(2 * across / period + phase) % 2, (size, size))[..., None]
    return first * on + second * (1 - on)


def _tiles(rng: np.random.Generator, size: int) -> np.ndarray:
    """A board of random tiles of a random contrast: the hardest background to predict."""
    tiles, contrast = 8, rng.uniform(0.1, 0.3)
    board = _muted(rng) + rng.uniform(-contrast, contrast, (tiles, tiles, 1))
    board = board + rng.uniform(-contrast, contrast, (tiles, tiles, 3)) / 3
    return board.repeat(size // tiles, 0).repeat(size // tiles, 1)


def _blobs(rng: np.random.Generator, size: int) -> np.ndarray:
    image = _plain(rng, size)
    place = (np.arange(size) + 0.5) / size
    for _ in range(int(rng.integers(4, 9))):
        x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.08, 0.2)
        far = np.sqrt((place[None, :] - x) ** 2 + (place[:, None] - y) ** 2) / radius
        cover = np.clip(1.5 - far, 0, 1)[..., None]
        image = image * (1 - cover) + _muted(rng) * cover
    return image


_BACKGROUND: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "tiles": _tiles,
    "blobs": _blobs,
}
