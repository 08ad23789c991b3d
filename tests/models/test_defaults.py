"""Recommended settings, against shared/facts/wan.md 6.1."""

from __future__ import annotations

import pytest

from reelpool.models.defaults import NEGATIVE, defaults_for
from reelpool.models.presets import PRESETS
from reelpool.models.spec import TransformerSpec

# steps, shift, guidance, of the low-noise expert, frames, fps, width, height
OFFICIAL = {
    "wan2.1-t2v-14b": (50, 5.0, 5.0, None, 81, 16, 832, 480),
    "wan2.1-t2v-1.3b": (50, 5.0, 5.0, None, 81, 16, 832, 480),
    "wan2.1-i2v-14b-480p": (40, 3.0, 5.0, None, 81, 16, 832, 480),
    "wan2.1-i2v-14b-720p": (40, 5.0, 5.0, None, 81, 16, 1280, 720),
    "wan2.1-flf2v-14b-720p": (50, 16.0, 5.0, None, 81, 16, 1280, 720),
    "wan2.2-t2v-a14b": (40, 12.0, 4.0, 3.0, 81, 16, 832, 480),
    "wan2.2-i2v-a14b": (40, 5.0, 3.5, 3.5, 81, 16, 832, 480),
    "wan2.2-ti2v-5b": (50, 5.0, 5.0, None, 121, 24, 1280, 704),
    "skyreels-v2-df-14b-540p": (50, 8.0, 6.0, None, 97, 24, 960, 544),
    "skyreels-v2-df-14b-720p": (50, 8.0, 6.0, None, 121, 24, 1280, 720),
    "skyreels-v2-t2v-14b-540p": (50, 8.0, 6.0, None, 97, 24, 960, 544),
    "skyreels-v2-i2v-14b-540p": (50, 5.0, 5.0, None, 97, 24, 960, 544),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_official_ones(name):
    d = PRESETS[name].defaults
    found = (d.steps, d.shift, d.guidance, d.guidance_low, d.frames, d.fps, d.width, d.height)
    assert found == OFFICIAL[name]
    assert d.solver == "unipc"


def test_sizes_and_frames_suit_the_model():
    for spec in PRESETS.values():
        d = spec.defaults
        assert d.width % spec.size_multiple == d.height % spec.size_multiple == 0, spec.name
        assert (d.frames - 1) % spec.vae.temporal_factor == 0


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("wan2.1-t2v-14b", "色调"),
        ("wan2.1-i2v-14b-480p", "镜头晃动"),
        ("wan2.1-flf2v-14b-720p", "镜头切换"),
        ("wan2.2-i2v-a14b", "色调"),
    ],
)
def test_negative_prompt_is_the_official_one(name, first):
    negative = PRESETS[name].defaults.negative
    assert negative.startswith(first)
    assert negative.endswith(NEGATIVE)


def test_a_text_encoder_that_reads_no_chinese_gets_no_negative_prompt():
    assert defaults_for("t2v", TransformerSpec(2, 12, 32, 2, 4, 4, text_dim=32), 1).negative == ""


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("wan2.1_t2v_14b_lightx2v_cfg_step_distill_fp8.safetensors", 4),
        ("Wan2.2-I2V-A14B-4steps-HighNoise.gguf", 4),
        ("wan2.1-t2v-14b-Q4_K_M.gguf", 50),
        ("step4_of_my_training.safetensors", 50),
    ],
)
def test_a_distilled_model_takes_four_steps_and_no_guidance(name, steps):
    spec = PRESETS["wan2.1-t2v-14b"].transformer
    made = defaults_for("t2v", spec, 1, name)
    assert (made.steps, made.guidance) == (steps, 1.0 if steps == 4 else 5.0)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("backup_20250720/wan2.1_i2v_480p_14B.safetensors", 832),
        ("backup_20250720/wan2.1_i2v_14B.safetensors", 832),
        ("b720e/wan2.1_i2v_14B.safetensors", 832),
        ("720p/wan2.1_i2v_480p_14B.safetensors", 832),
        ("480p/wan2.1_i2v_720p_14B.safetensors", 1280),
        ("Wan2.1-I2V-14B-720P/diffusion_pytorch_model.safetensors", 1280),
        ("wan2.1_i2v_14B_1280x720.gguf", 1280),
        ("Wan2.1-I2V720p.gguf", 1280),
        ("wan2.1_i2v_480p_and_720p.gguf", 832),
    ],
)
def test_the_size_is_told_by_a_word_of_the_nearest_name(name, width):
    spec = PRESETS["wan2.1-i2v-14b-480p"].transformer
    made = defaults_for("i2v", spec, 1, name)
    assert (made.width, made.shift) == (width, 5.0 if width == 1280 else 3.0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("models/lightx2v/wan2.1_t2v_14B.safetensors", 50),
        ("models--lightx2v--Wan2.1-T2V-14B/model.safetensors", 50),
        ("models--lightx2v--Wan2.1-T2V-14B", 50),
        ("models--lightx2v--Wan2.1-T2V-14B-StepDistill/model.safetensors", 4),
        ("Wan2.1-T2V-14B-StepDistill-CfgDistill/distill_model.safetensors", 4),
        ("lightx2v/wan2.1_t2v_4step.safetensors", 4),
    ],
)
def test_only_the_file_or_its_repository_says_that_it_is_distilled(name, steps):
    spec = PRESETS["wan2.1-t2v-14b"].transformer
    assert defaults_for("t2v", spec, 1, name).steps == steps


def test_both_experts_of_a_distilled_model_go_without_guidance():
    made = defaults_for("t2v", PRESETS["wan2.2-t2v-a14b"].transformer, 2, "a14b_lightx2v_high")
    assert (made.guidance, made.guidance_low, made.shift) == (1.0, 1.0, 5.0)
