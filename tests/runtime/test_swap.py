"""Blocks that come by give what blocks that stay give, and leave nothing behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file

from reelpool.errors import Cancelled, MissingTensor, WeightError
from reelpool.models.files import open_model
from reelpool.models.lora import Lora, open_lora
from reelpool.models.quant import Quantised
from reelpool.models.spec import LatentShape
from reelpool.models.wan import Hidden
from reelpool.models.wan_weights import load_block, tensors_of
from reelpool.models.weights import SafetensorsSource
from reelpool.runtime.arena import ALIGNMENT, CardCopies, Packer, moved, packed_bytes, place_block
from reelpool.runtime.block_runner import BlockRunner
from reelpool.runtime.residency import Residency, spread
from reelpool.runtime.swap import BlockStream
from reelpool.runtime.types import BlockRange
from tests.lora_files import TEXT, Source, entries_of, forward_of, random_weights, write
from tests.tiny_models import FLOAT32, latents_of, open_runner, prompt_rows, velocity

NUM_BLOCKS = 4
WHOLE = BlockRange(0, NUM_BLOCKS, NUM_BLOCKS)
CPU = torch.device("cpu")
T2V = replace(TEXT, num_layers=NUM_BLOCKS)
I2V = replace(T2V, in_channels=8, image_dim=24, image_positions=6)
MIX = {".v.": "Q8_0", "ffn.2": "Q4_1", "": "Q4_0"}  # as files mix them


def quantised(name, matrix, form):
    """One matrix of a block as a file of that form stores it."""
    if form == "fp8":
        scale = matrix.abs().amax(1) / 448
        data = (matrix / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        return Quantised(data, "F8_E4M3", tuple(matrix.shape), scale)
    kind = next(kind for part, kind in MIX.items() if part in name)
    data = quantize(matrix.numpy(), GGMLQuantizationType[kind])
    return Quantised(torch.from_numpy(data), kind, tuple(matrix.shape))


def weights_of(spec, form):
    weights = random_weights(spec)
    if form in ("bfloat16", "float16"):
        return {name: tensor.to(getattr(torch, form)) for name, tensor in weights.items()}
    if form == "float32":
        return weights
    for name, tensor in weights.items():
        # every second block keeps its queries plain: layouts of different size in one ring
        is_plain = ".q." in name and name.startswith(("blocks.0", "blocks.2"))
        if name.startswith("blocks.") and tensor.ndim == 2 and not is_plain:
            weights[name] = quantised(name, tensor, form)
    return weights


def runner_of(spec, weights, residency=None, dtype="float32"):
    numerics = replace(FLOAT32, dtype=dtype)
    return BlockRunner(spec, Source(weights), numerics, CPU, residency)


def branches(spec):
    one = forward_of(spec)
    return [one, replace(one, text_key="u", prompt_embeds=prompt_rows(0, spec.text_dim))]


def residencies(total=NUM_BLOCKS):
    for count in range(total + 1):
        for ring in (1, 2, 3):
            yield Residency(frozenset(spread(total, count)), ring)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("blocks-")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == []


@pytest.mark.parametrize(
    ("form", "dtype", "spec"),
    [
        ("float32", "float32", T2V),
        ("bfloat16", "bfloat16", I2V),
        ("float16", "bfloat16", T2V),
        ("bfloat16", "float32", T2V),
        ("gguf", "float32", I2V),
        ("gguf", "bfloat16", T2V),
        ("fp8", "float32", T2V),
        ("fp8", "bfloat16", I2V),
    ],
)
def test_every_number_of_residents_and_slots_gives_the_same_bits(form, dtype, spec):
    weights, forwards = weights_of(spec, form), branches(spec)
    expected = runner_of(spec, weights, dtype=dtype).run(WHOLE, forwards)
    assert not torch.equal(*expected)
    for residency in residencies():
        runner = runner_of(spec, weights, residency, dtype)
        for _ in range(2):
            given = runner.run(WHOLE, forwards)
            assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True)), residency
        runner.free()


@pytest.mark.parametrize("form", ["float32", "gguf", "fp8"])
def test_loras_beside_streamed_weights_change_no_bit_and_do_not_pile_up(tmp_path, form):
    spec, files = I2V, []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.safetensors"
        save_file(write("comfyui", entries_of(spec, seed)), path)
        files.append(open_lora(path))
    calls = [[Lora(files[0], 0.7), Lora(files[1], -0.4)], [Lora(files[1])], []]
    weights, forwards = weights_of(spec, form), branches(spec)
    whole = runner_of(spec, weights)
    expected = [whole.run(WHOLE, forwards, loras=loras) for loras in calls]
    for residency in residencies():
        runner = runner_of(spec, weights, residency)
        for loras, wanted in zip(calls, expected, strict=True):
            given = runner.run(WHOLE, forwards, loras=loras)
            assert all(torch.equal(*pair) for pair in zip(given, wanted, strict=True)), residency
        kept = {
            part
            for held in runner._loras._held.values()
            for part in held.changes
            if part.startswith("blocks.")
        }
        assert kept == {f"blocks.{index}" for index in runner._blocks}
        runner.free()


@pytest.mark.parametrize("cut", range(1, NUM_BLOCKS))
def test_ranges_of_a_split_change_no_bit(cut):
    weights, forwards = weights_of(I2V, "gguf"), branches(I2V)
    expected = runner_of(I2V, weights).run(WHOLE, forwards)
    first, second = BlockRange(0, cut, NUM_BLOCKS), BlockRange(cut, NUM_BLOCKS, NUM_BLOCKS)
    for residency in residencies():
        apart = [runner_of(I2V, weights, residency) for _ in range(2)]
        one = runner_of(I2V, weights, residency)  # takes both ranges, and the whole in between
        for runners in (apart, [one, one]):
            hidden = runners[0].run(first, forwards)
            assert all(isinstance(state, Hidden) for state in hidden)
            moved_on = [
                replace(f, latents=None, timesteps=None, hidden=state)
                for f, state in zip(forwards, hidden, strict=True)
            ]
            given = runners[1].run(second, moved_on)
            assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
        assert torch.equal(one.run(WHOLE, forwards)[0], expected[0])
        assert set(one._blocks) <= residency.resident or not one._stream.order
        for runner in (*apart, one):
            runner.free()


def test_slots_are_gone_before_other_blocks_take_their_place(monkeypatch):
    runner = runner_of(T2V, weights_of(T2V, "float32"), Residency(frozenset({3}), 1))
    runner.load(BlockRange(0, 3, NUM_BLOCKS))
    assert runner._stream.num_bytes
    held = []

    def place(*arguments):
        held.append(runner._stream.num_bytes)
        return place_block(*arguments)

    monkeypatch.setattr("reelpool.runtime.block_runner.place_block", place)
    runner.load(BlockRange(2, 4, NUM_BLOCKS))
    assert (held, set(runner._blocks)) == ([0, 0], {2, 3})
    runner.load(BlockRange(0, 3, NUM_BLOCKS))  # 2 has no place any more, 3 keeps its own
    assert set(runner._blocks) == {3}
    runner.free()


def test_the_demo_runs_in_less_than_its_weights():
    files, steps = open_model("demo"), torch.tensor([900.0, 40.0])
    inputs = latents_of(LatentShape(16, 2, 8, 8)), steps, prompt_rows(12, 128)
    expected = velocity(open_runner(files), *inputs)
    total = files.spec.transformer.num_layers
    residency = Residency(frozenset(spread(total, 1)), 2)
    runner = BlockRunner(files.spec.transformer, files.transformer, FLOAT32, CPU, residency)
    assert torch.equal(velocity(runner, *inputs), expected)
    assert runner.weight_bytes < 4 * files.spec.transformer.num_params
    runner.free()


@pytest.mark.parametrize("num_resident", range(NUM_BLOCKS))
def test_a_run_that_is_stopped_leaves_no_thread_and_the_next_is_right(num_resident):
    weights, forwards = weights_of(T2V, "float32"), branches(T2V)
    expected = runner_of(T2V, weights).run(WHOLE, forwards)
    runner = runner_of(T2V, weights, Residency(frozenset(spread(NUM_BLOCKS, num_resident)), 1))

    for stop in range(NUM_BLOCKS):

        def before(index, stop=stop):
            if index == stop:
                raise Cancelled()

        with pytest.raises(Cancelled):
            runner.run(WHOLE, forwards, before)
        assert threads() == []
        given = runner.run(WHOLE, forwards)
        assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    runner.free()
    assert threads() == []


class Counted(Source):
    """Counts the reads of each tensor."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = dict.fromkeys(tensors, 0)

    def matrix(self, name):
        self.reads[name] += 1
        return super().matrix(name)

    def get(self, name):
        return self.matrix(name)


