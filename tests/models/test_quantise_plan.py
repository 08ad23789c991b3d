"""What is refused or told before a file is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reelpool.errors import ConfigError, WeightError
from reelpool.models.layouts import open_transformer
from reelpool.models.quantise import write_quantised
from reelpool.models.quantise_plan import plan_quantised
from reelpool.models.quantise_rules import TARGETS
from reelpool.models.registry import DEMO_FOLDER
from tests.model_forms import T2V
from tests.quantised_files import out_of, run, wan


def test_a_source_of_fewer_bits_is_refused(tmp_path):
    path, _ = wan(tmp_path)
    run(path, out_of(tmp_path, "q4_0"), "q4_0")
    (tmp_path / "new").mkdir()
    for kind in ("q8_0", "q5_0", "fp8"):
        with pytest.raises(WeightError, match=r"already quantised to q4_0.*16-bit file"):
            plan_quantised(out_of(tmp_path, "q4_0"), out_of(tmp_path / "new", kind), TARGETS[kind])
    plan_quantised(out_of(tmp_path, "q4_0"), out_of(tmp_path / "new", "q4_1"), TARGETS["q4_1"])


@pytest.mark.parametrize("name", ["wan.safetensors", "link.safetensors", "x.partial.safetensors"])
def test_what_is_read_is_not_written_over(tmp_path, name):
    path, _ = wan(tmp_path)
    if name.startswith("x."):
        path = path.rename(tmp_path / name)
        out = tmp_path / "x.safetensors"
    else:
        out = tmp_path / name
        if not out.exists():
            out.symlink_to(path)
    with pytest.raises(ConfigError, match="is the file that is read"):
        plan_quantised(path, out, TARGETS["fp8"])


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("q8_0", "a.safetensors", "ends in '.safetensors' for q8_0; .*ends in .gguf"),
        ("fp8", "a.gguf", "ends in .safetensors"),
        ("q8_0", "a", "ends in .gguf"),
        ("q8_0", "gone/a.gguf", "there is no folder .*gone"),
        ("q8_0", "folder.gguf", "is a folder"),
    ],
)
def test_a_target_that_cannot_be_is_refused(tmp_path, kind, name, words):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ConfigError, match=words):
        plan_quantised(wan(tmp_path)[0], tmp_path / name, TARGETS[kind])


def test_what_is_no_transformer_is_refused(tmp_path):
    with pytest.raises(WeightError, match="a VAE, expected a Wan transformer"):
        plan_quantised(DEMO_FOLDER / "vae", tmp_path / "a.gguf", TARGETS["q8_0"])


def test_odd_heads_go_into_a_config_beside_the_file(tmp_path):
    out = tmp_path / "demo.gguf"
    work = plan_quantised(DEMO_FOLDER / "transformer", out, TARGETS["q8_0"])
    assert any("4 heads of 64" in notice for notice in work.notices)
    write_quantised(work)
    assert open_transformer(out)[0] == work.spec
    config = tmp_path / "config.json"
    text = config.read_text()
    run(DEMO_FOLDER / "transformer", out, "q4_0")  # it fits: it stays, and is no obstacle
    assert config.read_text() == text
    config.write_text(json.dumps({**json.loads(text), "num_attention_heads": 2}))
    with pytest.raises(ConfigError, match=r"must say 4 heads of 64.*without a config.json"):
        plan_quantised(DEMO_FOLDER / "transformer", out, TARGETS["q4_0"])


def test_a_config_is_taken_away_with_a_file_that_failed(tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DEMO_FOLDER / "transformer", tmp_path / "demo.gguf", "q8_0", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_model_beside_the_file_is_refused(tmp_path):
    path, _ = wan(tmp_path, spec=replace(T2V, num_heads=2))
    config = {"_class_name": "WanModel", "num_attention_heads": 4, "attention_head_dim": 64}
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="other heads"):
        run(path, folder / "a.gguf", "q8_0")
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_names_that_lose_the_kind_or_the_expert_are_told(tmp_path):
    folder = tmp_path / "skyreels-v2-df"
    folder.mkdir()
    path, _ = wan(folder)
    for name, told in (("a.gguf", True), ("skyreels-df-a.gguf", False)):
        notices = plan_quantised(path, tmp_path / name, TARGETS["q8_0"]).notices
        assert any("kind df" in notice for notice in notices) == told
    path = path.rename(tmp_path / "wan2.2_high_noise.safetensors")
    for name, told in (("a.gguf", True), ("a_low.gguf", True), ("a_high.gguf", False)):
        notices = plan_quantised(path, tmp_path / name, TARGETS["q8_0"]).notices
        assert any("high-noise expert" in notice for notice in notices) == told
