"""Where tokenizers are found, and what is refused; tests/oracle compares their tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from reelpool.errors import WeightError
from reelpool.models.gguf_source import GgufSource
from reelpool.models.open_weights import open_weights
from reelpool.models.spec import TextSpec
from reelpool.models.tokenizer import find_tokenizer
from tests import gguf_files
from tests.sentencepiece_models import PROMPTS, edited, gguf_fields, train

SPEC = TextSpec(vocab_size=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same tokenizer in every form."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "spiece.model").write_bytes(train())
    find_tokenizer(empty(folder), folder).read().save(str(folder / "tokenizer.json"))
    save(folder / "umt5.safetensors", train())
    gguf_files.write(folder / "umt5.gguf", fields=gguf_fields(train(), padding=3))
    return folder


def empty(folder):
    """A text encoder without a tokenizer."""
    save_file({"shared.weight": torch.zeros(1)}, folder / "empty.safetensors")
    return open_weights(folder / "empty.safetensors")


def save(path, content, name="spiece_model"):
    tensor = torch.tensor(list(content), dtype=torch.uint8)
    save_file({name: tensor, "shared.weight": torch.zeros(1)}, path)
    return open_weights(path)


def refusal(source, spec=SPEC):
    with pytest.raises(WeightError) as caught:
        source().load(spec)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert ", expected " in sentence
    return sentence


def test_every_form_gives_the_same_tokens(folder):
    none = empty(folder)
    sources = {
        "json": find_tokenizer(none, folder),
        "json file": find_tokenizer(none, folder / "tokenizer.json"),
        "spiece": find_tokenizer(none, folder / "spiece.model"),
        "tensor": find_tokenizer(open_weights(folder / "umt5.safetensors")),
        "gguf": find_tokenizer(open_weights(folder / "umt5.gguf")),
    }
    assert sources["json"].path == folder / "tokenizer.json"
    assert sources["tensor"].path is None
    words = {form: source.load(SPEC) for form, source in sources.items()}
    for prompt in PROMPTS.values():
        tokens = {form: tokenizer.encode(prompt) for form, tokenizer in words.items()}
        assert len(tokens["json"].ids) == 512
        assert len({tuple(each.ids) for each in tokens.values()}) == 1
        assert len({tuple(each.attention_mask) for each in tokens.values()}) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "tokenizer.model"])
def test_a_folder_may_hold_any_of_the_files(folder, tmp_path, name):
    stored = "spiece.model" if name.endswith(".model") else name
    (tmp_path / name).write_bytes((folder / stored).read_bytes())
    source = find_tokenizer(empty(folder), tmp_path)
    assert source.path == tmp_path / name
    assert source.load(SPEC).encode("a red ring").ids[-1] == 0


def test_the_named_tokenizer_goes_before_the_one_inside(folder, tmp_path):
    inside = open_weights(folder / "umt5.safetensors")
    assert find_tokenizer(inside, folder).path == folder / "tokenizer.json"


def test_a_tensor_with_a_prefix_is_found(tmp_path):
    source = save(tmp_path / "a.safetensors", train(), "text_encoders.umt5xxl.spiece_model")
    assert find_tokenizer(source).load(SPEC).encode("a red").ids[2:4] == [1, 0]


def test_padding_pieces_of_a_gguf_file_do_not_change_the_tokens(tmp_path):
    """Though their -10000 lowers the score of the unknown piece."""
    tokens = []
    for padding in (0, 40):
        path = gguf_files.write(tmp_path / "a.gguf", fields=gguf_fields(train(), padding))
        tokenizer = find_tokenizer(GgufSource(path)).load(SPEC)
        tokens.append([tokenizer.encode(prompt).ids for prompt in PROMPTS.values()])
    assert tokens[0] == tokens[1]


def test_options_of_the_model_are_kept(tmp_path):
    content = edited(
        train(),
        normalizer_spec__add_dummy_prefix=False,
        normalizer_spec__remove_extra_whitespaces=False,
    )
    (tmp_path / "spiece.model").write_bytes(content)
    plain = find_tokenizer(save(tmp_path / "a.safetensors", train())).load(SPEC)
    from_file = find_tokenizer(empty(tmp_path), tmp_path).load(SPEC)
    path = gguf_files.write(tmp_path / "a.gguf", fields=gguf_fields(content))
    from_gguf = find_tokenizer(GgufSource(path)).load(SPEC)
    for text in ("red ring", "red  ring"):
        ids = from_file.encode(text).ids
        assert ids == from_gguf.encode(text).ids
        assert ids != plain.encode(text).ids


def test_no_tokenizer_anywhere_is_asked_for_by_name(tmp_path):
    sentence = refusal(lambda: find_tokenizer(empty(tmp_path)))
    assert "empty.safetensors: found no tokenizer in it" in sentence
    assert "tokenizer.json or spiece.model of google/umt5-xxl" in sentence
    (tmp_path / "tokenizer").mkdir()
    sentence = refusal(lambda: find_tokenizer(empty(tmp_path), tmp_path / "tokenizer"))
    assert "tokenizer/tokenizer.json: found no such file" in sentence
    sentence = refusal(lambda: find_tokenizer(empty(tmp_path), tmp_path / "gone" / "spiece.model"))
    assert "gone/spiece.model: found no such file" in sentence


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": []}', "[]"])
def test_a_json_that_is_no_tokenizer_is_refused_when_found(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightError, match=r"tokenizer\.json: found "):
        find_tokenizer(empty(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda c: b"", "0 bytes"),
        (lambda c: c[: len(c) // 2], "a broken file"),
        (lambda c: b"\x00" * 99, "a broken file"),
        (lambda c: b"<html>", "a broken file"),
        (lambda c: b"\x7a\x00", "pieces whose scores are not finite, or none"),
        (lambda c: edited(c, trainer_spec__unk_id=5000), "number 5000 for the unknown piece"),
        (lambda c: edited(c, trainer_spec__eos_id=-1), "number -1 for the end piece"),
        (lambda c: train("bpe"), "a SentencePiece model of type BPE"),
        (lambda c: edited(c, normalizer_spec__precompiled_charsmap=b"\xff" * 9), "a broken file"),
    ],
)
def test_damaged_sentencepiece_models_are_refused(tmp_path, damage, found):
    path = tmp_path / "spiece.model"
    path.write_bytes(damage(train()))
    assert f"spiece.model: found {found}" in refusal(lambda: find_tokenizer(empty(tmp_path), path))
    if path.stat().st_size:
        source = save(tmp_path / "a.safetensors", path.read_bytes())
        sentence = refusal(lambda: find_tokenizer(source))
        assert f"a.safetensors: tensor spiece_model: found {found}" in sentence


def test_an_empty_tensor_is_refused(tmp_path):
    source = save(tmp_path / "a.safetensors", b"")
    assert "tensor spiece_model: found 0 bytes" in refusal(lambda: find_tokenizer(source))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"add_token_scores": [1.0]}, "scores and"),
        ({"add_tokenizer_model": "gpt2"}, "a tokenizer of type 'gpt2'"),
        ({"add_token_scores": [float("nan")] * 420}, "scores are not finite"),
        ({"add_unk_token_id": 2**31}, f"number {2**31} for the unknown piece"),
        ({"add_precompiled_charsmap": b"\xff" * 9}, "a broken file"),
        ({"add_tokenizer_model": 7}, "a tokenizer of type '7'"),
    ],
)
def test_damaged_fields_of_a_gguf_file_are_refused(tmp_path, change, found):
    fields = [(key, change.get(key, value)) for key, value in gguf_fields(train())]
    if "add_tokenizer_model" in change:
        fields[0] = ("add_tokenizer_model", str(change["add_tokenizer_model"]))
    source = GgufSource(gguf_files.write(tmp_path / "a.gguf", fields=fields))
    assert found in refusal(lambda: find_tokenizer(source))


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder):
    for name in ("umt5.safetensors", "umt5.gguf"):
        source = open_weights(folder / name)
        sentence = refusal(lambda source=source: find_tokenizer(source), TextSpec(vocab_size=99))
        assert "expected at most 98, the text encoder's vocab_size less 1" in sentence


@given(st.data())
def test_changed_bytes_end_in_a_tokenizer_or_one_sentence(tmp_path_factory, data):
    content = np.frombuffer(train(), np.uint8).copy()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "spiece.model"
    path.write_bytes(content.tobytes()[: data.draw(st.integers(1, len(content)))])
    sentence, highest = "x, expected y", 0
    try:
        source = find_tokenizer(empty(path.parent), path)
        highest = max(source.encode(source.load(SPEC), "a red ring 漢").ids)
    except WeightError as error:  # anything else fails the test
        sentence = str(error)
    assert ", expected " in sentence
    assert "\n" not in sentence
    assert highest < SPEC.vocab_size


def test_a_table_of_characters_that_points_outside_is_refused(tmp_path):
    """It shows in a text that leads there, as a panic of the library, which is no Exception."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train())
    table = bytearray(model.normalizer_spec.precompiled_charsmap)
    size = int.from_bytes(table[:4], "little")
    for place in range(4, 4 + size, 4):  # the values of the trie's leaves: offsets into texts
        if int.from_bytes(table[place : place + 4], "little") >> 31:
            table[place : place + 4] = (0x80FFFFFF).to_bytes(4, "little")
    content = edited(train(), normalizer_spec__precompiled_charsmap=bytes(table))
    (tmp_path / "spiece.model").write_bytes(content)
    source = find_tokenizer(empty(tmp_path), tmp_path)
    tokenizer = source.load(SPEC)
    assert source.encode(tokenizer, "a red").ids[:2] == tokenizer.encode("a red").ids[:2]
    with pytest.raises(WeightError, match=r"spiece\.model: found a broken file \(.*out of bounds"):
        source.encode(tokenizer, PROMPTS["changed by normalising"])


def test_a_tokenizer_json_is_taken_as_it_is(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = find_tokenizer(empty(folder), tmp_path).load(SPEC)
    assert tokenizer.encode("A RED").ids == tokenizer.encode("a red").ids
