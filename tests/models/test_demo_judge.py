"""The judge makes no error on drawn clips, and sees what is broken."""

from __future__ import annotations

import random

import pytest
import torch

from reelpool.models.demo import clips
from reelpool.models.demo.judge import ASPECTS, NONE, expected, judge, score

NUM_CLIPS = 24


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """Small tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def params():
    return [clips.sample_clip(random.Random(4000 + i), held_out=True) for i in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def videos(params):
    return [to_video(clips.render(clip, 17)) for clip in params]


def to_video(frames):
    return ((frames + 1) / 2).permute(1, 2, 3, 0)


@pytest.mark.parametrize("is_strict", [False, True], ids=["blurred", "strict"])
def test_drawn_clips_are_judged_without_an_error(params, videos, is_strict):
    count = NUM_CLIPS if not is_strict else 6
    scores = score(videos[:count], params[:count], is_strict)
    assert scores.misses == []
    assert set(scores.rates.values()) == {1.0}


@pytest.mark.parametrize("phase", range(6))
def test_bounce_is_no_straight_line(phase):
    """A clip shows 17 of a bounce's 24 frames, and most of those go one way."""
    ball = clips.ObjectParams("red", "circle", "bounce", 0.17, 0.5, 0.5, phase / 6, 0.0)
    clip = clips.ClipParams((ball,), "black", "plain", False, 0.0, 1.0)
    assert judge(to_video(clips.render(clip, 17))).motion == "bounce"


@pytest.mark.parametrize("num_frames", [13, 33])
def test_other_lengths_are_judged_too(params, num_frames):
    some = params[:4]
    assert score([to_video(clips.render(c, num_frames)) for c in some], some).rates["all"] == 1.0


def test_arrays_are_judged_like_tensors(params, videos):
    assert judge(videos[0].numpy()) == judge(videos[0])


def test_each_wrong_aspect_is_named(params, videos):
    """The clips in reverse order are the wrong answers to each other's captions."""
    scores = score(videos[:8], params[:8][::-1])
    for (_, wrong), shown, wanted in zip(scores.misses, params[:8], params[:8][::-1], strict=True):
        shows = expected(shown)
        assert wrong == {k: shows[k] for k in ASPECTS if shows[k] != expected(wanted)[k]}


BROKEN = {
    "noise": lambda video: torch.rand(video.shape, generator=torch.Generator().manual_seed(0)),
    "black": torch.zeros_like,
    "gray": lambda video: torch.full_like(video, 0.5),
    "frames in disorder": lambda video: video[torch.arange(17) * 7 % 17],
    "halves swapped": lambda video: video.view(17, 8, 8, 64, 3).flip(1).reshape(17, 64, 64, 3),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_videos_score_low(params, videos, kind):
    moving = [i for i in range(NUM_CLIPS) if params[i].objects[0].motion in ("left", "up", "orbit")]
    moving = moving[:4]
    scores = score([BROKEN[kind](videos[i]) for i in moving], [params[i] for i in moving])
    assert scores.rates["all"] <= 0.25


def test_nothing_to_see_is_none():
    verdict = judge(torch.zeros(17, 64, 64, 3))
    assert (verdict.colour, verdict.shape, verdict.motion) == (NONE, NONE, NONE)
    assert verdict.background == "black"
