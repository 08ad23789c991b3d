"""Tiny random models that take images, have two experts, or are told the frame rate.

diffusers' own pipelines save them.

Each is a folder of the diffusers layout with the channel counts of the real model, from which ours
is told apart: 36 channels in and 16 out, or 48 and 48.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from reelpool.models.registry import DEMO_FOLDER

TEXT_DIM = 32
IMAGE_DIM = 16  # width of the image encoder
IMAGE_SIZE = 32  # its pixels; images of this size are not resized by either side
IMAGE_TOKENS = (IMAGE_SIZE // 8) ** 2 + 1

# id: (pipeline, transformer's changes, boundary of two experts, has an image encoder)
KINDS: dict[str, tuple[type, dict[str, Any], float | None, bool]] = {
    "i2v-2.1": (
        WanImageToVideoPipeline,
        {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 24},
        None,
        True,
    ),
    "flf2v": (
        WanImageToVideoPipeline,
        {
            "in_channels": 36,
            "image_dim": IMAGE_DIM,
            "added_kv_proj_dim": 24,
            "pos_embed_seq_len": 2 * IMAGE_TOKENS,
        },
        None,
        True,
    ),
    "i2v-2.2": (WanImageToVideoPipeline, {"in_channels": 36}, 0.9, False),
    "t2v-2.2": (WanPipeline, {}, 0.875, False),
    "ti2v": (WanPipeline, {"in_channels": 48, "out_channels": 48}, None, False),
    "df": (SkyReelsV2DiffusionForcingPipeline, {"inject_sample_info": True}, None, False),
}


def write_image_model(folder: Path, kind: str) -> Path:
    """Write a model of one of KINDS; the same weights every time."""
    torch.manual_seed(7)
    pipeline, changes, boundary, has_encoder = KINDS[kind]
    parts: dict[str, Any] = {
        "transformer": _transformer(changes),
        "vae": _vae48() if kind == "ti2v" else _vae16(),
        "text_encoder": _text_encoder(),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(DEMO_FOLDER / "tokenizer"),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    }
    if kind != "df":
        parts["transformer_2"] = _transformer(changes) if boundary else None
        parts |= {"boundary_ratio": boundary, "expand_timesteps": kind == "ti2v"}
    if pipeline is WanImageToVideoPipeline:
        parts |= _image_encoder() if has_encoder else _NO_ENCODER
    pipeline(**parts).save_pretrained(folder)
    return folder


def _noisy(model: Any, noise: float) -> Any:
    """Norms, biases and tables away from their 1 and 0, or a mistake in them would not show."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()


def _transformer(changes: dict[str, Any]) -> Any:
    geometry = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 256,
    }
    kind = (
        SkyReelsV2Transformer3DModel if "inject_sample_info" in changes else WanTransformer3DModel
    )
    return _noisy(kind(**{**geometry, **changes}), 0.1)


def _vae16() -> Any:
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return _noisy(vae, 0.1)


def _vae48() -> Any:
    return _noisy(
        AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.01 * i - 0.2 for i in range(48)],
            latents_std=[0.5 + 0.02 * i for i in range(48)],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
        ),
        0.1,
    )


def _text_encoder() -> Any:
    vocabulary = PreTrainedTokenizerFast.from_pretrained(DEMO_FOLDER / "tokenizer")
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
    )  # fmt: skip
    return _noisy(UMT5EncoderModel(config), 0.3)


_NO_ENCODER = {"image_encoder": None, "image_processor": None}


def _image_encoder() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_act="gelu",
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return {"image_encoder": _noisy(CLIPVisionModel(config), 0.1), "image_processor": processor}
