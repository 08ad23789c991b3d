"""A packet: out-of-band pickling, no copies, and every kind of damage named."""

import pickle
import struct
import threading
import tracemalloc
import zlib

import msgpack
import numpy as np
import pytest
import torch

from reelpool.errors import WireFormatError
from reelpool.runtime import wire
from reelpool.runtime.wire import Packet, frame_bytes, from_bytes, pack, to_bytes, unpack

LIMIT = 2**24
ROW = ["x", "float32", [2], 8, zlib.crc32(bytes(8))]
ZEROS = np.zeros(8, dtype=np.uint8)


def header_of(content: object, version: int = wire.VERSION) -> bytes:
    body = msgpack.packb(content)
    return msgpack.packb([version, zlib.crc32(body), body])


def packet_of(row: list[object], buffer: np.ndarray = ZEROS) -> Packet:
    return Packet(header_of({"tensors": [row], "meta": {}}), (buffer,))


def test_pickle_keeps_the_buffers_out_of_band():
    packet = pack({"a": torch.randn(1000, 1000), "b": torch.zeros(3)})
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packet, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000
    assert [buffer.raw().nbytes for buffer in buffers] == [4_000_000, 12]
    back = pickle.loads(data, buffers=buffers)
    assert np.shares_memory(back.buffers[0], packet.buffers[0])


def test_a_contiguous_tensor_travels_without_a_copy():
    x = torch.randn(64)
    tensors, _ = unpack(pack({"x": x}))
    assert tensors["x"].data_ptr() == x.data_ptr()
    frame = to_bytes(pack({"x": x}))
    packet = from_bytes(frame, LIMIT)
    assert not packet.buffers[0].flags.writeable
    tensors, _ = unpack(packet)
    assert tensors["x"].data_ptr() == packet.buffers[0].ctypes.data


def test_num_bytes_counts_header_and_buffers():
    packet = pack({"x": torch.zeros(10), "y": torch.zeros(2, dtype=torch.bool)})
    assert packet.num_bytes == len(packet.header) + 42


def test_gradients_are_left_behind():
    tensors, _ = unpack(pack({"x": torch.ones(2, requires_grad=True)}))
    assert not tensors["x"].requires_grad


def test_tuples_come_back_as_lists():
    assert unpack(pack({}, {"size": (832, 480)}))[1] == {"size": [832, 480]}


def test_read_only_memory_gives_no_warning_in_any_thread():
    # pytest turns warnings into errors; a thread has no filters of its own
    frame = to_bytes(pack({"x": torch.ones(2)}))
    failures: list[BaseException] = []

    def read() -> None:
        try:
            unpack(from_bytes(frame, LIMIT))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_frame_at_an_odd_address_is_read():
    frame = to_bytes(pack({"x": torch.tensor([1.5, -2.0], dtype=torch.float64)}))
    tensors, _ = unpack(from_bytes(memoryview(b"abc" + frame)[3:], LIMIT))
    assert tensors["x"].tolist() == [1.5, -2.0]


def test_frame_bytes_tells_a_socket_how_much_to_read():
    frame = to_bytes(pack({"x": torch.ones(5)}))
    assert frame_bytes(frame[: wire.PREFIX_BYTES], LIMIT) == len(frame)
    with pytest.raises(WireFormatError, match=r"a frame of \d+ bytes"):
        frame_bytes(frame[: wire.PREFIX_BYTES], 64)


@pytest.mark.parametrize(
    ("tensors", "meta", "found"),
    [
        ({"x": torch.zeros(2, dtype=torch.complex64)}, {}, "dtype torch.complex64"),
        ({"x": torch.zeros(2, 2).to_sparse()}, {}, "sparse"),
        ({"x": torch.zeros(2, device="meta")}, {}, "on meta"),
        ({1: torch.zeros(2)}, {}, "name of type int"),
        ({"\ud800": torch.zeros(2)}, {}, "msgpack refuses"),
        ({}, {"a": {1: 2}}, "key 1 in a"),
        ({}, {"a": 2**64}, "integer"),
        ({}, {"a": b"bytes"}, "bytes in a"),
        ({}, {"a": "\ud800"}, "msgpack refuses"),
        ({}, {"a": "x" * (wire.MAX_HEADER_BYTES + 1)}, "bytes of names and metadata"),
    ],
)
def test_what_has_no_wire_form_is_refused_by_pack(tensors, meta, found):
    with pytest.raises(WireFormatError, match=found):
        pack(tensors, meta)


