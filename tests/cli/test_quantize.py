"""`reelpool quantize` as a user calls it; and the videos of a q8_0 file."""

from __future__ import annotations

import io
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reelpool.cli import main
from reelpool.cli.output import JsonOutput, LiveOutput, PlainOutput
from reelpool.models.demo import clips
from reelpool.models.files import open_model
from reelpool.models.layouts import open_transformer
from reelpool.models.registry import DEMO_FOLDER
from reelpool.models.spec import NumericsProfile
from reelpool.models.text import TextEncoder
from reelpool.models.wan_vae import load_vae
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.denoise import denoise
from reelpool.runtime.noise import initial_noise
from reelpool.runtime.quality import ssim
from reelpool.runtime.schedule import make_schedule
from reelpool.runtime.solver import start
from reelpool.runtime.types import BlockRange
from tests.model_forms import LOSSLESS, T2V, tensors_of
from tests.quantised_files import wan

CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def quantize(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_it_says_what_it_does_and_what_became_of_the_file(here, capsys):
    wan(here)
    assert quantize("wan.safetensors", "-o", "small.gguf", "--type", "Q4_0") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[:2] == ["block 1/2", "block 2/2"]
    assert lines[2].startswith("small.gguf: ")
    assert " bf16 became " in lines[2]
    assert " q4_0 (" in lines[2]
    assert [line.split()[0] for line in lines[3:]] == ["BF16", "F32", "Q4_0", "Q4_1"]
    assert lines[-1].endswith("in 2 tensors")
    assert open_transformer(Path("small.gguf"))[0] == T2V


def test_json_ends_with_the_result(here, capfd):
    _, tensors = wan(here)
    assert quantize("wan.safetensors", "-o", "a.safetensors", "--type", "fp8", "--json") == 0
    *progress, result = map(json.loads, capfd.readouterr().out.splitlines())
    counts = {"event": "progress", "what": "block", "total": 2}
    assert progress == [{**counts, "done": 1}, {**counts, "done": 2}]
    assert (result["event"], result["out"]) == ("result", "a.safetensors")
    assert (result["before"], result["after"]) == ("bf16", "fp8")
    assert result["bytes_before"] == sum(tensor.nbytes for tensor in tensors.values())
    assert result["bytes_after"] == sum(result["bytes_by_type"].values())
    assert 0 <= Path("a.safetensors").stat().st_size - result["bytes_after"] < 20_000
    assert set(result["bytes_by_type"]) == {"BF16", "F32", "F8_E4M3"}
    assert result["seconds"] > 0


def test_a_quantised_source_is_noted(here, capsys):
    wan(here)
    quantize("wan.safetensors", "-o", "eight.gguf", "--type", "q8_0")
    capsys.readouterr()
    assert quantize("eight.gguf", "-o", "four.gguf", "--type", "q4_1") == 0
    assert "note: " in capsys.readouterr().out.splitlines()[0]
    assert quantize("four.gguf", "-o", "five.gguf", "--type", "q5_1") == 1
    assert "already quantised to q4_1" in capsys.readouterr().err


BAD = {
    "unknown type": ("wan.safetensors -o a.gguf --type q6_k", 2, "q6_k"),
    "near type": ("wan.safetensors -o a.gguf --type q8", 2, "did you mean q8_0?"),
    "suffix": ("wan.safetensors -o a.safetensors --type q8_0", 2, "ends in .gguf"),
    "no folder": ("wan.safetensors -o gone/a.gguf --type q8_0", 2, "there is no folder gone"),
    "no model": ("nothing.safetensors -o a.gguf --type q8_0", 2, "IN: there is no model"),
    "itself": ("wan.safetensors -o wan.safetensors --type fp8", 2, "is the file that is read"),
    "no type": ("wan.safetensors -o a.gguf", 2, "--type"),
    "two experts": ("pair -o a.gguf --type q8_0", 2, "high_noise_model and low_noise_model"),
    "no transformer": (f"{DEMO_FOLDER / 'vae'} -o a.gguf --type q8_0", 1, "a VAE"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_line(here, case, capsys):
    wan(here)
    for part in ("high_noise_model", "low_noise_model"):
        (here / "pair" / part).mkdir(parents=True)
    before = sorted(here.rglob("*"))
    arguments, code, words = BAD[case]
    assert quantize(*arguments.split()) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert words in err
    assert sorted(here.rglob("*")) == before


def test_a_model_s_folder_stands_for_its_transformer(here, capsys):
    (here / "model" / "transformer").mkdir(parents=True)
    LOSSLESS["diffusers"](here / "model" / "transformer", tensors_of(T2V, torch.bfloat16), T2V)
    assert quantize("model", "-o", "a.gguf", "--type", "q8_0") == 0
    assert open_transformer(Path("a.gguf"))[0] == T2V


def test_a_bad_type_is_refused_before_torch_is_loaded(here):
    code = (
        "import sys\n"
        "from reelpool.cli import main\n"
        "try:\n"
        "    main(['quantize', 'demo', '-o', 'a.gguf', '--type', 'q9'])\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, 'torch' in sys.modules)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.stdout == "2 False\n", ran.stderr


def test_progress_in_three_forms():
    plain, data, screen = io.StringIO(), io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={})
    for output in (PlainOutput(plain), JsonOutput(data), LiveOutput(console)):
        with output:
            for done in range(1, 41):
                output.progress("block", done, 40)
            output.result({"out": "a"}, "the end")
    lines = plain.getvalue().splitlines()
    assert (lines[0], lines[-2:]) == ("block 1/40", ["block 40/40", "the end"])
    assert len(lines) == 12  # the first, then a line for each tenth
    assert len(data.getvalue().splitlines()) == 41
    text = screen.getvalue()
    assert "block" in text
    assert "the end" in text
    assert "block" not in text.rpartition("\x1b[?25h")[2]


# ---- what becomes of videos: all of it is in benchmarks/quantise.py


def videos(model: str, captions: list[str], steps: int = 8) -> list[torch.Tensor]:
    """(T, H, W, 3) in 0..1 for each caption, as workers make them."""
    files, numerics = open_model(model), NumericsProfile()
    spec, own = files.spec, files.spec.defaults
    text = TextEncoder(spec.text, files.text_encoder, files.tokenizer, torch.float32, CPU)
    runner = BlockRunner(spec.transformer, files.transformer, numerics, CPU)
    vae = load_vae(spec.vae, files.vae, torch.float32, CPU)
    blocks = BlockRange(0, spec.transformer.num_layers, spec.transformer.num_layers)
    shape = spec.latent_shape(own.width, own.height, 9)
    made = []
    for seed, caption in enumerate(captions):
        embeds = {
            branch: text.encode(prompt) for branch, prompt in (("cond", caption), ("uncond", ""))
        }
        schedule = make_schedule(own.solver, steps, own.shift)
        state = start(schedule, initial_noise(seed, shape))
        loop = denoise("job", schedule, state, (own.guidance,) * steps, seed)
        answers = None
        while True:
            try:
                request = loop.send(answers) if answers else next(loop)
            except StopIteration as stop:
                frames = vae.decode(stop.value.latents)[0][0]
                break
            forwards = [
                ForwardInput(
                    key.branch + caption,
                    embeds[key.branch],
                    shape,
                    request.latents,
                    request.timesteps,
                )
                for key in request.keys
            ]
            answers = dict(zip(request.keys, runner.run(blocks, forwards), strict=True))
        made.append(((frames + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0))
    return made


@torch.inference_mode()
def test_videos_of_a_q8_0_file_are_the_demo_s(here, capsys):
    captions = [
        clips.caption(clips.sample_clip(random.Random(9000 + i), held_out=True)) for i in range(4)
    ]
    model = here / "model"
    for part in DEMO_FOLDER.iterdir():
        model.mkdir(exist_ok=True)
        if part.name != "transformer":
            (model / part.name).symlink_to(part)
    (model / "transformer").mkdir()
    assert quantize("demo", "-o", "model/transformer/model.gguf", "--type", "q8_0") == 0
    pairs = zip(videos("demo", captions), videos(str(model), captions), strict=True)
    losses = [1 - ssim(*pair) for pair in pairs]
    assert 1e-6 < statistics.fmean(losses) <= 0.002
    assert max(losses) <= 0.004
