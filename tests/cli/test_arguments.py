"""Bad arguments end with exit code 2 and the nearest valid value, before anything heavy loads."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reelpool.cli import main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "transformers", "av", "safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = {  # id: (arguments, words of the message)
    "size": (["generate", "x", "--size", "100x64"], "the nearest size is 96x64"),
    "size form": (["generate", "x", "--size", "100"], "WIDTHxHEIGHT"),
    "frames": (["generate", "x", "--frames", "18"], "the nearest are 17 and 21"),
    "frames of a preset": (
        ["plan", "x", "--model", "wan2.1-t2v-14b", "--frames", "80"],
        "the nearest are 77 and 81",
    ),
    "frames form": (["generate", "x", "--frames", "abc"], "--frames"),
    "no frames": (["generate", "x", "--frames", "0"], "the nearest is 1 "),
    "solver": (["generate", "x", "--solver", "unpic"], "did you mean unipc?"),
    "dtype": (["generate", "x", "--dtype", "fp16"], "did you mean float16?"),
    "attention": (["generate", "x", "--attention", "xformer"], "did you mean xformers?"),
    "steps": (["generate", "x", "--steps", "-3"], "the nearest is 1 "),
    "guidance": (["generate", "x", "--guidance", "101"], "the nearest is 100 "),
    "two scales": (["generate", "x", "--guidance", "4,3"], "one transformer"),
    "scale form": (["generate", "x", "--guidance", "4;3"], "or two (high noise, low noise)"),
    "no image file": (
        ["plan", "x", "--model", "wan2.2-i2v-a14b", "--image", "none.png"],
        "--image: none.png cannot be read (No such file",
    ),
    "image for text": (
        ["plan", "x", "--model", "wan2.1-t2v-14b", "--image", "a.png"],
        "--image: wan2.1-t2v-14b makes videos from text alone",
    ),
    "last image": (
        ["plan", "x", "--model", "wan2.2-ti2v-5b", "--last-image", "a.png"],
        "takes a first image only",
    ),
    "LoRA": (["generate", "x", "--lora", "none.safetensors:0.5"], "there is no file none.saf"),
    "LoRA strength": (["generate", "x", "--lora", "a:101"], "strengths from -100 to 100"),
    "part": (["generate", "x", "--vae", "none.safetensors"], "--vae: there is no file"),
    "seed": (["demo", "--seed", "-1"], "the nearest is 0 "),
    "output": (["demo", "-o", "a.gif"], "use a.mp4"),
    "output folder": (["generate", "x", "-o", "none/a.mp4"], "mkdir -p"),
    "latents": (["generate", "x", "--save-latents", "a.bin"], "use a.safetensors"),
    "model": (["generate", "x", "--model", "dmeo"], "did you mean demo?"),
    "preset": (["generate", "x", "--model", "wan2.1-t2v-14b"], "without weights"),
    "no prompt": (["generate"], "PROMPT"),
    "empty prompt": (["generate", ""], "PROMPT"),
    "two prompts": (["plan", "a", "b"], "quotes around the prompt"),
    "prompt and file": (["plan", "a", "b.yaml"], "give one or the other"),
    "option beside files": (["plan", "b.yaml", "--steps", "3"], "--steps: stands beside"),
    "no file": (["run", "none.yaml"], "No such file"),
    "no files": (["run"], "JOB.yaml"),
    "option": (["generate", "x", "--stpes", "3"], "--steps"),
    "command": (["generat", "x"], "generate"),
    "pool": (["generate", "x", "--pool", "lokal"], "use auto, local:2"),
    "pool of none": (["demo", "--pool", "local:0"], "the nearest is local:1"),
    "pool of many": (["demo", "--pool", "local:65"], "the nearest is local:64"),
    "pool without number": (["demo", "--pool", "local:"], "local:2"),
    "pool memory": (["demo", "--pool", "local:2,much"], "8GiB"),
    "pool no memory": (["demo", "--pool", "local:2,0"], "found no memory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_exits_2_with_what_would_do(case, capsys):
    arguments, words = BAD[case]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_bad_value_in_a_file_names_file_and_key(folder, capsys):
    (folder / "job.yaml").write_text("prompt: a\nsteps: 0\n")
    with pytest.raises(SystemExit) as ended:
        main(["run", "job.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: job.yaml: steps: found 0; the nearest is 1")


def test_bad_argument_creates_nothing(folder, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x", "--run-dir", "r", "--frames", "18"])
    assert list(folder.iterdir()) == []


def test_json_ends_with_one_error_object(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", "--frames", "18", "--json"])
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    found = json.loads(line)
    assert ended.value.code == found["exit_code"] == 2
    assert (found["event"], found["error"]) == ("error", "ConfigError")
    assert err == f"error: {found['message']}\n"


def test_json_of_a_usage_error_too(capfd):
    with pytest.raises(SystemExit):
        main(["generate", "--json"])
    assert json.loads(capfd.readouterr().out)["error"] == "UsageError"


def test_interrupt_exits_130_with_a_line(monkeypatch, capsys):
    def press_ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reelpool.scheduler.job.resolve_jobs", press_ctrl_c)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x"])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_bug_is_one_line_and_exit_1(monkeypatch, capsys):
    monkeypatch.delenv("REELPOOL_LOG", raising=False)
    monkeypatch.setattr("reelpool.scheduler.job.resolve_jobs", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x"])
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert err.count("\n") == 1
    assert "ZeroDivisionError" in err


HELPS = [[], ["--help"], ["generate", "-h"], ["plan", "--help"], ["demo", "--help"]]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_is_shown(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "Usage: reelpool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "banned"),
    [
        (["--help"], (*HEAVY, "pydantic", "yaml")),
        (["generate", "--help"], (*HEAVY, "yaml")),
        (["generate", "x", "--frames", "18"], HEAVY),
        (["generate", "x", "--model", "none"], HEAVY),
        (["generate", "x", "--lora", "none"], HEAVY),
        (["demo", "--pool", "local:0"], HEAVY),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_nothing_heavy_is_loaded(arguments, banned):
    code = (
        "import sys\nfrom reelpool.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"except SystemExit:\n    print(*sorted(set({banned}) & set(sys.modules)), '.')"
    )
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    spent = time.perf_counter() - begin
    assert ran.stdout.splitlines()[-1].strip() == "."
    assert spent < 5  # 0.3 s measured on 2 idle cores; torch alone takes 2.5 s


def test_version_and_module_entry():
    command = [sys.executable, "-m", "reelpool", "--version"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("reelpool 0.")


def test_devices_as_lines_and_as_json(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["devices"])
    assert ended.value.code == 0
    assert "cores" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main(["devices", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["event"] == "result"
    assert found["cards"]
    assert found["host"]["ram_bytes"] > 0
