"""The main job: a run's numbers against a plain loop, other layouts and an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.models import make_model
from support.ranks import Ranks, run_ranks
from support.reference_loop import reference_loop
from support.runs import (
    BIN,
    comparable_metrics,
    count_steps,
    launch_train,
    rank_environment,
    read_metrics,
    write_recipe,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.data import PreparedLoader, load_tokenizer, tokenizer_fingerprint
from amid_ds.distributed.launch import free_port
from amid_ds.engine.backend import import_deepspeed

# Student, teacher: family, seed, padding of the vocabulary.
PAIRS = {
    "llama<-gpt2": (("llama", 0, 0), ("gpt2", 1, 33)),
    "qwen2-tied<-llama": (("qwen2-tied", 2, 0), ("llama", 3, 9)),
    "gpt2<-qwen2-tied": (("gpt2", 4, 0), ("qwen2-tied", 5, 1)),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, shared_model) -> list[Path]:
    return [shared_model(family, seed, extra_rows=rows)
            for family, seed, rows in PAIRS[request.param]]


def with_a_gradient(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The parts of a weight whose gradient is more than rounding, which Adam would scale up: no
    bias of attention's keys, which moves all of a query's scores alike."""
    if name.endswith("k_proj.bias"):
        return weight[:0]
    if name.endswith("attn.c_attn.bias"):
        query, _, value = weight.chunk(3)
        return torch.cat([query, value])
    return weight


def test_1_2_and_4_ranks_train_as_a_plain_loop_does_and_export_it(pair, instructions_file, tmp_path,
                                                                  request):
    recipe_file = write_recipe(tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run1",
                               data__prepared=str(tmp_path / "data"))
    recipe = yaml.safe_load(recipe_file.read_text())
    truth = None
    first = request.node.callspec.id == "llama<-gpt2"
    # 1 rank × 4 micro-batches, 2 × 2, 4 × 1, with unequal masks.
    for ranks in (1, 2, 4) if first else (2,):
        run, out = tmp_path / f"run{ranks}", tmp_path / f"out{ranks}"
        if ranks == 2 and first:
            # Under the deepspeed launcher.
            done = launch_train(ranks, recipe_file, f"output_dir={run}")
            assert done.returncode == 0, done.stderr
        else:
            run_ranks(ranks, "train", recipe_file, f"output_dir={run}")
        truth = truth or reference_loop(*pair, recipe, tmp_path / "data")
        lines, weights = truth
        got = read_metrics(run)
        assert [line["step"] for line in got] == list(range(1, 7))
        for expected, line in zip(lines, got, strict=True):
            assert line["router_aux_loss"] == 0
            for name, value in expected.items():
                assert line[name] == pytest.approx(value, rel=2e-4), (ranks, line["step"], name)
        assert main(["export", str(run), str(out)]) == 0
        exported = AutoModelForCausalLM.from_pretrained(out)
        assert (tokenizer_fingerprint(load_tokenizer(str(out)))
                == tokenizer_fingerprint(load_tokenizer(str(pair[0]))))
        for name, parameter in exported.named_parameters():
            torch.testing.assert_close(
                with_a_gradient(name, parameter.detach()), with_a_gradient(name, weights[name]),
                rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    saved = {path.name for path in (tmp_path / "run2" / "checkpoints" / "step_00000006").iterdir()}
    assert (tmp_path / "run2" / "checkpoints" / "latest").read_text() == "step_00000006"
    assert "manifest.json" in saved and all("teacher" not in name for name in saved)


def test_a_run_killed_after_a_save_carries_on_as_if_it_had_not_been(llama_pair, instructions_file,
                                                                    tmp_path):
    # Dropout is on in the student, so the random state of each step is compared as well.
    settings = {"train__steps": 12, "checkpoint__every": 3}
    student = make_model(tmp_path / "student", "gpt2", 0, resid_pdrop=0.1, attn_pdrop=0.1,
                         embd_pdrop=0.1)
    whole = write_recipe(tmp_path / "a.yaml", student, llama_pair[1], instructions_file,
                         tmp_path / "whole", **settings)
    killed = write_recipe(tmp_path / "b.yaml", student, llama_pair[1], instructions_file,
                          tmp_path / "killed", **settings)
    run_ranks(2, "train", whole)
    ranks = Ranks(2, "train", killed)
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert latest.exists(), "it was not killed half-way"
    assert len(read_metrics(tmp_path / "killed")) < 12, "it was not killed half-way"
    assert "resumed after step" in run_ranks(2, "train", killed).output()
    assert comparable_metrics(tmp_path / "killed") == comparable_metrics(tmp_path / "whole")
    # A finished run ends at once.
    assert "nothing to do" in run_ranks(2, "train", killed).output()


def test_sigterm_stops_in_order_with_75_and_the_next_start_goes_on(llama_pair, instructions_file,
                                                                   tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          train__steps=400)
    stopped = 0
    # A signal to one rank stops all.
    for number, asked in ((signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1])):
        ranks = Ranks(2, "train", recipe)
        ranks.wait_until(lambda stopped=stopped: count_steps(tmp_path / "run") >= stopped + 3)
        ranks.signal(number, *asked)
        assert ranks.wait() == [75, 75], ranks.output()
        assert "stopped in order" in ranks.output()
        stopped = len(read_metrics(tmp_path / "run"))
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}"
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_bf16_with_the_packaged_config_follows_fp32(llama_pair, instructions_file, tmp_path):
    for name in ("zero3.json", "zero3_fp32.json"):
        recipe = write_recipe(tmp_path / f"{name}.yaml", *llama_pair, instructions_file,
                              tmp_path / name, deepspeed=f"ds_configs/{name}")
        run_ranks(2, "train", recipe)
    bf16, fp32 = (read_metrics(tmp_path / name) for name in ("zero3.json", "zero3_fp32.json"))
    assert [line["loss"] for line in bf16] == pytest.approx([line["loss"] for line in fp32],
                                                            rel=2e-2)
    assert [line["loss"] for line in bf16] != [line["loss"] for line in fp32]


