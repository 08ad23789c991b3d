"""How far two videos are apart, and a picture of many frames at once.

PSNR and SSIM as published, computed here in float64 by torch. This module knows pixels only.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from reelpool.errors import ConfigError

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
MAX_SHEET_PIXELS = 2**28


def psnr(a: Tensor, b: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio of two videos, in dB; infinite where they are equal.

    Args:
        a: (n, H, W, C), uint8 or float.
        b: same shape and dtype.
        peak: largest possible difference; by default 255 for uint8 and 1 for floats.

    Raises:
        ConfigError: if the videos do not match.
    """
    _check_pair(a, b)
    squared = 0.0
    for left, right in zip(a, b, strict=True):
        squared += (left.double() - right.double()).square().sum().item()
    if squared == 0:
        return math.inf
    return 10 * math.log10(_peak(a, peak) ** 2 * a.numel() / squared)


def ssim(a: Tensor, b: Tensor, peak: float | None = None) -> float:
    """Structural similarity of two videos: the mean over frames, channels and window positions.

    Gaussian window of 11 x 11, sigma 1.5, at the positions where it lies inside the frame.

    Args:
        a: (n, H, W, C), uint8 or float, H and W at least 11.
        b: same shape and dtype.
        peak: the values' range; by default 255 for uint8 and 1 for floats.

    Returns:
        At most 1, which means equal.

    Raises:
        ConfigError: if the videos do not match or are too small.

    Source: Wang et al. 2004, eq. 13, K1 = 0.01, K2 = 0.03.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        problem = f"frames of {a.shape[2]}x{a.shape[1]}"
        raise ConfigError("ssim", problem, f"it needs {SSIM_WINDOW}x{SSIM_WINDOW} or more")
    value_range = _peak(a, peak)
    frames = [
        _ssim_frame(left.double(), right.double(), value_range)
        for left, right in zip(a, b, strict=True)
    ]
    return math.fsum(frames) / len(frames)


def contact_sheet(frames: Tensor, path: Path | str, columns: int = 6, zoom: int = 1) -> None:
    """Write frames side by side, row after row, as one PNG; the last row is filled with black.

    Args:
        frames: (n, H, W, 3), uint8 RGB, n >= 1.
        path: the target, `*.png`; replaced at once when the picture is complete.
        columns: frames in a row.
        zoom: whole number >= 1; each pixel becomes zoom x zoom equal ones.

    Raises:
        ConfigError: if the frames have another form, or the file cannot be written.
    """
    path = Path(path)
    num_frames = len(frames)
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or not num_frames:
        found = f"frames are {frames.dtype} {list(frames.shape)}"
        raise ConfigError(str(path), found, "give uint8 [n, height, width, 3]")
    if columns < 1 or zoom < 1 or path.suffix.lower() != ".png":
        problem = f"cannot write a contact sheet with {columns} columns and zoom {zoom}"
        raise ConfigError(str(path), problem, "use at least 1 of both, and a name ending in .png")
    columns = min(columns, num_frames)
    rows = -(-num_frames // columns)
    height, width = frames.shape[1] * zoom, frames.shape[2] * zoom
    if rows * height * columns * width > MAX_SHEET_PIXELS:
        problem = f"a contact sheet of {columns * width}x{rows * height} pixels"
        raise ConfigError(str(path), problem, "show fewer frames or less zoom")
    sheet = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames.cpu().numpy()):
        top, left = index // columns * height, index % columns * width
        enlarged = frame.repeat(zoom, axis=0).repeat(zoom, axis=1)
        sheet[top : top + height, left : left + width] = enlarged
    _write_png(sheet, path)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.dim() != 4 or a.shape != b.shape or a.dtype != b.dtype or a.numel() == 0:
        problem = f"{a.dtype} {list(a.shape)} cannot be compared with {b.dtype} {list(b.shape)}"
        raise ConfigError("quality", problem, "give two (n, H, W, C) tensors of one shape")


def _peak(frames: Tensor, peak: float | None) -> float:
    if peak is not None:
        return peak
    return 255.0 if frames.dtype == torch.uint8 else 1.0


def _ssim_frame(a: Tensor, b: Tensor, value_range: float) -> float:
    """Mean SSIM of two (H, W, C) float64 frames."""
    c1, c2 = (_K1 * value_range) ** 2, (_K2 * value_range) ** 2
    a, b = a.permute(2, 0, 1), b.permute(2, 0, 1)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def _blur(x: Tensor) -> Tensor:
    """Weighted means of (C, H, W) at all window positions inside: (C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    x = torch.nn.functional.conv2d(x.unsqueeze(1), weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(x, weights.view(1, 1, 1, -1)).squeeze(1)


def _write_png(pixels: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 RGB; raises ConfigError."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.pts = 0
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    partial = path.with_name(f"{path.stem}.partial.png")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        problem = f"the picture cannot be written ({error.strerror})"
        raise ConfigError(str(path), problem, "check the folder and its free space") from error
