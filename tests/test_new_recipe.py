"""`recipes new`: five answers become a recipe that loads, plans and trains; a wrong one nothing."""

from __future__ import annotations

import io
import shutil

import pytest
from support.data import write_jsonl
from support.ranks import run_ranks
from support.runs import read_metrics

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe


class Terminal(io.StringIO):
    """Answers that somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch, tmp_path, llama_pair, text_file, instructions_file):
    """answer(*lines): `recipes new distil.yaml` with these lines on stdin, in a folder with two
    models and rows of several kinds; the exit status."""
    monkeypatch.chdir(tmp_path)
    for name, model in zip(("small", "large"), llama_pair, strict=True):
        (tmp_path / name).symlink_to(model)
    shutil.copy(text_file, tmp_path / "text [1], all.jsonl")
    shutil.copy(instructions_file, tmp_path / "pairs.jsonl")
    write_jsonl(tmp_path / "odd.jsonl", [{"q": "the river", "a": "sings"}] * 3)
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": [{"role": "user", "content": "river"},
                                                         {"role": "assistant", "content": "A"}]}])

    def run(*lines: str, stdin: type[io.StringIO] = io.StringIO) -> int:
        monkeypatch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
        return main(["recipes", "new"])
    return run


def test_the_answers_are_a_recipe_that_loads_and_plans(answer, capsys):
    assert answer("small", "large", "text [1], all.jsonl", "100k tokens", "0") == 0
    shown = capsys.readouterr().out
    recipe = load_recipe("distil.yaml")
    assert (recipe.student.model, recipe.live_teacher.model) == ("small", "large")
    assert recipe.data.train[0].path == "text [1], all.jsonl" and recipe.data.train[0].is_text
    # The models have 128 positions; 8 rows a step.
    assert (recipe.train.seq_length, recipe.train.global_batch_size) == (128, 8)
    assert recipe.train.steps == 98 and recipe.output_dir == "runs/distil"
    assert [line.split("    #")[0].strip() for line in shown.splitlines()[-3:]] == [
        "amid-ds plan distil.yaml --device cpu", "amid-ds train distil.yaml",
        "amid-ds submit distil.yaml"]
    assert main(["plan", "distil.yaml", "--device", "cpu"]) == 0


def test_defaults_are_taken_and_ids_of_the_hub_left_for_later(answer, capsys):
    assert answer("owner/small", "", "pairs.jsonl", "", "") == 0
    recipe = load_recipe("distil.yaml")
    assert recipe.teacher is None and recipe.train.steps == 1000
    assert recipe.data.train[0].fields == ("prompt", "response")
    assert (recipe.train.global_batch_size, recipe.deepspeed) == (64, "ds_configs/zero3.json")
    assert "deepspeed --num_gpus 8 --module amid_ds train distil.yaml" in capsys.readouterr().out


def test_columns_of_other_names_are_asked_for(answer):
    assert answer("owner/small", "none", "odd.jsonl", "q, a", "3 epochs", "2") == 0
    recipe = load_recipe("distil.yaml")
    assert recipe.data.train[0].fields == ("q", "a")
    assert (recipe.train.steps, recipe.train.epochs) == (None, 3)


@pytest.mark.parametrize("lines, message", [
    (["smal l"], "there is no model 'smal l'"),
    (["small", "owner/large", "missing.jsonl"], "the data source 'missing.jsonl' is not there"),
    (["small", "none", "talks.jsonl"], "has no chat template"),
    (["owner/s", "none", "odd.jsonl", "q,b"], "the columns 'q,b'"),
    (["owner/s", "none", "pairs.jsonl", "a while"], "the length 'a while'"),
    (["owner/s", "none", "pairs.jsonl", "1.5 steps"], "the length '1.5 steps'"),
    (["owner/s", "none", "pairs.jsonl", "10", "many"], "'many' GPUs"),
    ([""], "an empty answer"),
    (["owner/s", "none"], "no answer to question 3")])
def test_a_wrong_or_missing_answer_on_stdin_leaves_nothing(answer, capsys, tmp_path, lines,
                                                           message):
    assert answer(*lines) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "distil.yaml").exists()


def test_a_teacher_of_another_tokenizer_is_refused(answer, capsys, shared_model, tmp_path):
    (tmp_path / "other").symlink_to(shared_model("gpt2", words=["the", "other"]))
    assert answer("small", "other") == 2
    assert "the student's tokenizer (small) and the teacher's (other) differ" in (
        capsys.readouterr().err)


def test_at_a_terminal_a_wrong_answer_is_asked_for_again(answer, capsys):
    assert answer("smal l", "owner/small", "none", "missing.jsonl", "pairs.jsonl", "x", "7", "", "",
                  stdin=Terminal) == 0
    shown = capsys.readouterr().out
    assert "no model 'smal l'" in shown and "the length 'x'" in shown
    assert load_recipe("distil.yaml").train.steps == 7


def test_ctrl_c_leaves_nothing(answer, monkeypatch, tmp_path):
    class Interrupted(io.StringIO):
        def readline(self, *_) -> str:
            raise KeyboardInterrupt

    assert answer(stdin=Interrupted) == 1
    assert not (tmp_path / "distil.yaml").exists()


def test_a_file_that_is_there_is_kept_and_nothing_is_asked(answer, capsys, tmp_path):
    (tmp_path / "distil.yaml").write_text("mine")
    assert answer("small") == 2
    shown = capsys.readouterr()
    assert "it is there" in shown.err and "Student" not in shown.out
    assert (tmp_path / "distil.yaml").read_text() == "mine"


@pytest.mark.slow
def test_the_recipe_trains(answer, tmp_path):
    assert answer("small", "large", "text [1], all.jsonl", "2 steps", "0") == 0
    run_ranks(2, "train", "distil.yaml")
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "distil")] == [1, 2]
