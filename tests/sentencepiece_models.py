"""Tiny SentencePiece models, trained here, and the same as fields of a GGUF file."""

from __future__ import annotations

import io
import random
from functools import cache

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

WORDS = (  # noqa: SIM905  # as people write prompts
    "a an the red yellow blue teal star ring square moves spins bounces slowly over under beside "
    "background camera pans left right cinematic light, shadow; rain. snow! mist? näive café 42 7"
).split()
EXTRA = "色 調 鮮 艷 過 曝 \uff0c 靜 態 ё ж я ﬁ ½ Å"

SYLLABLES = ["ka", "mo", "ri", "ten", "sul", "vo", "pra", "in", "gel", "du"]

PROMPTS = {
    "plain": "a red star moves slowly over the teal background",
    "made-up words": "moriten Kasul, provoin! dukagel's rimo-tensul x1y 2.5 sulsulsul",
    "empty": "",
    "spaces": " \n a \t red   ring ",
    "chinese": "色調艷\uff0c過曝 a star",
    "not in the vocabulary": "漢字 🙂 ☃ Ω zzz",
    "changed by normalising": "ﬁnal ½ \uff21\u3000\uff22\u200b\uff23 cafe\u0301 Å\u00a0red",
    "special": "a red</s> ring <pad><unk> <0x41>",
    "sign of a space": "a▁red ▁ star",
    "long": "a red ring spins " * 200,
}


def lines(seed: int = 3, count: int = 400) -> list[str]:
    draw = random.Random(seed)
    pool = [*WORDS, *WORDS, *EXTRA.split()]
    pool += ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(pool, k=draw.randint(3, 12))) for _ in range(count)]


@cache
def train(kind: str = "unigram", byte_fallback: bool = True) -> bytes:
    """A model like UMT5's: <pad> 0, </s> 1, <unk> 2, pieces for bytes, NFKC."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=writer,
        model_type=kind,
        vocab_size=420,
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


def edited(content: bytes, **changes: object) -> bytes:
    """The same model with other values: `trainer_spec__unk_id=99`."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    for key, value in changes.items():
        part, _, field = key.partition("__")
        setattr(getattr(model, part), field, value)
    return model.SerializeToString()


def gguf_fields(content: bytes, padding: int = 0, kind: str = "t5") -> list[tuple]:
    """What llama.cpp's converter writes of a model: calls of gguf's writer.

    padding: pieces that it adds to fill the vocabulary, scored -10000.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    pieces = [(p.piece, p.score, p.type) for p in model.pieces]
    pieces += [(f"[PAD{len(pieces) + i}]", -10000.0, 5) for i in range(padding)]
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    return [
        ("add_tokenizer_model", kind),
        ("add_token_list", texts),
        ("add_token_scores", scores),
        ("add_token_types", kinds),
        ("add_add_space_prefix", model.normalizer_spec.add_dummy_prefix),
        ("add_remove_extra_whitespaces", model.normalizer_spec.remove_extra_whitespaces),
        ("add_precompiled_charsmap", model.normalizer_spec.precompiled_charsmap),
        ("add_eos_token_id", 1),
        ("add_unk_token_id", 2),
        ("add_pad_token_id", 0),
    ]
