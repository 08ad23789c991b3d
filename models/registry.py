"""From a model's name to its geometry and folder, reading JSON only. Free of torch.

A name is `demo` (the model that ships with the package), a preset such as `wan2.1-t2v-14b` (a
geometry without weights, for planning), or the path of a diffusers model folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

from reelpool.errors import ConfigError, WeightError

from .jsonfile import read_json
from .spec import PRESETS, ModelDefaults, ModelSpec, TextSpec, TransformerSpec, VaeSpec
from .vae_config import vae_spec_from_config

DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
PIPELINES = ("WanPipeline",)
MAX_LAYERS = 1000
MAX_VAE_WIDTH = 2**16


def find_spec(name: str) -> ModelSpec:
    """Geometry and defaults of a model.

    Raises:
        ConfigError: if there is no such model.
        WeightError: if its folder is incomplete or says something that cannot be.
    """
    if name in PRESETS:
        return PRESETS[name]
    return spec_from_folder(model_folder(name))


def model_folder(name: str) -> Path:
    """The folder that holds a model's weights.

    Raises:
        ConfigError: if the name is a preset (a geometry without weights) or nothing at all.
    """
    if name == "demo":
        return DEMO_FOLDER
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in PRESETS:
        raise ConfigError(
            "--model", f"{name} is a geometry without weights", "give the path of a model folder"
        )
    near = get_close_matches(name, ["demo", *PRESETS], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "give demo or the path of a model folder"
    raise ConfigError("--model", f"there is no model folder {name!r}", hint)


def spec_from_folder(folder: Path) -> ModelSpec:
    """Read the geometry of a diffusers model folder from its JSON files.

    Raises:
        WeightError: if a file is missing or holds something that cannot be.
    """
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise WeightError(
            str(folder / "model_index.json"), f"a model of class {kind}", " or ".join(PIPELINES)
        )
    transformer = _transformer_spec(folder / "transformer" / "config.json")
    text = _text_spec(folder / "text_encoder" / "config.json")
    vae = _vae_spec(folder / "vae" / "config.json")
    if text.dim != transformer.text_dim:
        raise WeightError(
            str(folder / "text_encoder" / "config.json"),
            f"d_model {text.dim}",
            f"{transformer.text_dim}, the transformer's text_dim",
        )
    if vae.z_dim != transformer.out_channels:
        raise WeightError(
            str(folder / "vae" / "config.json"),
            f"z_dim {vae.z_dim}",
            f"{transformer.out_channels}, the transformer's out_channels",
        )
    return ModelSpec(folder.name, transformer, vae, text, _defaults(folder))


def _transformer_spec(path: Path) -> TransformerSpec:
    config = read_json(path)
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            raise WeightError(str(path), f"{key} {config[key]}", "a text-to-video model without it")
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise WeightError(str(path), f"qk_norm {config['qk_norm']}", "rms_norm_across_heads")
    patch = config.get("patch_size", [1, 2, 2])
    if patch != [1, 2, 2]:
        raise WeightError(str(path), f"patch_size {patch}", "[1, 2, 2]")
    spec = TransformerSpec(
        num_heads=_count(path, config, "num_attention_heads"),
        head_dim=_count(path, config, "attention_head_dim"),
        ffn_dim=_count(path, config, "ffn_dim"),
        num_layers=_count(path, config, "num_layers", at_most=MAX_LAYERS),
        in_channels=_count(path, config, "in_channels"),
        out_channels=_count(path, config, "out_channels"),
        text_dim=_count(path, config, "text_dim"),
        freq_dim=_count(path, config, "freq_dim"),
        eps=_number(path, config, "eps", 1e-6),
        cross_norm=_flag(path, config, "cross_attn_norm", True),
    )
    if spec.in_channels != spec.out_channels:
        raise WeightError(
            str(path),
            f"in_channels {spec.in_channels}, out_channels {spec.out_channels}",
            "equal ones, as text-to-video models have",
        )
    if spec.head_dim % 2 or spec.freq_dim % 2:
        found = f"attention_head_dim {spec.head_dim}, freq_dim {spec.freq_dim}"
        raise WeightError(str(path), found, "even numbers")
    return spec


def _vae_spec(path: Path) -> VaeSpec:
    """The VAE's geometry, small enough to list its tensors."""
    spec = vae_spec_from_config(read_json(path))
    if len(spec.dim_mult) > 10 or spec.num_res_blocks > MAX_LAYERS:
        found = f"{len(spec.dim_mult)} stages of {spec.num_res_blocks} blocks"
        raise WeightError(str(path), found, f"at most 10 of {MAX_LAYERS}")
    width = max(spec.base_dim, spec.decoder_base_dim) * max(spec.dim_mult)
    if max(width, spec.z_dim) > MAX_VAE_WIDTH:
        raise WeightError(
            str(path),
            f"{width} channels, z_dim {spec.z_dim}",
            f"at most {MAX_VAE_WIDTH}, from base_dim, decoder_base_dim and dim_mult",
        )
    return spec


def _text_spec(path: Path) -> TextSpec:
    config = read_json(path)
    kind = config.get("model_type")
    if kind != "umt5":
        raise WeightError(str(path), f"a text encoder of type {kind}", "umt5")
    activation = config.get("feed_forward_proj", "gated-gelu")
    if activation != "gated-gelu":
        raise WeightError(str(path), f"feed_forward_proj {activation!r}", "gated-gelu")
    defaults = TextSpec()
    return TextSpec(
        vocab_size=_count(path, config, "vocab_size"),
        dim=_count(path, config, "d_model"),
        num_layers=_count(path, config, "num_layers", at_most=MAX_LAYERS),
        num_heads=_count(path, config, "num_heads"),
        head_dim=_count(path, config, "d_kv"),
        ffn_dim=_count(path, config, "d_ff"),
        num_buckets=_count(path, config, "relative_attention_num_buckets"),
        max_distance=_count(path, config, "relative_attention_max_distance", defaults.max_distance),
        eps=_number(path, config, "layer_norm_epsilon", defaults.eps),
    )


def _defaults(folder: Path) -> ModelDefaults:
    """Defaults of Wan, the scheduler's shift over them, the folder's demo.json over both."""
    defaults = ModelDefaults()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        defaults = replace(
            defaults, shift=_number(scheduler, read_json(scheduler), "flow_shift", defaults.shift)
        )
    own = folder / "demo.json"
    if not own.exists():
        return defaults
    values = read_json(own)
    changes: dict[str, object] = {}
    for field in fields(ModelDefaults):
        if field.name in values:
            changes[field.name] = _checked(own, field.name, values, getattr(defaults, field.name))
    return replace(defaults, **changes)  # type: ignore[arg-type]  # checked against each default


def _checked(path: Path, key: str, values: Mapping[str, object], like: object) -> object:
    if isinstance(like, str):
        value = values[key]
        if not isinstance(value, str):
            raise WeightError(str(path), f"{key} {value!r}", "a text")
        return value
    if isinstance(like, int):
        return _count(path, values, key)
    return _number(path, values, key, 0.0)


def _flag(path: Path, config: Mapping[str, object], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise WeightError(str(path), f"{key} {value!r}", "true or false")
    return value


def _count(
    path: Path,
    config: Mapping[str, object],
    key: str,
    default: int | None = None,
    at_most: int = 2**31 - 1,
) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 < value <= at_most:
        raise WeightError(str(path), f"{key} {value!r}", f"a whole number from 1 to {at_most}")
    return value


def _number(path: Path, config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise WeightError(str(path), f"{key} {value!r}", "a number of at least 0")
    return float(value)
