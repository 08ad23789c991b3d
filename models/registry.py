"""From a model's name to its geometry. Free of torch for presets and diffusers folders.

Of those JSON files are read; of everything else the headers, by `files.open_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reelpool.errors import WeightError

from .assembly import assemble, words_of
from .catalogue import is_diffusers
from .detect import ModelTraits, variant_of
from .finder import DEMO_FOLDER, existing, make_search, model_path, parts_of
from .jsonfile import read_json
from .model_index import number, read_index
from .parts import Parts
from .presets import find_preset
from .spec import ImageEncoderSpec, ModelSpec, TextSpec, TransformerSpec, VaeSpec
from .vae_config import vae_spec_from_config

__all__ = ["DEMO_FOLDER", "find_spec", "model_folder", "spec_from_folder"]

MAX_LAYERS = 1000
MAX_VAE_WIDTH = 2**16


def find_spec(name: str, parts: Parts = ()) -> ModelSpec:
    """Geometry and defaults of a model.

    Args:
        name: a preset's, with or without `@quant`, or what `finder.find_model` takes.
        parts: files that the user named for parts of it.

    Raises:
        ConfigError: if there is no such model, or a part of it is nowhere.
        WeightError: if it is incomplete, damaged, or says something that cannot be.
    """
    preset = None if existing(name) else find_preset(name)
    if preset:
        return preset
    path = model_path(name)
    if not parts and path.is_dir() and is_diffusers(path):
        return spec_from_folder(path, name)
    from .files import open_model

    return open_model(name, parts).spec


def model_folder(name: str) -> Path:
    """The folder of a diffusers model.

    Raises:
        ConfigError: if there is no such model, or it is a preset (a geometry without weights).
        WeightError: if it is no folder.
    """
    path = model_path(name)
    if not path.is_dir():
        raise WeightError(str(path), "a file", "a model folder")
    return path


def spec_from_folder(folder: Path, name: str = "") -> ModelSpec:
    """Read the geometry of a diffusers model folder from its JSON files.

    Raises:
        WeightError: if a file is missing or holds something that cannot be.
    """
    index = read_index(folder)
    found, _ = parts_of(name or str(folder), folder, {}, make_search())
    config = found.transformers[0] / "config.json"
    transformer = _transformer_spec(config)
    for other in found.transformers[1:]:
        if _transformer_spec(other / "config.json") != transformer:
            expected = f"those of {config}"
            raise WeightError(str(other / "config.json"), "other sizes", expected)
    variant, image = variant_of(str(config), transformer, words_of(found))
    text_config = found.text_encoder / "config.json"
    text = _text_spec(text_config)
    vae = _vae_spec(found.vae / "config.json")
    encoder = _image_encoder(found.image_encoder, transformer)
    if text.dim != transformer.text_dim:
        raise WeightError(
            str(text_config),
            f"d_model {text.dim}",
            f"{transformer.text_dim}, the transformer's text_dim",
        )
    if vae.z_dim != transformer.out_channels:
        raise WeightError(
            str(found.vae / "config.json"),
            f"z_dim {vae.z_dim}",
            f"{transformer.out_channels}, the transformer's out_channels",
        )
    traits = ModelTraits(variant, image, "")
    return assemble(found, index, transformer, traits, vae, text, encoder)


def _transformer_spec(path: Path) -> TransformerSpec:
    config = read_json(path)
    if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise WeightError(str(path), f"qk_norm {config['qk_norm']}", "rms_norm_across_heads")
    patch = config.get("patch_size", [1, 2, 2])
    if patch != [1, 2, 2]:
        raise WeightError(str(path), f"patch_size {patch}", "[1, 2, 2]")
    in_channels = _count(path, config, "in_channels")
    out_channels = _count(path, config, "out_channels")
    # copies of the 5B config.json name an image width that its weights do not have
    has_image = in_channels != out_channels and config.get("image_dim") is not None
    has_positions = has_image and config.get("pos_embed_seq_len") is not None
    spec = TransformerSpec(
        num_heads=_count(path, config, "num_attention_heads"),
        head_dim=_count(path, config, "attention_head_dim"),
        ffn_dim=_count(path, config, "ffn_dim"),
        num_layers=_count(path, config, "num_layers", at_most=MAX_LAYERS),
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=_count(path, config, "text_dim"),
        freq_dim=_count(path, config, "freq_dim"),
        eps=number(path, config, "eps", 1e-6),
        cross_norm=_flag(path, config, "cross_attn_norm", True),
        image_dim=_count(path, config, "image_dim") if has_image else 0,
        image_positions=_count(path, config, "pos_embed_seq_len") if has_positions else 0,
        fps_embedding=_flag(path, config, "inject_sample_info", False),
    )
    if spec.head_dim % 2 or spec.freq_dim % 2:
        found = f"attention_head_dim {spec.head_dim}, freq_dim {spec.freq_dim}"
        raise WeightError(str(path), found, "even numbers")
    return spec


def _image_encoder(folder: Path | None, transformer: TransformerSpec) -> ImageEncoderSpec | None:
    """The image encoder's geometry, if the transformer attends to image features."""
    if not transformer.image_dim:
        return None
    if folder is None:
        raise WeightError("image_encoder/config.json", "no such file", "an image encoder's")
    path, usual = folder / "config.json", ImageEncoderSpec()
    config = read_json(path)
    inner = config.get("vision_config")
    config = inner if isinstance(inner, dict) else config
    activation = config.get("hidden_act", usual.activation)
    if not isinstance(activation, str):
        raise WeightError(str(path), f"hidden_act {activation!r}", "a text")
    return ImageEncoderSpec(
        dim=_count(path, config, "hidden_size", usual.dim),
        num_layers=_count(path, config, "num_hidden_layers", usual.num_layers, MAX_LAYERS),
        num_heads=_count(path, config, "num_attention_heads", usual.num_heads),
        ffn_dim=_count(path, config, "intermediate_size", usual.ffn_dim),
        image_size=_count(path, config, "image_size", usual.image_size),
        patch_size=_count(path, config, "patch_size", usual.patch_size),
        activation=activation,
        eps=number(path, config, "layer_norm_eps", usual.eps),
    )


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
        eps=number(path, config, "layer_norm_epsilon", defaults.eps),
    )


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
