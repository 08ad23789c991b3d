"""What the trainer computes is what the product runs, and a run that stopped goes on unchanged."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from reelpool.models import wan, wan_context, wan_weights
from reelpool.models.demo import clips, latent_set, network, train, train_vae
from reelpool.models.demo.export import export_index, export_text, export_transformer, export_vae
from reelpool.models.demo.latent_set import LatentSet, encode_clips, load_sets, save_set
from reelpool.models.demo.optimiser import Training, orthogonalise
from reelpool.models.demo.train_transformer import (
    DemoNetwork,
    TransformerSettings,
    draw_batch,
    split_average,
    train_transformer,
)
from reelpool.models.demo.train_vae import VaeSettings
from reelpool.models.files import open_model
from reelpool.models.rope import rope_table
from reelpool.models.spec import TEXT_LENGTH, LatentShape, NumericsProfile
from reelpool.models.wan_vae import WanVae

CPU = torch.device("cpu")
SPEC = replace(network.SPEC, num_heads=2, ffn_dim=96, num_layers=2)
SETTINGS = TransformerSettings(4, batch=2, autocast=False, warm_up=1, save_every=2, log_every=1)
VAE_SETTINGS = VaeSettings(2, freeze_encoder=True, save_every=1, log_every=1)
CAPTIONS = [
    "a red circle moves right over a navy background",
    "a green star spins and a yellow ring grows and shrinks on a moving gray striped background",
    "",
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """Small tensors: a second thread costs more than it brings, as in training."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(1)
    made = network.random_weights(SPEC, generator)
    return {k: w + 0.05 * torch.randn(w.shape, generator=generator) for k, w in made.items()}


@pytest.fixture(scope="module")
def small_vae():
    torch.manual_seed(3)
    return WanVae(replace(train_vae.SPEC, base_dim=4, decoder_base_dim=4))


@pytest.fixture(scope="module")
def data():
    rng = random.Random(0)
    latents = torch.randn(6, 16, 9, 8, 8, generator=torch.Generator().manual_seed(2))
    return LatentSet(latents.half(), [clips.sample_clip(rng) for _ in range(6)])


def make_network(weights):
    torch.manual_seed(0)
    return DemoNetwork(SPEC, weights, None, network.build_tokenizer())


class DictSource:
    """Weights in memory, under canonical names."""

    where = "memory"

    def __init__(self, weights):
        self.get = self.matrix = weights.__getitem__


