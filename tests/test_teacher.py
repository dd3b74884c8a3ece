"""The teacher's cost: its weights are gathered once per window, prefetched, and never saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.counting_rank import counting_rank
from support.data import write_instructions
from support.ranks import Ranks
from support.runs import read_metrics, write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

STEPS = 5
# Rows of a step: 8 micro-batches of 1 row on 2 ranks, or 1 of 8.
WINDOW = 16


@pytest.fixture(scope="module")
def pair(shared_model, tmp_path_factory):
    """(student, teacher, data)"""
    rows = write_instructions(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=120)
    return shared_model("llama", 0), shared_model("gpt2", 1), rows


def run(root: Path, pair, *overrides: str, ranks: int = 2) -> tuple[list[dict], list[dict]]:
    """(metrics, counts of rank 0) of each step of a run of STEPS steps."""
    student, teacher, data = pair
    recipe = write_recipe(root.with_suffix(".yaml"), student, teacher, data, root,
                          train__steps=STEPS, train__global_batch_size=WINDOW,
                          data__prepared=str(root.parent / "prepared"), deepspeed=str(
                              write_gathering_config(root.parent, stage3_max_reuse_distance=0,
                                                     stage3_prefetch_bucket_size=1)))
    processes = Ranks(ranks, "train", recipe, *overrides, target=counting_rank)
    statuses = processes.wait()
    assert statuses == [0] * ranks, processes.output()
    return read_metrics(root), [json.loads(line)
                                for line in (root / "0.jsonl").read_text().splitlines()]


def losses(metrics: list[dict]) -> torch.Tensor:
    return torch.tensor([[line[key] for key in ("loss", "kd_loss", "ce_loss", "grad_norm")]
                         for line in metrics],
                        dtype=torch.float64)


@pytest.fixture(scope="module")
def window(pair, tmp_path_factory):
    """8 micro-batches a step, the teacher once for all of them."""
    return run(tmp_path_factory.mktemp("runs") / "window", pair)


def test_a_window_of_eight_gathers_the_teacher_as_often_as_a_window_of_one(pair, window, tmp_path):
    _, of_one = run(tmp_path / "one", pair, "train.micro_batch_size=8")
    assert (of_one[-1]["micro_batches"], window[1][-1]["micro_batches"]) == (1, 8)
    # Else the counter counts nothing.
    assert of_one[-1]["teacher_bytes"] > 0.9 * of_one[-1]["parameters"]
    assert window[1][-1]["teacher_bytes"] <= 1.05 * of_one[-1]["teacher_bytes"]
    assert [line["teacher_calls"] for line in window[1]] == [1] * STEPS


def test_prefetching_goes_on_undisturbed_over_windows_of_several_micro_batches(window):
    steady = window[1][3:]
    assert [line["invalidations"] for line in steady] == [0] * len(steady)
    assert all(line["complete"] for line in steady)


def test_the_teacher_on_the_whole_window_is_the_teacher_row_by_row(pair, window, tmp_path):
    one_by_one, counted = run(tmp_path / "rows", pair, "teacher.max_tokens_per_pass=1")
    assert counted[-1]["teacher_calls"] == 8
    # The body is gathered eight times.
    assert counted[-1]["teacher_bytes"] > 6 * window[1][-1]["teacher_bytes"]
    torch.testing.assert_close(losses(window[0]), losses(one_by_one), rtol=1e-6, atol=0)


def test_the_loss_sees_valid_tokens_alone_and_each_once(window):
    assert [line["loss_rows"] for line in window[1]] == [line["valid"] for line in window[1]]
    assert all(line["losses"] == line["micro_batches"] for line in window[1])


def test_activation_checkpointing_does_not_run_the_loss_twice(pair, window, tmp_path):
    again, counted = run(tmp_path / "recomputed", pair, "student.activation_checkpointing=true")
    assert all(line["losses"] == line["micro_batches"] for line in counted)
    torch.testing.assert_close(losses(again), losses(window[0]), rtol=1e-5, atol=0)
    assert all(line["complete"] and not line["invalidations"] for line in counted[3:])


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2}], ids=["dp 2", "tp 2"])
def test_a_replicated_teacher_is_never_gathered_and_gives_the_same_losses(pair, window, layout,
                                                                          tmp_path):
    overrides = ["teacher.placement=replicated",
                 *(f"{key}={value}" for key, value in layout.items())]
    metrics, counted = run(tmp_path / "replicated", pair, *overrides)
    assert [line["teacher_bytes"] for line in counted] == [0] * STEPS
    torch.testing.assert_close(losses(metrics), losses(window[0]), rtol=1e-4, atol=0)
    saved = sum(path.stat().st_size for path in (tmp_path / "replicated" / "checkpoints").rglob("*")
                if path.is_file())
    student = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(pair[0]).parameters())
    # Weights and two moments in fp32, and small files.
    assert saved < 1.2 * 12 * student + 200_000


def test_without_weight_on_the_divergence_the_teacher_does_not_run(pair, tmp_path):
    metrics, counted = run(tmp_path / "silent", pair, "loss.kd_weight=0", "loss.ce_weight=1")
    assert [line["teacher_calls"] for line in counted] == [0] * STEPS
    assert all(line["kd_loss"] is None and line["loss"] == pytest.approx(line["ce_loss"], rel=1e-6)
               for line in metrics)
