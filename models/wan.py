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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .rope import rotate
from .spec import LatentShape, NumericsProfile, TransformerSpec
from .wan_context import KeyValue, pad_rows
from .wan_weights import BlockWeights, EnterWeights, FpsWeights, LeaveWeights


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


def enter(
    spec: TransformerSpec,
    weights: EnterWeights,
    latents: Tensor,
    timesteps: Tensor,
    numerics: NumericsProfile,
    fps: float | None = None,
) -> Hidden:
    """Embed patches, time and, for models that are told, the frame rate.

    Args:
        spec: geometry.
        weights: the layers before the blocks.
        latents: (1, in_channels, F, h, w) float32.
        timesteps: (F,) float32, 0 to 1000, one for each latent frame.
        numerics: the job's numerics profile.
        fps: frames per second; None counts as the 24 that SkyReels-V2 makes.
    Returns:
        The hidden state before block 0.
    """
    patches = _patches(latents[0], spec.patch_size)
    x = weights.patch(patches.to(weights.patch.dtype))
    e = _time_embedding(spec, weights, timesteps)
    projected = weights.time_projection(F.silu(e).to(weights.time_projection.dtype)).float()
    if weights.fps is not None:
        projected += _fps_projection(weights.fps, fps)
    frames = timesteps.shape[0]
    return Hidden(x, e[:frames], projected[:frames].unflatten(1, (6, spec.dim)))


def run_block(
    spec: TransformerSpec,
    weights: BlockWeights,
    hidden: Hidden,
    rope: Tensor,
    text: KeyValue,
    numerics: NumericsProfile,
    image: KeyValue | None = None,
) -> None:
    """Run one block, adding into `hidden.x` in place.

    Args:
        spec: geometry.
        weights: the block.
        hidden: the state before the block; `x` holds the state after it on return.
        rope: (L, head_dim / 2) complex64 from `rope_table`.
        text: from `text_key_value`.
        numerics: the job's numerics profile.
        image: from `image_key_value`; without, the block attends to the text alone.
    """
    modulation = weights.modulation + hidden.e0
    chunks = list(token_chunks(hidden.x.shape[0], modulation.shape[0], numerics.token_chunk))
    tokens = _Tokens(spec, weights, hidden.x, modulation, rope)
    attended = _self_attention(tokens, chunks, numerics)
    for chunk in chunks:
        x = hidden.x[_of(chunk)]
        _add_gated(x, weights.out(attended[_of(chunk)].flatten(1)), modulation, 2, chunk)
        x += _cross_attention(spec, weights, x, text, image, numerics)
        update = _feed_forward(weights, _modulate(spec, x, modulation, 3, chunk))
        _add_gated(x, update, modulation, 5, chunk)
        del update


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


