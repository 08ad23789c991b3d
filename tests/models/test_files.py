"""Opening a model, whatever its files are: the whole check, what it is, the digest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelpool.errors import ConfigError, WeightError
from reelpool.models.files import SAMPLE_BYTES, files_digest, open_model
from reelpool.models.keys import transformer_names_from_diffusers, transformer_tensors
from reelpool.models.registry import DEMO_FOLDER, find_spec
from reelpool.models.spec import ModelDefaults
from tests.tiny_models import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    copy_model,
    edit_json,
    edit_tensors,
    shard,
)

IMAGE_ENCODER = "image_encoder/model.safetensors"
TRANSFORMER_2 = TRANSFORMER.replace("transformer/", "transformer_2/")
KINDS = {  # of tests.tiny_image_models: variant, image, experts, boundary, image encoder
    "i2v-2.1": ("i2v", "concat", 1, 0.0, True),
    "flf2v": ("flf2v", "concat", 1, 0.0, True),
    "i2v-2.2": ("i2v", "concat", 2, 0.9, False),
    "t2v-2.2": ("t2v", "", 2, 0.875, False),
    "ti2v": ("ti2v", "first-frame", 1, 0.0, False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as diffusers' pipelines save them, made when asked for."""
    from tests.tiny_image_models import write_image_model

    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = write_image_model(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return folder


def test_demo_and_a_folder_open_under_canonical_names(tiny_model):
    for name in ("demo", str(tiny_model)):
        files = open_model(name)
        assert set(files.transformer.names()) == set(transformer_tensors(files.spec.transformer))
        assert len(files.digest) == 32


def test_a_name_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        open_model(str(tmp_path / "gone"))


def test_shards_open_to_the_same_tensors(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    for file in (TRANSFORMER, TEXT_ENCODER, VAE):
        assert len(shard(folder / file)) == 3
    whole, cut = open_model(str(tiny_model)), open_model(str(folder))
    for part in ("transformer", "text_encoder", "vae"):
        one, other = getattr(whole, part), getattr(cut, part)
        assert set(one.names()) == set(other.names())
        assert all(torch.equal(one.get(name), other.get(name)) for name in one.names())


def test_digest_is_that_of_the_content_wherever_it_lies(tiny_model, tmp_path):
    digest = open_model(str(tiny_model)).digest
    copy = copy_model(tiny_model, tmp_path / "another name")
    (copy / "README.md").write_text("what lies beside is not the model")
    (copy / "gone.json").symlink_to(tmp_path / "nowhere")
    (copy / "folder.json").mkdir()
    assert open_model(str(copy)).digest == digest
    edit_json(copy / "model_index.json", extra=1)
    assert open_model(str(copy)).digest != digest


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE])
def test_digest_sees_one_changed_byte_of_small_weights(tiny_model, tmp_path, file):
    copy = copy_model(tiny_model, tmp_path / "model")
    path = copy / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_model(str(copy)).digest != open_model(str(tiny_model)).digest


def test_digest_of_a_large_file_samples_its_start_end_and_size(tmp_path):
    path = tmp_path / "x.safetensors"
    content = bytearray(40 * SAMPLE_BYTES)

    def digest():
        path.write_bytes(content)
        return files_digest({path.name: path})

    seen = {digest()}
    for position in (0, SAMPLE_BYTES - 1, len(content) - SAMPLE_BYTES, len(content) - 1):
        content[position] ^= 1
        seen.add(digest())
    content.append(0)
    seen.add(digest())
    shutil.move(path, tmp_path / "y.safetensors")
    seen.add(files_digest({"y.safetensors": tmp_path / "y.safetensors"}))
    seen.add(files_digest({"y.safetensors": tmp_path / "y.safetensors"}, "another geometry"))
    assert len(seen) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusers_folder_of_every_variant_opens(folders, kind):
    variant, image, num_experts, boundary, has_encoder = KINDS[kind]
    files = open_model(str(folders(kind)))
    spec = files.spec
    assert (spec.name, spec.variant, spec.image) == (kind, variant, image)
    assert (spec.num_experts, spec.boundary, spec.quant) == (num_experts, boundary, "fp32")
    assert len(files.transformers) == num_experts
    assert (spec.image_encoder is not None) == has_encoder == (files.image_encoder is not None)
    assert spec.vae.z_dim == spec.transformer.out_channels
    for source in files.transformers:
        assert set(source.names()) == set(transformer_tensors(spec.transformer))


def original_names(file):
    """A diffusers transformer's tensors under original names."""
    stored = load_file(file)
    names = transformer_names_from_diffusers(stored)
    assert len(names) == len(stored)
    return {ours: stored[theirs] for ours, theirs in names.items()}