def test_metadata_that_contains_itself_is_refused():
    loop: dict[str, object] = {}
    loop["loop"] = loop
    with pytest.raises(WireFormatError, match="too deep"):
        pack({}, loop)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        pytest.param(["x", "float31", [2], 8, 0], "dtype 'float31'", id="unknown_dtype"),
        pytest.param(["x", ["float32"], [2], 8, 0], "dtype", id="dtype_list"),
        pytest.param(["x", "float32", [3], 8, 0], "8 bytes", id="other_size"),
        pytest.param(["x", "float32", [-2], 8, 0], "shape", id="negative"),
        pytest.param(["x", "float32", [2**62, 2**62], 8, 0], "shape", id="overflow"),
        pytest.param(["x", "float32", [0, 2**62, 2**62], 0, 0], "shape", id="empty_overflow"),
        pytest.param(["x", "float32", [2**64 - 1], 8, 0], "shape", id="above_int64"),
        pytest.param(["x", "float32", [1] * 65, 4, 0], "rank 65", id="rank"),
        pytest.param(["x", "float32", [2.0], 8, 0], "shape", id="float_size"),
        pytest.param(["x", "float32", [True, 2], 8, 0], "shape", id="bool_size"),
        pytest.param(["x", "float32", 2, 8, 0], "shape", id="shape_no_list"),
        pytest.param(["x", "float32", [2], 8.0, 0], "bytes", id="float_bytes"),
        pytest.param(["x", "float32", [2], 8, "0"], "crc32", id="crc_text"),
        pytest.param(["x", "float32", [2], 8, 1], "crc32", id="wrong_crc"),
        pytest.param([b"x", "float32", [2], 8, 0], "bad msgpack", id="name_bytes"),
        pytest.param(["x", "float32", [2], 8], "tensor entry", id="short_row"),
        pytest.param(["x", "float32", [2], 2**40, 0], "bytes", id="huge_length"),
    ],
)
def test_a_wrong_row_is_refused(row, found):
    with pytest.raises(WireFormatError, match=found):
        unpack(packet_of(row))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="never_used_byte"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="array_of_4g"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map_of_4g"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="binary_of_4g"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="text_of_4g"),
        pytest.param(b"\x91" * 100_000, id="deep"),
        pytest.param(msgpack.packb([1, 2]), id="short"),
        pytest.param(msgpack.packb({"version": 1}), id="map"),
        pytest.param(header_of({"tensors": [], "meta": {}}, version=99), id="version"),
        pytest.param(header_of({"tensors": [], "meta": {}}) + b"x", id="trailing"),
        pytest.param(header_of({"tensors": []}), id="no_meta"),
        pytest.param(header_of({"tensors": {}, "meta": {}}), id="tensors_map"),
        pytest.param(header_of({"tensors": [], "meta": []}), id="meta_list"),
        pytest.param(header_of({"tensors": [], "meta": {}, "more": 1}), id="more"),
        pytest.param(header_of({"tensors": [], "meta": {1: 2}}), id="int_key"),
        pytest.param(header_of({"tensors": [], "meta": {"a": msgpack.ExtType(5, b"x")}}), id="ext"),
        pytest.param(header_of({"tensors": [], "meta": {"a": msgpack.Timestamp(0)}}), id="time"),
        pytest.param(header_of({"tensors": [ROW, ROW], "meta": {}}), id="same_name"),
        pytest.param(header_of({"tensors": [[]] * 65_537, "meta": {}}), id="many"),
        pytest.param(bytes(wire.MAX_HEADER_BYTES + 1), id="too_long"),
    ],
)
def test_a_wrong_header_is_refused_without_allocating(header):
    tracemalloc.start()
    try:
        with pytest.raises(WireFormatError):
            unpack(Packet(header, (ZEROS, ZEROS)))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(np.zeros(7, dtype=np.uint8), id="short"),
        pytest.param(np.zeros(2, dtype=np.float32), id="float32"),
        pytest.param(np.zeros((2, 4), dtype=np.uint8), id="2d"),
        pytest.param(np.zeros(16, dtype=np.uint8)[::2], id="strided"),
        pytest.param(bytes(8), id="bytes"),
    ],
)
def test_a_wrong_buffer_is_refused(buffer):
    with pytest.raises(WireFormatError, match="for 'x'"):
        unpack(packet_of(ROW, buffer))


def test_another_number_of_buffers_is_refused():
    packet = pack({"x": torch.zeros(2)})
    with pytest.raises(WireFormatError, match="found 2 buffers, expected 1"):
        unpack(Packet(packet.header, packet.buffers * 2))
    with pytest.raises(WireFormatError, match="buffers of other sizes"):
        to_bytes(Packet(packet.header, packet.buffers * 2))


def test_a_bool_that_is_neither_is_refused():
    row = ["x", "bool", [2], 2, zlib.crc32(b"\x01\x02")]
    with pytest.raises(WireFormatError, match="a bool of 2"):
        unpack(packet_of(row, np.frombuffer(b"\x01\x02", dtype=np.uint8)))


def test_verify_false_skips_the_payload_only():
    packet = packet_of([*ROW[:4], 1])
    assert unpack(packet, verify=False)[0]["x"].tolist() == [0.0, 0.0]
    with pytest.raises(WireFormatError, match="bytes"):
        unpack(packet_of(["x", "float32", [2], 9, 0]), verify=False)


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (0, b"NOPE", "magic"),
        (4, struct.pack("<H", 2), "frame version"),
        (6, b"\x01", "frame version"),
        (8, struct.pack("<I", 2**32 - 1), "a header of"),
        (8, struct.pack("<I", 5), "msgpack"),
        (12, struct.pack("<Q", 2**64 - 1), "a frame of"),
        (12, struct.pack("<Q", 500), "bytes"),
    ],
)
def test_a_wrong_prefix_is_refused(place, value, found):
    frame = bytearray(to_bytes(pack({"x": torch.ones(5)})))
    frame[place : place + len(value)] = value
    with pytest.raises(WireFormatError, match=found):
        from_bytes(frame, LIMIT)


def test_a_truncated_or_longer_frame_is_refused():
    frame = to_bytes(pack({"x": torch.ones(5)}))
    for length in range(len(frame)):
        with pytest.raises(WireFormatError):
            from_bytes(frame[:length], LIMIT)
    with pytest.raises(WireFormatError):
        from_bytes(frame + b"\0", LIMIT)
    with pytest.raises(WireFormatError, match="strided"):
        from_bytes(memoryview(frame)[::2], LIMIT)
