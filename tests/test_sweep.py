"""`amid-ds sweep`: each combination is run once, also over interruptions, and is in one table."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from support.data import write_texts
from support.ranks import Ranks
from support.runs import count_steps, read_metrics, write_recipe

from amid_ds.cli import main
from amid_ds.cluster import submit
from amid_ds.config.grid import sweep_combinations
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.experiments import sweep
from amid_ds.experiments.plots import mean_and_error
from amid_ds.run import attempts
from amid_ds.training.job import check_recipe


@pytest.fixture
def recipe(shared_model, text_file, tmp_path) -> Path:
    held = write_texts(tmp_path / "held.jsonl", rows=6, seed=3)
    return write_recipe(tmp_path / "r.yaml", shared_model("gpt2", 0),
                        shared_model("gpt2", 1),
                        text_file, tmp_path / "out", train__steps=2,
                        data__eval=[{"path": str(held)}])


@pytest.fixture
def started(monkeypatch) -> list[Path]:
    """The runs that are started, in order: in processes that share the fork server's imports."""
    runs: list[Path] = []

    def wait(arguments, log, run) -> int:
        ranks = Ranks(1, *arguments[arguments.index("train"):])
        status = ranks.wait()[0]
        log.write(ranks.output().encode())
        runs.append(run)
        return status

    monkeypatch.setattr(sweep, "_wait", wait)
    return runs


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_a_run_that_is_made_once_and_a_line_of_the_table(recipe, tmp_path,
                                                                              started, capsys):
    words = ["sweep", str(recipe), "loss.alpha=-5,1", "loss.lam=0.5"]
    assert main(words) == 0
    out = tmp_path / "out"
    names = ["loss.alpha=-5", "loss.alpha=1"]
    assert started == [out / name for name in names] and (out / "data" / "manifest.json").exists()
    lines = table(out)
    assert [line["loss.alpha"] for line in lines] == ["-5.0", "1.0"]
    for name, line in zip(names, lines, strict=True):
        logged = read_metrics(out / name)
        assert {step["lam"] for step in logged} == {0.5}
        assert f"{logged[0]['alpha']}" == line["loss.alpha"]
        evaluation = (out / name / "eval.jsonl").read_text()
        assert f'"kl_to_teacher": {line["kl_to_teacher"]}' in evaluation and line["step"] == "2"
    assert (out / "sweep.md").read_text().count("\n") == 4
    for figure in ("sweep.png", "losses.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
        (out / figure).unlink()
    before = (out / "sweep.csv").read_bytes()
    # As if one of them had not begun.
    shutil.rmtree(out / names[1])
    (out / "sweep.csv").unlink()
    assert main(words) == 0 and started[2:] == [out / names[1]]
    assert capsys.readouterr().out.count("finished already") == 1
    (out / "sweep.csv").unlink()
    assert main(["sweep", str(out)]) == 0 and len(started) == 3
    assert (out / "sweep.csv").read_bytes() == before and (out / "sweep.png").exists()
    # What `eval --json` printed: the numbers, not the text that says how they were made.
    (out / names[0] / "scores.json").write_text('{"rouge_l": 0.25, "protocol": "minillm: …"}')
    assert main(["sweep", str(out)]) == 0
    assert table(out)[0]["rouge_l"] == "0.25" and "protocol" not in table(out)[0]


def commands_with(word: Path) -> list[str]:
    """The command lines of the processes that hold `word`, but for zombies."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines += [line] if str(word) in line else []
    return lines


def wait_for_the_end_of(run: Path) -> None:
    """Wait until no process works on the run."""
    deadline = time.monotonic() + 120
    while commands_with(run):
        assert time.monotonic() < deadline, commands_with(run)
        time.sleep(0.05)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_stopped_or_killed_sweep_stops_its_run_in_order_and_starts_no_other(
        recipe, tmp_path, number, status):
    words = ["sweep", recipe, "loss.lam=0.1,0.9", "train.steps=400", "checkpoint.every=1000"]
    first = tmp_path / "out" / "loss.lam=0.1"
    ranks = Ranks(1, *words)
    ranks.wait_until(lambda: count_steps(first) >= 3, 180)
    ranks.signal(number)
    assert ranks.wait() == [status], ranks.output()
    said = f"stopped in {first}; the same command goes on from there"
    assert (said in ranks.output()) == (number == signal.SIGTERM), ranks.output()
    wait_for_the_end_of(first)
    steps = len(read_metrics(first))
    assert 3 <= steps < 400 and (first / "checkpoints" / f"step_{steps:08d}").is_dir()
    assert not (tmp_path / "out" / "loss.lam=0.9").exists()
    assert [attempt.status for attempt in attempts.read_attempts(first)] == [75]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_sweep_takes_its_run_with_it_and_goes_on_when_started_again(recipe, tmp_path,
                                                                             ranks):
    words = ["sweep", recipe, "loss.lam=0.1,0.9", "train.steps=60", "checkpoint.every=1000",
             "--ranks-per-node", ranks]
    first = tmp_path / "out" / "loss.lam=0.1"
    killed = Ranks(1, *words)
    killed.wait_until(lambda: count_steps(first) >= 3, 180)
    killed.signal(signal.SIGKILL)
    killed.wait()
    # At once: it waits for the ranks of the first, which save.
    again = Ranks(1, *words)
    assert again.wait(300) == [0], again.output()
    # The first attempt has saved, the second has gone on from there.
    assert [attempt.status for attempt in attempts.read_attempts(first)] == [75, 0]
    assert [line["step"] for line in read_metrics(first)] == list(range(1, 61))
    assert len(read_metrics(tmp_path / "out" / "loss.lam=0.9")) == 60
    assert commands_with(tmp_path / "out") == []


def test_a_sweep_that_is_killed_while_its_run_loads_leaves_nothing_behind(recipe, tmp_path):
    run = tmp_path / "out" / "loss.lam=0.1"
    sweep = Ranks(1, "sweep", recipe, "loss.lam=0.1,0.9", "train.steps=100000")
    sweep.wait_until(lambda: commands_with(run), 90)
    sweep.signal(signal.SIGKILL)
    wait_for_the_end_of(run)
    assert count_steps(run) < 100


@pytest.mark.parametrize("status, outcome",
                         [(75, Stopped), (0, Stopped), (1, TrainingError), (2, TrainingError)])
def test_a_terminal_that_closes_stops_the_run_which_may_fail_at_that(tmp_path, status, outcome):
    (tmp_path / sweep.TRAIN_LOG).write_text("what it said\n")
    # Its input ends when it is to stop.
    run = f"touch {tmp_path}/begun; cat; sleep 0.1; exit {status}"

    def close() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        # One from the kernel, one from the shell.
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)

    # Else a sweep that ignores the signal would end the tests.
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    closing = threading.Thread(target=close)
    closing.start()
    try:
        with open(tmp_path / "log", "wb") as log, pytest.raises(outcome) as raised:
            sweep._wait(["timeout", "5", "sh", "-c", run], log, tmp_path)
    finally:
        closing.join()
        signal.signal(signal.SIGHUP, before)
    if outcome is not Stopped:
        assert f"ended with status {status}\n    what it said" in str(raised.value)


def test_a_run_that_fails_is_named_with_its_output_and_the_others_run(recipe, tmp_path, started,
                                                                      capsys):
    # A folder in place of a file.
    (tmp_path / "out" / "loss.lam=0.1" / "metrics.jsonl").mkdir(parents=True)
    assert main(["sweep", str(recipe), "loss.lam=0.1,0.9"]) == 1
    message = capsys.readouterr().err
    assert "1 of 2 run(s) failed: loss.lam=0.1" in message and "ended with status 2" in message
    assert len(read_metrics(tmp_path / "out" / "loss.lam=0.9")) == 2


@pytest.mark.parametrize("words, named", [
    (["loss.alfa=1,2"], ["`loss.alfa`", "did you mean `alpha`?"]),
    (["loss.alpha=1"], ["no key with several values"]),
    (["loss.alpha=1,,2"], ["KEY=VALUE,VALUE,..."]),
    (["loss.alpha=1,1"], ["two runs", "loss.alpha=1"]),
    (["loss.lam=0.5,1.5"], ["loss.lam", "1.5", "from 0 to 1"]),
    (["train.global_batch_size=4,5", "train.micro_batch_size=2"], ["global_batch_size 5"]),
    (["loss.lam=0.1,0.9", "--here", "--nodes", "2"], ["--nodes without --slurm"]),
    (["loss.lam=0.1,0.9", "--time", "1", "--partition", "p", "--at-once", "0", "--account", "a",
      "--qos", "q", "--signal", "USR1", "--cpus-per-rank", "2", "--device", "h200"],
     ["--cpus-per-rank, --at-once, --time, --partition, --account, --qos, --signal, --device "
      "without --slurm"]),
    (["loss.lam=0.1,0.9", "--ranks-per-node", "0"], ["0 ranks"]),
], ids=["key", "none", "empty", "twice", "value", "check", "nodes", "slurm", "ranks"])
def test_a_sweep_that_cannot_be_run_is_refused_before_its_first_run(recipe, tmp_path, started,
                                                                    capsys, words, named):
    assert main(["sweep", str(recipe), *words]) == 2
    message = capsys.readouterr().err
    assert "remedy:" in message and [word for word in named if word not in message] == [], message
    assert started == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("base, swept", [
    # A resolved recipe has alpha and lam too.
    ({"loss": {"ce_weight": 0.5}}, "loss.preset=fkl,rkl"),
    # Or kd_weight 0.
    ({"teacher": None}, "teacher={model: TEACHER},{model: TEACHER, dtype: fp32}"),
], ids=["preset", "teacher"])
def test_the_jobs_of_an_array_run_what_was_checked(recipe, shared_model, tmp_path, monkeypatch,
                                                   base, swept):
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **base}))
    monkeypatch.setattr(submit.slurm, "sbatch_test_only", lambda arguments: "")
    monkeypatch.setattr(submit.slurm, "sbatch", lambda arguments: "7")
    swept = swept.replace("TEACHER", str(shared_model("gpt2", 1)))
    asked = [str(recipe), "--ranks-per-node", "1", "train.seed=3"]
    assert main(["submit", *asked, "--sweep", swept]) == 0
    assert main(["sweep", *asked, "--slurm", swept]) == 0
    out = tmp_path / "out"
    for kept in (out / "submissions" / "0001", out / "submissions" / "0002"):
        setting, = re.findall(r"^SETTINGS=\((.*)\)$", (kept / "job.sbatch").read_text(), re.M)
        runs = [shlex.split(run) for run in shlex.split(setting)]
        assert len(runs) == 2
        for run in runs:
            job = load_recipe(kept / "recipe.yaml", run)
            # The runs of `sweep` share prepared data.
            prepared = "null" if kept.name == "0001" else str(out / "data")
            assert job == load_recipe(recipe, ["train.seed=3", f"data.prepared={prepared}", *run])
            assert check_recipe(job, 1) and job.loss.kd_weight == 1


def test_a_comma_inside_brackets_belongs_to_the_value():
    runs = sweep_combinations(["loss={preset: skl, lam: 0.1},{order: {pr: 0.5, qr: 0.5}, alpha: 1}",
                         "train.seed=0,1"])
    assert [run.settings for run in runs[1:3]] == [("loss={preset: skl, lam: 0.1}", "train.seed=1"),
                                                   ("loss={order: {pr: 0.5, qr: 0.5}, alpha: 1}",
                                                    "train.seed=0")]
    assert all(set(run.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._=,") for run in runs)
    with pytest.raises(InputError, match="two runs"):
        sweep_combinations(["train.seed=1,1"])


def test_a_value_is_one_cell_of_a_table_whatever_it_holds():
    table = sweep.markdown_table(["a|b", "c"], [["x|\ny\x1b[31m", 1.23456]])
    assert table == "| a\\|b | c |\n| --- | ---: |\n| x\\|\\ny\\x1b[31m | 1.235 |\n"


def test_runs_that_differ_in_their_seed_alone_are_one_point_with_a_standard_error():
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx((14 / 2 / 3) ** 0.5))
    assert mean_and_error([2.0]) == (2.0, 0.0)
