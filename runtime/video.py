"""Frames to mp4 and back, by PyAV (FFmpeg's libraries).

A `VideoWriter` takes frames as they arrive, in a file beside the target, and renames it at the
end: a target that exists is whole. The job travels in the file's own metadata, so a video says how
to make it again. Colours are BT.709, limited range, and tagged so: FFmpeg's default is BT.601,
untagged, and a wrong guess of the matrix shifts plain colours by up to 23 of 255. This module does
not know what a latent is.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from reelpool.errors import ConfigError, NumericError

_BT709 = 1  # one code for matrix, primaries and transfer (ITU-T H.273)
_LIMITED_RANGE = 1
_X264 = {
    "crf": "12",  # visually lossless
    # frames the encoder holds back before it writes one; the default is 40
    "rc-lookahead": "10",
    # macroblock tree off: with AVX-512 its result varies from run to run (x264 of PyAV 18.1 on an
    # EPYC: 13 different streams of 60 encodings; without it 1 of 500)
    "mbtree": "0",
}
MAX_FPS = 1000
_FFMPEG_ERRORS = (av.FFmpegError, OSError, ValueError)


class VideoWriter:
    """Writes frames to an mp4 file as they arrive; a context manager.

    Leaving the context normally finishes the file and moves it to its place; leaving by an error
    removes what was written. A target that existed is replaced only at the very end.
    """

    def __init__(
        self,
        path: Path | str,
        width: int,
        height: int,
        fps: float | Fraction,
        metadata: Mapping[str, str] | None = None,
        zoom: int = 1,
    ) -> None:
        """Check the arguments; the file is opened on entering the context.

        Args:
            path: the target, `*.mp4`, in a folder that exists.
            width: of the frames given to `write`.
            height: of the frames given to `write`.
            fps: frames per second, 0 < fps <= 1000.
            metadata: what `read_metadata` gives back; stored as JSON in the container's "comment".
            zoom: whole number >= 1; each pixel becomes zoom x zoom equal ones, for viewing.

        Raises:
            ConfigError: if the target cannot be written or an argument is out of range.
        """
        self.path = Path(path)
        check_target(self.path)
        if not (width >= 1 and height >= 1 and zoom >= 1):
            raise ConfigError(
                str(self.path), f"cannot write {width}x{height} frames with zoom {zoom}"
            )
        if not 0 < fps <= MAX_FPS:
            problem = f"{fps} frames per second"
            raise ConfigError(str(self.path), problem, f"use more than 0 and at most {MAX_FPS}")
        self.width, self.height, self.zoom = width, height, zoom
        self.fps = Fraction(fps).limit_denominator(1001)
        self.num_frames = 0
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self._comment = json.dumps(dict(metadata or {}), ensure_ascii=False)

    def __enter__(self) -> VideoWriter:
        """Open the partial file; raises ConfigError."""
        try:
            self._container = av.open(
                _url(self.partial_path),
                "w",
                container_options={"movflags": "faststart", "flush_packets": "1"},
            )
            self._stream = self._container.add_stream("libx264", rate=self.fps, options=_X264)
        except _FFMPEG_ERRORS as error:
            raise self._failure(error) from error
        self._container.metadata["comment"] = self._comment
        # yuv420p needs even sides: an odd one gets its last row or column twice
        self._stream.width = self.width * self.zoom + self.width * self.zoom % 2
        self._stream.height = self.height * self.zoom + self.height * self.zoom % 2
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        return self

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames.

        Args:
            frames: (n, height, width, 3), uint8 RGB.

        Raises:
            ConfigError: if the frames have another form, or the disk is full.
        """
        array = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
        if array.dtype != np.uint8 or array.shape[1:] != (self.height, self.width, 3):
            raise ConfigError(
                str(self.path),
                f"frames are {array.dtype} {list(array.shape)}",
                f"give uint8 [n, {self.height}, {self.width}, 3]",
            )
        for pixels in array:
            frame = av.VideoFrame.from_ndarray(self._enlarged(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = self.num_frames, 1 / self.fps
            self._encode(frame)
            self.num_frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish and rename the file, or remove it; raises ConfigError if it cannot be finished."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._close_quietly()
            self.partial_path.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.num_frames == 0:
            raise ConfigError(str(self.path), "no frames were given to write")
        self._encode(None)
        try:
            self._container.close()
            with self.partial_path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.partial_path, self.path)
        except _FFMPEG_ERRORS as error:
            raise self._failure(error) from error

    def _encode(self, frame: av.VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except _FFMPEG_ERRORS as error:
            raise self._failure(error) from error

    def _enlarged(self, pixels: np.ndarray) -> np.ndarray:
        """Repeat pixels for the zoom, and the last row and column of odd sides."""
        if self.zoom > 1:
            pixels = pixels.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)
        odd_rows, odd_columns = pixels.shape[0] % 2, pixels.shape[1] % 2
        if odd_rows or odd_columns:
            pixels = np.pad(pixels, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
        return np.ascontiguousarray(pixels)

    def _close_quietly(self) -> None:
        try:
            self._container.close()
        except (
            _FFMPEG_ERRORS
        ):  # a full disk fails again on closing; the first error is being raised
            return

    def _failure(self, error: Exception) -> ConfigError:
        if getattr(error, "errno", None) == errno.ENOSPC:
            free = shutil.disk_usage(self.path.parent).free
            problem = f"the disk is full ({free} bytes free)"
            return ConfigError(str(self.path), problem, "make room or write elsewhere")
        advice = "check the folder, and that PyAV has libx264 (pip install --force-reinstall av)"
        return ConfigError(str(self.path), f"the video cannot be written ({error})", advice)


def check_target(path: Path) -> None:
    """Check that a video can be written here, before hours are spent on its frames.

    Raises:
        ConfigError: if the extension is not .mp4, or the folder is missing or not writable.
    """
    if path.suffix.lower() != ".mp4":
        problem = f"cannot write video files of type {path.suffix!r}"
        raise ConfigError(str(path), problem, "give a name that ends in .mp4")
    if path.is_dir():
        raise ConfigError(str(path), "is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(str(path), f"there is no folder {path.parent}", "create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(str(path), f"the folder {path.parent} is not writable")


def read_metadata(path: Path | str) -> dict[str, str]:
    """Give the metadata a `VideoWriter` stored; {} for a video of other origin.

    Raises:
        ConfigError: if the file is missing or no video.
    """
    with _opened(path) as container:
        comment = container.metadata.get("comment", "{}")
    try:
        found = json.loads(comment)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def iter_frames(
    path: Path | str, max_frames: int = 20_000, max_pixels: int = 8192 * 8192
) -> Iterator[np.ndarray]:
    """Decode a video frame by frame.

    Args:
        path: any video FFmpeg reads.
        max_frames: most frames to accept.
        max_pixels: most pixels of one frame to accept.

    Yields:
        (H, W, 3), uint8 RGB; odd sizes were made even by the writer.

    Raises:
        ConfigError: if the file is missing, damaged, no video or over a limit.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            problem = f"frames of {stream.width}x{stream.height}"
            raise ConfigError(str(path), problem, f"at most {max_pixels} pixels are accepted")
        try:
            for index, frame in enumerate(container.decode(stream)):
                if index >= max_frames:
                    raise ConfigError(str(path), f"more than {max_frames} frames", "cut the video")
                if frame.width * frame.height > max_pixels:
                    raise ConfigError(str(path), f"a frame of {frame.width}x{frame.height}")
                yield frame.to_ndarray(format="rgb24")
        except _FFMPEG_ERRORS as error:
            raise ConfigError(str(path), f"the video cannot be decoded ({error})") from error


def read_frames(path: Path | str, max_frames: int = 20_000, max_pixels: int = 2**31) -> np.ndarray:
    """Decode a whole video.

    Args:
        path: any video FFmpeg reads.
        max_frames: most frames to accept.
        max_pixels: most pixels of all frames together (3 bytes each).

    Returns:
        (n, H, W, 3), uint8 RGB.

    Raises:
        ConfigError: if the file is missing, damaged, no video, without frames or over a limit.
    """
    frames: list[np.ndarray] = []
    num_pixels = 0
    for frame in iter_frames(path, max_frames, max_pixels):
        num_pixels += frame.shape[0] * frame.shape[1]
        if num_pixels > max_pixels:
            raise ConfigError(str(path), f"more than {max_pixels} pixels in all", "cut the video")
        frames.append(frame)
    if len({frame.shape for frame in frames}) != 1:
        problem = "no frames" if not frames else "frames of several sizes"
        raise ConfigError(str(path), problem, "give another video")
    return np.stack(frames)


def to_uint8(frames: Tensor) -> Tensor:
    """Turn decoded frames into pixels, rounding as diffusers does.

    Args:
        frames: (1, 3, n, H, W), float, nominally in [-1, 1].

    Returns:
        (n, H, W, 3), uint8, on the CPU.

    Raises:
        NumericError: if a value is not finite.

    Source: diffusers image_processor.py, denormalize and numpy_to_pil.
    """
    batch, channels, num_frames, height, width = frames.shape
    assert (batch, channels) == (1, 3), tuple(frames.shape)
    pixels = torch.empty(num_frames, height, width, 3, dtype=torch.uint8)
    for index in range(num_frames):  # one at a time: float32 of a whole video is 4 times its size
        frame = frames[0, :, index].float()
        if not math.isfinite(frame.sum().item()) and not frame.isfinite().all():
            raise NumericError("to_uint8", f"frame {index}", "decode with --vae-dtype float32")
        scaled = (frame / 2 + 0.5).clamp(0, 1).mul(255).round()
        pixels[index] = scaled.to(torch.uint8).permute(1, 2, 0)
    return pixels


def _url(path: Path | str) -> str:
    return f"file:{path}"  # FFmpeg takes the start of "a:b.mp4" for a protocol


def _opened(path: Path | str) -> av.container.InputContainer:
    """Open a video for reading; raises ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(str(path), "there is no such file")
    try:
        container = av.open(_url(path))
    except _FFMPEG_ERRORS as error:
        raise ConfigError(str(path), f"not a video ({error})", "give an mp4 file") from error
    if not container.streams.video:
        container.close()
        raise ConfigError(str(path), "holds no video", "give an mp4 file")
    return container
