"""One scripted run in the three forms: JSON, plain lines, live progress."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from reelpool.cli.output import JsonOutput, LiveOutput, PlainOutput, json_stdout, summary
from reelpool.scheduler.events import (
    FramesWritten,
    JobFailed,
    JobFinished,
    JobStarted,
    LoraReady,
    Notice,
    PlanReady,
    PoolStarting,
    StageFinished,
    StageStarted,
    StepFinished,
    WorkerReady,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "prompt": "a [red] ring\nbounces",
    "width": 64,
    "height": 64,
    "frames": 17,
    "steps": 20,
    "seed": 7,
}
FINISHED = JobFinished(
    job="job-1",
    video="/none/ring.mp4",
    run_dir="/none/run",
    seed=7,
    num_frames=17,
    width=256,
    height=256,
    fps=8.0,
    seconds=21.5,
    stage_seconds={"load": 0.5, "denoise": 20.0},
    latents="/none/ring.safetensors",
)


def script(job: str = "job-1") -> list:
    return [
        PoolStarting("local:2", 2),
        WorkerReady("w0", "cpu:0", 2**30, 3.0),
        WorkerReady("w1", "cpu:1", 2**30, 3.5),
        PlanReady("cfg-split", "cond on w0\nuncond on w1", {"routes": 2}),
        JobStarted(job, "/none/run", SETTINGS),
        LoraReady(job, "/none/a.st", 1.0, 0.5, 2, 0.5, (("x", "no"),), "a.st: [2] of 4\nno: 2"),
        StageStarted(job, "load", ("w0", "w1")),
        StageFinished(job, "load", ("w0", "w1"), 0.5, "24 MiB"),
        StageStarted(job, "denoise", ("w0", "w1")),
        *(StepFinished(job, step, 20, 0.5 + step % 2) for step in range(1, 21)),
        StageFinished(job, "denoise", ("w0", "w1"), 20.0),
        Notice("one [thing] to know"),
        *(FramesWritten(job, frame, 17) for frame in (1, 5, 9, 13, 17)),
        FINISHED,
    ]


def plain(events: list) -> list[str]:
    stream = io.StringIO()
    output = PlainOutput(stream)
    for event in events:
        output.emit(event)
    output.finish([FINISHED])
    return stream.getvalue().splitlines()


def live(events: list, terminal: bool = True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, _environ={})
    with LiveOutput(console) as output:
        for event in events:
            output.emit(event)
        output.finish([FINISHED])
    return stream.getvalue()


def test_json_is_one_object_a_line_and_the_result_last():
    stream = io.StringIO()
    output = JsonOutput(stream)
    for event in script():
        output.emit(event)
    output.finish([FINISHED])
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    kinds = [item["event"] for item in found]
    assert kinds[:4] == ["pool_starting", "worker_ready", "worker_ready", "plan"]
    assert len(found) == len(script()) + 1
    assert found[-1] == {**FINISHED.as_json(), "event": "result"}
    assert all(line.startswith('{"event"') for line in stream.getvalue().splitlines())


def test_json_result_of_several_jobs_is_a_list():
    stream = io.StringIO()
    JsonOutput(stream).finish([FINISHED, FINISHED])
    found = json.loads(stream.getvalue())
    assert found["event"] == "result"
    assert [job["seed"] for job in found["jobs"]] == [7, 7]


def test_plain_lines_tell_the_run():
    lines = plain(script())
    text = "\n".join(lines)
    assert lines[0] == "starting 2 workers (local:2) ..."
    assert "worker w1 ready on cpu:1, 1 GiB, after 3.50 s" in lines
    assert "  uncond on w1" in lines
    assert 'job-1: "a [red] ring bounces", 64x64, 17 frames, 20 steps, seed 7' in lines
    assert "load done on w0, w1 in 0.500 s (24 MiB)" in lines
    assert "note: one [thing] to know" in lines
    assert "lora a.st: [2] of 4" in lines
    assert "lora no: 2" in lines
    steps = [line for line in lines if line.startswith("step ")]
    assert steps[0] == "step 1/20, 1.50 s each, about 28.5 s left"
    assert steps[-1] == "step 20/20, 1.00 s each"
    assert len(steps) <= 12
    assert "frame 17/17" in lines
    assert "\x1b" not in text
    assert lines[-1] == (
        "video: /none/ring.mp4 (256x256, 17 frames, 2.12 s), seed 7, made in 21.5 s"
    )


def test_slow_steps_are_never_silent(monkeypatch):
    clock = iter(range(0, 100_000, 11))
    monkeypatch.setattr("reelpool.cli.output.time.monotonic", lambda: float(next(clock)))
    assert len([line for line in plain(script()) if line.startswith("step ")]) == 20


def test_lines_name_the_job_where_there_are_several():
    started = JobStarted("job-2", "/none", SETTINGS)
    failed = JobFailed("job-2", "WorkerLost", "worker w1 was lost", "reelpool resume /none")
    lines = plain([*script()[:5], started, StepFinished("job-2", 1, 2, 1.0), failed])
    assert "job-2: step 1/2, 1.00 s each, about 1.00 s left" in lines
    assert "job-2 failed: worker w1 was lost" in lines


def test_error_is_a_line_on_stderr_with_what_to_try(capsys):
    output = PlainOutput(io.StringIO())
    output.emit(JobFailed("job-1", "WorkerLost", "w1 was lost", "reelpool resume runs/a"))
    output.error("WorkerLost", "w1 was\nlost", 1)
    assert capsys.readouterr().err == "error: w1 was lost\ntry: reelpool resume runs/a\n"


def test_summary_tells_the_size_of_the_file(tmp_path):
    import dataclasses

    video = tmp_path / "a.mp4"
    video.write_bytes(b"0" * 2048)
    lines = summary(dataclasses.replace(FINISHED, video=str(video), latents=""))
    assert "2 KiB), seed 7" in lines[-1]
    assert lines[0] == "time: load 0.500 s, denoise 20.0 s"
    assert not any("latents" in line for line in lines)


def test_live_shows_bars_while_it_runs_and_lines_after():
    text = live(script())
    assert "\x1b[" in text
    assert "denoise on w0, w1" in text
    assert "load done on w0, w1 in 0.500 s (24 MiB)" in text
    assert "a [red] ring bounces" in text
    assert "one [thing] to know" in text
    last = [line for line in text.splitlines() if line.strip()][-1]
    assert "video: /none/ring.mp4" in last


def test_live_leaves_no_bars_behind_an_error():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, _environ={})

    def fail() -> None:
        with LiveOutput(console) as output:
            output.emit(StageStarted("job-1", "denoise", ("w0",)))
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    shown, _, after = stream.getvalue().rpartition("\x1b[?25h")  # the cursor is back
    assert "denoise on w0" in shown
    assert "denoise" not in after


def test_json_stdout_holds_only_our_lines(tmp_path):
    code = (
        "import os, sys, subprocess\n"
        "from reelpool.cli.output import json_stdout\n"
        "with json_stdout() as stream:\n"
        "    print('python chatter')\n"
        "    os.write(1, b'native chatter\\n')\n"
        "    subprocess.run(['echo', 'child chatter'])\n"
        "    print('{}', file=stream, flush=True)\n"
        "print('after')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["{}", "after"]
    assert sorted(ran.stderr.splitlines()) == ["child chatter", "native chatter", "python chatter"]


def test_json_stdout_restores_the_descriptor(capfd):
    with json_stdout() as stream:
        print("{}", file=stream)
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "{}\nback\n"


def test_reader_that_leaves_early_ends_it_quietly():
    line = f"{{ {sys.executable} -m reelpool devices --json; echo $? >&2; }} | true"
    ran = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in ran.stderr
    assert ran.stderr.strip() in ("0", "1")
