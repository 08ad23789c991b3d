"""Our transformer against diffusers' in every variant, and against itself cut in pieces.

Beside each tolerance stands the largest difference measured (CPU, torch 2.13); velocities are of
the order of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Timesteps

from reelpool.models.weights import WeightSource
from reelpool.runtime.types import BlockRange
from tests.tiny_models import FLOAT32, prompt_rows
from tests.tiny_variants import (
    IMAGE_ROWS,
    VARIANTS,
    make_transformer,
    open_module,
    open_variant,
    variant_input,
)

UNEVEN = torch.tensor([999.0, 750.5, 0.0, 0.4, 31.0])
EVEN = torch.full((5,), 875.25)
WITH_IMAGE = [name for name, spec in VARIANTS.items() if spec.image_dim]
WITH_FPS = [name for name, spec in VARIANTS.items() if spec.fps_embedding]


@dataclass
class Variant:
    """A variant in float32 weights, opened by us and by diffusers."""

    name: str
    source: WeightSource
    oracle: Any

    def ours(self, forward, dtype="float32"):
        runner = open_variant(self.name, self.source, replace(FLOAT32, dtype=dtype))
        total = runner.spec.num_layers
        return runner.run(BlockRange(0, total, total), [forward])[0]

    def theirs(self, forward, dtype="float32", float64_waves=False):
        """One timestep if all are equal, else that of each frame as the class wants it."""
        oracle = self.oracle if dtype == "float32" else in_dtype(self.name, getattr(torch, dtype))
        if self.name.startswith("df"):
            oracle.condition_embedder.timesteps_proj = make_waves(256, float64_waves)
        kind = oracle.proj_out.weight.dtype
        latents, steps = forward.latents, forward.timesteps
        if forward.condition is not None:
            latents = torch.cat([latents, forward.condition], 1)
        extra = {}
        if self.name.startswith("df"):
            extra["enable_diffusion_forcing"] = len(steps.unique()) > 1
            if VARIANTS[self.name].fps_embedding:
                extra["fps"] = [0 if forward.fps == 16 else 1]
            steps = steps[None] if extra["enable_diffusion_forcing"] else steps[:1]
        elif len(steps.unique()) > 1:
            steps = steps.repeat_interleave(latents.shape[3] // 2 * latents.shape[4] // 2)[None]
        else:
            steps = steps[:1]
        if forward.image_embeds is not None:
            images = forward.image_embeds.unflatten(0, (-1, IMAGE_ROWS))
            extra["encoder_hidden_states_image"] = images.to(kind)
        text = forward.prompt_embeds[None].to(kind)
        with torch.inference_mode():
            return oracle(latents.to(kind), steps, text, return_dict=False, **extra)[0]


class Float32Waves(Timesteps):
    """diffusers' waves of a timestep as its Wan class makes them, for steps of any shape."""

    def forward(self, timesteps):
        return super().forward(timesteps.flatten()).unflatten(0, timesteps.shape)


def make_waves(size, float64):
    if float64:
        return SkyReelsV2Timesteps(size, flip_sin_to_cos=True)
    return Float32Waves(size, flip_sin_to_cos=True, downscale_freq_shift=0)


