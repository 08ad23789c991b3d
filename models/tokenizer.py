"""The text encoder's tokenizer, wherever it lies, as one `tokenizers.Tokenizer`.

A `tokenizer.json` is taken as it is. A SentencePiece model (a file, or bytes inside of a weight
file as ComfyUI writes them) and the fields of a GGUF file become the tokenizer that transformers
makes of them for T5, so that the same prompt gives the same tokens from every form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from tokenizers import AddedToken, Encoding, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from reelpool.errors import WeightError

from .companions import TOKENIZER_FILES
from .gguf_source import GgufSource
from .jsonfile import MAX_BYTES, read_json
from .spec import TextSpec
from .weights import WeightSource

TENSOR = "spiece_model"  # ComfyUI's name of the SentencePiece bytes inside of a text encoder
GGUF = "tokenizer.ggml."
ADVICE = "put tokenizer.json or spiece.model of google/umt5-xxl into a folder `tokenizer` beside it"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of pieces, the same in both formats


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer lies. Nothing is decoded until `load`.

    where: the file, for messages. read: makes the tokenizer. path: the file, None if it lies in
    the text encoder's own.
    """

    where: str
    read: Callable[[], Tokenizer]
    path: Path | None = None

    def load(self, spec: TextSpec) -> Tokenizer:
        """Make the tokenizer, cutting and padding to the encoder's length.

        Raises:
            WeightError: if it is broken or made for another vocabulary.
        """
        try:
            tokenizer = self.read()
        except WeightError:
            raise
        except BaseException as error:  # the libraries raise bare ones for every kind of damage
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise WeightError(self.where, f"a broken file ({error})", "a tokenizer") from None
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= spec.vocab_size:
            expected = f"at most {spec.vocab_size - 1}, the text encoder's vocab_size less 1"
            raise WeightError(self.where, f"token number {highest}", expected)
        pad = tokenizer.token_to_id("<pad>")
        tokenizer.enable_truncation(spec.max_length)
        tokenizer.enable_padding(length=spec.max_length, pad_id=0 if pad is None else pad)
        return tokenizer

    def encode(self, tokenizer: Tokenizer, text: str) -> Encoding:
        """Tokens of a text by what `load` gave.

        Raises:
            WeightError: if the text leads into a damaged part of the tokenizer's tables.
        """
        try:
            return tokenizer.encode(text)
        except BaseException as error:  # a panic is no Exception
            if not _is_panic(error):
                raise
            raise WeightError(self.where, f"a broken file ({error})", "a tokenizer") from None


