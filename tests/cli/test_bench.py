"""`reelpool bench activations`: what a forward takes, in words and as data."""

import json

import pytest

from reelpool.cli import bench, main

SMALL = ["bench", "activations", "--model", "demo", "--size", "64x64", "--frames", "5"]


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    return ended.value.code, out, err


def test_all_three_peaks_come_as_json(capfd):
    code, out, err = call(capfd, *SMALL, "--frames", "33", "--size", "512x512", "--json")
    assert code == 0, err
    (found,) = [json.loads(line) for line in out.splitlines()]
    assert found["event"] == "result"
    assert (found["model"], found["tokens"]) == ("demo", 32 * 32 * 9)
    assert (found["width"], found["height"], found["frames"]) == (512, 512, 33)
    assert (found["dtype"], found["per_frame"], found["head_groups"]) == ("bfloat16", False, 8)
    assert found["peak_bytes_lean"] < found["peak_bytes"] < found["diffusers_peak_bytes"]
    assert found["kept_bytes"] < found["peak_bytes_lean"]
    assert sum(piece["bytes"] for piece in found["pieces"]) == found["peak_bytes"]
    assert sum(piece["bytes"] for piece in found["pieces_lean"]) == found["peak_bytes_lean"]
    assert found["pieces"][0].keys() == {"bytes", "operator", "shape", "dtype"}


def test_words_say_where_the_bytes_go(capfd):
    code, out, _ = call(capfd, *SMALL, "--no-diffusers", "--per-frame", "--head-groups", "2")
    assert code == 0
    assert "demo, 64x64, 5 frames, bfloat16: 32 tokens" in out
    assert "2 head groups" in out
    assert "at the peak:" in out
    assert "256 bfloat16" in out
    assert "diffusers          not measured" in out


def test_without_a_checkout_or_diffusers_there_is_no_third_figure(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "activations.py")
    code, out, _ = call(capfd, *SMALL, "--json")
    assert (code, json.loads(out)["diffusers_peak_bytes"]) == (0, None)
    (tmp_path / "activations.py").write_text("print(17)")
    _, out, _ = call(capfd, *SMALL, "--json")
    assert json.loads(out)["diffusers_peak_bytes"] == 17
    monkeypatch.setattr(bench, "find_package", lambda name: None)
    _, out, _ = call(capfd, *SMALL, "--json")
    assert json.loads(out)["diffusers_peak_bytes"] is None


def test_a_script_that_fails_is_one_sentence(capfd, monkeypatch, tmp_path):
    (tmp_path / "activations.py").write_text("raise RuntimeError('no such class')")
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "activations.py")
    code, out, err = call(capfd, *SMALL)
    assert (code, out) == (1, "")
    assert err.endswith("RuntimeError: no such class; --no-diffusers measures ours alone\n")
    assert err.count("\n") == 1
    (tmp_path / "activations.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(bench, "TIMEOUT_S", 0.2)
    code, _, err = call(capfd, *SMALL)
    assert code == 1
    assert "no answer in 0.2 s" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "70x64"], "the nearest size is 64x64"),
        (["--frames", "6"], "the nearest are 5 and 9"),
        (["--dtype", "bf16"], "did you mean bfloat16?"),
        (["--model", "wan2.1-t2v-15b"], "wan2.1-t2v-1"),
        (["--head-groups", "0"], "--head-groups"),
    ],
)
def test_bad_values_exit_2(capfd, arguments, words):
    code, out, err = call(capfd, *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
