"""PSNR and SSIM against direct loops; the contact sheet pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from reelpool.errors import ConfigError
from reelpool.runtime.quality import contact_sheet, psnr, ssim


def noise(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def ssim_by_loops(a: list, b: list, peak: float) -> float:
    """The formula of Wang et al. 2004 for one channel, position by position, without arrays."""
    weights = [
        [math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)]
        for y in range(11)
    ]
    total = sum(map(sum, weights))
    values = []
    for top in range(len(a) - 10):
        for left in range(len(a[0]) - 10):
            window = [
                (weights[y][x] / total, a[top + y][left + x], b[top + y][left + x])
                for y in range(11)
                for x in range(11)
            ]
            mean_a = sum(w * p for w, p, _ in window)
            mean_b = sum(w * q for w, _, q in window)
            var_a = sum(w * (p - mean_a) ** 2 for w, p, _ in window)
            var_b = sum(w * (q - mean_b) ** 2 for w, _, q in window)
            cov = sum(w * (p - mean_a) * (q - mean_b) for w, p, q in window)
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * cov + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return sum(values) / len(values)


def test_ssim_of_equal_frames_is_one():
    frames = noise(0, 2, 16, 20, 3)
    assert ssim(frames, frames) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_ssim_equals_the_formula_by_loops(kind):
    a, b = noise(1, 1, 14, 13, 1), noise(2, 1, 14, 13, 1)
    b = ((a.float() * 2 + b.float()) / 3).to(torch.uint8)
    peak = 255.0
    if kind == "float32":
        a, b, peak = a.float() / 255, b.float() / 255, 1.0
    expected = ssim_by_loops(a[0, :, :, 0].tolist(), b[0, :, :, 0].tolist(), peak)
    assert 0.5 < expected < 0.99
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)  # measured 3e-16


def test_ssim_is_the_mean_over_frames_and_channels():
    a, b = noise(3, 2, 12, 12, 2), noise(4, 2, 12, 12, 2)
    parts = [ssim(a[n : n + 1, ..., c : c + 1], b[n : n + 1, ..., c : c + 1])
             for n in range(2) for c in range(2)]  # fmt: skip
    assert ssim(a, b) == pytest.approx(sum(parts) / 4, abs=1e-12)


def test_psnr_of_known_differences():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.1308036)
    grey = torch.full((1, 4, 4, 3), 0.1)
    assert psnr(grey, grey + 0.1) == pytest.approx(20, abs=1e-5)
    assert psnr(grey, grey + 0.1, peak=2) == pytest.approx(20 + 6.0206, abs=1e-4)


def test_videos_that_do_not_match_are_refused():
    with pytest.raises(ConfigError, match="cannot be compared"):
        psnr(noise(0, 1, 4, 4, 3), noise(0, 2, 4, 4, 3))
    with pytest.raises(ConfigError, match="cannot be compared"):
        ssim(noise(0, 1, 12, 12, 3), noise(0, 1, 12, 12, 3).float())
    with pytest.raises(ConfigError, match="11x11 or more"):
        ssim(noise(0, 1, 10, 12, 3), noise(0, 1, 10, 12, 3))


def test_the_contact_sheet_shows_every_frame(tmp_path):
    frames = noise(5, 5, 6, 7, 3)
    path = tmp_path / "sheet.png"
    contact_sheet(frames, path, columns=3, zoom=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 12, 3 * 14, 3)
    for index in range(5):
        top, left = index // 3 * 12, index % 3 * 14
        shown = sheet[top : top + 12 : 2, left : left + 14 : 2]
        assert (shown == frames[index].numpy()).all()
    assert sheet[12:, 28:].max() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("frames", "name", "columns"),
    [
        (noise(0, 2, 4, 4, 3), "sheet.jpg", 2),
        (noise(0, 2, 4, 4, 3), "sheet.png", 0),
        (noise(0, 2, 4, 4, 1), "sheet.png", 2),
        (noise(0, 0, 4, 4, 3), "sheet.png", 2),
        (noise(0, 1, 1, 1, 3).expand(1, 20_000, 20_000, 3), "sheet.png", 2),
        (noise(0, 2, 4, 4, 3), "missing/sheet.png", 2),
    ],
)
def test_a_sheet_that_cannot_be_is_refused(tmp_path, frames, name, columns):
    with pytest.raises(ConfigError):
        contact_sheet(frames, tmp_path / name, columns)
    assert list(tmp_path.iterdir()) == []
