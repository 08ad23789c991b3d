"""Still images from disk: PNG, JPEG and WebP to RGB pixels, by PyAV. Free of torch.

What a camera wrote comes out upright (EXIF orientation of JPEG). Transparency is dropped, as it is
by Pillow's `convert("RGB")`. Lossless files give Pillow's pixels; a JPEG or lossy WebP differs from
Pillow's by at most a few of 255 (tests/runtime/test_still.py), because its chroma is interpolated
and converted here: FFmpeg's own conversion is off by up to 39 on sharp colours.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reelpool.errors import ConfigError

if TYPE_CHECKING:
    import av
    from av.video.plane import VideoPlane

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 2**26  # 8192 x 8192, 192 MiB of RGB
_FORMATS = {b"\x89PNG": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe", b"RIFF": "webp_pipe"}
_ANIMATED = 0x02  # in the flags of a WebP's VP8X chunk (RFC 9649, 2.7)
_STRIP = 64  # rows converted at a time, so that float32 pixels never fill memory
_ADVICE = "give a PNG, JPEG or WebP image"


def read_still(path: Path) -> np.ndarray:
    """Decode an image.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ConfigError: if the file is missing, damaged, too large, or of another kind; `where` is the
            path. Of an animated WebP: FFmpeg does not decode it.
    """
    data = _read(path)
    name = next((name for magic, name in _FORMATS.items() if data.startswith(magic)), None)
    if name is None or (name == "webp_pipe" and data[8:12] != b"WEBP"):
        raise ConfigError(str(path), "is no image that can be read", _ADVICE)
    if data[12:16] == b"VP8X" and data[20:21] and data[20] & _ANIMATED:
        raise ConfigError(str(path), "is an animated WebP", f"{_ADVICE} that stands still")
    pixels = _rgb(_decode(path, data, name))
    return _upright(pixels, _orientation(data) if name == "jpeg_pipe" else 1)


def _read(path: Path) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ConfigError(str(path), "is a pipe or a device", "give an image file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise ConfigError(str(path), problem, "give an image file") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(str(path), "is larger than 256 MiB", _ADVICE)
    return data


def _decode(path: Path, data: bytes, name: str) -> av.VideoFrame:
    """The file's one frame. The decoder refuses a size over the limit before it allocates it."""
    import av  # 0.1 s, and only jobs with an image need it

    options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    per_stream: Any = [options]  # PyAV's stubs say list[str]
    try:
        with av.open(io.BytesIO(data), "r", name, stream_options=per_stream) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = options
            frame = next(container.decode(stream), None)
    except (av.FFmpegError, ValueError, IndexError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        problem = f"is damaged, or has more than {MAX_PIXELS} pixels ({reason})"
        raise ConfigError(str(path), problem, _ADVICE) from None
    if frame is None:
        raise ConfigError(str(path), "holds no image", _ADVICE)
    return frame


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """Pixels of a frame, (H, W, 3) uint8."""
    planes = frame.format.components[:3]
    halved = {(frame.width, frame.height), (-(-frame.width // 2), -(-frame.height // 2))}
    halved.add((-(-frame.width // 2), frame.height))
    is_yuv = frame.format.name.startswith("yuv") and all(part.bits == 8 for part in planes)
    if not is_yuv or any((part.width, part.height) not in halved for part in planes):
        return frame.to_ndarray(format="rgb24")
    y, u, v = (
        _enlarged(np.frombuffer(memoryview(plane), np.uint8), plane, frame)
        for plane in frame.planes[:3]
    )
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == 2
    return _from_yuv(y, u, v, full_range)


def _enlarged(data: np.ndarray, of: VideoPlane, frame: av.VideoFrame) -> np.ndarray:
    """A plane at the frame's size: chroma samples lie centred between pixels, weights 3 and 1."""
    plane = data.reshape(-1, of.line_size)[: of.height, : of.width]
    for axis, size in ((0, frame.height), (1, frame.width)):
        count = plane.shape[axis]
        if count == size:
            continue
        padded = np.pad(plane, [(1, 1) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        near = 3 * plane.astype(np.uint16) + 2
        before, after = (padded.take(range(i, i + count), axis) for i in (0, 2))
        pair = np.stack([near + before, near + after], axis + 1) >> 2
        shape = [2 * count if i == axis else plane.shape[i] for i in (0, 1)]
        plane = pair.astype(np.uint8).reshape(shape).take(range(size), axis)
    return plane


def _from_yuv(y: np.ndarray, u: np.ndarray, v: np.ndarray, full_range: bool) -> np.ndarray:
    """BT.601 to RGB, the matrix of JPEG (JFIF 1.02) and of WebP (RFC 9649)."""
    pixels = np.empty((*y.shape, 3), np.uint8)
    scale, offset, chroma = (1.0, 0.0, 1.0) if full_range else (255 / 219, 16.0, 255 / 224)
    matrix = np.array([[1, 1, 1], [0, -0.344136, 1.772], [1.402, -0.714136, 0]], np.float32)
    matrix *= np.array([[scale], [chroma], [chroma]], np.float32)
    middle = np.array([offset, 128, 128], np.float32)
    for row in range(0, len(y), _STRIP):
        strip = np.stack([plane[row : row + _STRIP] for plane in (y, u, v)], -1) - middle
        pixels[row : row + _STRIP] = (strip @ matrix).clip(0, 255).round()
    return pixels


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 (upright) where it is absent or makes no sense.

    Source: EXIF 2.32: tag 0x112 of the first directory of the TIFF block in segment APP1.
    """
    begin = data.find(b"Exif\0\0", 0, 2**16) + 6
    order = {b"II": "<", b"MM": ">"}.get(data[begin : begin + 2])
    if begin < 6 or order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", data, begin + 4)
        (count,) = struct.unpack_from(f"{order}H", data, begin + directory)
        for index in range(count):
            entry = begin + directory + 2 + 12 * index
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", data, entry)
            if tag == 0x112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo a camera's orientation: transpose for 5 to 8, then flip rows and columns."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
