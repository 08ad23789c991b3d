"""What a diffusers folder says of the whole model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reelpool.errors import WeightError
from reelpool.models.model_index import PIPELINES, ModelIndex, folder_defaults, read_index
from reelpool.models.spec import ModelDefaults

START = ModelDefaults(shift=5.0, guidance_low=3.0)


def index(folder, **content):
    (folder / "model_index.json").write_text(json.dumps(content))
    return read_index(folder)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_pipeline_is_read(tmp_path, kind):
    found = index(tmp_path, _class_name=kind, boundary_ratio=None, expand_timesteps=False)
    assert found == ModelIndex(is_forcing="DiffusionForcing" in kind)


def test_boundary_and_first_frame_are_read(tmp_path):
    kind = "WanImageToVideoPipeline"
    assert index(tmp_path, _class_name=kind, boundary_ratio=0.9) == ModelIndex(boundary=0.9)
    assert index(tmp_path, _class_name=kind, expand_timesteps=True).is_first_frame
    assert not index(tmp_path, _class_name="WanPipeline", expand_timesteps=True).is_first_frame


@pytest.mark.parametrize("boundary", [1, -0.1, True, "0.9", [0.9], float("nan")])
def test_a_boundary_that_cannot_be_is_refused(tmp_path, boundary):
    with pytest.raises(WeightError, match="expected a number from 0 to 1"):
        index(tmp_path, _class_name="WanPipeline", boundary_ratio=boundary)


@pytest.mark.parametrize("kind", [None, "WanVACEPipeline", ["WanPipeline"], 3])
def test_another_pipeline_is_refused(tmp_path, kind):
    with pytest.raises(WeightError, match=r"a model of class .* expected WanPipeline or "):
        index(tmp_path, _class_name=kind)


def test_the_scheduler_and_our_own_file_give_defaults(tmp_path):
    assert folder_defaults(tmp_path, START) == START
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3}')
    assert folder_defaults(tmp_path, START) == replace(START, shift=3.0)
    own = {"shift": 2.5, "steps": 7, "prompt": "a red ball", "guidance_low": 1, "unknown": []}
    (tmp_path / "demo.json").write_text(json.dumps(own))
    expected = replace(START, shift=2.5, steps=7, prompt="a red ball", guidance_low=1.0)
    assert folder_defaults(tmp_path, START) == expected
