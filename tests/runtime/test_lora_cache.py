"""LoRAs on a block runner: what is kept, what is read again, and what never changes a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import WeightError
from reelpool.models.lora import Lora, LoraFile, open_lora
from reelpool.models.wan import Hidden
from reelpool.runtime.block_runner import MAX_CONTEXTS
from reelpool.runtime.lora_cache import MAX_LORAS
from reelpool.runtime.types import BlockRange
from tests.lora_files import (
    EVERY,
    entries_of,
    forward_of,
    merged,
    random_weights,
    runner_of,
    velocity,
    write,
)

WHOLE = BlockRange(0, 2, 2)
WEIGHTS = random_weights(EVERY)


@pytest.fixture
def runner():
    return runner_of(EVERY, WEIGHTS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LoRAs that change every layer."""
    folder, opened = tmp_path_factory.mktemp("loras"), []
    for seed in range(MAX_LORAS + 2):
        path = folder / f"{seed}.safetensors"
        save_file(write("comfyui", entries_of(EVERY, seed)), path)
        opened.append(open_lora(path))
    return opened


@pytest.fixture
def reads(monkeypatch):
    """Names of LoRA tensors that were read."""
    names, tensor = [], LoraFile.tensor

    def record(self, name, dtype):
        names.append(name)
        return tensor(self, name, dtype)

    monkeypatch.setattr(LoraFile, "tensor", record)
    return names


def test_strength_zero_and_no_lora_give_the_bits_of_the_base(runner, files):
    plain = velocity(runner)
    assert torch.equal(velocity(runner, [Lora(files[0], 0.0)]), plain)
    assert not torch.equal(velocity(runner, [Lora(files[0], 1e-3)]), plain)
    assert torch.equal(velocity(runner), plain)


def test_another_strength_reads_nothing_again(runner, files, reads):
    results = []
    for strength in (1.0, 0.5, 1.0, -0.25):
        results.append(velocity(runner, [Lora(files[0], strength)]))
        if len(results) == 1:
            count = len(reads)
            assert count == len(set(reads)) > 0
    assert len(reads) == count
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_no_weight_of_the_model_is_read_again(runner, files, monkeypatch):
    velocity(runner)
    before = dict(runner._blocks)
    velocity(runner, [Lora(files[0])])
    assert all(runner._blocks[index] is block for index, block in before.items())
    assert all(block.qkv.sides == () for block in before.values())


