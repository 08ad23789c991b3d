"""Writes the demo model's folder: the diffusers layout, and `demo.json` beside it.

The folder loads in diffusers (`WanPipeline.from_pretrained`) and in `files.open_model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ..keys import text_tensors, to_diffusers
from ..spec import ModelDefaults, TransformerSpec, VaeSpec
from . import clips
from .network import text_config, text_spec

CHECKED_WITH = "0.42.1"  # the diffusers version that was seen to load the folder
DEFAULTS = ModelDefaults(
    width=64,
    height=64,
    frames=17,
    fps=8,
    steps=20,
    guidance=3.0,
    shift=3.0,
    prompt="a yellow star moves right over a navy background",
    zoom=4,
)


def export_transformer(
    folder: Path, spec: TransformerSpec, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write `transformer/` from weights under canonical names."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": CHECKED_WITH,
        "patch_size": list(spec.patch_size),
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.head_dim,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim,
        "ffn_dim": spec.ffn_dim,
        "num_layers": spec.num_layers,
        "cross_attn_norm": spec.cross_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": spec.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    renamed = {to_diffusers(name): tensor for name, tensor in weights.items()}
    _write_part(folder / "transformer", "diffusion_pytorch_model", config, renamed, dtype)


def export_text(
    folder: Path, weights: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Write `text_encoder/` and `tokenizer/`."""
    size = tokenizer.get_vocab_size()
    config = {**text_config(size), "dtype": str(dtype).removeprefix("torch.")}
    wanted = {name: weights[name] for name in text_tensors(text_spec(size))}
    _write_part(folder / "text_encoder", "model", config, wanted, dtype)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {
        "backend": "tokenizers",
        # the plain class loads with transformers 4 and 5
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "padding_side": "right",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer" / "tokenizer_config.json", settings)


def export_vae(
    folder: Path, spec: VaeSpec, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write `vae/`."""
    config = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": CHECKED_WITH,
        "attn_scales": [],
        "base_dim": spec.base_dim,
        "decoder_base_dim": spec.decoder_base_dim,
        "dim_mult": list(spec.dim_mult),
        "dropout": 0.0,
        "in_channels": spec.in_channels,
        "is_residual": spec.is_residual,
        "latents_mean": list(spec.latents_mean),
        "latents_std": list(spec.latents_std),
        "num_res_blocks": spec.num_res_blocks,
        "out_channels": spec.out_channels,
        "patch_size": spec.patch_size,
        "scale_factor_spatial": spec.spatial_factor,
        "scale_factor_temporal": spec.temporal_factor,
        "temperal_downsample": list(spec.temporal_down),
        "z_dim": spec.z_dim,
    }
    _write_part(folder / "vae", "diffusion_pytorch_model", config, weights, dtype)


def export_index(folder: Path, defaults: ModelDefaults = DEFAULTS) -> None:
    """Write `model_index.json`, `scheduler/` and `demo.json`."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": CHECKED_WITH,
        "boundary_ratio": None,
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": CHECKED_WITH,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": defaults.shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    values = {key: value for key, value in asdict(defaults).items() if key != "negative"}
    _write_json(folder / "demo.json", {**values, "grammar": clips.grammar()})


def _write_part(
    folder: Path,
    stem: str,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    _write_json(folder / "config.json", config)
    stored = {name: t.detach().to(dtype).contiguous() for name, t in sorted(tensors.items())}
    path = folder / f"{stem}.safetensors"
    save_file(stored, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it readable to the owner only


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
