"""What blocks attend to: folded padding weighs what it should, image rows keep their bits."""

from __future__ import annotations

import pytest
import torch

from reelpool.models import wan_context
from reelpool.models.attention import attention
from reelpool.models.files import open_model
from reelpool.models.wan_weights import load_block, load_image, load_text
from tests.tiny_models import prompt_rows
from tests.tiny_variants import VARIANTS, make_transformer, open_module


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return open_model(str(tiny_model))


@pytest.fixture(scope="module")
def flf2v(tmp_path_factory):
    """Weights of a tiny model of first and last frame."""
    folder = tmp_path_factory.mktemp("variants")
    return open_module("flf2v", make_transformer("flf2v"), folder)


@pytest.mark.parametrize(
    ("num_words", "rows"),
    [
        (0, 32),
        (1, 32),
        (30, 32),
        (31, 64),
        (32, 64),
        (446, 448),
        (478, 480),
        (479, 512),
        (512, 512),
    ],
)
def test_padding_is_folded_into_two_rows(tiny, num_words, rows):
    weights = load_text(tiny.transformer, torch.float32)
    context = wan_context.embed_text(weights, prompt_rows(num_words))
    whole = weights.second(
        torch.nn.functional.gelu(weights.first(prompt_rows(num_words)), approximate="tanh")
    )
    assert torch.equal(context.rows, whole[:rows])
    if rows == 512:
        assert context.bias is None
    else:
        assert context.bias[:-2].count_nonzero() == 0
        assert (context.bias[-2:] >= 0).all()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float32", 1e-6), ("float16", 1e-5), ("bfloat16", 1e-3)],  # measured 2e-14, 3e-6, 2.6e-4
)
def test_folded_rows_weigh_as_much_as_the_padding(tiny, dtype, error):
    weights = load_text(tiny.transformer, getattr(torch, dtype))
    for num_rows in (34, 50, 64, 100, 257, 512):
        for num_words in (0, 1, 7, 30, 31, 62, 200):
            rows = prompt_rows(num_words)[:num_rows]
            bias = wan_context.embed_text(weights, rows).bias
            if bias is None:  # nothing to fold, or too little for a multiple of 32 rows
                assert wan_context.rounded_up(num_words + 2) >= num_rows
                continue
            assert bias.dtype == getattr(torch, dtype)
            weight = bias.double().exp().sum()
            assert weight.item() == pytest.approx(num_rows, rel=error)


@pytest.mark.parametrize("num_words", [0, 30, 31, 32, 478, 479, 480, 510, 511, 512])
def test_folding_attends_as_all_rows_do(tiny, num_words):
    spec = tiny.spec.transformer
    block = load_block(spec, tiny.transformer, 0, torch.float32)
    weights = load_text(tiny.transformer, torch.float32)
    rows = prompt_rows(num_words)
    folded = wan_context.text_key_value(spec, block, wan_context.embed_text(weights, rows))
    hidden = torch.nn.functional.gelu(weights.first(rows), approximate="tanh")
    whole = wan_context.Context(weights.second(hidden))
    plain = wan_context.text_key_value(spec, block, whole)
    query = torch.randn(
        5, spec.num_heads, spec.head_dim, generator=torch.Generator().manual_seed(3)
    )
    ours = attention(query, folded.key, folded.value, bias=folded.bias)
    torch.testing.assert_close(ours, attention(query, plain.key, plain.value), rtol=0, atol=4e-6)


def test_text_rows_have_the_same_bits_however_long_the_padding(tiny):
    weights = load_text(tiny.transformer, torch.float32)
    short, full = prompt_rows(20), prompt_rows(512)
    assert torch.equal(
        wan_context.embed_text(weights, short).rows[:20],
        wan_context.embed_text(weights, full).rows[:20],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_rows_have_the_same_bits_on_any_number_of_threads(flf2v, dtype):
    spec = VARIANTS["flf2v"]
    image, block = load_image(spec, flf2v, dtype), load_block(spec, flf2v, 0, dtype)
    features = torch.randn(514, spec.image_dim, generator=torch.Generator().manual_seed(1))

    def run(count, num_threads):
        torch.set_num_threads(num_threads)
        context = wan_context.embed_image(image, features[:count])
        made = wan_context.image_key_value(spec, block, context)
        assert context.rows.shape == (count, spec.dim)
        assert context.bias is None
        assert made.key.shape == made.value.shape == (count, spec.num_heads, spec.head_dim)
        return context.rows, made.key, made.value

    whole = run(514, 1)
    for count in (1, 11, 257, 514):
        for num_threads in (1, 2):
            for part, all_rows in zip(run(count, num_threads), whole, strict=True):
                assert torch.equal(part, all_rows[:count])


def test_a_model_without_an_image_embedding_loads_none(tiny):
    assert load_image(tiny.spec.transformer, tiny.transformer, torch.float32) is None
