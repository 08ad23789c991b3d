"""From a model folder's vae/config.json to a `VaeSpec`, and what a spec must satisfy.

Reads the keys of diffusers' AutoencoderKLWan (its spelling: `temperal_downsample`). Defaults are
those of the Wan 2.1 VAE, whose published config names only some of the keys. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from reelpool.errors import ConfigError, WeightError

from .presets import WAN21_VAE as WAN21
from .spec import VaeSpec

FILE = "vae/config.json"


def vae_spec_from_config(config: Mapping[str, object]) -> VaeSpec:
    """Read the content of a diffusers vae/config.json.

    Raises:
        WeightError: if a value has another type or range, or the values do not fit together.
    """
    kind = config.get("_class_name", "AutoencoderKLWan")
    if kind != "AutoencoderKLWan":
        raise WeightError(FILE, f"a VAE of class {kind}", "AutoencoderKLWan")
    if config.get("attn_scales"):
        found = f"attn_scales {config['attn_scales']}"
        raise WeightError(FILE, found, "[]: no Wan VAE has attention outside of its middle block")
    base = _count(config, "base_dim", WAN21.base_dim)
    dim_mult = tuple(map(int, _numbers(config, "dim_mult", WAN21.dim_mult, int)))
    down = tuple(map(bool, _numbers(config, "temperal_downsample", WAN21.temporal_down, bool)))
    patch = _count(config, "patch_size", 1)
    spec = VaeSpec(
        base_dim=base,
        decoder_base_dim=_count(config, "decoder_base_dim", base),
        z_dim=_count(config, "z_dim", WAN21.z_dim),
        dim_mult=dim_mult,
        num_res_blocks=_count(config, "num_res_blocks", WAN21.num_res_blocks),
        temporal_down=down,
        is_residual=_flag(config, "is_residual"),
        in_channels=_count(config, "in_channels", 3),
        out_channels=_count(config, "out_channels", 3),
        patch_size=patch,
        temporal_factor=_count(config, "scale_factor_temporal", 2 ** sum(down)),
        spatial_factor=_count(config, "scale_factor_spatial", patch * 2 ** (len(dim_mult) - 1)),
        latents_mean=_numbers(config, "latents_mean", WAN21.latents_mean, float),
        latents_std=_numbers(config, "latents_std", WAN21.latents_std, float),
    )
    if problem := _mismatch(spec):
        raise WeightError(FILE, f"{problem[0]} {problem[1]}", problem[2])
    return spec


def check_spec(spec: VaeSpec) -> None:
    """Check a spec that was not read from a file.

    Raises:
        ConfigError: unless its parts fit together.
    """
    if problem := _mismatch(spec):
        raise ConfigError(f"vae.{problem[0]}", f"it is {problem[1]}", f"expected {problem[2]}")


def _mismatch(spec: VaeSpec) -> tuple[str, object, str] | None:
    """Name, value and expectation of the first field that does not fit the others."""
    stages, z, pixels = len(spec.dim_mult), spec.z_dim, 3 * spec.patch_size**2
    temporal, spatial = 2 ** sum(spec.temporal_down), spec.patch_size * 2 ** (stages - 1)
    checks = [
        (stages > 0 and min(spec.dim_mult) > 0, "dim_mult", "factors above 0"),
        (len(spec.temporal_down) == stages - 1, "temporal_down", f"{stages - 1} entries"),
        (spec.temporal_factor == temporal, "temporal_factor", f"{temporal} for temporal_down"),
        (spec.spatial_factor == spatial, "spatial_factor", f"{spatial} for dim_mult, patch_size"),
        (spec.in_channels == pixels, "in_channels", f"{pixels} for its patch_size"),
        (spec.out_channels == pixels, "out_channels", f"{pixels} for its patch_size"),
        (len(spec.latents_mean) == z, "latents_mean", f"{z} values, one per channel"),
        (len(spec.latents_std) == z, "latents_std", f"{z} values, one per channel"),
        (all(map(math.isfinite, spec.latents_mean)), "latents_mean", "finite values"),
        (all(0 < value < math.inf for value in spec.latents_std), "latents_std", "values above 0"),
    ]
    for is_right, name, expected in checks:
        if not is_right:
            return name, getattr(spec, name), expected
    return None


def _count(config: Mapping[str, object], key: str, default: int) -> int:
    """A whole number above 0; absent or null gives the default."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise WeightError(FILE, f"{key} = {value!r}", "a whole number above 0")
    return value


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise WeightError(FILE, f"{key} = {value!r}", "true or false")
    return value


def _numbers(
    config: Mapping[str, object], key: str, default: tuple[float, ...], kind: type
) -> tuple[float, ...]:
    """A list of one type (whole numbers pass as float); absent or null gives the default."""
    values = config.get(key)
    if values is None:
        return default
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(values, list | tuple) or any(type(value) not in allowed for value in values):
        raise WeightError(FILE, f"{key} = {values!r}", f"a list of {kind.__name__}")
    return tuple(values)
