"""The pools' contract in this process; the Ray pool's is in test_executor and test_ray_pool."""

import threading

import pytest
import torch

from reelpool.errors import Cancelled, ConfigError, WeightError
from reelpool.models.files import open_model
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.device import cpu_card
from reelpool.runtime.types import BlockCall, BlockRange, DecodeCall, ModelRef
from reelpool.runtime.wire import pack, unpack
from reelpool.scheduler.open_pool import describe_pool, open_pool
from reelpool.scheduler.pool import InProcessPool
from reelpool.scheduler.pool_spec import PoolSpec, parse_pool

FILES = open_model("demo")
MODEL = ModelRef("demo", FILES.digest, NumericsProfile())
SHAPE = FILES.spec.latent_shape(64, 64, 5)


@pytest.fixture
def pool():
    events = []
    opened = InProcessPool(cpu_card(0), 1, events.append)
    assert [event.kind for event in events] == ["worker_ready"]
    yield opened
    opened.close()


def finished(pool, ref):
    assert pool.wait([ref], timeout_s=60) == [ref]
    return pool.get(ref)


def step(pool, blocks, inputs, prompt):
    call = BlockCall(MODEL, "job", 0, ("cond",), blocks, SHAPE)
    return pool.submit("here", "run_blocks", call, inputs, prompt)


def first_inputs():
    latents = torch.randn(SHAPE.dims, generator=torch.Generator().manual_seed(0))
    return pack({"latents": latents, "timesteps": torch.full((SHAPE.frames,), 500.0)})


def test_references_are_arguments_of_later_calls(pool):
    prompt = pool.submit("here", "encode_text", MODEL, "a red ring")
    inputs = pool.put(first_inputs())
    whole = step(pool, BlockRange(0, 6, 6), inputs, prompt)
    head = step(pool, BlockRange(0, 2, 6), inputs, prompt)
    tail = step(pool, BlockRange(2, 6, 6), head, prompt)
    velocities = [unpack(finished(pool, ref))[0]["velocity.cond"] for ref in (whole, tail)]
    assert velocities[0].shape == SHAPE.dims
    assert torch.equal(*velocities)


def test_wait_gives_up_after_its_time_with_nothing(pool):
    release = threading.Event()
    pool._compute.submit(release.wait)  # the compute thread is busy
    late = pool.submit("here", "ping")
    assert pool.wait([late], timeout_s=0.01) == []
    release.set()
    assert finished(pool, late) > 0


def test_control_answers_while_the_card_computes(pool):
    release = threading.Event()
    pool._compute.submit(release.wait)
    assert finished(pool, pool.control("here", "status"))["doing"] == "idle"
    release.set()


def test_stop_cancels_calls_before_they_begin(pool):
    finished(pool, pool.control("here", "stop"))
    with pytest.raises(Cancelled):
        finished(pool, pool.submit("here", "encode_text", MODEL, "a red ring"))


def test_errors_of_a_call_come_back_as_they_are(pool):
    other = ModelRef("demo", "0" * 32, NumericsProfile())
    with pytest.raises(WeightError, match="digest"):
        finished(pool, pool.submit("here", "encode_text", other, "a red ring"))


def test_decode_calls_stream_frames(pool):
    latents = pool.put(pack({"latents": torch.zeros(SHAPE.dims)}))
    counts = []
    for start, stop in ((0, 1), (1, 2)):
        ref = pool.submit("here", "decode", DecodeCall(MODEL, "s", start, stop), latents)
        frames = unpack(finished(pool, ref))[0]["frames"]
        assert frames.dtype == torch.uint8
        counts.append(tuple(frames.shape))
    assert counts == [(1, 64, 64, 3), (4, 64, 64, 3)]
    finished(pool, pool.submit("here", "end_stream", "s"))
    finished(pool, pool.submit("here", "free"))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("auto", PoolSpec(None, None)),
        ("local:2", PoolSpec(2, None)),
        ("local:64,512 MiB", PoolSpec(64, 512 * 2**20)),
    ],
)
def test_pool_texts(text, spec):
    assert parse_pool(text) == spec


@pytest.mark.parametrize("text", ["", "local", "local:0", "local:65", "local:x", "ray"])
def test_other_texts_are_refused_with_what_would_do(text):
    with pytest.raises(ConfigError, match=r"--pool: .*local"):
        parse_pool(text)


def test_description_agrees_with_the_pool_that_opens():
    described = describe_pool("auto")
    opened = open_pool("auto", lambda event: None)
    try:
        assert [card.worker for card in described] == [info.name for info in opened.workers]
    finally:
        opened.close()
    assert [card.worker for card in describe_pool("local:2,1GiB")] == ["worker-0", "worker-1"]
    assert {card.memory_bytes for card in describe_pool("local:2,1GiB")} == {2**30}


def test_a_budget_that_is_none_is_refused():
    for text in ("local:1,", "local:1,much", "local:1,0"):
        with pytest.raises(ConfigError, match="--pool"):
            parse_pool(text)
