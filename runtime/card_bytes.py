"""Bytes that a transformer takes on a card: its weights there, and one call's activations.

The activations are the same sequence of tensors that `models.wan` makes, each line one that comes
or goes, so the peak is the largest sum of a prefix; tests/property/test_memory_plan.py holds it
against the meter on the real code. What a quantised matrix's decoding makes is counted as on a GPU
(pieces of `linear.DEVICE_PIECE` values), unless the card is the CPU. Scratch memory inside of
kernels is not counted: the plan's reserve is for that. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..models.keys import block_tensors, outer_tensors
from ..models.quant_mix import counted_name, stored_type, value_bytes
from ..models.spec import TEXT_LENGTH, LatentShape, NumericsProfile, TransformerSpec, rounded_up

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value of a compute type
# Equal to linear.PIECE, DEVICE_PIECE and quant.CHUNK, DEVICE_CHUNK, which import torch (tested).
CPU_PIECE, DEVICE_PIECE = 2**22, 2**24
CPU_CHUNK, DEVICE_CHUNK = 2**20, 2**24
TEXT_KV_MIN_SHARE = 0.02  # equal to block_runner's (tested)
_PLAIN = ("f32", "f16", "bf16", "float64")  # what becomes the compute type on the card
_FLOAT32 = (
    "modulation", "norm3.", "time_embedding.", "emb_pos", "img_emb.proj.0.", "img_emb.proj.4.",
)  # fmt: skip  # weights that stay float32 (wan_weights)
# Bytes for each value that decoding a type takes besides its float32 result: measured on the meta
# device by the meter, rounded up at the third digit (tested against it).
_DECODE = {
    "fp8": 0.0, "q8_0": 0.188, "q6_k": 2.75, "q5_k": 2.5, "q5_1": 3.625, "q5_0": 3.626,
    "q4_k": 1.016, "q4_1": 2.5, "q4_0": 2.5, "iq4_nl": 3.516, "iq4_xs": 3.782, "q3_k": 2.5,
    "q2_k": 0.907, "mxfp4": 3.516, "nvfp4": 3.5, "iq3_s": 3.501, "iq3_xxs": 3.126, "iq2_s": 3.251,
    "iq2_xs": 3.501, "iq2_xxs": 3.391, "iq1_m": 1.753, "iq1_s": 1.908, "tq2_0": 2.25, "tq1_0": 5.0,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One call: some forwards of a step over blocks of a transformer.

    num_forwards: 2 where cond and uncond share a card. num_blocks: of the range, whose keys and
    values of the text may be kept. quant: of the weights, as `quant_mix.block_bytes` takes it.
    """

    spec: TransformerSpec
    shape: LatentShape
    numerics: NumericsProfile
    num_forwards: int
    num_blocks: int
    quant: str
    is_cpu: bool = False

    @property
    def size(self) -> int:
        """Bytes of a value of the compute type."""
        return SIZES[self.numerics.dtype]

    @property
    def num_tokens(self) -> int:
        """Tokens of a forward."""
        return self.spec.num_tokens(self.shape)

    @property
    def num_frames(self) -> int:
        """Latent frames."""
        return self.shape.frames // self.spec.patch_size[0]

    @property
    def chunk(self) -> int:
        """Tokens of the largest chunk that `wan.token_chunks` cuts."""
        per_frame, size = self.num_tokens // self.num_frames, self.numerics.token_chunk
        if size >= per_frame:
            return min(size // per_frame, self.num_frames) * per_frame
        return -(-per_frame // -(-per_frame // size))

    def wide(self, num_values: int) -> int:
        """Bytes of a float32 copy; none where the compute type is float32."""
        return 0 if self.size == 4 else 4 * num_values


def block_card_bytes(spec: TransformerSpec, quant: str, dtype: str) -> int:
    """Bytes of one block's weights on a card: quantised ones as stored, the rest in `dtype`."""
    kinds = counted_name(quant)
    return sum(
        _card_bytes(name, shape, stored_type(name, shape, kinds), dtype)
        for name, shape in block_tensors(spec, 0).items()
    )


def outer_card_bytes(spec: TransformerSpec, dtype: str) -> int:
    """Bytes of the weights outside of the blocks on a card."""
    return sum(
        _card_bytes(name, shape, "f32", dtype) for name, shape in outer_tensors(spec).items()
    )


def _card_bytes(name: str, shape: tuple[int, ...], kind: str, dtype: str) -> int:
    values = math.prod(shape)
    if kind in _PLAIN:
        return values * (4 if any(part in name for part in _FLOAT32) else SIZES[dtype])
    scales = 4 * shape[0] if kind == "fp8" else 0
    return math.ceil(values * value_bytes(kind)) + scales


def call_bytes(work: Work) -> int:
    """The most bytes that a call takes besides the weights, what it keeps for the next counted."""
    return _standing(work) + max(_peak(phase) for phase in _phases(work))


def _standing(work: Work) -> int:
    """What lives through a whole block: residual streams, time, contexts, kept keys, rope table."""
    spec, size, rows = work.spec, work.size, TEXT_LENGTH
    frames, image_rows = rounded_up(work.num_frames), rounded_up(spec.image_rows)
    streams = work.num_forwards * work.num_tokens * spec.dim * size
    times = work.num_forwards * 7 * frames * spec.dim * 4
    contexts = (work.num_forwards * rows + image_rows) * spec.dim * size
    rope = work.num_tokens * spec.head_dim // 2 * 8
    return streams + times + contexts + rope + _key_values(work)


def _key_values(work: Work) -> int:
    """Keys and values of text and image: of all blocks where they are kept, else of one."""
    spec = work.spec
    each = 2 * spec.dim * work.size
    total = 0
    for rows, count in ((TEXT_LENGTH, work.num_forwards), (spec.image_rows, 1)):
        if rows and spec.text_kv_share(work.num_tokens, rows) > TEXT_KV_MIN_SHARE:
            total += work.num_blocks * count * rows * each
        else:
            total += rows * each
    return total


def _phases(work: Work) -> Iterable[Sequence[int]]:
    """What comes and goes in each part of a forward, beside `_standing`."""
    spec, size = work.spec, work.size
    stream = work.num_tokens * spec.dim * size
    modulation = work.num_frames * 6 * spec.dim * 4
    # keys and values of a text, those of the forward before being there still
    norm = TEXT_LENGTH * spec.dim * 8 + work.wide(TEXT_LENGTH * spec.dim)
    yield [*_linear(work, TEXT_LENGTH, ["cross_attn.k", "cross_attn.v"], spec.dim), norm]
    inner = TEXT_LENGTH * (spec.text_dim + 3 * spec.dim) * size
    yield [inner]
    yield [modulation, *_self_attention(work)]
    copied = work.chunk * spec.dim * size if work.numerics.head_groups > 1 else 0
    yield [modulation, stream, *_rest_of_block(work, copied)]


def _self_attention(work: Work) -> list[int]:
    spec, num_tokens = work.spec, work.num_tokens
    stream = num_tokens * spec.dim * work.size
    groups = min(work.numerics.head_groups, spec.num_heads)
    if groups == 1:
        attend = stream + num_tokens * spec.num_heads * 4
        return [3 * stream, *_fill(work), attend]
    heads = -(-spec.num_heads // groups)
    group = num_tokens * heads * spec.head_dim * work.size
    attend = group + num_tokens * heads * 4
    first = [stream + 4 * num_tokens, *_fill_queries(work)]
    return [*first, 2 * group, *_fill_group(work, heads), attend]


def _fill(work: Work) -> list[int]:
    """Queries, keys and values of a chunk, all heads at once; all of it goes again."""
    values = work.chunk * work.spec.dim
    each = values * work.size
    product = _linear(work, work.chunk, _parts("qkv"), work.spec.dim)
    return [
        *_modulate(work),
        *product,
        -each,
        *_rms(work),
        *_rotate(work, values),
        -each,
        -3 * each,
    ]


def _fill_queries(work: Work) -> list[int]:
    values = work.chunk * work.spec.dim
    each = values * work.size
    product = _linear(work, work.chunk, _parts("qk"), work.spec.dim)
    square = [work.wide(values), 4 * values, -work.wide(values) - 4 * values]
    queries = [*_rms(work), *_rotate(work, values), -each]
    return [*_modulate(work), *product, -each, *queries, *square, -2 * each]


def _fill_group(work: Work, heads: int) -> list[int]:
    width = heads * work.spec.head_dim
    values = work.chunk * width
    normed, each = work.chunk * work.spec.dim * work.size, values * work.size
    made = [*_modulate(work), *_linear(work, work.chunk, _parts("v"), work.spec.dim, width), -each]
    made += _linear(work, work.chunk, _parts("k"), work.spec.dim, width)
    return [*made, work.wide(values), -each - work.wide(values) - normed]  # turned in float32


def _rest_of_block(work: Work, copied: int) -> list[int]:
    """A chunk's output projection, cross-attention and FFN."""
    spec, chunk = work.spec, work.chunk
    values = chunk * spec.dim
    each, wide = values * work.size, work.wide(values)
    gated = [2 * wide, -2 * wide]
    out = [copied, *_linear(work, chunk, _parts("o"), spec.dim), -copied, *gated, -each]
    normed = [wide + 4 * values, -wide - 4 * values + each] if spec.cross_norm else []
    query = [*_linear(work, chunk, ["cross_attn.q"], spec.dim), *_rms(work), -each]
    attended = 2 * each if spec.image_rows else each
    lse = chunk * spec.num_heads * 4
    cross = [attended + lse, -lse, *_linear(work, chunk, ["cross_attn.o"], spec.dim)]
    gone = -(each if spec.cross_norm else 0) - each - attended - each
    inner = chunk * spec.ffn_dim * work.size
    ffn = [*_modulate(work), *_linear(work, chunk, ["ffn.0"], spec.dim, spec.ffn_dim)]
    ffn += [*_linear(work, chunk, ["ffn.2"], spec.ffn_dim, spec.dim), -inner - each, *gated]
    return [*out, *normed, *query, *cross, gone, *ffn]


def _modulate(work: Work) -> list[int]:
    """LayerNorm and modulation of a chunk; what remains is a chunk in the compute type."""
    values = work.chunk * work.spec.dim
    scale = -(-work.chunk * work.num_frames // work.num_tokens) * work.spec.dim * 4
    narrow = [values * work.size, -4 * values] if work.size < 4 else []
    wide, sums = work.wide(values), 8 * work.chunk
    return [scale, wide + 4 * values + sums, -wide - sums, *narrow, -scale]


def _rms(work: Work) -> list[int]:
    """RMS norm of a chunk in float32, in two products; what remains is a chunk."""
    values = work.chunk * work.spec.dim
    most = work.wide(values) + 8 * values + 4 * work.chunk
    return [most, -most + values * work.size]


def _rotate(work: Work, values: int) -> list[int]:
    """In place in float32; else by a float32 copy, whose result follows and is dropped here."""
    each = values * work.size
    return [work.wide(values), each, -work.wide(values) - each] if work.size < 4 else []


def _parts(letters: str) -> list[str]:
    return [f"self_attn.{letter}" for letter in letters]


def _linear(work: Work, rows: int, names: list[str], width: int, outputs: int = 0) -> list[int]:
    """A product by stacked matrices of (`outputs` or dim, width); what remains is its result.

    A quantised matrix is decoded a piece at a time; the piece before goes when the next is there,
    and results of several pieces are joined at the end.
    """
    outputs = outputs or work.spec.dim
    quant = counted_name(work.quant)
    kinds = [stored_type(f"blocks.0.{name}.weight", (outputs, width), quant) for name in names]
    piece_values = CPU_PIECE if work.is_cpu else DEVICE_PIECE
    made, results = list[int](), 0
    for kind, run in groupby(kinds):
        count = outputs * len(list(run))
        step = max(1, count if kind in _PLAIN else piece_values // width)
        before = 0
        for start in range(0, count, step):
            piece = min(step, count - start)
            if kind not in _PLAIN:
                made += _decoded(work, kind, piece * width)
                made.append(-before)
                before = piece * width * work.size
            made.append(rows * piece * work.size)
            results += 1
        made.append(-before)
    total = rows * outputs * len(names) * work.size
    return [*made, total, -total] if results > 1 else made


def _decoded(work: Work, kind: str, num_values: int) -> list[int]:
    """A decoded piece; beside it what decodes one chunk."""
    chunk = min(num_values, CPU_CHUNK if work.is_cpu else DEVICE_CHUNK)
    scratch = work.wide(chunk) + math.ceil(chunk * _DECODE[kind])
    return [num_values * work.size, scratch, -scratch]


def _peak(changes: Iterable[int]) -> int:
    live = most = 0
    for change in changes:
        live += change
        most = max(most, live)
    return most
