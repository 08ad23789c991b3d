"""Tiny decoders: layout, streaming, and the plain network over whole videos as reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from reelpool.errors import ConfigError, MissingTensor, ShapeMismatch, StateError, WeightError
from reelpool.models.taehv import TinyDecoder, TinySpec, open_tiny, tiny_tensors
from reelpool.models.weights import SafetensorsSource

SPECS = {"taew2_1": TinySpec(4, 1, (12, 8, 6, 4)), "taew2_2": TinySpec(6, 2, (12, 8, 6, 4))}


def weights_of(spec):
    """Random, so that most pixels lie between black and white."""
    made = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in tiny_tensors(spec).items():
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        weights[name] = scale * torch.randn(shape, generator=made)
    weights["decoder.22.weight"] *= 0.2
    weights["decoder.22.bias"] += 0.5
    return weights


def written(path, tensors):
    save_file(tensors, path)
    return SafetensorsSource(path)


@pytest.fixture(params=SPECS)
def decoder(request, tmp_path):
    spec = SPECS[request.param]
    source = written(tmp_path / "tiny.safetensors", weights_of(spec))
    return TinyDecoder(open_tiny(source), source, torch.float32, "cpu")


def latents_of(spec, num=4):
    made = torch.Generator().manual_seed(1)
    return 2 * torch.randn(1, spec.z_dim, num, 3, 5, generator=made)


@torch.inference_mode()
def reference(spec, latents):
    """The whole video at a time, as an nn.Sequential with numbered layers."""
    weights = weights_of(spec)

    def conv(x, name):
        weight, bias = weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias")
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding="same")
        layer.weight.data = weight
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer(x)

    x = latents[0].transpose(0, 1)
    x = conv(3 * torch.tanh(x / 3), 1).relu()
    for index in range(3, 21):
        place = (index - 3) % 6
        if place < 3:
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            y = conv(torch.cat([x, past], 1), f"{index}.conv.0").relu()
            y = conv(conv(y, f"{index}.conv.2").relu(), f"{index}.conv.4")
            x = (y + x).relu()
        elif place == 3:
            x = nn.Upsample(scale_factor=2)(x)
        elif place == 4:
            channels = x.shape[1]
            x = torch.cat([f.unflatten(0, (-1, channels)) for f in conv(x, f"{index}.conv")])
        else:
            x = conv(x, index)
    x = F.pixel_shuffle(conv(x.relu(), 22), spec.patch_size).clamp(0, 1)
    return x[3:].transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize(("z_dim", "patch", "millions"), [(16, 1, 9.84), (48, 2, 9.92)])
def test_the_published_sizes_have_the_published_numbers_of_parameters(z_dim, patch, millions):
    shapes = tiny_tensors(TinySpec(z_dim, patch))
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6, 2) == millions
    assert len(shapes) == 64  # of the file's 128; the others are the encoder's


def test_the_layout_is_read_off_the_tensors(decoder):
    assert decoder.spec in SPECS.values()
    assert decoder.num_bytes == 4 * sum(math.prod(s) for s in tiny_tensors(decoder.spec).values())


def test_decode_equals_the_plain_network(decoder):
    latents = latents_of(decoder.spec)
    frames, state = decoder.decode(latents)
    expected = reference(decoder.spec, latents)
    factor = decoder.spec.spatial_factor
    assert frames.shape == (1, 3, 13, 3 * factor, 5 * factor)
    assert state.num_done == 4
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.3  # not all of it is clamped
    torch.testing.assert_close((frames + 1) / 2, expected, rtol=0, atol=1e-5)  # measured 1.3e-6


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (3, 1), (1, 3)], ids=str)
def test_streaming_gives_the_bits_of_one_call(decoder, cuts):
    latents, state, pieces = latents_of(decoder.spec), None, []
    for part in latents.split(cuts, 2):
        frames, state = decoder.decode(part, state)
        pieces.append(frames)
    assert torch.equal(torch.cat(pieces, 2), decoder.decode(latents)[0])
    assert len(state.caches) == 9


def test_the_state_does_not_grow(decoder):
    sizes, state = [], None
    for _ in range(3):
        _, state = decoder.decode(latents_of(decoder.spec, 1), state)
        sizes.append(state.num_bytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_half_weights_give_float32_frames(tmp_path):
    source = written(tmp_path / "tiny.safetensors", weights_of(SPECS["taew2_1"]))
    half = TinyDecoder(SPECS["taew2_1"], source, torch.bfloat16, "cpu")
    frames, _ = half.decode(latents_of(half.spec))
    assert frames.dtype == torch.float32
    difference = (frames + 1) / 2 - reference(half.spec, latents_of(half.spec))
    assert difference.abs().mean() < 0.004  # measured 0.0008


def test_what_does_not_fit_is_refused(decoder):
    with pytest.raises(ConfigError, match=r"latents: shape \[1, 9, 1, 3, 5\]"):
        decoder.decode(torch.zeros(1, 9, 1, 3, 5))
    _, state = decoder.decode(latents_of(decoder.spec))
    with pytest.raises(StateError, match=r"kept frame of decoder\.3"):
        decoder.decode(torch.zeros(1, decoder.spec.z_dim, 1, 4, 5), state)


def test_files_of_something_else_are_refused(tmp_path):
    weights = weights_of(SPECS["taew2_1"])
    missing = {name: t for name, t in weights.items() if name != "decoder.9.conv.2.bias"}
    with pytest.raises(MissingTensor, match=r"decoder\.9\.conv\.2\.bias"):
        open_tiny(written(tmp_path / "missing.safetensors", missing))
    wider = {**weights, "decoder.13.conv.weight": torch.zeros(8, 8, 1, 1)}
    with pytest.raises(ShapeMismatch, match=r"decoder\.13\.conv\.weight"):
        open_tiny(written(tmp_path / "wider.safetensors", wider))
    odd = {**weights, "decoder.22.weight": torch.zeros(5, 4, 3, 3)}
    with pytest.raises(WeightError, match="3 or 12 channels"):
        open_tiny(written(tmp_path / "odd.safetensors", odd))
