"""`amid-ds prune` refuses what it cannot cut, before a weight is read and without a trace."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from support.data import write_texts
from support.models import make_model
from transformers import MixtralConfig, MixtralForCausalLM

from amid_ds.cli import main
from amid_ds.models.weight_reader import WeightReader

BAD = {
    "more than the teacher has": (["--hidden", 33], ["--hidden 33", "from 1 to 32"]),
    "none": (["--layers", 0], ["--layers 0", "from 1 to 4"]),
    "half a group": (["--heads", 5, "--data", "DATA"], ["--heads 5", "multiple of 2"]),
    "heads that do not divide the width": (["--heads", 6, "--data", "DATA"],
                                           ["LlamaConfig does not allow", "heads=6"]),
    "no text": (["--hidden", 16], ["no --data", "--by depth"]),
    "text and depth": (["--by", "depth", "--layers", 2, "--data", "DATA"], ["--by depth with"]),
    "width by depth": (["--by", "depth", "--hidden", 16], ["--layers alone"]),
    "no rows": (["--hidden", 16, "--data", "DATA", "--rows", 0], ["--rows 0"]),
    "a file that is not there": (["--hidden", 16, "--data", "absent.jsonl"], ["absent.jsonl"]),
    "too little disk": (["--by", "depth", "--layers", 2], ["MB free", "make room there"]),
    "an output in use": (["--by", "depth", "--layers", 2], ["there already"]),
    "an output below a file": (["--by", "depth", "--layers", 2], ["no folder to write in"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_before_a_weight_is_read(case, text_file, tmp_path, capsys,
                                                          monkeypatch, shared_model):
    options, parts = BAD[case]
    model = shared_model("llama", 0, num_hidden_layers=4, num_attention_heads=8,
                         num_key_value_heads=4)
    out = tmp_path / "student"
    if case == "an output in use":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    if case == "an output below a file":
        out = text_file / "student"
    if case == "too little disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(WeightReader, "fill", None)
    monkeypatch.setattr("amid_ds.eval.prune.load_causal_lm", None)
    options = [text_file if option == "DATA" else option for option in options]
    assert main(["prune", str(model), str(out), *map(str, options)]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert sorted(tmp_path.rglob("*")) == before


def refused(folder: Path, capsys, *options: object) -> str:
    """The message of a refusal to prune `folder`, which leaves nothing."""
    out = folder.with_name("refused")
    assert main(["prune", str(folder), str(out), *map(str, options)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_other_models_are_refused_by_name(tmp_path, capsys, shared_model):
    cut = ("--by", "depth", "--layers", 1)
    mixture = MixtralForCausalLM(MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))
    mixture.save_pretrained(tmp_path / "mixture")
    assert "model_type mixtral" in refused(tmp_path / "mixture", capsys, *cut)
    quantized = make_model(tmp_path / "quantized", "llama")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "quantized" in refused(quantized, capsys, *cut)
    bare = make_model(tmp_path / "bare", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "no tokenizer" in refused(bare, capsys, *cut)
    gpt2 = make_model(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn_by_inverse_layer_idx" in refused(gpt2, capsys, *cut)
    wide = make_model(tmp_path / "wide", "gpt2")
    data = write_texts(tmp_path / "texts.jsonl", rows=2)
    assert "--hidden 16 --heads 2" in refused(wide, capsys, "--heads", 2, "--data", data)
    crossed = make_model(tmp_path / "crossed", "gpt2", add_cross_attention=True)
    assert "crossattention" in refused(crossed, capsys, *cut)
