"""Bytes by quantisation against the tables of shared/facts/wan.md 1.2, to their printed digits."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reelpool.models.presets import PRESETS
from reelpool.models.quant import KINDS
from reelpool.models.quant_mix import QUANTS, block_bytes, other_bytes, transformer_bytes
from reelpool.models.spec import TransformerSpec

# The table prints 25.1 for pure Q4_K of 1.3B; the block sizes it names give 25.048 (26.3 MB: 46.4 M
# weights of 4.5 bits, 41 k of 32).
COLUMNS = ["bf16", "fp8", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_k", "q3_k_s", "q2_k"]
MIB_PER_BLOCK = {
    "wan2.1-t2v-1.3b": "88.6 44.3 47.2 36.5 32.9 29.6 26.7 25.0 19.2 15.1",
    "wan2.2-ti2v-5b": "312.2 156.2 166.1 128.3 115.5 103.5 93.3 88.1 67.3 53.3",
    "wan2.1-t2v-14b": "670.2 335.2 356.4 275.3 246.4 219.2 197.3 188.9 144.4 115.5",
    "wan2.2-t2v-a14b": "670.2 335.2 356.4 275.3 246.4 219.2 197.3 188.9 144.4 115.5",
    "wan2.1-i2v-14b-480p": "770.3 385.3 409.6 316.3 280.8 247.4 225.5 217.1 166.0 131.9",
}
GIB_OF_BLOCKS = {  # without the column of pure Q4_K
    "wan2.1-t2v-1.3b": "2.60 1.30 1.38 1.07 0.96 0.87 0.78 0.56 0.44",
    "wan2.2-ti2v-5b": "9.15 4.57 4.86 3.76 3.38 3.03 2.73 1.97 1.56",
    "wan2.1-t2v-14b": "26.18 13.09 13.92 10.75 9.62 8.56 7.71 5.64 4.51",
    "wan2.1-i2v-14b-480p": "30.09 15.05 16.00 12.36 10.97 9.66 8.81 6.48 5.15",
}
GIB_OF_THE_REST = {
    "wan2.1-t2v-1.3b": 0.05,
    "wan2.2-ti2v-5b": 0.17,
    "wan2.1-t2v-14b": 0.43,
    "wan2.1-i2v-14b-480p": 0.45,
}


@pytest.mark.parametrize("name", MIB_PER_BLOCK)
def test_bytes_of_a_block_are_the_table_s(name):
    spec = PRESETS[name].transformer
    for quant, mib in zip(COLUMNS, MIB_PER_BLOCK[name].split(), strict=True):
        assert f"{block_bytes(spec, quant) / 2**20:.1f}" == mib, quant


@pytest.mark.parametrize("name", GIB_OF_BLOCKS)
def test_bytes_of_all_blocks_and_of_the_rest_are_the_table_s(name):
    spec = PRESETS[name].transformer
    columns = [quant for quant in COLUMNS if quant != "q4_k"]
    for quant, gib in zip(columns, GIB_OF_BLOCKS[name].split(), strict=True):
        assert f"{spec.num_layers * block_bytes(spec, quant) / 2**30:.2f}" == gib, quant
    assert round(other_bytes(spec, "bf16") / 2**30, 2) == GIB_OF_THE_REST[name]


def test_16_bits_are_two_bytes_a_parameter():
    spec = PRESETS["wan2.1-flf2v-14b-720p"].transformer
    for quant in ("bf16", "fp16", ""):
        assert transformer_bytes(spec, quant) == 2 * spec.num_params
    assert other_bytes(spec, "q8_0") > other_bytes(spec, "bf16")  # norms and tables in float32


def test_what_a_file_is_found_to_be_is_counted_too():
    """Every label that `layouts.open_transformer` may give."""
    spec = PRESETS["wan2.1-t2v-14b"].transformer
    assert transformer_bytes(spec, "fp8_e4m3 scaled") == transformer_bytes(spec, "fp8")
    assert transformer_bytes(spec, "fp32") == 4 * spec.num_params
    matrices = 8 * 5120 * 5120 + 2 * 5120 * 13824
    mixed = {"Q2_K", "Q4_0", "Q5_0"}  # as names of files they are mixes
    for kind in KINDS.keys() - mixed - {"F16", "BF16", "F8_E4M3", "F8_E5M2"}:
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        expected = matrices // size * num_bytes + 4 * (spec.block_params - matrices)
        assert block_bytes(spec, kind.lower()) == expected, kind


def test_more_bits_take_more_bytes():
    spec = PRESETS["wan2.1-t2v-14b"].transformer
    order = "fp16 q8_0 fp8 q6_k q5_k_m q5_k_s q4_k_m q4_k_s q4_k iq4_xs q3_k_l q3_k_m q3_k_s q2_k"
    sizes = [transformer_bytes(spec, quant) for quant in order.split()]
    assert sizes == sorted(sizes, reverse=True)
    assert len({transformer_bytes(spec, quant) for quant in QUANTS}) >= len(QUANTS) - 5


def test_rows_that_are_no_whole_blocks_stay_in_16_bits():
    tiny = TransformerSpec(2, 12, 48, 2, 4, 4, text_dim=32)  # rows of 24 and 48 values
    matrices = 8 * 24 * 24 + 2 * 24 * 48
    small = tiny.block_params - matrices
    assert block_bytes(tiny, "q4_k_m") == 2 * matrices + 4 * small
    whole = TransformerSpec(2, 128, 512, 2, 4, 4)  # rows of 256 and 512
    attention, ffn = 6 * 256 * 256 * 144 // 256, 256 * 512 * 144 // 256
    raised = (2 * 256 * 256 + 256 * 512) * 210 // 256
    rest = 4 * (whole.block_params - 8 * 256 * 256 - 2 * 256 * 512)
    assert block_bytes(whole, "q4_k_m") == attention + ffn + raised + rest
