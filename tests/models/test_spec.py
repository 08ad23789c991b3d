"""Counts, against published ones and against diffusers' and transformers' classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from reelpool.models.keys import block_tensors, text_tensors, transformer_tensors
from reelpool.models.presets import PRESETS
from reelpool.models.spec import LatentShape, TextSpec, TransformerSpec

SMALL = PRESETS["wan2.1-t2v-1.3b"]
LARGE = PRESETS["wan2.1-t2v-14b"]
VIDEO_480P = LatentShape(16, 21, 60, 104)


def on_meta(spec: TransformerSpec) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            ffn_dim=spec.ffn_dim,
            num_layers=spec.num_layers,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            text_dim=spec.text_dim,
            freq_dim=spec.freq_dim,
            cross_attn_norm=spec.cross_norm,
        )


@pytest.mark.parametrize(
    ("spec", "block", "total"),
    [  # shared/facts/wan.md 1.2
        (SMALL.transformer, 46_440_704, 1_418_996_800),
        (LARGE.transformer, 351_394_304, 14_288_491_584),
        (TransformerSpec(24, 128, 14336, 30, 48, 48), 163_656_704, 4_999_787_712),
    ],
    ids=["1.3B", "14B", "5B"],
)
def test_parameters_are_the_published_numbers(spec, block, total):
    assert spec.block_params == block
    assert spec.num_params == total


@pytest.mark.parametrize(
    "spec",
    [
        SMALL.transformer,
        LARGE.transformer,
        TransformerSpec(3, 10, 17, 2, 5, 5, text_dim=7, freq_dim=6, cross_norm=False),
    ],
    ids=["1.3B", "14B", "odd sizes"],
)
def test_parameters_equal_diffusers_and_the_expected_tensors(spec):
    model = on_meta(spec)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert spec.block_params == block
    assert spec.num_params == sum(p.numel() for p in model.parameters())
    sizes = [torch.Size(shape).numel() for shape in transformer_tensors(spec).values()]
    assert sum(sizes) == spec.num_params
    sizes = [torch.Size(shape).numel() for shape in block_tensors(spec, 0).values()]
    assert sum(sizes) == spec.block_params


@pytest.mark.parametrize(
    "spec", [TextSpec(), TextSpec(61, 32, 2, 4, 8, 37, 16)], ids=["wan", "tiny"]
)
def test_text_parameters_equal_transformers(spec):
    config = UMT5Config(
        vocab_size=spec.vocab_size,
        d_model=spec.dim,
        d_kv=spec.head_dim,
        d_ff=spec.ffn_dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        relative_attention_num_buckets=spec.num_buckets,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert text_tensors(spec) == theirs
    assert spec.num_params == sum(p.numel() for p in model.parameters())


def test_flops_of_a_block_are_the_published_42_tera():
    num_tokens = LARGE.transformer.num_tokens(VIDEO_480P)
    assert num_tokens == 32_760
    # shared/facts/arithmetic.md counts 41.96 T, without the text's keys and values
    assert LARGE.transformer.block_flops(num_tokens) == pytest.approx(41.96e12, rel=0.01)  # -0.0%


def test_share_of_the_text_falls_with_the_tokens():
    spec = SMALL.transformer
    shares = [spec.text_kv_share(n) for n in (80, 1280, 7168, 32_760)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.02 < shares[0] < 1
    assert spec.block_flops(80) - spec.text_kv_flops() == pytest.approx(
        2 * 80 * (6 * 1536**2 + 2 * 1536 * 8960) + 4 * 80 * (80 + 512) * 1536
    )


def test_latent_shape_of_a_video():
    assert SMALL.latent_shape(832, 480, 81) == VIDEO_480P
    assert VIDEO_480P.dims == (1, 16, 21, 60, 104)
    assert VIDEO_480P.num_bytes == 4 * VIDEO_480P.num_elements == 8_386_560
    assert SMALL.size_multiple == 16
    assert SMALL.vae.num_latent_frames(1) == 1
    assert SMALL.vae.num_frames(21) == 81
    patched = replace(SMALL, transformer=replace(SMALL.transformer, patch_size=(1, 4, 4)))
    assert patched.size_multiple == 32
