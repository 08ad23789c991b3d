"""Attention in groups of heads gives what attention over all heads at once gives.

Beside each tolerance stands the largest difference measured (CPU, torch 2.13); velocities are of
the order of 1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file

from reelpool.models.files import open_model
from reelpool.models.lora import Lora, open_lora
from reelpool.models.quant import Quantised
from reelpool.models.spec import LatentShape, NumericsProfile, TransformerSpec
from reelpool.models.wan import Hidden
from reelpool.runtime.block_runner import BlockRunner
from reelpool.runtime.types import BlockRange
from tests.lora_files import Source, entries_of, forward_of, random_weights, write
from tests.tiny_models import latents_of, open_runner, prompt_rows
from tests.tiny_models import velocity as velocity_of

SPEC = TransformerSpec(5, 12, 64, 2, 4, 4, text_dim=32, freq_dim=32)
EVERY = replace(SPEC, in_channels=8, image_dim=24, image_positions=6, fps_embedding=True)
SHAPE = LatentShape(4, 3, 8, 8)  # 16 tokens a frame
GROUPS = (2, 3, 4, 5, 40)  # 5 heads: uneven groups, single heads, more groups than heads


def runner_of(weights, groups=1, chunk=2048, dtype="float32", spec=SPEC):
    numerics = NumericsProfile(dtype=dtype, token_chunk=chunk, head_groups=groups)
    return BlockRunner(spec, Source(weights), numerics, torch.device("cpu"))


def run(runner, loras=(), forward=None):
    total = runner.spec.num_layers
    forward = forward or forward_of(runner.spec, SHAPE)
    return runner.run(BlockRange(0, total, total), [forward], loras=loras)[0]


@pytest.fixture(scope="module")
def weights():
    return random_weights(EVERY)


@pytest.fixture(scope="module")
def whole(weights):
    """All heads and all tokens at once."""
    return run(runner_of(weights, spec=EVERY))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("chunk", [5, 16, 20, 2048])
def test_every_number_of_groups_and_chunk_size_equals_the_whole(weights, whole, groups, chunk):
    assert whole.std() > 0.3
    grouped = run(runner_of(weights, groups, chunk, spec=EVERY))
    torch.testing.assert_close(grouped, whole, rtol=0, atol=1e-5)  # measured 1.2e-6


@pytest.mark.parametrize("groups", [2, 5])
def test_bfloat16_is_as_near_to_the_truth_as_the_whole(weights, whole, groups):
    errors = [
        (run(runner_of(weights, count, dtype="bfloat16", spec=EVERY)) - whole).abs().mean()
        for count in (1, groups)
    ]
    assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_a_cut_between_blocks_changes_no_bit(weights, dtype, chunk):
    forward = forward_of(EVERY, SHAPE)
    expected = run(runner_of(weights, 3, chunk, dtype, EVERY), forward=forward)
    first, second = (runner_of(weights, 3, chunk, dtype, EVERY) for _ in range(2))
    (hidden,) = first.run(BlockRange(0, 1, 2), [forward])
    assert isinstance(hidden, Hidden)
    moved = replace(forward, latents=None, timesteps=None, hidden=hidden)
    assert torch.equal(second.run(BlockRange(1, 2, 2), [moved])[0], expected)


def test_two_forwards_of_a_call_equal_two_calls_bit_for_bit(weights):
    runner = runner_of(weights, 2, 16, spec=EVERY)
    one = forward_of(EVERY, SHAPE)
    other = replace(one, text_key="u", prompt_embeds=prompt_rows(9, EVERY.text_dim, seed=4))
    both = runner.run(BlockRange(0, 2, 2), [one, other])
    assert torch.equal(both[0], run(runner, forward=one))
    assert torch.equal(both[1], run(runner, forward=other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_of_threads_changes_no_bit_of_the_demo(dtype):
    runner = open_runner(open_model("demo"), NumericsProfile(dtype=dtype, head_groups=4))
    latents, rows = latents_of(LatentShape(16, 5, 8, 8)), prompt_rows(12, 128)
    steps = torch.tensor([999.0, 800.0, 3.0, 0.0, 500.0])
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(velocity_of(runner, latents, steps, rows))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("kinds", [("Q8_0", "Q8_0"), ("Q4_0", "Q5_1")])
def test_quantised_weights_with_a_lora_beside_them_equal_the_whole(tmp_path, kinds):
    """Groups of a head and a half of 32 rows; `v` of another kind than `q` and `k`."""
    spec = TransformerSpec(3, 32, 64, 1, 4, 4, text_dim=32, freq_dim=32)
    weights = random_weights(spec)
    for name, matrix in weights.items():
        if name.startswith("blocks.") and matrix.ndim == 2:
            kind = kinds[".v." in name]
            data = quantize(matrix.numpy(), GGMLQuantizationType[kind])
            weights[name] = Quantised(torch.from_numpy(data), kind, tuple(matrix.shape))
    save_file(write("comfyui", entries_of(spec)), tmp_path / "lora.safetensors")
    loras = [Lora(open_lora(tmp_path / "lora.safetensors"))]
    expected = run(runner_of(weights, spec=spec), loras)
    for groups in (2, 3):
        grouped = run(runner_of(weights, groups, 20, spec=spec), loras)
        torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-5)  # measured 0
    assert (run(runner_of(weights, spec=spec)) - expected).abs().max() > 0.1


def test_the_profile_decides():
    """Groups are used when asked for, and only then: fewer bytes live beside the stream."""
    from reelpool.runtime.activations import measure_forward

    spec, shape = TransformerSpec(8, 128, 2048, 1, 16, 16), LatentShape(16, 9, 64, 64)
    numerics = [NumericsProfile("bfloat16", 1024, groups) for groups in (1, 2, 8)]
    peaks = [measure_forward(spec, shape, each).peak_bytes for each in numerics]
    stream = spec.num_tokens(shape) * spec.dim * 2
    assert peaks[0] > 5 * stream
    assert peaks[0] > peaks[1] > peaks[2] > 2 * stream
