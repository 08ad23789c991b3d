"""The automatic judge of one-object clips: colour, shape, motion and background of a video.

It asks which clip of `clips` the video is nearest to. Pixels go to the nearest object colour or
background shade. The object's centre, a point on a torus since clips wrap around, is compared with
every path a motion can take; its outline with every shape at every angle, turning and not, sharp
and blurred. Nothing is learnt; videos drawn by `clips` are judged without an error
(tests/models/test_demo_judge.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import clips
from .clips import ClipParams

NONE = "none"
ASPECTS = ("colour", "shape", "motion", "background")
MIN_AREA = 0.005  # of the frame: less is no object
MIN_COHERENCE = 0.8  # 1 - circular variance of the best path's residual, mean of both axes
MIN_OVERLAP = 0.5  # intersection over union with the best shape
MAX_COLOUR_DISTANCE = 0.5  # sum over the channels, each 0 to 1
PULSE_RANGE = 0.28  # of the size over its mean: at least 0.56 when it pulses, 0.03 when not
NUM_OUTLINES = 8  # frames whose outlines are compared
REACH = 0.375  # half the side of what is compared around the centre, in heights
NUM_ANGLES = 12  # tried within a shape's symmetry
# Of the blurred outlines, in pixels at height 64. A VAE rounds stars: without, 24 of 192
# reconstructed clips showed a "circle" that the eye sees as a star; with it 6, and nothing that is
# no star became one.
BLUR = 5
PHASES = 48  # tried of a periodic path

# area over radius squared, and turns that leave the outline as it is
_AREAS = {
    "circle": math.pi,
    "square": 4 * 0.84**2,
    "triangle": 3 * math.sqrt(3) * 0.62**2,
    "star": 1.18**2 * 5 * 0.47 * 0.587785252,
    "ring": math.pi * (1 - 0.48**2),
}
_SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "ring": 0}
_TRIANGLE_CENTROID = 0.12  # below the object's centre, in radii


@dataclass(frozen=True)
class Verdict:
    """What a video shows; `none` where nothing can be told.

    area: mean share of the frame. coherence, overlap: how well path and outline fit, 0 to 1.
    """

    colour: str
    shape: str
    motion: str
    background: str
    area: float
    coherence: float
    overlap: float


@dataclass(frozen=True)
class Scores:
    """Shares of clips judged right, for each aspect and for all four together, and what was wrong.

    misses: caption and aspect -> what was seen instead.
    """

    num_clips: int
    rates: dict[str, float]
    misses: list[tuple[str, dict[str, str]]]

    def confusions(self) -> Counter[str]:
        """Wrong verdicts counted by aspect and value."""
        return Counter(f"{k}: {v}" for _, wrong in self.misses for k, v in wrong.items())


def expected(params: ClipParams) -> dict[str, str]:
    """The right answers for a one-object clip."""
    first = params.objects[0]
    return {
        "colour": first.colour,
        "shape": first.shape,
        "motion": first.motion,
        "background": params.background,
    }


def score(videos: Iterable[Any], params: Sequence[ClipParams], is_strict: bool = False) -> Scores:
    """Judge videos against the clips they should show.

    Args:
        videos: (T, H, W, 3) each, 0 to 1, arrays or tensors.
        params: one for each video.
        is_strict: compare with sharp outlines only.
    """
    hits: Counter[str] = Counter()
    misses = []
    for video, clip in zip(videos, params, strict=True):
        verdict, wanted = judge(video, is_strict), expected(clip)
        wrong = {k: getattr(verdict, k) for k in ASPECTS if getattr(verdict, k) != wanted[k]}
        hits.update(k for k in ASPECTS if k not in wrong)
        hits["all"] += not wrong
        if wrong:
            misses.append((clips.caption(clip), wrong))
    rates = {k: hits[k] / len(params) for k in (*ASPECTS, "all")}
    return Scores(len(params), rates, misses)


def judge(video: Any, is_strict: bool = False) -> Verdict:
    """Tell what a one-object video shows.

    Args:
        video: (T, H, W, 3), 0 to 1, an array or a tensor; made for 9 frames and more.
        is_strict: compare with sharp outlines only.
    """
    frames = torch.as_tensor(video).float()
    colour, mask = _segment(frames)
    background = _background(frames, mask)
    sizes = mask.float().mean((1, 2))
    area = float(sizes.mean())
    if area < MIN_AREA:
        return Verdict(NONE, NONE, NONE, background, area, 0.0, 0.0)
    centres = torch.stack([_centre(mask.sum(1)), _centre(mask.sum(2))])
    motion, coherence = _path(centres, sizes)
    outlines = _outlines(mask, centres, sizes)
    if motion != "still":
        outlines = (outline for outline in outlines if not outline.turns)
    best = max(outlines, key=lambda outline: outline.overlap(is_strict), default=NO_OUTLINE)
    shape, overlap = best.shape, best.overlap(is_strict)
    if motion == "still":
        motion = "pulse" if _pulses(sizes) else "spin" if best.turns else "still"
    if coherence < MIN_COHERENCE:
        motion = NONE
    if overlap < MIN_OVERLAP:
        shape = NONE
    return Verdict(colour, shape, motion, background, area, coherence, overlap)


def _segment(frames: Tensor) -> tuple[str, Tensor]:
    """Name of the object's colour and (T, H, W) where it is."""
    objects = torch.tensor(list(clips.OBJECT_COLOURS.values())) / 255.0
    base = torch.tensor(list(clips.BACKGROUND_COLOURS.values())) / 255.0
    shades = torch.cat([base, base * 0.55 + 0.02, (base * 1.45 + 0.04).clamp(0, 1)])
    pixels = frames.reshape(-1, 3)
    to_object, to_shade = (torch.cdist(pixels, known, p=1.0) for known in (objects, shades))
    nearest, index = to_object.min(-1)
    is_object = (nearest < to_shade.amin(-1)) & (nearest < MAX_COLOUR_DISTANCE)
    counts = torch.bincount(index[is_object], minlength=len(objects))
    best = int(counts.argmax())
    return list(clips.OBJECT_COLOURS)[best], (is_object & (index == best)).view(frames.shape[:3])


