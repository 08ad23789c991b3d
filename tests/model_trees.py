"""Trees of model files as people have them: right names and headers, no bytes (sparse files)."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from reelpool.models.keys import text_tensors, to_diffusers, transformer_tensors
from reelpool.models.presets import PRESETS
from reelpool.models.spec import TextSpec, TransformerSpec

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
SMALL = PRESETS["wan2.1-t2v-1.3b"].transformer


def hollow_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], kind: str = "BF16", small: str = "BF16"
) -> Path:
    """A safetensors file of these tensors; matrices of `kind`, all else of `small`."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        dtype = kind if len(shape) == 2 and name.endswith(".weight") else small
        size = math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def hollow_gguf(path: Path, shapes: dict[str, tuple[int, ...]], kind: str = "Q4_K") -> Path:
    """A GGUF file of these tensors; matrices of blocks of `kind`, all else float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "wan")
    size = 0
    for name, shape in shapes.items():
        is_matrix = name.startswith("blocks.") and len(shape) == 2
        dtype = GGMLQuantizationType[kind if is_matrix else "F32"]
        block, num_bytes = GGML_QUANT_SIZES[dtype]
        length = math.prod(shape) // block * num_bytes
        writer.add_tensor_info(name, list(shape), "float32", length, raw_dtype=dtype)  # type: ignore[arg-type]
        size += (length + 31) // 32 * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = (path.stat().st_size + 31) // 32 * 32
        file.truncate(start + size)
    return path


def transformer(
    path: Path, spec: TransformerSpec = SMALL, kind: str = "", prefix: str = ""
) -> Path:
    """A transformer's file: GGUF or safetensors by its ending."""
    shapes = {prefix + name: shape for name, shape in transformer_tensors(spec).items()}
    if path.suffix == ".gguf":
        return hollow_gguf(path, shapes, kind or "Q4_K")
    return hollow_safetensors(path, shapes, kind or "BF16")


def touch(path: Path, num_bytes: int = 1) -> Path:
    """A file that only its name makes a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return path


def companions(models: Path, *names: str) -> None:
    """ComfyUI's usual files of the other parts."""
    for name in names:
        folder = "vae" if "vae" in name.lower() else "text_encoders"
        touch(models / ("clip_vision" if "clip_vision" in name else folder) / name)


def diffusers_folder(folder: Path, spec: TransformerSpec = SMALL, **index: object) -> Path:
    """A diffusers folder of Wan's own VAE and text encoder, hollow."""
    shapes = {to_diffusers(name): shape for name, shape in transformer_tensors(spec).items()}
    for part in ("transformer", *(["transformer_2"] if index.get("boundary_ratio") else [])):
        hollow_safetensors(folder / part / "diffusion_pytorch_model.safetensors", shapes)
        _json(
            folder / part / "config.json",
            _class_name="WanTransformer3DModel", num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers,
            in_channels=spec.in_channels, out_channels=spec.out_channels, text_dim=spec.text_dim,
            freq_dim=spec.freq_dim, image_dim=spec.image_dim or None,
        )  # fmt: skip
    text = TextSpec()
    hollow_safetensors(folder / "text_encoder" / "model.safetensors", text_tensors(text))
    _json(
        folder / "text_encoder" / "config.json",
        model_type="umt5", vocab_size=text.vocab_size, d_model=text.dim, d_kv=text.head_dim,
        d_ff=text.ffn_dim, num_layers=text.num_layers, num_heads=text.num_heads,
        relative_attention_num_buckets=32, relative_attention_max_distance=128,
    )  # fmt: skip
    _json(folder / "vae" / "config.json", _class_name="AutoencoderKLWan", z_dim=16)
    touch(folder / "vae" / "diffusion_pytorch_model.safetensors")
    _json(folder / "scheduler" / "scheduler_config.json", flow_shift=3.0)
    _json(folder / "model_index.json", **{"_class_name": "WanPipeline", **index})
    return folder


def hugging_face_repository(cache: Path, name: str, files: dict[str, Path], commit: str) -> Path:
    """A repository of the cache, as huggingface_hub lays it out: blobs, and links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for number, (inner, file) in enumerate(files.items()):
        blob = repository / "blobs" / f"{commit}{number:04}"
        file.rename(blob)
        link = snapshot / inner
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(Path(inner).parts)
        link.symlink_to(Path(*[".."] * (depth + 1), "blobs", blob.name))
    return snapshot


def _json(path: Path, **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
