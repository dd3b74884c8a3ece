"""Every layout gives the reference loop's run: ranks, tensor parallelism, ZeRO stages, dtypes."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.memory import memory_rise
from support.models import WORDS, make_model
from support.patches import patch_train_step, rank_without_compiler
from support.ranks import Ranks, rank_main, run_ranks
from support.reference_loop import reference_loop
from support.runs import comparable_metrics, count_steps, read_metrics, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint.export import export

ROOT = Path(__file__).parent.parent
STUDENT = ("llama-tied", 0, dict(num_key_value_heads=4, num_hidden_layers=1))
TEACHER = ("qwen3", 1, dict(num_key_value_heads=4, hidden_size=48, extra_rows=3))
# Student, teacher, [(data-parallel, tensor-parallel, micro-batch)]; global batch 4, 31 ids.
PAIRS = {
    "llama-tied<-qwen3": (STUDENT, TEACHER,
                          [(1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 4)]),
    "qwen3<-gemma2": (("qwen3", 2, dict(num_key_value_heads=2, extra_rows=2)), ("gemma2", 3, {}),
                      [(2, 2, 2)]),
    "gemma2<-llama": (("gemma2", 4, dict(num_key_value_heads=4)), ("llama", 5, {}), [(1, 4, 4)]),
    "gpt2<-llama-tied": (("gpt2", 6, {}), ("llama-tied", 7, dict(num_attention_heads=8)),
                         [(1, 2, 1)]),
    "qwen2-tied<-gpt2": (("qwen2-tied", 8, {}), ("gpt2", 9, dict(extra_rows=33)), [(2, 2, 1)]),
}
# Parts of bodies that tensor parallelism does not split, and why.
WHOLE = {
    "gemma2<-llama": "model.layers.*.self_attn (6,144 weights): tensor_parallel 4 does not divide "
    "its num_key_value_heads 2",
    "gpt2<-llama-tied": "of the student's weights stay whole on every rank, which computes with "
    "them: transformer (",
    "qwen2-tied<-gpt2": "GPT2LMHeadModel has no tensor-parallel plan in transformers",
}


@pytest.fixture(scope="module")
def pair(shared_model) -> list[Path]:
    return [shared_model(family, seed, **changes) for family, seed, changes in (STUDENT, TEACHER)]


def deepspeed_config(path: Path, stage: int, bf16: bool) -> Path:
    path.write_text(json.dumps({"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}))
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_every_layout_trains_as_a_plain_loop_does_and_exports_it(name, shared_model,
                                                                 instructions_file, tmp_path):
    *roles, layouts = PAIRS[name]
    models = [shared_model(family, seed, **changes) for family, seed, changes in roles]
    steps = 20 if len(layouts) > 1 else 8
    recipe = write_recipe(tmp_path / "r.yaml", *models, instructions_file, tmp_path / "run",
                          train__steps=steps, train__learning_rate=1e-3,
                          data__prepared=str(tmp_path / "data"))
    truth = None
    for dp, tp, micro in layouts:
        run = tmp_path / f"dp{dp}tp{tp}"
        ranks = run_ranks(dp * tp, "train", recipe, f"output_dir={run}", f"tensor_parallel={tp}",
                          f"train.micro_batch_size={micro}", timeout=300)
        assert (tp == 1 or WHOLE.get(name, "") in ranks.output())
        assert ("stay whole on every rank" in ranks.output()) == (name in WHOLE)
        lines, weights = truth = truth or reference_loop(
            *models, yaml.safe_load(recipe.read_text()), tmp_path / "data")
        for expected, line in zip(lines, read_metrics(run), strict=True):
            for key, value in expected.items():
                # Rounding grows with the steps: AdamW divides by √(second moment).
                tolerance = 2e-4 if line["step"] <= 8 else 1e-3
                assert line[key] == pytest.approx(value, rel=tolerance), (run.name, line, key)
        exported = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / f"out{run.name}"))
        for key, parameter in exported.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[key], rtol=1e-3, atol=2e-4,
                                       msg=lambda m, k=key, r=run: f"{r.name} {k}: {m}")


def test_zero_0_to_3_give_the_same_run_on_tensor_parallel_ranks_too(pair, instructions_file,
                                                                    tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run",
                          data__prepared=str(tmp_path / "data"))
    truth = None
    for stage in range(4):
        run = tmp_path / f"stage{stage}"
        config = deepspeed_config(tmp_path / f"{stage}.json", stage, bf16=False)
        run_ranks(4, "train", recipe, f"output_dir={run}", "tensor_parallel=2",
                  f"deepspeed={config}", "train.micro_batch_size=2", timeout=300)
        lines, weights = truth = truth or reference_loop(*pair, yaml.safe_load(recipe.read_text()),
                                                         tmp_path / "data")
        for expected, line in zip(lines, read_metrics(run), strict=True):
            for key, value in expected.items():
                assert line[key] == pytest.approx(value, rel=2e-4), (stage, line["step"], key)
        exported = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / f"out{stage}"))
        for key, parameter in exported.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[key], rtol=1e-3, atol=2e-4)


def test_the_packaged_configs_and_mixed_dtypes_follow_fp32(pair, instructions_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run",
                          tensor_parallel=2, data__prepared=str(tmp_path / "data"), train__steps=4,
                          train__micro_batch_size=4)
    runs = {  # ranks, overrides
        "fp32": (2, []),
        "fp32 student, bf16 teacher": (2, ["teacher.dtype=bf16"]),
        "bf16 student, fp32 teacher": (2,
                                       ["deepspeed=ds_configs/zero3.json", "teacher.dtype=fp32"]),
        "bf16, offloaded": (2, ["deepspeed=ds_configs/zero3_offload.json", "teacher.dtype=bf16"]),
        "bf16, stage 2": (2, ["deepspeed=ds_configs/zero2.json", "teacher.dtype=bf16"]),
        "bf16, stage 2, fp32 teacher": (2, ["deepspeed=ds_configs/zero2.json", "tensor_parallel=1",
                                            "train.micro_batch_size=2"]),
        "bf16, stage 0": (1, [f"deepspeed={deepspeed_config(tmp_path / '0.json', 0, bf16=True)}",
                              "tensor_parallel=1",
                              "teacher.dtype=bf16"]),
    }
    losses = {}
    for name, (ranks, overrides) in runs.items():
        run_ranks(ranks, "train", recipe, *overrides, f"output_dir={tmp_path / name}", timeout=300,
                  target=rank_without_compiler)
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
        assert losses[name] == pytest.approx(losses["fp32"], rel=5e-3), name
    dtypes = ("fp32", "fp32 student, bf16 teacher", "bf16 student, fp32 teacher", "bf16, offloaded")
    # Each differs, so each used its own dtypes.
    assert len({tuple(losses[name]) for name in dtypes}) == len(dtypes)


def test_a_stopped_tensor_parallel_run_carries_on_as_if_it_had_not_been(pair, instructions_file,
                                                                        tmp_path):
    settings = {"train__steps": 14, "train__micro_batch_size": 4, "tensor_parallel": 2,
                "data__prepared": str(tmp_path / "data")}
    whole, parts = (write_recipe(tmp_path / f"{name}.yaml", *pair, instructions_file,
                                 tmp_path / name, **settings)
                    for name in ("whole", "parts"))
    run_ranks(2, "train", whole, timeout=300)
    ranks = Ranks(2, "train", parts)
    ranks.wait_until(lambda: count_steps(tmp_path / "parts") >= 2, 200)
    ranks.signal(signal.SIGUSR1)
    assert ranks.wait(200) == [75, 75], ranks.output()
    assert 2 <= len(read_metrics(tmp_path / "parts")) < 14
    run_ranks(2, "train", parts, timeout=300)
    assert comparable_metrics(tmp_path / "parts") == comparable_metrics(tmp_path / "whole")


def earlier_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of the version that cut heads as evenly as possible, and that stops at step 3.
    """
    from amid_ds.checkpoint import state
    from amid_ds.models import tensor_parallel

    def around(trainer: Any, batch: object) -> Iterator[None]:
        yield
        if trainer.world.is_main and trainer.state.step == 3:
            (trainer.job.run.path / "STOP").touch()

    patch_train_step(around)
    for module in (state, tensor_parallel):
        module.HEAD_ROW_MULTIPLE = 1
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_a_run_whose_heads_were_cut_elsewhere_carries_on_as_if_they_had_not_been(text_file,
                                                                                 tmp_path):
    words = [*WORDS, *(f"rare{number}" for number in range(101))]
    models = [make_model(tmp_path / name, family, seed, words=words, num_key_value_heads=4)
              for name, family, seed in [("student", "qwen3", 0), ("teacher", "llama", 1)]]
    settings = {"tensor_parallel": 2, "data__prepared": str(tmp_path / "data")}
    whole, parts = (write_recipe(tmp_path / f"{name}.yaml", *models, text_file, tmp_path / name,
                                 **settings)
                    for name in ("whole", "parts"))
    run_ranks(2, "train", whole, timeout=300)
    earlier = Ranks(2, "train", parts, target=earlier_rank)
    assert earlier.wait(200) == [75, 75], earlier.output()
    manifest = next((tmp_path / "parts" / "checkpoints").glob("step_*/manifest.json"))
    assert "head_row_multiple" not in manifest.read_text()
    assert "converting it once" in run_ranks(2, "train", parts, timeout=300).output()
    for ours, theirs in zip(*(read_metrics(tmp_path / name) for name in ("parts", "whole")),
                            strict=True):
        for key in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    saved = max((tmp_path / "parts" / "checkpoints").glob("step_*/manifest.json"))
    assert json.loads(saved.read_text())["content"]["state"]["head_row_multiple"] == 64


