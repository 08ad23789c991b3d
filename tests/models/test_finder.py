"""From names to files: ComfyUI trees, the Hugging Face cache, companions, pairs of experts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from reelpool.errors import ConfigError, WeightError
from reelpool.models import catalogue
from reelpool.models.catalogue import scan, walk
from reelpool.models.finder import DEMO_FOLDER, find_model
from reelpool.models.presets import PRESETS
from reelpool.models.search_folders import search_folders
from tests import model_trees as trees

TEXT, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
CLIP, VAE22 = "clip_vision_h.safetensors", "wan2.2_vae.safetensors"
LARGE = PRESETS["wan2.1-t2v-14b"].transformer
IMAGE = PRESETS["wan2.1-i2v-14b-480p"].transformer
FIVE = PRESETS["wan2.2-ti2v-5b"].transformer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home without any models."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "REELPOOL_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """The folder `models` of a ComfyUI, configured."""
    root = tmp_path / "comfy"
    (root / "models").mkdir(parents=True)
    configure(monkeypatch, tmp_path, f"comfyui: [{root}]")
    return root / "models"


def configure(monkeypatch, tmp_path: Path, text: str) -> None:
    config = tmp_path / "config" / "reelpool" / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def refusal(name: str, parts=()) -> str:
    with pytest.raises(ConfigError) as caught:
        find_model(name, parts)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# names


def test_demo_is_the_folder_that_ships_with_the_package():
    found = find_model("demo")
    assert found.folder == DEMO_FOLDER
    assert found.transformers == (DEMO_FOLDER / "transformer",)
    assert (found.vae, found.tokenizer) == (DEMO_FOLDER / "vae", DEMO_FOLDER / "tokenizer")
    assert found.image_encoder is None


def test_a_name_finds_its_file_by_any_part_of_it(models):
    file = trees.transformer(models / "unet" / "wan" / "Wan2.1-T2V-1.3B-Q4_K_M.gguf")
    trees.companions(models, TEXT, VAE)
    for name in (
        file.name,
        file.name.lower(),
        "wan2.1-t2v-1.3b-q4_k_m",
        f"wan/{file.name}",
        "unet/wan/Wan2.1-T2V-1.3B-Q4_K_M".removeprefix("unet/"),
        str(file),
    ):
        assert find_model(name).transformers == (file,), name
    found = find_model(file.name)
    assert found.vae == models / "vae" / VAE
    assert found.text_encoder == models / "text_encoders" / TEXT
    assert (found.tokenizer, found.image_encoder, found.folder) == (None, None, None)


def test_a_relative_path_is_made_absolute(models, monkeypatch):
    file = trees.transformer(models / "unet" / "a.gguf")
    trees.companions(models, TEXT, VAE)
    monkeypatch.chdir(file.parent)
    assert find_model("a.gguf").transformers == (file,)


def test_an_unknown_name_names_the_nearest(models):
    trees.transformer(models / "unet" / "fastwan-t2v.gguf")
    assert "did you mean fastwan-t2v" in refusal("fastwan-t2")
    assert "did you mean demo?" in refusal("dmeo")
    assert "did you mean wan2.1-t2v-14b" in refusal("wan2.1-t2v-14")
    assert "`reelpool models` lists" in refusal("zzzz")
    assert "no model" in refusal("x" * 5000)
    assert "no model" in refusal("a\0b")


def test_a_preset_is_a_geometry_without_weights():
    assert "geometry without weights" in refusal("wan2.1-t2v-14b")
    assert "geometry without weights" in refusal("wan2.2-t2v-a14b@q4_k_m")


def test_an_ambiguous_name_lists_the_candidates(models):
    for folder in ("diffusion_models", "unet"):
        trees.touch(models / folder / "wan.safetensors")
    message = refusal("wan.safetensors")
    assert str(models / "diffusion_models" / "wan.safetensors") in message
    assert str(models / "unet" / "wan.safetensors") in message
    trees.touch(models / "unet" / "other.gguf")
    trees.touch(models / "unet" / "other.safetensors")
    assert "other.gguf" in refusal("other")


def test_a_link_to_the_same_file_is_not_another_one(models):
    file = trees.transformer(models / "diffusion_models" / "wan.gguf")
    trees.companions(models, TEXT, VAE)
    (models / "unet").mkdir()
    (models / "unet" / "wan.gguf").symlink_to(file)
    assert len(find_model("wan.gguf").transformers) == 1


# companions


def test_missing_companions_are_asked_for_by_name_folder_and_option(models):
    file = trees.transformer(models / "unet" / "wan.gguf", IMAGE)
    for part, name, folder, option in (
        ("VAE", VAE, "vae", "--vae"),
        ("text encoder", TEXT, "text_encoders", "--text-encoder"),
        ("CLIP", CLIP, "clip_vision", "--image-encoder"),
    ):
        message = refusal(str(file))
        assert message.startswith(f"{option}: ")
        assert part in message
        assert f"put {name} into {models / folder}" in message
        trees.touch(models / folder / name)
    assert find_model(str(file)).image_encoder == models / "clip_vision" / CLIP


def test_the_5b_model_takes_the_vae_of_wan_22(models):
    file = trees.transformer(models / "unet" / "Wan2.2-TI2V-5B-Q4_K_M.gguf", FIVE)
    trees.companions(models, TEXT, VAE)
    assert VAE22 in refusal(str(file))
    trees.companions(models, VAE22)
    assert find_model(str(file)).vae == models / "vae" / VAE22


@pytest.mark.parametrize(
    ("vae", "text", "clip"),
    [
        ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "clip_vision_h.safetensors"),
        ("Wan2_1_VAE_bf16.safetensors", "umt5-xxl-enc-fp8_e4m3fn.safetensors",
         "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors"),
        ("wan_vae.safetensors", "umt5-xxl-encoder-Q8_0.gguf",
         "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
    ],
)  # fmt: skip
def test_companions_are_known_by_their_published_names(tmp_path, vae, text, clip):
    file = trees.transformer(tmp_path / "all" / "wan.safetensors", IMAGE, "F16")
    for name in (
        vae,
        text,
        clip,
        "taew2_1.safetensors",
        "t5xxl_fp16.safetensors",
        "ae.safetensors",
    ):
        trees.touch(tmp_path / "all" / name)
    found = find_model(str(file))
    assert (found.vae.name, found.text_encoder.name) == (vae, text)
    assert found.image_encoder is not None
    assert found.image_encoder.name == clip


def test_of_several_the_largest_is_taken(models):
    file = trees.transformer(models / "unet" / "wan.gguf")
    trees.companions(models, VAE)
    trees.touch(models / "text_encoders" / "umt5_xxl_fp16.safetensors", 100)
    trees.touch(models / "text_encoders" / TEXT, 50)
    assert find_model(str(file)).text_encoder.name == "umt5_xxl_fp16.safetensors"


def test_companions_are_found_in_a_nested_and_in_another_root(models, tmp_path, monkeypatch):
    file = trees.transformer(tmp_path / "elsewhere" / "wan.gguf")
    trees.touch(models / "vae" / "wan" / VAE)
    trees.touch(models / "clip" / TEXT)
    found = find_model(str(file))
    assert found.vae == models / "vae" / "wan" / VAE
    assert found.text_encoder == models / "clip" / TEXT


def test_a_file_inside_a_diffusers_folder_takes_its_parts(tmp_path):
    folder = trees.diffusers_folder(tmp_path / "wan")
    file = trees.transformer(folder / "wan.gguf")
    assert find_model(str(file)).vae == folder / "vae"
    assert find_model(str(file)).text_encoder == folder / "text_encoder"
    five = trees.transformer(folder / "five.gguf", FIVE)
    assert VAE22 in refusal(str(five))  # its VAE is of Wan 2.1


def test_a_tokenizer_beside_the_text_encoder_is_found(tmp_path):
    file = trees.transformer(tmp_path / "wan.gguf")
    trees.touch(tmp_path / VAE)
    trees.touch(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    assert find_model(str(file)).tokenizer is None
    spiece = trees.touch(tmp_path / "google" / "umt5-xxl" / "spiece.model")
    assert find_model(str(file)).tokenizer == spiece


def test_parts_that_the_user_names_come_first(models, tmp_path):
    file = trees.transformer(models / "unet" / "wan.gguf")
    trees.companions(models, TEXT, VAE)
    other = trees.touch(tmp_path / "my.safetensors")
    assert find_model(str(file), (("vae", str(other)),)).vae == other
    assert find_model(str(file), (("vae", VAE),)).vae == models / "vae" / VAE  # by name
    assert "--vae: there is no file none" in refusal(str(file), (("vae", "none"),))
    assert f"did you mean {VAE}" in refusal(str(file), (("vae", "wan_2.1_va.safetensors"),))
    assert find_model("demo", (("vae", str(other)),)).vae == other


def test_a_file_that_is_no_transformer_is_refused(models):
    file = trees.hollow_safetensors(models / "unet" / "x.safetensors", {"a.weight": (2, 2)})
    with pytest.raises(WeightError, match="expected a Wan transformer"):
        find_model(str(file))


# experts


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"),
        ("Wan2_2-T2V-A14B_HIGH_fp8.safetensors", "Wan2_2-T2V-A14B_LOW_fp8.safetensors"),
        ("HighNoise/Wan2.2-HighNoise-Q4.gguf", "LowNoise/Wan2.2-LowNoise-Q4.gguf"),
        ("high_noise_model/wan2.2.gguf", "low_noise_model/wan2.2.gguf"),
        ("wan22I2VHigh.safetensors", "wan22I2VLow.safetensors"),
        ("wan22_i2vLowV2.gguf", "wan22_i2vHighV2.gguf"),
        ("low_vram_high_noise_14B.gguf", "low_vram_low_noise_14B.gguf"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "Wan2.2-T2V-A14B-LowNoise-Q5_K_M.gguf"),
        ("HighNoise/wan-HighNoise-Q8_0.gguf", "LowNoise/wan-LowNoise-fp8_scaled.safetensors"),
    ],
)
def test_experts_are_found_in_pairs_by_their_names(tmp_path, high, low):
    folder = tmp_path / "models" / "unet"
    files = tuple(trees.transformer(folder / name, LARGE) for name in (high, low))
    trees.companions(folder.parent, TEXT, VAE)
    trees.transformer(folder / "another_low_noise_Q4_K_M.gguf", LARGE)
    if "Low" in high:
        files = files[::-1]
    for file in files:
        assert find_model(str(file)).transformers == files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan22I2VHigh.safetensors", "put wan22I2VLow.safetensors into"),
        ("low/wan2.2_t2v_14B.gguf", "--high-noise"),
        ("low_noise_model/wan.gguf", "--high-noise"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "--low-noise"),  # two others lie beside
    ],
)
def test_half_a_model_asks_for_the_other_half(models, name, words):
    file = trees.transformer(models / "unet" / name, LARGE)
    trees.companions(models, TEXT, VAE)
    for quant in ("Q5_K_M", "Q8_0"):
        trees.touch(file.parent / f"Wan2.2-T2V-A14B-LowNoise-{quant}.gguf")
    assert words in refusal(str(file))


def test_one_file_is_not_both_experts(models, tmp_path):
    high = trees.transformer(models / "unet" / "Wan2.2-T2V-A14B-HighNoise-Q4.gguf", LARGE)
    low = trees.transformer(models / "unet" / "Wan2.2-T2V-A14B-LowNoise-Q4.gguf", LARGE)
    mine = trees.transformer(models / "unet" / "mine.gguf", LARGE)
    link = tmp_path / "link.gguf"
    link.hardlink_to(mine)
    folder = trees.diffusers_folder(tmp_path / "a14b", LARGE, boundary_ratio=0.875)
    trees.companions(models, TEXT, VAE)
    for model, part, file in (
        (high, "low_noise", high),
        (high, "high_noise", low),
        (mine, "low_noise", link),
        (mine, "high_noise", mine),
        (folder, "low_noise", folder / "transformer"),
    ):
        message = refusal(str(model), ((part, str(file)),))
        assert message.startswith(f"--{part.replace('_', '-')}: ")
        assert "would be the high-noise and the low-noise expert" in message


def test_a_missing_expert_is_asked_for(models):
    high = trees.transformer(models / "unet" / "Wan2.2-T2V-A14B-HighNoise-Q4.gguf", LARGE)
    trees.companions(models, TEXT, VAE)
    message = refusal(str(high))
    assert message.startswith("--low-noise: ")
    assert f"put Wan2.2-T2V-A14B-LowNoise-Q4.gguf into {high.parent}" in message
    other = trees.transformer(models / "unet" / "mine.gguf", LARGE)
    assert find_model(str(high), (("low_noise", str(other)),)).transformers == (high, other)
    assert find_model(str(other), (("high_noise", str(high)),)).transformers == (high, other)
    both = (("high_noise", str(high)), ("low_noise", str(other)))
    assert find_model(str(high), both).transformers == (high, other)
    assert find_model(str(other), (("low_noise", str(high)),)).transformers == (other, high)


def test_high_and_low_in_other_words_make_no_expert(models):
    trees.companions(models, TEXT, VAE)
    for name in (
        "wan2.1_low_vram.gguf",
        "Rectified_Flow.gguf",
        "wan2.2_5B_slow.gguf",
        "low_vram/wan2.2_t2v_14B.gguf",
        "Wan2.2-TI2V-5B-low-vram.safetensors",
        "low/wan2.2_ti2v_5B_fp16.safetensors",
        "wan22TI2VHigh.safetensors",
        "Wan2.2 anime low poly.gguf",
        "wan2.2_t2v_HighRes.gguf",
        "wan2.2-i2v-rapid-aio-low.gguf",
    ):
        file = trees.transformer(models / "unet" / name)
        assert find_model(str(file)).transformers == (file,)


# folders


def test_an_original_folder_is_recognised(tmp_path):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    trees.transformer(folder / "diffusion_pytorch_model.safetensors")
    trees.touch(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    trees.touch(folder / "Wan2.1_VAE.pth")
    trees.touch(folder / "google" / "umt5-xxl" / "tokenizer.json")
    found = find_model(str(folder))
    assert found.transformers == (folder,)
    assert (found.folder, found.vae) == (folder, folder / "Wan2.1_VAE.pth")
    assert found.text_encoder == folder / "models_t5_umt5-xxl-enc-bf16.pth"
    assert found.tokenizer == folder / "google" / "umt5-xxl" / "tokenizer.json"


def test_an_original_folder_of_two_experts_is_recognised(tmp_path):
    folder = tmp_path / "Wan2.2-T2V-A14B"
    for name in ("high_noise_model", "low_noise_model"):
        trees.transformer(folder / name / "diffusion_pytorch_model.safetensors", LARGE)
    trees.touch(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    trees.touch(folder / "Wan2.1_VAE.pth")
    found = find_model(str(folder))
    assert found.transformers == (folder / "high_noise_model", folder / "low_noise_model")
    assert (found.folder, found.vae) == (folder, folder / "Wan2.1_VAE.pth")


def test_a_diffusers_folder_of_two_experts_is_recognised(tmp_path):
    folder = trees.diffusers_folder(tmp_path / "a14b", LARGE, boundary_ratio=0.875)
    found = find_model(str(folder))
    assert found.transformers == (folder / "transformer", folder / "transformer_2")
    other = trees.transformer(tmp_path / "low.gguf", LARGE)
    found = find_model(str(folder), (("low_noise", str(other)),))
    assert found.transformers == (folder / "transformer", other)


def test_a_folder_of_files_gives_its_transformer_or_pair(tmp_path):
    folder = tmp_path / "mine"
    trees.touch(folder / VAE)
    trees.touch(folder / TEXT)
    with pytest.raises(WeightError, match="found no such file"):
        find_model(str(folder))
    high = trees.transformer(folder / "wan2.2_high.gguf", LARGE)
    low = trees.transformer(folder / "wan2.2_low.gguf", LARGE)
    assert find_model(str(folder)).transformers == (high, low)
    trees.transformer(folder / "another.gguf")
    assert "may be" in refusal(str(folder))


# where to look


def test_every_configured_place_is_searched(tmp_path, home, monkeypatch):
    root, second, extra = tmp_path / "comfy", tmp_path / "comfy2", tmp_path / "extra"
    for folder in ("a/b", "c", "texts"):
        (extra / folder).mkdir(parents=True)
    (root / "models" / "vae").mkdir(parents=True)
    (second / "models" / "unet").mkdir(parents=True)
    (root / "extra_model_paths.yaml").write_text(
        f"comfyui:\n  base_path: {extra}\n  diffusion_models: |\n    a/b\n    c\n"
        "  clip: texts\n  checkpoints: none\n"
        "mine:\n  base_path: .\n  is_default: true\n  loras: models/vae\n"
    )
    (tmp_path / "listed").mkdir()
    (tmp_path / "env").mkdir()
    (home / "ComfyUI" / "models" / "loras").mkdir(parents=True)
    configure(
        monkeypatch, tmp_path, f"model_folders: [{tmp_path}/listed]\ncomfyui: [{root}, {second}]"
    )
    monkeypatch.setenv("REELPOOL_MODELS", f"{tmp_path}/env{os.pathsep}{tmp_path}/gone{os.pathsep}")
    found = {folder.path.resolve(): folder.kind for folder in search_folders()}
    assert list(found.items()) == [
        (tmp_path / "listed", ""),
        (tmp_path / "env", ""),
        (root / "models" / "vae", "lora"),  # the default section comes before the root's own
        (extra / "a/b", "transformer"),
        (extra / "c", "transformer"),
        (extra / "texts", "text_encoder"),
        (second / "models" / "unet", "transformer"),
        (home / "ComfyUI" / "models" / "loras", "lora"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("comfyui: [/none/at/all]", "there is no folder /none/at/all"),
        ("model_folders: 3", "expected a list of folders"),
        ("model_folder: [x]", "no such key"),
        ("a: [", "is not YAML"),
        ("- a", "expected keys and values"),
    ],
)
def test_a_bad_configuration_is_refused_by_file_and_key(tmp_path, monkeypatch, text, words):
    configure(monkeypatch, tmp_path, text)
    message = refusal("some-model")
    assert "config.yaml" in message
    assert words in message


def test_the_hugging_face_cache_is_searched(tmp_path, home, monkeypatch):
    cache = home / ".cache" / "huggingface" / "hub"
    file = trees.transformer(tmp_path / "staging" / "wan.gguf")
    old = trees.transformer(tmp_path / "staging" / "old.gguf")
    trees.hugging_face_repository(cache, "city96/Wan-gguf", {"old.gguf": old}, "aaaa")
    snapshot = trees.hugging_face_repository(cache, "city96/Wan-gguf", {"q/wan.gguf": file}, "bbbb")
    original = tmp_path / "original"
    names = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
    files = {name: trees.touch(original / name) for name in names}
    files["diffusion_pytorch_model.safetensors"] = trees.transformer(original / "d.safetensors")
    whole = trees.hugging_face_repository(cache, "Wan-AI/Wan2.1-T2V-1.3B", files, "cccc")
    found = find_model("city96/Wan-gguf")
    assert found.transformers == (snapshot / "q" / "wan.gguf",)
    assert found.vae == whole / "Wan2.1_VAE.pth"  # the only one on the disks
    assert find_model("wan.gguf").transformers == found.transformers
    assert "no model 'old.gguf'" in refusal("old.gguf")  # of a commit that main has left
    assert find_model("wan-ai/wan2.1-t2v-1.3b").folder == whole
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert "no model" in refusal("wan-ai/wan2.1-t2v-1.3b")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    assert find_model("Wan2.1-T2V-1.3B").folder == whole
    (cache / "models--city96--Wan-gguf" / "refs" / "main").unlink()
    os.utime(snapshot, ns=(1, 1))
    assert find_model("old.gguf").transformers[0].name == "old.gguf"  # the newest snapshot


def test_loops_unreadable_and_huge_folders_end(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    file = trees.touch(folder / "a" / "wan.gguf")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "dangling.gguf").symlink_to(tmp_path / "none")
    os.mkfifo(folder / "pipe.gguf")
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0)
    deep = folder
    for _ in range(20):
        deep = deep / "d"
    trees.touch(deep / "deep.gguf")
    for index in range(500):
        (folder / f"{index}.txt").touch()
    begin = time.perf_counter()
    assert list(walk(folder)) == [folder / "dangling.gguf", file]
    assert time.perf_counter() - begin < 5  # 0.01 s measured
    closed.chmod(0o700)
    monkeypatch.setattr(catalogue, "MAX_ENTRIES", 100)
    assert list(walk(folder)) == []
    monkeypatch.setenv("REELPOOL_MODELS", str(folder))
    assert list(scan(search_folders())) == []
