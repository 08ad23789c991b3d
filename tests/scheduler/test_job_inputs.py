"""Images, parts, LoRAs and guidance of a job: what is refused, and what they become."""

import json
from pathlib import Path

import pytest
from PIL import Image

from reelpool.errors import ConfigError
from reelpool.models.presets import PRESETS
from reelpool.runtime.types import LoraRef
from reelpool.scheduler.job import load_job, make_job, resolve, resolve_jobs
from reelpool.scheduler.job_inputs import size_for_image, takes_last_image

T2V, I2V, FLF2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p"
A14B, I2V22, TI2V = "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (832, 480), "red").save("wide.png")
    Image.new("RGB", (64, 128)).save("high.webp", lossless=True)
    Image.new("RGB", (1000, 20)).save("strip.png")
    Path("text.png").write_text("no image")
    Path("a.safetensors").touch()
    return tmp_path


def settings(model: str, **values: object):
    return resolve(make_job({"prompt": "a cat", **values}), PRESETS[model])


BAD = {  # id: (model, values, where, words)
    "image for text model": (T2V, {"image": "wide.png"}, "--image", "from text alone"),
    "last image for text model": (T2V, {"last_image": "wide.png"}, "--last-image", "text alone"),
    "I2V without image": (I2V, {}, "--image", "is missing: wan2.1-i2v"),
    "I2V 2.2 without image": (I2V22, {}, "--image", "is missing: wan2.2-i2v"),
    "last image alone": (I2V22, {"last_image": "wide.png"}, "--image", "is missing"),
    "FLF2V without last": (FLF2V, {"image": "wide.png"}, "--last-image", "between two images"),
    "last for I2V 2.1": (
        I2V,
        {"image": "wide.png", "last_image": "wide.png"},
        "--last-image",
        "takes a first image only",
    ),
    "last for TI2V": (
        TI2V,
        {"image": "wide.png", "last_image": "wide.png"},
        "--last-image",
        "takes a first image only",
    ),
    "no room for last": (
        FLF2V,
        {"image": "wide.png", "last_image": "wide.png", "frames": 1},
        "--frames",
        "the nearest is 5",
    ),
    "no file": (I2V, {"image": "none.png"}, "--image", "No such file"),
    "a folder": (I2V, {"image": "."}, "--image", "directory"),
    "no image": (I2V, {"image": "text.png"}, "--image", "text.png is no image"),
    "too long": (I2V, {"image": "strip.png", "size": "480x832"}, "--image", "1000x20 pixels"),
    "no LoRA": (T2V, {"lora": "none.safetensors:1"}, "--lora", "there is no file"),
    "two strengths": (T2V, {"lora": "a.safetensors:1,2"}, "--lora", "has one transformer"),
    "two scales": (T2V, {"guidance": "4,3"}, "--guidance", "has one transformer"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_model_or_disk_refuses_is_one_sentence(case):
    model, values, where, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        settings(model, **values)
    assert caught.value.where == where
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_that_end_with_an_image():
    able = {name for name, spec in PRESETS.items() if takes_last_image(spec)}
    assert {FLF2V, I2V22} <= able
    assert not {T2V, I2V, TI2V, A14B} & able


def test_ti2v_needs_no_image_and_takes_one():
    assert settings(TI2V).image is None
    made = settings(TI2V, image="wide.png")
    assert (made.width % 32, made.height % 32) == (0, 0)
    assert made.image == Path("wide.png").absolute()


def test_a_part_that_is_nowhere_is_named_where_it_was_written():
    job = make_job({"prompt": "a", "vae": "no-such-vae"}, "job.yaml: ")
    with pytest.raises(ConfigError, match="no-such-vae") as caught:
        resolve_jobs([("job.yaml: ", job)])
    assert caught.value.where == "job.yaml: vae"


def test_planning_needs_no_image():
    (made,) = resolve_jobs([("--", make_job({"prompt": "a", "model": I2V}))], need_weights=False)
    assert made.image is None


@pytest.mark.parametrize(
    ("image", "area", "multiple", "size"),
    [
        ((832, 480), 832 * 480, 16, (832, 480)),
        ((480, 832), 832 * 480, 16, (480, 832)),
        ((1280, 720), 1280 * 704, 32, (1248, 704)),
        ((1000, 1000), 832 * 480, 16, (624, 624)),
        ((3, 1), 832 * 480, 16, (1088, 352)),
        ((1, 100_000), 832 * 480, 16, (16, 8192)),
    ],
)
def test_size_follows_the_image(image, area, multiple, size):
    assert size_for_image(image, area, multiple) == size


def test_a_size_given_wins_over_the_image():
    made = settings(I2V, image="high.webp", size="832x480")
    assert (made.width, made.height) == (832, 480)
    made = settings(I2V, image="high.webp")
    assert made.height > 1.9 * made.width
    assert made.width * made.height <= 832 * 480


def test_guidance_of_two_experts():
    own = PRESETS[A14B].defaults
    made = settings(A14B)
    assert (made.guidance, made.guidance_low) == (own.guidance, own.guidance_low) == (4.0, 3.0)
    made = settings(A14B, guidance="5,1")
    assert (made.guidance, made.guidance_low) == (5.0, 1.0)
    assert made.needs_uncond
    made = settings(A14B, guidance=1)  # one number is for both, as in diffusers
    assert (made.guidance, made.guidance_low, made.needs_uncond) == (1.0, 1.0, False)
    made = settings(T2V)
    assert made.guidance == made.guidance_low


def test_loras_in_every_form(folder):
    path = str(folder / "a.safetensors")
    given = ["a.safetensors", "a.safetensors:0", "a.safetensors:1.2,.5", {"file": "a.safetensors"}]
    made = settings(A14B, lora=given)
    assert made.loras == (
        LoraRef(path, 1.0, 1.0),
        LoraRef(path, 0.0, 0.0),
        LoraRef(path, 1.2, 0.5),
        LoraRef(path, 1.0, 1.0),
    )
    assert settings(T2V, lora="a.safetensors:-0.5").loras == (LoraRef(path, -0.5, -0.5),)


def test_a_lora_is_found_by_name(folder, monkeypatch):
    monkeypatch.setenv("REELPOOL_MODELS", str(folder / "loras"))
    (folder / "loras").mkdir()
    (folder / "loras" / "Style.safetensors").touch()
    expected = LoraRef(str(folder / "loras" / "Style.safetensors"), 0.7, 0.7)
    assert settings(T2V, lora="style:0.7").loras == (expected,)


def test_parts_and_inputs_become_json(folder):
    made = settings(
        I2V22, image="wide.png", last_image="wide.png", lora="a.safetensors", vae="a.safetensors"
    )
    assert made.parts == (("vae", str(folder / "a.safetensors")),)
    content = json.loads(json.dumps(made.as_json()))
    assert content["image"] == content["last_image"] == str(folder / "wide.png")
    assert content["parts"] == [["vae", str(folder / "a.safetensors")]]
    assert content["loras"][0]["strength"] == 1.0


def test_paths_in_a_file_count_from_its_folder(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "v.safetensors").touch()
    (folder / "sub" / "l.safetensors").touch()
    text = "prompt: a\nimage: i.png\nvae: v.safetensors\ntext_encoder: umt5\n"
    text += "lora: [l.safetensors:0.5, /x/m.st]\n"
    (folder / "sub" / "job.yaml").write_text(text)
    job = load_job(folder / "sub" / "job.yaml")
    assert job.image == folder / "sub" / "i.png"
    assert job.vae == folder / "sub" / "v.safetensors"
    assert job.text_encoder == Path("umt5")  # nothing of that name beside the file: looked up
    assert job.lora is not None
    assert [entry.file for entry in job.lora] == [folder / "sub/l.safetensors", Path("/x/m.st")]


BAD_FORMS = {  # id: (values, words)
    "three scales": ({"guidance": [1, 2, 3]}, "a list of 3"),
    "scale of text": ({"guidance": "high"}, "or two (high noise, low noise)"),
    "scale above": ({"guidance": "101"}, "the nearest is 100 "),
    "strength above": ({"lora": ["a:200"]}, "strengths from -100 to 100"),
    "key of a LoRA": ({"lora": [{"path": "a"}]}, "FILE:STRENGTH"),
    "LoRA number": ({"lora": 5}, "FILE:STRENGTH"),
    "name from elsewhere": ({"loras": []}, "did you mean lora?"),
    "image number": ({"image": 5}, "a path"),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_values_of_another_form_are_named(case):
    values, words = BAD_FORMS[case]
    with pytest.raises(ConfigError) as caught:
        make_job({"prompt": "a", **values})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
