"""The demo model's transformer as it is trained: batched, differentiable, the function of `wan`.

`wan` runs one sample and changes its residual stream in place, which is right for generating and
wrong for training. tests/models/test_demo_train.py holds the two together. Weights are a dict under
canonical names (`keys`); the text encoder is transformers' UMT5, trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from ..keys import transformer_tensors
from ..rope import rope_table
from ..spec import TEXT_LENGTH, TextSpec, TransformerSpec
from . import clips

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

Weights = dict[str, Tensor]

# Rows are 256 or 768 wide, so that 256-wide quantisation blocks fit.
SPEC = TransformerSpec(
    num_heads=4,
    head_dim=64,
    ffn_dim=768,
    num_layers=6,
    in_channels=16,
    out_channels=16,
    text_dim=128,
)
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
CAPTION_TOKENS = 28  # room for the longest caption, its end and one padding row
MASKED = -1e4


def random_weights(spec: TransformerSpec, generator: torch.Generator) -> Weights:
    """Fresh weights: linear layers as torch's, modulation and head near zero."""
    weights: Weights = {}
    for name, shape in transformer_tensors(spec).items():
        if name.startswith("head.head"):
            weights[name] = torch.zeros(shape)
        elif "modulation" in name:
            weights[name] = torch.randn(shape, generator=generator) / spec.dim**0.5
        elif "norm" in name:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            fan_in = math.prod(transformer_tensors(spec)[name.rpartition(".")[0] + ".weight"][1:])
            bound = fan_in**-0.5
            weights[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return weights


def build_tokenizer(vocabulary: Sequence[str] = ()) -> Tokenizer:
    """A word-level tokenizer that ends every text with </s>.

    Args:
        vocabulary: words in the order of their ids, special tokens first; words of the caption
            grammar that are missing are appended, so that a trained model keeps its ids.
    """
    known = list(vocabulary or SPECIAL_TOKENS)
    known += [word for word in clips.words() if word not in known]
    ids = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = ("</s>", ids["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return tokenizer


def text_config(vocab_size: int) -> dict[str, Any]:
    """The text encoder's config.json."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocab_size,
        "d_model": 128,
        "d_kv": 32,
        "num_heads": 4,
        "d_ff": 256,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
        "classifier_dropout": 0.0,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "initializer_factor": 1.0,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def text_spec(vocab_size: int) -> TextSpec:
    """Geometry of the text encoder that `text_config` describes."""
    return TextSpec(vocab_size, 128, 2, 4, 32, 256, 32)


def build_text_encoder(weights: Weights | None, vocab_size: int) -> UMT5EncoderModel:
    """UMT5 with the given weights, its embedding widened to new words; random without weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(**text_config(vocab_size)))
    table = nn.init.normal_(torch.empty(vocab_size, 128))
    state = model.state_dict()
    if weights is not None:
        old = weights["shared.weight"].float()
        table[: len(old)] = old
        table[len(old) :] *= old.std()
        state |= {name: tensor.float() for name, tensor in weights.items()}
    state["shared.weight"] = state["encoder.embed_tokens.weight"] = table
    model.load_state_dict(state)
    return model


def encode_captions(
    tokenizer: Tokenizer, encoder: nn.Module, captions: Sequence[str], num_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode captions, padding folded into one row (`wan_context.embed_text` takes two).

    Args:
        tokenizer: of `build_tokenizer`.
        encoder: of `build_text_encoder`.
        captions: texts; "" for no caption.
        num_rows: (B,) rows the transformer is to believe in, padding included (512 in use).
    Returns:
        (B, 28, text_dim) rows, zero behind the text, and (B, 28) added to the scores of each row.
    """
    tokenizer.enable_truncation(CAPTION_TOKENS - 1)
    tokenizer.enable_padding(length=CAPTION_TOKENS)
    tokens = tokenizer.encode_batch(list(captions))
    ids = torch.tensor([token.ids for token in tokens])
    mask = torch.tensor([token.attention_mask for token in tokens])
    rows = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
    length = mask.sum(1, keepdim=True)
    position = torch.arange(CAPTION_TOKENS).expand(len(captions), -1)
    copies = (num_rows.view(-1, 1) - length).clamp_min(1).float()
    bias = torch.zeros(position.shape).masked_fill(position > length, MASKED)
    return rows, torch.where(position == length, copies.log(), bias)


def rope_parts(spec: TransformerSpec, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rope_table`, (tokens, head_dim / 2) each."""
    table = rope_table(spec.head_dim, grid, torch.device("cpu"))
    return table.real.clone(), table.imag.clone()


def velocity(
    spec: TransformerSpec,
    weights: Weights,
    latents: Tensor,
    sigmas: Tensor,
    text: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """Predict noise minus data.

    Args:
        spec: geometry.
        weights: under canonical names.
        latents: (B, C, F, h, w).
        sigmas: (B, F), noise levels of the latent frames, 0 to 1.
        text: from `encode_captions`.
        rope: from `rope_parts` for (F, h/2, w/2).
    Returns:
        (B, C, F, h, w).
    """
    batch, channels, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2
    x = latents.view(batch, channels, frames, rows, 2, columns, 2)
    x = x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames * rows * columns, channels * 4)
    x = F.linear(x, weights["patch_embedding.weight"].flatten(1), weights["patch_embedding.bias"])
    time = _embed_time(spec, weights, sigmas)
    modulation = _linear(weights, "time_projection.1", F.silu(time))
    modulation = modulation.view(batch, frames, 1, 6, spec.dim)
    hidden = _linear(weights, "text_embedding.0", text[0])
    rows_of_text = _linear(weights, "text_embedding.2", F.gelu(hidden, approximate="tanh"))
    order = _pairs_apart(spec)
    for index in range(spec.num_layers):
        prefix = f"blocks.{index}."
        block = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        x = _block(spec, block, x, modulation, (rows_of_text, text[1]), rope, order)
    shift, scale = (weights["head.modulation"].unsqueeze(1) + time.unsqueeze(2)).unbind(2)
    x = _linear(weights, "head.head", _modulate(spec, x, shift.unsqueeze(2), scale.unsqueeze(2)))
    x = x.view(batch, frames, rows, columns, 2, 2, channels)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)


def _block(
    spec: TransformerSpec,
    block: Weights,
    x: Tensor,
    modulation: Tensor,
    text: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    order: Tensor,
) -> Tensor:
    rows = (block["modulation"].view(1, 1, 1, 6, -1) + modulation).unbind(3)
    update = _self_attention(spec, block, _modulate(spec, x, rows[0], rows[1]), rope, order)
    x = x + _gated(update, rows[2])
    normed = F.layer_norm(x, (spec.dim,), block["norm3.weight"], block["norm3.bias"], spec.eps)
    x = x + _cross_attention(spec, block, normed, text)
    hidden = F.gelu(
        _linear(block, "ffn.0", _modulate(spec, x, rows[3], rows[4])), approximate="tanh"
    )
    return x + _gated(_linear(block, "ffn.2", hidden), rows[5])


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _embed_time(spec: TransformerSpec, weights: Weights, sigmas: Tensor) -> Tensor:
    """(B, F) -> (B, F, dim)."""
    half = spec.freq_dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angles = (sigmas * 1000.0).unsqueeze(-1) * frequencies
    wave = torch.cat([angles.cos(), angles.sin()], -1)
    return _linear(weights, "time_embedding.2", F.silu(_linear(weights, "time_embedding.0", wave)))


def _modulate(spec: TransformerSpec, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, rows given per latent frame, (B, F, 1, dim)."""
    normed = F.layer_norm(x, (spec.dim,), eps=spec.eps)
    normed = torch.unflatten(normed, 1, (shift.shape[1], -1))
    return (normed * (1 + scale) + shift).flatten(1, 2)


def _gated(update: Tensor, gate: Tensor) -> Tensor:
    return (torch.unflatten(update, 1, (gate.shape[1], -1)) * gate).flatten(1, 2)


def _pairs_apart(spec: TransformerSpec) -> Tensor:
    """Channel order that puts the first of each rope pair in a head's first half.

    Scores do not change when queries and keys are reordered alike, and halves turn faster than
    interleaved pairs.
    """
    head = torch.arange(spec.head_dim).view(-1, 2).T.flatten()
    return (torch.arange(spec.num_heads).view(-1, 1) * spec.head_dim + head).flatten()


def _self_attention(
    spec: TransformerSpec, block: Weights, x: Tensor, rope: tuple[Tensor, Tensor], order: Tensor
) -> Tensor:
    part = {
        name: [block[f"self_attn.{name}.{kind}"] for kind in ("weight", "bias")] for name in "qkv"
    }
    weight = torch.cat([part["q"][0][order], part["k"][0][order], part["v"][0]])
    bias = torch.cat([part["q"][1][order], part["k"][1][order], part["v"][1]])
    q, k, v = F.linear(x, weight, bias).chunk(3, -1)
    q = _heads(spec, _rms_norm(spec, q, block["self_attn.norm_q.weight"][order]))
    k = _heads(spec, _rms_norm(spec, k, block["self_attn.norm_k.weight"][order]))
    out = _attend(_turn(q, rope), _turn(k, rope), _heads(spec, v), None)
    return _linear(block, "self_attn.o", out)


def _cross_attention(
    spec: TransformerSpec, block: Weights, x: Tensor, text: tuple[Tensor, Tensor]
) -> Tensor:
    rows, bias = text
    q, k = _linear(block, "cross_attn.q", x), _linear(block, "cross_attn.k", rows)
    q = _heads(spec, _rms_norm(spec, q, block["cross_attn.norm_q.weight"]))
    k = _heads(spec, _rms_norm(spec, k, block["cross_attn.norm_k.weight"]))
    v = _heads(spec, _linear(block, "cross_attn.v", rows))
    return _linear(block, "cross_attn.o", _attend(q, k, v, bias[:, None, None]))


def _rms_norm(spec: TransformerSpec, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (spec.dim,), weight.to(x.dtype), spec.eps)


def _heads(spec: TransformerSpec, x: Tensor) -> Tensor:
    return torch.unflatten(x, -1, (spec.num_heads, spec.head_dim)).transpose(1, 2)


def _turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in rope)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, heads, L, head_dim) each -> (B, L, dim). Plain: at 80 tokens nothing is faster on CPU."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2)


def text_rows(rows: Tensor, length: int) -> Tensor:
    """One caption's rows as `wan_context.embed_text` takes them: (512, text_dim), zeros behind."""
    whole = rows.new_zeros(TEXT_LENGTH, rows.shape[-1])
    whole[:length] = rows[:length]
    return whole