@cache
def in_dtype(name, dtype):
    """The oracle with the types its own loading gives it (`_keep_in_fp32_modules`)."""
    oracle = make_transformer(name)
    for path, parameter in oracle.named_parameters():
        if not any(part in path.split(".") for part in oracle._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return oracle


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that opens a variant by name, once."""
    folder = tmp_path_factory.mktemp("variants")

    @cache
    def open_both(name):
        oracle = make_transformer(name)
        return Variant(name, open_module(name, oracle, folder), oracle)

    return open_both


def assert_near(ours, expected):
    assert expected.std() > 0.3  # a network that does something
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # measured 2.5e-6


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["scalar", "per-frame"])
def test_velocity_equals_diffusers(opened, name, steps):
    variant = opened(name)
    forward = variant_input(name, steps)
    assert_near(variant.ours(forward), variant.theirs(forward))


def test_float64_waves_of_skyreels_change_little(opened):
    """diffusers computes the waves of a timestep in float64 for SkyReels-V2, float32 for Wan.

    A file does not tell which of the two it is (shared/facts/wan.md 2.3), and every form of a model
    shall give the same bits, so ours are float32 always, and the other tests give diffusers such.
    """
    variant = opened("df")
    forward = variant_input("df", UNEVEN)
    expected = variant.theirs(forward, float64_waves=True)
    ours = variant.ours(forward)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # measured 2.9e-5


@pytest.mark.parametrize("name", WITH_FPS)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["scalar", "per-frame"])
def test_frame_rate_equals_diffusers(opened, name, steps):
    variant = opened(name)
    slow, fast, unsaid = (replace(variant_input(name, steps), fps=fps) for fps in (16, 30, None))
    assert_near(variant.ours(slow), variant.theirs(slow))
    assert_near(variant.ours(fast), variant.theirs(fast))
    assert torch.equal(variant.ours(fast), variant.ours(unsaid))
    assert (variant.ours(fast) - variant.ours(slow)).std() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_words", [0, 511, 512])
def test_any_amount_of_padding_equals_diffusers(opened, name, num_words):
    variant = opened(name)
    forward = variant_input(name, UNEVEN, num_words)
    assert_near(variant.ours(forward), variant.theirs(forward))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_latent_frame_equals_diffusers(opened, name):
    variant = opened(name)
    forward = variant_input(name, torch.tensor([500.0]), size=(2, 2))
    assert_near(variant.ours(forward), variant.theirs(forward))


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_as_near_to_float32_as_diffusers(opened, name):
    variant = opened(name)
    forward = variant_input(name, UNEVEN)
    truth = variant.theirs(forward)
    ours = variant.ours(forward, "bfloat16")
    assert ours.dtype == torch.bfloat16
    both = (ours, variant.theirs(forward, "bfloat16"))
    ours_rms, theirs_rms = ((x.float() - truth).square().mean().sqrt() for x in both)
    assert ours_rms < 0.02 * truth.std()  # measured 0.0059
    assert ours_rms < 1.15 * theirs_rms  # measured 1.01


@pytest.mark.parametrize("name", WITH_IMAGE)
def test_image_counts_and_its_rows_have_places_only_in_flf2v(opened, name):
    variant = opened(name)
    forward = variant_input(name, UNEVEN)
    embeds = forward.image_embeds
    plain = variant.ours(forward)
    other = variant.ours(replace(forward, image_embeds=-embeds))
    assert (plain - other).std() > 0.01
    turned = variant.ours(replace(forward, image_embeds=embeds.flip(0)))
    if VARIANTS[name].image_positions:
        assert (plain - turned).std() > 0.001
    else:
        torch.testing.assert_close(plain, turned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WITH_IMAGE)
def test_faint_features_equal_diffusers(opened, name):
    variant = opened(name)
    forward = variant_input(name, UNEVEN)
    faint = replace(forward, image_embeds=0.003 * forward.image_embeds)  # as small as the eps
    assert_near(variant.ours(faint), variant.theirs(faint))


def test_one_image_takes_the_first_half_of_the_positions(opened):
    """Of a model of first and last frame; diffusers refuses it."""
    variant = opened("flf2v")
    forward = variant_input("flf2v", UNEVEN)
    first = replace(forward, image_embeds=forward.image_embeds[:IMAGE_ROWS])
    assert variant.ours(first).isfinite().all()
    assert (variant.ours(first) - variant.ours(forward)).std() > 0.001


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_block_ranges_give_the_bits_of_the_whole(opened, name, dtype):
    variant = opened(name)
    numerics = replace(FLOAT32, dtype=dtype)
    cond = variant_input(name, UNEVEN)
    forwards = [cond, replace(cond, text_key="other", prompt_embeds=prompt_rows(40, seed=9))]
    total = VARIANTS[name].num_layers
    whole = open_variant(name, variant.source, numerics).run(BlockRange(0, total, total), forwards)
    assert not torch.equal(*whole)
    runners = [open_variant(name, variant.source, numerics) for _ in range(2)]
    for cuts in ([1], list(range(1, total))):
        given = forwards
        for hop, (first, stop) in enumerate(zip([0, *cuts], [*cuts, total], strict=True)):
            results = runners[hop % 2].run(BlockRange(first, stop, total), given)
            if stop < total:  # what the first range alone takes does not travel
                given = [
                    replace(forward, hidden=hidden, latents=None, timesteps=None, condition=None)
                    for forward, hidden in zip(forwards, results, strict=True)
                ]
        assert all(torch.equal(*pair) for pair in zip(results, whole, strict=True)), cuts


@pytest.mark.parametrize("name", VARIANTS)
def test_original_names_give_the_same_bits(opened, tmp_path, name):
    variant = opened(name)
    original = open_module(name, variant.oracle, tmp_path, canonical=True)
    assert sum(math.prod(original.info(key).shape) for key in original.names()) == (
        VARIANTS[name].num_params
    )
    forward = variant_input(name, UNEVEN)
    assert torch.equal(Variant(name, original, None).ours(forward), variant.ours(forward))