def split(folder, to):
    """The same model as single files with original names; the parts to name."""
    to.mkdir()
    config = json.loads((folder / "transformer" / "config.json").read_text())
    kept = ("_class_name", "num_attention_heads", "attention_head_dim", "eps")
    (to / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    is_one = not (folder / TRANSFORMER_2).exists()
    file = to / ("tiny.safetensors" if is_one else "tiny_high_noise.safetensors")
    save_file(original_names(folder / TRANSFORMER), file)
    parts = {"vae": VAE, "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}
    parts = {part: file for part, file in parts.items() if (folder / file).exists()}
    for part, stored in parts.items():
        (to / part).mkdir()
        shutil.copyfile(folder / stored, to / part / f"{part}.safetensors")
        shutil.copyfile((folder / stored).parent / "config.json", to / part / "config.json")
    shutil.copytree(folder / "tokenizer", to / "tokenizer")
    named = [(part, str(to / part)) for part in parts]
    if not is_one:
        save_file(original_names(folder / TRANSFORMER_2), to / "tiny_low_noise.safetensors")
        named.append(("low_noise", str(to / "tiny_low_noise.safetensors")))
    return str(file), tuple(named)


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_open_to_the_same_model(folders, tmp_path, kind):
    whole = open_model(str(folders(kind)))
    single = open_model(*split(folders(kind), tmp_path / "files"))
    like = replace(whole.spec, name=single.spec.name, defaults=single.spec.defaults)
    assert single.spec == like
    assert single.spec.name == ("tiny" if like.num_experts == 1 else "tiny_high_noise")
    assert single.folder is None
    for ours, theirs in zip(single.transformers, whole.transformers, strict=True):
        assert set(ours.names()) == set(theirs.names())
        assert all(torch.equal(ours.get(name), theirs.get(name)) for name in ours.names())


def test_an_original_folder_of_two_experts_opens(folders, tmp_path):
    folder, to = folders("i2v-2.2"), tmp_path / "Wan2.2-I2V-A14B"
    for part, file in (("high_noise_model", TRANSFORMER), ("low_noise_model", TRANSFORMER_2)):
        (to / part).mkdir(parents=True)
        save_file(original_names(folder / file), to / part / "diffusion_pytorch_model.safetensors")
        shard(to / part / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "num_layers": 2}
        (to / part / "config.json").write_text(json.dumps(config))
    torch.save(load_file(folder / TEXT_ENCODER), to / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(load_file(folder / VAE), to / "Wan2.1_VAE.pth")
    shutil.copytree(folder / "tokenizer", to / "google" / "umt5-xxl")
    files, whole = open_model(str(to)), open_model(str(folder))
    assert files.spec == replace(whole.spec, name=to.name, defaults=files.spec.defaults)
    assert files.spec.boundary == 0.9
    assert files.folder == to
    for ours, theirs in zip(files.transformers, whole.transformers, strict=True):
        assert all(torch.equal(ours.get(name), theirs.get(name)) for name in theirs.names())


def test_an_original_folder_of_one_transformer_opens(folders, tmp_path):
    folder, to = folders("ti2v"), tmp_path / "Wan2.2-TI2V-5B"
    to.mkdir()
    save_file(original_names(folder / TRANSFORMER), to / "diffusion_pytorch_model.safetensors")
    shard(to / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "num_layers": 2}
    (to / "config.json").write_text(json.dumps(config))
    torch.save(load_file(folder / TEXT_ENCODER), to / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(load_file(folder / VAE), to / "Wan2.2_VAE.pth")
    shutil.copytree(folder / "tokenizer", to / "google" / "umt5-xxl")
    files, whole = open_model(str(to)), open_model(str(folder))
    assert files.spec.transformer == whole.spec.transformer
    assert (files.spec.variant, files.spec.image, files.spec.vae.z_dim) == (
        "ti2v",
        "first-frame",
        48,
    )


def test_what_the_shapes_say_is_what_the_configs_say(tiny_model):
    for name in ("demo", str(tiny_model)):
        said, found = find_spec(name), open_model(name).spec
        assert (found.name, found.defaults) == (said.name, said.defaults)
        assert (found.transformer, found.text, found.vae) == (said.transformer, said.text, said.vae)
        assert (found.variant, found.image, found.num_experts) == ("t2v", "", 1)


def test_a_pipeline_for_images_with_timesteps_per_frame_takes_a_first_frame(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    spec = open_model(str(folder)).spec
    assert (spec.variant, spec.image) == ("ti2v", "first-frame")


def test_a_pipeline_for_diffusion_forcing_tells_what_the_weights_do_not(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="SkyReelsV2DiffusionForcingPipeline")
    assert open_model(str(folder)).spec.variant == "df"


REFUSED = {  # id: (kind, damage, part of the message)
    "VAE of another model": (
        "t2v-2.2",
        lambda folder, other: copy_part(other("ti2v"), folder, "vae"),
        "found a VAE of z_dim 48, expected 16, the transformer's out_channels; give wan_2.1_vae",
    ),
    "VAE of the 2.1 models": (
        "ti2v",
        lambda folder, other: copy_part(other("t2v-2.2"), folder, "vae"),
        "z_dim 16, expected 48, the transformer's out_channels; give wan2.2_vae.safetensors",
    ),
    "experts of two models": (
        "i2v-2.2",
        lambda folder, other: copy_part(other("t2v-2.2"), folder, "transformer_2"),
        "found a transformer of kind t2v, 2 blocks, width 24, 16 channels beside a transformer of "
        "kind i2v,",
    ),
    "no low-noise expert": (
        "i2v-2.2",
        lambda folder, other: shutil.rmtree(folder / "transformer_2"),
        "transformer_2: found no such folder, expected the low-noise expert",
    ),
    "no image encoder": (
        "i2v-2.1",
        lambda folder, other: shutil.rmtree(folder / "image_encoder"),
        "image_encoder: found no image encoder, expected one whose features have width 16; give "
        "clip_vision_h.safetensors",
    ),
    "a transformer of another width": (
        "t2v-2.2",
        lambda folder, other: edit_tensors(
            folder / TRANSFORMER_2,
            **{"condition_embedder.text_embedder.linear_1.weight": torch.zeros(24, 16)},
        ),
        "has shape [24, 16], expected [24, 32]",
    ),
    "another pipeline": (
        "i2v-2.1",
        lambda folder, other: edit_json(folder / "model_index.json", _class_name="WanVACEPipeline"),
        "found a model of class WanVACEPipeline, expected WanPipeline or",
    ),
    "a boundary in words": (
        "i2v-2.2",
        lambda folder, other: edit_json(folder / "model_index.json", boundary_ratio="0.9"),
        "boundary_ratio '0.9', expected a number from 0 to 1",
    ),
}


def copy_part(source, to, part):
    shutil.rmtree(to / part)
    shutil.copytree(source / part.removesuffix("_2"), to / part)


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_together_are_refused(folders, tmp_path, case):
    kind, damage, words = REFUSED[case]
    folder = copy_model(folders(kind), tmp_path / "model")
    damage(folder, folders)
    with pytest.raises(WeightError) as caught:
        open_model(str(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_encoder_of_another_width_is_refused(folders, tmp_path):
    name, parts = split(folders("t2v-2.2"), tmp_path / "files")
    parts = tuple((part, path) for part, path in parts if part != "text_encoder")
    with pytest.raises(WeightError, match="d_model 128, expected 32, the transformer's text_dim"):
        open_model(name, (*parts, ("text_encoder", str(DEMO_FOLDER / "text_encoder"))))


def test_an_image_encoder_of_another_size_is_refused(folders, tmp_path):
    folder = copy_model(folders("flf2v"), tmp_path / "model")
    names = "condition_embedder.image_embedder.pos_embed"
    edit_tensors(folder / TRANSFORMER, **{names: torch.zeros(1, 35, 16)})
    with pytest.raises(WeightError, match="17 rows of 16, expected rows of 16, 35 of two images"):
        open_model(str(folder))


def test_the_digest_of_single_files_is_that_of_what_they_hold(folders, tmp_path):
    name, parts = split(folders("t2v-2.2"), tmp_path / "files")
    digest = open_model(name, parts).digest
    shutil.copytree(tmp_path / "files", tmp_path / "elsewhere")
    moved = [text.replace("/files", "/elsewhere") for text in (name, *(path for _, path in parts))]
    there = tuple(zip((part for part, _ in parts), moved[1:], strict=True))
    assert open_model(moved[0], there).digest == digest
    swapped = dict(there) | {"high_noise": dict(there)["low_noise"], "low_noise": moved[0]}
    assert open_model(moved[0], tuple(swapped.items())).digest != digest
    edit_json(tmp_path / "elsewhere" / "config.json", eps=1e-3)
    assert open_model(moved[0], there).digest != digest


def test_defaults_go_with_the_variant_and_the_words_of_the_name(folders, tmp_path):
    shift = ModelDefaults().shift
    plain = copy_model(folders("i2v-2.1"), tmp_path / "Wan2.1-I2V-14B-480P-Diffusers")
    sized = copy_model(folders("i2v-2.1"), tmp_path / "Wan2.1-I2V-14B-720P-Diffusers")
    for folder in (plain, sized):
        (folder / "scheduler" / "scheduler_config.json").unlink()
    found = [open_model(str(folder)).spec.defaults for folder in (plain, sized)]
    assert [(each.width, each.shift) for each in found] == [(832, 3.0), (1280, shift)]