def settled(stream, count):
    """The copies, when the ring is full again."""
    end = time.monotonic() + 10
    while stream.copied[0] < count and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.02)  # one too many would come now
    return stream.copied


@pytest.mark.parametrize("ring", [1, 2])
def test_a_streamed_block_is_read_and_copied_once_a_step(ring):
    source, forwards = Counted(weights_of(T2V, "gguf")), branches(T2V)
    runner = BlockRunner(T2V, source, FLOAT32, CPU, Residency(frozenset({0}), ring))
    runner.load(WHOLE)
    stream, streamed = runner._stream, (1, 2, 3)
    sizes = [packed_bytes(runner._read, index) for index in streamed]
    assert sizes[0] < sizes[1]
    reads = dict.fromkeys(range(NUM_BLOCKS), 0)
    for step in range(1, 4):
        runner.run(WHOLE, forwards)
        copies, num_bytes = settled(stream, step * len(streamed) + ring)
        assert copies == step * len(streamed) + ring
        whole, rest = divmod(copies, len(streamed))
        assert num_bytes == whole * sum(sizes) + sum(sizes[:rest])
        before = reads
        reads = {i: source.reads[f"blocks.{i}.self_attn.o.weight"] for i in range(NUM_BLOCKS)}
        if step > 1:
            assert [reads[i] - before[i] for i in range(NUM_BLOCKS)] == [0, 1, 1, 1]
    runner.free()


