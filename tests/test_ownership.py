"""What amid-ds did not make, it neither removes nor overwrites; and a run never reads over itself.

Each refused input was an attack that destroyed something.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.data import write_texts
from support.runs import write_recipe

from amid_ds.cli import main
from amid_ds.files import ownership
from amid_ds.files.lease import Holder, Lease, process_start_ticks
from amid_ds.files.ownership import new_folder

OLD_RUNS = Path(__file__).parent / "fixtures" / "old_runs"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


@pytest.fixture
def here(tmp_path, llama_pair, monkeypatch) -> Path:
    """A folder to work in, with a recipe r.yaml of a run in P, a corpus and a model."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus" / "shards"
    corpus.mkdir(parents=True)
    for name in ("a", "b"):
        write_texts(corpus / f"{name}.jsonl")
    (corpus / "notes.txt").write_text("the only copy\n")
    shutil.copytree(llama_pair[0], tmp_path / "base")
    write_recipe(tmp_path / "r.yaml", Path("base"), None, corpus / "a.jsonl", Path("P"),
                 data__train=[{"path": "corpus/shards/*.jsonl"}])
    return tmp_path


@pytest.fixture
def refused(here, capsys) -> Callable[..., str]:
    """refused(*argv): the message; the command ends with 2 and leaves everything as it was."""
    def run(*argv: str) -> str:
        before = contents(here)
        assert main([str(word) for word in argv]) == 2
        assert contents(here) == before
        message = capsys.readouterr().err
        assert "expected:" in message and "remedy:" in message and "Traceback" not in message
        return message
    return run


def test_preparing_into_the_users_corpus_leaves_it_whole(refused):
    for command in ("prepare", "train"):
        message = refused(command, "r.yaml", "data.prepared=corpus")
        assert "not amid-ds's own" in message and "shards" in message


def test_preparing_over_data_in_the_runs_own_place_leaves_them_whole(refused, here):
    (here / "P").mkdir()
    shutil.move(here / "corpus", here / "P" / "data")
    assert "data" in refused("prepare", "r.yaml", "data.train=[{path: P/data/shards/*.jsonl}]")


@pytest.mark.parametrize("role", ["student.model", "teacher.model", None])
def test_a_model_where_the_run_would_leave_its_own_is_refused_at_the_check(refused, here, role):
    (here / "P").mkdir()
    shutil.copytree(here / "base", here / "P" / "model")
    message = refused("train", "r.yaml", *([f"{role}=P/model"] if role else []))
    assert "P" in message and "model" in message


