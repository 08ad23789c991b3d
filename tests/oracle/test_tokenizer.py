"""Tokens from a SentencePiece model and from GGUF fields against transformers' T5 tokenizer."""

from __future__ import annotations

import pytest
from transformers import T5TokenizerFast

from reelpool.models.gguf_source import GgufSource
from reelpool.models.spec import TextSpec
from reelpool.models.text import clean_prompt
from reelpool.models.tokenizer import find_tokenizer
from tests import gguf_files
from tests.sentencepiece_models import PROMPTS, gguf_fields, train

SPEC = TextSpec(vocab_size=1000)


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "no bytes"])
def three(request, tmp_path_factory):
    """(transformers' tokenizer, ours from the file, ours from a GGUF file)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = train(byte_fallback=request.param)
    (folder / "spiece.model").write_bytes(content)
    theirs = T5TokenizerFast.from_pretrained(folder, extra_ids=0)
    fields = gguf_fields(content, padding=5)
    gguf = GgufSource(gguf_files.write(folder / "text.gguf", fields=fields))
    sources = (find_tokenizer(gguf, folder), find_tokenizer(gguf))
    return theirs, *(source.load(SPEC) for source in sources)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
def test_tokens_equal_transformers(three, prompt):
    theirs, *both = three
    for text in (prompt, clean_prompt(prompt)):
        expected = theirs(text, max_length=512, padding="max_length", truncation=True)
        for ours in both:
            tokens = ours.encode(text)
            assert tokens.ids == expected["input_ids"]
            assert tokens.attention_mask == expected["attention_mask"]


def test_the_prompts_meet_all_kinds_of_pieces(three):
    """Or the comparison above would not show much."""
    _, ours, _ = three
    ids = {i for prompt in PROMPTS.values() for i in ours.encode(prompt).ids}
    assert {0, 1, 2} <= ids
    assert len(ids) > 40
