"""The memory of real geometries, by the real code without weights: what the project promises.

One block stands for all: it begins and ends with the residual stream alone, and at these sizes it
keeps nothing for the next forward. Figures of the whole depth are in benchmarks/results.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelpool.errors import MissingTensor
from reelpool.models.presets import PRESETS
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.activations import META, MetaWeights, measure_forward
from reelpool.runtime.block_runner import BlockRunner
from reelpool.runtime.meter import peak_of
from reelpool.runtime.types import BlockRange
from tests.lora_files import EVERY, SHAPE, forward_of, random_weights, runner_of

CPU, GIB = torch.device("cpu"), 2**30
WHOLE = BlockRange(0, EVERY.num_layers, EVERY.num_layers)


def measured(name, size, frames, groups=1, layers=1, **options):
    spec = PRESETS[name]
    transformer = replace(spec.transformer, num_layers=layers)
    numerics = NumericsProfile("bfloat16", head_groups=groups)
    return measure_forward(transformer, spec.latent_shape(*size, frames), numerics, **options)


@pytest.mark.parametrize(
    ("size", "groups", "most"),
    [  # measured 1.604, 0.800, 3.674, 1.771; diffusers 3.48 and 8.02
        ((832, 480), 1, 1.65),
        ((832, 480), 8, 0.85),
        ((1280, 720), 1, 3.75),
        ((1280, 720), 8, 1.95),
    ],
)
def test_a_14b_forward_stays_under_its_targets(size, groups, most):
    found = measured("wan2.1-t2v-14b", size, 81, groups)
    assert found.peak_bytes <= most * GIB
    streams = PRESETS["wan2.1-t2v-14b"].transformer.dim * 2 * size[0] * size[1] // 256 * 21
    assert found.peak_bytes > (5 if groups == 1 else 2) * streams  # it counts the large ones
    assert found.pieces[0].num_bytes == streams
    assert sum(piece.num_bytes for piece in found.pieces) == found.peak_bytes


def test_timesteps_per_frame_add_next_to_nothing():
    scalar, own = (
        measured("skyreels-v2-df-14b-540p", (832, 480), 81, 8, per_frame=each)
        for each in (False, True)
    )
    assert own.peak_bytes - scalar.peak_bytes <= 0.05 * GIB  # measured 0; diffusers 6.55


def test_the_peak_does_not_depend_on_the_depth_where_no_text_is_kept():
    one, three = (measured("wan2.1-t2v-1.3b", (512, 512), 33, 8, layers) for layers in (1, 3))
    assert one.peak_bytes == three.peak_bytes
    assert one.kept_bytes == three.kept_bytes


def test_keys_that_are_kept_for_every_block_count():
    """At 80 tokens those of the text are kept, 512 rows a block, and nothing else with them."""
    spec = PRESETS["wan2.1-t2v-1.3b"]
    found = [measured("wan2.1-t2v-1.3b", (64, 64), 17, layers=layers) for layers in (2, 6)]
    each = 2 * 512 * spec.transformer.dim * 2
    assert found[1].kept_bytes - found[0].kept_bytes == 4 * each
    assert found[1].peak_bytes - found[0].peak_bytes == 4 * each


def test_a_short_prompt_takes_less():
    long, short = (
        measured("wan2.1-t2v-1.3b", (512, 512), 17, 8, num_words=words) for words in (512, 40)
    )
    assert short.kept_bytes < long.kept_bytes
    assert short.peak_bytes < long.peak_bytes


@pytest.mark.parametrize(
    "name",
    ["wan2.1-flf2v-14b-720p", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "skyreels-v2-df-1.3b-540p"],
)
def test_every_kind_of_model_is_measured(name):
    assert measured(name, (128, 128), 17).peak_bytes > 0


def test_the_meta_device_counts_what_real_tensors_take():
    """All kinds of layers; the products alone differ: oneDNN's come out of one operator."""
    forward = forward_of(EVERY)
    for groups in (1, 2):
        numerics = NumericsProfile(head_groups=groups)
        real = BlockRunner(EVERY, runner_of(EVERY, random_weights(EVERY))._source, numerics, CPU)
        shapes = BlockRunner(EVERY, MetaWeights(EVERY, torch.float32), numerics, META)
        peaks = []
        for runner in (real, shapes):
            runner.load(WHOLE)
            peaks.append(peak_of(lambda r=runner: r.run(WHOLE, [forward]), runner.device))
        assert peaks[0].live_bytes == peaks[1].live_bytes, SHAPE


def test_a_tensor_that_no_transformer_has_is_refused():
    with pytest.raises(MissingTensor):
        MetaWeights(EVERY, torch.float32).get("blocks.9.ffn.0.weight")
