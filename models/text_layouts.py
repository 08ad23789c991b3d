"""Text encoders as people have them, seen as one: transformers' UMT5 names, geometry by shapes.

Three layouts: transformers (also ComfyUI's single files), Wan's own `.pth`, llama.cpp's GGUF; each
with any prefix in front. Nothing is read but shapes. GGUF and fp8 tensors stay quantised.

Source of the names: transformers' UMT5EncoderModel; Wan2.1 repository, wan/modules/t5.py;
llama.cpp, gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reelpool.errors import MissingTensor, WeightError

from .fp8 import with_scales
from .keys import text_tensors
from .spec import TextSpec
from .weights import RenamedSource, WeightSource, check_tensors, full_shape

WANTED = "Wan's text encoder: UMT5-XXL"
ADVICE = "usual files: umt5_xxl_fp16.safetensors, umt5-xxl-encoder-Q8_0.gguf"
SHARED = "shared.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"
ATTENTION, FFN = "layer.0.SelfAttention", "layer.1.DenseReluDense"


@dataclass(frozen=True)
class _Layout:
    """How one kind of file names the tensors.

    embedding: names of the table of words; any of them will do. block: what stands before a
    block's number. inner: transformers' name inside of a block to the file's, both without
    `.weight`.
    """

    embedding: tuple[str, ...]
    final_norm: str
    block: str
    inner: Mapping[str, str]

    @property
    def probe(self) -> str:
        """The tensor by which the layout is recognised."""
        return f"{self.block}.0.{self.inner[f'{ATTENTION}.q']}.weight"


_INNER = (
    *(f"{ATTENTION}.{part}" for part in "qkvo"),
    f"{ATTENTION}.relative_attention_bias",
    "layer.0.layer_norm",
    f"{FFN}.wi_0",
    f"{FFN}.wi_1",
    f"{FFN}.wo",
    "layer.1.layer_norm",
)


def _inner(*names: str) -> dict[str, str]:
    return dict(zip(_INNER, names, strict=True))


LAYOUTS = (
    _Layout(
        (SHARED, "encoder.embed_tokens.weight"), FINAL_NORM, "encoder.block", _inner(*_INNER)
    ),
    _Layout(
        ("token_embedding.weight",),
        "norm.weight",
        "blocks",
        _inner(
            "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding",
            "norm1", "ffn.gate.0", "ffn.fc1", "ffn.fc2", "norm2",
        ),
    ),
    _Layout(
        ("token_embd.weight",),
        "enc.output_norm.weight",
        "enc.blk",
        _inner(
            "attn_q", "attn_k", "attn_v", "attn_o", "attn_rel_b",
            "attn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm",
        ),
    ),
)  # fmt: skip

# what a file is that is not a UMT5 encoder: a part of a tensor's name, and the kind
_OTHERS = (
    (re.compile(r"(^|\.)text_model\.encoder\.layers\.0\.|\.resblocks\.0\."), "a CLIP encoder"),
    (re.compile(r"vision_model\.encoder\.layers\.0\."), "a CLIP image encoder"),
    (re.compile(r"(^|\.)blk\.0\.attn_q|(^|\.)layers\.0\.self_attn\.q_proj"), "a language model"),
    (re.compile(r"(^|\.)blocks\.0\.(self_attn|attn1)\."), "a diffusion transformer"),
    (re.compile(r"(^|\.)decoder\.(conv_in|conv1)\."), "a VAE"),
)


def open_text_encoder(
    source: WeightSource, config: Mapping[str, object] | None = None
) -> tuple[TextSpec, WeightSource]:
    """Recognise a UMT5 encoder and see it under transformers' names.

    Args:
        source: the file's tensors as stored.
        config: the content of its config.json, if there is one: epsilon and the reach of the
            position table cannot be seen from shapes. All else is taken from the shapes.
    Returns:
        Its geometry, and its weights under the names of `keys.text_tensors`, all checked.
    Raises:
        MissingTensor, ShapeMismatch: if a tensor is not there or does not fit.
        WeightError: if it is something else than a UMT5 encoder.
    """
    source = with_scales(source)
    names = set(source.names())
    layout, prefix = _recognise(names, source.where)
    pattern = re.compile(re.escape(f"{prefix}{layout.block}.") + r"(\d+)\.")
    num_layers = len({match[1] for name in names if (match := pattern.match(name))})
    stored = _stored_names(layout, prefix, num_layers, names)
    _check_tables(source, stored, num_layers, names)
    renamed = RenamedSource(source, stored)
    spec = _geometry(renamed, num_layers, config or {})
    check_tensors(renamed, text_tensors(spec))
    return spec, renamed


def _recognise(names: Iterable[str], where: str) -> tuple[_Layout, str]:
    """The layout of the names, and the prefix that all of them have."""
    for layout in LAYOUTS:
        for name in names:
            prefix = name.removesuffix(layout.probe)
            if prefix != name and (not prefix or prefix.endswith(".")):
                return layout, prefix
    for pattern, kind in _OTHERS:
        if any(map(pattern.search, names)):
            raise WeightError(where, kind, WANTED, ADVICE)
    raise WeightError(where, "no names of a text encoder", WANTED, ADVICE)


def _stored_names(layout: _Layout, prefix: str, num_layers: int, names: set[str]) -> dict[str, str]:
    """Transformers' names to those in the file, whether they are there or not."""
    tables = [prefix + name for name in layout.embedding]
    stored = {
        SHARED: next((name for name in tables if name in names), tables[0]),
        FINAL_NORM: prefix + layout.final_norm,
    }
    for index in range(num_layers):
        for ours, theirs in layout.inner.items():
            name = f"{prefix}{layout.block}.{index}.{theirs}.weight"
            stored[f"encoder.block.{index}.{ours}.weight"] = name
    return stored


