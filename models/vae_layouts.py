"""Wan VAEs as people have them, seen as one: diffusers' names, geometry by shapes.

Two layouts of each of the two VAEs: diffusers', and Wan's own `.pth` (ComfyUI's single files use
its names); either with a prefix in front. Nothing is read but shapes.

Source of the names: diffusers' AutoencoderKLWan; Wan2.1 wan/modules/vae.py; Wan2.2
wan/modules/vae2_2.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from reelpool.errors import ConfigError, WeightError

from .fp8 import with_scales
from .presets import WAN21_VAE, WAN22_VAE
from .spec import VaeSpec
from .vae_config import vae_spec_from_config
from .wan_vae import expected_tensors
from .weights import RenamedSource, WeightSource, check_tensors, full_shape

WANTED = "a Wan video VAE"
ADVICE = "usual files: wan_2.1_vae.safetensors, wan2.2_vae.safetensors (for TI2V-5B)"
MAX_STAGES, MAX_BLOCKS, MAX_WIDTH = 10, 100, 2**16
STATISTICS = {vae.z_dim: (vae.latents_mean, vae.latents_std) for vae in (WAN21_VAE, WAN22_VAE)}

# tensors that tell a layout: both layouts have a first convolution over time (5 axes)
DIFFUSERS_PROBE, ORIGINAL_PROBE = "decoder.conv_in.weight", "decoder.conv1.weight"

# diffusers <- original, of layers
_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_SIDE = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLING = ("resample.", "time_conv.")
# encoder.downsamples.N.<layer> or, in 2.2, encoder.downsamples.N.downsamples.M.<layer>
_STAGE = re.compile(
    r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:(?:down|up)samples\.(\d+)\.)?(.+)"
)

# what a file is that is not a Wan VAE: a part of a tensor's name, and the kind
_OTHERS = (
    (re.compile(r"(^|\.)(de|en)coder\.\d+\."), "a tiny preview VAE (TAEHV or TAESD)"),
    (re.compile(r"decoder\.conv_in\.conv\."), "the VAE of another video model"),
    (re.compile(r"(^|\.)(self_attn|attn1)\.|attn\.q\.|SelfAttention"), "a transformer"),
)


def open_vae(
    source: WeightSource, config: Mapping[str, object] | None = None
) -> tuple[VaeSpec, WeightSource]:
    """Recognise a Wan VAE and see it under diffusers' names.

    Args:
        source: the file's tensors as stored.
        config: the content of a diffusers config.json, if there is one. What it does not say is
            taken from the shapes; without one the latents' statistics are those of the Wan VAE of
            as many channels.
    Returns:
        Its geometry, and its weights under the names of `wan_vae.expected_tensors`, all checked.
    Raises:
        MissingTensor, ShapeMismatch: if a tensor is not there or does not fit.
        WeightError: if it is something else than a Wan VAE.
    """
    source = with_scales(source)
    renamed = RenamedSource(source, _names(source))
    given = {key: value for key, value in (config or {}).items() if value is not None}
    values = _geometry(renamed) | given
    try:
        spec = vae_spec_from_config(_with_statistics(source.where, values))
        _check_bounds(source.where, spec)
        expected = expected_tensors(spec)
    except ConfigError as error:
        raise WeightError(source.where, f"a VAE that cannot be ({error})", WANTED) from None
    except WeightError as error:
        if given:
            raise
        raise WeightError(source.where, error.found, error.expected, ADVICE) from None
    check_tensors(renamed, expected)
    return spec, renamed


def _with_statistics(where: str, values: dict[str, object]) -> dict[str, object]:
    """The values of a config.json, those of the published VAEs added if it has none."""
    if {"latents_mean", "latents_std"} <= values.keys():
        return values
    z_dim = values["z_dim"]
    if not isinstance(z_dim, int) or z_dim not in STATISTICS:
        found = f"{z_dim} latent channels and no config.json with their mean and deviation"
        expected = " or ".join(map(str, STATISTICS))
        raise WeightError(where, found, f"{expected} channels, as Wan VAEs have", ADVICE)
    mean, std = STATISTICS[z_dim]
    return values | {"latents_mean": mean, "latents_std": std}


def _check_bounds(where: str, spec: VaeSpec) -> None:
    """Refuse what a config.json may say but no file holds, before its tensors are listed."""
    width = max(spec.base_dim, spec.decoder_base_dim) * max(spec.dim_mult)
    sizes = (width, spec.z_dim, spec.in_channels, spec.out_channels)
    if max(sizes) > MAX_WIDTH or len(spec.dim_mult) > MAX_STAGES:
        found = f"{len(spec.dim_mult)} stages of up to {max(sizes)} channels"
        raise WeightError(where, found, f"at most {MAX_STAGES} of {MAX_WIDTH}")
    if spec.num_res_blocks > MAX_BLOCKS:
        raise WeightError(where, f"{spec.num_res_blocks} blocks", f"at most {MAX_BLOCKS}")


def _names(source: WeightSource) -> dict[str, str]:
    """Diffusers' names to those in the file.

    Raises:
        WeightError: if the names are not those of a Wan VAE.
    """
    stored = list(source.names())
    for probe in (DIFFUSERS_PROBE, ORIGINAL_PROBE):
        for name in stored:
            prefix = name.removesuffix(probe)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            if len(source.info(name).shape) == 4:  # over rows and columns, not over time
                raise WeightError(source.where, "an image VAE (Stable Diffusion)", WANTED, ADVICE)
            own = [key[len(prefix) :] for key in stored if key.startswith(prefix)]
            if probe == DIFFUSERS_PROBE:
                return {key: prefix + key for key in own}
            return {to: prefix + key for key, to in from_original(own).items()}
    for pattern, kind in _OTHERS:
        if any(map(pattern.search, stored)):
            raise WeightError(source.where, kind, WANTED, ADVICE)
    raise WeightError(source.where, "no names of a VAE", WANTED, ADVICE)


def from_original(names: Iterable[str]) -> dict[str, str]:
    """Original names to diffusers' ones; those that no Wan VAE has are left out.

    The original 2.1 decoder is a flat list; its stages end with the layers that resample.
    """
    names = list(names)
    ends = [
        int(match[2])
        for name in names
        if (match := _STAGE.fullmatch(name))
        and match[1] == "decoder"
        and match[3] is None
        and match[4].startswith(_RESAMPLING)
    ]
    stage_size = min(ends) + 1 if ends else len(names)
    found = ((name, _to_diffusers(name, stage_size)) for name in names)
    return {name: ours for name, ours in found if ours is not None}


def _to_diffusers(name: str, stage_size: int) -> str | None:
    match = _STAGE.fullmatch(name)
    if match is None:
        side, _, rest = name.partition(".")
        if side in _TOP:
            return f"{_TOP[side]}.{rest}"
        layer = next((layer for layer in _SIDE if rest.startswith(f"{layer}.")), None)
        if side not in ("encoder", "decoder") or layer is None:
            return None
        return f"{side}.{_SIDE[layer]}.{_inside(rest[len(layer) + 1 :])}"
    side, stage, number, rest = match[1], int(match[2]), match[3], match[4]
    blocks = "down_blocks" if side == "encoder" else "up_blocks"
    resamples = rest.startswith(_RESAMPLING)
    if number is not None:  # 2.2
        sampler = "downsampler" if side == "encoder" else "upsampler"
        place = f"{stage}.{sampler}" if resamples else f"{stage}.resnets.{number}"
    elif side == "encoder":
        place = str(stage)
    else:
        last = "upsamplers.0" if resamples else f"resnets.{stage % stage_size}"
        place = f"{stage // stage_size}.{last}"
    return f"{side}.{blocks}.{place}.{_inside(rest)}"


def _inside(name: str) -> str:
    """The part of a name inside of a residual block; other layers are called the same in both."""
    layer = next((layer for layer in _BLOCK if name.startswith(f"{layer}.")), None)
    return name if layer is None else _BLOCK[layer] + name[len(layer) :]


def _geometry(source: WeightSource) -> dict[str, object]:
    """Sizes by shapes, named as in a diffusers config.json."""
    names = set(source.names())
    is_residual = any(name.startswith("encoder.down_blocks.0.resnets.") for name in names)
    num_stages, num_blocks = _count(names, "decoder.up_blocks."), 0
    if num_stages:
        num_blocks = _count(names, "decoder.up_blocks.0.resnets.") - 1
    if not 0 < num_stages <= MAX_STAGES or not 0 < num_blocks <= MAX_BLOCKS:
        found = f"{num_stages} decoder stages of {num_blocks + 1} blocks"
        raise WeightError(source.where, found, f"1 to {MAX_STAGES} of 2 to {MAX_BLOCKS + 1}")
    base, in_channels = full_shape(source, "encoder.conv_in.weight", 5)[:2]
    out_channels, last_width = full_shape(source, "decoder.conv_out.weight", 5)[:2]
    mults, down = [], []
    for stage in range(num_stages):
        index = stage * (num_blocks + 1)  # in 2.1 a flat list: a stage's blocks, then resampling
        first, last = f"{index}", f"{index + num_blocks}"
        if is_residual:
            first, last = f"{stage}.resnets.0", f"{stage}.downsampler"
        width = full_shape(source, f"encoder.down_blocks.{first}.conv1.weight", 5)[0]
        if width % base:
            found = f"{width} channels in encoder stage {stage}"
            raise WeightError(source.where, found, f"a multiple of the first layer's {base}")
        mults.append(width // base)
        down.append(f"encoder.down_blocks.{last}.time_conv.weight" in names)
    return {
        "base_dim": base,
        "decoder_base_dim": last_width // mults[0],
        "z_dim": full_shape(source, DIFFUSERS_PROBE, 5)[1],
        "dim_mult": mults,
        "num_res_blocks": num_blocks,
        "temperal_downsample": down[:-1],  # diffusers' spelling
        "is_residual": is_residual,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": max(1, math.isqrt(in_channels // 3)),
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix."""
    rests = (name[len(prefix) :] for name in names if name.startswith(prefix))
    return len({rest.partition(".")[0] for rest in rests})