def run_product(weights, latents, timesteps, rows):
    """One sample through `wan`, as the runtime drives it."""
    source, numerics = DictSource(weights), NumericsProfile()
    shape = LatentShape(SPEC.in_channels, *latents.shape[2:])
    grid = (shape.frames, shape.height // 2, shape.width // 2)
    rope = rope_table(SPEC.head_dim, grid, CPU)
    context = wan_context.embed_text(wan_weights.load_text(source, torch.float32), rows)
    enter = wan_weights.load_enter(SPEC, source, torch.float32)
    hidden = wan.enter(SPEC, enter, latents, timesteps, numerics)
    for index in range(SPEC.num_layers):
        block = wan_weights.load_block(SPEC, source, index, torch.float32)
        text = wan_context.text_key_value(SPEC, block, context)
        wan.run_block(SPEC, block, hidden, rope, text, numerics)
    return wan.leave(SPEC, wan_weights.load_leave(source, torch.float32), hidden, shape, numerics)


@pytest.mark.parametrize("per_frame", [False, True], ids=["one timestep", "one per frame"])
def test_training_forward_equals_the_product(weights, per_frame):
    demo = make_network(weights)
    latents = torch.randn(3, 16, 3, 4, 6)
    sigmas = torch.rand(3, 3) if per_frame else torch.rand(3, 1).expand(-1, 3)
    with torch.inference_mode():
        text = network.encode_captions(
            demo.tokenizer, demo.text_encoder, CAPTIONS, torch.full((3,), TEXT_LENGTH)
        )
        batched = network.velocity(
            SPEC, demo.weights, latents, sigmas, text, network.rope_parts(SPEC, (3, 2, 3))
        )
        for row in range(3):
            length = int((text[0][row] != 0).any(-1).sum())
            single = run_product(
                weights,
                latents[row : row + 1],
                sigmas[row] * 1000,
                network.text_rows(text[0][row], length),
            )
            # measured 2e-6 at values of order 1
            torch.testing.assert_close(batched[row : row + 1], single, rtol=0, atol=1e-5)


def test_training_reduces_the_loss(weights, data, tmp_path):
    demo = make_network(weights)
    batch = draw_batch(data, SETTINGS, False, 0)

    def loss():
        with torch.no_grad():
            return float(demo.loss(batch, network.velocity, False))

    before = loss()
    training = Training(demo.parameters(), lambda name, p: p.ndim == 2, 0.01, 1e-3)
    for _ in range(3):
        training.step(demo.loss(batch, network.velocity, False), 1.0)
    assert loss() < before
    assert training.average.keys() == demo.parameters().keys()


def test_resumed_training_equals_an_uninterrupted_one(weights, data, tmp_path):
    whole = train_transformer(make_network(weights), data, SETTINGS, tmp_path / "whole.pt")
    path = tmp_path / "parts.pt"

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    demo = make_network(weights)
    with pytest.MonkeyPatch.context() as patch:
        real, calls = demo.loss, []
        patch.setattr(
            demo, "loss", lambda *a: stop() if len(calls) == 3 else calls.append(1) or real(*a)
        )
        with pytest.raises(Stopped):
            train_transformer(demo, data, SETTINGS, path)
    resumed = train_transformer(make_network(weights), data, SETTINGS, path)
    assert resumed.num_steps == whole.num_steps == 4
    for name, average in whole.average.items():
        assert torch.equal(average, resumed.average[name])
        assert torch.equal(whole.params[name], resumed.params[name])


def test_given_frames_do_not_count(data):
    settings = replace(SETTINGS, batch=64)
    batch = draw_batch(data, settings, False, 5)
    given = batch.weights == 0
    assert bool(given.any())
    assert float(batch.sigmas[given].max()) <= 0.2
    assert not bool(given.all(1).any())


def test_orthogonalise_brings_singular_values_near_one():
    made = orthogonalise(torch.randn(2, 96, 64))
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.4


def test_vae_helpers_equal_the_product(small_vae):
    frames = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, _ = train_vae.moments(small_vae, frames)
        latents, _ = small_vae.encode(frames)
        assert torch.equal(mean, latents)  # this spec's statistics are 0 and 1
        decoded = train_vae.decode_raw(small_vae, mean).clamp(-1, 1)
        assert torch.equal(decoded, small_vae.decode(latents)[0])


def test_refining_the_decoder_leaves_the_encoder(small_vae, tmp_path):
    before = {name: p.clone() for name, p in small_vae.state_dict().items()}
    train_vae.train_vae(small_vae, VAE_SETTINGS, tmp_path / "vae.pt")
    changed = {
        name for name, p in small_vae.state_dict().items() if not torch.equal(p, before[name])
    }
    assert changed
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in changed)


def test_latent_sets_survive_the_disk(small_vae, tmp_path):
    made = encode_clips(small_vae, 8, 0)
    save_set(made, tmp_path / "set.pt")
    read = load_sets([tmp_path / "set.pt"] * 2)
    assert read.params == made.params * 2
    assert torch.equal(read.latents[:8], made.latents)
    assert made.latents.shape == (8, 16, latent_set.NUM_FRAMES // 4 + 1, 8, 8)
    assert not any(map(clips.is_held_out, made.params))


def test_exported_folder_opens(weights, small_vae, tmp_path):
    demo = make_network(weights)
    transformer, text = split_average(demo.parameters())
    export_transformer(tmp_path, SPEC, transformer, torch.float32)
    export_text(tmp_path, text, demo.tokenizer, torch.float32)
    export_vae(tmp_path, small_vae.spec, small_vae.state_dict(), torch.float32)
    export_index(tmp_path)
    files = open_model(str(tmp_path))
    assert files.spec.transformer == SPEC
    assert files.spec.vae == small_vae.spec
    assert files.spec.defaults.frames == 17
    for name, tensor in weights.items():
        assert torch.equal(files.transformer.get(name), tensor)
    again = train.load_network(tmp_path)
    for name, tensor in demo.parameters().items():
        assert torch.equal(again.parameters()[name], tensor)
    assert json.loads((tmp_path / "demo.json").read_text())["grammar"] == clips.grammar()
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert stored.encode(CAPTIONS[0]).ids == demo.tokenizer.encode(CAPTIONS[0]).ids[:10]


def test_new_words_keep_the_ids_of_the_old_ones():
    old = network.build_tokenizer(["<pad>", "</s>", "<unk>", "navy", "zebra"])
    vocabulary = old.get_vocab()
    assert [vocabulary[w] for w in ("<pad>", "</s>", "<unk>", "navy", "zebra")] == [0, 1, 2, 3, 4]
    assert set(clips.words()) <= set(vocabulary)


@pytest.mark.parametrize("command", ["encode", "train", "train-vae", "refine-vae", "export"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([command, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out
