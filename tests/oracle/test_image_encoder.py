"""Our image encoder against transformers' CLIP vision tower, and Wan's treatment of images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from reelpool.models.image_encoder import MEAN, STD, ImageEncoder, open_image_encoder
from reelpool.models.open_weights import open_weights
from tests.clip_files import to_original

NUM_LAYERS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(9)
    config = CLIPVisionConfig(
        hidden_size=160, intermediate_size=64, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2, image_size=28, patch_size=7, hidden_act="gelu",
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    for parameter in tower.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return tower


@pytest.fixture(scope="module", params=["folder", "original"])
def ours(request, tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    path, config = folder, {"num_attention_heads": 2, "hidden_act": "gelu"}
    if request.param == "folder":
        tower.save_pretrained(folder)
    else:
        path, config = folder / "clip.pth", None
        torch.save(to_original(dict(tower.state_dict()), NUM_LAYERS), path)
    spec, source = open_image_encoder(open_weights(path), config)
    return ImageEncoder(spec, source, torch.float32, CPU)


def as_wan_does(image):
    """The steps of CLIPModel.visual: pixels of -1 to 1 squashed, brought to 0 to 1, normalised."""
    pixels = F.interpolate(image * 2 - 1, size=(28, 28), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.mul(0.5).add(0.5) - mean) / std


@pytest.mark.parametrize("size", [(28, 28), (48, 96), (11, 20)], ids=str)
def test_features_equal_transformers(ours, tower, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    rows = ours.encode(images)
    with torch.inference_mode():
        states = tower(as_wan_does(images), output_hidden_states=True).hidden_states
    expected = states[-2].flatten(0, 1)
    assert rows.shape == (2 * 17, 160)
    assert rows.dtype == torch.float32
    assert expected.std() > 0.1
    assert (states[-1].flatten(0, 1) - expected).abs().max() > 0.1
    torch.testing.assert_close(
        rows, expected, rtol=0, atol=1e-4
    )  # measured 2e-5, from the pixels' way over -1 to 1


def test_the_activation_of_the_config_is_taken(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    config = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    spec, source = open_image_encoder(open_weights(tmp_path), config)
    images = torch.rand(1, 3, 28, 28)
    quick = ImageEncoder(spec, source, torch.float32, CPU).encode(images)
    spec, source = open_image_encoder(open_weights(tmp_path))
    assert spec.activation == "gelu"
    assert not torch.allclose(
        quick, ImageEncoder(spec, source, torch.float32, CPU).encode(images), atol=1e-3
    )
