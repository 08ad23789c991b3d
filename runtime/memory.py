"""`memory_plan`: what a card keeps, streams and cuts so that a job fits its bytes. Pure.

Stages follow one another (text, image, denoise, decode), and each has the card for itself unless
everything fits at once. Within the denoise the order is what costs least first: streaming blocks is
free while a block computes longer than it travels (14B, 832x480x81: 83 TFLOP for two forwards, 0.2
GB), head groups cost up to 12 %, small chunks more. So the numerics are the first of `LADDER` with
which a call fits beside a ring of streamed blocks, and as many blocks stay as the rest then holds.
Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from reelpool.errors import InfeasiblePlan

from ..models.quant_mix import transformer_bytes
from ..models.spec import ImageEncoderSpec, LatentShape, ModelSpec, NumericsProfile, TextSpec
from .card_bytes import SIZES, Work, block_card_bytes, call_bytes, outer_card_bytes
from .log import format_bytes
from .residency import spread
from .types import BlockRange
from .vae_bytes import pick_tile, vae_card_bytes, vae_parked_bytes

MemoryState = Literal["disabled", "none", "low", "normal", "high", "shared"]
MEMORY_STATES: tuple[str, ...] = get_args(MemoryState)
TextPlace = Literal["resident", "streamed", "host"]
RING_SLOTS = 2  # one block computes while the next one comes
STAGING_BUFFERS = 2  # equal to swap.NUM_STAGING
ALIGNMENT = 512 * 48  # what a block's tensors lose to alignment in its slot, at most (arena)
# (token chunk, head groups), the cheapest first
LADDER = ((2048, 1), (2048, 2), (2048, 4), (2048, 8), (1024, 8), (512, 8), (256, 8))
SHARED_PART = 4  # of memory that is the computer's own, one part in so many is left to it


@dataclass(frozen=True)
class MemoryPlan:
    """How one card's bytes are used for a job.

    state: the memory state that was asked for, or else found.
    budget_bytes: what the card may use, the reserve taken off.
    resident_blocks: indices of the blocks that stay on the card, evenly spread.
    ring_slots: places on the card for streamed blocks; 0 when all blocks stay.
    vae_tile: pixels; 0 takes frames whole.
    stays_loaded: whether what all stages need fits at once, so that nothing ever has to leave.
    peak_bytes: stage -> the most bytes it takes on the card.
    host_bytes: of the computer's memory: staging buffers, parked caches, frames that wait.
    mapped_bytes: of files, the most that one stage goes through; mapped, so the system may drop
        them and read them again.
    notes: what was not possible, and why.
    """

    state: str
    budget_bytes: int
    resident_blocks: tuple[int, ...]
    ring_slots: int
    token_chunk: int
    head_groups: int
    vae_tile: int
    text_encoder: TextPlace
    stays_loaded: bool
    peak_bytes: tuple[tuple[str, int], ...]
    host_bytes: int
    mapped_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def highest_bytes(self) -> int:
        """The most bytes of any stage."""
        return max((size for _, size in self.peak_bytes), default=0)

    def explain(self, worker: str) -> list[str]:
        """Lines for a person."""
        peaks = ", ".join(f"{stage} {format_bytes(size)}" for stage, size in self.peak_bytes)
        budget = f"{format_bytes(self.budget_bytes)}, state {self.state}"
        lines = [f"  memory       {worker}: {budget}; at most {peaks}"]
        if any(stage == "denoise" for stage, _ in self.peak_bytes):
            ring = f", the others pass through {self.ring_slots} slots" if self.ring_slots else ""
            lines.append(
                f"    blocks     {len(self.resident_blocks)} stay on the card{ring}; "
                f"chunks of {self.token_chunk} tokens, head groups {self.head_groups}"
            )
        tile = f"tiles of {self.vae_tile} pixels" if self.vae_tile else "frames whole"
        lines.append(f"    others     VAE {tile}, text encoder {self.text_encoder}")
        files = f"reads {format_bytes(self.mapped_bytes)} of files over and over"
        lines.append(f"    host       {format_bytes(self.host_bytes)}; a stage {files} at most")
        return [*lines, *(f"    note       {note}" for note in self.notes)]


@dataclass(frozen=True)
class Demand:
    """What a card is to do for a job.

    blocks: its range. numerics: a job's, with the rung of `LADDER` to begin at. quant: of the
    weights. num_forwards: that run there in a call, 2 for cond and uncond. stages: of encode_text,
    encode_image, denoise and decode, those it runs. lora_bytes: weights beside the model's own.
    is_cpu: the card is the CPU.
    """

    spec: ModelSpec
    shape: LatentShape
    blocks: BlockRange
    numerics: NumericsProfile
    quant: str = ""
    num_forwards: int = 2
    stages: tuple[str, ...] = ("encode_text", "denoise", "decode")
    lora_bytes: int = 0
    is_cpu: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on the card."""
        transformer = self.spec.transformer
        return block_card_bytes(transformer, self.quant, self.numerics.dtype) + ALIGNMENT

    @property
    def outer_bytes(self) -> int:
        """Bytes of the weights that stay whatever happens."""
        return outer_card_bytes(self.spec.transformer, self.numerics.dtype) + self.lora_bytes

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        factor = self.spec.vae.spatial_factor
        return self.shape.height * factor, self.shape.width * factor

    def call_bytes(self, token_chunk: int, head_groups: int) -> int:
        """Activations of a call under some numerics."""
        numerics = replace(self.numerics, token_chunk=token_chunk, head_groups=head_groups)
        transformer, blocks = self.spec.transformer, len(self.blocks)
        forwards = (self.num_forwards, blocks, self.quant, self.is_cpu)
        return call_bytes(Work(transformer, self.shape, numerics, *forwards))


