"""`amid-ds dequantize`: quantized folders as ordinary ones, held against transformers' own loading
with `dequantize=True`, and against the layouts' definitions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from support.memory import memory_rise
from support.models import WORDS, make_tokenizer
from support.quantized import FP4_VALUES, LAYOUTS, quantize

from amid_ds.cli import main
from amid_ds.models import dequantize, weight_writer

SIZES = dict(vocab_size=len(WORDS) + 3, hidden_size=256, intermediate_size=256,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             eos_token_id=1, pad_token_id=2, dtype="bfloat16")
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
FAMILIES = {
    "qwen3": lambda: t.Qwen3Config(**SIZES),
    "qwen3 mixture": lambda: t.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "deepseek": lambda: t.DeepseekV3Config(**{
        **SIZES, "num_key_value_heads": 4, "head_dim": 128}, n_routed_experts=4,
        moe_intermediate_size=128, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=64,
        qk_nope_head_dim=64, v_head_dim=64),
    "gpt-oss": lambda: t.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2,
                                      layer_types=["sliding_attention", "full_attention"])}


@pytest.fixture(scope="session")
def quantized(shared_folder):
    """quantized(family, layout): a quantized folder with a tokenizer, of random weights."""
    def make(family: str, layout: str, path: Path, per_file: int) -> None:
        full = path.with_name(f"{path.name}-full")
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(FAMILIES[family]()).to(torch.bfloat16)
        make_tokenizer(full)
        model.save_pretrained(full)
        quantize(full, path, layout, per_file)
        shutil.rmtree(full)

    def folder(family: str, layout: str, per_file: int = 10**6) -> Path:
        return shared_folder(f"{family}-{layout}-{per_file}".replace(" ", "-"),
                             lambda path: make(family, layout, path, per_file))
    return folder


def own_loading(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of the quantized folder as it loads it."""
    config = t.AutoConfig.from_pretrained(folder).quantization_config
    section = t.quantizers.auto.AutoQuantizationConfig.from_dict(config)
    section.dequantize = True
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=section)
    return dict(model.named_parameters())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("family", "layout", "dtype"), [
    ("qwen3", "fp8", "bf16"), ("gpt-oss", "mxfp4", "bf16"), ("qwen3 mixture", "compressed int4",
                                                             "bf16"),
    *(pytest.param(*each, marks=SLOW) for each in [
        ("qwen3", "fp8", "fp32"), ("qwen3 mixture", "fp8", "bf16"),
        ("gpt-oss", "mxfp4", "fp32"), ("qwen3", "compressed fp8", "bf16"),
        ("qwen3 mixture", "compressed fp8", "bf16"), ("qwen3", "compressed int4", "fp32")])])
