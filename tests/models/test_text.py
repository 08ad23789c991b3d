"""Prompt cleaning and the text encoder's refusals; its numbers are tests/oracle's business."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelpool.errors import NumericError, WeightError
from reelpool.models.files import open_model
from reelpool.models.text import TextEncoder, clean_prompt
from reelpool.models.tokenizer import find_tokenizer
from tests.tiny_models import TEXT_ENCODER, copy_model, edit_tensors

CPU = torch.device("cpu")


class Untouched:
    """A source nobody may read."""

    where = "untouched"

    def get(self, name):
        raise AssertionError(f"{name} was read")

    names = info = matrix = get


def words_of(folder):
    return find_tokenizer(Untouched(), folder / "tokenizer")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a  b\n\tc ", "a b c"),
        ("", ""),
        ("a &amp;amp; b", "a & b"),
        ("a &amp;amp;amp; b", "a &amp; b"),
        ("&lt;b&gt;", "<b>"),
        ("a&nbsp;b", "a b"),
        ("tick", "tick"),
    ],
)
def test_prompts_are_cleaned(text, clean):
    assert clean_prompt(text) == clean


def test_loaded_weights_take_the_type_asked_for(tiny_model):
    files = open_model(str(tiny_model))
    full, half = (
        TextEncoder(files.spec.text, files.text_encoder, words_of(tiny_model), dtype, CPU)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert full.num_bytes == 4 * files.spec.text.num_params
    assert half.num_bytes == 2 * files.spec.text.num_params
    exact, near = full.encode("a red ring"), half.encode("a red ring")
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()  # measured 0.022


def test_rows_behind_the_prompt_are_zero(tiny_model):
    files = open_model(str(tiny_model))
    encoder = TextEncoder(
        files.spec.text, files.text_encoder, words_of(tiny_model), torch.float32, CPU
    )
    rows = encoder.encode("a red ring spins")
    assert rows.shape == (512, files.spec.text.dim)
    assert (rows.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rows, encoder.encode(" a red   ring spins\n"))


@pytest.mark.parametrize("content", ['{"model": {}}', '{"model": {"type": "X"}}'])
def test_a_broken_tokenizer_is_refused_before_weights_are_read(tiny_model, tmp_path, content):
    folder = copy_model(tiny_model, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").write_text(content)
    spec = open_model(str(tiny_model)).spec.text
    with pytest.raises(WeightError, match=r"tokenizer\.json: found a broken file"):
        TextEncoder(spec, Untouched(), words_of(folder), torch.float32, CPU)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tiny_model):
    spec = open_model(str(tiny_model)).spec.text
    highest, spec = spec.vocab_size - 1, replace(spec, vocab_size=40)
    with pytest.raises(WeightError, match=f"token number {highest}, expected at most 39"):
        TextEncoder(spec, Untouched(), words_of(tiny_model), torch.float32, CPU)


def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    edit_tensors(folder / TEXT_ENCODER, **{name: torch.full((32, 37), float("nan"))})
    files = open_model(str(folder))
    with pytest.raises(WeightError, match=rf"tensor {name} with NaN or infinity"):
        TextEncoder(files.spec.text, files.text_encoder, words_of(folder), torch.float32, CPU)


def test_embeddings_that_overflow_are_refused(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    huge = {"encoder.final_layer_norm.weight": torch.full((32,), 3e38)}
    edit_tensors(folder / TEXT_ENCODER, **huge)
    files = open_model(str(folder))
    encoder = TextEncoder(files.spec.text, files.text_encoder, words_of(folder), torch.float32, CPU)
    with pytest.raises(NumericError, match="embeddings of 'a red ring'; compute in bfloat16"):
        encoder.encode("a red ring")
