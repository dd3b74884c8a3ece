"""`amid-ds generate`: a teacher's answers ahead of time, the same on any ranks and over kills."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.data import write_instructions, write_texts
from support.ranks import Ranks, rank_main
from support.runs import write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main

NEW = 8
# A word that ends some of the answers.
END = "with"


@pytest.fixture(scope="module")
def teacher(shared_model) -> Path:
    return shared_model("llama", 0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("prompts") / "rows.jsonl", rows=43)


def arguments(model: Path, prompts: Path, out: Path, *more: object) -> list[object]:
    return ["generate", model, "--prompts", prompts, "--out", out, "--max-new-tokens", NEW,
            "--batch-size", 4, "--end-of-text", END, *more]


def test_greedy_answers_are_the_models_own_and_can_be_trained_on(teacher, prompts, shared_model,
                                                                 tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert main(list(map(str, arguments(teacher, prompts, out, "--temperature", 0)))) == 0
    model, tokenizer = (opener.from_pretrained(teacher)
                        for opener in (AutoModelForCausalLM, AutoTokenizer))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked
    end = tokenizer.convert_tokens_to_ids(END)
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end,
                                pad_token_id=2)
        answer = answer[0, ids.shape[1]:]
        assert row["ended"] == (answer[-1] == end)
        assert row["response"] == tokenizer.decode(answer[answer != end], skip_special_tokens=True)
    assert {row["ended"] for row in rows} == {True, False}
    printed = capsys.readouterr().out
    empty = sum(not row["response"] for row in rows)
    assert f"{len(rows)} answers" in printed and (f"{empty} are empty" in printed) == (empty > 0)
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama", 1), teacher, out,
                          tmp_path / "run", data__on_bad_row="skip")
    assert main(["prepare", str(recipe)]) == 0


def test_killed_it_carries_on_with_every_line_once_wherever_the_weights_lie(
        teacher, prompts, shared_model, tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main(list(map(str, arguments(teacher, prompts, whole)))) == 0  # alone, whole
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama", 1), teacher, prompts,
                          tmp_path / "run", deepspeed=str(write_gathering_config(tmp_path)))
    # Sharded, and gathered once.
    ranks = Ranks(2, *arguments(recipe, prompts, out))
    deadline = time.monotonic() + 90
    while not (Path(f"{out}.partial").is_file() and Path(f"{out}.partial").stat().st_size):
        alive = all(process.is_alive() for process in ranks.processes)
        assert alive and time.monotonic() < deadline, ranks.output()
        time.sleep(0.001)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert not out.exists()
    # And a line that was cut short.
    with open(f"{out}.partial", "a") as file:
        file.write('{"prompt": "the riv')
    # Gathered for each token.
    ranks = Ranks(2, *arguments(recipe, prompts, out), target=rank_short_of_memory)
    assert ranks.wait() == [0, 0], ranks.output()
    assert out.read_bytes() == whole.read_bytes() and not Path(f"{out}.partial").exists()
    again = list(map(str, arguments(teacher, prompts, out)))
    assert main(again) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*again, "--seed", "1"]) == 2
    assert "was made with something else: seed" in capsys.readouterr().err


def rank_short_of_memory(argv: list[str], variables: dict[str, str], log: str) -> None:
    from amid_ds.engine.engine import Engine

    Engine.fits_gathered = lambda *_: False
    rank_main(argv, variables, log)


def test_instructions_need_no_output_to_be_answered(teacher, tmp_path):
    rows = [{"instruction": "the river", "input": "over the stone"},
            {"instruction": "one {red} bird", "output": []}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    assert main(["generate", str(teacher), "--prompts", str(tmp_path / "asked.jsonl"), "--template",
                 "minillm", "--out", str(out), "--max-new-tokens", "2"]) == 0
    asked = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert [prompt.count("### Input:\nover the stone") for prompt in asked] == [1, 0]
    assert "one {red}" in asked[1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_whose_logits_are_nan_is_named_and_answers_nothing(teacher, prompts, tmp_path,
                                                                   capsys, temperature):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.lm_head.weight.data[5] = float("nan")
    shutil.copytree(teacher, tmp_path / "damaged")
    model.save_pretrained(tmp_path / "damaged")
    out = tmp_path / "answers.jsonl"
    assert main(list(map(str, arguments(tmp_path / "damaged", prompts, out, "--temperature",
                                        temperature)))) == 1
    assert "hold NaN or infinity" in capsys.readouterr().err and not out.exists()


BAD = {
    "a prompt without room": (["--max-new-tokens", "125"],
                              ["no room to generate 125", "128 positions"]),
    "an end of text that the tokenizer lacks": (["--end-of-text", "zebra"],
                                                ["'zebra'", "such as '<eos>'"]),
    "no such prompts": (["--prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "a column that is not there": (["--prompts", "TEXT"], ["text.jsonl", "'prompt'"]),
    "prompts in a text file": (["--prompts", "prompts.txt"], ["prompts.txt is plain text"]),
    "a top-p of 0": (["--top-p", "0"], ["--top-p 0.0", "(0, 1]"]),
    "a folder that is not there": (["--out", "nowhere/out.jsonl"], ["nowhere/out.jsonl"]),
    "a template that is not there": (["--template", "alpacca"], ["alpacca"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_the_remedy(case, teacher, prompts, tmp_path, capsys):
    more, named = BAD[case]
    text = write_texts(tmp_path / "text.jsonl", rows=3)
    argv = [*arguments(teacher, prompts, tmp_path / "out.jsonl"), *more]
    assert main([str(text) if word == "TEXT" else str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert "expected:" in message and "remedy:" in message and "Traceback" not in message
    assert [word for word in named if word not in message] == [], message
