"""Jobs with images, two experts or a frame rate against diffusers' pipelines, same folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
)
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing as skyreels
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image
from safetensors.torch import load_file

from reelpool.models.files import open_model
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.device import cpu_card
from reelpool.runtime.quality import psnr
from reelpool.runtime.stages import CardStages
from reelpool.runtime.types import DecodeCall, ModelRef
from reelpool.runtime.wire import pack, unpack
from reelpool.scheduler.executor import run_jobs
from tests.settings import demo_settings
from tests.tiny_image_models import IMAGE_SIZE, KINDS, write_image_model

ALL = {
    "width": IMAGE_SIZE,
    "height": IMAGE_SIZE,
    "frames": 9,
    "steps": 4,
    "shift": 5.0,
    "guidance": 3.0,
    "negative": "a red ring",
}
CASES = {  # id: (model, number of images, changes)
    "I2V 2.1": ("i2v-2.1", 1, {}),
    "I2V 2.1, guidance 1, Euler": ("i2v-2.1", 1, {"guidance": 1.0, "solver": "euler"}),
    "FLF2V": ("flf2v", 2, {}),
    "I2V 2.2": ("i2v-2.2", 1, {"guidance_low": 2.0}),
    "I2V 2.2, last image": ("i2v-2.2", 2, {"frames": 5, "steps": 3}),
    "T2V 2.2": ("t2v-2.2", 0, {"guidance": 4.0, "guidance_low": 1.5, "steps": 5}),
    "TI2V": ("ti2v", 0, {"height": 64}),
    "TI2V with an image": ("ti2v", 1, {"height": 64}),
    "SkyReels DF, 24 frames a second": ("df", 0, {"fps": 24.0}),
    "SkyReels DF, 16 frames a second": ("df", 0, {"fps": 16.0}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two images of each size used, and the models by kind, written when asked for."""
    made = tmp_path_factory.mktemp("image-models")
    for height in (IMAGE_SIZE, 64):
        for index in (1, 2):
            rng = np.random.default_rng(index)
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            smooth = small.resize((IMAGE_SIZE, height), Image.Resampling.BICUBIC)
            smooth.save(made / f"{index}-{height}.png")
    return made


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Some of diffusers' pipelines take ftfy for granted; that of Wan's text models does not."""
    for module in (pipeline_wan_i2v, skyreels):
        monkeypatch.setattr(module, "prompt_clean", pipeline_wan.prompt_clean)


@pytest.fixture(autouse=True)
def without_aliases(monkeypatch):
    """SkyReels' pipeline overwrites the sample that UniPC keeps for its corrector (0.19 off)."""
    step = UniPCMultistepScheduler.step

    def of_a_copy(self, output, timestep, sample, **more):
        return step(self, output, timestep, sample.clone(), **more)

    monkeypatch.setattr(UniPCMultistepScheduler, "step", of_a_copy)


@pytest.fixture(scope="module")
def model(folder):
    return cache(lambda kind: str(write_image_model(folder / kind, kind)))


def theirs(model: str, kind: str, settings, output_type: str):
    # a model folder says its pipeline; TI2V's says the one without image
    is_image = settings.image is not None
    pipe = (WanImageToVideoPipeline if is_image else KINDS[kind][0]).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if settings.solver == "euler":
        pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.shift))
    more: dict[str, object] = {}
    if is_image:
        more["image"] = Image.open(settings.image).convert("RGB")
    if settings.last_image is not None:
        more["last_image"] = Image.open(settings.last_image).convert("RGB")
    if kind == "df":
        more["fps"] = int(settings.fps)
    if KINDS[kind][2] is not None:
        more["guidance_scale_2"] = settings.guidance_low
    return pipe(
        prompt=settings.prompt,
        negative_prompt=settings.negative,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type=output_type,
        **more,
    ).frames


@pytest.mark.parametrize("case", CASES)
def test_job_equals_the_pipeline(model, folder, tmp_path, case):
    kind, num_images, changes = CASES[case]
    values = {**ALL, **changes}
    paths = [folder / f"{index}-{values['height']}.png" for index in (1, 2)]
    values |= dict(zip(("image", "last_image"), paths[:num_images], strict=False))
    settings = demo_settings(tmp_path, model=model(kind), **values)
    (result,) = run_jobs([settings], "auto", lambda event: None)
    torch.set_num_threads(1)  # the worker in this process has taken all cores
    latents = load_file(result.latents)["latents"]
    expected = theirs(settings.model, kind, settings, "latent")
    difference = (latents - expected).abs().max().item()
    assert difference <= 1e-3 * expected.std().item()  # measured 1e-6 to 3e-6
    frames = decoded(settings.model, latents)
    video = torch.from_numpy(theirs(settings.model, kind, settings, "np")[0])
    assert frames.shape == video.shape
    assert video.std() > 0.05
    assert psnr(frames, (video * 255).round().to(torch.uint8)) >= 50  # measured 78 and up


def decoded(name: str, latents: torch.Tensor) -> torch.Tensor:
    """(T, H, W, 3) uint8, as a worker sends them to be written."""
    model = ModelRef(name, open_model(name).digest, NumericsProfile())
    call = DecodeCall(model, "stream", 0, latents.shape[2])
    return unpack(CardStages(cpu_card(0)).decode(call, pack({"latents": latents})))[0]["frames"]
