"""Names of tensors: one canonical naming, and maps from the layouts met in files.

Canonical are the original Wan names for the transformer (GGUF and ComfyUI files use them too), the
diffusers names for the VAE and the transformers names for UMT5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .spec import TextSpec, TransformerSpec

# canonical <- diffusers, outside of the blocks
_OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "fps_embedding": "fps_embedding",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
    "head.head": "proj_out",
}

# canonical <- diffusers, tensors that are no layer's weight or bias
_TABLES = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}

# canonical <- diffusers, inside a block. Note norm3 <- norm2: the original numbers the affine
# norm before cross-attention third, diffusers second; the other two norms have no parameters.
_INNER = {
    "norm3": "norm2",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def transformer_names_from_diffusers(stored: Iterable[str]) -> dict[str, str]:
    """Map canonical transformer names to the diffusers names they are stored under.

    The names of Wan's class and of SkyReels-V2's are the same. Names that are neither's are left
    out, `attn2.norm_added_q` of older diffusers files among them: nothing ever used it.
    """
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    names: dict[str, str] = {}
    for name in stored:
        ours = _canonical(name, outer, inner)
        if ours is not None:
            names[ours] = name
    return names


def _canonical(name: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str | None:
    for ours, theirs in _TABLES.items():
        if name == theirs:
            return ours
    match = _BLOCK.fullmatch(name)
    if match and match[2] == "scale_shift_table":
        return f"blocks.{match[1]}.modulation"
    layer, _, kind = (match[2] if match else name).rpartition(".")
    found = (inner if match else outer).get(layer)
    if found is None:
        return None
    return f"blocks.{match[1]}.{found}.{kind}" if match else f"{found}.{kind}"


def to_diffusers(name: str) -> str:
    """The diffusers name of a canonical transformer tensor, for messages and for tests.

    >>> to_diffusers("blocks.3.self_attn.o.weight")
    'blocks.3.attn1.to_out.0.weight'
    """
    match = _BLOCK.fullmatch(name)
    if match:
        if match[2] == "modulation":
            return f"blocks.{match[1]}.scale_shift_table"
        layer, _, kind = match[2].rpartition(".")
        return f"blocks.{match[1]}.{_INNER[layer]}.{kind}"
    if name in _TABLES:
        return _TABLES[name]
    layer, _, kind = name.rpartition(".")
    return f"{_OUTER[layer]}.{kind}"


def block_tensors(spec: TransformerSpec, index: int) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of one block's tensors."""
    d, f = spec.dim, spec.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"modulation": (1, 6, d)}
    if spec.cross_norm:
        shapes |= {"norm3.weight": (d,), "norm3.bias": (d,)}
    for kind in ("self_attn", "cross_attn"):
        for part in "qkvo":
            shapes |= {f"{kind}.{part}.weight": (d, d), f"{kind}.{part}.bias": (d,)}
        shapes |= {f"{kind}.norm_q.weight": (d,), f"{kind}.norm_k.weight": (d,)}
    if spec.image_dim:
        for part in ("k_img", "v_img"):
            shapes |= {f"cross_attn.{part}.weight": (d, d), f"cross_attn.{part}.bias": (d,)}
        shapes["cross_attn.norm_k_img.weight"] = (d,)
    shapes |= {"ffn.0.weight": (f, d), "ffn.0.bias": (f,)}
    shapes |= {"ffn.2.weight": (d, f), "ffn.2.bias": (d,)}
    return {f"blocks.{index}.{name}": shape for name, shape in shapes.items()}


def outer_tensors(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the tensors outside of the blocks."""
    d, patch = spec.dim, spec.patch_size
    out = spec.out_channels * patch[0] * patch[1] * patch[2]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, spec.in_channels, *patch),
        "patch_embedding.bias": (d,),
        "text_embedding.0.weight": (d, spec.text_dim),
        "text_embedding.0.bias": (d,),
        "text_embedding.2.weight": (d, d),
        "text_embedding.2.bias": (d,),
        "time_embedding.0.weight": (d, spec.freq_dim),
        "time_embedding.0.bias": (d,),
        "time_embedding.2.weight": (d, d),
        "time_embedding.2.bias": (d,),
        "time_projection.1.weight": (6 * d, d),
        "time_projection.1.bias": (6 * d,),
        "head.modulation": (1, 2, d),
        "head.head.weight": (out, d),
        "head.head.bias": (out,),
    }
    if spec.image_dim:
        i = spec.image_dim
        shapes |= {"img_emb.proj.0.weight": (i,), "img_emb.proj.0.bias": (i,)}
        shapes |= {"img_emb.proj.1.weight": (i, i), "img_emb.proj.1.bias": (i,)}
        shapes |= {"img_emb.proj.3.weight": (d, i), "img_emb.proj.3.bias": (d,)}
        shapes |= {"img_emb.proj.4.weight": (d,), "img_emb.proj.4.bias": (d,)}
    if spec.image_positions:
        shapes["img_emb.emb_pos"] = (1, spec.image_positions, spec.image_dim)
    if spec.fps_embedding:
        shapes["fps_embedding.weight"] = (2, d)
        shapes |= {"fps_projection.0.weight": (d, d), "fps_projection.0.bias": (d,)}
        shapes |= {"fps_projection.2.weight": (6 * d, d), "fps_projection.2.bias": (6 * d,)}
    return shapes


def transformer_tensors(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all tensors of a transformer."""
    tensors = outer_tensors(spec)
    for index in range(spec.num_layers):
        tensors |= block_tensors(spec, index)
    return tensors


def text_tensors(spec: TextSpec) -> dict[str, tuple[int, ...]]:
    """Names (transformers) and shapes of all tensors of a UMT5 encoder, the tied copy left out."""
    d, inner = spec.dim, spec.num_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (spec.vocab_size, d),
        "encoder.final_layer_norm.weight": (d,),
    }
    for index in range(spec.num_layers):
        block = f"encoder.block.{index}.layer"
        shapes |= {f"{block}.0.SelfAttention.{part}.weight": (inner, d) for part in "qkv"}
        shapes |= {
            f"{block}.0.SelfAttention.o.weight": (d, inner),
            f"{block}.0.SelfAttention.relative_attention_bias.weight": (
                spec.num_buckets,
                spec.num_heads,
            ),
            f"{block}.0.layer_norm.weight": (d,),
            f"{block}.1.DenseReluDense.wi_0.weight": (spec.ffn_dim, d),
            f"{block}.1.DenseReluDense.wi_1.weight": (spec.ffn_dim, d),
            f"{block}.1.DenseReluDense.wo.weight": (d, spec.ffn_dim),
            f"{block}.1.layer_norm.weight": (d,),
        }
    return shapes
