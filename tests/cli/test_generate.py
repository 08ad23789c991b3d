"""`reelpool generate` and `plan` with the demo model, as a user calls them."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reelpool.cli import main
from reelpool.models.registry import DEMO_FOLDER, find_spec
from reelpool.runtime.video import read_metadata

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red ring bounces over a gray striped background"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from reelpool.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments, "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def objects(out: str) -> list[dict]:
    """What was written to stdout, all of which must be JSON."""
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("generated")
    arguments = ["generate", PROMPT, "--steps", "3", "--frames", "9", "--seed", "7"]
    arguments += ["-o", "ring.mp4", "--save-latents", "ring.safetensors", "--run-dir", "run"]
    process = start(folder, *arguments, "--pool", "auto")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, objects(out)


def test_generate_tells_all_and_ends_with_the_result(generated):
    folder, events = generated
    kinds = [event["event"] for event in events]
    result = events[-1]
    assert kinds[-1] == "result"
    for kind in ("plan", "job_started", "stage_started", "stage_finished", "job_finished"):
        assert kind in kinds
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert Path(result["video"]) == folder / "ring.mp4"
    assert (result["seed"], result["num_frames"]) == (7, 9)
    assert result["seconds"] > 0
    assert set(result["stage_seconds"]) >= {"encode_text", "denoise", "decode"}


def test_generate_writes_a_video_that_knows_its_job(generated):
    folder, _ = generated
    video = folder / "ring.mp4"
    assert video.stat().st_size > 500
    assert PROMPT in json.dumps(read_metadata(video))


def test_generate_saves_one_tensor_of_latents(generated):
    folder, _ = generated
    shape = find_spec("demo").latent_shape(64, 64, 9)
    tensors = load_file(folder / "ring.safetensors")
    assert list(tensors) == ["latents"]
    assert tensors["latents"].dtype == torch.float32
    assert tuple(tensors["latents"].shape) == shape.dims
    assert bool(tensors["latents"].isfinite().all())


def test_run_of_a_job_file_gives_the_same_latents(generated, here, capfd):
    paths = "output: a.mp4\nsave_latents: a.safetensors\nrun_dir: run\n"
    (here / "job.yaml").write_text(f"prompt: {PROMPT}\nsteps: 3\nframes: 9\nseed: 7\n{paths}")
    with pytest.raises(SystemExit) as ended:
        main(["run", "job.yaml"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, err
    assert f"video: {here / 'a.mp4'}" in out.splitlines()[-1]
    expected = load_file(generated[0] / "ring.safetensors")["latents"]
    assert torch.equal(load_file(here / "a.safetensors")["latents"], expected)


def test_plan_runs_nothing(here, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["plan", PROMPT, "--pool", "local:2", "--json"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, err
    (result,) = objects(out)
    assert result["event"] == "result"
    assert len(result) > 1
    assert list(here.iterdir()) == []


def test_plan_in_words_names_the_workers(here, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["plan", PROMPT, "--model", "wan2.1-t2v-14b", "--pool", "local:2"])
    assert ended.value.code == 0
    assert "worker-1" in capfd.readouterr().out


def test_damaged_model_exits_1_with_one_sentence(here, capfd):
    model = here / "model"
    shutil.copytree(DEMO_FOLDER, model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(SystemExit) as ended:
        main(["generate", PROMPT, "--model", "model", "--json"])
    out, err = capfd.readouterr()
    assert ended.value.code == 1
    assert objects(out)[-1]["exit_code"] == 1
    assert weights.name in err
    assert err.count("\n") == 1


def test_interrupt_exits_130(tmp_path):
    process = start(tmp_path, "generate", PROMPT, "--steps", "1000", "--pool", "auto")
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert objects(out)[-1]["error"] == "Interrupted"
    assert "interrupted" in err
    assert "Traceback" not in err
