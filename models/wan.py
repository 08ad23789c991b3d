"""The Wan diffusion transformer: enter, blocks, leave, each on its own.

Plain functions over plain weights, so that any block range runs anywhere and weights may come and
go between blocks. One sample at a time: cond and uncond are two forwards by design. Hidden states
are (L, dim) with L tokens in frame, row, column order. Timesteps are given per latent frame, and
modulation stays per frame: at 14B, 832x480x81, 2.5 MiB instead of the 3.8 GiB of one row a token.

Norms, modulation and gates are computed in float32, matrix products in the compute dtype, the
residual stream is kept in the compute dtype. Norm, modulation, projections and the FFN take
`token_chunk` tokens at a time and add into the residual stream in place, so that no tensor wider
than the stream itself is ever whole.

Source: Wan2.1 and Wan2.2 repositories, wan/modules/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .rope import rotate
from .spec import LatentShape, NumericsProfile, TransformerSpec
from .wan_weights import BlockWeights, EnterWeights, LeaveWeights, TextWeights

# Few rows take other matrix kernels, and which ones depends on the number of threads: a row's bits
# were the same for every row count from 12 up with 1 and 2 threads, and not below (MKL, float32;
# 1 row also in bfloat16). Products over frames or text rows are therefore padded to this multiple.
ROW_MULTIPLE = 32


@dataclass(frozen=True)
class Hidden:
    """What travels between block ranges.

    x: (L, dim) compute dtype, the residual stream. `run_block` adds into it in place.
    e: (F, dim) float32, the time embedding of every latent frame, used by the head.
    e0: (F, 6, dim) float32, its projection, used by the blocks.
    """

    x: Tensor
    e: Tensor
    e0: Tensor


@dataclass(frozen=True)
class TextContext:
    """Text rows at the transformer's width, equal padding rows folded into one.

    Wan pads every prompt to 512 rows and attends to all of them without a mask. The padding rows
    are equal, so one of them with log(copies) added to its attention score stands for all: the
    same function, and for a prompt of 40 words (64 rows) an eighth of the keys, values and scores.

    rows: (n, dim), n <= 512. bias: (n,) float32 added to the scores, None when nothing was folded.
    """

    rows: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the text for one block, (n, heads, head_dim), and their score bias."""

    key: Tensor
    value: Tensor
    bias: Tensor | None


def enter(
    spec: TransformerSpec,
    weights: EnterWeights,
    latents: Tensor,
    timesteps: Tensor,
    numerics: NumericsProfile,
) -> Hidden:
    """Embed patches and time.

    Args:
        spec: geometry.
        weights: the layers before the blocks.
        latents: (1, in_channels, F, h, w) float32.
        timesteps: (F,) float32, 0 to 1000, one for each latent frame.
        numerics: the job's numerics profile.
    Returns:
        The hidden state before block 0.
    """
    patches = _patches(latents[0], spec.patch_size)
    x = weights.patch(patches.to(weights.patch.dtype))
    e = _time_embedding(spec, weights, timesteps)
    projected = weights.time_projection(F.silu(e).to(weights.time_projection.dtype))
    frames = timesteps.shape[0]
    return Hidden(x, e[:frames], projected[:frames].float().unflatten(1, (6, spec.dim)))


def embed_text(weights: TextWeights, prompt_embeds: Tensor) -> TextContext:
    """Bring encoded text to the transformer's width.

    Args:
        weights: the text projection.
        prompt_embeds: (512, text_dim), padding rows zero.
    Returns:
        The context for `text_key_value`.
    """
    length = prompt_embeds.shape[0]
    same_as_last = (prompt_embeds == prompt_embeds[-1]).all(dim=-1)
    copies = int(same_as_last.flip(0).long().cumprod(0).sum())
    kept = min(length, _rounded_up(length - copies + 1))
    rows, bias = prompt_embeds[:kept], None
    if kept < length:
        bias = torch.zeros(kept, device=rows.device)
        bias[-1] = math.log(length - kept + 1)
    hidden = weights.first(rows.to(weights.first.dtype))
    return TextContext(weights.second(F.gelu(hidden, approximate="tanh")), bias)


