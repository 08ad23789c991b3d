"""Tiny random transformers of every variant, made by diffusers' own classes.

The channels are the real ones, the rest is as small as it goes: 2 heads of 12, 2 layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reelpool.models.keys import to_diffusers, transformer_names_from_diffusers, transformer_tensors
from reelpool.models.spec import LatentShape, NumericsProfile, TransformerSpec
from reelpool.models.weights import RenamedSource, SafetensorsSource, WeightSource, check_tensors
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from tests.tiny_models import FLOAT32, TEXT_DIM, forward_input, latents_of, prompt_rows

IMAGE_DIM, IMAGE_ROWS = 20, 257
T2V = TransformerSpec(2, 12, 32, 2, 16, 16, text_dim=TEXT_DIM)
# One of each; DF is SkyReels-V2's diffusion forcing.
VARIANTS: dict[str, TransformerSpec] = {
    "t2v": T2V,
    "i2v-2.1": replace(T2V, in_channels=36, image_dim=IMAGE_DIM, num_layers=3),
    "flf2v": replace(T2V, in_channels=36, image_dim=IMAGE_DIM, image_positions=2 * IMAGE_ROWS),
    "i2v-2.2": replace(T2V, in_channels=36),
    "ti2v": replace(T2V, in_channels=48, out_channels=48),
    "df": replace(T2V, num_layers=3),
    "df-fps": replace(T2V, fps_embedding=True),
    "df-i2v-fps": replace(T2V, in_channels=36, image_dim=IMAGE_DIM, fps_embedding=True),
}


def make_transformer(name: str, seed: int = 5) -> Any:
    """diffusers' module of a variant in float32; norms, biases and tables away from 1 and 0."""
    from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

    spec = VARIANTS[name]
    config: dict[str, Any] = {
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.head_dim,
        "num_layers": spec.num_layers,
        "ffn_dim": spec.ffn_dim,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim,
        "image_dim": spec.image_dim or None,
        "added_kv_proj_dim": spec.dim if spec.image_dim else None,
        "pos_embed_seq_len": spec.image_positions or None,
    }
    torch.manual_seed(seed)
    if name.startswith("df"):
        model = SkyReelsV2Transformer3DModel(**config, inject_sample_info=spec.fps_embedding)
    else:
        model = WanTransformer3DModel(**config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def open_module(name: str, module: Any, folder: Path, canonical: bool = False) -> WeightSource:
    """Save a module's weights, under diffusers' or canonical names, and open them."""
    state = dict(module.named_parameters())
    path = folder / f"{name}-{canonical}.safetensors"
    if canonical:
        state = {ours: state[to_diffusers(ours)] for ours in transformer_tensors(VARIANTS[name])}
    save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, path)
    source: WeightSource = SafetensorsSource(path)
    if not canonical:
        source = RenamedSource(source, transformer_names_from_diffusers(source.names()))
    check_tensors(source, transformer_tensors(VARIANTS[name]))
    return source


def open_variant(
    name: str, source: WeightSource, numerics: NumericsProfile = FLOAT32
) -> BlockRunner:
    return BlockRunner(VARIANTS[name], source, numerics, torch.device("cpu"))


def variant_input(
    name: str, timesteps: Tensor, num_words: int = 7, size: tuple[int, int] = (6, 8)
) -> ForwardInput:
    """Everything that a forward of the variant is given."""
    spec, frames = VARIANTS[name], timesteps.numel()
    shape = LatentShape(spec.out_channels, frames, *size)
    forward = forward_input(latents_of(shape), timesteps, prompt_rows(num_words))
    if spec.in_channels > spec.out_channels:
        more = replace(shape, channels=spec.in_channels - spec.out_channels)
        forward = replace(forward, condition=latents_of(more, seed=6))
    if spec.image_dim:
        draw = torch.Generator().manual_seed(8)
        features = torch.randn(spec.image_rows, spec.image_dim, generator=draw)
        forward = replace(forward, image_key="image", image_embeds=features)
    return replace(forward, fps=24) if spec.fps_embedding else forward
