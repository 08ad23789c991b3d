"""From a prompt to text embeddings: cleaning, tokenising, UMT5.

The tokenizer is the model folder's `tokenizer.json` (the tokenizers library); the encoder is
transformers' UMT5EncoderModel over our own weights. transformers is imported on first use: it takes
seconds, and planning needs none of it.
"""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from reelpool.errors import WeightError

from .keys import text_tensors
from .spec import TextSpec
from .weights import WeightSource


def clean_prompt(text: str) -> str:
    """Mend encoding (when ftfy is installed), undo HTML escapes, collapse white space.

    Source: Wan2.1 repository, wan/modules/tokenizers.py; the same order as diffusers.

    >>> clean_prompt("  a &amp;amp; b   c ")
    'a & b c'
    """
    if find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """Tokenizer and UMT5 encoder of one model, on one device. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        spec: TextSpec,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Load tokenizer and weights.

        Args:
            folder: the model folder, with `tokenizer/`.
            spec: geometry.
            source: the encoder's weights under transformers names, already checked.
            dtype: compute type; float16 overflows in UMT5, use float32 or bfloat16.
            device: where to compute.
        Raises:
            WeightError: if the tokenizer is broken or made for another vocabulary.
        """
        self._spec = spec
        self._device = device
        self._tokenizer = _load_tokenizer(folder / "tokenizer" / "tokenizer.json", spec)
        self._model = _load_umt5(spec, source, dtype)
        self._model.to(device)

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt, cleaned first.

        Returns:
            (512, text_dim) float32 on the CPU; rows after the prompt's end are zero.
        """
        tokens = self._tokenizer.encode(clean_prompt(prompt))
        length = sum(tokens.attention_mask)
        ids = torch.tensor([tokens.ids], device=self._device)
        mask = torch.tensor([tokens.attention_mask], device=self._device)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        rows = torch.zeros(self._spec.max_length, self._spec.dim)
        rows[:length] = hidden[:length].float().cpu()
        return rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


def _load_tokenizer(path: Path, spec: TextSpec) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise WeightError(str(path), f"a broken file ({error})", "a tokenizer") from None
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= spec.vocab_size:
        expected = f"at most {spec.vocab_size - 1}, the text encoder's vocab_size less 1"
        raise WeightError(str(path), f"token number {highest}", expected)
    pad = tokenizer.token_to_id("<pad>")
    tokenizer.enable_truncation(spec.max_length)
    tokenizer.enable_padding(length=spec.max_length, pad_id=0 if pad is None else pad)
    return tokenizer


def _load_umt5(spec: TextSpec, source: WeightSource, dtype: torch.dtype) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=spec.vocab_size,
        d_model=spec.dim,
        d_kv=spec.head_dim,
        d_ff=spec.ffn_dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        relative_attention_num_buckets=spec.num_buckets,
        relative_attention_max_distance=spec.max_distance,
        layer_norm_epsilon=spec.eps,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    weights = {name: source.get(name).to(dtype) for name in text_tensors(spec)}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict(weights, assign=True)
    model.encoder.embed_tokens = model.shared  # assigned apart they would be moved apart
    model.eval().requires_grad_(False)
    return cast(nn.Module, model)
