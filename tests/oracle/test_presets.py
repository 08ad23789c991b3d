"""Presets against diffusers' classes on the meta device: parameters, and FLOPs of a block."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from reelpool.models.presets import PRESETS
from reelpool.models.spec import LatentShape, TextSpec, TransformerSpec

GEOMETRIES = {spec.transformer: name for name, spec in reversed(PRESETS.items())}


def on_meta(spec: TransformerSpec, name: str, num_layers: int | None = None):
    kind = SkyReelsV2Transformer3DModel if "skyreels" in name else WanTransformer3DModel
    more = {"inject_sample_info": True} if spec.fps_embedding else {}
    with torch.device("meta"):
        return kind(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            ffn_dim=spec.ffn_dim,
            num_layers=num_layers or spec.num_layers,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            image_dim=spec.image_dim or None,
            added_kv_proj_dim=spec.dim if spec.image_dim else None,
            pos_embed_seq_len=spec.image_positions or None,
            **more,
        )


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("spec", GEOMETRIES, ids=GEOMETRIES.get)
def test_parameters_equal_diffusers(spec):
    model = on_meta(spec, GEOMETRIES[spec], 2)
    block = count(model.blocks[0])
    assert spec.block_params == block
    assert spec.other_params == count(model) - 2 * block


def test_parameters_of_the_encoders_and_vaes_equal_the_published_ones():
    text = TextSpec()
    image = PRESETS["wan2.1-i2v-14b-480p"].image_encoder
    with torch.device("meta"):
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=text.vocab_size, d_model=text.dim, d_kv=text.head_dim,
                d_ff=text.ffn_dim, num_layers=text.num_layers, num_heads=text.num_heads,
            )
        )  # fmt: skip
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=image.dim, intermediate_size=image.ffn_dim, image_size=image.image_size,
                num_hidden_layers=image.num_layers, num_attention_heads=image.num_heads,
                patch_size=image.patch_size,
            )
        )  # fmt: skip
    assert text.num_params == count(encoder) == 5_680_910_336
    assert count(clip) / 1e6 == pytest.approx(630.8, abs=0.05)
    assert image.num_tokens == 257
    for name, millions in (("wan2.1-t2v-14b", 126.9), ("wan2.2-ti2v-5b", 704.7)):
        vae = PRESETS[name].vae
        with torch.device("meta"):
            model = AutoencoderKLWan(
                base_dim=vae.base_dim, decoder_base_dim=vae.decoder_base_dim, z_dim=vae.z_dim,
                dim_mult=list(vae.dim_mult), num_res_blocks=vae.num_res_blocks,
                temperal_downsample=list(vae.temporal_down), is_residual=vae.is_residual,
                in_channels=vae.in_channels, out_channels=vae.out_channels,
                patch_size=vae.patch_size if vae.patch_size > 1 else None,
            )  # fmt: skip
        assert count(model) / 1e6 == pytest.approx(millions, abs=0.05)
        assert len(vae.latents_mean) == len(vae.latents_std) == vae.z_dim


def flops_of_a_block(spec: TransformerSpec, num_tokens: int) -> int:
    """FLOPs that torch counts in one block of diffusers'."""
    block = on_meta(spec, "wan", 1).blocks[0]
    d = spec.dim
    images = (spec.image_positions or 257) if spec.image_dim else 0
    with torch.device("meta"):
        hidden, context = torch.empty(1, num_tokens, d), torch.empty(1, images + 512, d)
        modulation = torch.empty(1, 6, d)
        rope = (torch.empty(1, num_tokens, 1, spec.head_dim),) * 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(hidden, context, modulation, rope)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("spec", "num_tokens"),
    [
        (TransformerSpec(2, 12, 48, 1, 4, 4), 80),
        (TransformerSpec(2, 12, 48, 1, 12, 4, image_dim=32), 80),
        (PRESETS["wan2.1-t2v-1.3b"].transformer, 32_760),
        (PRESETS["wan2.2-t2v-a14b"].transformer, 75_600),
        (PRESETS["wan2.2-ti2v-5b"].transformer, 27_280),
        (PRESETS["wan2.1-i2v-14b-480p"].transformer, 32_760),
        (PRESETS["wan2.1-flf2v-14b-720p"].transformer, 75_600),
    ],
    ids=["tiny", "tiny image", "1.3B", "A14B", "5B", "I2V", "FLF2V"],
)
def test_flops_of_a_block_are_what_torch_counts(spec, num_tokens):
    assert spec.block_flops(num_tokens) == flops_of_a_block(spec, num_tokens)


@pytest.mark.parametrize(
    ("name", "shape", "num_tokens"),
    [  # shared/facts/wan.md 1.3
        ("wan2.1-t2v-14b", LatentShape(16, 21, 60, 104), 32_760),
        ("wan2.1-i2v-14b-720p", LatentShape(16, 21, 90, 160), 75_600),
        ("wan2.2-ti2v-5b", LatentShape(48, 31, 44, 80), 27_280),
        ("skyreels-v2-df-14b-540p", LatentShape(16, 25, 68, 120), 51_000),
    ],
)
def test_the_default_video_has_the_published_size(name, shape, num_tokens):
    spec, own = PRESETS[name], PRESETS[name].defaults
    assert spec.latent_shape(own.width, own.height, own.frames) == shape
    assert spec.transformer.num_tokens(shape) == num_tokens