def text_key_value(spec: TransformerSpec, weights: BlockWeights, context: TextContext) -> TextKV:
    """Keys and values of the text for one block: the same in every step of a job.

    Args:
        spec: geometry.
        weights: the block.
        context: from `embed_text`.
    """
    key, value = weights.cross_kv(context.rows).chunk(2, dim=-1)
    key = F.rms_norm(key, (spec.dim,), weights.cross_norm_k, spec.eps)
    heads = (spec.num_heads, spec.head_dim)
    bias = None if context.bias is None else context.bias.to(key.dtype)
    return TextKV(key.unflatten(-1, heads), value.unflatten(-1, heads), bias)


def run_block(
    spec: TransformerSpec,
    weights: BlockWeights,
    hidden: Hidden,
    rope: Tensor,
    text: TextKV,
    numerics: NumericsProfile,
) -> None:
    """Run one block, adding into `hidden.x` in place.

    Args:
        spec: geometry.
        weights: the block.
        hidden: the state before the block; `x` holds the state after it on return.
        rope: (L, head_dim / 2) complex64 from `rope_table`.
        text: from `text_key_value`.
        numerics: the job's numerics profile.
    """
    modulation = weights.modulation + hidden.e0
    chunks = list(token_chunks(hidden.x.shape[0], modulation.shape[0], numerics.token_chunk))
    attended = _self_attention(spec, weights, hidden.x, modulation, rope, chunks, numerics)
    for chunk in chunks:
        x = hidden.x[chunk.start : chunk.stop]
        _add_gated(x, weights.out(attended[chunk.start : chunk.stop]), modulation, 2, chunk)
        x += _cross_attention(spec, weights, x, text, numerics)
        inner = weights.ffn_in(_modulate(spec, x, modulation, 3, chunk))
        torch.ops.aten.gelu_(inner, approximate="tanh")  # in place: a copy costs 1.5 % of a block
        _add_gated(x, weights.ffn_out(inner), modulation, 5, chunk)


