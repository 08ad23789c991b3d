"""Whole jobs against diffusers' WanPipeline on the same folder: same seed, same latents, frames."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from safetensors.torch import load_file

from reelpool.models.files import open_model
from reelpool.models.registry import model_folder
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.device import cpu_card
from reelpool.runtime.quality import psnr
from reelpool.runtime.stages import CardStages
from reelpool.runtime.types import DecodeCall, ModelRef
from reelpool.runtime.wire import pack, unpack
from reelpool.scheduler.executor import run_jobs
from tests.settings import demo_settings

CASES = {
    "demo": ("demo", {"steps": 6}),
    "demo, negative prompt, Euler": (
        "demo",
        {"steps": 4, "solver": "euler", "guidance": 2.0, "negative": "a red ring"},
    ),
    "tiny": ("tiny", {"steps": 6, "guidance": 4.0, "negative": "a red ring", "seed": 7}),
    "tiny, guidance 1": ("tiny", {"steps": 4, "guidance": 1.0, "frames": 9}),
    "tiny, wide, Euler": (
        "tiny",
        {"steps": 5, "solver": "euler", "width": 96, "height": 32, "frames": 5, "shift": 5.0},
    ),
    "tiny, one frame": ("tiny", {"steps": 3, "frames": 1}),
}


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """Model name -> (name for us, diffusers' pipeline), loaded once."""

    @cache
    def load(name):
        name = "demo" if name == "demo" else str(tiny_model)
        pipe = WanPipeline.from_pretrained(model_folder(name))
        pipe.text_encoder.float()  # transformers loads the stored type
        pipe.set_progress_bar_config(disable=True)
        return name, pipe

    return load


def theirs(pipe, settings, output_type):
    if settings.solver == "euler":
        pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.shift))
    else:
        config = UniPCMultistepScheduler.load_config(model_folder(settings.model) / "scheduler")
        unipc = UniPCMultistepScheduler.from_config(config, flow_shift=settings.shift)
        pipe.register_modules(scheduler=unipc)
    return pipe(
        settings.prompt,
        settings.negative,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type=output_type,
    ).frames


def decoded(name, latents):
    """(T, H, W, 3) uint8, as a worker sends them to be written."""
    model = ModelRef(name, open_model(name).digest, NumericsProfile())
    call = DecodeCall(model, "stream", 0, latents.shape[2])
    return unpack(CardStages(cpu_card(0)).decode(call, pack({"latents": latents})))[0]["frames"]


@pytest.mark.parametrize("case", CASES)
def test_job_equals_the_pipeline(pipeline, tmp_path, case):
    kind, changes = CASES[case]
    name, pipe = pipeline(kind)
    settings = demo_settings(tmp_path, model=name, **changes)
    (result,) = run_jobs([settings], "auto", lambda event: None)
    torch.set_num_threads(1)  # the worker in this process has taken all cores
    latents = load_file(result.latents)["latents"]
    expected = theirs(pipe, settings, "latent")
    difference = (latents - expected).abs().max().item()
    assert difference <= 1e-3 * expected.std().item()  # measured 2.4e-5
    video = torch.from_numpy(theirs(pipe, settings, "np")[0])
    frames = decoded(name, latents)
    assert frames.shape == video.shape
    assert video.std() > 0.05
    rounded = (video * 255).round().to(torch.uint8)
    assert psnr(frames, rounded) >= 50  # measured 90 to 97
