"""The stages of a job on one card: text and images to conditions, forwards, latents to frames.

`CardStages` holds what a card has loaded. Every method is a pure function of its arguments, so any
card with the weights can redo it; what is kept between calls only saves time. It does not know who
calls, other cards, or Ray.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reelpool.errors import OutOfDeviceMemory, WeightError

from ..models.files import ModelFiles, open_model
from ..models.image_encoder import ImageEncoder
from ..models.lora import Lora, LoraFile, open_lora
from ..models.parts import Parts
from ..models.text import TextEncoder
from ..models.wan import Hidden
from ..models.wan_vae import WanVae, load_vae
from .block_runner import BlockRunner, ForwardInput
from .conditioning import first_latent, fit_image, image_condition, unit_image
from .device import Card, torch_device
from .residency import Residency
from .results import key_of
from .types import BlockCall, BlockRange, DecodeCall, ImageCall, ModelRef
from .vae_stream import VaeStream
from .video import to_uint8
from .wire import Packet, pack, unpack

# A decode that starts in the middle is preceded by this many latent frames whose pixels are thrown
# away: the decoder's memory is shorter than that (tests/runtime/test_stages.py, latents 1 to 47).
WARM_UP_LATENTS = 40
MAX_STREAMS = 2  # feature caches kept; one of a 720p video is gigabytes


class CardStages:
    """Everything one card runs. Not thread-safe. Owned by a Worker."""

    def __init__(self, card: Card) -> None:
        """Nothing is loaded until a call needs it."""
        self.card = card
        self.device = torch_device(card.name)
        self._files: dict[tuple[str, Parts], ModelFiles] = {}
        self._runners: dict[tuple[ModelRef, int], BlockRunner] = {}
        self._loras: dict[str, LoraFile] = {}
        self._text: dict[str, TextEncoder] = {}
        self._image_encoders: dict[str, ImageEncoder] = {}
        self._vaes: dict[tuple[str, str], WanVae] = {}
        self._streams: OrderedDict[str, tuple[int, VaeStream]] = OrderedDict()

    def files(self, model: ModelRef) -> ModelFiles:
        """The opened model.

        Raises:
            WeightError: if this host's files differ from those the job was planned with.
        """
        key = (model.name, model.parts)
        if key not in self._files:
            self._files[key] = open_model(*key)
        files = self._files[key]
        if files.digest != model.digest:
            raise WeightError(
                str(files.folder or model.name),
                f"files with digest {files.digest[:8]}",
                f"{model.digest[:8]}, those of the machine that planned the job",
                "copy the same model files to every machine",
            )
        return files

    def load_blocks(
        self,
        model: ModelRef,
        blocks: BlockRange,
        expert: int = 0,
        residency: Residency | None = None,
    ) -> float:
        """Bring a block range of an expert onto the card, or what stays of it; returns seconds."""
        return self._runner(model, expert, residency).load(blocks)

    def encode_text(self, model: ModelRef, prompt: str) -> Packet:
        """Encode a prompt: a packet with `prompt_embeds` (512, text_dim) float32.

        The packet's `key` tells prompts apart.
        """
        files = self.files(model)
        if files.digest not in self._text:
            self._text[files.digest] = TextEncoder(
                files.spec.text, files.text_encoder, files.tokenizer, torch.float32, self.device
            )
        embeds = self._text[files.digest].encode(prompt)
        return pack({"prompt_embeds": embeds}, {"key": prompt_key(model, prompt)})

    @torch.inference_mode()
    def encode_image(self, call: ImageCall, images: Packet) -> Packet:
        """Make what the network takes of a job's images; see ImageCall for the packets.

        The packet's `key` tells what it holds apart.
        """
        spec = self.files(call.model).spec
        pixels, meta = unpack(images)
        fitted = {
            name: fit_image(image, call.width, call.height).to(self.device)
            for name, image in pixels.items()
        }
        vae = self._vae(call.model)
        if spec.image == "concat":
            last = fitted.get("last")
            condition = image_condition(vae, fitted["first"], last, call.frames, call.tile)
            made = {"condition": condition}
        else:
            made = {"latent": first_latent(vae, fitted["first"], call.tile)}
        if spec.image_encoder is not None:
            encoder = self._image_encoder(call.model)
            features = [encoder.encode(unit_image(image)) for image in pixels.values()]
            made["image_embeds"] = torch.cat(features)
        key = key_of("encode_image", call=call, images=meta["digest"])
        return pack(made, {"key": str(key)})

    def run_blocks(
        self,
        call: BlockCall,
        inputs: Packet,
        prompts: tuple[Packet, ...],
        image: Packet | None = None,
        before_block: Callable[[int], None] = lambda index: None,
    ) -> Packet:
        """Run the forwards of a call over its block range; see BlockCall for the packets."""
        tensors, _ = unpack(inputs)
        given, about = unpack(image) if image is not None else ({}, {"key": ""})
        forwards = []
        for branch, packet in zip(call.branches, prompts, strict=True):
            text, meta = unpack(packet)
            hidden = None
            if not call.blocks.is_first:
                parts = (tensors[f"x.{branch}"], tensors["e"], tensors["e0"])
                hidden = Hidden(*(self._own(part) for part in parts))
            forwards.append(
                ForwardInput(
                    text_key=str(meta["key"]),
                    prompt_embeds=text["prompt_embeds"],
                    shape=call.shape,
                    latents=tensors.get("latents"),
                    timesteps=tensors.get("timesteps"),
                    hidden=hidden,
                    image_key=str(about["key"]),
                    image_embeds=given.get("image_embeds"),
                    condition=given.get("condition"),
                    fps=call.fps,
                )
            )
        runner = self._runner(call.model, call.expert, call.residency)
        results = runner.run(call.blocks, forwards, before_block, self._loras_of(call))
        named: dict[str, Tensor] = {}
        for branch, result in zip(call.branches, results, strict=True):
            if isinstance(result, Hidden):
                named |= {f"x.{branch}": result.x, "e": result.e, "e0": result.e0}
            else:
                named[f"velocity.{branch}"] = result
        return pack(named)

    @torch.inference_mode()
    def decode(self, call: DecodeCall, latents: Packet) -> Packet:
        """Decode latent frames [start, stop): a packet with `frames` (n, H, W, 3) uint8."""
        whole, vae = unpack(latents)[0]["latents"], self._vae(call.model)
        done, stream = self._streams.pop(call.stream, (-1, None))
        if stream is None or (done, stream.tile) != (call.start, call.tile):
            stream = None  # frees its caches before others are made
            height, width = whole.shape[3:]
            stream = VaeStream(vae, height, width, call.tile)
            first = max(0, call.start - WARM_UP_LATENTS)
            for _ in stream.decode(whole[:, :, first : call.start]):
                pass  # pixels that another call has given, or that are not right yet
        frames = [to_uint8(part) for part in stream.decode(whole[:, :, call.start : call.stop])]
        self._streams[call.stream] = (call.stop, stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return pack({"frames": torch.cat(frames)})

    def end_stream(self, stream: str) -> None:
        """Drop a decode's feature cache."""
        self._streams.pop(stream, None)

    def free(self) -> None:
        """Drop everything; the next call loads what it needs."""
        for runner in self._runners.values():
            runner.free()
        self._runners.clear()
        self._loras.clear()
        self._text.clear()
        self._image_encoders.clear()
        self._vaes.clear()
        self._streams.clear()
        if self.card.is_cuda:
            torch.cuda.empty_cache()

    def held_bytes(self) -> dict[str, int]:
        """Bytes held on the card by each kind of thing."""
        runners, vaes = self._runners.values(), self._vaes.values()
        vae_weights = [p for vae in vaes for p in vae.parameters()]
        return {
            "transformer": sum(runner.weight_bytes for runner in runners),
            "caches": sum(runner.cache_bytes for runner in runners),
            "text_encoder": sum(text.num_bytes for text in self._text.values()),
            "image_encoder": sum(image.num_bytes for image in self._image_encoders.values()),
            "vae": sum(p.numel() * p.element_size() for p in vae_weights),
            "vae_streams": sum(stream.card_bytes for _, stream in self._streams.values()),
        }

    def parked_bytes(self) -> int:
        """Bytes of tiles' caches that wait in the host's memory."""
        streams = (stream for _, stream in self._streams.values())
        return sum(stream.num_bytes - stream.card_bytes for stream in streams)

    def _runner(self, model: ModelRef, expert: int, residency: Residency | None) -> BlockRunner:
        """The runner of an expert; the other one's weights leave if both would not fit."""
        key = (model, expert)
        if key in self._runners and self._runners[key].residency != residency:
            self._runners.pop(key).free()  # another job's plan
        if key not in self._runners:
            files = self.files(model)
            self._runners[key] = BlockRunner(
                files.spec.transformer,
                files.transformers[expert],
                model.numerics,
                self.device,
                residency,
            )
        runner, other = self._runners[key], self._runners.get((model, 1 - expert))
        if other is not None and runner.weight_bytes == 0:
            # the experts are of equal size, and a card runs the same blocks of both
            needed = sum(self.held_bytes().values()) + other.weight_bytes
            if needed > self.card.memory_bytes:
                other.free()
        return runner

    def _loras_of(self, call: BlockCall) -> list[Lora]:
        """The call's LoRAs with their strength on its expert, files opened once."""
        for ref in call.loras:
            if ref.path not in self._loras:
                self._loras[ref.path] = open_lora(Path(ref.path))
        return [Lora(self._loras[ref.path], ref.of_expert(call.expert)) for ref in call.loras]

    def _image_encoder(self, model: ModelRef) -> ImageEncoder:
        if model.digest not in self._image_encoders:
            files = self.files(model)
            assert files.spec.image_encoder is not None
            assert files.image_encoder is not None
            self._image_encoders[model.digest] = ImageEncoder(
                files.spec.image_encoder, files.image_encoder, torch.float32, self.device
            )
        return self._image_encoders[model.digest]

    def _vae(self, model: ModelRef) -> WanVae:
        key = (model.digest, model.numerics.vae_dtype)
        if key not in self._vaes:
            files = self.files(model)
            dtype = getattr(torch, model.numerics.vae_dtype)
            self._vaes[key] = load_vae(files.spec.vae, files.vae, dtype, self.device)
        return self._vaes[key]

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor of this card's that may be written: packets are views of read-only memory."""
        moved = tensor.to(self.device)
        return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def prompt_key(model: ModelRef, prompt: str) -> str:
    """Digest that tells encoded prompts apart."""
    return str(key_of("encode_text", prompt=prompt, model=model.digest))


def memory_error(card: Card, what: str, error: Exception) -> OutOfDeviceMemory | None:
    """The allocator's refusal as our own error; None if the error is something else."""
    refused = isinstance(error, torch.OutOfMemoryError | MemoryError)
    # the second is what oneDNN says when it gets no scratch memory for a kernel
    words = ("allocate memory", "could not create a primitive")
    if refused or any(part in str(error) for part in words):
        return OutOfDeviceMemory(card.name, what, card.memory_bytes)
    return None
