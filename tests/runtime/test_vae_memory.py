"""Bytes of decoding and encoding, found on the meta device."""

from __future__ import annotations

import pytest
import torch

from reelpool.models.presets import PRESETS
from reelpool.models.spec import VaeSpec
from reelpool.models.wan_vae import WanVae
from reelpool.runtime.meter import meter
from reelpool.runtime.vae_memory import NUM_STEPS, measure_vae
from reelpool.runtime.vae_stream import VaeStream

WAN21 = PRESETS["wan2.1-t2v-1.3b"].vae
SMALL = VaeSpec(
    base_dim=8,
    decoder_base_dim=8,
    z_dim=3,
    dim_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3),
    latents_std=(1.5, 0.7, 2.0),
)


@pytest.mark.parametrize(("tile", "gib"), [(256, 0.43), (384, 0.80), (448, 1.33)])
def test_a_720p_decode_in_tiles_stays_within_one_and_a_half_gib(tile, gib):
    memory = measure_vae(WAN21, 90, 160, tile, torch.bfloat16)
    assert gib < memory.card_bytes / 2**30 < min(1.5, gib + 0.03)
    assert 5.9 < memory.host_bytes / 2**30 < 7.0
    assert sum(made.num_bytes for made in memory.pieces) == memory.card_bytes


def test_whole_frames_leave_nothing_on_the_host():
    memory = measure_vae(WAN21, 30, 32, 0, torch.bfloat16, encodes=True)
    assert (memory.host_bytes, memory.num_tiles) == (0, 1)


@pytest.mark.parametrize("encodes", [False, True])
def test_the_figure_is_that_of_real_tensors_however_long_the_stream(encodes):
    expected = measure_vae(SMALL, 6, 7, 0, torch.float32, encodes=encodes).card_bytes
    torch.manual_seed(0)
    vae = WanVae(SMALL).requires_grad_(False)
    stream = VaeStream(vae, 6, 7)
    with torch.inference_mode(), meter(torch.device("cpu")) as live:
        for step in range(2 * NUM_STEPS):
            if encodes:
                stream.encode(torch.zeros(1, 3, 4 if step else 1, 48, 56))
            else:
                next(stream.decode(torch.zeros(1, 3, 1, 6, 7)))
    assert live.peak_bytes == pytest.approx(expected, rel=0.01)
