"""From a prompt to text embeddings: cleaning, tokenising, UMT5.

The tokenizer comes from `tokenizer`; the encoder is transformers' UMT5EncoderModel over our own
weights (`text_layouts`). transformers is imported on first use: it takes seconds, and planning
needs none of it.
"""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from reelpool.errors import NumericError

from .keys import text_tensors
from .plain_weights import load_plain
from .spec import TextSpec
from .tokenizer import TokenizerSource
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
        spec: TextSpec,
        source: WeightSource,
        tokenizer: TokenizerSource,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Load tokenizer and weights.

        Args:
            spec: geometry.
            source: the encoder's weights under transformers names, already checked; quantised ones
                are decoded to `dtype`.
            tokenizer: read first, before any weight.
            dtype: compute type; float16 overflows in UMT5, use float32 or bfloat16.
            device: where to compute.
        Raises:
            WeightError: if the tokenizer is broken or made for another vocabulary, or a weight is
                not finite.
        """
        self._spec = spec
        self._device = device
        self._words = tokenizer
        self._tokenizer = tokenizer.load(spec)
        self._model = _load_umt5(spec, source, dtype, device)

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt, cleaned first.

        Returns:
            (512, text_dim) float32 on the CPU; rows after the prompt's end are zero.
        Raises:
            NumericError: if the encoder's type cannot hold its values.
        """
        tokens = self._words.encode(self._tokenizer, clean_prompt(prompt))
        length = sum(tokens.attention_mask)
        ids = torch.tensor([tokens.ids], device=self._device)
        mask = torch.tensor([tokens.attention_mask], device=self._device)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        rows = torch.zeros(self._spec.max_length, self._spec.dim)
        rows[:length] = hidden[:length].float().cpu()
        if not rows.isfinite().all():
            where = f"the embeddings of {prompt[:40]!r}"
            raise NumericError("encode_text", where, "compute in bfloat16 or float32")
        return rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


def _load_umt5(
    spec: TextSpec, source: WeightSource, dtype: torch.dtype, device: torch.device
) -> nn.Module:
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
    weights = {name: load_plain(source, name, dtype, device) for name in text_tensors(spec)}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict(weights, assign=True)
    model.encoder.embed_tokens = model.shared  # assigned apart they would be moved apart
    model.eval().requires_grad_(False)
    return cast(nn.Module, model)
