"""Whatever is packed comes back; whatever is damaged is refused with WireFormatError."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from reelpool.errors import WireFormatError
from reelpool.runtime.wire import DTYPES, byte_view, from_bytes, pack, to_bytes, unpack

LIMIT = 2**24
META = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def tensors(draw: DrawFn) -> torch.Tensor:
    """Any dtype, rank 0-5, empty ones, transposed, strided, offset and expanded ones."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = 1
    for size in shape:
        count *= size
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, ((count + 1) * dtype.itemsize,), generator=generator)
    x = raw.to(torch.uint8)[dtype.itemsize :].view(dtype).reshape(shape)
    if shape:
        x = x.permute(*draw(st.permutations(range(len(shape)))))
    for axis, size in enumerate(x.shape):
        way = draw(st.sampled_from(["all", "strided", "later", "expanded"]))
        if way == "strided":
            x = x[(slice(None),) * axis + (slice(None, None, 2),)]
        elif way == "later" and size > 1:
            x = x.narrow(axis, 1, size - 1)
        elif way == "expanded" and size > 0:
            x = x.narrow(axis, 0, 1).expand(*x.shape[:axis], 3, *x.shape[axis + 1 :])
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and byte_view(a).tobytes() == byte_view(b).tobytes()
    )


named = st.dictionaries(st.text(max_size=6), tensors(), max_size=4)


@settings(max_examples=150, deadline=None)
@given(named, st.dictionaries(st.text(max_size=6), META, max_size=3), st.booleans())
def test_any_tensors_come_back_by_every_way(tensors, meta, verify):
    packet = pack(tensors, meta)
    framed = from_bytes(to_bytes(packet), LIMIT)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(packet, protocol=5, buffer_callback=buffers.append)
    for way in (packet, framed, pickle.loads(pickled, buffers=buffers)):
        back, back_meta = unpack(way, verify=verify)
        assert list(back) == list(tensors)
        assert all(same(back[name], tensors[name]) for name in tensors)
        assert repr(back_meta) == repr(meta)  # repr: nan equals nan, and types tell


FRAME = to_bytes(
    pack(
        {
            "latents": torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4),
            "mask": torch.tensor([True, False, True]),
            "empty": torch.empty(0, 5, dtype=torch.bfloat16),
            "scale": torch.tensor(0.5, dtype=torch.float8_e4m3fn),
        },
        {"job": "a", "steps": [1, 2, 3], "sigma": 0.25, "nested": {"none": None, "big": 2**63}},
    )
)
TENSORS, INFO = unpack(from_bytes(FRAME, LIMIT))


def refused_or_equal(data: bytes) -> bool:
    try:
        tensors, meta = unpack(from_bytes(data, LIMIT))
    except WireFormatError as error:
        return str(error).startswith("wire packet: found ")
    return (
        list(tensors) == list(TENSORS)
        and all(same(tensors[name], TENSORS[name]) for name in TENSORS)
        and meta == INFO
    )


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(FRAME) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    st.integers(0, len(FRAME)) | st.just(len(FRAME)),
    st.binary(max_size=4) | st.just(b""),
)
def test_a_damaged_frame_is_refused_or_equal(changes, length, tail):
    data = bytearray(FRAME)
    for place, value in changes:
        data[place] = value
    assert refused_or_equal(bytes(data[:length] + tail))


@pytest.mark.parametrize("value", [0, 0x7F, 0xC1, 0xFF])
def test_a_byte_changed_anywhere_is_refused_or_equal(value):
    for place in range(len(FRAME)):
        data = bytearray(FRAME)
        data[place] = value
        assert refused_or_equal(bytes(data)), place


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(WireFormatError):
        from_bytes(data, LIMIT)