def _check_tables(
    source: WeightSource, stored: Mapping[str, str], num_layers: int, names: set[str]
) -> None:
    """UMT5 has a table of relative positions in every block, T5 only in the first."""
    for index in range(num_layers):
        name = stored[f"encoder.block.{index}.{ATTENTION}.relative_attention_bias.weight"]
        if name not in names:
            raise MissingTensor(
                source.where,
                name,
                "a table of positions in every block",
                f"T5 encoders such as t5xxl have only one; {WANTED}, {ADVICE}",
            )


def _geometry(source: WeightSource, num_layers: int, config: Mapping[str, object]) -> TextSpec:
    """Sizes by shapes; what they cannot tell by the config, or as UMT5-XXL has it."""
    vocab_size, _ = full_shape(source, SHARED, 2)
    (dim,) = full_shape(source, FINAL_NORM, 1)
    inner, _ = full_shape(source, f"encoder.block.0.{ATTENTION}.q.weight", 2)
    table = f"encoder.block.0.{ATTENTION}.relative_attention_bias.weight"
    num_buckets, num_heads = full_shape(source, table, 2)
    ffn_dim, _ = full_shape(source, f"encoder.block.0.{FFN}.wi_0.weight", 2)
    if inner % num_heads:
        table = source.info(table).name
        found = f"{inner} rows of queries for the {num_heads} heads of tensor {table}"
        raise WeightError(source.where, found, "as many for every head")
    for key, expected in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
        if config.get(key, expected) != expected:
            raise WeightError(source.where, f"{key} {config[key]!r} in its config.json", expected)
    defaults = TextSpec()
    max_distance = config.get("relative_attention_max_distance", defaults.max_distance)
    if type(max_distance) is not int or max_distance <= num_buckets // 4:
        found = f"relative_attention_max_distance {max_distance!r} in its config.json"
        raise WeightError(source.where, found, f"a whole number above {num_buckets // 4}")
    eps = config.get("layer_norm_epsilon", defaults.eps)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        found = f"layer_norm_epsilon {eps!r} in its config.json"
        raise WeightError(source.where, found, "a number from 0 to 1")
    return TextSpec(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=inner // num_heads,
        ffn_dim=ffn_dim,
        num_buckets=num_buckets,
        max_distance=max_distance,
        eps=float(eps),
    )
