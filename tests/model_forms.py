"""One tiny transformer of every variant, written in every form that people have it in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

from reelpool.models.keys import to_diffusers, transformer_tensors
from reelpool.models.spec import TransformerSpec
from tests.gguf_files import write as write_gguf

T2V = TransformerSpec(1, 128, 64, 2, 16, 16, text_dim=32, freq_dim=32)
SPECS = {  # kind: geometry, variant, how images come
    "t2v": (T2V, "t2v", ""),
    "i2v": (replace(T2V, in_channels=36, image_dim=16), "i2v", "concat"),
    "flf2v": (replace(T2V, in_channels=36, image_dim=16, image_positions=10), "flf2v", "concat"),
    "i2v-2.2": (replace(T2V, in_channels=36), "i2v", "concat"),
    "ti2v": (replace(T2V, in_channels=48, out_channels=48), "ti2v", "first-frame"),
    "df": (replace(T2V, fps_embedding=True), "df", ""),
}
COMFYUI = "model.diffusion_model."
TWO_SHARDS = "diffusion_pytorch_model-{:05}-of-00002.safetensors"


def tensors_of(spec: TransformerSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under canonical names, of about the size that real ones have."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(shape, generator=draw) / math.sqrt(math.prod(shape[1:]))).to(dtype)
        for name, shape in transformer_tensors(spec).items()
    }


def config_of(spec: TransformerSpec) -> dict[str, object]:
    """A diffusers config.json."""
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.head_dim,
        "ffn_dim": spec.ffn_dim,
        "num_layers": spec.num_layers,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim,
        "eps": spec.eps,
        "cross_attn_norm": spec.cross_norm,
        "image_dim": spec.image_dim or None,
        "pos_embed_seq_len": spec.image_positions or None,
    }


def original(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    return _save(folder / "wan.safetensors", tensors)


def comfyui(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    named = {COMFYUI + name: tensor for name, tensor in tensors.items()}
    return _save(folder / "wan_comfyui.safetensors", named)


def whole_checkpoint(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    """With other parts of the model in the same file."""
    named = {COMFYUI + name: tensor for name, tensor in tensors.items()}
    named["vae.conv1.weight"] = torch.zeros(2)
    named["text_encoders.umt5xxl.shared.weight"] = torch.zeros(2)
    return _save(folder / "checkpoint.safetensors", named)


def sharded(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    """A folder with original names, two shards and an index."""
    weight_map = _write_shards(folder, tensors)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sharded_index(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    return sharded(folder, tensors, spec) / "diffusion_pytorch_model.safetensors.index.json"


def shards_alone(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    _write_shards(folder, tensors)
    return folder / TWO_SHARDS.format(1)


def pth(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    torch.save(dict(tensors), folder / "wan.pth")
    return folder / "wan.pth"


def nested_pth(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    named = {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save({"state_dict": named, "epoch": 3}, folder / "wan.ckpt")
    return folder / "wan.ckpt"


def diffusers(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    (folder / "config.json").write_text(json.dumps(config_of(spec)))
    named = {to_diffusers(name): tensor for name, tensor in tensors.items()}
    _save(folder / "diffusion_pytorch_model.safetensors", named)
    return folder


def gguf(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    return quantised_gguf(folder / "wan.gguf", tensors, {})


def flat_gguf(folder: Path, tensors: Mapping[str, Tensor], spec: TransformerSpec) -> Path:
    """As third parties write them: no axis of 1, at most four axes."""
    changed = {
        name: tensor.flatten(0, 1) if tensor.ndim == 5 else tensor.squeeze(0)
        for name, tensor in tensors.items()
        if tensor.ndim > 2
    }
    return quantised_gguf(folder / "wan_flat.gguf", {**tensors, **changed}, {})


LOSSLESS: dict[str, Callable[[Path, Mapping[str, Tensor], TransformerSpec], Path]] = {
    form.__name__: form
    for form in (
        original, comfyui, whole_checkpoint, sharded, sharded_index, shards_alone, pth, nested_pth,
        diffusers, gguf, flat_gguf,
    )
}  # fmt: skip


def quantised_gguf(path: Path, tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> Path:
    """GGUF with some tensors in a type that gguf-py can write.

    kinds: end of a name to its type; the others stay in their own.
    """
    plain, blocks = {}, []
    for name, tensor in tensors.items():
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "")
        if kind:
            raw = quantize(tensor.float().numpy(), GGMLQuantizationType[kind])
            blocks.append((name, kind, raw))
        elif tensor.dtype == torch.bfloat16:
            blocks.append((name, "BF16", tensor.contiguous().view(torch.uint8).numpy()))
        else:
            plain[name] = tensor.numpy()
    return write_gguf(path, plain, blocks=blocks)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    names, weight_map = list(tensors), {}
    for number in range(2):
        file = TWO_SHARDS.format(number + 1)
        part = {name: tensors[name] for name in names[number::2]}
        _save(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    return weight_map