def _background(frames: Tensor, mask: Tensor) -> str:
    """Nearest background to the mean colour off the object and its blended edge.

    The mean of a texture is 0.03 above the plain colour.
    """
    near = mask
    for axis in (1, 2):
        near = near | near.roll(1, axis) | near.roll(-1, axis)
    if bool(near.all()):
        return NONE
    mean = frames[~near].mean(0)
    base = torch.tensor(list(clips.BACKGROUND_COLOURS.values())) / 255.0
    distances = torch.stack([(mean - base).abs().sum(-1), (mean - base - 0.03).abs().sum(-1)])
    return list(clips.BACKGROUND_COLOURS)[int(distances.amin(0).argmin())]


def _centre(profile: Tensor) -> Tensor:
    """(T, n) counts -> (T,) circular mean position in [0, 1)."""
    n = profile.shape[1]
    angles = 2 * math.pi * (torch.arange(n) + 0.5) / n
    wave = torch.polar(torch.ones(n), angles)
    return (torch.angle((profile * wave).sum(1)) / (2 * math.pi)) % 1


def _paths(num_frames: int) -> Iterator[tuple[str, Tensor]]:
    """Every path (2, T) an object can take, up to where it starts; "still" for all that stay."""
    t = torch.arange(num_frames).float()
    zero = torch.zeros_like(t)
    yield "still", torch.stack([zero, zero])
    for motion, x, y in (("right", 1, 0), ("left", -1, 0), ("down", 0, 1), ("up", 0, -1)):
        yield motion, torch.stack([x * clips.SPEED * t, y * clips.SPEED * t])
    for phase in range(PHASES):
        u = (t / clips.BOUNCE_PERIOD + phase / PHASES) % 1
        yield "bounce", torch.stack([zero, -4 * u * (1 - u) * clips.BOUNCE_HEIGHT])
        angle = 2 * math.pi * (t / clips.ORBIT_PERIOD + phase / PHASES)
        yield "orbit", clips.ORBIT_RADIUS * torch.stack([angle.cos(), angle.sin()])