def memory_plan(
    demand: Demand, budget_bytes: int, state: str = "", reserve_bytes: int = 0
) -> MemoryPlan:
    """Choose what stays, what streams and how finely the work is cut.

    Args:
        demand: what the card is to do.
        budget_bytes: bytes of the card.
        state: one of `MEMORY_STATES`; "" finds it. "disabled" checks nothing and keeps everything;
            "none" keeps no block and takes the least memory there is; "low" gives at most half of
            the card to blocks that stay; "normal" as many as fit; "high" wants everything on the
            card at once; "shared" is "normal" on memory that is the computer's own, a quarter of
            which is left to it.
        reserve_bytes: of the budget, left to other programs.

    Raises:
        InfeasiblePlan: if nothing fits, saying how much would.
    """
    usable = budget_bytes - reserve_bytes
    if state == "shared":
        usable -= usable // SHARED_PART
    chunk, groups, count = _denoise_choice(demand, usable, state, budget_bytes)
    has_blocks = "denoise" in demand.stages
    ring = _num_slots(demand) if has_blocks and count < len(demand.blocks) else 0
    denoise = demand.outer_bytes + demand.call_bytes(chunk, groups)
    denoise = denoise + (count + ring) * demand.block_bytes if has_blocks else 0
    text, text_peak = _text_choice(demand.spec.text, usable, state)
    tile, decode = _decode_choice(demand, usable, state)
    encoder = demand.spec.image_encoder
    clip = 0 if encoder is None else _image_encoder_bytes(encoder)
    notes = [] if ring == 0 else [_streaming_note(demand, usable, chunk, groups)]
    if clip > usable and state != "disabled" and "encode_image" in demand.stages:
        notes.append(f"the image encoder ({format_bytes(clip)}) runs on the host")
        clip = 0
    peaks = {
        "encode_text": text_peak,
        "encode_image": max(clip, decode),  # the encoder takes half of what the decoder takes
        "denoise": denoise,
        "decode": decode,
    }
    at_once = _all_at_once(demand, denoise, text_peak, decode, clip, ring)
    if state == "high" and (at_once > usable or text != "resident"):
        raise _too_small(
            "all at once", max(at_once, text_peak), usable, "use --memory-state normal"
        )
    return MemoryPlan(
        state=state or _found(at_once <= usable and text == "resident", count, ring),
        budget_bytes=usable,
        resident_blocks=tuple(
            demand.blocks.start + index for index in spread(len(demand.blocks), count)
        ),
        ring_slots=ring,
        token_chunk=chunk,
        head_groups=groups,
        vae_tile=tile,
        text_encoder=text,
        stays_loaded=at_once <= usable and ring == 0,
        peak_bytes=tuple((stage, peaks[stage]) for stage in demand.stages),
        host_bytes=_host_bytes(demand, ring, tile),
        mapped_bytes=_mapped_bytes(demand),
        notes=tuple(notes),
    )


