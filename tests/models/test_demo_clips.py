"""The clips are part of the demo model: what they look like and say must not move."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from reelpool.models.demo import clips
from reelpool.models.demo.clips import ClipParams, ObjectParams, Window

STAR = ObjectParams("yellow", "star", "right", 0.18, 0.5, 0.5, 0.0, 0.0)
CLIP = ClipParams((STAR,), "navy", "plain", False, 0.0, 1.0)
CAPTIONS = [
    "a blue star moves right over a plum background",
    "a purple triangle moves left over a teal background",
    "a green star moves down over a moving gray checkered background",
    "a green square bounces over a moving forest striped background",
]
SUMS = [[-0.4758, 0.2702], [-0.5861, 0.2969], [-0.4642, 0.3935], [0.0114, 0.4554]]  # mean, std


def test_sampling_is_pinned():
    rng = random.Random(7)
    captions = [clips.caption(clips.sample_clip(rng, held_out=bool(i % 2))) for i in range(4)]
    assert captions == CAPTIONS


def test_drawing_is_pinned():
    rng = random.Random(7)
    sums = []
    for index in range(4):
        params = clips.sample_clip(rng, num_objects=1 + index // 3)
        video = clips.render(params, 5, first_frame=index)
        sums.append([round(float(video.mean()), 4), round(float(video.std()), 4)])
    assert sums == SUMS


def test_same_seed_gives_the_same_bits():
    first, second = (clips.sample_clip(random.Random(3)) for _ in range(2))
    assert first == second
    assert torch.equal(clips.render(first, 5), clips.render(second, 5))


def test_held_out_is_one_combination_in_twelve_and_never_sampled():
    rng = random.Random(0)
    assert not any(clips.is_held_out(clips.sample_clip(rng)) for _ in range(200))
    assert all(clips.is_held_out(clips.sample_clip(rng, held_out=True)) for _ in range(50))
    every = [
        replace(CLIP, objects=(replace(STAR, colour=colour, shape=shape, motion=motion),))
        for colour in clips.OBJECT_COLOURS
        for shape in clips.SHAPES
        for motion in clips.MOTIONS
    ]
    assert sum(map(clips.is_held_out, every)) / len(every) == pytest.approx(1 / 12, abs=0.01)


def test_captions_say_what_is_there():
    assert clips.caption(CLIP) == "a yellow star moves right over a navy background"
    ring = replace(STAR, colour="orange", shape="ring", motion="bounce")
    both = ClipParams((ring, STAR), "gray", "striped", True, 0.0, 1.0)
    assert clips.caption(both) == (
        "an orange ring bounces and a yellow star moves right over a moving gray striped background"
    )
    reworded = {clips.caption(both, random.Random(seed)) for seed in range(40)}
    assert any("donut" in text for text in reworded)
    assert any("slides right" in text for text in reworded)


def test_grammar_holds_every_word_of_every_caption():
    known = set(clips.words())
    rng = random.Random(1)
    for index in range(100):
        params = clips.sample_clip(rng, num_objects=1 + index % 2)
        assert set(clips.caption(params, rng).split()) <= known
    for example in clips.grammar()["examples"]:
        assert set(example.split()) <= known


def test_frame_range_and_window_are_parts_of_the_whole():
    params = clips.sample_clip(random.Random(5))
    whole = clips.render(params, 9)
    assert whole.shape == (3, 9, 64, 64)
    assert whole.min() >= -1
    assert whole.max() <= 1
    assert torch.equal(clips.render(params, 4, first_frame=5), whole[:, 5:])
    part = clips.render(params, 9, window=Window(8, 16, 24, 32))
    assert torch.equal(part, whole[:, :, 8:32, 16:48])


def test_wide_frames_keep_the_shape():
    video = clips.render(CLIP, 1, 64, 128)
    assert video.shape == (3, 1, 64, 128)
    lit = video[0, 0] > 0
    assert abs(int(lit.any(0).sum()) - int(lit.any(1).sum())) <= 3


def test_objects_come_back_on_the_other_side():
    lit = clips.render(CLIP, 20)[0] > 0.9
    assert bool(lit[14, :, :8].any())
    assert bool(lit[14, :, -8:].any())