def test_bytes_on_the_card_are_fixed_and_less_than_the_model():
    weights, forwards = weights_of(T2V, "float32"), branches(T2V)
    whole = runner_of(T2V, weights)
    expected = whole.run(WHOLE, forwards)
    runner = runner_of(T2V, weights, Residency(frozenset(), 1))
    held = set()
    for _ in range(3):
        assert torch.equal(runner.run(WHOLE, forwards)[0], expected[0])
        held.add(runner.weight_bytes)
    assert len(held) == 1
    block = packed_bytes(runner._read, 0)
    assert runner._stream.num_bytes == block
    assert runner._stream.host_bytes == 2 * block
    assert held.pop() < whole.weight_bytes - 2 * block
    runner.free()
    assert runner.weight_bytes == 0


def test_residents_lie_in_memory_of_the_card_and_are_all_there_when_they_fit():
    weights = weights_of(T2V, "float32")
    runner = runner_of(T2V, weights, Residency(frozenset({1}), 3))
    runner.load(WHOLE)
    assert set(runner._blocks) == set(range(NUM_BLOCKS))
    assert threads() == []
    stored = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    for block in runner._blocks.values():
        assert not stored & {tensor.untyped_storage().data_ptr() for tensor in tensors_of(block)}


@pytest.mark.parametrize("bad", range(NUM_BLOCKS))
def test_what_is_wrong_with_a_block_reaches_the_caller(tmp_path, bad):
    weights = weights_of(T2V, "float32")
    name = f"blocks.{bad}.ffn.2.weight"
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    runner = BlockRunner(T2V, source, FLOAT32, CPU, Residency(frozenset(), 2))
    seen = []
    for _ in range(2):
        with pytest.raises(WeightError, match=rf"blocks\.{bad}\.ffn\.2\.weight with NaN"):
            runner.run(WHOLE, branches(T2V), seen.append)
        assert threads() == []
    assert seen == 2 * list(range(bad + 1))