def _denoise_choice(
    demand: Demand, usable: int, state: str, budget_bytes: int
) -> tuple[int, int, int]:
    """Token chunk, head groups and number of blocks that stay."""
    size, block, outer = len(demand.blocks), demand.block_bytes, demand.outer_bytes
    slots = _num_slots(demand)
    if "denoise" not in demand.stages:
        return *LADDER[0], 0
    if state == "disabled":
        return *LADDER[0], size
    start = (demand.numerics.token_chunk, demand.numerics.head_groups)
    ladder = LADDER[-1:] if state == "none" else LADDER[LADDER.index(start) :]
    ring = slots * block
    if state == "high" or not slots:
        ring, ladder = size * block, LADDER[:1]
    needed = 0
    for chunk, groups in ladder:
        needed = outer + demand.call_bytes(chunk, groups)
        left = usable - needed
        if left >= size * block and (state not in ("none", "low") or not slots):
            return chunk, groups, size
        if left >= ring:
            if state == "low":
                left = min(left, ring + usable // 2)
            count = 0 if state == "none" else min((left - ring) // block, size - slots - 1)
            return chunk, groups, count
    advice = "give the card as much, or use a smaller --size or fewer --frames"
    if state == "high":
        advice = "use --memory-state normal"
    elif budget_bytes >= needed + ring:
        advice = f"{format_bytes(budget_bytes - usable)} of the card are reserved: reserve less"
    raise _too_small("the denoise", needed + ring, usable, advice)


def _num_slots(demand: Demand) -> int:
    """Places for blocks that come by: fewer than blocks, or they would not have to."""
    return min(RING_SLOTS, len(demand.blocks) - 1)


def _too_small(what: str, needed: int, usable: int, advice: str) -> InfeasiblePlan:
    problem = f"the job does not fit: {what} takes at least {format_bytes(needed)}, there are"
    return InfeasiblePlan(f"{problem} {format_bytes(max(usable, 0))}", advice)


def _streaming_note(demand: Demand, usable: int, chunk: int, groups: int) -> str:
    whole = demand.outer_bytes + demand.call_bytes(chunk, groups)
    whole += len(demand.blocks) * demand.block_bytes
    return (
        f"not all {len(demand.blocks)} blocks can stay: with them the denoise takes "
        f"{format_bytes(whole)} of {format_bytes(usable)}"
    )


def _text_choice(text: TextSpec, usable: int, state: str) -> tuple[TextPlace, int]:
    """Where the text encoder runs, and its peak on the card. It computes in float32."""
    rows, inner = text.max_length, text.num_heads * text.head_dim
    # scores, their bias, softmax and its copies; the wide rows of the FFN
    work = 4 * (5 * text.num_heads * rows**2 + rows * (4 * text.ffn_dim + 8 * text.dim))
    whole = 4 * text.num_params + work
    if state in ("disabled", "high") or (whole <= usable and state not in ("none", "low")):
        return "resident", whole
    layer = 4 * text.dim * inner + 3 * text.dim * text.ffn_dim + 2 * text.dim
    streamed = RING_SLOTS * 4 * layer + work
    if streamed <= usable:
        return "streamed", streamed
    return "host", 0


def _decode_choice(demand: Demand, usable: int, state: str) -> tuple[int, int]:
    """VAE tile, and the decode's peak."""
    spec, dtype = demand.spec.vae, demand.numerics.vae_dtype
    if state in ("disabled", "high") or not {"decode", "encode_image"} & set(demand.stages):
        return 0, vae_card_bytes(spec, demand.frame, 0, dtype)
    found = pick_tile(spec, demand.frame, usable, dtype, smallest=state == "none")
    if found is None:
        least = pick_tile(spec, demand.frame, 2**62, dtype, smallest=True)
        assert least is not None
        advice = "give the card as much: these are the VAE's weights and its smallest tile"
        raise _too_small("the decode", least[1], usable, advice)
    return found


def _image_encoder_bytes(spec: ImageEncoderSpec) -> int:
    """Weights and activations of the image encoder, float32, one image."""
    layer = 4 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim
    rows = spec.num_tokens
    work = 4 * (3 * spec.num_heads * rows**2 + rows * (2 * spec.ffn_dim + 8 * spec.dim))
    return 4 * (spec.num_layers * layer + rows * spec.dim) + work


def _all_at_once(demand: Demand, denoise: int, text: int, decode: int, clip: int, ring: int) -> int:
    """Bytes with which no weights ever leave the card: both experts, every encoder."""
    total = denoise
    if demand.spec.num_experts > 1 and ring == 0 and "denoise" in demand.stages:
        total += demand.outer_bytes + len(demand.blocks) * demand.block_bytes
    others = {"encode_text": text, "encode_image": clip, "decode": decode}
    return total + sum(size for stage, size in others.items() if stage in demand.stages)


def _found(all_fits: bool, count: int, ring: int) -> str:
    """The state that describes what was found."""
    if ring:
        return "low" if count else "none"
    return "high" if all_fits else "normal"


def _host_bytes(demand: Demand, ring: int, tile: int) -> int:
    """Staging buffers, parked caches of tiles, 16 frames that wait, latents of a solver."""
    height, width = demand.frame
    waiting = 16 * 3 * height * width * 4 if "decode" in demand.stages else 0
    parked = vae_parked_bytes(demand.spec.vae, demand.frame, tile, demand.numerics.vae_dtype)
    staging = STAGING_BUFFERS * demand.block_bytes if ring else 0
    return staging + waiting + (parked if waiting else 0) + 8 * demand.shape.num_bytes


def _mapped_bytes(demand: Demand) -> int:
    """The file that a stage reads most of: one expert's blocks, or the text encoder in 16 bits."""
    spec = demand.spec
    share = len(demand.blocks) / demand.blocks.total
    expert = int(transformer_bytes(spec.transformer, demand.quant) * share)
    text = SIZES["bfloat16"] * spec.text.num_params
    expert = expert if "denoise" in demand.stages else 0
    return max(expert, text if "encode_text" in demand.stages else 0)