OVERLAPS = {
    "the student inside the prepared data": ["student.model=D/base", "data.prepared=D"],
    "the student around the run": ["output_dir=base/run"],
    "the teacher around the prepared data": ["teacher.model=base", "data.prepared=base/data"],
    "a data folder around the run": ["data.train=[{path: corpus}]", "output_dir=corpus/run"],
    "a pattern around the run": ["data.train=[{path: 'corpus/**/*.jsonl'}]",
                                 "output_dir=corpus/run"],
    "a data file inside the prepared data": ["data.prepared=LINK"],
    "the prepared data are the run": ["data.prepared=P"],
    "the prepared data around the run": ["data.prepared=W", "output_dir=W/run"],
    "the prepared data in the run's checkpoints": ["data.prepared=P/checkpoints"],
    "the prepared data in a tracker's folder": ["data.prepared=P/mlflow"],
    "the prepared data in what waits to be judged": ["data.prepared=P/eval_tasks"],
    "a DeepSpeed config in the run's place": ["deepspeed=corpus/../Q/logs/ds.json",
                                              "output_dir=Q"],
    "the folder that one is in": ["output_dir=."],
    "the root": ["output_dir=/"],
    "a file instead of the run's folder": ["output_dir=r.yaml"],
    "a folder of somebody else's": ["output_dir=corpus"],
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_inputs_equal_to_inside_or_around_outputs_are_refused(case, refused, here):
    (here / "LINK").symlink_to(here / "corpus")
    (here / "D").mkdir()
    shutil.copytree(here / "base", here / "D" / "base")
    (here / "Q" / "logs").mkdir(parents=True)
    shutil.copy(Path(__file__).parent.parent / "ds_configs" / "zero3_fp32.json",
                here / "Q" / "logs" / "ds.json")
    for command in ("prepare", "train"):
        refused(command, "r.yaml", *OVERLAPS[case])


def test_a_run_or_data_inside_what_another_run_replaces_are_refused(refused, here):
    shutil.copytree(OLD_RUNS / "stream", here / "run")
    for place in ("checkpoints", "model", "start/deeper"):
        assert "another run" in refused("train", "r.yaml", f"output_dir=run/{place}/again")
        assert "another run" in refused("prepare", "r.yaml", f"data.prepared=run/{place}/data")


def test_data_of_an_evaluation_set_that_are_not_ours_are_refused_before_anything(refused, here):
    (here / "D" / "eval" / "held" / "shards").mkdir(parents=True)
    write_texts(here / "D" / "eval" / "held" / "shards" / "held.jsonl")
    refused("prepare", "r.yaml", "data.prepared=D",
            "data.eval=[{path: corpus/shards/b.jsonl, name: held}]")


def test_named_data_that_another_version_prepared_are_refused_as_such(here, capsys):
    assert main(["prepare", "r.yaml", "data.prepared=D"]) == 0
    for name in ("plan.json", "manifest.json"):
        text = (here / "D" / name).read_text()
        assert '"format": 3' in text
        (here / "D" / name).write_text(text.replace('"format": 3', '"format": 2'))
    capsys.readouterr()
    assert main(["prepare", "r.yaml", "data.prepared=D"]) == 2
    message = capsys.readouterr().err
    assert "prepared by another version" in message and "or remove this one" in message


def test_what_is_legal_stays_so(here, capsys):
    """A recipe and logs in the run's folder, a hidden file, the data inside it; a second time."""
    (here / "P" / "logs").mkdir(parents=True)
    for name in ("mine.yaml", "logs/1.log", ".gitignore"):
        (here / "P" / name).write_text((here / "r.yaml").read_text())
    for _ in range(2):
        assert main(["prepare", "P/mine.yaml"]) == 0, capsys.readouterr().err
    assert (here / "P" / "data" / "manifest.json").exists()
    # Data inside the own folder are prepared anew for another length; what is not ours stays.
    (here / "P" / "data" / "shards" / "mine.jsonl").write_text("{}\n")
    assert main(["prepare", "P/mine.yaml", "train.seq_length=16"]) == 0, capsys.readouterr().err
    assert json.loads((here / "P/data/plan.json").read_text())["seq_length"] == 16
    assert (here / "P" / "data" / "shards" / "mine.jsonl").read_text() == "{}\n"
    # A warm start was killed after it had exported its weights.
    shutil.copytree(here / "base", here / "P" / "start")
    (here / "P" / "start" / "README.md").write_text("tags: [distillation, amid-ds]\n")
    assert main(["prepare", "P/mine.yaml", "train.seq_length=16"]) == 0, capsys.readouterr().err
    (here / "P" / "start" / "README.md").write_text("a model of mine\n")
    assert main(["prepare", "P/mine.yaml", "train.seq_length=16"]) == 2


def test_a_recipe_written_by_hand_is_not_replaced_by_the_resolved_one(refused, here):
    (here / "P").mkdir()
    shutil.move(here / "r.yaml", here / "P" / "recipe.yaml")
    assert "recipe.yaml" in refused("train", "P/recipe.yaml", "output_dir=P")


def test_data_that_are_being_prepared_or_read_are_not_replaced_by_others(refused, here, capsys):
    assert main(["prepare", "r.yaml"]) == 0
    capsys.readouterr()
    with open(here / "P" / "data" / "plan.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "being prepared by another process" in refused("prepare", "r.yaml",
                                                              "train.seq_length=16")
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    try:
        facts = vars(Holder.this_process()) | {"pid": process.pid,
                                               "started": process_start_ticks(process.pid)}
        (here / "P" / "lease.json").write_text(json.dumps(facts))
        assert "is in use by process" in refused("prepare", "r.yaml", "train.seq_length=16")
        # The same plan is shared.
        assert main(["prepare", "r.yaml"]) == 0
    finally:
        process.kill()
        process.wait()


def test_a_study_a_demo_and_a_tokenizer_go_into_no_folder_of_somebody_elses(refused, here):
    (here / "S").mkdir()
    shutil.copytree(here / "corpus", here / "S" / "corpus")
    for command in ("study", "demo"):
        refused(command, "--out", "S")
    assert "not empty" in refused("tokenizer", "train", "r.yaml", "base", "--vocab-size", "310")
    refused("tokenizer", "train", "r.yaml", ".", "--vocab-size", "310")


def test_an_export_leaves_its_neighbours_alone(here, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(shutil.copytree(OLD_RUNS, tmp_path / "old"))
    for name in (".out.tmp", ".out.old", ".out.mine", f".out{ownership.STAGING_SIGN}mine"):
        (tmp_path / "e" / name).mkdir(parents=True)
        (tmp_path / "e" / name / "thesis.tex").write_text("the only copy")
    before = contents(tmp_path / "e")
    # What a killed export of ours has left goes.
    left = tmp_path / "e" / f".out{ownership.STAGING_SIGN}host.1"
    left.mkdir()
    (left / "model.safetensors").touch()
    assert main(["export", "stream", str(tmp_path / "e" / "out")]) == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "e" / "out")
    assert contents(tmp_path / "e") == before
    (tmp_path / "old" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "old" / "empty")
    for out in (".", "", "..", "../stream", "../stream/checkpoints/step_00000004/out"):
        before = contents(tmp_path / "old")
        capsys.readouterr()
        assert main(["export", "../stream", out]) == 2
        assert "remedy:" in capsys.readouterr().err and contents(tmp_path / "old") == before


def test_of_two_makers_of_one_folder_the_second_is_refused_and_an_error_leaves_nothing(tmp_path):
    from amid_ds.errors import InputError

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as staging:
        (staging / "part").touch()
        with pytest.raises(InputError, match="in use by process"), new_folder(tmp_path / "out"):
            pass
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as staging:
        (staging / "part").touch()
    assert contents(tmp_path) == {"out": None, "out/part": b""}


def test_generate_stops_at_no_file_of_the_users_and_overwrites_none(here, capsys):
    (here / "prompts.jsonl").write_text('{"prompt": "the river"}\n')
    for name in ("STOP", "answers.jsonl", "other.jsonl.made"):
        (here / name).write_text("mine\n")
    before = contents(here)
    argv = ["generate", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", "2", "--out"]
    for out in ("answers.jsonl", "other.jsonl", "prompts.jsonl", "", ".", "corpus"):
        assert main([*argv, out]) == 2 and "remedy:" in capsys.readouterr().err
    assert contents(here) == before
    # Another process generates there: this one, as it happens.
    with Lease.held(here / "out.jsonl.lease.json", "the output"):
        assert main([*argv, "out.jsonl"]) == 2 and "is in use by" in capsys.readouterr().err
    assert contents(here) == before
    assert main([*argv, "out.jsonl"]) == 0
    after = contents(here)
    assert {name for name in after if name not in before} == {"out.jsonl", "out.jsonl.made"}
    assert {name: after[name] for name in before} == before


def test_pages_and_recipes_are_written_over_no_other_file(refused, here, monkeypatch, capsys):
    shutil.copytree(OLD_RUNS / "stream", here / "run")
    for out in ("", ".", "corpus", "r.yaml", "run/metrics.jsonl"):
        refused("report", "run", "-o", out)
    for name in ("../study", "../x", "", "nothing"):
        assert "no recipe" in refused("recipes", "copy", name)
    assert "cannot be written" in refused("recipes", "copy", "study", "r.yaml")
    for _ in range(2):
        assert main(["report", "run", "-o", "page.html"]) == 0


def test_a_sweep_goes_into_no_folder_of_somebody_elses(refused, here):
    sweep = ("sweep", "r.yaml", "train.seed=0,1", "--dry-run")
    assert "output_dir" in refused(*sweep, "output_dir=corpus")
    (here / "P").mkdir()
    for name in ("sweep.csv", "sweep.md", "losses.png"):
        (here / "P" / name).write_text("mine\n")
        assert name in refused(*sweep)
        (here / "P" / name).unlink()


def test_a_student_that_leads_back_to_its_own_run_is_refused_with_the_chain(refused, here):
    chain = {"A": "B", "B": "C", "C": "A", "P": "P"}
    for name, student in chain.items():
        recipe = yaml.safe_load((here / "r.yaml").read_text())
        recipe |= {"student": {"model": student}, "output_dir": name}
        (here / name).mkdir()
        (here / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        shutil.copy(OLD_RUNS / "stream" / "provenance.json", here / name)
    for command in ("plan", "prepare", "train"):
        message = refused(command, "r.yaml", "student.model=A", "output_dir=N")
        assert "A -> B -> C -> A" in message
        refused(command, "P/recipe.yaml")


@pytest.mark.parametrize("how", ["missing", "an empty place of a mount", "unreadable"])
def test_a_run_whose_checkpoints_are_out_of_sight_does_not_start_over(how, tmp_path, monkeypatch,
                                                                      capsys):
    old = Path(shutil.copytree(OLD_RUNS, tmp_path / "old"))
    monkeypatch.chdir(old)
    run = old / "stream"
    shutil.move(run / "checkpoints", tmp_path / "away")
    if how == "an empty place of a mount":
        (run / "checkpoints").mkdir()
    elif how == "unreadable":
        (run / "checkpoints").write_text("a file in its place")
    before = contents(run)
    assert main(["train", "stream.yaml"]) == 1
    message = capsys.readouterr().err
    assert "had 4 steps" in message and "mounted" in message and "Traceback" not in message
    assert contents(run) == before
