"""Our text encoder against the one of diffusers' WanPipeline, tokenizer included."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from reelpool.models.files import open_model
from reelpool.models.text import TextEncoder

PROMPTS = {
    "plain": "a yellow star moves right over a navy background",
    "empty": "",
    "spaces": " \n\t ",
    "entities": "a red &amp;amp; blue&nbsp;ring &lt;spins&gt;  on   a\tteal background ",
    "unknown": "une étoile jaune, 漢字 🙂!",
    "too long": "a red ring bounces " * 200,
    "just fits": "red " * 511,
    "one too many": "red " * 512,
}


@pytest.fixture(scope="module")
def both(tiny_model):
    """Model name -> (our encoder, diffusers' pipeline with nothing but text)."""

    @cache
    def load(name):
        files = open_model("demo" if name == "demo" else str(tiny_model))
        spec, cpu = files.spec.text, torch.device("cpu")
        ours = TextEncoder(spec, files.text_encoder, files.tokenizer, torch.float32, cpu)
        pipe = WanPipeline(
            AutoTokenizer.from_pretrained(files.folder / "tokenizer"),
            UMT5EncoderModel.from_pretrained(files.folder / "text_encoder", dtype=torch.float32),
            vae=None,
            scheduler=None,
        )
        return ours, pipe

    return load


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_encoding_equals_diffusers(both, name, prompt):
    ours, pipe = both(name)
    rows = ours.encode(prompt)
    with torch.inference_mode():
        (expected,) = pipe._get_t5_prompt_embeds(prompt, max_sequence_length=512)
    assert rows.shape == expected.shape
    assert rows.dtype == torch.float32
    assert expected.std() > 0.001
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)  # measured equal bits


def test_the_longest_prompt_has_no_padding_and_the_empty_one_only_its_end(both):
    ours, _ = both("tiny")
    assert (ours.encode(PROMPTS["too long"]).abs().sum(1) > 0).all()
    empty = ours.encode("").abs().sum(1) > 0
    assert empty.nonzero().flatten().tolist() == [0]