def memory_measuring_rank(folder: str, argv: list[str], variables: dict[str, str],
                          log: str) -> None:
    """Run as a rank that loads the models, records the peak rise of its memory, and exits."""
    from amid_ds.training import train

    def load(*arguments: object, **options: object) -> None:
        with memory_rise("RssAnon") as rise:
            real(*arguments, **options)
        Path(folder, f"rank{variables['RANK']}").write_text(str(rise[0]))
        os._exit(0)

    real, train.build_engine = train.build_engine, load
    rank_main(argv, variables, log)


@pytest.mark.parametrize("ranks, tensor_parallel", [(2, 1), (4, 1), (4, 2)])
def test_loading_takes_a_rank_its_partition_and_nothing_of_a_file(ranks, tensor_parallel, pair,
                                                                  instructions_file, tmp_path):
    model = make_model(tmp_path / "model", "llama", hidden_size=1024, intermediate_size=4096,
                       num_hidden_layers=4)
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.save_pretrained(model, max_shard_size="60MB")
    (model / "model.safetensors").unlink()
    files = sorted(path.stat().st_size for path in model.glob("*.safetensors"))
    recipe = write_recipe(tmp_path / "r.yaml", pair[0], model, instructions_file, tmp_path / "run",
                          tensor_parallel=tensor_parallel)
    rank = functools.partial(memory_measuring_rank, str(tmp_path))
    assert Ranks(ranks, "train", recipe, target=rank).wait(200) == [0] * ranks
    assert len(files) > 3
    # 24 MiB for modules imported on the way and the tiny student.
    allowed = sum(files) / ranks + (24 << 20)
    assert allowed < files[-1] + sum(files) / ranks
    assert [number for number in range(ranks)
            if int((tmp_path / f"rank{number}").read_text()) > allowed] == []
