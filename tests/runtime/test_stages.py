"""A card's stages: text, decode as a stream, what is held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelpool.errors import WeightError
from reelpool.models.files import open_model
from reelpool.models.spec import LatentShape
from reelpool.runtime.conditioning import unit_image
from reelpool.runtime.device import cpu_card
from reelpool.runtime.stages import (
    MAX_STREAMS,
    WARM_UP_LATENTS,
    CardStages,
    memory_error,
    prompt_key,
)
from reelpool.runtime.types import BlockCall, BlockRange, DecodeCall, ImageCall, ModelRef
from reelpool.runtime.wire import from_bytes, pack, to_bytes, unpack
from tests.tiny_models import FLOAT32, TEXT_DIM, latents_of

NUM_LATENTS = WARM_UP_LATENTS + 8
LATENTS = latents_of(LatentShape(4, NUM_LATENTS, 2, 2))
PACKET = pack({"latents": LATENTS})


@pytest.fixture(scope="module")
def model(tiny_model):
    return ModelRef(str(tiny_model), open_model(str(tiny_model)).digest, FLOAT32)


@pytest.fixture
def stages():
    return CardStages(cpu_card(0))


def decode(stages, model, start, stop, stream="job", tile=0, packet=PACKET):
    call = DecodeCall(model, stream, start, stop, tile)
    return unpack(stages.decode(call, packet))[0]["frames"]


@pytest.fixture(scope="module")
def whole(model):
    """(T, H, W, 3) uint8: all latents in one call."""
    frames = decode(CardStages(cpu_card(0)), model, 0, NUM_LATENTS)
    assert frames.shape == (4 * NUM_LATENTS - 3, 16, 16, 3)
    assert frames.dtype == torch.uint8
    assert frames.float().std() > 10
    return frames


def pixels(start, stop):
    """Frames of latents [start, stop)."""
    return slice(max(0, 4 * start - 3), 4 * stop - 3)


@pytest.mark.parametrize("cuts", [[1], [4, 8, 12], [3, 4, 5, 41], [NUM_LATENTS - 1]], ids=str)
def test_decode_in_any_calls_gives_the_bits_of_one(stages, model, whole, cuts):
    bounds = zip([0, *cuts], [*cuts, NUM_LATENTS], strict=True)
    parts = [decode(stages, model, *bound) for bound in bounds]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("start", [1, 12, WARM_UP_LATENTS, WARM_UP_LATENTS + 1, NUM_LATENTS - 1])
def test_another_card_takes_a_stream_over_with_the_same_bits(stages, model, whole, start):
    frames = decode(stages, model, start, start + 1)
    assert torch.equal(frames, whole[pixels(start, start + 1)])
    if start + 1 < NUM_LATENTS:
        rest = decode(stages, model, start + 1, NUM_LATENTS)
        assert torch.equal(rest, whole[pixels(start + 1, NUM_LATENTS)])


def test_a_call_repeated_or_out_of_order_gives_the_same_bits(stages, model, whole):
    for start, stop in [(0, 2), (2, 4), (2, 4), (0, 2), (6, 7), (4, 6)]:
        assert torch.equal(decode(stages, model, start, stop), whole[pixels(start, stop)])


def test_streams_do_not_mix_and_are_bounded(stages, model, whole):
    names = [f"job-{index}" for index in range(MAX_STREAMS + 1)]
    for start, stop in ((0, 2), (2, 4)):
        for name in names:
            frames = decode(stages, model, start, stop, name)
            assert torch.equal(frames, whole[pixels(start, stop)])
    assert list(stages._streams) == names[1:]
    one = stages.held_bytes()["vae_streams"] // MAX_STREAMS
    stages.end_stream(names[-1])
    assert stages.held_bytes()["vae_streams"] == one
    stages.end_stream("never begun")


WIDE = pack({"latents": latents_of(LatentShape(4, NUM_LATENTS, 6, 5))})


@pytest.fixture(scope="module")
def tiled(model):
    """(T, H, W, 3) uint8: all latents in one call, in 2 x 2 tiles."""
    return decode(CardStages(cpu_card(0)), model, 0, NUM_LATENTS, tile=32, packet=WIDE)


@pytest.mark.parametrize("cuts", [[1, 4], [WARM_UP_LATENTS + 3]], ids=str)
def test_tiles_decoded_in_any_calls_give_the_bits_of_one(stages, model, tiled, cuts):
    assert tiled.shape == (4 * NUM_LATENTS - 3, 48, 40, 3)
    bounds = zip([0, *cuts], [*cuts, NUM_LATENTS], strict=True)
    parts = [decode(stages, model, *bound, tile=32, packet=WIDE) for bound in bounds]
    assert torch.equal(torch.cat(parts), tiled)
    assert stages.held_bytes()["vae_streams"] == 0
    assert stages.parked_bytes() > 0
    stages.end_stream("job")
    assert stages.parked_bytes() == 0


@pytest.mark.parametrize("start", [3, WARM_UP_LATENTS + 2])
def test_another_card_takes_tiles_over_with_the_same_bits(stages, model, tiled, start):
    decode(stages, model, start - 1, start, packet=WIDE)  # whole: its caches are of no use
    frames = decode(stages, model, start, start + 1, tile=32, packet=WIDE)
    assert torch.equal(frames, tiled[pixels(start, start + 1)])


def test_held_bytes_count_what_is_loaded_and_free_drops_it(stages, model):
    spec = open_model(model.name).spec
    names = ("transformer", "caches", "text_encoder", "image_encoder", "vae", "vae_streams")
    assert stages.held_bytes() == dict.fromkeys(names, 0)
    prompt = stages.encode_text(model, "a red ring")
    assert stages.held_bytes()["text_encoder"] == 4 * spec.text.num_params
    decode(stages, model, 0, 1)
    held = stages.held_bytes()
    assert held["vae"] > 0
    assert held["vae_streams"] > 0
    total = spec.transformer.num_layers
    assert stages.load_blocks(model, BlockRange(0, total, total)) > 0
    assert stages.held_bytes()["transformer"] == 4 * spec.transformer.num_params
    shape = LatentShape(4, 2, 2, 2)
    call = BlockCall(model, "job", 0, ("cond",), BlockRange(0, total, total), shape)
    inputs = pack({"latents": latents_of(shape), "timesteps": torch.full((2,), 9.0)})
    stages.run_blocks(call, inputs, (prompt,))
    assert stages.held_bytes()["caches"] > 0
    stages.free()
    assert stages.held_bytes() == dict.fromkeys(names, 0)


def test_encoded_text_travels_with_a_key_of_its_own(stages, model):
    tensors, meta = unpack(stages.encode_text(model, "a red ring"))
    assert tensors["prompt_embeds"].shape == (512, TEXT_DIM)
    assert meta["key"] == prompt_key(model, "a red ring")
    other = replace(model, digest="0" * 32)
    keys = {prompt_key(model, "a red ring"), prompt_key(model, ""), prompt_key(other, "")}
    assert len(keys) == 3


def test_a_model_of_another_digest_is_refused(stages, model):
    other = replace(model, digest="0" * 32)
    for call in (
        lambda: stages.files(other),
        lambda: stages.encode_text(other, ""),
        lambda: stages.load_blocks(other, BlockRange(0, 2, 2)),
        lambda: decode(stages, other, 0, 1),
    ):
        with pytest.raises(WeightError, match="00000000, those of the machine that planned"):
            call()
    assert sum(stages.held_bytes().values()) == 0


def test_read_only_hidden_states_are_left_alone(stages, model):
    shape = LatentShape(4, 2, 4, 4)
    prompt = (stages.encode_text(model, "a red ring"),)
    inputs = pack({"latents": latents_of(shape), "timesteps": torch.full((2,), 9.0)})
    first = BlockCall(model, "job", 0, ("cond",), BlockRange(0, 1, 2), shape)
    hidden = from_bytes(to_bytes(stages.run_blocks(first, inputs, prompt)), 2**20)
    assert not any(buffer.flags.writeable for buffer in hidden.buffers)
    last = replace(first, blocks=BlockRange(1, 2, 2))
    results = [unpack(stages.run_blocks(last, hidden, prompt))[0] for _ in range(2)]
    assert torch.equal(results[0]["velocity.cond"], results[1]["velocity.cond"])


def test_the_allocators_refusal_is_told_from_other_errors():
    card = cpu_card(0, 2**20)
    refusals = [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("could not create a primitive"),  # oneDNN without scratch memory
    ]
    for refusal in refusals:
        error = memory_error(card, "a step", refusal)
        assert "cpu:0 ran out of memory during a step (budget 1 MiB)" in str(error)
    assert memory_error(card, "a step", RuntimeError("shapes do not match")) is None


@pytest.fixture(scope="module")
def image_models(tmp_path_factory):
    """Kind -> reference to a tiny model that takes images."""
    from tests.tiny_image_models import write_image_model

    root = tmp_path_factory.mktemp("image-models")
    names = {kind: str(write_image_model(root / kind, kind)) for kind in ("flf2v", "ti2v")}
    names["i2v-2.2"] = str(write_image_model(root / "i2v-2.2", "i2v-2.2"))
    return {kind: ModelRef(name, open_model(name).digest, FLOAT32) for kind, name in names.items()}


def images_packet(*sizes):
    """Random images of (height, width), the first and perhaps the last of a video."""
    made = torch.Generator().manual_seed(4)
    images = [
        torch.randint(0, 256, (*size, 3), generator=made, dtype=torch.uint8) for size in sizes
    ]
    return pack(dict(zip(("first", "last"), images, strict=False)), {"digest": "ab"}), images


def test_images_become_channels_and_features(stages, image_models):
    model = image_models["flf2v"]
    packet, images = images_packet((40, 64), (32, 48))
    made, meta = unpack(stages.encode_image(ImageCall(model, 48, 32, 9), packet))
    assert made["condition"].shape == (1, 20, 3, 4, 6)
    assert made["image_embeds"].shape == (2 * 17, 16)
    assert str(meta["key"]).startswith("encode_image-")
    # the encoder gets each image whole, not what is cut out for the video
    encoder = stages._image_encoder(model)
    for index, image in enumerate(images):
        features = encoder.encode(unit_image(image))
        assert torch.equal(made["image_embeds"][17 * index : 17 * index + 17], features)
    assert stages.held_bytes()["image_encoder"] == encoder.num_bytes > 0
    again, _ = unpack(CardStages(cpu_card(0)).encode_image(ImageCall(model, 48, 32, 9), packet))
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())


def test_tiles_of_an_image_call_are_honoured(stages, image_models):
    packet, _ = images_packet((40, 64))
    call = ImageCall(image_models["i2v-2.2"], 64, 40, 5)
    whole, tiled = (
        unpack(stages.encode_image(replace(call, tile=tile), packet)) for tile in (0, 32)
    )
    assert tiled[0]["condition"].shape == whole[0]["condition"].shape
    assert not torch.equal(tiled[0]["condition"], whole[0]["condition"])
    assert tiled[1]["key"] != whole[1]["key"]


def test_an_image_becomes_the_first_latent_frame(stages, image_models):
    packet, _ = images_packet((50, 70))
    made, _ = unpack(stages.encode_image(ImageCall(image_models["ti2v"], 64, 32, 9), packet))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "latent": (1, 48, 1, 2, 4)
    }


def test_keys_tell_image_calls_apart(stages, image_models):
    model = image_models["i2v-2.2"]
    packet, images = images_packet((32, 32))
    other = pack({"first": images[0]}, {"digest": "cd"})
    calls = [(ImageCall(model, 32, 32, 5), packet), (ImageCall(model, 32, 32, 9), packet)]
    calls += [(ImageCall(model, 32, 32, 5), other)]
    keys = {unpack(stages.encode_image(*call))[1]["key"] for call in calls}
    assert len(keys) == 3


@pytest.mark.parametrize(("share", "held"), [(10.0, 2), (1.5, 1)])
def test_the_first_expert_leaves_only_if_both_do_not_fit(image_models, share, held):
    model, blocks = image_models["i2v-2.2"], BlockRange(0, 2, 2)
    one = 4 * open_model(model.name).spec.transformer.num_params
    stages = CardStages(cpu_card(0, int(share * one)))
    for expert in (0, 1):
        stages.load_blocks(model, blocks, expert)
    assert stages.held_bytes()["transformer"] == held * one
    stages.load_blocks(model, blocks, 0)
    assert stages.held_bytes()["transformer"] == held * one


def test_experts_have_weights_of_their_own(stages, image_models):
    model, shape = image_models["i2v-2.2"], LatentShape(16, 2, 4, 4)
    packet, _ = images_packet((32, 32))
    image = stages.encode_image(ImageCall(model, 32, 32, 5), packet)
    inputs = pack({"latents": latents_of(shape), "timesteps": torch.full((2,), 9.0)})
    prompts = (stages.encode_text(model, "a red ring"),)
    velocities = []
    for expert in (0, 1, 0):
        blocks = BlockRange(0, 2, 2)
        call = BlockCall(model, "job", 0, ("cond",), blocks, shape, expert, has_image=True)
        result = stages.run_blocks(call, inputs, prompts, image)
        velocities.append(unpack(result)[0]["velocity.cond"])
    assert torch.equal(velocities[0], velocities[2])
    assert not torch.allclose(velocities[0], velocities[1], atol=1e-3)