def _path(centres: Tensor, sizes: Tensor) -> tuple[str, float]:
    """Motion whose path fits best, and how well, over the frames that show the object."""
    is_seen = sizes >= MIN_AREA / 2
    best, best_coherence = NONE, 0.0
    for motion, path in _paths(centres.shape[1]):
        residual = 2 * math.pi * (centres - path)[:, is_seen]
        coherence = float(torch.polar(torch.ones_like(residual), residual).mean(1).abs().mean())
        if coherence > best_coherence:
            best, best_coherence = motion, coherence
    return best, best_coherence * float(is_seen.float().mean())


def _pulses(sizes: Tensor) -> bool:
    lengths = sizes.clamp_min(1e-6).sqrt()
    low, high = torch.quantile(lengths, torch.tensor([0.05, 0.95]))
    return bool((high - low) / lengths.mean() > PULSE_RANGE)


@dataclass(frozen=True)
class Outline:
    """How well a shape, turning or not, overlaps with an object: mean intersection over union."""

    shape: str
    turns: bool
    sharp: float
    blurred: float

    def overlap(self, is_strict: bool) -> float:
        """The better of both, or only the sharp one's."""
        return self.sharp if is_strict else max(self.sharp, self.blurred)


NO_OUTLINE = Outline(NONE, False, 0.0, 0.0)


def _outlines(mask: Tensor, centres: Tensor, sizes: Tensor) -> Iterator[Outline]:
    """Every shape at its best angle. Each frame's template has the measured centre and area."""
    num_frames, height, width = mask.shape
    chosen = torch.linspace(0, num_frames - 1, min(NUM_OUTLINES, num_frames)).round().long()
    chosen = chosen[sizes[chosen] >= MIN_AREA / 2]
    if not len(chosen):
        return
    aspect = width / height
    reach = min(round(REACH * height), height // 2, width // 2)
    mask, y = _around(mask[chosen], centres[1, chosen], reach, 1)
    mask, x = _around(mask, centres[0, chosen], reach, 2)
    y, x = y.unsqueeze(2) / height, x.unsqueeze(1) / height
    blur = 2 * round(BLUR * height / 128) + 1
    for shape, turns in ((shape, turns) for shape in clips.SHAPES for turns in (False, True)):
        folds = _SYMMETRY[shape]
        if turns and not folds:
            continue
        radius = (sizes[chosen] * aspect / _AREAS[shape]).sqrt().view(-1, 1, 1)
        angles = torch.arange(NUM_ANGLES if folds else 1) / NUM_ANGLES
        angles = angles.view(-1, 1, 1, 1) * 2 * math.pi / max(folds, 1)
        if turns:
            angles = angles + 2 * math.pi / clips.SPIN_PERIOD * chosen.view(-1, 1, 1)
        cos, sin = angles.cos(), angles.sin()
        across, down = x * cos + y * sin, y * cos - x * sin
        if shape == "triangle":
            down = down + _TRIANGLE_CENTROID * radius
        distance = clips.signed_distance(shape, radius, across, down)
        soft = F.avg_pool2d((0.5 - distance * height).clamp(0, 1), blur, 1, blur // 2)
        yield Outline(shape, turns, _overlap(distance < 0, mask), _overlap(soft > 0.5, mask))


def _around(mask: Tensor, centre: Tensor, reach: int, axis: int) -> tuple[Tensor, Tensor]:
    """Cut `reach` pixels on either side of the centre, around the torus.

    Args:
        mask: (T, H, W).
        centre: (T,) in sizes of the axis.
        reach: pixels.
        axis: 1 or 2.
    Returns:
        The part, and (T, 2 reach) where its pixels lie from the centre, in pixels.
    """
    size = mask.shape[axis]
    place = (centre * size).round().long().unsqueeze(1) + torch.arange(-reach, reach)
    index = (place % size).unsqueeze(3 - axis)
    shape = list(mask.shape)
    shape[axis] = 2 * reach
    return mask.gather(axis, index.expand(shape)), place + 0.5 - (centre * size).unsqueeze(1)


def _overlap(templates: Tensor, mask: Tensor) -> float:
    """Mean over the frames of intersection over union, for the best of all angles."""
    shares = (templates & mask).sum((-1, -2)) / (templates | mask).sum((-1, -2))
    return float(shares.mean(-1).max())
