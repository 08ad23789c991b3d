"""Frames to mp4 and back; no half file at the target, ever."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reelpool.errors import ConfigError, NumericError
from reelpool.runtime import video
from reelpool.runtime.quality import psnr
from reelpool.runtime.video import (
    VideoWriter,
    iter_frames,
    read_frames,
    read_metadata,
    to_uint8,
)


def clip(num_frames: int, height: int, width: int) -> np.ndarray:
    """Coloured bands that move: content a codec keeps well."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([128 + 100 * np.sin((x + n) / 9), 128 + 100 * np.cos((y - n) / 7), x + y], -1)
        for n in range(num_frames)
    ]
    return np.clip(frames, 0, 255).astype(np.uint8)


def write(path: Path, frames: np.ndarray, **options) -> None:
    with VideoWriter(path, frames.shape[2], frames.shape[1], 16, **options) as writer:
        writer.write(frames)


def test_frames_come_back_within_codec_loss(tmp_path):
    frames = clip(9, 64, 96)
    with VideoWriter(tmp_path / "a.mp4", 96, 64, 16) as writer:
        writer.write(torch.from_numpy(frames[:4]))
        writer.write(frames[4:4])
        writer.write(frames[4:])
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    loss = psnr(torch.from_numpy(back), torch.from_numpy(frames))
    assert loss > 34, loss  # measured 36.1; half the chroma goes by yuv420p
    assert len(list(iter_frames(tmp_path / "a.mp4"))) == 9
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_plain_colours_stay_what_they_are(tmp_path):
    # measured 1; read with the BT.601 matrix they are off by 23
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    frames = np.stack([np.full((32, 32, 3), colour, dtype=np.uint8) for colour in colours])
    write(tmp_path / "a.mp4", frames)
    back = read_frames(tmp_path / "a.mp4").astype(int)
    assert np.abs(back - frames).max() <= 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


def test_the_same_frames_give_the_same_bytes(tmp_path):
    # with the macroblock tree and other work on the cores, one encoding in three differed
    blocks = np.random.default_rng(0).integers(0, 255, (17, 8, 8, 3), dtype=np.uint8)
    frames = blocks.repeat(8, axis=1).repeat(8, axis=2)
    files = set()
    for _ in range(40):
        write(tmp_path / "a.mp4", frames)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_the_job_travels_in_the_file(tmp_path):
    job = {"prompt": 'ein "Bär" 🐻\n; = # \\', "job": json.dumps({"steps": 30, "x": ["y"] * 9999})}
    write(tmp_path / "a.mp4", clip(2, 16, 16), metadata=job)
    assert read_metadata(tmp_path / "a.mp4") == job
    write(tmp_path / "b.mp4", clip(2, 16, 16))
    assert read_metadata(tmp_path / "b.mp4") == {}


@pytest.mark.parametrize("fps", [16, 23.976, 12.5, Fraction(30000, 1001)])
def test_the_frame_rate_is_kept(tmp_path, fps):
    with VideoWriter(tmp_path / "a.mp4", 16, 16, fps) as writer:
        writer.write(clip(12, 16, 16))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(float(fps), rel=1e-4)
        assert stream.frames == 12


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path):
    frames = clip(3, 33, 45)
    write(tmp_path / "a.mp4", frames)
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == (3, 34, 46, 3)
    near = psnr(torch.from_numpy(back[:, :33, :45].copy()), torch.from_numpy(frames))
    assert near > 34, near  # measured 36.3
    write(tmp_path / "b.mp4", frames, zoom=3)
    assert read_frames(tmp_path / "b.mp4").shape == (3, 100, 136, 3)


def test_one_pixel_makes_a_video(tmp_path):
    write(tmp_path / "a.mp4", clip(1, 1, 1), zoom=16)
    assert read_frames(tmp_path / "a.mp4").shape == (1, 16, 16, 3)


