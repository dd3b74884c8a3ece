"""`eval --tasks` and `eval_tasks`: tasks on this disk through the real harness, on one and two
ranks, against plain transformers; refusals; a run whose checkpoints are judged."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.ranks import run_ranks
from support.runs import write_recipe
from support.tasks import CHOICE, GENERATION, PERPLEXITY, make_documents, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds import evaluate
from amid_ds.cli import main
from amid_ds.cluster.task_jobs import TaskJobs
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.eval import run_tasks as run_tasks_module
from amid_ds.eval.run_tasks import judge_run, judged_steps, keep_for_tasks, kept_steps, step_lease
from amid_ds.files.lease import Lease, LeaseLostError
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_task_scores
from amid_ds.training.callbacks import CheckpointEvent

DOCUMENTS = 9


@pytest.fixture(scope="module")
def model(shared_model) -> Path:
    return shared_model("llama", 0)


@pytest.fixture(scope="module")
def tasks(model, tmp_path_factory) -> list[Path]:
    """A task of each kind; of the second, every other document asks for the model's own words."""
    folder = tmp_path_factory.mktemp("tasks") / "with a space"
    documents = make_documents(DOCUMENTS)
    generated = [{**document, "continuation": greedy(model, document["question"]) if index % 2
                  else "nothing of the kind"} for index, document in enumerate(documents)]
    return [write_task(folder, "choosing", CHOICE, documents),
            write_task(folder, "telling", GENERATION, generated),
            write_task(folder, "reading", PERPLEXITY, documents),
            write_task(folder, "one", CHOICE, documents[:1])]


def names(tasks: list[Path]) -> str:
    return ",".join(map(str, tasks))


def scored(capsys, *arguments: object) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def plain_model(folder: Path) -> tuple:
    return (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
            AutoTokenizer.from_pretrained(folder))


@torch.no_grad()
def greedy(folder: Path, prompt: str) -> str:
    """The text of the six most probable tokens after the prompt, one by one."""
    model, tokenizer = plain_model(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(GENERATION["generation_kwargs"]["max_gen_toks"]):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, text: str) -> float:
    """log p(text | context) in nats."""
    ids, start = tokenizer(context + text)["input_ids"], len(tokenizer(context)["input_ids"])
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids)))


def plain_scores(folder: Path, documents: list[dict]) -> dict[str, float]:
    model, tokenizer = plain_model(folder)
    right, right_by_length, words, nats = 0, 0, 0, 0.0
    for document in documents:
        choices = document["choices"]
        sums = [log_likelihood(model, tokenizer, document["question"], f" {choice}")
                for choice in choices]
        by_length = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right += sums.index(max(sums)) == document["answer"]
        right_by_length += by_length.index(max(by_length)) == document["answer"]
        words += len(document["question"].split())
        # This tokenizer has no beginning of text: the harness takes the end of one.
        ids = [tokenizer.eos_token_id, *tokenizer(document["question"])["input_ids"]]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats += sum(float(log_p[place, token]) for place, token in enumerate(ids[1:]))
    return {"acc": right / len(documents), "acc_norm": right_by_length / len(documents),
            "word_perplexity": math.exp(-nats / words)}


def test_the_harness_scores_as_a_plain_loop_in_float64_beside_our_own_scores(
        model, tasks, text_file, capsys):
    found = scored(capsys, model, "--tasks", names(tasks), "--data", text_file, "--seq-length", 32)
    expected = plain_scores(model, make_documents(DOCUMENTS))
    assert 0 < expected["acc"] < 1
    assert found["tasks"]["choosing"]["acc"] == expected["acc"]
    assert found["tasks"]["choosing"]["acc_norm"] == expected["acc_norm"]
    share = expected["acc"]
    assert found["tasks"]["choosing"]["acc_stderr"] == pytest.approx(
        math.sqrt(share * (1 - share) / (DOCUMENTS - 1)))
    assert found["tasks"]["telling"]["exact_match"] == 4 / DOCUMENTS
    assert found["tasks"]["reading"] == {
        "word_perplexity": pytest.approx(expected["word_perplexity"], rel=1e-5)}
    own = scored(capsys, model, "--data", text_file, "--seq-length", 32)
    assert "tasks" not in own and own == {key: found[key] for key in own}


