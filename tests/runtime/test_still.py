"""Images from disk, compared with Pillow's reading of them."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from reelpool.errors import ConfigError
from reelpool.runtime import still
from reelpool.runtime.still import read_still


def picture(width: int, height: int) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(3).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write(folder: Path, image: Image.Image, kind: str, **how: object) -> tuple[Path, np.ndarray]:
    """The file, and what Pillow reads from it."""
    path = folder / "image.bin"  # the kind is told by content, not by name
    image.save(path, kind, **how)
    with Image.open(path) as found:
        return path, np.asarray(ImageOps.exif_transpose(found).convert("RGB")).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_png_gives_pillows_pixels(tmp_path, mode):
    path, expected = write(tmp_path, picture(33, 17).convert(mode), "PNG")
    pixels = read_still(path)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (17, 33, 3))
    assert (pixels == expected).all()


LOSSY = {  # id: (kind, how, size, most difference)
    "JPEG 4:2:0": ("JPEG", {"quality": 95}, (160, 120), 4),  # measured 3
    "JPEG 4:2:0, odd": ("JPEG", {"quality": 95}, (161, 121), 4),
    "JPEG 4:2:2": ("JPEG", {"quality": 95, "subsampling": 1}, (161, 121), 4),
    "JPEG 4:4:4": ("JPEG", {"quality": 95, "subsampling": 0}, (160, 121), 3),
    "JPEG gray": ("JPEG", {}, (40, 31), 2),
    "WebP": ("WEBP", {"quality": 95}, (161, 121), 5),
    "WebP lossless": ("WEBP", {"lossless": True}, (161, 121), 0),
}


@pytest.mark.parametrize("case", LOSSY)
def test_other_kinds_come_close_to_pillows_pixels(tmp_path, case):
    kind, how, size, most = LOSSY[case]
    image = picture(*size).convert("L") if case == "JPEG gray" else picture(*size)
    path, expected = write(tmp_path, image, kind, **how)
    assert np.abs(read_still(path) - expected).max() <= most


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_come_out_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path, expected = write(tmp_path, picture(40, 24), "JPEG", exif=exif, subsampling=0)
    pixels = read_still(path)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 4


def test_what_is_no_image_is_one_sentence(tmp_path, monkeypatch):
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture(64, 48).save(png, "PNG")
    picture(64, 48).save(jpeg, "JPEG")
    bad = {
        "empty": b"",
        "text": b"not an image",
        "cut PNG": png.getvalue()[:600],
        "magic only": b"\x89PNG\r\n\x1a\n",
        "sound": b"RIFF\0\0\0\0WAVE",
        "noise after magic": b"\xff\xd8\xff" + bytes(range(256)),
    }
    for name, data in bad.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            read_still(path)
        assert caught.value.where == str(path)
        assert "PNG, JPEG or WebP" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_still(tmp_path / "none.png")
    with pytest.raises(ConfigError, match="directory"):
        read_still(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match="is a pipe"):
        read_still(tmp_path / "pipe.png")
    frames = [picture(64, 48), picture(64, 48).rotate(90)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match="is an animated WebP; give a PNG"):
        read_still(tmp_path / "moving.webp")
    (tmp_path / "small.png").write_bytes(png.getvalue())
    monkeypatch.setattr(still, "MAX_PIXELS", 1000)
    with pytest.raises(ConfigError, match="more than 1000 pixels"):
        read_still(tmp_path / "small.png")