def test_a_missing_tensor_is_said_as_itself(tmp_path):
    weights = weights_of(T2V, "float32")
    del weights["blocks.3.modulation"]
    save_file(weights, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    runner = BlockRunner(T2V, source, FLOAT32, CPU, Residency(frozenset(), 1))
    with pytest.raises(MissingTensor, match=r"blocks\.3\.modulation"):
        runner.run(WHOLE, branches(T2V))
    assert threads() == []


def test_a_runner_that_is_dropped_takes_its_threads_along():
    runner = runner_of(T2V, weights_of(T2V, "float32"), Residency(frozenset(), 2))
    runner.run(WHOLE, branches(T2V))
    assert len(threads()) == 2  # the next step's blocks are on their way; the fixture waits
    del runner


LEFT_OPEN = """
import torch
from reelpool.runtime.swap import BlockStream

def load(index, fill):
    return (fill([torch.zeros(2**26, dtype=torch.uint8)], torch.uint8),)

stream = BlockStream(load, torch.device("cpu"), 1)
stream.open((0, 1, 2))
with stream.use(0):
    pass
"""


def test_a_process_may_end_while_blocks_are_on_their_way():
    ran = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_threads_that_cannot_be_started_leave_nothing_open(monkeypatch):
    stream, start = BlockStream(numbered, CPU, 1), threading.Thread.start

    def refuse(thread):
        if "copy" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="new thread"):
                stream.open((0, 1))
            assert threads() == []
    stream.open((0, 1))
    with stream.use(0) as (values,):
        assert (values == 0).all()
    stream.close()


def numbered(index, fill):
    """A block of one tensor that holds its own number."""
    return (fill([torch.full((5000,), index, dtype=torch.int32)], torch.int32),)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_nothing_is_overwritten_while_its_turn_lasts(num_slots):
    stream = BlockStream(numbered, CPU, num_slots)
    order = (0, 3, 4, 7)
    stream.open(order)
    for _ in range(3):
        for index in order:
            with stream.use(index) as (values,):
                time.sleep(0.003)
                assert (values == index).all()
    stream.close()
    assert (stream.num_bytes, stream.host_bytes, stream.copied) == (0, 0, (0, 0))


@pytest.mark.parametrize(("compute", "copy"), [(0.05, 0.03), (0.03, 0.05)])
def test_copies_hide_behind_the_computing(compute, copy):
    """Paced, so that it shows: a pass takes the longer of the two, not their sum."""
    stream = BlockStream(numbered, CPU, 2, copy_gb_s=20000 / copy / 1e9)
    order = tuple(range(6))
    stream.open(order)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for index in order:
            with stream.use(index):
                time.sleep(compute)
        times.append(time.perf_counter() - began)
    stream.close()
    assert 0.04 * len(order) < min(times[1:]) < 0.065 * len(order)
    assert stream.waited < 0.03 * 3 * len(order) if compute > copy else stream.waited > 0.1


def test_closing_does_not_wait_for_a_paced_copy():
    stream = BlockStream(numbered, CPU, 1, copy_gb_s=1e-6)  # 20 s
    stream.open((0, 1))
    began = time.perf_counter()
    stream.close()
    assert time.perf_counter() - began < 5


def test_blocks_of_one_kind_are_laid_out_alike():
    weights = weights_of(I2V, "float32")
    offsets = []
    for index in range(NUM_BLOCKS):
        buffer = torch.zeros(2**20, dtype=torch.uint8)
        packer = Packer(buffer)
        block = load_block(I2V, Source(weights), index, torch.bfloat16, packer)
        assert packer.num_bytes == packed_bytes(
            lambda i, fill: load_block(I2V, Source(weights), i, torch.bfloat16, fill), index
        )
        offsets.append([t.data_ptr() - buffer.data_ptr() for t in tensors_of(block)])
        assert all(offset % ALIGNMENT == 0 for offset in offsets[-1])
        plain = load_block(I2V, Source(weights), index, torch.bfloat16)
        other = torch.zeros_like(buffer)
        copies = CardCopies(CPU)
        copies.copy(other, buffer, copies.mark())
        assert copies.num_bytes == buffer.nbytes
        for ours, theirs in zip(tensors_of(moved(block, other)), tensors_of(plain), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.untyped_storage().data_ptr() == other.data_ptr()
    assert all(each == offsets[0] for each in offsets)


def test_residents_are_spread():
    assert spread(40, 0) == ()
    assert spread(5, 5) == (0, 1, 2, 3, 4)
    for total in range(1, 41):
        for count in range(1, total + 1):
            places = spread(total, count)
            gaps = [b - a for a, b in zip(places, (*places[1:], total + places[0]), strict=True)]
            assert len(set(places)) == count
            assert max(gaps) - min(gaps) <= 1  # the last one closes the ring


def test_no_slot_for_a_block_that_does_not_stay_is_a_mistake():
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        Residency(frozenset({0, 2}), 0).streamed(0, 4)
    assert Residency(frozenset(range(4)), 0).streamed(0, 4) == ()
