"""Procedural captioned clips: what the demo model is trained on and judged by.

One or two coloured shapes move over a muted background, described by one sentence. Everything is a
function of time and periodic (what leaves on one side comes back on the other), so a clip has any
length and any frame range of it can be drawn. Drawing is analytic: signed distances, anti-aliased
by distance over pixel size. Positions and sizes are in units of the frame's height, times in
frames. Knows nothing of models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 45),
    "green": (60, 190, 80),
    "blue": (50, 100, 240),
    "yellow": (250, 220, 50),
    "orange": (250, 140, 30),
    "purple": (160, 70, 210),
    "cyan": (70, 215, 230),
    "white": (245, 245, 245),
}
# Muted, and named by words of their own: while both lists shared red, green, blue and purple, one
# sample in eight swapped the colours of object and background.
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 18),
    "gray": (110, 110, 115),
    "maroon": (110, 28, 30),
    "forest": (24, 84, 44),
    "navy": (24, 36, 110),
    "plum": (70, 28, 96),
    "brown": (100, 66, 36),
    "teal": (20, 96, 100),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = {  # name: (words, other words)
    "right": ("moves right", "slides right"),
    "left": ("moves left", "slides left"),
    "up": ("moves up", "rises up"),
    "down": ("moves down", "falls down"),
    "bounce": ("bounces", "bounces up and down"),
    "orbit": ("circles around", "moves in a circle"),
    "spin": ("spins", "rotates"),
    "pulse": ("pulses", "grows and shrinks"),
    "still": ("stands still", "does not move"),
}
TEXTURES = ("plain", "gradient", "striped", "checkered")
MOVING_TEXTURES = ("striped", "checkered")
SHAPE_SYNONYMS = {"circle": "ball", "square": "box", "ring": "donut"}
CANNOT_SPIN = ("circle", "ring")

SPEED = 0.035  # heights a frame, straight motion
SCROLL = 0.0125  # heights a frame, moving backgrounds
BOUNCE_PERIOD, ORBIT_PERIOD, SPIN_PERIOD, PULSE_PERIOD = 24, 24, 40, 24  # frames
ORBIT_RADIUS, BOUNCE_FLOOR, BOUNCE_HEIGHT, PULSE_DEPTH = 0.25, 0.8, 0.58, 0.35
TWO_PI = 2 * math.pi


@dataclass(frozen=True)
class ObjectParams:
    """One object: words of the caption, and what the caption does not say.

    radius, x, y: in heights; x and y from the top left (x in widths). phase: of a periodic motion,
    0 to 1. rotation: radians.
    """

    colour: str
    shape: str
    motion: str
    radius: float
    x: float
    y: float
    phase: float
    rotation: float


@dataclass(frozen=True)
class ClipParams:
    """Everything that decides a clip. The first object lies over the second."""

    objects: tuple[ObjectParams, ...]
    background: str
    texture: str
    is_moving: bool
    background_phase: float
    brightness: float


class Window(NamedTuple):
    """A part of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def grammar() -> dict[str, object]:
    """All words a caption can be made of, and the template that joins them."""
    synonyms = {words[0]: [words[1]] for words in MOTIONS.values()}
    synonyms |= {shape: [other] for shape, other in SHAPE_SYNONYMS.items()}
    return {
        "template": (
            "a|an OBJECT SHAPE MOTION over|on a|an [moving] BACKGROUND [TEXTURE] background"
        ),
        "objects": list(OBJECT_COLOURS),
        "shapes": list(SHAPES),
        "motions": [words[0] for words in MOTIONS.values()],
        "backgrounds": list(BACKGROUND_COLOURS),
        "textures": list(TEXTURES),
        "synonyms": synonyms,
        "notes": [
            "plain is left out of the caption",
            "only " + " and ".join(MOVING_TEXTURES) + " backgrounds are moving",
            "circles and rings do not spin",
            "other words are not known and are ignored at best",
        ],
        "examples": [
            "a yellow star moves right over a navy background",
            "a red ring bounces over a gray striped background",
            "a cyan square spins on a maroon gradient background",
            "a white triangle circles around over a moving forest checkered background",
        ],
    }


def words() -> list[str]:
    """All words of all captions, sorted."""
    sentences = [*OBJECT_COLOURS, *BACKGROUND_COLOURS, *SHAPES, *SHAPE_SYNONYMS.values(), *TEXTURES]
    sentences += [text for pair in MOTIONS.values() for text in pair]
    sentences.append("a an and while over on moving background")
    return sorted(set(" ".join(sentences).split()))