def test_with_a_chat_template_a_prompt_is_the_users_message(model, tasks, tmp_path, capsys):
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    plain, tokenizer = plain_model(folder)
    tokenizer.chat_template = "{% for turn in messages %}the {{ turn.content }} then {% endfor %}"
    tokenizer.save_pretrained(folder)
    documents = make_documents(DOCUMENTS)
    chosen = []
    for document in documents:
        prompt = f"the {document['question']} then "
        sums = [log_likelihood(plain, tokenizer, prompt, choice) for choice in document["choices"]]
        chosen.append(sums.index(max(sums)))
    right = sum(choice == document["answer"]
                for choice, document in zip(chosen, documents, strict=True))
    found = scored(capsys, folder, "--tasks", tasks[0], "--apply-chat-template")
    assert found["tasks"]["choosing"]["acc"] == right / DOCUMENTS
    assert right / DOCUMENTS != plain_scores(model, documents)["acc"]


def test_two_ranks_score_uneven_and_single_documents_as_one_process_does(model, tasks, capsys):
    alone = scored(capsys, model, "--tasks", names(tasks))
    assert alone["loss"] is None and alone["rouge_l"] is None
    output = run_ranks(2, "eval", model, "--tasks", names(tasks), "--json").output()
    [printed] = [line for line in output.splitlines() if line.startswith("{")]
    assert json.loads(printed) == alone


def test_one_table_has_our_scores_and_the_benchmarks(model, tasks, text_file, capsys):
    assert main(["eval", str(model), "--tasks", str(tasks[0]), "--limit", "1", "--data",
                 str(text_file), "--seq-length", "32"]) == 0
    table = capsys.readouterr().out
    first = plain_scores(model, make_documents(1))["acc"]
    assert re.search(rf"choosing +│ acc +│ +{first:.4f} ", table), table
    assert "perplexity" in table and "acc_norm" in table
    found = evaluate(model, tasks=tasks[:1], limit=1)
    assert found.tasks["choosing"]["acc"] == first and found.loss is None


@pytest.mark.parametrize("arguments, named", [
    ([], "neither --data nor --tasks"),
    (["--tasks", "gone.yaml"], "gone.yaml is not there"),
    (["--tasks", "a,,b"], "names with commas"),
    (["--tasks", "a", "--limit", "0"], "--limit 0"),
    (["--data", "x.jsonl", "--limit", "1"], "--limit without --tasks"),
    (["--tasks", "a", "--teacher", "t"], "--teacher without --data")])
def test_what_makes_no_sense_is_refused(tmp_path, capsys, arguments, named):
    assert main(["eval", str(tmp_path), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_task_is_refused_with_near_names_before_the_model_is_looked_for(
        tasks, monkeypatch, capsys):
    """The harness's own list is a small folder here; to read the whole takes it seconds."""
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tasks[0].parent / "manager.py"))
    assert main(["eval", "nomodel", "--tasks", "chosing,reading"]) == 2
    error = capsys.readouterr().err
    assert "'chosing'" in error and "did you mean choosing?" in error and "Traceback" not in error


