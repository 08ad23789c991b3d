"""However a video is split into calls, the VAE gives the same bits; its state survives a file."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from reelpool.models.spec import VaeSpec
from reelpool.models.wan_vae import VaeState, WanVae

STATISTICS = {"latents_mean": (0.3, -0.2, 0.1, 0.5), "latents_std": (1.5, 0.7, 2.0, 1.1)}
SPECS = {
    "wan21": VaeSpec(4, 4, 4, (1, 2, 2), 1, (True, True), spatial_factor=4, **STATISTICS),
    "wan22": VaeSpec(4, 4, 4, (1, 2, 2), 1, (True, True), True, 12, 12, 2, **STATISTICS),
}
NUM_LATENTS, NUM_FRAMES = 4, 15  # the last two frames fill no group


@lru_cache
def whole(layout: str) -> tuple[WanVae, dict[str, tuple[torch.Tensor, torch.Tensor, VaeState]]]:
    """A VAE and, for each direction, its input, and the output and state of one single call."""
    torch.manual_seed(5)
    vae = WanVae(SPECS[layout]).requires_grad_(False)
    side = SPECS[layout].spatial_factor
    latents = torch.randn(1, 4, NUM_LATENTS, 1, 2)
    frames = torch.rand(1, 3, NUM_FRAMES, side, 2 * side) * 2 - 1
    return vae, {
        "decode": (latents, *vae.decode(latents)),
        "encode": (frames, *vae.encode(frames)),
    }


def through_a_file(state: VaeState) -> VaeState:
    return VaeState.from_tensors(load(save(state.to_tensors())))


def assert_same_state(state: VaeState, expected: VaeState) -> None:
    ours, theirs = state.to_tensors(), expected.to_tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, bool]]:
    """Where calls end, empty calls included, and whether the state goes through a file there."""
    ends = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
    return [(end, draw(st.booleans())) for end in [*ends, length]]


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize(("direction", "length"), [("decode", NUM_LATENTS), ("encode", NUM_FRAMES)])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_split_gives_the_same_bits(layout, direction, length, data):
    vae, cases = whole(layout)
    video, expected, last = cases[direction]
    call = getattr(vae, direction)
    pieces, state, start = [], None, 0
    for end, saves in data.draw(cuts(length)):
        piece, state = call(video[:, :, start:end], state)
        state = through_a_file(state) if saves else state
        pieces.append(piece)
        start = end
    assert torch.equal(torch.cat(pieces, 2), expected)
    assert_same_state(state, last)


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_call_leaves_input_and_state_as_they_were(layout, direction):
    vae, cases = whole(layout)
    video = cases[direction][0].clone()
    call = getattr(vae, direction)
    _, state = call(video[:, :, :3])
    before = {name: tensor.clone() for name, tensor in state.to_tensors().items()}
    first, _ = call(video[:, :, 3:], state)
    again, _ = call(video[:, :, 3:], state)
    assert torch.equal(first, again)
    assert torch.equal(video, cases[direction][0])
    for name, tensor in state.to_tensors().items():
        assert torch.equal(tensor, before[name]), name
