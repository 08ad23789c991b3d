"""What a block runner keeps, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelpool.errors import Cancelled
from reelpool.models.files import open_model
from reelpool.models.spec import LatentShape
from reelpool.models.wan import Hidden
from reelpool.runtime.block_runner import MAX_CONTEXTS, TEXT_KV_MIN_SHARE
from reelpool.runtime.types import BlockRange
from tests.tiny_models import (
    FLOAT32,
    forward_input,
    latents_of,
    open_runner,
    prompt_rows,
    velocity,
)
from tests.tiny_variants import make_transformer, open_module, open_variant, variant_input

STEPS = torch.tensor([400.0, 10.0])
WHOLE = BlockRange(0, 2, 2)
SMALL = LatentShape(4, 2, 4, 4)
LARGE = LatentShape(4, 2, 64, 64)


@pytest.fixture(scope="module")
def files(tiny_model):
    return open_model(str(tiny_model))


@pytest.fixture
def runner(files):
    return open_runner(files)


def forward(shape=SMALL, num_words=3, seed=1):
    return forward_input(latents_of(shape), STEPS, prompt_rows(num_words, seed=seed))


def test_text_keys_are_kept_only_above_the_share(files, runner):
    spec = files.spec.transformer
    shares = [spec.text_kv_share(spec.num_tokens(shape), 32) for shape in (SMALL, LARGE)]
    assert shares[0] > TEXT_KV_MIN_SHARE > shares[1]
    runner.run(WHOLE, [forward(LARGE)])
    assert runner._key_values == {}
    runner.run(WHOLE, [forward(SMALL)])
    assert {index for _, index in runner._key_values} == {0, 1}


def test_kept_keys_change_no_bit(files, runner):
    first, second = (runner.run(WHOLE, [forward()])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert runner._key_values
    runner.drop_caches()
    assert torch.equal(runner.run(WHOLE, [forward()])[0], first)


def test_prompts_kept_are_bounded_and_the_longest_unused_goes(runner):
    for seed in range(MAX_CONTEXTS):
        runner.run(WHOLE, [forward(seed=seed)])
    kept = runner.cache_bytes
    hot, cold = forward(seed=0), forward(seed=1)
    runner.run(WHOLE, [hot])  # in use again, so the second is now the oldest
    assert runner.cache_bytes == kept
    for seed in range(MAX_CONTEXTS, MAX_CONTEXTS + 1):
        runner.run(WHOLE, [forward(seed=seed)])
    assert len(runner._contexts) == MAX_CONTEXTS
    assert runner.cache_bytes == kept
    assert ("text", hot.text_key) in runner._contexts
    assert ("text", cold.text_key) not in runner._contexts
    assert {key for key, _ in runner._key_values} == set(runner._contexts)


def test_more_forwards_than_prompts_kept_still_answer(files, runner):
    forwards = [forward(seed=seed) for seed in range(MAX_CONTEXTS + 2)]
    together = runner.run(WHOLE, forwards)
    assert len(runner._contexts) == MAX_CONTEXTS
    alone = [open_runner(files).run(WHOLE, [item])[0] for item in forwards]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_one_rope_table_is_kept(runner):
    runner.run(WHOLE, [forward(LARGE)])
    runner.run(WHOLE, [forward(SMALL)])
    (table,) = runner._ropes.values()
    assert table.shape[0] == 8


def test_a_range_loads_its_blocks_and_no_others(files, runner):
    spec = files.spec.transformer
    assert runner.weight_bytes == 0
    assert runner.load(BlockRange(1, 2, 2)) >= 0
    assert set(runner._blocks) == {1}
    assert runner._enter is None
    last = runner.weight_bytes
    runner.load(BlockRange(1, 2, 2))
    assert runner.weight_bytes == last
    runner.load(WHOLE)
    assert runner.weight_bytes == 4 * spec.num_params


def test_half_precision_takes_half_of_the_matrices(files):
    half = open_runner(files, replace(FLOAT32, dtype="bfloat16"))
    half.load(WHOLE)
    params = files.spec.transformer.num_params
    assert 2 * params < half.weight_bytes < 4 * params


def test_free_drops_everything_and_the_next_call_loads_again(runner):
    before = runner.run(WHOLE, [forward()])[0]
    assert runner.cache_bytes > 0
    runner.free()
    assert (runner.weight_bytes, runner.cache_bytes) == (0, 0)
    assert torch.equal(runner.run(WHOLE, [forward()])[0], before)


def test_before_block_is_told_every_block_and_may_stop(runner):
    seen = []

    def stop_at_one(index):
        seen.append(index)
        if index == 1:
            raise Cancelled()

    with pytest.raises(Cancelled):
        runner.run(WHOLE, [forward(), forward(seed=2)], stop_at_one)
    assert seen == [0, 1]  # once for all forwards
    runner.run(WHOLE, [forward()], seen.append)
    assert seen == [0, 1, 0, 1]


def test_a_range_in_the_middle_gives_hidden_states(runner):
    (hidden,) = runner.run(BlockRange(0, 1, 2), [forward()])
    assert isinstance(hidden, Hidden)
    assert (hidden.x.shape, hidden.e.shape, hidden.e0.shape) == ((8, 24), (2, 24), (2, 6, 24))
    (result,) = runner.run(BlockRange(1, 2, 2), [replace(forward(), hidden=hidden)])
    item = forward()
    assert torch.equal(result, velocity(runner, item.latents, STEPS, item.prompt_embeds))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return open_module("i2v-2.1", make_transformer("i2v-2.1"), folder)


def test_branches_share_one_image_and_keep_its_keys(image_model):
    runner, whole = open_variant("i2v-2.1", image_model), BlockRange(0, 3, 3)
    cond = variant_input("i2v-2.1", STEPS, size=(4, 4))
    uncond = replace(cond, text_key="other", prompt_embeds=prompt_rows(0))
    first = runner.run(whole, [cond, uncond])
    assert sorted(kind for kind, _ in runner._contexts) == ["image", "text", "text"]
    assert {(key[0], index) for key, index in runner._key_values} == {
        (kind, index) for kind in ("text", "image") for index in range(3)
    }
    assert len(runner._key_values) == 9
    # another call brings the same digest: what is kept is used, the features are not looked at
    again = [replace(item, image_embeds=torch.zeros(0, 0)) for item in (cond, uncond)]
    assert all(torch.equal(*pair) for pair in zip(first, runner.run(whole, again), strict=True))
    runner.drop_caches()
    assert runner.cache_bytes == 0
    alone = [runner.run(whole, [item])[0] for item in (cond, uncond)]
    assert all(torch.equal(*pair) for pair in zip(first, alone, strict=True))


def test_image_keys_are_kept_only_above_the_share(image_model):
    runner = open_variant("i2v-2.1", image_model)
    runner.run(BlockRange(0, 3, 3), [variant_input("i2v-2.1", STEPS, size=(16, 16))])
    assert len(runner._contexts) == 2
    assert {key[0] for key, _ in runner._key_values} == {"image"}  # 257 rows weigh more than 32


def test_an_image_and_a_prompt_of_equal_digest_are_two(image_model):
    runner = open_variant("i2v-2.1", image_model)
    forward = variant_input("i2v-2.1", STEPS, size=(4, 4))
    same = replace(forward, image_key=forward.text_key)
    whole = BlockRange(0, 3, 3)
    assert torch.equal(runner.run(whole, [same])[0], runner.run(whole, [forward])[0])


def test_every_parameter_of_a_model_with_images_is_loaded_once(image_model):
    runner = open_variant("i2v-2.1", image_model)
    runner.load(BlockRange(0, 3, 3))
    assert runner.weight_bytes == 4 * runner.spec.num_params
    runner.free()
    assert runner.weight_bytes == 0


def test_channels_that_are_missing_are_noticed(image_model):
    runner = open_variant("i2v-2.1", image_model)
    forward = replace(variant_input("i2v-2.1", STEPS, size=(4, 4)), condition=None)
    with pytest.raises(AssertionError, match="36"):
        runner.run(BlockRange(0, 3, 3), [forward])