def leave(
    spec: TransformerSpec,
    weights: LeaveWeights,
    hidden: Hidden,
    shape: LatentShape,
    numerics: NumericsProfile,
) -> Tensor:
    """Turn the last hidden state into a velocity.

    Returns:
        (1, out_channels, F, h, w) in the compute dtype.
    """
    modulation = weights.modulation + hidden.e.unsqueeze(1)
    chunks = token_chunks(hidden.x.shape[0], modulation.shape[0], numerics.token_chunk)
    rows = [
        weights.head(_modulate(spec, hidden.x[c.start : c.stop], modulation, 0, c)) for c in chunks
    ]
    pf, ph, pw = spec.patch_size
    grid = (shape.frames // pf, shape.height // ph, shape.width // pw)
    # (f, h, w, pf, ph, pw, c) -> (c, f pf, h ph, w pw)
    patches = torch.cat(rows).view(*grid, pf, ph, pw, spec.out_channels)
    whole = patches.permute(6, 0, 3, 1, 4, 2, 5)
    return whole.reshape(1, spec.out_channels, shape.frames, shape.height, shape.width)


@dataclass(frozen=True)
class TokenChunk:
    """Tokens [start, stop): part of one latent frame, or a whole number of frames."""

    start: int
    stop: int
    first_frame: int
    num_frames: int


def token_chunks(num_tokens: int, num_frames: int, size: int) -> Iterator[TokenChunk]:
    """Cut tokens into chunks of at most about `size` that never straddle a part of a frame.

    So a chunk is modulated by broadcasting rows of its frames, never by a row a token.

    >>> [(c.start, c.stop, c.num_frames) for c in token_chunks(12, 3, 8)]
    [(0, 8, 2), (8, 12, 1)]
    >>> [(c.start, c.stop, c.first_frame) for c in token_chunks(12, 2, 4)]
    [(0, 3, 0), (3, 6, 0), (6, 9, 1), (9, 12, 1)]
    """
    per_frame = num_tokens // num_frames
    if size >= per_frame:
        step = size // per_frame
        for frame in range(0, num_frames, step):
            count = min(step, num_frames - frame)
            yield TokenChunk(frame * per_frame, (frame + count) * per_frame, frame, count)
        return
    parts = -(-per_frame // size)
    for frame in range(num_frames):
        for part in range(parts):
            start, stop = per_frame * part // parts, per_frame * (part + 1) // parts
            yield TokenChunk(frame * per_frame + start, frame * per_frame + stop, frame, 1)


def _rounded_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _patches(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(C, F, h, w) -> (tokens, C * patch): the input of the patch embedding as a matrix product."""
    pf, ph, pw = patch_size
    channels, frames, height, width = latents.shape
    cut = latents.view(channels, frames // pf, pf, height // ph, ph, width // pw, pw)
    return cut.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pf * ph * pw)


def _time_embedding(spec: TransformerSpec, weights: EnterWeights, timesteps: Tensor) -> Tensor:
    """(F,) -> (F rounded up to ROW_MULTIPLE, dim) float32."""
    frames = timesteps.shape[0]
    timesteps = F.pad(timesteps, (0, _rounded_up(frames) - frames))
    half = spec.freq_dim // 2
    # float32 throughout, as diffusers does and as the demo model was trained
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)).item() * steps / half)
    angles = timesteps.float()[:, None] * frequencies
    wave = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return weights.time_out(F.silu(weights.time_in(wave)))


def _modulate(
    spec: TransformerSpec, x: Tensor, modulation: Tensor, row: int, chunk: TokenChunk
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32, back in the dtype of `x`.

    `modulation` is (F, rows, dim); shift is `row`, scale the row after it.
    """
    rows = modulation[chunk.first_frame : chunk.first_frame + chunk.num_frames]
    shift, scale = rows[:, row : row + 1], rows[:, row + 1 : row + 2] + 1
    normed = F.layer_norm(x.float(), (spec.dim,), eps=spec.eps)
    by_frame = normed.unflatten(0, (chunk.num_frames, -1))
    torch.addcmul(shift, by_frame, scale, out=by_frame)
    return normed.to(x.dtype)


def _add_gated(x: Tensor, update: Tensor, modulation: Tensor, row: int, chunk: TokenChunk) -> None:
    """X += update * gate, summed in float32, in place."""
    gate = modulation[chunk.first_frame : chunk.first_frame + chunk.num_frames, row : row + 1]
    shape = (chunk.num_frames, -1)
    if x.dtype == torch.float32:
        x.unflatten(0, shape).addcmul_(update.unflatten(0, shape), gate)
    else:
        total = x.float()
        total.unflatten(0, shape).addcmul_(update.float().unflatten(0, shape), gate)
        x.copy_(total)


def _self_attention(
    spec: TransformerSpec,
    weights: BlockWeights,
    x: Tensor,
    modulation: Tensor,
    rope: Tensor,
    chunks: list[TokenChunk],
    numerics: NumericsProfile,
) -> Tensor:
    """(L, dim) attention output before the output projection."""
    # a head's rows lie together in memory: CPU attention takes 3 % (bfloat16 16 %) less time
    sizes = (spec.num_heads, x.shape[0], spec.head_dim)
    q, k, v = (x.new_empty(sizes).transpose(0, 1) for _ in range(3))
    for chunk in chunks:
        part = _query_key_value(spec, weights, x, modulation, rope, chunk)
        for whole, piece in zip((q, k, v), part, strict=True):
            whole[chunk.start : chunk.stop] = piece
    return attention(q, k, v, numerics.attention).flatten(1)


def _query_key_value(
    spec: TransformerSpec,
    weights: BlockWeights,
    x: Tensor,
    modulation: Tensor,
    rope: Tensor,
    chunk: TokenChunk,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned queries and keys, and values, of a chunk: (chunk, heads, head_dim)."""
    tokens = slice(chunk.start, chunk.stop)
    heads = (spec.num_heads, spec.head_dim)
    q, k, v = weights.qkv(_modulate(spec, x[tokens], modulation, 0, chunk)).chunk(3, dim=-1)
    q = F.rms_norm(q, (spec.dim,), weights.norm_q, spec.eps).unflatten(-1, heads)
    k = F.rms_norm(k, (spec.dim,), weights.norm_k, spec.eps).unflatten(-1, heads)
    return rotate(q, rope[tokens]), rotate(k, rope[tokens]), v.unflatten(-1, heads)


def _cross_attention(
    spec: TransformerSpec,
    weights: BlockWeights,
    x: Tensor,
    text: TextKV,
    numerics: NumericsProfile,
) -> Tensor:
    """(chunk, dim) update from the text."""
    normed = x
    if weights.cross_norm is not None:
        normed = F.layer_norm(x.float(), (spec.dim,), *weights.cross_norm, spec.eps).to(x.dtype)
    query = F.rms_norm(weights.cross_q(normed), (spec.dim,), weights.cross_norm_q, spec.eps)
    query = query.unflatten(-1, (spec.num_heads, spec.head_dim))
    return weights.cross_out(
        attention(query, text.key, text.value, numerics.attention, text.bias).flatten(1)
    )
