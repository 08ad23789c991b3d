"""Tiny random model folders in the diffusers layout, and one way to drive their transformer.

diffusers' and transformers' own classes write them: what our readers meet is what those save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from reelpool.models.files import ModelFiles
from reelpool.models.registry import DEMO_FOLDER
from reelpool.models.spec import LatentShape, NumericsProfile
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.types import BlockRange

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
Z_DIM = 4
TEXT_DIM = 32
FLOAT32 = NumericsProfile()


def write_model(folder: Path, **transformer: Any) -> Path:
    """A whole tiny model: transformer of 2 heads x 12 and 2 layers unless told otherwise."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(5)
    geometry = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "in_channels": Z_DIM,
        "out_channels": Z_DIM,
        "text_dim": TEXT_DIM,
        "freq_dim": 256,
        **transformer,
    }
    _save(WanTransformer3DModel(**geometry), folder / "transformer", 0.1)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=Z_DIM,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.5, 0.7, 2.0, 1.1],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
    )
    _save(vae, folder / "vae", 0.1)
    words = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer" / "tokenizer.json"))
    text = UMT5Config(
        vocab_size=words.get_vocab_size(), d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
    )  # fmt: skip
    _save(UMT5EncoderModel(text), folder / "text_encoder", 0.3)
    for part in ("tokenizer", "scheduler", "model_index.json"):
        source = DEMO_FOLDER / part
        if source.is_dir():
            shutil.copytree(source, folder / part)
        else:
            shutil.copyfile(source, folder / part)
    return folder


def copy_model(model: Path, folder: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(model, folder)


def _save(model: Any, folder: Path, noise: float) -> None:
    """Norms, biases and tables away from their 1 and 0, or a mistake in them would not show."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    model.save_pretrained(folder)


def shard(file: Path, num_shards: int = 3) -> list[Path]:
    """Cut a safetensors file into shards and an index, as large models have them."""
    tensors = load_file(file)
    stem, names, weight_map, paths = file.name.removesuffix(".safetensors"), list(tensors), {}, []
    for index in range(num_shards):
        paths.append(file.with_name(f"{stem}-{index + 1:05}-of-{num_shards:05}.safetensors"))
        part = names[index::num_shards]
        save_file({name: tensors[name] for name in part}, paths[-1])
        weight_map |= dict.fromkeys(part, paths[-1].name)
    edit_json(file.with_name(f"{stem}.safetensors.index.json"), weight_map=weight_map)
    file.unlink()
    return paths


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None deletes one; a file that is missing is made."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file; None deletes one. Write `a__b` for the name `a.b`."""
    tensors = load_file(path)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def prompt_rows(num_words: int, width: int = TEXT_DIM, seed: int = 1) -> Tensor:
    """What a text encoder gives for a prompt: (512, width), zero rows after `num_words`."""
    rows = torch.randn(512, width, generator=torch.Generator().manual_seed(seed))
    rows[num_words:] = 0
    return rows


def latents_of(shape: LatentShape, seed: int = 2) -> Tensor:
    return torch.randn(shape.dims, generator=torch.Generator().manual_seed(seed))


def open_runner(files: ModelFiles, numerics: NumericsProfile = FLOAT32) -> BlockRunner:
    cpu = torch.device("cpu")
    return BlockRunner(files.spec.transformer, files.transformer, numerics, cpu)


def forward_input(latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> ForwardInput:
    shape = LatentShape(*latents.shape[1:])
    text_key = hashlib.sha256(prompt_embeds.numpy().tobytes()).hexdigest()
    return ForwardInput(text_key, prompt_embeds, shape, latents, timesteps)


def velocity(
    runner: BlockRunner, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor
) -> Tensor:
    """One whole forward."""
    total = runner.spec.num_layers
    forward = forward_input(latents, timesteps, prompt_embeds)
    (result,) = runner.run(BlockRange(0, total, total), [forward])
    assert isinstance(result, Tensor)
    return result
