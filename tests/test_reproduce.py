"""`amid-ds reproduce`, end to end with tiny models and made-up rows in the published formats."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import statistics
from pathlib import Path

import pytest
from support.data import write_jsonl
from support.models import WORDS, make_model
from support.ranks import Ranks
from support.runs import count_steps, read_metrics

from amid_ds.cli import main
from amid_ds.config.published import published
from amid_ds.eval.protocol import PROTOCOLS
from amid_ds.experiments import reproduce, sweep
from amid_ds.run import attempts
from amid_ds.run.log import read_evaluations

# Beside the recipe: what makes it small.
SMALLER = ["train.epochs=null", "train.steps=2", "train.global_batch_size=2",
           "train.micro_batch_size=2", "train.seq_length=96", "train.eval_every=1",
           "train.log_every=1", "data.workers=0", "data.eval.0.generate.max_new_tokens=4",
           "rollout.max_new_tokens=8"]
SEEDS = ["--seeds", "10,20"]


def row(number: int, several: bool = False) -> dict[str, object]:
    """A row as the authors' processed files have it; references are one text or a list."""
    words = [WORDS[(number * step) % len(WORDS)] for step in range(1, 9)]
    output = " ".join(words[3:])
    return {"instruction": f"the {words[0]} {words[1]}", "input": words[2] if number % 2 else "",
            "output": [output, "a bird runs"] if several else output}


