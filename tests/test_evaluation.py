"""Evaluation during training: metrics of the plain models in any layout, each once over resumes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.data import split_documents, write_instructions, write_texts
from support.ranks import run_ranks
from support.runs import read_metrics, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.config.parse import load_recipe
from amid_ds.data import read_batches
from amid_ds.errors import InputError
from amid_ds.losses import LMHead, linear_argmax

METRICS = ("loss", "perplexity", "kl_to_teacher", "top1_agreement")


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(shared_model) -> tuple[Path, Path]:
    """A tied student under a teacher with a wider, padded vocabulary."""
    return shared_model("llama-tied", 0), shared_model("llama", 1, extra_rows=9)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[dict]:
    """Two sets, whose 7 and few rows no number of ranks divides; one of them with masked tokens."""
    folder = tmp_path_factory.mktemp("sets")
    write_instructions(folder / "questions.jsonl", rows=7, seed=5)
    write_texts(folder / "prose.jsonl", rows=5, seed=6)
    return [{"path": str(folder / "questions.jsonl"), "prompt": "prompt", "response": "response"},
            {"path": str(folder / "prose.jsonl"), "name": "held-out"}]


@pytest.fixture
def recipe(pair, sets, text_file, tmp_path) -> Path:
    return write_recipe(tmp_path / "r.yaml", *pair, text_file, tmp_path / "run", data__eval=sets,
                        train__eval_every=2, data__prepared=str(tmp_path / "data"),
                        checkpoint__every=3)


@torch.no_grad()
def plain_metrics(student: Path, teacher: Path, prepared: Path) -> dict[str, float]:
    """One process, full logits in float64, document by document."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    nll, kl, same = [], [], []
    for ids, labels in itertools.chain.from_iterable(
            map(split_documents, read_batches(prepared, 1))):
        keep = labels != -100
        log_q, log_p = (m(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
                        for m in (model, guide))
        nll += (-log_q.gather(1, labels[keep, None])[:, 0]).tolist()
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        same += (log_q.argmax(-1) == log_p.argmax(-1)).tolist()
    loss = sum(nll) / len(nll)
    return {"tokens": len(nll), "loss": loss, "perplexity": torch.tensor(loss).exp().item(),
            "kl_to_teacher": sum(kl) / len(kl), "top1_agreement": sum(same) / len(same)}


def test_the_metrics_are_the_plain_models_on_any_layout_and_the_training_does_not_notice(pair,
                                                                                         recipe,
                                                                                         tmp_path):
    """On 2 ranks of ZeRO-3, on 2 × 2 with tensor parallelism, and without any evaluation."""
    actual = {}
    for name, ranks, tp in (("two", 2, 1), ("four", 4, 2)):
        run = tmp_path / name
        run_ranks(ranks, "train", recipe, f"output_dir={run}", f"tensor_parallel={tp}",
                  "train.steps=3")
        actual[name] = evaluations(run)
        assert [(line["step"], line["name"]) for line in actual[name]] == [
            (2, "questions"), (2, "held-out"), (3, "questions"), (3, "held-out")]
        for expected, line in zip(actual["two"], actual[name], strict=True):
            for metric in METRICS:
                assert line[metric] == pytest.approx(expected[metric], rel=1e-3), (name, metric)
            assert line["tokens"] == expected["tokens"]
    run_ranks(1, "export", tmp_path / "two", tmp_path / "exported")
    for line in actual["two"][2:]:
        truth = plain_metrics(tmp_path / "exported", pair[1],
                              tmp_path / "data" / "eval" / line["name"])
        assert {key: line[key] for key in truth} == pytest.approx(truth, rel=1e-4)
    run_ranks(2, "train", recipe, f"output_dir={tmp_path / 'without'}", "train.steps=3",
              "train.eval_every=0", "data.eval=[]")
    losses = [[(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name)]
              for name in ("two", "without")]
    assert losses[0] == losses[1] and evaluations(tmp_path / "without") == []


def test_a_resumed_run_has_every_evaluation_once_and_as_it_was(recipe, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, "train", recipe, "checkpoint.every=3")
    whole = evaluations(run)
    assert [line["step"] for line in whole] == [2, 2, 4, 4, 6, 6]
    # As if killed before its last save was finished.
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    assert "resumed after step 3" in run_ranks(2, "train", recipe).output()
    assert evaluations(run) == whole
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    curve = board.Scalars("eval/held-out/kl_to_teacher")
    assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in curve] == [
        (line["step"], line["kl_to_teacher"]) for line in whole if line["name"] == "held-out"]


def test_the_end_alone_is_evaluated_without_eval_every_and_without_a_teacher(recipe, tmp_path):
    run_ranks(1, "train", recipe, "train.eval_every=0", "teacher=null", "train.steps=2")
    lines = evaluations(tmp_path / "run")
    assert [(line["step"], line["kl_to_teacher"], line["top1_agreement"])
            for line in lines] == [(2, None, None)] * 2


def test_sets_of_one_name_and_an_interval_without_a_set_are_refused(recipe):
    with pytest.raises(InputError, match="two sets are called 'rows'"):
        load_recipe(recipe, ["data.eval=[{path: a/rows.jsonl}, {path: b/rows.jsonl}]"])
    with pytest.raises(InputError, match=r"`train.eval_every` is 2, and `data.eval` names no set"):
        load_recipe(recipe, ["data.eval=[]"])
    with pytest.raises(InputError, match=r"data.eval.0.weight` is unknown"):
        load_recipe(recipe, ["data.eval.0.weight=2"])


@pytest.mark.parametrize("workspace", [None, 1])
def test_the_first_choice_is_that_of_all_the_logits_over_the_vocabulary(workspace):
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw)
                            for shape in ((13, 8), (37, 8), (37,)))
    weight[5], bias[5] = weight[4], bias[4]  # equals: the lower id
    hidden[3] = 9 * weight[4]
    head = LMHead(weight, bias, softcap=3.0, scale=0.5)
    chosen = linear_argmax(hidden, head, vocab_size=30, workspace_bytes=workspace)
    assert chosen.tolist() == (hidden @ weight.T + bias)[:, :30].argmax(-1).tolist()
    assert chosen[3] == 4
