"""Runs block ranges of one transformer on one card.

Block-outer, forward-inner: a call brings several forwards, and each block is visited once for all
of them, so that a block that has to be fetched is fetched once. Between blocks a flag is polled, so
that a running call can be stopped. It does not know jobs, steps, guidance or other workers.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models import wan, wan_context, wan_weights
from ..models.linear import Fill
from ..models.lora import Lora
from ..models.rope import rope_table
from ..models.spec import LatentShape, NumericsProfile, TransformerSpec
from ..models.wan_context import Context, KeyValue
from ..models.wan_weights import (
    BlockWeights,
    EnterWeights,
    ImageWeights,
    LeaveWeights,
    TextWeights,
    Weights,
    map_tensors,
    tensors_of,
)
from ..models.weights import WeightSource
from .arena import place_block
from .lora_cache import LoraCache
from .residency import Residency
from .swap import BlockStream
from .types import BlockRange

logger = logging.getLogger(__name__)

# Keys and values of a prompt or an image are kept between steps only where making them anew costs
# more than this share of a forward: 6 % for the demo's 80 tokens, 0.07 % at 7,168 tokens of the
# 1.3B model.
TEXT_KV_MIN_SHARE = 0.02
# Prompts and images kept at the transformer's width: two and one for each of four jobs in flight.
MAX_CONTEXTS = 12
ContextKey = tuple[str, str]  # "text" or "image", and its digest


@dataclass(frozen=True, eq=False)
class ForwardInput:
    """What one forward brings to a block range.

    text_key: digest of `prompt_embeds`; equal digests mean equal text.
    prompt_embeds: (512, text_dim) float32.
    shape: the latent size.
    latents, timesteps: (1, C, F, h, w) and (F,) float32, for the first range.
    hidden: what the range before gave, for any other.
    image_key: digest of `image_embeds`, equal for the branches of a job.
    image_embeds: (rows, image_dim) float32, features of the images that a model with an image
        encoder attends to; without, its blocks attend to the text alone.
    condition: (1, C', F, h, w) float32, channels that follow those of the latents.
    fps: frames per second, for a model that is told; None counts as 24.
    """

    text_key: str
    prompt_embeds: Tensor
    shape: LatentShape
    latents: Tensor | None = None
    timesteps: Tensor | None = None
    hidden: wan.Hidden | None = None
    image_key: str = ""
    image_embeds: Tensor | None = None
    condition: Tensor | None = None
    fps: float | None = None


class BlockRunner:
    """Blocks of one transformer on one device. Not thread-safe. Owned by a Worker."""

    def __init__(
        self,
        spec: TransformerSpec,
        source: WeightSource,
        numerics: NumericsProfile,
        device: torch.device,
        residency: Residency | None = None,
    ) -> None:
        """Keep the pieces; nothing is loaded yet.

        Args:
            spec: geometry.
            source: weights under canonical names, already checked.
            numerics: the numerics profile of the jobs this runner serves.
            device: where to compute.
            residency: the blocks that stay there, in memory of the device's own. None: all do, on a
                CPU as views of their file where they need no conversion.
        """
        self.spec, self.numerics, self.device = spec, numerics, device
        self._source = source
        self._dtype: torch.dtype = getattr(torch, numerics.dtype)
        self._blocks: dict[int, BlockWeights] = {}
        self._enter: EnterWeights | None = None
        self._leave: LeaveWeights | None = None
        self._text: TextWeights | None = None
        self._image: ImageWeights | None = None
        self._loras = LoraCache(spec, device)
        self._contexts: OrderedDict[ContextKey, Context] = OrderedDict()
        self._key_values: dict[tuple[ContextKey, int], KeyValue] = {}
        self._ropes: dict[tuple[int, int, int], Tensor] = {}
        dtype = self._dtype

        def read(index: int, fill: Fill) -> BlockWeights:  # holds no runner: it goes to a thread
            return wan_weights.load_block(spec, source, index, dtype, fill)

        self._read, self.residency = read, residency
        self._stream: BlockStream | None = None
        if residency is not None:
            self._stream = BlockStream(read, device, residency.ring_slots, residency.copy_gb_s)

    def load(self, blocks: BlockRange) -> float:
        """Bring a block range onto the device; what is there already is kept.

        Of the blocks that only come by, the first are fetched behind the caller's back.

        Returns:
            Seconds it took.
        """
        began = time.perf_counter()
        if self._text is None:
            self._text = self._place(wan_weights.load_text(self._source, self._dtype))
            self._image = self._place(wan_weights.load_image(self.spec, self._source, self._dtype))
        if blocks.is_first and self._enter is None:
            self._enter = self._place(wan_weights.load_enter(self.spec, self._source, self._dtype))
        if blocks.is_last and self._leave is None:
            self._leave = self._place(wan_weights.load_leave(self._source, self._dtype))
        self._load_blocks(blocks)
        return time.perf_counter() - began

    def _load_blocks(self, blocks: BlockRange) -> None:
        staying = set(range(blocks.start, blocks.stop))
        streamed: tuple[int, ...] = ()
        if self.residency is not None:
            streamed = self.residency.streamed(blocks.start, blocks.stop)
            if self._stream is not None and self._stream.order != streamed:
                self._stream.close()  # before others take its place
            staying -= set(streamed)
            kept = staying | self.residency.resident
            self._blocks = {index: block for index, block in self._blocks.items() if index in kept}
        for index in sorted(staying - self._blocks.keys()):
            if self.residency is None:
                block = wan_weights.load_block(self.spec, self._source, index, self._dtype)
                self._blocks[index] = self._place(block)
            else:
                self._blocks[index] = place_block(self._read, index, self.device)
        if self._stream is not None:
            self._stream.open(streamed)

    def free(self) -> None:
        """Drop weights and caches; the next call loads what it needs."""
        self._close_stream()
        self._blocks.clear()
        self._enter = self._leave = self._text = self._image = None
        self._loras.clear()
        self.drop_caches()

    def drop_caches(self) -> None:
        """Drop what can be computed again: keys and values of prompts and images, rope tables."""
        self._contexts.clear()
        self._key_values.clear()
        self._ropes.clear()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device, those of LoRAs and the slots of a ring included."""
        outer = [self._enter, self._leave, self._text, self._image]
        parts = [*outer, *self._blocks.values()]
        base = sum(t.numel() * t.element_size() for part in parts for t in tensors_of(part))
        ring = self._stream.num_bytes if self._stream is not None else 0
        return base + ring + self._loras.num_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes kept between calls besides weights."""
        parts = [*self._contexts.values(), *self._key_values.values(), *self._ropes.values()]
        return sum(t.numel() * t.element_size() for part in parts for t in tensors_of(part))

    @torch.inference_mode()
    def run(
        self,
        blocks: BlockRange,
        forwards: Sequence[ForwardInput],
        before_block: Callable[[int], None] = lambda index: None,
        loras: Sequence[Lora] = (),
    ) -> list[Tensor | wan.Hidden]:
        """Run a block range for several forwards.

        Args:
            blocks: the range.
            forwards: their inputs; hidden states must be this runner's to write.
            before_block: called with the block index; may raise to stop the call.
            loras: put beside the weights in this order; those of strength 0 change no bit.
        Returns:
            For each forward the hidden state after the range, or, when the range is the last, the
            velocity (1, C, F, h, w) in the compute dtype.
        Raises:
            WeightError: if a LoRA is none for this transformer, or has values that are not finite.
        """
        self.load(blocks)
        with ExitStack() as interrupted:  # blocks that nobody waits for must not come on
            interrupted.callback(self._close_stream)
            results = self._run(blocks, forwards, before_block, loras)
            interrupted.pop_all()
        return results

    def _run(
        self,
        blocks: BlockRange,
        forwards: Sequence[ForwardInput],
        before_block: Callable[[int], None],
        loras: Sequence[Lora],
    ) -> list[Tensor | wan.Hidden]:
        lora_key = self._loras.use(loras)
        if lora_key:  # what is kept of a prompt or an image depends on the LoRAs
            forwards = [
                replace(f, text_key=f.text_key + lora_key, image_key=f.image_key + lora_key)
                for f in forwards
            ]
        hidden = [self._start(blocks, forward) for forward in forwards]
        for index in range(blocks.start, blocks.stop):
            before_block(index)
            with self._block(index) as block:
                for forward, state in zip(forwards, hidden, strict=True):
                    text, image = self._attended(forward, index, block, state.x.shape[0])
                    rope = self._rope(forward.shape)
                    wan.run_block(self.spec, block, state, rope, text, self.numerics, image)
        if not blocks.is_last:
            return list(hidden)
        assert self._leave is not None
        end = self._loras.apply("leave", self._leave)
        pairs = zip(forwards, hidden, strict=True)
        return [wan.leave(self.spec, end, h, f.shape, self.numerics) for f, h in pairs]

    @contextmanager
    def _block(self, index: int) -> Iterator[BlockWeights]:
        """A block with the LoRAs in use, while its turn lasts."""
        part = f"blocks.{index}"
        if index in self._blocks:
            yield self._loras.apply(part, self._blocks[index])
        else:
            assert self._stream is not None
            with self._stream.use(index) as weights:
                yield self._loras.apply(part, weights, keep=False)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _start(self, blocks: BlockRange, forward: ForwardInput) -> wan.Hidden:
        if not blocks.is_first:
            assert forward.hidden is not None
            return forward.hidden
        assert self._enter is not None
        assert forward.latents is not None
        assert forward.timesteps is not None
        latents, steps = forward.latents.to(self.device), forward.timesteps.to(self.device)
        if forward.condition is not None:
            latents = torch.cat([latents, forward.condition.to(self.device)], dim=1)
        assert latents.shape[1] == self.spec.in_channels, (latents.shape, self.spec.in_channels)
        start = self._loras.apply("enter", self._enter)
        return wan.enter(self.spec, start, latents, steps, self.numerics, forward.fps)

    def _attended(
        self, forward: ForwardInput, index: int, block: BlockWeights, num_tokens: int
    ) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the prompt and, where there is one, of the image."""
        key: ContextKey = ("text", forward.text_key)
        text = self._key_value(key, forward.prompt_embeds, index, block, num_tokens)
        if forward.image_embeds is None:
            return text, None
        key = ("image", forward.image_key)
        return text, self._key_value(key, forward.image_embeds, index, block, num_tokens)

    def _key_value(
        self, key: ContextKey, embeds: Tensor, index: int, block: BlockWeights, num_tokens: int
    ) -> KeyValue:
        context = self._context(key, embeds)  # also where its keys are kept: it is in use
        found = self._key_values.get((key, index))
        if found is not None:
            return found
        is_text = key[0] == "text"
        make = wan_context.text_key_value if is_text else wan_context.image_key_value
        made = make(self.spec, block, context)
        if self.spec.text_kv_share(num_tokens, context.rows.shape[0]) > TEXT_KV_MIN_SHARE:
            self._key_values[key, index] = made
        return made

    def _context(self, key: ContextKey, embeds: Tensor) -> Context:
        """A prompt or image at the transformer's width; the oldest makes room, with its keys."""
        if key not in self._contexts:
            if key[0] == "text":
                assert self._text is not None
                text = self._loras.apply("text", self._text)
                self._contexts[key] = wan_context.embed_text(text, embeds)
            else:
                assert self._image is not None
                image = self._loras.apply("image", self._image)
                embeds = embeds.to(self.device)
                self._contexts[key] = wan_context.embed_image(image, embeds)
            if len(self._contexts) > MAX_CONTEXTS:
                oldest, _ = self._contexts.popitem(last=False)
                kept = {k: v for k, v in self._key_values.items() if k[0] != oldest}
                self._key_values = kept
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def _rope(self, shape: LatentShape) -> Tensor:
        pf, ph, pw = self.spec.patch_size
        grid = (shape.frames // pf, shape.height // ph, shape.width // pw)
        if grid not in self._ropes:
            self._ropes.clear()  # jobs of one size follow each other; a table is 16 MiB at 14B 480p
            self._ropes[grid] = rope_table(self.spec.head_dim, grid, self.device)
        return self._ropes[grid]

    def _place(self, weights: Weights) -> Weights:
        return map_tensors(weights, lambda tensor: tensor.to(self.device))
