"""Callbacks: what a run tells classes of the user's own, and how it ends where one fails."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from support.ranks import Ranks, rank_main
from support.runs import BIN, rank_environment, read_metrics, write_recipe

from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.training.callbacks import Callback, Callbacks, load_callbacks

# Modules of a user, which lie in the folder that the run is started in.
MODULES = {
    "writes.py": """
import json, os
from amid_ds import Callback

class Recorder(Callback):
    def __init__(self):
        self.file = open("told.jsonl", "a", buffering=1)

    def write(self, **facts):
        print(json.dumps({"rank": os.environ["RANK"], **facts}), file=self.file)

    def step(self, event):
        lines = (event.run / "metrics.jsonl").read_text().splitlines() or ["null"]
        self.write(event="step", step=event.step, metrics=event.metrics, last=json.loads(lines[-1]))
        event.metrics["loss"] = None

    def evaluation(self, event):
        line = (event.run / "eval.jsonl").read_text().splitlines()[-1]
        self.write(event="evaluation", step=event.step, sets=event.sets, last=json.loads(line))
        event.sets.clear()

    def checkpoint(self, event):
        self.write(event="checkpoint", step=event.step, name=event.checkpoint.name,
                   latest=(event.run / "checkpoints" / "latest").read_text())
""",
    "fails.py": """
import sys

class InStep:
    def step(self, event):
        if event.step == 3:
            secret = {}
            secret["missing"]

class InEvaluation:
    def evaluation(self, event):
        raise FileNotFoundError("no such table")

class InLastCheckpoint:
    def checkpoint(self, event):
        if event.step == 6:
            sys.exit("enough")
""",
    "broken.py": "import no_such_package\n",
    "typo.py": "def step(event:\n",
    "shapes.py": """
class Needs:
    def __init__(self, argument): pass
    def step(self, event): pass

class Empty:
    def on_step(self, event): pass

class Narrow:
    def step(self): pass

class Later:
    async def step(self, event): pass

class Never:
    def step(self, event): yield

