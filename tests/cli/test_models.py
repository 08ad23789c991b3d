"""`reelpool models`: a made-up ComfyUI tree and Hugging Face cache, wholly found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from reelpool.cli import main
from reelpool.models.presets import PRESETS
from reelpool.models.quant_mix import transformer_bytes
from tests import model_trees as trees

LARGE = PRESETS["wan2.1-t2v-14b"].transformer
SMALL = PRESETS["wan2.1-t2v-1.3b"].transformer
IMAGE = PRESETS["wan2.1-i2v-14b-480p"].transformer
CONCAT = PRESETS["wan2.2-i2v-a14b"].transformer
FIVE = PRESETS["wan2.2-ti2v-5b"].transformer
TEXT, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "REELPOOL_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def run(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["models", *arguments])
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    return out


def run_json(capfd, *arguments: str) -> dict:
    (line,) = run(capfd, *arguments, "--json").splitlines()
    found = json.loads(line)
    assert found["event"] == "result"
    return found


@pytest.fixture
def disks(tmp_path, home, monkeypatch) -> Path:
    """Two ComfyUI roots, one with further folders, a list of folders, and a cache."""
    comfy, second, extra = tmp_path / "comfy", tmp_path / "second", tmp_path / "extra"
    models = comfy / "models"
    trees.transformer(models / "unet" / "Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf", CONCAT)
    trees.transformer(models / "unet" / "Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf", CONCAT)
    trees.transformer(
        models / "diffusion_models" / "wan" / "wan2.1_i2v_480p_14B_fp8.safetensors",
        IMAGE, "F8_E4M3", "model.diffusion_model.",
    )  # fmt: skip
    trees.transformer(second / "models" / "unet" / "Wan2.2-TI2V-5B-Q8_0.gguf", FIVE, "Q8_0")
    trees.transformer(extra / "nets" / "wan2.1_t2v_1.3B_fp16.safetensors", kind="F16")
    trees.transformer(tmp_path / "mine" / "Wan2.2-T2V-HighNoise.gguf", LARGE, "Q2_K")
    trees.hollow_safetensors(models / "unet" / "flux.safetensors", {"double_blocks.0.a": (4, 4)})
    trees.companions(models, TEXT, VAE)
    trees.touch(models / "loras" / "wan" / "lightx2v_4steps.safetensors", 700)
    (comfy / "extra_model_paths.yaml").write_text(
        f"other:\n  base_path: {extra}\n  diffusion_models: nets\n"
    )
    cache = home / ".cache" / "huggingface" / "hub"
    trees.diffusers_folder(tmp_path / "staged", _class_name="WanPipeline")
    files = {
        path.relative_to(tmp_path / "staged").as_posix(): path
        for path in sorted((tmp_path / "staged").rglob("*"))
        if path.is_file()
    }
    trees.hugging_face_repository(cache, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", files, "abcd")
    config = tmp_path / "config" / "reelpool" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"comfyui: [{comfy}, {second}]\nmodel_folders: [{tmp_path}/mine]\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_everything_is_found(disks, capfd):
    found = run_json(capfd)
    rows = {row["name"]: row for row in found["models"]}
    kinds = {
        name: (row["variant"], row["quant"], len(row["transformers"])) for name, row in rows.items()
    }
    assert kinds == {
        "Wan2.2-T2V-HighNoise.gguf": ("t2v", "q2_k", 1),
        "Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf": ("i2v", "q4_k", 2),
        "wan2.1_i2v_480p_14B_fp8.safetensors": ("i2v", "fp8_e4m3", 1),
        "wan2.1_t2v_1.3B_fp16.safetensors": ("t2v", "fp16", 1),
        "Wan2.2-TI2V-5B-Q8_0.gguf": ("ti2v", "q8_0", 1),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("t2v", "bf16", 1),
    }
    missing = {name: [lack["name"] for lack in row["missing"]] for name, row in rows.items()}
    assert missing == {
        "Wan2.2-T2V-HighNoise.gguf": ["Wan2.2-T2V-LowNoise.gguf"],
        "Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf": [],
        "wan2.1_i2v_480p_14B_fp8.safetensors": ["clip_vision_h.safetensors"],
        "wan2.1_t2v_1.3B_fp16.safetensors": [],
        "Wan2.2-TI2V-5B-Q8_0.gguf": ["wan2.2_vae.safetensors"],
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": [],
    }
    (lack,) = rows["Wan2.2-TI2V-5B-Q8_0.gguf"]["missing"]
    assert lack["folder"] == str(disks / "second" / "models" / "vae")
    assert lack["option"] == "--vae"
    size = rows["wan2.1_t2v_1.3B_fp16.safetensors"]["bytes"]
    assert 1 <= size / transformer_bytes(SMALL, "fp16") < 1.0001  # and a header
    parts = {(part["what"], Path(part["path"]).name) for part in found["parts"]}
    assert parts == {
        ("Wan 2.1 VAE", VAE),
        ("UMT5-XXL text encoder", TEXT),
        ("LoRA", "lightx2v_4steps.safetensors"),
    }
    (refused,) = found["refused"]
    assert refused["path"].endswith("flux.safetensors")
    assert "another kind of transformer" in refused["reason"]
    assert len(found["folders"]) == 9


def test_lines_say_the_same(disks, capfd):
    lines = run(capfd).splitlines()
    (line,) = (line for line in lines if "TI2V" in line)
    assert line.split() == [
        "Wan2.2-TI2V-5B-Q8_0.gguf", "ti2v", "q8_0", "5.2", "GiB", "ComfyUI",
        "missing:", "wan2.2_vae.safetensors",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("LoRA") and "700 B" in line]
    assert "1 other file is no Wan transformer that can be run; --json says why" in lines


def test_one_model_is_shown_with_its_defaults_and_parts(disks, capfd):
    out = run(capfd, "wan2.1_i2v_480p_14B_fp8")
    assert out.startswith("wan2.1_i2v_480p_14B_fp8: image to video\n")
    for words in (
        "832x480, 81 frames, 16 fps, 32760 tokens",
        "40, unipc, shift 3, guidance 5",
        "fp8_e4m3",
        "40 of 403.8 M",
        str(disks / "comfy" / "models" / "vae" / VAE),
        f"put clip_vision_h.safetensors into {disks}/comfy/models/clip_vision, "
        "or give --image-encoder FILE",
    ):
        assert words in out, words
    found = run_json(capfd, str(disks / "mine" / "Wan2.2-T2V-HighNoise.gguf"))
    assert found["parameters"] == LARGE.num_params
    assert [lack["option"] for lack in found["missing"]] == ["--low-noise"]
    assert found["defaults"]["steps"] == 50


def test_a_preset_is_shown(capfd):
    found = run_json(capfd, "wan2.2-i2v-a14b@q4_k_m")
    assert (found["name"], found["experts"], found["quant"]) == (
        "wan2.2-i2v-a14b@q4_k_m", 2, "q4_k_m",
    )  # fmt: skip
    assert found["block_bytes"] / 2**20 == pytest.approx(219.2, abs=0.05)
    assert found["parameters"] == 14_288_901_184
    assert found["defaults"]["guidance_low"] == 3.5
    out = run(capfd, "wan2.1-i2v-14b-480p")
    assert "usually clip_vision_h.safetensors in ComfyUI's clip_vision" in out
    assert "42.2 TFLOP a block" in out


def test_the_demo_is_shown(capfd):
    found = run_json(capfd, "demo")
    assert (found["name"], found["missing"], found["defaults"]["zoom"]) == ("demo", [], 4)


def test_presets_are_listed(capfd):
    out = run(capfd, "--presets")
    assert [name for name in PRESETS if name not in out] == []
    assert len(run_json(capfd, "--presets")["presets"]) == len(PRESETS)


def test_an_empty_disk_says_what_to_do(capfd):
    out = run(capfd)
    assert "no models found" in out
    assert "REELPOOL_MODELS" in out


def test_names_of_any_bytes_are_listed(tmp_path, monkeypatch, capfd):
    """Bytes that are no text, new lines and what would turn a terminal's colours."""
    name = os.fsdecode(b"wan\xff\x1b[31m\n.gguf")
    path = trees.transformer(tmp_path / "odd" / name, SMALL)
    monkeypatch.setenv("REELPOOL_MODELS", str(path.parent))
    text = run(capfd, "--json")
    assert text.rstrip("\n").isprintable()
    (row,) = json.loads(text)["models"]
    assert (row["name"], row["transformers"]) == (name, [str(path)])
    lines = run(capfd)
    assert lines.startswith(r"wan\udcff\u001b[31m\n.gguf  t2v")
    assert all(line.isprintable() for line in lines.split("\n"))
    assert run(capfd, str(path)).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan2.1-t2v-14", "did you mean wan2.1-t2v-14b"),
        ("wan2.1-t2v-14b@q4_km", "did you mean wan2.1-t2v-14b@q4_k_m?"),
        ("/none.gguf", "there is no model"),
    ],
)
def test_an_unknown_name_exits_2_with_the_nearest(capfd, name, words):
    with pytest.raises(SystemExit) as ended:
        main(["models", name])
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: NAME: ")
    assert words in err


def test_listing_200_files_takes_less_than_two_seconds(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "many"
    first = trees.transformer(folder / "wan0.gguf", LARGE)
    with first.open("rb") as file:
        header = file.read(200_000)
    for number in range(1, 200):
        with (folder / f"wan{number}.gguf").open("wb") as file:
            file.write(header)
            file.truncate(first.stat().st_size)
    monkeypatch.setenv("REELPOOL_MODELS", str(folder))
    run(capfd, "demo")  # torch is loaded, folders are warm
    begin = time.process_time()
    found = run_json(capfd)
    spent = time.process_time() - begin
    assert len(found["models"]) == 200
    assert spent < 2 * 1.5  # 1.6 s measured: 1095 tensors a file
