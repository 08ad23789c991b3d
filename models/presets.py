"""Geometries by name, usable without any weights: `wan2.1-t2v-14b`, `wan2.2-i2v-a14b@q4_k_m`.

Free of torch. Source: the configurations of Wan2.1, Wan2.2, SkyReels-V2 and VideoX-Fun; parameter
counts agree with diffusers' classes on the meta device (tests/oracle/test_presets.py).
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from reelpool.errors import ConfigError

from .defaults import defaults_for
from .quant_mix import QUANTS
from .spec import ImageEncoderSpec, ModelSpec, TextSpec, TransformerSpec, VaeSpec

IMAGE_POSITIONS = 514  # two images of 257 tokens

# Latent statistics: Wan2.1 wan/modules/vae.py, Wan2.2 wan/modules/vae2_2.py
WAN21_VAE = VaeSpec(
    latents_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latents_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip
WAN22_VAE = VaeSpec(
    base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
    out_channels=12, patch_size=2, spatial_factor=16,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip

_SMALL = TransformerSpec(12, 128, 8960, 30, 16, 16)  # 1.3B
_LARGE = TransformerSpec(40, 128, 13824, 40, 16, 16)  # 14B, and each expert of A14B
_FIVE = TransformerSpec(24, 128, 14336, 30, 48, 48)  # TI2V-5B
_CONCAT = 36  # channels of noise 16, mask 4, image 16


def _text(name: str, transformer: TransformerSpec, variant: str = "t2v") -> ModelSpec:
    defaults = defaults_for(variant, transformer, 1, name)
    return ModelSpec(name, transformer, WAN21_VAE, TextSpec(), defaults, variant)


def _image(name: str, base: TransformerSpec, variant: str = "i2v") -> ModelSpec:
    """Image to video as Wan 2.1 has it: beside the noise, and by CLIP features."""
    encoder = ImageEncoderSpec()
    positions = IMAGE_POSITIONS if variant == "flf2v" else 0
    transformer = replace(
        base, in_channels=_CONCAT, image_dim=encoder.dim, image_positions=positions
    )
    made = _text(name, transformer, variant)
    return replace(made, image="concat", image_encoder=encoder)


def usual_boundary(transformer: TransformerSpec) -> float:
    """Share of the timesteps from which on Wan 2.2's high-noise expert serves."""
    return 0.875 if transformer.in_channels == transformer.out_channels else 0.9


def _experts(name: str, transformer: TransformerSpec, variant: str) -> ModelSpec:
    made = _text(name, transformer, variant)
    defaults = defaults_for(variant, transformer, 2, name)
    return replace(made, defaults=defaults, num_experts=2, boundary=usual_boundary(transformer))


def _presets() -> dict[str, ModelSpec]:
    concat = replace(_LARGE, in_channels=_CONCAT)
    with_fps = replace(_SMALL, fps_embedding=True)  # the small SkyReels DF has inject_sample_info
    specs = [
        _text("wan2.1-t2v-1.3b", _SMALL),
        _text("wan2.1-t2v-14b", _LARGE),
        _image("wan2.1-i2v-14b", _LARGE),
        _image("wan2.1-i2v-14b-480p", _LARGE),
        _image("wan2.1-i2v-14b-720p", _LARGE),
        _image("wan2.1-flf2v-14b-720p", _LARGE, "flf2v"),
        _image("wan2.1-fun-inp-1.3b", _SMALL),
        _image("wan2.1-fun-inp-14b", _LARGE),
        _experts("wan2.2-t2v-a14b", _LARGE, "t2v"),
        replace(_experts("wan2.2-i2v-a14b", concat, "i2v"), image="concat"),
        replace(_text("wan2.2-ti2v-5b", _FIVE, "ti2v"), vae=WAN22_VAE, image="first-frame"),
        _text("skyreels-v2-df-1.3b-540p", with_fps, "df"),
        _text("skyreels-v2-df-14b-540p", _LARGE, "df"),
        _text("skyreels-v2-df-14b-720p", _LARGE, "df"),
        _text("skyreels-v2-t2v-14b-540p", _LARGE),
        _text("skyreels-v2-t2v-14b-720p", _LARGE),
        _image("skyreels-v2-i2v-1.3b-540p", _SMALL),
        _image("skyreels-v2-i2v-14b-540p", _LARGE),
        _image("skyreels-v2-i2v-14b-720p", _LARGE),
    ]
    return {spec.name: spec for spec in specs}


PRESETS: dict[str, ModelSpec] = _presets()


def find_preset(name: str, where: str = "--model") -> ModelSpec | None:
    """The geometry of a preset's name, with or without `@quant`; None if it is no preset.

    Args:
        name: such as `wan2.2-i2v-a14b@q4_k_m`. In capitals a name is that of a folder: Wan's own
            repositories are called `Wan2.1-T2V-14B` and so on.
        where: what stands before the message of an error.

    Raises:
        ConfigError: if the name is a preset's but what follows the @ is no quantisation.

    Examples:
        >>> find_preset("wan2.1-t2v-14b@q8_0").quant
        'q8_0'
    """
    base, at, suffix = name.partition("@")
    spec, quant = PRESETS.get(base), suffix.lower()
    if spec is None or not at:
        return spec
    if quant not in QUANTS:
        near = get_close_matches(quant, QUANTS, 1, 0.3)
        hint = f"did you mean {base}@{near[0]}?" if near else f"use one of {', '.join(QUANTS)}"
        raise ConfigError(where, f"{name} names no quantisation that is known", hint)
    return replace(spec, name=f"{base}@{quant}", quant=quant)