def function(event): pass
"""}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with MODULES, the current one; what a test imports from it is forgotten."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/elsewhere", *filter(None, __import__("sys").path)])
    for name in MODULES:
        monkeypatch.delitem(__import__("sys").modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def rank_in(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    os.chdir(folder)
    rank_main(argv, variables, log)


@pytest.fixture
def ranks_with(llama_pair, text_file, folder):
    """ranks_with(callbacks, **changes): two ranks of a run of 6 steps with two evaluations and two
    checkpoints, started in `folder`."""
    def start(*callbacks: str, size: int = 2, **changes: object) -> Ranks:
        settings = {"train__callbacks": list(callbacks), "train__eval_every": 3,
                    "data__eval": [{"path": str(text_file), "name": "held", "text": "text"}],
                    "checkpoint": {"every": 3}, **changes}
        recipe = write_recipe(folder / "r.yaml", *llama_pair, text_file, folder / "run", **settings)
        return Ranks(size, "train", recipe, target=partial(rank_in, str(folder)))
    return start


def test_a_callback_hears_on_rank_0_of_every_step_evaluation_and_checkpoint_once_it_is_there(
        ranks_with, folder):
    assert ranks_with("writes:Recorder", train__log_every=2).wait() == [0, 0]
    told = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
    assert {line["rank"] for line in told} == {"0"}
    steps, evaluations, checkpoints = ([line for line in told if line["event"] == event]
                                       for event in ("step", "evaluation", "checkpoint"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    logged = {line["step"]: line for line in read_metrics(folder / "run")}
    assert list(logged) == [2, 4, 6]
    for line in steps:
        if line["step"] in logged:
            # The loss too: what a callback does to its copy changes nothing.
            assert {"step": line["step"], **line["metrics"]} == line["last"] == logged[line["step"]]
        else:
            assert line["metrics"]["loss"] > 0 and "time/step" not in line["metrics"]
    lines = [json.loads(line) for line in (folder / "run" / "eval.jsonl").read_text().splitlines()]
    assert [line["last"] for line in evaluations] == lines and len(lines) == 2
    for line, written in zip(evaluations, lines, strict=True):
        assert {"step": line["step"], "name": "held", **line["sets"]["held"]} == written
    assert [(line["step"], line["name"]) for line in checkpoints] == [
        (3, "step_00000003"), (6, "step_00000006")]
    assert all(line["latest"] == line["name"] for line in checkpoints)


@pytest.mark.parametrize(("name", "event", "step", "error", "saved"), [
    ("InStep", "step", 3, "KeyError: 'missing'", 3),
    pytest.param("InEvaluation", "evaluation", 3, "FileNotFoundError: no such table", 3,
                 marks=pytest.mark.slow),
    pytest.param("InLastCheckpoint", "checkpoint", 6, "SystemExit: enough", 6,
                 marks=pytest.mark.slow)])
def test_a_callback_that_fails_ends_all_ranks_with_1_its_traceback_and_what_was_trained_saved(
        ranks_with, folder, name, event, step, error, saved):
    settings = {"checkpoint": {"every": 100}} if name != "InLastCheckpoint" else {}
    ranks = ranks_with(f"fails:{name}", **settings)
    assert ranks.wait() == [1, 1], ranks.output()
    said = ranks.output()
    assert f"fails:{name} failed in `{event}` of step {step}: {error}" in said
    # The user's own line, and nobody else's traceback.
    assert said.count("Traceback") == 1 and f"{folder}/fails.py" in said
    assert "Traceback" not in ranks.output(1)
    assert (folder / "run" / "checkpoints" / "latest").read_text() == f"step_{saved:08d}"
    ended = json.loads((folder / "run" / "attempts.jsonl").read_text().splitlines()[-1])
    assert ended["status"] == 1 and f"fails:{name}" in ended["failure"]["error"]
    if event == "step":
        return
    # Without the callback the run goes on from there.
    assert ranks_with(size=1).wait() == [0]
    assert [line["step"] for line in read_metrics(folder / "run")] == [1, 2, 3, 4, 5, 6]
    assert (folder / "run" / "model").is_dir()


@pytest.mark.parametrize(("name", "words"), [
    ("absent:Class", ["No module named 'absent'", "PYTHONPATH", "this is {folder}"]),
    ("absent.inner:Class", ["No module named 'absent'", "PYTHONPATH"]),
    ("broken:Class", ["No module named 'no_such_package'", "{folder}/broken.py:1"]),
    ("typo:Class", ["SyntaxError", "typo.py, line 1"]),
    ("writes:Recoder", ["writes has no class Recoder", "did you mean `Recorder`"]),
    ("shapes:function", ["shapes has no class function"]),
    ("shapes:Needs", ["TypeError", "argument", "made without arguments"]),
    ("shapes:Empty", ["shapes:Empty is told of nothing", "step, evaluation, checkpoint"]),
    ("shapes:Narrow", ["`step` of the callback shapes:Narrow", "def step(self, event)"]),
    ("shapes:Later", ["`step` of the callback shapes:Later"]),
    ("shapes:Never", ["`step` of the callback shapes:Never"]),
    ("sys:Missing", ["sys has no class Missing"])])
def test_what_is_no_callback_is_refused_by_name(folder, name, words):
    with pytest.raises(InputError) as refused:
        load_callbacks([name])
    for word in words:
        assert word.format(folder=folder) in str(refused.value)


def test_a_callback_that_is_no_callback_ends_all_ranks_with_2_before_anything_is_made(
        ranks_with, folder):
    ranks = ranks_with("shapes:Needs")
    assert ranks.wait() == [2, 2]
    assert ranks.output().count("amid-ds: ") == 1 and "Traceback" not in ranks.output()
    assert ranks.output(1) == "" and not (folder / "run").exists()


def test_any_object_with_an_event_is_told_and_a_class_is_not():
    class Steps:
        def step(self, event: object) -> None:
            pass

    class Evaluations(Callback):
        def evaluation(self, event: object) -> None:
            pass

    objects = [Steps(), Evaluations()]
    assert load_callbacks([], objects) == objects
    for wrong, words in ((Steps, "is a class"), (Callback(), "is told of nothing"),
                         (print, "is told of nothing")):
        with pytest.raises(InputError, match=words):
            load_callbacks([], [wrong])


def test_what_a_callback_raises_is_the_cause_of_the_runs_error_and_nobody_is_told_after_it(
        tmp_path):
    class Fails:
        def evaluation(self, event: object) -> None:
            raise KeyError("missing")

    class Counts:
        steps = 0

        def step(self, event: object) -> None:
            self.steps += 1

    counts = Counts()
    callbacks = Callbacks(tmp_path, [Fails(), counts])
    callbacks.step(1, {"loss": 1.0})
    callbacks.evaluation(1, {})
    callbacks.step(2, {"loss": 1.0})
    with pytest.raises(TrainingError, match=r"Fails failed in `evaluation` of step 1") as failed:
        World(0, 1, torch.device("cpu")).run_checked(callbacks.check)
    assert repr(failed.value.__cause__) == "KeyError('missing')" and counts.steps == 1


@pytest.mark.slow
def test_the_command_looks_for_callbacks_in_its_folder_and_plan_does_not(
        llama_pair, text_file, folder):
    (folder / "writes.py").write_text(MODULES["writes.py"] + "\nprint('imported')\n")
    recipe = write_recipe(folder / "r.yaml", *llama_pair, text_file, folder / "run",
                          train__steps=1, train__callbacks=["writes:Recorder"])
    for command in ("plan", "train"):
        done = subprocess.run([str(BIN / "amid-ds"), command, str(recipe)], cwd=folder, text=True,
                              env={**rank_environment(), "RANK": "0", "WORLD_SIZE": "1"},
                              capture_output=True)
        assert done.returncode == (command == "plan" and "does not fit" in done.stderr)
        assert ("imported" in done.stdout) == (command == "train"), done.stdout + done.stderr