def test_activation_checkpointing_changes_no_loss(llama_pair, instructions_file, tmp_path):
    plain = write_recipe(tmp_path / "a.yaml", *llama_pair, instructions_file, tmp_path / "plain")
    saving = write_recipe(tmp_path / "b.yaml", *llama_pair, instructions_file, tmp_path / "saving",
                          student__activation_checkpointing=True)
    run_ranks(2, "train", plain)
    run_ranks(2, "train", saving)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)]
              for name in ("plain", "saving")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_without_a_teacher_it_is_plain_training_with_cross_entropy(llama_pair, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", llama_pair[0], None, text_file, tmp_path / "run",
                          train__steps=3, train__micro_batch_size=4)
    assert "no teacher" in run_ranks(1, "train", recipe).output()
    model = AutoModelForCausalLM.from_pretrained(llama_pair[0])
    rows = PreparedLoader(tmp_path / "run" / "data", seed=0, global_batch_size=4,
                          micro_batch_size=4, dp_rank=0, dp_size=1, workers=0).window(0)[0]
    logits = model(rows.input_ids).logits
    first = read_metrics(tmp_path / "run")[0]
    truth = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten()).item()
    assert first["loss"] == pytest.approx(truth, rel=1e-4)
    assert first["ce_loss"] == pytest.approx(first["loss"], rel=1e-6) and first["kd_loss"] is None
    metered = {key for key in first if key.startswith(("time/", "perf/", "memory/"))}
    named = {"step", "tokens", "loss", "kd_loss", "ce_loss", "grad_norm", "learning_rate", "alpha",
             "lam", "tokens_per_second", "padding", "data_wait", "router_aux_loss"}
    assert set(first) - metered == named
    assert 0 <= first["data_wait"] <= 1
    assert first["padding"] == pytest.approx(rows.padding / rows.input_ids.numel())
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["teacher"] is None and len(provenance["student"]["files_sha256"]) == 64


def test_the_resolved_recipe_reproduces_the_run(llama_pair, instructions_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "one",
                          train__steps=2)
    run_ranks(1, "train", recipe, "loss.alpha=0.5", "loss.order={pr: 0.25, rq: 0.75}")
    run_ranks(1, "train", tmp_path / "one" / "recipe.yaml", f"output_dir={tmp_path / 'two'}")
    assert comparable_metrics(tmp_path / "two") == comparable_metrics(tmp_path / "one")
    assert comparable_metrics(tmp_path / "one")[0]["alpha"] == 0.5


def test_no_op_of_deepspeeds_is_compiled_at_the_start(llama_pair, instructions_file, tmp_path,
                                                      monkeypatch):
    """It takes a minute, needs a compiler, and a process killed meanwhile leaves others waiting."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          train__steps=1)
    assert launch_train(0, recipe).returncode == 0
    assert not (tmp_path / "extensions").exists()


def test_deepspeed_imported_again_leaves_the_environment_as_it_is():
    """A PATH that grows with every import ends in child processes that cannot be started."""
    import_deepspeed()
    once = dict(os.environ)
    import_deepspeed()
    assert dict(os.environ) == once


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_nan_stops_the_run_with_step_rank_and_rows_named_and_no_step_taken(
        llama_pair, instructions_file, tmp_path, ranks):
    broken = make_model(tmp_path / "broken", "llama", 0)
    model = AutoModelForCausalLM.from_pretrained(broken)
    poisoned = AutoTokenizer.from_pretrained(broken)("with").input_ids[0]
    # Only rows with that word give NaN.
    model.model.embed_tokens.weight.data[poisoned] = float("nan")
    model.save_pretrained(broken)
    recipe = write_recipe(tmp_path / "r.yaml", broken, llama_pair[1], instructions_file,
                          tmp_path / "run", train__steps=20)
    done = launch_train(ranks, recipe)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("amid-ds: "):]
    assert "the loss of step 1 is nan" in message and "rank" in message and "rows.jsonl" in message
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node=2", "--master_port=PORT", "-m", "amid_ds"],
    # Ranks discovered through mpi4py.
    "mpirun": ["mpiexec", "-n", "2", "python", "-m", "amid_ds"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_start_the_same_training(launcher, llama_pair, instructions_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          train__steps=2)
    run_ranks(2, "train", recipe, f"output_dir={tmp_path / 'ours'}")
    program, *arguments = [part.replace("PORT", str(free_port())) for part in LAUNCHERS[launcher]]
    arguments = [str(BIN / part) if part == "python" else part for part in arguments]
    clean = {k: v for k, v in rank_environment().items()
             if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([str(BIN / program), *arguments, "train", str(recipe)], env=clean,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout
    assert comparable_metrics(tmp_path / "run") == comparable_metrics(tmp_path / "ours")
