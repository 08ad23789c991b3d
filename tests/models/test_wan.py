"""The promises of the transformer: chunks, rows, threads; its numbers are for tests/oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelpool.models import wan, wan_context
from reelpool.models.files import open_model
from reelpool.models.spec import LatentShape
from reelpool.models.wan_weights import load_block, load_enter, load_text, map_tensors, tensors_of
from tests.tiny_models import FLOAT32, latents_of, open_runner, prompt_rows, velocity


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return open_model(str(tiny_model))


@given(frames=st.integers(1, 30), per_frame=st.integers(1, 60), size=st.integers(1, 400))
def test_chunks_cover_every_token_once_and_never_straddle(frames, per_frame, size):
    tokens = frames * per_frame
    chunks = list(wan.token_chunks(tokens, frames, size))
    covered = [token for chunk in chunks for token in range(chunk.start, chunk.stop)]
    assert covered == list(range(tokens))
    for chunk in chunks:
        length = chunk.stop - chunk.start
        assert 0 < length <= max(size, 1)
        assert chunk.first_frame == chunk.start // per_frame
        last_frame = (chunk.stop - 1) // per_frame
        assert chunk.num_frames == last_frame - chunk.first_frame + 1
        if chunk.num_frames > 1 or length == per_frame:  # whole frames
            assert chunk.start % per_frame == chunk.stop % per_frame == 0
        assert length % chunk.num_frames == 0  # every frame has the same share


@given(frames=st.integers(1, 40), size=st.integers(1, 50))
def test_as_few_chunks_as_the_size_allows(frames, size):
    chunks = list(wan.token_chunks(frames * 10, frames, size))
    parts = frames * -(-10 // size) if size < 10 else -(-frames // (size // 10))
    assert len(chunks) == parts


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_time_rows_have_the_same_bits_however_many_frames(tiny, name):
    files = open_model("demo") if name == "demo" else tiny
    spec = files.spec.transformer
    weights = load_enter(spec, files.transformer, torch.float32)

    def enter(frames, timesteps):
        latents = latents_of(LatentShape(spec.in_channels, frames, 8, 8))
        return wan.enter(spec, weights, latents, timesteps, FLOAT32)

    steps = torch.linspace(0, 999, 40)
    whole = enter(40, steps)
    for count in (1, 2, 11, 31, 32, 33):
        for threads_used in (1, 2):
            with threads(threads_used):
                part = enter(count, steps[:count])
            assert part.e.shape == (count, spec.dim)
            assert torch.equal(part.e, whole.e[:count])
            assert torch.equal(part.e0, whole.e0[:count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_of_threads_changes_no_bit_of_the_demo(dtype):
    files = open_model("demo")
    runner = open_runner(files, replace(FLOAT32, dtype=dtype))
    latents = latents_of(LatentShape(16, 5, 8, 8))
    steps, rows = torch.tensor([999.0, 800.0, 3.0, 0.0, 500.0]), prompt_rows(12, 128)
    results = []
    for count in (1, 2):
        runner.drop_caches()
        with threads(count):
            results.append(velocity(runner, latents, steps, rows))
    assert torch.equal(*results)


def test_a_block_adds_into_the_stream_in_place(tiny):
    spec = tiny.spec.transformer
    block = load_block(spec, tiny.transformer, 0, torch.float32)
    runner = open_runner(tiny)
    latents, steps = latents_of(LatentShape(4, 2, 4, 4)), torch.tensor([5.0, 900.0])
    enter = load_enter(spec, tiny.transformer, torch.float32)
    hidden = wan.enter(spec, enter, latents, steps, FLOAT32)
    before, where = hidden.x.clone(), hidden.x.data_ptr()
    context = wan_context.embed_text(load_text(tiny.transformer, torch.float32), prompt_rows(3))
    text = wan_context.text_key_value(spec, block, context)
    rope = runner._rope(LatentShape(4, 2, 4, 4))
    wan.run_block(spec, block, hidden, rope, text, FLOAT32)
    assert hidden.x.data_ptr() == where
    assert (hidden.x - before).abs().max() > 0.1


def test_weights_are_walked_and_mapped_whole(tiny):
    spec = tiny.spec.transformer
    block = load_block(spec, tiny.transformer, 1, torch.float32)
    assert sum(tensor.numel() for tensor in tensors_of(block)) == spec.block_params
    half = map_tensors(block, lambda tensor: tensor.bfloat16())
    assert {tensor.dtype for tensor in tensors_of(half)} == {torch.bfloat16}
    assert type(half) is type(block)
    assert torch.equal(half.qkv.weight, block.qkv.weight.bfloat16())
    assert list(tensors_of((None, 3, "x"))) == []
