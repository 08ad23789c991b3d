"""Counted bytes against bytes worked out by hand, on real tensors and on the meta device."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from reelpool.runtime import meter as meter_module
from reelpool.runtime.meter import CardMemory, LiveTensors, meter, peak_of, resident_bytes

CPU, META = torch.device("cpu"), torch.device("meta")
MIB, GIB = 2**20, 2**30
DEVICES = pytest.mark.parametrize("device", [CPU, META], ids=str)
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@DEVICES
def test_peak_and_rest_are_exact(device):
    with meter(device) as count:
        first = torch.zeros(100, device=device)
        second = first + 1  # 800 bytes live
        del first
        third = second.to(torch.float64)  # 400 + 800
        del second
        assert (count.live_bytes, count.peak_bytes) == (800, 1200)
        del third
    assert (count.live_bytes, count.peak_bytes) == (0, 1200)


@DEVICES
def test_what_was_there_before_is_not_counted_through_views_either(device):
    weight, x = torch.ones(30, 20, device=device), torch.ones(4, 20, device=device)
    with meter(device) as count:
        transposed = weight.t()
        for view in (transposed, weight[3:], weight.view(-1), transposed.reshape(20, 30)):
            assert view.shape
        y = x @ transposed
        y.add_(1)  # in place: nothing new
        same = y.view(30, 4)[1:]
        assert count.peak_bytes == count.live_bytes == y.nbytes
        del y
        assert count.live_bytes == 4 * 30 * 4  # a view keeps the whole storage
        del same
        assert count.live_bytes == 0


def test_a_weight_that_comes_as_a_buffer_inside_is_not_counted():
    data = bytearray(4000)
    with meter(CPU) as count:
        weight = torch.frombuffer(data, dtype=torch.float32)
        total = weight.sum()
    assert count.peak_bytes == total.nbytes


@DEVICES
def test_all_parts_of_a_result_count(device):
    x = torch.ones(6, 10, device=device)
    with meter(device) as count:
        values, indices = x.max(dim=1)
    assert count.peak_bytes == values.nbytes + indices.nbytes == 6 * 12


@MODES
@DEVICES
def test_tensors_inside_of_composed_operators_count(device, mode):
    x = torch.ones(8, 100, dtype=torch.bfloat16, device=device)
    weight = torch.ones(100, dtype=torch.bfloat16, device=device)
    with mode(), meter(device) as count:
        normed = F.rms_norm(x, (100,), weight, 1e-6)
    assert count.live_bytes == normed.nbytes == 1600
    assert count.peak_bytes >= 2 * 3200  # float32 inside: the values, and their squares or products


def test_tensors_of_another_device_do_not_count():
    with meter(META) as count:
        torch.ones(1000)
        kept = torch.ones(10, device="meta")
    assert count.peak_bytes == kept.nbytes


def test_the_pieces_of_the_peak_are_told():
    with LiveTensors() as count:
        large = torch.zeros(1000)
        small = torch.zeros(10, dtype=torch.bfloat16)
        del large, small
        torch.zeros(5)
    assert [(p.num_bytes, p.shape, p.dtype) for p in count.at_peak] == [
        (4000, (1000,), torch.float32),
        (20, (10,), torch.bfloat16),
    ]
    assert "zeros" in count.at_peak[0].operator


@MODES
def test_attention_counts_as_fused_on_the_meta_device(mode):
    sizes = (1, 4, 3000, 16)
    q, k, v = (torch.empty(sizes, dtype=torch.bfloat16, device=META) for _ in range(3))
    bias = torch.zeros(3000, dtype=torch.bfloat16, device=META).expand(1, 1, 3000, 3000)
    for given in ({}, {"attn_mask": bias}):
        with mode(), meter(META) as count:
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, **given)
        assert (out.shape, out.dtype) == (sizes, torch.bfloat16)
        assert count.peak_bytes == out.nbytes + 4 * 3000 * 4  # a float32 for each query and head
    real = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with meter(CPU):
        counted = F.scaled_dot_product_attention(*real)
    assert torch.equal(counted, F.scaled_dot_product_attention(*real))


def test_an_error_inside_ends_the_count():
    count = LiveTensors()

    def fail() -> None:
        with count:
            torch.zeros(7)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    torch.zeros(1000)
    assert count.peak_bytes == 28


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's figures")
def test_growth_of_the_process_is_seen():
    def run() -> None:
        torch.ones(64 * MIB // 4)

    run()
    peak = peak_of(run)
    assert peak.live_bytes == 64 * MIB
    assert peak.process_bytes is not None
    assert 60 * MIB < peak.process_bytes < 80 * MIB
    assert resident_bytes() > 50 * MIB


def test_a_system_that_tells_nothing_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(meter_module, "STATUS", tmp_path / "none" / "status")
    monkeypatch.setattr(meter_module, "RESET", tmp_path / "none" / "clear_refs")
    assert resident_bytes() is None
    assert peak_of(lambda: torch.zeros(10)) == meter_module.Peak(40, None)


def test_a_card_is_asked_for_its_allocators_figures(monkeypatch):
    figures = {"now": 1000, "peak": 5000}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: figures["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: figures["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: figures.update(peak=figures["now"])
    )
    with meter(torch.device("cuda:0")) as count:
        assert isinstance(count, CardMemory)
        assert (count.live_bytes, count.peak_bytes) == (0, 0)
        figures.update(now=1400, peak=1900)
        assert (count.live_bytes, count.peak_bytes) == (400, 900)
    figures.update(now=9000, peak=9000)
    assert (count.live_bytes, count.peak_bytes) == (400, 900)
