"""A job: what is refused, and with which words; what `resolve` fills in."""

import re
from pathlib import Path

import pytest

from reelpool.errors import ConfigError, WeightError
from reelpool.models.presets import PRESETS
from reelpool.models.registry import find_spec
from reelpool.scheduler.job import (
    ATTENTION_NAMES,
    SOLVER_NAMES,
    Job,
    Settings,
    load_job,
    load_jobs,
    make_job,
    read_jobs,
    resolve,
    resolve_jobs,
)

WAN = PRESETS["wan2.1-t2v-1.3b"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def settings(spec=WAN, **values: object) -> Settings:
    return resolve(make_job({"prompt": "a cat", **values}), spec)


def test_names_equal_those_of_the_code_that_has_them():
    from reelpool.models.attention import PACKAGES
    from reelpool.runtime.schedule import SOLVERS

    assert tuple(SOLVERS) == SOLVER_NAMES
    assert tuple(PACKAGES) == ATTENTION_NAMES


BAD_VALUES = {  # id: (values, where, words of the message)
    "no prompt": ({}, "PROMPT", "is missing"),
    "empty prompt": ({"prompt": ""}, "PROMPT", "1 to 10000"),
    "blank prompt": ({"prompt": " \n"}, "PROMPT", "1 to 10000"),
    "long prompt": ({"prompt": "x" * 10_001}, "PROMPT", "10001 characters"),
    "no text": ({"prompt": 5}, "PROMPT", "found 5"),
    "misspelt key": ({"promt": "x"}, "--promt", "did you mean prompt?"),
    "other name": ({"num_inference_steps": 3}, "--num-inference-steps", "did you mean steps?"),
    "far from any key": ({"qqqq": 3}, "--qqqq", "the keys are prompt, model"),
    "no steps": ({"steps": 0}, "--steps", "the nearest is 1 "),
    "many steps": ({"steps": 1001}, "--steps", "the nearest is 1000 "),
    "steps yes": ({"steps": True}, "--steps", "found true"),
    "steps as text": ({"steps": "4"}, "--steps", "a whole number from 1 to 1000"),
    "steps half": ({"steps": 4.5}, "--steps", "found 4.5"),
    "no fps": ({"fps": 0}, "--fps", "above 0"),
    "not a number": ({"guidance": float("nan")}, "--guidance", "found nan"),
    "infinite": ({"shift": float("inf")}, "--shift", "the nearest is 1000 "),
    "seed below": ({"seed": -1}, "--seed", "the nearest is 0 "),
    "seed above": ({"seed": 2**32}, "--seed", "the nearest is 4294967295 "),
    "solver": ({"solver": "dpm++"}, "--solver", "did you mean dpmpp?"),
    "solver case": ({"solver": "UniPC"}, "--solver", "did you mean unipc?"),
    "no such solver": ({"solver": "zzz"}, "--solver", "unipc, euler, dpmpp or lcm"),
    "dtype": ({"dtype": "bf16"}, "--dtype", "did you mean bfloat16?"),
    "attention": ({"attention": "flsh"}, "--attention", "did you mean flash?"),
    "size of one": ({"size": "480"}, "--size", "WIDTHxHEIGHT"),
    "size of three": ({"size": [1, 2, 3]}, "--size", "a list of 3"),
    "size zero": ({"size": "0x16"}, "--size", "sides from 1 to 8192"),
    "size huge": ({"size": "16x99999"}, "--size", "sides from 1 to 8192"),
    "negative list": ({"negative": ["a"]}, "--negative", "a list of 1"),
    "zoom": ({"zoom": 17}, "--zoom", "the nearest is 16 "),
    "path with NUL": ({"output": "a\0.mp4"}, "--output", "a path"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value_is_named_with_what_would_do(case):
    values, where, words = BAD_VALUES[case]
    prompt = {} if "prompt" in case or case == "no text" else {"prompt": "a cat"}
    with pytest.raises(ConfigError) as caught:
        make_job({**prompt, **values})
    assert caught.value.where == where
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FOR_THE_MODEL = {
    "width": ({"size": "100x64"}, "--size", "96x64"),
    "width up": ({"size": "105x64"}, "--size", "112x64"),
    "height": ({"size": "64x7"}, "--size", "64x16"),
    "at the edge": ({"size": "8191x64"}, "--size", "8192x64"),
    "frames": ({"frames": 18}, "--frames", "the nearest are 17 and 21"),
    "few frames": ({"frames": 2}, "--frames", "the nearest are 1 and 5"),
    "suffix": ({"output": "a.avi"}, "--output", "use a.mp4"),
    "empty path": ({"output": ""}, "--output", "is a folder"),
    "no folder": ({"output": "none/a.mp4"}, "--output", "mkdir -p"),
    "latents suffix": ({"save_latents": "a.pt"}, "--save-latents", "use a.safetensors"),
    "long name": ({"output": "a" * 300 + ".mp4"}, "--output", "too long"),
}


@pytest.mark.parametrize("case", BAD_FOR_THE_MODEL)
def test_value_the_model_or_disk_refuses_is_named(case):
    values, where, words = BAD_FOR_THE_MODEL[case]
    with pytest.raises(ConfigError) as caught:
        settings(**values)
    assert caught.value.where == where
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("field", "name"), [("output", "a.mp4"), ("save_latents", "a.safetensors")]
)
def test_folder_in_place_of_a_file_is_refused(field, name, folder):
    (folder / name).mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        settings(**{field: name})


def test_run_dir_under_a_file_is_refused(folder):
    (folder / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        settings(run_dir="file/run")


def test_absent_values_are_the_models_own():
    demo = find_spec("demo")
    own, made = demo.defaults, settings(demo)
    for name in ("width", "height", "frames", "fps", "steps", "guidance", "shift", "solver"):
        assert getattr(made, name) == getattr(own, name)
    assert (made.negative, made.dtype, made.attention, made.zoom) == (
        own.negative,
        "auto",
        "sdpa",
        1,
    )


def test_given_values_stay(folder):
    made = settings(size="832 X 480", frames=5, fps=23.976, guidance=1, negative="", seed=0)
    assert (made.width, made.height, made.frames, made.fps) == (832, 480, 5, 23.976)
    assert (made.guidance, made.negative, made.seed) == (1.0, "", 0)
    assert settings(size=[832, 480]).width == 832


def test_seed_is_drawn_anew_and_fits_31_bits():
    seeds = {settings().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_default_names_say_the_prompt_and_avoid_what_exists(folder):
    first = settings(prompt="A red ring, bouncing!", seed=7)
    assert first.output == folder / "reelpool-a-red-ring-bouncing-7.mp4"
    assert re.fullmatch(r"\d{8}-\d{6}-a-red-ring-bouncing", first.run_dir.name)
    assert first.run_dir.parent == folder / "runs"
    first.output.touch()
    again = settings(prompt="A red ring, bouncing!", seed=7)
    assert again.output == folder / "reelpool-a-red-ring-bouncing-7-2.mp4"
    again.output.touch()
    assert settings(prompt="A red ring, bouncing!", seed=7).output.stem.endswith("-7-3")


def test_explicit_output_may_replace_a_file(folder):
    (folder / "a.mp4").touch()
    assert settings(output="a.mp4").output == folder / "a.mp4"


def test_resolve_creates_nothing(folder):
    settings(output="a.mp4", save_latents="a.safetensors", run_dir="x/y")
    assert list(folder.iterdir()) == []


def test_settings_become_json_and_are_complete():
    import json

    made = settings(output="a.mp4", save_latents="a.safetensors")
    content = json.loads(json.dumps(made.as_json()))
    assert content["output"] == str(made.output)
    assert content["save_latents"] == str(made.save_latents)
    assert [k for k, v in content.items() if v is None] == ["image", "last_image", "reserve"]


def test_job_file_with_every_form(folder):
    assert load_job(write(folder, "prompt: a cat\nsize: 64x64\nseed: 3")).seed == 3
    for text in ("- prompt: a\n- prompt: b", "jobs:\n- prompt: a\n- prompt: b"):
        assert [job.prompt for job in load_jobs(write(folder, text))] == ["a", "b"]
    with pytest.raises(ConfigError, match="holds 2 jobs"):
        load_job(folder / "job.yaml")


def test_paths_in_a_file_count_from_its_folder(folder, monkeypatch):
    (folder / "sub" / "model").mkdir(parents=True)
    text = "prompt: a\noutput: a.mp4\nsave_latents: /tmp/x.safetensors\nmodel: model"
    job = load_job(write(folder / "sub", text))
    assert job.output == folder / "sub" / "a.mp4"
    assert job.save_latents == Path("/tmp/x.safetensors")
    assert Path(job.model) == folder / "sub" / "model"


BAD_FILES = {  # id: (text, where, words)
    "empty": ("", "job.yaml", "found nothing"),
    "a word": ("hello", "job.yaml", "found a str"),
    "no job": ("[]", "job.yaml: jobs", "give 1 to 1000 jobs"),
    "jobs of words": ("- a", "job.yaml: jobs[0]", "found a str"),
    "beside jobs": ("jobs: []\nsteps: 3", "job.yaml: steps", "stands beside jobs"),
    "key": ("prompt: a\nstep: 3", "job.yaml: step", "did you mean steps?"),
    "number as key": ("prompt: a\n3: 3", "job.yaml: 3", "the keys are"),
    "value": ("prompt: a\nsteps: 0", "job.yaml: steps", "the nearest is 1"),
    "second job": ("- prompt: a\n- prompt: b\n  fps: x", "job.yaml: jobs[1].fps", "found 'x'"),
    "word that YAML reads as no": ("prompt: no", "job.yaml: prompt", "needs quotes"),
    "not YAML": ("prompt: [", "job.yaml", "is not YAML"),
    "unsafe tag": ("prompt: !!python/object:os.system {}", "job.yaml", "is not YAML"),
    "deep": ("[" * 5000, "job.yaml", "is not YAML"),
    "huge number": ("prompt: a\nseed: " + "9" * 5000, "job.yaml", ""),
    "impossible date": ("prompt: 2024-99-99", "job.yaml", "is not YAML"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_sentence(case, folder):
    text, where, words = BAD_FILES[case]
    with pytest.raises(ConfigError) as caught:
        load_jobs(write(folder, text))
    assert where in caught.value.where
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_file_that_cannot_be_read_is_named(folder):
    with pytest.raises(ConfigError, match="No such file"):
        load_jobs(folder / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_jobs(folder)
    (folder / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_jobs(folder / "big.yaml")
    (folder / "latin.yaml").write_bytes(b"prompt: caf\xe9")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_jobs(folder / "latin.yaml")


def test_jobs_of_a_run_get_ids_and_never_share_a_file(folder):
    jobs = read_jobs(write(folder, "- {prompt: a, seed: 1}\n- {prompt: a, seed: 1}"))
    first, second = resolve_jobs(jobs)
    assert (first.id, second.id) == ("job-1", "job-2")
    assert not set(first.targets) & set(second.targets)
    text = "- {prompt: a, output: a.mp4}\n- {prompt: b, output: a.mp4}"
    with pytest.raises(ConfigError, match="another job of this run") as caught:
        resolve_jobs(read_jobs(write(folder, text)))
    assert caught.value.where == "job.yaml: jobs[1].output"


def test_unknown_model_is_named_where_it_was_written(folder):
    text = "prompt: a\nmodel: dmo"
    with pytest.raises(ConfigError, match="did you mean demo") as caught:
        resolve_jobs(read_jobs(write(folder, text)))
    assert caught.value.where == "job.yaml: model"


def test_geometry_without_weights_is_for_planning_only():
    job = Job(prompt="a", model="wan2.1-t2v-14b")
    assert resolve_jobs([("--", job)], need_weights=False)[0].width == 832
    with pytest.raises(ConfigError, match="without weights"):
        resolve_jobs([("--", job)])


def test_folder_that_is_no_model_is_refused(folder):
    (folder / "model").mkdir()
    with pytest.raises(WeightError, match=r"model_index\.json"):
        resolve_jobs([("--", Job(prompt="a", model="model"))])