@pytest.mark.parametrize("layer", ["text_embedding.0", "blocks.1.cross_attn.k", "img_emb.proj.1"])
@pytest.mark.parametrize("strengths", [(1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_kept_keys_and_values_are_never_those_of_other_loras(tmp_path, runner, layer, strengths):
    """A LoRA on nothing but what the prompt's or image's keys are made of."""
    entries = {layer: entries_of(EVERY)[layer]}
    save_file(write("comfyui", entries), tmp_path / "lora.safetensors")
    file = open_lora(tmp_path / "lora.safetensors")
    for strength in strengths:
        ours = velocity(runner, [Lora(file, strength)])
        assert runner._key_values  # they are kept at this size
        fresh = velocity(runner_of(EVERY, WEIGHTS), [Lora(file, strength)])
        assert torch.equal(ours, fresh)
        expected = velocity(runner_of(EVERY, merged(WEIGHTS, entries, strength)))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # measured 2.4e-6


def test_order_counts_and_is_kept(runner, files):
    loras = [Lora(files[0], 0.3), Lora(files[1], 0.9), Lora(files[2], -0.7)]
    first = velocity(runner, loras)
    velocity(runner, loras[::-1])
    assert torch.equal(velocity(runner, loras), first)
    assert torch.equal(velocity(runner_of(EVERY, WEIGHTS), loras), first)


def test_one_file_twice_counts_twice(runner, files):
    twice = velocity(runner, [Lora(files[0], 0.25), Lora(files[0], 0.25)])
    once = velocity(runner, [Lora(files[0], 0.5)])
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)  # measured 1.9e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_who_runs_which_blocks(files, dtype):
    loras = [Lora(files[0], 0.6), Lora(files[1], -0.3)]
    whole = velocity(runner_of(EVERY, WEIGHTS, dtype), loras)
    first, second = (runner_of(EVERY, WEIGHTS, dtype) for _ in range(2))
    velocity(second)  # has been used without, and with others
    velocity(second, [Lora(files[3])])
    forward = forward_of(EVERY)
    (hidden,) = first.run(BlockRange(0, 1, 2), [forward], loras=loras)
    assert isinstance(hidden, Hidden)
    (cut,) = second.run(BlockRange(1, 2, 2), [replace(forward, hidden=hidden)], loras=loras)
    assert torch.equal(cut, whole)


def test_two_forwards_of_a_call_have_the_same_loras(runner, files):
    forwards = [forward_of(EVERY), replace(forward_of(EVERY), text_key="u")]
    both = runner.run(WHOLE, forwards, loras=[Lora(files[0])])
    assert torch.equal(*both)
    assert torch.equal(both[0], velocity(runner, [Lora(files[0])]))


def test_bytes_are_counted_and_loras_kept_are_bounded(runner, files, reads):
    velocity(runner)
    base, sizes = runner.weight_bytes, []
    for file in files:
        velocity(runner, [Lora(file)])
        sizes.append(runner.weight_bytes - base)
    one = sum(t.numel() * 4 for t in write("comfyui", entries_of(EVERY)).values() if t.ndim)
    assert sizes == [min(count, MAX_LORAS) * one for count in range(1, len(files) + 1)]
    del reads[:]
    velocity(runner, [Lora(files[-1])])
    assert reads == []  # kept
    velocity(runner, [Lora(files[0])])
    assert reads  # the longest unused had gone
    velocity(runner, [Lora(file, 0.1) for file in files])
    assert runner.weight_bytes - base == len(files) * one  # a call's own are all there
    velocity(runner)
    assert runner.weight_bytes - base == MAX_LORAS * one
    runner.free()
    assert runner.weight_bytes == 0


def test_prompts_kept_are_bounded_however_many_strengths(runner, files):
    for number in range(MAX_CONTEXTS + 3):
        velocity(runner, [Lora(files[0], 0.1 + number)])
    assert len(runner._contexts) == MAX_CONTEXTS


def test_a_range_reads_the_factors_of_its_blocks_only(runner, files, reads):
    (hidden,) = runner.run(BlockRange(0, 1, 2), [forward_of(EVERY)], loras=[Lora(files[0])])
    assert hidden.x.shape[0]
    assert any(".blocks.0." in name for name in reads)
    assert not any(".blocks.1." in name or ".head." in name for name in reads)


def test_a_lora_for_another_model_stops_the_call_and_not_the_next(tmp_path, runner, files):
    wide = replace(EVERY, head_dim=24)
    save_file(write("musubi", entries_of(wide, differences=False)), tmp_path / "x.safetensors")
    wrong, plain = open_lora(tmp_path / "x.safetensors"), velocity(runner)
    with pytest.raises(WeightError, match=r"a model of width 48, expected .* width 32"):
        velocity(runner, [Lora(files[0]), Lora(wrong)])
    assert torch.equal(velocity(runner), plain)
    assert torch.equal(velocity(runner, [Lora(wrong, 0.0)]), plain)  # off: not even matched


def test_values_that_are_not_finite_stop_the_call(tmp_path, runner):
    tensors = write("comfyui", entries_of(EVERY))
    tensors["diffusion_model.blocks.1.ffn.0.lora_down.weight"][1, 2] = float("nan")
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_lora(tmp_path / "x.safetensors")
    for _ in range(2):
        with pytest.raises(WeightError, match=r"blocks\.1\.ffn\.0\.lora_down\.weight with NaN"):
            velocity(runner, [Lora(file)])