def minillm(row: dict) -> str:
    """The prompt that MiniLLM's scripts make of a row, with their sign for a line end."""
    return ("Below is an instruction that describes a task"
            + (", paired with an input that provides further context" if row["input"] else "")
            + ". Write a response that appropriately completes the request.<n><n>### Instruction:"
            + f"<n>{row['instruction']}<n><n>"
            + (f"### Input:<n>{row['input']}<n><n>" if row["input"] else "") + "### Response:<n>")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """--models and --data: folders as the authors publish them, small."""
    root = tmp_path_factory.mktemp("authors")
    for seed, name in enumerate(("init-gpt2-120M", "teacher-gpt2-1.5B")):
        make_model(root / "models" / name, "gpt2", seed, n_positions=512)
    data = root / "data"
    # Dolly and Self-Instruct: one reference; Vicuna's questions have a category and no input;
    # S-NI and UnNI have several references, and fields of their own.
    files = {"dolly/raw.jsonl": [row(n) for n in range(1009)],
             "dolly/valid.jsonl": [{**row(n), "prompt": "another"} for n in range(3)],
             "self-inst/valid.jsonl": [{"id": f"user_oriented_task_{n}", **row(n),
                                        "prompt": minillm(row(n))} for n in range(2)],
             "vicuna/valid.jsonl": [{"question_id": n, "category": "generic", **row(2 * n)}
                                    for n in range(2)],
             "sinst/11_/valid.jsonl": [{"id": f"task{n}", "split": "test", **row(n, True)}
                                       for n in range(3)],
             "uinst/11_/valid.jsonl": [{"topic": "", **row(n, n > 1)} for n in range(4)],
             "openwebtext/part.jsonl": [{"text": " ".join(WORDS)}] * 20}
    for name, rows in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(data / name, rows)
    raw = data / "dolly" / "raw.jsonl"
    # A line separator within a text, as it stands: no end of a row.
    raw.write_text(raw.read_text().replace("the ", "the\u2028", 1))
    return ["--models", str(root / "models"), "--data", str(data)]


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The commands that are started: training in a rank, evaluation in this process."""
    commands: list[str] = []

    def wait(arguments, log, run, resumes=True) -> int:
        words = arguments[arguments.index("amid_ds") + 1:]
        commands.append(words[0])
        if words[0] == "train":
            ranks = Ranks(1, *words)
            return ranks.wait()[0] or log.write(ranks.output().encode()) * 0
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = main([*words, "--new-tokens", "4"])
        log.write(printed.getvalue().encode())
        return status

    monkeypatch.setattr(sweep, "_wait", wait)
    monkeypatch.setattr(reproduce, "HELD_OUT_ROWS", 2)
    return commands


def test_a_row_is_trained_selected_evaluated_and_printed_beside_the_published_one(
        inputs, started, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["reproduce", "amid", *inputs, *SEEDS, "--out", str(out), *SMALLER]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    assert "dolly/valid.jsonl: in 3 of 3 rows the column `prompt`" in said
    assert "self-inst/valid.jsonl: in" not in said
    assert started == ["train", *["eval"] * 5]
    result = json.loads((out / "reproduced.json").read_text())
    paper = published().rows["amid"]
    assert result["published"] == {**paper.rouge_l, "average": 23.40}
    assert list(result["rouge_l"]) == [*published().sets, "average"] and result["seeds"] == [10, 20]
    assert result["model"] == str(out / "run" / "best") and (out / "run" / "best").is_dir()
    ours = {}
    for name in published().sets:
        ours[name] = json.loads((out / "scores" / f"{name}_10-20.json").read_text())
        assert result["rouge_l"][name] == 100 * ours[name]["rouge_l"] > 0
        assert result["rouge_l_std"][name] == 100 * ours[name]["rouge_l_std"]
        assert result["rouge_l_sem"][name] == 100 * ours[name]["rouge_l_sem"]
        assert ours[name]["protocol"] == result["protocol"]
    assert result["protocol"] == (
        "minillm (changed): seq_length=512 seeds=10,20 new_tokens=4 prompt_tokens=256 keep=first "
        "no_repeat_ngram=6 prompts=10000 temperature=1.0 top_p=1.0 dtype=fp32")
    mean = statistics.fmean(100 * each["rouge_l"] for each in ours.values())
    assert result["rouge_l"]["average"] == pytest.approx(mean)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()
             if line.startswith("|")]
    assert lines[0] == ["ROUGE-L", *published().sets, "average"]
    assert lines[2] == ["published: AMiD", "26.44", "13.74", "16.76", "29.71", "30.35", "23.40"]
    assert lines[3] == ["here", *(f"{100 * each['rouge_l']:.2f}" for each in ours.values()),
                        f"{mean:.2f}"]
    assert [line[0] for line in lines[4:]] == ["here: ± standard deviation over the seeds",
                                               "here: ± standard error"]
    assert lines[4][1:6] == [f"{100 * each['rouge_l_std']:.2f}" for each in ours.values()]
    # Two rows are held out and the others train, in the order of the file.
    parts = [(out / "data/dolly" / name).read_text() for name in ("heldout.jsonl", "train.jsonl")]
    assert parts[0].count("\n") == 2
    assert "".join(parts) == (Path(inputs[3]) / "dolly" / "raw.jsonl").read_text()
    assert [line["step"] for line in read_evaluations(out / "run")] == [1, 2]
    # Again: nothing is done twice. Half killed: what is missing is done.
    before = (out / "reproduced.json").read_text()
    (out / "scores" / "vicuna_10-20.json").unlink()
    # Older than the model: another one's.
    os.utime(out / "scores" / "sinst_10-20.json", (0, 0))
    assert main(command) == 0 and started == ["train", *["eval"] * 7]
    assert (out / "reproduced.json").read_text() == before
    assert main([*command, "loss.lam=0.3"]) == 2
    assert "reproduces something else" in capsys.readouterr().err


def test_missing_models_and_data_are_all_named_before_anything_is_made(inputs, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "data" / "vicuna").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "vicuna" / "valid.jsonl", [row(1)])
    out = tmp_path / "out"
    assert main(["reproduce", "amid", "--models", str(tmp_path / "models"), "--data",
                 str(tmp_path / "data"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    expected = ["models/init-gpt2-120M", "models/teacher-gpt2-1.5B", "data/dolly/raw.jsonl",
                "data/dolly/valid.jsonl", "data/self-inst/valid.jsonl", "data/openwebtext",
                "data/sinst/11_/valid.jsonl", "data/uinst/11_/valid.jsonl", "remedy:"]
    assert [name for name in expected if name not in message] == []
    assert str(tmp_path / "data/vicuna") not in message and not out.exists()


@pytest.mark.parametrize(("break_it", "words", "named"), [
    # Each set's problem, not the first one's alone.
    (lambda models, data: [(data / name / "valid.jsonl").open("a").write('{"instruction": "x"}\n')
                           for name in ("vicuna", "sinst/11_")], [],
     ["vicuna/valid.jsonl line 3", "sinst/11_/valid.jsonl line 4"]),
    (lambda models, data: write_jsonl(data / "dolly/raw.jsonl", [row(1)] * 2), [],
     ["raw.jsonl has 2 rows", "more than the 2"]),
    (lambda models, data: (models / "teacher-gpt2-1.5B/model.safetensors").write_text("oid"), [],
     ["the weights of", "teacher-gpt2-1.5B cannot be read"]),
    (lambda models, data: (data / "openwebtext/part.jsonl").unlink(), [], ["openwebtext"]),
    (lambda models, data: None, ["--ranks-per-node", "3", "train.global_batch_size=8"],
     ["3 data-parallel rank(s)"])])
def test_what_training_or_evaluation_would_refuse_is_refused_before_anything_is_made(
        inputs, tmp_path, capsys, monkeypatch, break_it, words, named):
    monkeypatch.setattr(reproduce, "HELD_OUT_ROWS", 2)
    models, data = (shutil.copytree(inputs[place], tmp_path / name)
                    for place, name in ((1, "models"), (3, "data")))
    break_it(models, data)
    out = tmp_path / "out"
    assert main(["reproduce", "amid", "--models", str(models), "--data", str(data), "--out",
                 str(out), *SEEDS, *SMALLER, *words]) == 2
    message = capsys.readouterr().err
    assert [word for word in named if word not in message] == [], message
    assert not out.exists()


def test_the_rows_are_of_the_protocol_that_is_followed():
    protocol = PROTOCOLS[reproduce.PROTOCOL]
    assert list(protocol.seeds) == published().seeds
    assert {each.rows for each in published().sets.values()} == {None, protocol.prompts}


@pytest.mark.parametrize("name", published().rows)
def test_every_published_row_is_a_recipe_on_the_authors_files(name, inputs, tmp_path):
    args = reproduce.ReproduceArgs(name, inputs[1], inputs[3], out=str(tmp_path))
    task = reproduce.Reproduction(args, published().rows[name], (10,))
    recipe = task.recipe
    assert recipe.teacher is not None and recipe.checkpoint.best is not None
    assert [recipe.student.model, recipe.teacher.model] == [
        f"{inputs[1]}/init-gpt2-120M", f"{inputs[1]}/teacher-gpt2-1.5B"]
    paths = [recipe.data.train[0].path, recipe.data.eval[0].path]
    assert paths == [f"{tmp_path}/data/dolly/train.jsonl", f"{tmp_path}/data/dolly/heldout.jsonl"]
    assert recipe.data.auxiliary is None or recipe.data.auxiliary.path == f"{inputs[3]}/openwebtext"
    assert recipe.output_dir == f"{tmp_path}/run"


@pytest.mark.parametrize(("change", "named"), [
    (["amidd"], ["'amidd'", "did you mean `amid`?"]),
    (["amid", "--seeds", "ten"], ["--seeds ten"]), (["amid", "--seeds", ""], ["--seeds"]),
    (["amid", "--ranks-per-node", "0"], ["--ranks-per-node 0"])])
def test_what_cannot_be_reproduced_is_refused(inputs, tmp_path, capsys, change, named):
    assert main(["reproduce", *change, *inputs, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert [word for word in named if word not in message] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_or_stopped_on_two_ranks_it_goes_on_and_does_nothing_twice(inputs, tmp_path):
    """Everything as it is on a real machine, with 256 new tokens: launchers, signals, locks."""
    out = tmp_path / "out"
    # 1,000 rows are held out, of which few are sampled for.
    words = ["reproduce", "distillm_srkl", *inputs, "--seeds", "10", "--out", out,
             "--ranks-per-node", 2, *SMALLER, "train.steps=8", "train.eval_every=4",
             "checkpoint.every=100", "train.micro_batch_size=1", "data.eval.0.generate.rows=4"]
    killed = Ranks(1, *words)
    killed.wait_until(lambda: count_steps(out / "run") >= 2, 240)
    killed.signal(signal.SIGKILL)
    killed.wait()
    stopped = Ranks(1, *words)
    log = out / "scores" / "self_inst_10.log"
    stopped.wait_until(lambda: log.exists() and log.stat().st_size, 400)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == [75], stopped.output()
    first = (out / "scores" / "dolly_10.json").stat().st_mtime_ns
    again = Ranks(1, *words)
    assert again.wait(400) == [0], again.output()
    assert [attempt.status for attempt in attempts.read_attempts(out / "run")] == [75, 0]
    assert [line["step"] for line in read_metrics(out / "run")] == list(range(1, 9))
    assert (out / "scores" / "dolly_10.json").stat().st_mtime_ns == first
    result = json.loads((out / "reproduced.json").read_text())
    assert "seeds=10 new_tokens=256" in result["protocol"]
    # Of a single seed.
    assert result["rouge_l_sem"] == {} and set(result["rouge_l_std"].values()) == {0.0}
