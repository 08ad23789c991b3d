"""Runs block ranges of one transformer on one card.

Block-outer, forward-inner: a call brings several forwards, and each block is visited once for all
of them, so that a block that has to be fetched is fetched once. Between blocks a flag is polled, so
that a running call can be stopped. It does not know jobs, steps, guidance or other workers.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import wan, wan_weights
from ..models.rope import rope_table
from ..models.spec import LatentShape, NumericsProfile, TransformerSpec
from ..models.wan_weights import (
    BlockWeights,
    EnterWeights,
    LeaveWeights,
    TextWeights,
    Weights,
    map_tensors,
    tensors_of,
)
from ..models.weights import WeightSource
from .types import BlockRange

logger = logging.getLogger(__name__)

# Text keys and values are kept between steps only where making them anew costs more than this
# share of a forward: 6 % for the demo's 80 tokens, 0.07 % at 7,168 tokens of the 1.3B model.
TEXT_KV_MIN_SHARE = 0.02
MAX_CONTEXTS = 8  # prompts kept at the transformer's width; two for each job in flight


@dataclass(frozen=True, eq=False)
class ForwardInput:
    """What one forward brings to a block range.

    text_key: digest of `prompt_embeds`; equal digests mean equal text.
    prompt_embeds: (512, text_dim) float32.
    shape: the latent size.
    latents, timesteps: (1, C, F, h, w) and (F,) float32, for the first range.
    hidden: what the range before gave, for any other.
    """

    text_key: str
    prompt_embeds: Tensor
    shape: LatentShape
    latents: Tensor | None = None
    timesteps: Tensor | None = None
    hidden: wan.Hidden | None = None


class BlockRunner:
    """Blocks of one transformer, resident on one device. Not thread-safe. Owned by a Worker."""

    def __init__(
        self,
        spec: TransformerSpec,
        source: WeightSource,
        numerics: NumericsProfile,
        device: torch.device,
    ) -> None:
        """Keep the pieces; nothing is loaded yet.

        Args:
            spec: geometry.
            source: weights under canonical names, already checked.
            numerics: the numerics profile of the jobs this runner serves.
            device: where to compute.
        """
        self.spec, self.numerics, self.device = spec, numerics, device
        self._source = source
        self._dtype: torch.dtype = getattr(torch, numerics.dtype)
        self._blocks: dict[int, BlockWeights] = {}
        self._enter: EnterWeights | None = None
        self._leave: LeaveWeights | None = None
        self._text: TextWeights | None = None
        self._contexts: OrderedDict[str, wan.TextContext] = OrderedDict()
        self._text_kv: dict[tuple[str, int], wan.TextKV] = {}
        self._ropes: dict[tuple[int, int, int], Tensor] = {}

    def load(self, blocks: BlockRange) -> float:
        """Bring a block range onto the device; what is there already is kept.

        Returns:
            Seconds it took.
        """
        began = time.perf_counter()
        if self._text is None:
            self._text = self._place(wan_weights.load_text(self._source, self._dtype))
        if blocks.is_first and self._enter is None:
            self._enter = self._place(wan_weights.load_enter(self.spec, self._source, self._dtype))
        if blocks.is_last and self._leave is None:
            self._leave = self._place(wan_weights.load_leave(self._source, self._dtype))
        for index in range(blocks.start, blocks.stop):
            if index not in self._blocks:
                block = wan_weights.load_block(self.spec, self._source, index, self._dtype)
                self._blocks[index] = self._place(block)
        return time.perf_counter() - began

    def free(self) -> None:
        """Drop weights and caches; the next call loads what it needs."""
        self._blocks.clear()
        self._enter = self._leave = self._text = None
        self.drop_caches()

    def drop_caches(self) -> None:
        """Drop what can be computed again: text keys and values, rope tables."""
        self._contexts.clear()
        self._text_kv.clear()
        self._ropes.clear()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device."""
        parts = [self._enter, self._leave, self._text, *self._blocks.values()]
        return sum(t.numel() * t.element_size() for part in parts for t in tensors_of(part))

    @property
    def cache_bytes(self) -> int:
        """Bytes kept between calls besides weights."""
        parts = [*self._contexts.values(), *self._text_kv.values(), *self._ropes.values()]
        return sum(t.numel() * t.element_size() for part in parts for t in tensors_of(part))

    @torch.inference_mode()
    def run(
        self,
        blocks: BlockRange,
        forwards: Sequence[ForwardInput],
        before_block: Callable[[int], None] = lambda index: None,
    ) -> list[Tensor | wan.Hidden]:
        """Run a block range for several forwards.

        Args:
            blocks: the range.
            forwards: their inputs; hidden states must be this runner's to write.
            before_block: called with the block index; may raise to stop the call.
        Returns:
            For each forward the hidden state after the range, or, when the range is the last, the
            velocity (1, C, F, h, w) in the compute dtype.
        """
        self.load(blocks)
        hidden = [self._start(blocks, forward) for forward in forwards]
        for index in range(blocks.start, blocks.stop):
            before_block(index)
            block = self._blocks[index]
            for forward, state in zip(forwards, hidden, strict=True):
                text = self._key_value(forward, index, block, state.x.shape[0])
                rope = self._rope(forward.shape)
                wan.run_block(self.spec, block, state, rope, text, self.numerics)
        if not blocks.is_last:
            return list(hidden)
        assert self._leave is not None
        pairs = zip(forwards, hidden, strict=True)
        return [wan.leave(self.spec, self._leave, h, f.shape, self.numerics) for f, h in pairs]

    def _start(self, blocks: BlockRange, forward: ForwardInput) -> wan.Hidden:
        if not blocks.is_first:
            assert forward.hidden is not None
            return forward.hidden
        assert self._enter is not None
        assert forward.latents is not None
        assert forward.timesteps is not None
        latents, steps = forward.latents.to(self.device), forward.timesteps.to(self.device)
        return wan.enter(self.spec, self._enter, latents, steps, self.numerics)

    def _key_value(
        self, forward: ForwardInput, index: int, block: BlockWeights, num_tokens: int
    ) -> wan.TextKV:
        context = self._context(forward)  # also where its keys are kept: this prompt is in use
        found = self._text_kv.get((forward.text_key, index))
        if found is not None:
            return found
        text = wan.text_key_value(self.spec, block, context)
        if self.spec.text_kv_share(num_tokens, context.rows.shape[0]) > TEXT_KV_MIN_SHARE:
            self._text_kv[forward.text_key, index] = text
        return text

    def _context(self, forward: ForwardInput) -> wan.TextContext:
        """The prompt at the transformer's width; the oldest prompt makes room, with its keys."""
        if forward.text_key not in self._contexts:
            assert self._text is not None
            embeds = forward.prompt_embeds.to(self.device)
            self._contexts[forward.text_key] = wan.embed_text(self._text, embeds)
            if len(self._contexts) > MAX_CONTEXTS:
                oldest, _ = self._contexts.popitem(last=False)
                self._text_kv = {k: v for k, v in self._text_kv.items() if k[0] != oldest}
        self._contexts.move_to_end(forward.text_key)
        return self._contexts[forward.text_key]

    def _rope(self, shape: LatentShape) -> Tensor:
        pf, ph, pw = self.spec.patch_size
        grid = (shape.frames // pf, shape.height // ph, shape.width // pw)
        if grid not in self._ropes:
            self._ropes.clear()  # jobs of one size follow each other; a table is 16 MiB at 14B 480p
            self._ropes[grid] = rope_table(self.spec.head_dim, grid, self.device)
        return self._ropes[grid]

    def _place(self, weights: Weights) -> Weights:
        return map_tensors(weights, lambda tensor: tensor.to(self.device))