@pytest.mark.slow
def test_the_real_list_knows_its_tasks_and_what_is_near(capsys):
    assert main(["eval", "nomodel", "--tasks", "arc_esy"]) == 2
    assert "arc_easy" in capsys.readouterr().err
    # Known, and its data are not here.
    assert main(["eval", "nomodel", "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert "allenai/ai2_arc" in error and "HF_HUB_OFFLINE" in error


def test_a_task_that_cannot_be_loaded_or_run_is_one_message(model, tmp_path, capsys):
    broken = write_task(tmp_path, "broken", {**CHOICE, "test_split": "gone"}, make_documents(2))
    assert main(["eval", "nomodel", "--tasks", str(broken)]) == 2
    assert "broken.yaml cannot be loaded" in capsys.readouterr().err
    long = write_task(tmp_path, "long", {**GENERATION, "generation_kwargs": {
        "until": ["\n"], "max_gen_toks": 100_000}, "doc_to_target": ""}, make_documents(2))
    assert main(["eval", str(model), "--tasks", str(long)]) == 2
    assert "100000" in capsys.readouterr().err
    unsafe = write_task(tmp_path, "unsafe", {**CHOICE, "unsafe_code": True}, make_documents(2))
    assert main(["eval", "nomodel", "--tasks", str(unsafe)]) == 2
    assert "unsafe runs code that the model writes" in capsys.readouterr().err
    (tmp_path / "group.yaml").write_text("group: all\ntask: [broken, long]\n")
    assert main(["eval", "nomodel", "--tasks", str(tmp_path / "group.yaml")]) == 2
    assert "group.yaml defines a group" in capsys.readouterr().err
    plain = write_task(tmp_path, "plain", CHOICE, make_documents(2))
    assert main(["eval", str(model), "--tasks", str(plain), "--apply-chat-template"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_missing_harness_is_named_with_the_line_that_installs_it(
        llama_pair, text_file, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(llama_pair[0]), "--tasks", str(tasks[0])]) == 2
    assert "pip install 'amid-ds[tasks]'" in capsys.readouterr().err
    # A run says so before it trains.
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          eval_tasks={"every": 100, "tasks": [str(tasks[0])]})
    assert main(["train", str(recipe)]) == 2
    assert "pip install 'amid-ds[tasks]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tasks_are_of_steps_that_have_a_checkpoint(llama_pair, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          eval_tasks={"every": 150, "tasks": ["arc_easy"]})
    with pytest.raises(InputError, match="set it to 200"):
        load_recipe(recipe)


@pytest.fixture(scope="module")
def trained(llama_pair, text_file, tmp_path_factory) -> Path:
    """The folder of a run of 4 steps that has the checkpoints of 3 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "r.yaml", *llama_pair, text_file, folder / "run",
                          train__steps=4, checkpoint__every=1)
    run_ranks(1, "train", recipe)
    return folder / "run"


@pytest.fixture
def run(trained, tasks, tmp_path) -> RunFolder:
    """A copy of that run, whose recipe asks for tasks now."""
    run = RunFolder(tmp_path / "a run")
    shutil.copytree(trained, run.path)
    recipe = yaml.safe_load(run.recipe.read_text())
    recipe |= {"output_dir": str(run.path),
               "eval_tasks": {"every": 1, "tasks": [str(tasks[0]), str(tasks[2])]}}
    run.recipe.write_text(yaml.safe_dump(recipe))
    return run


def test_what_is_kept_outlives_the_runs_own_checkpoint_and_is_judged_once_as_its_export_is(
        run, tasks, tmp_path, capsys):
    checkpoint = run.checkpoints / "step_00000003"
    assert keep_for_tasks(run, checkpoint) and not keep_for_tasks(run, checkpoint)
    kept = run.task_checkpoints / checkpoint.name
    assert os.path.samefile(kept / "manifest.json", checkpoint / "manifest.json")
    shutil.move(checkpoint, tmp_path / "moved")
    (run.task_checkpoints / "somebody's").mkdir()
    assert main(["tasks", str(run.path)]) == 0
    shutil.move(tmp_path / "moved", checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    exported = scored(capsys, tmp_path / "exported", "--tasks", names([tasks[0], tasks[2]]))
    assert read_task_scores(run.path) == [
        {"step": 3, "name": name, **metrics} for name, metrics in exported["tasks"].items()]
    assert [path.name for path in run.task_checkpoints.iterdir()] == ["somebody's"]
    assert not keep_for_tasks(run, checkpoint)


def test_a_step_that_another_process_judges_is_left_to_it(run, capsys):
    for step in (3, 4):
        keep_for_tasks(run, run.checkpoints / f"step_0000000{step}")
    with Lease.held(step_lease(run, 3), "the step"):
        assert main(["tasks", str(run.path)]) == 0
        assert "step 3 is another process's" in capsys.readouterr().out
    assert judged_steps(run) == {4} and kept_steps(run) == {3}


def test_a_step_that_was_scored_before_its_folder_went_is_not_scored_again(run, monkeypatch):
    keep_for_tasks(run, run.checkpoints / "step_00000003")
    run.task_scores.write_text('{"step": 3, "name": "choosing", "acc": 0.5}\n')
    with monkeypatch.context() as patch:
        # The process is killed while it removes.
        patch.setattr(shutil, "rmtree", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judge_run(str(run.path))
    assert os.listdir(run.task_checkpoints / "step_00000003") == ["manifest.json"]
    judge_run(str(run.path))
    assert len(read_task_scores(run.path)) == 1 and kept_steps(run) == set()


def test_a_step_that_cannot_be_judged_waits_and_holds_no_other_up(run, capsys):
    for step in (3, 4):
        keep_for_tasks(run, run.checkpoints / f"step_0000000{step}")
    damaged = run.task_checkpoints / "step_00000003" / "manifest.json"
    damaged.rename(damaged.with_name("somebody's"))
    assert main(["tasks", str(run.path)]) == 2
    assert "step_00000003" in capsys.readouterr().err
    assert judged_steps(run) == {4} and kept_steps(run) == {3}


def test_a_process_that_was_replaced_while_it_was_suspended_writes_no_scores(run, monkeypatch):
    keep_for_tasks(run, run.checkpoints / "step_00000003")

    def replaced(*arguments: object, **options: object) -> dict:
        step_lease(run, 3).unlink()
        return {"choosing": {"acc": 0.5}}
    monkeypatch.setattr(run_tasks_module, "run_tasks", replaced)
    with pytest.raises(LeaseLostError):
        judge_run(str(run.path))
    assert read_task_scores(run.path) == [] and kept_steps(run) == {3}


@pytest.mark.slow
def test_a_run_has_its_checkpoints_and_the_last_one_judged_at_its_end(
        llama_pair, text_file, tasks, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          train__steps=5, checkpoint__every=1,
                          eval_tasks={"every": 2, "tasks": [str(tasks[2])]})
    output = run_ranks(2, "train", recipe).output()
    lines = read_task_scores(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 5], output
    assert len({line["word_perplexity"] for line in lines}) == 3
    last = scored(capsys, tmp_path / "run" / "model", "--tasks", tasks[2])["tasks"]["reading"]
    assert lines[2] == {"step": 5, "name": "reading", **last}
    # Nothing is left to do, nor done, by a start of the finished run.
    run_ranks(1, "train", recipe)
    assert read_task_scores(tmp_path / "run") == lines
    # What fails leaves the run finished, and the step waiting.
    (tmp_path / "run" / "eval_tasks.jsonl").unlink()
    shutil.move(tasks[2].with_suffix(".jsonl"), tmp_path / "away")
    again = run_ranks(1, "train", recipe).output()
    shutil.move(tmp_path / "away", tasks[2].with_suffix(".jsonl"))
    assert "cannot be loaded" in again and "to judge what waits: amid-ds tasks" in again
    assert kept_steps(RunFolder(tmp_path / "run")) == {5}


SBATCH = """#!/bin/sh
echo "$@" >> {folder}/calls
env | grep -c ^SLURM_ >> {folder}/variables
[ ! -e {folder}/refuses ] || { echo "no such partition" >&2; exit 1; }
echo 77
"""


def test_in_a_job_another_is_submitted_for_a_step_once_and_a_refusal_ends_no_run(
        run, tmp_path, monkeypatch, caplog):
    """A script stands for sbatch: tests/test_slurm.py has a real one."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH.replace("{folder}", str(tmp_path)))
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "fast")
    (tmp_path / "refuses").touch()
    events = [CheckpointEvent(run.path, step, run.checkpoints / f"step_0000000{step}")
              for step in (3, 4)]

    # Not a step that `every` divides.
    TaskJobs(load_recipe(run.recipe, ["eval_tasks.every=5"])).checkpoint(events[0])
    assert kept_steps(run) == set()

    def attempt() -> TaskJobs:
        jobs = TaskJobs(load_recipe(run.recipe))
        for event in (*events, *events):
            jobs.checkpoint(event)
        return jobs

    attempt()
    assert kept_steps(run) == {3, 4}
    [refusal] = [record for record in caplog.records if "no such partition" in record.message]
    assert f"amid-ds tasks '{run.path}'" in refusal.message
    (tmp_path / "refuses").unlink()
    # The run goes on: its steps wait and have no job, which its end sees to, once for all.
    jobs = attempt()
    jobs.finish()
    jobs.finish()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(call.endswith(str(run.path)) for call in calls)
    script = (run.task_checkpoints / "job.sbatch").read_text()
    assert "#SBATCH --partition=fast\n" in script and f"PYTHON={sys.executable}\n" in script
    assert set((tmp_path / "variables").read_text().split()) <= {"0", "1"}


def test_a_report_has_the_scores_by_task_and_step(run, tmp_path, capsys):
    lines = [{"step": step, "name": name, "acc": 0.5 + step / 100, "acc_stderr": None}
             for step in (3, 4) for name in ("choosing", "<b>")]
    run.task_scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run.path), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<td>choosing</td><td>acc</td><td>0.53</td><td>0.54</td>" in page
    assert "<td>&lt;b&gt;</td><td>acc_stderr</td><td>–</td><td>–</td>" in page
