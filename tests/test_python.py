"""The commands as functions: in one process time after time, in ranks, and a run as frames."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch.distributed as dist
from support.ranks import Ranks
from support.runs import (
    BIN,
    comparable_metrics,
    rank_environment,
    read_metrics,
    write_gathering_config,
    write_recipe,
)

import amid_ds
from amid_ds import InputError, Run, load_recipe
from amid_ds.cli import main
from amid_ds.config.strict import load_yaml


@pytest.fixture
def recipe(llama_pair, text_file, tmp_path) -> Path:
    """Two steps, an evaluation, a checkpoint."""
    return write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                        train__steps=2, checkpoint={"every": 1},
                        data__eval=[{"path": str(text_file), "name": "held", "text": "text"}],
                        deepspeed=str(write_gathering_config(tmp_path)))


class Steps(amid_ds.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, event) -> None:
        self.seen.append(event.step)


def notebook(paths: dict[str, str], argv: list[str], variables: dict[str, str], log: str) -> None:
    """What a notebook does in one process, one result after another to the file `log`.json."""
    out: dict[str, object] = {}
    recipe, folder = Path(paths["recipe"]), Path(paths["folder"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    environment = dict(os.environ)
    told = Steps()
    loaded = load_recipe(recipe)
    run = amid_ds.train(loaded, callbacks=[told])
    assert isinstance(run, Run) and run.recipe.train.steps == 2
    out["steps"] = told.seen
    out["scores"] = amid_ds.evaluate(run.model, data=paths["data"], teacher=paths["teacher"],
                                     seq_length=24).report()
    # A kernel may run what it is given in another thread.
    later: list[Run] = []
    content = load_yaml(recipe.read_text())
    thread = threading.Thread(target=lambda: later.append(amid_ds.train(
        content, [f"output_dir={folder / 'second'}"])))
    thread.start()
    thread.join()
    out["second"] = str(later[0].path)
    for wrong in (["train.steps=none"], ["train.callbacks=[a:B]"]):
        with pytest.raises(InputError):
            amid_ds.train(recipe, wrong)
    with pytest.raises(InputError):
        amid_ds.evaluate(folder / "nowhere", data=paths["data"])
    assert not dist.is_initialized() and dict(os.environ) == environment
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    Path(f"{log}.json").write_text(json.dumps(out))
    os._exit(0)


def test_a_notebook_trains_evaluates_and_trains_again_as_the_commands_do(
        recipe, llama_pair, text_file, tmp_path, capsys):
    paths = {"recipe": str(recipe), "folder": str(tmp_path), "data": str(text_file),
             "teacher": str(llama_pair[1])}
    process = Ranks(1, target=partial(notebook, paths))
    assert process.wait() == [0], process.output()
    out = json.loads(Path(f"{process.log(0)}.json").read_text())
    assert out["steps"] == [1, 2]
    first, second = Run(tmp_path / "run"), Run(out["second"])
    assert comparable_metrics(first.path) == comparable_metrics(second.path)
    assert main(["eval", str(first.model), "--teacher", str(llama_pair[1]), "--data",
                 str(text_file), "--seq-length", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == out["scores"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_finished_runs_tasks_are_judged_and_then_its_trackers_get_the_report(
        rank, recipe, monkeypatch):
    """So the report has their scores. By rank 0 alone."""
    done: list[str] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("amid_ds.training.train.run_training", lambda *_: done.append("train"))
    monkeypatch.setattr("amid_ds.cluster.task_jobs.TaskJobs.finish",
                        lambda self: done.append("tasks"))
    monkeypatch.setattr("amid_ds.experiments.report.attach_report",
                        lambda recipe: done.append("report"))
    amid_ds.train(recipe, ["train.trackers=[wandb]", "eval_tasks={every: 1, tasks: [arc_easy]}"])
    assert done == ["train", *(["tasks", "report"] if rank == "0" else [])]


def test_plan_is_the_commands(recipe, capsys):
    made = amid_ds.plan(recipe, "train.seq_length=32", nodes=2, ranks_per_node=2, device="h200")
    assert main(["plan", str(recipe), "train.seq_length=32", "--nodes", "2", "--ranks-per-node",
                 "2", "--device", "h200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["memory_per_rank"]["total"] == made.memory_per_rank["total"] > 0
    assert said["ranks"] == made.ranks == 4 and said["seconds_per_step"] == made.seconds_per_step
    assert said["fits"] == made.fits
    with pytest.raises(InputError, match="h2000"):
        amid_ds.plan(recipe, device="h2000")


def test_a_recipe_is_a_path_its_content_or_loaded_and_what_was_given_is_not_changed(recipe):
    content = load_yaml(recipe.read_text())
    before = json.dumps(content)
    of_file = load_recipe(recipe, ["train.steps=7"])
    assert load_recipe(content, ["train.steps=7"]) == of_file
    assert load_recipe(load_recipe(content), "train.steps=7") == of_file
    assert json.dumps(content) == before
    for wrong, words in ((7, "a recipe of type int"), ({"trian": {}}, "did you mean `train`"),
                         ({1: 2}, "Keys should be strings"), ({}, "`train` is missing")):
        with pytest.raises(InputError, match=words):
            load_recipe(wrong)


def test_a_run_is_frames_by_step_and_a_damaged_line_is_left_out(recipe, tmp_path):
    run = tmp_path / "a run"
    with pytest.raises(InputError, match="the folder of a run"):
        Run(run)
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text())
    assert Run(run).metrics().empty and list(Run(run).samples()["step"]) == []
    line = {"tokens": 96, "loss": 0.1 + 0.2, "tokens_per_second": 5.5, "ce_loss": None}
    steps = "\n".join(json.dumps({"step": step, **line}) for step in (2, 4))
    (run / "metrics.jsonl").write_text(f"{steps}\n{{\"step\": 6, \"tok")
    (run / "eval.jsonl").write_text("".join(
        json.dumps({"step": 4, "name": name, "loss": loss}) + "\n"
        for name, loss in (("a", 1.0), ("b", None))))
    metrics, evaluations = Run(run).metrics(), Run(str(run)).evaluations()
    assert list(metrics.index) == [2, 4] and list(metrics.columns) == ["step", *line]
    assert list(metrics["step"]) == [2, 4] == list(metrics.sort_values("step").index)
    assert list(metrics["loss"]) == [0.1 + 0.2] * 2 and metrics["tokens"].dtype == int
    assert metrics["ce_loss"].isna().all() and metrics["ce_loss"].dtype == float
    assert list(evaluations.index) == [4, 4] and list(evaluations["name"]) == ["a", "b"]
    assert evaluations["loss"].iloc[0] == 1.0 and pd.isna(evaluations["loss"].iloc[1])
    (run / "eval_tasks.jsonl").write_text('{"step": 4, "name": "arc_easy", "acc": 0.5}\n')
    assert Run(run).task_scores().loc[4].to_dict() == {
        "step": 4, "name": "arc_easy", "acc": 0.5}
    (run / "samples.jsonl").write_text(
        '{"step": 4, "number": 0, "prompt": "a", "student": "b", "teacher": null}\n')
    assert Run(run).samples().loc[4, "student"] == "b"
    assert Run(run).recipe == load_recipe(recipe) and Run(run).model == run / "model"
    assert repr(Run(run)) == f"Run('{run}')"


@pytest.mark.slow
def test_under_a_launcher_every_rank_of_a_script_trains_twice_and_hears_of_an_error(
        recipe, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os
import threading
import amid_ds

said = open("said" + os.environ["RANK"], "w")
for folder in ("one", "two"):
    run = amid_ds.train({str(recipe)!r}, [f"output_dir={tmp_path}/{{folder}}"])
    print(run.metrics()["loss"].iloc[-1], file=said)
def refused():
    try:
        amid_ds.train({str(recipe)!r}, ["train.steps=none"])
    except amid_ds.InputError as error:
        print("refused", file=said, flush=True)
thread = threading.Thread(target=refused)
thread.start()
thread.join()
""")
    done = subprocess.run([str(BIN / "torchrun"), "--nproc_per_node=2", "--standalone",
                           str(script)], env=rank_environment(), capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    loss = str(read_metrics(tmp_path / "one")[-1]["loss"])
    for rank in (0, 1):
        assert (tmp_path / f"said{rank}").read_text().split() == [loss, loss, "refused"]
    # Once, and not once a rank.
    assert done.stderr.count("train.steps") == 1
    assert comparable_metrics(tmp_path / "one") == comparable_metrics(tmp_path / "two")


@pytest.mark.slow
def test_an_interrupt_stops_a_notebooks_run_in_order(recipe, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal
import amid_ds

class Interrupts(amid_ds.Callback):
    def step(self, event):
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

try:
    amid_ds.train({str(recipe)!r}, ["train.steps=50"], callbacks=[Interrupts()])
except amid_ds.Stopped:
    print("STOPPED")
run = amid_ds.train({str(recipe)!r}, ["train.steps=5", "checkpoint.allow_change=[train.steps]"])
print("STEPS", list(run.metrics().index))
""")
    done = subprocess.run([sys.executable, str(script)], env=rank_environment(), cwd=tmp_path,
                          capture_output=True, text=True)
    assert "STOPPED" in done.stdout and "STEPS [1, 2, 3, 4, 5]" in done.stdout, (
        done.stdout + done.stderr)
    assert len(read_metrics(tmp_path / "run")) == 5