def _patches(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(C, F, h, w) -> (tokens, C * patch): the input of the patch embedding as a matrix product."""
    pf, ph, pw = patch_size
    channels, frames, height, width = latents.shape
    cut = latents.view(channels, frames // pf, pf, height // ph, ph, width // pw, pw)
    return cut.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pf * ph * pw)


def _time_embedding(spec: TransformerSpec, weights: EnterWeights, timesteps: Tensor) -> Tensor:
    """(F,) -> (F rounded up to ROW_MULTIPLE, dim) float32."""
    timesteps = pad_rows(timesteps.float()[:, None])
    half = spec.freq_dim // 2
    # float32 throughout, as diffusers does and as the demo model was trained
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)).item() * steps / half)
    angles = timesteps * frequencies
    wave = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return weights.time_out(F.silu(weights.time_in(wave)))


def _fps_projection(weights: FpsWeights, fps: float | None) -> Tensor:
    """(1, 6 dim) float32, added to the time projection of every frame.

    Source: SkyReels-V2 repository, skyreels_v2_infer/modules/transformer.py and the pipelines.
    """
    rows = pad_rows(weights.table[:1] if fps == 16 else weights.table[1:])
    return weights.second(F.silu(weights.first(rows)))[:1].float()


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


@dataclass(frozen=True)
class _Tokens:
    """What self-attention is computed from: a block's weights and its modulated input."""

    spec: TransformerSpec
    weights: BlockWeights
    x: Tensor
    modulation: Tensor
    rope: Tensor

    def normed(self, chunk: TokenChunk) -> Tensor:
        """(chunk, dim): what the projections take."""
        return _modulate(self.spec, self.x[_of(chunk)], self.modulation, 0, chunk)

    def empty_heads(self, num_heads: int) -> Tensor:
        """(L, heads, head_dim) not filled yet, a head's rows together in memory.

        So CPU attention takes 3 % (bfloat16 16 %) less time, and a group of heads is contiguous.
        """
        sizes = (num_heads, self.x.shape[0], self.spec.head_dim)
        return self.x.new_empty(sizes).transpose(0, 1)

    def normed_heads(self, x: Tensor, norm: Tensor, chunk: TokenChunk) -> Tensor:
        """Queries or keys (chunk, dim) normed and turned, as (chunk, heads, head_dim)."""
        normed = F.rms_norm(x, (self.spec.dim,), norm, self.spec.eps)
        return rotate(normed.unflatten(-1, (-1, self.spec.head_dim)), self.rope[_of(chunk)])


def _of(chunk: TokenChunk) -> slice:
    return slice(chunk.start, chunk.stop)


def _self_attention(tokens: _Tokens, chunks: list[TokenChunk], numerics: NumericsProfile) -> Tensor:
    """(L, heads, head_dim) before the output projection."""
    if numerics.head_groups > 1:
        return _attention_by_group(tokens, chunks, numerics)
    q, k, v = (tokens.empty_heads(tokens.spec.num_heads) for _ in range(3))
    for chunk in chunks:
        _fill(tokens, chunk, q, k, v)
    return attention(q, k, v, numerics.attention)


def _fill(tokens: _Tokens, chunk: TokenChunk, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values of a chunk. Its own tensors are gone before attention begins."""
    weights, where = tokens.weights, _of(chunk)
    query, key, value = weights.qkv(tokens.normed(chunk)).chunk(3, dim=-1)
    q[where] = tokens.normed_heads(query, weights.norm_q, chunk)
    k[where] = tokens.normed_heads(key, weights.norm_k, chunk)
    v[where] = value.unflatten(-1, (-1, tokens.spec.head_dim))


def _attention_by_group(
    tokens: _Tokens, chunks: list[TokenChunk], numerics: NumericsProfile
) -> Tensor:
    """The same, with keys and values of one group of heads at a time.

    A first pass makes all queries, and of the keys only what norms them: the mean square over the
    full width. Then every group makes its keys and values, and what it attends to takes the place
    of its queries. So beside the residual stream lives one tensor of its size, and 3 in the number
    of groups: with 8 of them 2.4 streams in all instead of 5. The price is a second product for the
    keys, and the modulation once for each group. The output projection sees all heads at once, as
    ever: nothing is summed in another order, and no quantised matrix is cut by columns.
    """
    num_heads = tokens.spec.num_heads
    num_groups = min(numerics.head_groups, num_heads)
    q = tokens.empty_heads(num_heads)
    key_scale = tokens.x.new_empty((tokens.x.shape[0], 1), dtype=torch.float32)
    for chunk in chunks:
        _fill_queries(tokens, chunk, q, key_scale)
    # one pair for all groups: a new one would lie beside the old one for a moment
    keys, values = (tokens.empty_heads(-(-num_heads // num_groups)) for _ in range(2))
    for group in range(num_groups):
        first, last = (num_heads * index // num_groups for index in (group, group + 1))
        k, v = keys[:, : last - first], values[:, : last - first]
        for chunk in chunks:
            _fill_group(tokens, chunk, first, key_scale, k, v)
        q[:, first:last] = attention(q[:, first:last], k, v, numerics.attention)
    return q


def _fill_queries(tokens: _Tokens, chunk: TokenChunk, q: Tensor, key_scale: Tensor) -> None:
    """Queries of a chunk, and 1 / RMS of its keys over the full width, (chunk, 1) float32."""
    spec, weights = tokens.spec, tokens.weights
    query, key = weights.qkv.rows(0, 2 * spec.dim)(tokens.normed(chunk)).chunk(2, dim=-1)
    q[_of(chunk)] = tokens.normed_heads(query, weights.norm_q, chunk)
    mean_square = key.float().square().mean(-1, keepdim=True)
    key_scale[_of(chunk)] = mean_square.add_(spec.eps).rsqrt_()


def _fill_group(
    tokens: _Tokens, chunk: TokenChunk, first: int, key_scale: Tensor, k: Tensor, v: Tensor
) -> None:
    """Keys and values of a chunk for the heads from `first` on that `k` and `v` hold."""
    spec, weights = tokens.spec, tokens.weights
    start, stop = first * spec.head_dim, (first + k.shape[1]) * spec.head_dim
    heads = (k.shape[1], spec.head_dim)
    normed = tokens.normed(chunk)
    v[_of(chunk)] = weights.qkv.rows(2 * spec.dim + start, 2 * spec.dim + stop)(normed).unflatten(
        -1, heads
    )
    key = weights.qkv.rows(spec.dim + start, spec.dim + stop)(normed).float()
    key.mul_(key_scale[_of(chunk)]).mul_(weights.norm_k[start:stop])
    k[_of(chunk)] = rotate(key.unflatten(-1, heads), tokens.rope[_of(chunk)])


def _feed_forward(weights: BlockWeights, x: Tensor) -> Tensor:
    inner = weights.ffn_in(x)
    torch.ops.aten.gelu_(inner, approximate="tanh")  # in place: a copy costs 1.5 % of a block
    return weights.ffn_out(inner)


def _cross_attention(
    spec: TransformerSpec,
    weights: BlockWeights,
    x: Tensor,
    text: KeyValue,
    image: KeyValue | None,
    numerics: NumericsProfile,
) -> Tensor:
    """(chunk, dim) update from the text and the image: attended one by one, then summed."""
    normed = x
    if weights.cross_norm is not None:
        normed = F.layer_norm(x.float(), (spec.dim,), *weights.cross_norm, spec.eps).to(x.dtype)
    query = F.rms_norm(weights.cross_q(normed), (spec.dim,), weights.cross_norm_q, spec.eps)
    query = query.unflatten(-1, (spec.num_heads, spec.head_dim))
    attended = attention(query, text.key, text.value, numerics.attention, text.bias)
    if image is not None:
        attended = attended + attention(query, image.key, image.value, numerics.attention)
    return weights.cross_out(attended.flatten(1))