def test_zoom_repeats_pixels(tmp_path):
    frames = clip(2, 16, 16)
    write(tmp_path / "a.mp4", frames, zoom=4)
    back = read_frames(tmp_path / "a.mp4").reshape(2, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(back - frames).max() < 10  # measured 5.5


def test_frames_reach_the_disk_before_the_end(tmp_path):
    generator = np.random.default_rng(0)
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 16) as writer:
        writer.write(generator.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8))
        assert writer.partial_path.stat().st_size > 50_000
        assert not (tmp_path / "a.mp4").exists()


def test_the_index_lies_before_the_frames(tmp_path):
    write(tmp_path / "a.mp4", clip(4, 32, 32))
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_an_error_leaves_the_old_target_and_nothing_else(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    writer = VideoWriter(tmp_path / "a.mp4", 32, 32, 16)

    def crash() -> None:
        with writer:
            writer.write(clip(30, 32, 32))
            assert writer.partial_path.exists()
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.mp4", b"old")]


def test_no_frames_make_no_video(tmp_path):
    with pytest.raises(ConfigError, match="no frames"), VideoWriter(tmp_path / "a.mp4", 8, 8, 16):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "a.partial.mp4").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="the disk is full"):
        write(tmp_path / "a.mp4", clip(40, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_colon_in_the_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a:b%d.mp4"), clip(2, 16, 16))
    assert len(read_frames("a:b%d.mp4")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.avi", "type '.avi'; give a name that ends in .mp4"),
        ("a", "type ''"),
        ("missing/a.mp4", "there is no folder"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigError, match=message):
        VideoWriter(tmp_path / name, 8, 8, 16)


def test_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(video.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="is not writable"):
        VideoWriter(tmp_path / "a.mp4", 8, 8, 16)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_a_senseless_frame_rate_is_refused(tmp_path, fps):
    with pytest.raises(ConfigError, match="frames per second"):
        VideoWriter(tmp_path / "a.mp4", 8, 8, fps)


def test_frames_of_another_form_are_refused(tmp_path):
    for frames in (clip(2, 8, 9), clip(2, 8, 8).astype(np.float32), clip(2, 8, 8)[0]):
        writer = VideoWriter(tmp_path / "a.mp4", 8, 8, 16)
        with pytest.raises(ConfigError, match="give uint8"), writer:
            writer.write(frames)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(1000))
    for read in (read_frames, read_metadata):
        with pytest.raises(ConfigError, match="not a video"):
            read(tmp_path / "a.mp4")
        with pytest.raises(ConfigError, match="no such file"):
            read(tmp_path / "b.mp4")


def test_reading_is_bounded(tmp_path):
    write(tmp_path / "a.mp4", clip(5, 16, 16))
    assert len(read_frames(tmp_path / "a.mp4", max_frames=5)) == 5
    with pytest.raises(ConfigError, match="more than 4 frames"):
        read_frames(tmp_path / "a.mp4", max_frames=4)
    with pytest.raises(ConfigError, match="pixels"):
        read_frames(tmp_path / "a.mp4", max_pixels=16 * 16 * 5 - 1)
    with pytest.raises(ConfigError, match="frames of 16x16"):
        next(iter_frames(tmp_path / "a.mp4", max_pixels=255))


def test_to_uint8_rounds_as_diffusers_does():
    # VaeImageProcessor.denormalize, pt_to_numpy, numpy_to_pil; equal to the real ones of diffusers
    # 0.42.1 on 2026-11-20. Not imported here: that takes 3 s
    frames = torch.randn(1, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    images = (frames[0].transpose(0, 1) * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    expected = (images * 255).round().astype("uint8")
    pixels = to_uint8(frames)
    assert pixels.dtype == torch.uint8
    assert (pixels.numpy() == expected).all()


def test_to_uint8_clamps_and_refuses_nan():
    frames = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).expand(1, 3, 2, 1, 5)
    assert to_uint8(frames)[1, 0, :, 2].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(frames.bfloat16()).shape == (2, 1, 5, 3)
    frames = frames.clone()
    frames[0, 1, 1, 0, 3] = float("nan")
    with pytest.raises(NumericError, match="frame 1"):
        to_uint8(frames)