def test_the_folder_has_the_weights_that_transformers_makes_as_it_loads(
        family, layout, dtype, quantized, tmp_path):
    source, out = quantized(family, layout), tmp_path / "out"
    assert main(["dequantize", str(source), str(out), "--dtype", dtype]) == 0
    full = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    expected = own_loading(source, full)
    made = t.AutoModelForCausalLM.from_pretrained(out)
    assert made.dtype == full and not hasattr(made.config, "quantization_config")
    parameters = dict(made.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert ({entry.name for entry in out.iterdir()} == {entry.name for entry in source.iterdir()})
    (tmp_path / "any").touch()
    assert ({entry.stat().st_mode for entry in out.iterdir()}
            == {(tmp_path / "any").stat().st_mode})
    assert not list(tmp_path.glob(".*"))


def test_values_are_those_of_the_layouts_definitions(quantized, tmp_path):
    source = quantized("qwen3", "fp8")
    main(["dequantize", str(source), str(tmp_path / "fp8"), "--dtype", "fp32"])
    name = "model.layers.1.mlp.up_proj.weight"
    stored, made = (load_file(folder / "model.safetensors")
                    for folder in (source, tmp_path / "fp8"))
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(made[name], stored[name].float() * scale)
    # What is stored in full stays as it is.
    assert torch.equal(made["model.norm.weight"], stored["model.norm.weight"])

    source = quantized("gpt-oss", "mxfp4")
    main(["dequantize", str(source), str(tmp_path / "mxfp4")])
    name = "model.layers.0.mlp.experts.down_proj"
    stored, made = (load_file(folder / "model.safetensors")
                    for folder in (source, tmp_path / "mxfp4"))
    blocks = stored[f"{name}_blocks"]
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    signs = torch.where(codes < 8, 1.0, -1.0)
    exponents = stored[f"{name}_scales"].double() - 127
    values = signs * FP4_VALUES[codes % 8].double() * 2 ** exponents[..., None]
    assert torch.equal(made[name].double(), values.flatten(-2).transpose(1, 2))


def test_experts_have_the_scale_of_all_their_scales(quantized, tmp_path):
    # transformers 5.24 leaves it out of experts, which are then thousands of times too large.
    source = quantized("qwen3 mixture", "compressed nvfp4")
    assert main(["dequantize", str(source), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    stored, made = (load_file(folder / "model.safetensors")
                    for folder in (source, tmp_path / "out"))
    for name in ("model.layers.1.mlp.experts.3.up_proj.weight",
                 "model.layers.1.self_attn.q_proj.weight"):
        packed = stored[f"{name}_packed"]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        values = torch.where(codes < 8, 1.0, -1.0) * FP4_VALUES[codes % 8]
        scale = stored[f"{name}_scale"].float() / stored[f"{name}_global_scale"]
        torch.testing.assert_close(made[name], values * scale.repeat_interleave(16, 1),
                                   rtol=1e-2, atol=0)


def changed(source: Path, out: Path, config: dict[str, object] | None = None,
            tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of a folder with other values in config.json and its file of weights."""
    shutil.copytree(source, out)
    stored = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stored, **(config or {})}))
    save_file({**load_file(source / "model.safetensors"), **(tensors or {})},
              out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_blocks_are_those_of_the_scales_and_scales_of_activations_are_left_out(quantized, tmp_path):
    # Of 128 by 128, whatever the config says: as of experts in 4 bits beside layers in 8.
    section = {**LAYOUTS["fp8"][1], "weight_block_size": [96, 100]}
    source = changed(quantized("qwen3", "fp8"), tmp_path / "source",
                     {"quantization_config": section}, {
                         f"model.layers.0.self_attn.q_proj.{name}": torch.tensor(2.0)
                         for name in ("activation_scale", "k_scale")})
    for folder, out in ((source, "out"), (quantized("qwen3", "fp8"), "true")):
        assert main(["dequantize", str(folder), str(tmp_path / out)]) == 0
    found, true = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "true"))
    assert found.keys() == true.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in true.items())


def test_a_model_with_code_of_its_own_and_a_named_file(quantized, tmp_path):
    source = changed(quantized("qwen3", "fp8"), tmp_path / "source", {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "transformers_weights": "own.safetensors",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}})
    (source / "model.safetensors").rename(source / "own.safetensors")
    (source / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n")
    argv = ["dequantize", str(source), str(tmp_path / "out")]
    assert main(argv) == 2
    assert main([*argv, "--trust-remote-code"]) == 0
    made = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = own_loading(quantized("qwen3", "fp8"), torch.bfloat16)
    assert all(torch.equal(value, expected[name]) for name, value in made.named_parameters())


def test_blocks_may_end_outside_of_a_matrix(quantized, tmp_path):
    # DeepSeek-V3 has 576 rows in blocks of 128; transformers 5.24 itself refuses them.
    source = quantized("deepseek", "fp8")
    assert main(["dequantize", str(source), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    stored, made = (load_file(folder / "model.safetensors")
                    for folder in (source, tmp_path / "out"))
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert stored[name].shape[0] == 192 and len(scale) == 256
    assert torch.equal(made[name], stored[name].float() * scale[:192])
    t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_killed_command_goes_on_with_the_files_that_it_had_finished(
        quantized, tmp_path, monkeypatch, capsys):
    source, out = quantized("qwen3", "fp8", per_file=9), tmp_path / "out"
    monkeypatch.setattr(weight_writer, "FILE_BYTES", 300_000)
    needed: list[int] = []
    monkeypatch.setattr(dequantize, "require_disk_space",
                        lambda folder, size, *_: needed.append(size))
    read, count = dequantize._read, 0

    def dies(plan, weight):
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        return read(plan, weight)

    monkeypatch.setattr(dequantize, "_read", dies)
    assert main(["dequantize", str(source), str(out)]) == 1
    staging = tmp_path / f".out{dequantize.STAGING_SIGN}dequantize"
    finished = {path.name: path.stat().st_mtime_ns for path in staging.glob("model*.safetensors")}
    assert finished and not out.exists()
    monkeypatch.setattr(dequantize, "_read", read)
    assert main(["dequantize", str(source), str(out)]) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    # There need not be room for what is there.
    assert needed[0] - needed[1] == sum((out / name).stat().st_size for name in finished)
    expected = own_loading(source, torch.bfloat16)
    made = t.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, expected[name]) for name, value in made.named_parameters())
    assert not list(tmp_path.glob(".*"))


def test_finished_files_of_another_dtype_are_made_anew(quantized, tmp_path):
    source, out = quantized("qwen3", "fp8"), tmp_path / "out"
    staging = tmp_path / f".out{dequantize.STAGING_SIGN}dequantize"
    staging.mkdir()
    (staging / dequantize.PLAN_FILE).write_text("{}")
    (staging / "model.safetensors").write_text("of another plan")
    assert main(["dequantize", str(source), str(out)]) == 0
    assert t.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_memory_is_that_of_one_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = t.Qwen3Config(**{**SIZES, "hidden_size": 768, "intermediate_size": 1536,
                              "num_hidden_layers": 6})
    make_tokenizer(tmp_path / "full")
    t.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "full")
    source = quantize(tmp_path / "full", tmp_path / "source", "fp8")
    monkeypatch.setattr(weight_writer, "FILE_BYTES", 8 * 10**6)
    with memory_rise("RssAnon") as rise:
        assert main(["dequantize", str(source), str(tmp_path / "out")]) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size > 45e6 and rise[0] < 30e6


def test_what_cannot_be_dequantized_is_refused_by_name(shared_model, quantized, tmp_path, capsys):
    def refused(folder: Path, *words: str) -> None:
        assert main(["dequantize", str(folder), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    refused(shared_model("llama"), "is not quantized", "use it as it is")
    source = tmp_path / "source"
    shutil.copytree(quantized("qwen3", "fp8"), source)
    config = json.loads((source / "config.json").read_text())

    def with_section(section: dict[str, object]) -> None:
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": section}))

    with_section({"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(source, "bitsandbytes", "dequantize")
    with_section({"quant_method": "a_new_one"})
    refused(source, "a_new_one", "pip install -U transformers")
    # Scales that the section does not know.
    with_section(LAYOUTS["mxfp4"][1])
    refused(source, "F8_E4M3 without a scale")
    with_section(config["quantization_config"])
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = tensors.pop(f"{name}_scale_inv")
    save_file({**tensors, f"{name}_scale_inv": whole[:1, :1].repeat(3, 1)},
              source / "model.safetensors", metadata={"format": "pt"})
    refused(source, f"{name} of", "cannot be made of its stored", "[3, 1]", "not divisible")
    save_file({key: tensor for key, tensor in load_file(
        quantized("qwen3", "fp8") / "model.safetensors").items() if key != "model.norm.weight"},
        source / "model.safetensors", metadata={"format": "pt"})
    refused(source, "1 missing: model.norm.weight")
    os.truncate(source / "model.safetensors", 1000)
    refused(source, "cannot be read")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["dequantize", str(source), str(tmp_path / "taken")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_quantized_model_is_refused_with_the_command_that_helps(quantized, text_file, capsys):
    source = quantized("qwen3", "fp8")
    assert main(["eval", str(source), "--data", str(text_file)]) == 2
    assert f"amid-ds dequantize {source} OUT" in capsys.readouterr().err
