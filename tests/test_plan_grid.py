"""The plan against measured runs of many pairs and layouts; `-m slow -n 0` prints a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.families import save_tiny
from support.memory import profiled_peak
from support.models import make_model, make_tokenizer
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import write_recipe
from transformers import PreTrainedTokenizerFast

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.engine.ds_config import find_deepspeed_config
from amid_ds.planning.devices import find_device
from amid_ds.planning.plan import make_plan

WORDS = [f"w{number}" for number in range(31997)]
PROFILED = 5
STATES = {"student_weights", "gradients", "optimizer", "teacher_weights"}
# Family, width, layers, vocabulary.
SIZES = {
    "0.6 M": ("llama", 64, 2, 4000), "5 M": ("llama", 256, 4, 4000),
    "14 M": ("qwen3", 384, 6, 4000),
    "48 M": ("llama-tied", 512, 8, 32000), "140 M": ("llama-tied", 768, 13, 32000)}
# Families of models with layers of their own, and their values.
OTHERS = {
    "mixture": ("qwen3_moe", dict(moe_intermediate_size=256, num_experts=8, head_dim=64)),
    "latent": ("deepseek_v3", dict(moe_intermediate_size=256)),
    "delta": ("qwen3_next", dict(moe_intermediate_size=256, head_dim=64, linear_key_head_dim=32,
                                 linear_value_head_dim=32, shared_expert_intermediate_size=256)),
    "mamba": ("nemotron_h", dict(moe_intermediate_size=256, head_dim=64, mamba_head_dim=64,
                                 chunk_size=64, moe_shared_expert_intermediate_size=256)),
    "chunks": ("llama4_text", dict(head_dim=64, intermediate_size_mlp=512))}
# Student, teacher, ranks, overrides.
GRID = [
    ("0.6 M", "5 M", 2, ""), ("5 M", "14 M", 2, ""), ("5 M", "14 M", 2, "tensor_parallel=2"),
    ("5 M", "14 M", 4, "tensor_parallel=2"), ("5 M", "14 M", 2, "train.global_batch_size=8"),
    ("5 M", "14 M", 2, "train.micro_batch_size=2 train.seq_length=128"),
    ("5 M", "14 M", 2,
     "train.micro_batch_size=2 train.seq_length=512 student.activation_checkpointing=true"),
    ("5 M", "14 M", 1, "train.micro_batch_size=2"), ("5 M", "14 M", 2, "deepspeed=zero1_fp32.json"),
    ("5 M", "14 M", 2, "deepspeed=stage_2.json"), ("5 M", "14 M", 2, "deepspeed=zero3.json"),
    ("5 M", "14 M", 2, "deepspeed=zero2.json"), ("48 M", "140 M", 2, ""),
    ("mixture", "latent", 2, "student.router_aux_loss=0.01"), ("delta", "mamba", 2, ""),
    ("mamba", "chunks", 2, "student.activation_checkpointing=true"),
    ("48 M", "140 M", 2, "train.seq_length=512")]


def make(folder: Path, size: str) -> Path:
    if size in OTHERS:
        name, values = OTHERS[size]
        make_tokenizer(folder / "words", WORDS[:1997])
        return save_tiny(name, folder / size, PreTrainedTokenizerFast.from_pretrained(
            folder / "words"), hidden_size=256, intermediate_size=512, vocab_size=2000,
            max_position_embeddings=512, **values)
    family, width, layers, vocabulary = SIZES[size]
    return make_model(
        folder / size.replace(" ", ""), family, words=WORDS[:vocabulary - 3], hidden_size=width,
        num_hidden_layers=layers, intermediate_size=4 * width,
        num_attention_heads=max(4, width // 64), num_key_value_heads=max(2, width // 128),
        max_position_embeddings=512)


def profiling_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes the peak allocation of step PROFILED to peak.json."""
    import torch

    def around(trainer, batch):
        if trainer.state.step + 1 != PROFILED or variables["RANK"] != "0":
            yield
            return
        with torch.profiler.profile(profile_memory=True) as profile:
            yield
        (trainer.job.run.path / "peak.json").write_text(json.dumps(profiled_peak(profile)))

    patch_train_step(around)
    rank_main(argv, variables, log)


def off(planned: float, measured: float) -> float:
    return planned / measured - 1 if measured else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("student, teacher, ranks, changes", GRID)
def test_what_a_step_takes_is_what_was_planned(student, teacher, ranks, changes, tmp_path, capfd):
    config = json.loads(find_deepspeed_config("zero1_fp32.json").read_text())
    config["zero_optimization"]["stage"] = 2
    (tmp_path / "stage_2.json").write_text(json.dumps(config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"text": " ".join(WORDS[(7 * row + 3 * index) % 400] for index in range(200))})
        + "\n" for row in range(200)))
    recipe = write_recipe(tmp_path / "r.yaml", make(tmp_path, student), make(tmp_path, teacher),
                          rows, tmp_path / "run", train__steps=PROFILED + 1, train__seq_length=256)
    processes = Ranks(ranks, "train", recipe,
                      *changes.replace("stage_2", str(tmp_path / "stage_2")).split(),
                      target=profiling_rank)
    assert processes.wait(900) == [0] * ranks, processes.output()
    assert main(["plan", "--check", str(tmp_path / "run")]) == 0
    plan = make_plan(load_recipe(tmp_path / "run" / "recipe.yaml"), 1, ranks,
                     find_device("cpu", ranks))
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())
    parts = {part: off(plan.memory_per_rank[part], size)
             for part, size in measured["memory_per_rank"].items()}
    # The states are measured by themselves; at stage 3 DeepSpeed's bucket of gradients is there
    # from the start.
    stage_3 = "deepspeed" not in changes or "zero3" in changes
    lasting = {*STATES, "total"} | ({"reduce_bucket"} if stage_3 else set())
    working = sum(size for part, size in plan.memory_per_rank.items() if part not in lasting)
    peak = json.loads((tmp_path / "run" / "peak.json").read_text())
    network = off(sum(plan.network_per_step.values()), sum(measured["network_per_step"].values()))
    worst = max(parts, key=lambda part: abs(parts[part]))
    with capfd.disabled():
        print(f"\n| {student} ← {teacher} | {ranks} | {changes or ' '} | {parts[worst]:+.1%} "
              f"({worst}) | "
              f"{peak / 1e6:,.0f} | {off(working, peak):+.1%} | {network:+.2%} |")
    assert all(abs(difference) < 0.15 for difference in parts.values()), parts
    assert abs(network) < 0.05
    # The plan counts the loss's tiles as for a large model.
    assert abs(off(working, peak)) < 0.2