def _is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library (Rust) gave up: its class is no Exception, nor importable.

    Met with tables of characters whose offsets point outside.
    """
    return type(error).__name__ == "PanicException"


def find_tokenizer(text_encoder: WeightSource, tokenizer: Path | None = None) -> TokenizerSource:
    """Find the tokenizer of a text encoder.

    Args:
        text_encoder: its weights under the names they are stored by.
        tokenizer: a tokenizer.json, a SentencePiece model, or a folder with one of them; None
            looks inside of the text encoder's own file.
    Raises:
        WeightError: if there is none, or what is there is no tokenizer at first sight.
    """
    if tokenizer is not None:
        return _from_path(tokenizer)
    where = text_encoder.where
    for name in text_encoder.names():
        if name.rpartition(".")[2] == TENSOR:
            place = f"{where}: tensor {name}"
            return TokenizerSource(place, partial(_from_tensor, place, text_encoder, name))
    if isinstance(text_encoder, GgufSource) and f"{GGUF}tokens" in text_encoder.metadata:
        return TokenizerSource(where, partial(_from_gguf, where, text_encoder.metadata))
    raise WeightError(where, "no tokenizer in it", "one in it or beside it", ADVICE)


def _from_path(path: Path) -> TokenizerSource:
    if path.is_dir() and path.name not in TOKENIZER_FILES:
        files = [path / name for name in TOKENIZER_FILES]
        path = next((file for file in files if file.exists()), files[0])
    if not path.exists():
        raise WeightError(str(path), "no such file", "a tokenizer.json or spiece.model", ADVICE)
    if path.suffix != ".json":
        _read_bytes(path)
        return TokenizerSource(str(path), partial(_from_file, path), path)
    if not isinstance(read_json(path).get("model"), dict):
        raise WeightError(str(path), "no model in it", "a tokenizer's vocabulary")
    return TokenizerSource(str(path), partial(Tokenizer.from_file, str(path)), path)


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise WeightError(
                str(path), f"{size} bytes", f"a SentencePiece model, 1 to {MAX_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        found = f"an unreadable file ({error.strerror})"
        raise WeightError(str(path), found, "a SentencePiece model") from None


def _from_file(path: Path) -> Tokenizer:
    return _from_sentencepiece(str(path), _read_bytes(path))


def _from_tensor(where: str, source: WeightSource, name: str) -> Tokenizer:
    num_bytes = source.info(name).num_bytes
    if not 0 < num_bytes <= MAX_BYTES:
        raise WeightError(where, f"{num_bytes} bytes", f"a SentencePiece model, 1 to {MAX_BYTES}")
    return _from_sentencepiece(where, source.get(name).contiguous().numpy().tobytes())


@dataclass(frozen=True)
class _Vocabulary:
    """A unigram vocabulary as SentencePiece has it.

    pieces: text and score by number. kinds: of each piece. charsmap: its table that normalises
    characters, may be empty. add_prefix: whether a text starts with a space. squeeze: whether
    runs of white space are one.
    """

    where: str
    pieces: list[tuple[str, float]]
    kinds: list[int]
    unknown: int
    end: int
    charsmap: bytes
    add_prefix: bool
    squeeze: bool

    def refuse(self, found: str, expected: str) -> NoReturn:
        raise WeightError(self.where, found, expected, "take the tokenizer of google/umt5-xxl")


def _from_sentencepiece(where: str, content: bytes) -> Tokenizer:
    # imported here: it takes the protobuf library, which only these files need
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made on import
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own class differs between its back ends
        raise WeightError(where, f"a broken file ({error})", "a SentencePiece model") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    vocabulary = _Vocabulary(
        where,
        [(piece.piece, piece.score) for piece in model.pieces],
        [piece.type for piece in model.pieces],
        trainer.unk_id,
        trainer.eos_id,
        normalizer.precompiled_charsmap,
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
    )
    if trainer.model_type != trainer.UNIGRAM:
        kind = trainer.ModelType.Name(trainer.model_type)
        vocabulary.refuse(f"a SentencePiece model of type {kind}", "UNIGRAM")
    return _build(vocabulary)


def _from_gguf(where: str, metadata: Mapping[str, object]) -> Tokenizer:
    kind = metadata.get(f"{GGUF}model")
    texts, scores, kinds, charsmap = (
        value if isinstance(value, list) else []
        for value in (
            metadata.get(GGUF + key)
            for key in ("tokens", "scores", "token_type", "precompiled_charsmap")
        )
    )
    unknown, end = (metadata.get(f"{GGUF}{key}_token_id") for key in ("unknown", "eos"))
    vocabulary = _Vocabulary(
        where,
        list(zip(texts, scores, strict=False)),
        kinds,
        unknown if isinstance(unknown, int) else 2,
        end if isinstance(end, int) else 1,
        bytes(value & 255 for value in charsmap),
        metadata.get(f"{GGUF}add_space_prefix", True) is not False,
        metadata.get(f"{GGUF}remove_extra_whitespaces", True) is not False,
    )
    if kind != "t5":
        vocabulary.refuse(f"a tokenizer of type {kind!r}", "'t5', a unigram vocabulary")
    if not len(texts) == len(scores) == len(kinds):
        found = f"{len(texts)} tokens, {len(scores)} scores and {len(kinds)} types of them"
        vocabulary.refuse(found, "as many of each")
    return _build(vocabulary)


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    """The tokenizer that transformers makes of a T5 vocabulary.

    Like there, characters outside of the vocabulary are the unknown token, also where the model
    has pieces for single bytes (SentencePiece itself would spell them out). The sentinels
    <extra_id_N>, which transformers adds behind the vocabulary, are left out: no prompt has them.

    Source: transformers' T5Tokenizer (normaliser, words, end of sequence).
    """
    pieces, kinds = vocabulary.pieces, vocabulary.kinds
    if not pieces or not all(math.isfinite(score) for _, score in pieces):
        vocabulary.refuse("pieces whose scores are not finite, or none", "scored pieces")
    for name, number in (("unknown", vocabulary.unknown), ("end", vocabulary.end)):
        if not 0 <= number < len(pieces):
            vocabulary.refuse(f"number {number} for the {name} piece", f"below {len(pieces)}")
    tokenizer = Tokenizer(Unigram(pieces, vocabulary.unknown, False))
    if vocabulary.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    scheme = "always" if vocabulary.add_prefix else "never"
    words = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=True)
    split = [pre_tokenizers.WhitespaceSplit()] if vocabulary.squeeze else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, words])
    end = pieces[vocabulary.end][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, vocabulary.end)]
    )
    known = [
        (AddedToken(text, normalized=False), kind)
        for (text, _), kind in zip(pieces, kinds, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token, kind in known if kind != USER_DEFINED])
    tokenizer.add_tokens([token for token, kind in known if kind == USER_DEFINED])
    return tokenizer