def is_held_out(params: ClipParams) -> bool:
    """Whether the first object's colour, shape and motion are a combination never trained on."""
    first = params.objects[0]
    colour, motion = list(OBJECT_COLOURS).index(first.colour), list(MOTIONS).index(first.motion)
    return (colour * 7 + SHAPES.index(first.shape) * 5 + motion * 3) % 12 == 0


def sample_clip(rng: random.Random, held_out: bool = False, num_objects: int = 1) -> ClipParams:
    """Draw a clip at random.

    Args:
        rng: the source of chance; the same state gives the same clip.
        held_out: draw from the combinations kept for tests (one in twelve) or from the others.
        num_objects: 1 or 2, of different colours.
    """
    while True:
        params = _sample(rng, num_objects)
        if is_held_out(params) == held_out:
            return params


def _sample(rng: random.Random, num_objects: int) -> ClipParams:
    background = rng.choice(list(BACKGROUND_COLOURS))
    objects: list[ObjectParams] = []
    for _ in range(num_objects):
        free = [name for name in OBJECT_COLOURS if all(name != o.colour for o in objects)]
        while True:
            colour, shape, motion = rng.choice(free), rng.choice(SHAPES), rng.choice(list(MOTIONS))
            if motion != "spin" or shape not in CANNOT_SPIN:
                break
        radius = rng.uniform(0.15, 0.2) if num_objects == 1 else rng.uniform(0.12, 0.16)
        x, y, phase = rng.uniform(0.22, 0.78), rng.uniform(0.22, 0.78), rng.random()
        rotation = rng.uniform(-0.08, 0.08)
        objects.append(ObjectParams(colour, shape, motion, radius, x, y, phase, rotation))
    texture = rng.choice(TEXTURES)
    is_moving = texture in MOVING_TEXTURES and rng.random() < 0.5
    phase, brightness = rng.random(), rng.uniform(0.92, 1.08)
    return ClipParams(tuple(objects), background, texture, is_moving, phase, brightness)


def caption(params: ClipParams, rng: random.Random | None = None) -> str:
    """Describe a clip in one sentence.

    Args:
        params: the clip.
        rng: with one, some words are replaced by others of the same meaning.
    """

    def happens(chance: float) -> bool:
        return rng is not None and rng.random() < chance

    subjects = []
    for item in params.objects:
        motion = MOTIONS[item.motion][1 if happens(0.25) else 0]
        shape = SHAPE_SYNONYMS.get(item.shape, item.shape) if happens(0.15) else item.shape
        subjects.append(f"{_with_article(item.colour)} {shape} {motion}")
    joint, preposition = ("while" if happens(0.3) else "and"), ("on" if happens(0.3) else "over")
    place = params.background + ("" if params.texture == "plain" else f" {params.texture}")
    place = _with_article(f"moving {place}" if params.is_moving else place)
    return f"{f' {joint} '.join(subjects)} {preposition} {place} background"


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def render(
    params: ClipParams,
    num_frames: int,
    height: int = 64,
    width: int = 64,
    first_frame: int = 0,
    window: Window | None = None,
) -> Tensor:
    """Draw frames of a clip.

    Args:
        params: the clip.
        num_frames: how many frames.
        height: of the whole frame, in pixels.
        width: of the whole frame, in pixels.
        first_frame: the time of the first one; any whole number.
        window: draw this part of the frame only.
    Returns:
        (3, num_frames, height, width) float32 in [-1, 1], of the window's size if there is one.
    """
    window = window or Window(0, 0, height, width)
    t = (torch.arange(num_frames).float() + float(first_frame)).view(-1, 1, 1)
    y = (torch.arange(height)[window.top : window.top + window.height] + 0.5).view(1, -1, 1)
    x = (torch.arange(width)[window.left : window.left + window.width] + 0.5).view(1, 1, -1)
    y, x = y / height, x / width * (width / height)
    frames = _background(params, x, y, t, 1 / height)
    for item in reversed(params.objects):
        alpha = coverage(item, x, y, t, width / height, 1 / height)
        frames = frames + (_colour(OBJECT_COLOURS[item.colour]) - frames) * alpha
    return (frames * 2 - 1).expand(3, num_frames, window.height, window.width)


def _colour(rgb: tuple[int, int, int]) -> Tensor:
    return (torch.tensor(rgb).float() / 255.0).view(3, 1, 1, 1)


