"""The main job: a run's numbers against a plain loop, other layouts and an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.data import StepData, fingerprint, load_tokenizer

PAIRS = {      # student, teacher: three families, tied and not, a teacher with a padded, wider vocabulary
    "llama<-gpt2": (("llama", 0, 0), ("gpt2", 1, 33)),
    "qwen2-tied<-llama": (("qwen2-tied", 2, 0), ("llama", 3, 9)),
    "gpt2<-qwen2-tied": (("gpt2", 4, 0), ("qwen2-tied", 5, 1)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.make_instructions(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    (student, *student_seed), (teacher, *teacher_seed) = PAIRS[request.param]
    return (small.make_model(folder / "student", student, *student_seed),
            small.make_model(folder / "teacher", teacher, *teacher_seed))


def plain_loop(student: Path, teacher: Path, recipe: dict,
               prepared: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What the recipe means, in plain transformers and torch: one process, full logits, document by document, the
    formula written out."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    train, loss = recipe["train"], recipe["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=train["learning_rate"], weight_decay=0.01)
    rows = StepData(prepared, seed=0, global_batch_size=train["global_batch_size"], micro_batch_size=1, dp_rank=0,
                    dp_size=1, workers=0)
    lines = []
    for step in range(train["steps"]):
        warm = train["warmup_steps"]
        after = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (train["steps"] - warm))).item())
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * ((step + 1) / warm if step < warm else after)
        kd = ce = tokens = 0
        for ids, labels in itertools.chain.from_iterable(map(small.documents, rows.window(step))):
            keep = labels != -100
            log_q = model(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
            with torch.no_grad():
                log_p = guide(ids).logits[0, keep, :vocabulary].double().log_softmax(-1)
            log_r = torch.log(loss["lam"] * log_p.exp() + (1 - loss["lam"]) * log_q.exp())
            kd = kd + (log_p.exp() * (log_p - log_r)).sum()
            ce = ce + F.nll_loss(log_q, labels[keep], reduction="sum")
            tokens += int(keep.sum())
        total = (kd + loss["ce_weight"] * ce) / tokens
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({"loss": total.item(), "kd_loss": (kd / tokens).item(), "ce_loss": (ce / tokens).item(),
                      "grad_norm": norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
    return lines, {name: p.detach() for name, p in model.named_parameters()}


def test_1_2_and_4_ranks_train_as_a_plain_loop_does_and_export_it(pair, data, tmp_path, request):
    recipe_file = small.make_recipe(tmp_path / "r.yaml", *pair, data, tmp_path / "run1",
                                    data__prepared=str(tmp_path / "data"))
    recipe = yaml.safe_load(recipe_file.read_text())
    truth = None
    first = request.node.callspec.id == "llama<-gpt2"
    for ranks in (1, 2, 4) if first else (2,):      # 1 rank × 4 micro-batches, 2 × 2, 4 × 1, with unequal masks
        run, out = tmp_path / f"run{ranks}", tmp_path / f"out{ranks}"
        if ranks == 2 and first:
            done = small.train(ranks, recipe_file, f"output_dir={run}")      # the deepspeed launcher
            assert done.returncode == 0, done.stderr
        else:
            small.run(ranks, "train", recipe_file, f"output_dir={run}")
        truth = truth or plain_loop(*pair, recipe, tmp_path / "data")
        lines, weights = truth
        got = small.metrics(run)
        assert [line["step"] for line in got] == list(range(1, 7))
        for expected, line in zip(lines, got, strict=True):
            for name, value in expected.items():
                assert line[name] == pytest.approx(value, rel=2e-4), (ranks, line["step"], name)
        assert main(["export", str(run), str(out)]) == 0
        exported = AutoModelForCausalLM.from_pretrained(out)
        assert fingerprint(load_tokenizer(str(out))) == fingerprint(load_tokenizer(str(pair[0])))
        for name, parameter in exported.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-3, atol=2e-4,
                                       msg=lambda m, n=name: f"{n}: {m}")
    saved = {path.name for path in (tmp_path / "run2" / "checkpoints" / "step_00000006").iterdir()}
    assert (tmp_path / "run2" / "checkpoints" / "latest").read_text() == "step_00000006"
    assert "manifest.json" in saved and all("teacher" not in name for name in saved)


@pytest.fixture(scope="module")
def llama_pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return (small.make_model(folder / "student", "llama", 0),
            small.make_model(folder / "teacher", "llama", 1, hidden_size=64, intermediate_size=96))


def comparable(run: Path) -> list[dict]:
    timed = ("tokens_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed and "/" not in k} for line in small.metrics(run)]


def test_a_run_killed_after_a_save_carries_on_as_if_it_had_not_been(llama_pair, data, tmp_path):
    # Dropout is on in the student, so the random state of each step is compared as well.
    settings = {"train__steps": 12, "checkpoint__every": 3}
    student = small.make_model(tmp_path / "student", "gpt2", 0, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
    whole = small.make_recipe(tmp_path / "a.yaml", student, llama_pair[1], data, tmp_path / "whole", **settings)
    killed = small.make_recipe(tmp_path / "b.yaml", student, llama_pair[1], data, tmp_path / "killed", **settings)
    small.run(2, "train", whole)
    ranks = small.Ranks(2, "train", killed)
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert latest.exists() and len(small.metrics(tmp_path / "killed")) < 12, "it was not killed half-way"
    assert "resumed after step" in small.run(2, "train", killed).text()
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    assert "nothing to do" in small.run(2, "train", killed).text()      # a finished run says so and ends


def test_sigterm_stops_in_order_with_75_and_the_next_start_goes_on(llama_pair, data, tmp_path):
    recipe = small.make_recipe(tmp_path / "r.yaml", *llama_pair, data, tmp_path / "run", train__steps=400)
    stopped = 0
    for number, asked in ((signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1])):      # one rank asked is all asked
        ranks = small.Ranks(2, "train", recipe)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(small.metrics(tmp_path / "run")) < stopped + 3:
            assert time.monotonic() < deadline, ranks.text()
            time.sleep(0.01)
        ranks.signal(number, *asked)
        assert ranks.wait() == [75, 75], ranks.text()
        assert "stopped in order" in ranks.text()
        stopped = len(small.metrics(tmp_path / "run"))
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}"
    steps = [line["step"] for line in small.metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_bf16_with_the_packaged_config_follows_fp32(llama_pair, data, tmp_path):
    for name in ("zero3.json", "zero3_fp32.json"):
        recipe = small.make_recipe(tmp_path / f"{name}.yaml", *llama_pair, data, tmp_path / name,
                                   deepspeed=f"ds_configs/{name}")
        small.run(2, "train", recipe)
    bf16, fp32 = (small.metrics(tmp_path / name) for name in ("zero3.json", "zero3_fp32.json"))
    assert [line["loss"] for line in bf16] == pytest.approx([line["loss"] for line in fp32], rel=2e-2)
    assert [line["loss"] for line in bf16] != [line["loss"] for line in fp32]


def test_activation_checkpointing_changes_no_loss(llama_pair, data, tmp_path):
    plain = small.make_recipe(tmp_path / "a.yaml", *llama_pair, data, tmp_path / "plain")
    saving = small.make_recipe(tmp_path / "b.yaml", *llama_pair, data, tmp_path / "saving",
                               student__activation_checkpointing=True)
    small.run(2, "train", plain)
    small.run(2, "train", saving)
    losses = [[line["loss"] for line in small.metrics(tmp_path / name)] for name in ("plain", "saving")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_without_a_teacher_it_is_plain_training_with_cross_entropy(llama_pair, tmp_path):
    text = small.make_text(tmp_path / "text.jsonl")
    recipe = small.make_recipe(tmp_path / "r.yaml", llama_pair[0], None, text, tmp_path / "run", train__steps=3,
                               train__micro_batch_size=4)
    assert "no teacher" in small.run(1, "train", recipe).text()
    model = AutoModelForCausalLM.from_pretrained(llama_pair[0])
    rows = StepData(tmp_path / "run" / "data", seed=0, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1,
                    workers=0).window(0)[0]
    logits = model(rows.input_ids).logits
    first = small.metrics(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten()).item(), rel=1e-4)
    assert first["ce_loss"] == pytest.approx(first["loss"], rel=1e-6) and first["kd_loss"] is None
    metered = {key for key in first if key.startswith(("time/", "perf/", "memory/"))}
    named = {"step", "tokens", "loss", "kd_loss", "ce_loss", "grad_norm", "learning_rate", "alpha", "lam",
             "tokens_per_second", "padding", "data_wait"}
    assert set(first) - metered == named
    assert 0 <= first["data_wait"] <= 1 and first["padding"] == pytest.approx(rows.padding / rows.input_ids.numel())
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["teacher"] is None and len(provenance["student"]["files_sha256"]) == 64


def test_the_resolved_recipe_reproduces_the_run(llama_pair, data, tmp_path):
    recipe = small.make_recipe(tmp_path / "r.yaml", *llama_pair, data, tmp_path / "one", train__steps=2)
    small.run(1, "train", recipe, "loss.alpha=0.5", "loss.order={pr: 0.25, rq: 0.75}")
    small.run(1, "train", tmp_path / "one" / "recipe.yaml", f"output_dir={tmp_path / 'two'}")
    assert comparable(tmp_path / "two") == comparable(tmp_path / "one")
    assert comparable(tmp_path / "one")[0]["alpha"] == 0.5


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_nan_stops_the_run_with_step_rank_and_rows_named_and_no_step_taken(llama_pair, data, tmp_path, ranks):
    broken = small.make_model(tmp_path / "broken", "llama", 0)
    model = AutoModelForCausalLM.from_pretrained(broken)
    poisoned = AutoTokenizer.from_pretrained(broken)("with").input_ids[0]
    model.model.embed_tokens.weight.data[poisoned] = float("nan")      # only rows with that word go wrong
    model.save_pretrained(broken)
    recipe = small.make_recipe(tmp_path / "r.yaml", broken, llama_pair[1], data, tmp_path / "run", train__steps=20)
    done = small.train(ranks, recipe)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("amid-ds: "):]
    assert "the loss of step 1 is nan" in message and "rank" in message and "rows.jsonl" in message
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node=2", "--master_port=PORT", "-m", "amid_ds"],
    "mpirun": ["mpiexec", "-n", "2", "python", "-m", "amid_ds"],      # ranks discovered through mpi4py
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_start_the_same_training(launcher, llama_pair, data, tmp_path):
    recipe = small.make_recipe(tmp_path / "r.yaml", *llama_pair, data, tmp_path / "run", train__steps=2)
    small.run(2, "train", recipe, f"output_dir={tmp_path / 'ours'}")
    program, *arguments = [part.replace("PORT", str(small.free_port())) for part in LAUNCHERS[launcher]]
    arguments = [str(small.BIN / part) if part == "python" else part for part in arguments]
    clean = {k: v for k, v in small.environment().items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([str(small.BIN / program), *arguments, "train", str(recipe)], env=clean, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout
    assert comparable(tmp_path / "run") == comparable(tmp_path / "ours")