def _background(params: ClipParams, x: Tensor, y: Tensor, t: Tensor, pixel: float) -> Tensor:
    """(3, T or 1, h or 1, w or 1) in [0, 1]: plain, or two shades mixed."""
    base = _colour(BACKGROUND_COLOURS[params.background]) * params.brightness
    if params.texture == "plain":
        return base
    offset = params.background_phase + (SCROLL * t if params.is_moving else 0 * t)

    def wave(u: Tensor, cycles: float) -> Tensor:
        """An anti-aliased square wave."""
        saw = ((u * cycles) % 1 - 0.5).abs() - 0.25
        return (saw / (cycles * pixel) + 0.5).clamp(0, 1)

    if params.texture == "gradient":
        mix = y + 0 * x + 0 * t
    elif params.texture == "striped":
        mix = wave(x + y - offset * 0.5, 4.0)
    else:
        across, down = wave(x - offset * 0.5, 2.0), wave(y + 0 * t, 2.0)
        mix = across + down - 2 * across * down
    light, dark = (base * 1.45 + 0.04).clamp(0, 1), base * 0.55 + 0.02
    return light + (dark - light) * mix.unsqueeze(0)


def coverage(
    item: ObjectParams, x: Tensor, y: Tensor, t: Tensor, aspect: float = 1.0, pixel: float = 1 / 64
) -> Tensor:
    """Share of every pixel that an object covers.

    Args:
        item: the object.
        x: (1, 1, w), pixel centres in heights.
        y: (1, h, 1), likewise.
        t: (T, 1, 1), times in frames.
        aspect: the frame's width over its height.
        pixel: a pixel's size in heights.
    Returns:
        (T, h, w) in [0, 1].
    """
    still = 0 * t
    centre_x, centre_y = item.x * aspect + still, item.y + still
    radius, rotation, turn = item.radius + still, item.rotation + still, item.phase
    if item.motion in ("right", "left"):
        centre_x = centre_x + (SPEED if item.motion == "right" else -SPEED) * t
    elif item.motion in ("down", "up"):
        centre_y = centre_y + (SPEED if item.motion == "down" else -SPEED) * t
    elif item.motion == "bounce":
        u = (t / BOUNCE_PERIOD + turn) % 1
        centre_y = BOUNCE_FLOOR - 4 * u * (1 - u) * BOUNCE_HEIGHT
    elif item.motion == "orbit":
        angle = TWO_PI * (t / ORBIT_PERIOD + turn)
        centre_x = 0.5 * aspect + ORBIT_RADIUS * torch.cos(angle)
        centre_y = 0.5 + ORBIT_RADIUS * torch.sin(angle)
    elif item.motion == "spin":
        rotation = rotation + TWO_PI * (t / SPIN_PERIOD + turn)
    elif item.motion == "pulse":
        radius = radius * (1 + PULSE_DEPTH * torch.sin(TWO_PI * (t / PULSE_PERIOD + turn)))
    # what leaves on one side comes back on the other
    x = (x - centre_x + 0.5 * aspect) % aspect - 0.5 * aspect
    y = (y - centre_y + 0.5) % 1.0 - 0.5
    if item.shape not in CANNOT_SPIN:
        cos, sin = torch.cos(rotation), torch.sin(rotation)
        x, y = x * cos + y * sin, y * cos - x * sin
    return (0.5 - signed_distance(item.shape, radius, x, y) / pixel).clamp(0, 1)


def signed_distance(shape: str, radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Distance to a shape's edge, negative inside, exact near the edge; all arguments broadcast."""
    return _DISTANCES[shape](radius, x, y)


def _circle(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - r


def _ring(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((x * x + y * y).sqrt() - 0.74 * r).abs() - 0.26 * r


def _square(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84 * r


def _triangle(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.12 * r
    sides = torch.maximum(x * 0.8660254 - y * 0.5, -x * 0.8660254 - y * 0.5)
    return torch.maximum(y, sides) - 0.62 * r


def _star(r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one tenth of the star, then it is one edge."""
    r, x, y = 1.18 * r, x.abs(), -y
    for fold_x, fold_y in ((0.809016994, -0.587785252), (-0.809016994, -0.587785252)):
        excess = 2 * (fold_x * x + fold_y * y).clamp_min(0.0)
        x, y = x - excess * fold_x, y - excess * fold_y
    inner_x, inner_y = 0.47 * 0.587785252, 0.47 * 0.809016994  # of the notch; the tip is (0, 1)
    edge_x, edge_y = inner_x, inner_y - 1.0
    return (x.abs() * -edge_y + (y - r) * edge_x) / math.hypot(edge_x, edge_y)


# All of about the same apparent size; exact near the edge. No trigonometry per pixel: it made
# drawing 40 times slower.
_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
}
