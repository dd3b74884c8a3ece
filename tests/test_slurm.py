"""From a recipe to a finished model on a real Slurm cluster, whatever happens to its nodes."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import slurm_cluster
from support.data import write_texts
from support.models import make_tokenizer
from support.ranks import Ranks, run_ranks
from support.runs import count_steps, read_metrics, write_recipe
from support.tasks import CHOICE, make_documents, write_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.cluster import requeue
from amid_ds.config.parse import load_recipe
from amid_ds.data import TargetFolder
from amid_ds.eval.run_tasks import kept_steps
from amid_ds.run import attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_task_scores

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.Cluster]:
    missing = slurm_cluster.missing()
    if missing:
        assert "CI" not in os.environ, f"CI tests Slurm, and there is no {', '.join(missing)}"
        pytest.skip(
            f"no {', '.join(missing)}; see tests/support/slurm_cluster.py for what to install")
    with slurm_cluster.Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe_in(llama_pair, text_file, tmp_path_factory) -> Callable[..., Path]:
    """recipe_in(folder, run, **changes): a recipe of 40 steps whose run is folder/run."""
    prepared = tmp_path_factory.mktemp("prepared") / "data"

    def write(folder: Path, run: str = "run", **changes) -> Path:
        settings = {"train__steps": 40, "checkpoint__every": 10, "data__prepared": str(prepared),
                    **changes}
        return write_recipe(folder / f"{run}.yaml", *llama_pair, text_file, folder / run,
                            **settings)
    return write


@pytest.fixture(scope="module")
def whole(recipe_in, tmp_path_factory) -> Callable[[int], list[tuple[int, float, float]]]:
    """whole(ranks): the losses of the uninterrupted run on so many ranks."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def losses_on(ranks: int) -> list[tuple[int, float, float]]:
        run_ranks(ranks, "train", recipe_in(folder, f"run{ranks}"))
        return losses(folder / f"run{ranks}")
    return losses_on


def sbatch(cluster, folder: Path, template: str, *arguments: object, ranks_per_node: int = 2,
           **options: object) -> str:
    """Submit a template by hand, its EDIT lines overridden by options; return the job's id."""
    options = {"nodes": 2, "ntasks_per_node": ranks_per_node, "gpus_per_node": ranks_per_node,
               "cpus_per_task": 1, **options}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = cluster.run("sbatch", "--parsable", *flags, ROOT / "slurm" / template, *arguments,
                       cwd=folder, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(cluster, folder: Path, *arguments: object) -> str:
    """Run `amid-ds submit` on the login node; return the job's id, which it prints last."""
    done = cluster.run(sys.executable, "-m", "amid_ds", "submit", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def output(folder: Path) -> str:
    """Every log of every job in the folder."""
    return "".join(f"--- {path.name}\n{path.read_text()}"
                   for path in sorted(folder.glob("**/*.log")))


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]


def finished(cluster, job: str, folder: Path, expected: list[tuple[int, float, float]],
             timeout: float = 300) -> str:
    """Wait for the job; its run must have the losses of the uninterrupted one. Returns all logs."""
    assert cluster.wait(job, timeout) == "COMPLETED", output(folder)
    assert losses(folder / "run") == expected, output(folder)
    return output(folder)


# To every process of the job, or to the ranks as sbatch's --signal before the time limit.
@pytest.mark.parametrize("ranks_per_node, signalled", [
    (1, "--full --signal=USR1"), pytest.param(2, "--signal=USR1", marks=pytest.mark.slow)])
def test_a_signal_reaches_every_rank_and_the_job_goes_on_as_if_there_had_been_none(
        cluster, recipe_in, whole, tmp_path, ranks_per_node, signalled):
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path, checkpoint__every=1000),
                 ranks_per_node=ranks_per_node)
    cluster.until(lambda: count_steps(tmp_path / "run") >= 3, what="the first steps")
    cluster.run("scancel", *signalled.split(), job)
    messages = finished(cluster, job, tmp_path, whole(2 * ranks_per_node))
    assert "stopped in order" in messages and "it is started again" in messages
    assert cluster.job(job)["Restarts"] == "1", messages
    first, second = attempts.read_attempts(tmp_path / "run")
    assert (first.status, second.status, second.restart, second.job) == (75, 0, 1, job)
    curve = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss/total")
    # One curve through both attempts.
    assert [(event.step, event.value) for event in curve] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in whole(2 * ranks_per_node)]
    assert first.first_step == 1 and second.first_step > 3 and second.nodes == "n[1-2]"
    assert second.ranks == 2 * ranks_per_node


TEMPLATES = ["train", "train_deepspeed", "train_mpi", "sweep"]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["--full --signal=USR1", "--batch --signal=USR1",
                                       "--batch --signal=TERM"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_signal_to_the_batch_script_saves_the_run_and_the_job_goes_on(
        cluster, recipe_in, tmp_path, template, signalled):
    recipe = recipe_in(tmp_path, checkpoint__every=1000)
    # The launcher's node has one task; a job of the sweep runs on one node.
    words = {"train_deepspeed": ["--ranks-per-node", 2],
             "sweep": ["--ranks-per-node", 2, "--sweep", "loss.lam=0.3"]}.get(
                 template, ["--ranks-per-node", 1, "--nodes", 2])
    job = submit(cluster, tmp_path, recipe, "--template", template, "--cpus-per-rank", 1, *words)
    run = tmp_path / "run" / ("loss.lam=0.3" if template == "sweep" else "")
    cluster.until(lambda: count_steps(run) >= 3, what="the first steps")
    cluster.run("scancel", *signalled.split(), f"{job}_0" if template == "sweep" else job)
    assert cluster.wait(job) == "COMPLETED", output(tmp_path)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 41)), output(tmp_path)
    first, second = attempts.read_attempts(run)
    assert (first.status, second.status, second.restart) == (75, 0, 1), output(tmp_path)
    assert second.first_step > 3, output(tmp_path)


@pytest.mark.parametrize("signalled", [
    "--full --signal=USR1", pytest.param("--batch --signal=TERM", marks=pytest.mark.slow)])
def test_a_signal_to_the_script_that_prepares_starts_it_again(cluster, recipe_in, tmp_path,
                                                              signalled):
    # Enough rows for the signal to find it at work.
    text = tmp_path / "long.jsonl"
    text.write_text(('{"text": "' + "word " * 500 + '"}\n') * 2000)
    recipe = recipe_in(tmp_path, data__train=[{"path": str(text)}],
                       data__prepared=str(tmp_path / "data"))
    job = sbatch(cluster, tmp_path, "prepare.sbatch", recipe, nodes=1, ranks_per_node=1)
    cluster.until(lambda: (tmp_path / "data").exists(), what="its beginning")
    cluster.run("scancel", *signalled.split(), job)
    assert cluster.wait(job) == "COMPLETED", output(tmp_path)
    assert cluster.job(job)["Restarts"] == "1", output(tmp_path)
    assert (tmp_path / "data" / "manifest.json").exists(), output(tmp_path)


@pytest.mark.parametrize("ranks_per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_deepspeed_launcher_trains_across_nodes_without_ssh(cluster, recipe_in, whole, tmp_path,
                                                                ranks_per_node):
    recipe = recipe_in(tmp_path)
    job = submit(cluster, tmp_path, recipe, "--template", "train_deepspeed", "--nodes", 2,
                 "--ranks-per-node", ranks_per_node, "--cpus-per-rank", 1, "--time", "10")
    recipe.write_text("the job has a copy")
    finished(cluster, job, tmp_path, whole(2 * ranks_per_node))
    kept, logs = tmp_path / "run" / "submissions" / "0001", tmp_path / "run" / "logs"
    assert load_recipe(kept / "recipe.yaml").train.steps == 40
    assert "train_deepspeed" in (kept / "code.json").read_text()
    assert f"RANKS_PER_NODE={ranks_per_node}\n" in (kept / "job.sbatch").read_text()
    assert {path.name for path in logs.iterdir()} == {f"{job}.log", f"{job}-n1.log",
                                                      f"{job}-n2.log"}


@pytest.mark.parametrize("ranks_per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_find_each_other_through_mpi(cluster, recipe_in, whole, tmp_path, ranks_per_node):
    job = sbatch(cluster, tmp_path, "train_mpi.sbatch", recipe_in(tmp_path),
                 ranks_per_node=ranks_per_node)
    finished(cluster, job, tmp_path, whole(2 * ranks_per_node))


def test_the_wrong_kind_of_mpi_is_refused_instead_of_training_many_times_alone(cluster, recipe_in,
                                                                               tmp_path):
    recipe = recipe_in(tmp_path)
    script = (ROOT / "slurm" / "train_mpi.sbatch").read_text()
    (tmp_path / "wrong.sbatch").write_text(script.replace("MPI=pmi2", "MPI=none"))
    job = sbatch(cluster, tmp_path, tmp_path / "wrong.sbatch", recipe, ranks_per_node=1)
    assert cluster.wait(job) == "FAILED"
    assert "a world of 1 rank(s)" in output(tmp_path) and cluster.job(job)["Restarts"] == "0"


def test_data_are_prepared_once_and_an_array_of_jobs_sweeps_a_key(cluster, recipe_in, tmp_path):
    odd = "a b%j'$(touch pwned);ü"
    recipe = recipe_in(tmp_path, odd, train__steps=3, data__prepared=str(tmp_path / "data"))
    job = sbatch(cluster, tmp_path, "prepare.sbatch", recipe, nodes=1, ranks_per_node=1)
    assert cluster.wait(job) == "COMPLETED", output(tmp_path)
    assert (tmp_path / "data" / "manifest.json").exists(), output(tmp_path)
    done = cluster.run(sys.executable, "-m", "amid_ds", "sweep", recipe, "--slurm",
                       "--ranks-per-node", 1, "loss.lam=0.1,0.9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: cluster.run("squeue", "--noheader").stdout == "",
                  what="the end of the array")
    runs = [tmp_path / odd / f"loss.lam={value}" for value in ("0.1", "0.9")]
    assert [count_steps(run) for run in runs] == [3, 3], output(tmp_path)
    assert [read_metrics(run)[0]["lam"] for run in runs] == [0.1, 0.9]
    # Written by the job that ended last.
    assert [line.split(",")[0]
            for line in (tmp_path / odd / "sweep.csv").read_text().splitlines()] == [
                "loss.lam", "0.1", "0.9"], output(tmp_path)
    logs = sorted(re.sub(r"\d+_", "N_", path.name) for path in (tmp_path / odd / "logs").iterdir())
    assert [name for name in logs if "-n" not in name] == ["N_0.log", "N_1.log"], logs
    assert [name.partition("-n")[0] for name in logs if "-n" in name] == ["N_0", "N_1"], logs
    assert not list(tmp_path.rglob("pwned*"))


def test_an_array_of_jobs_writes_one_cache_and_a_signal_starts_its_job_again(
        cluster, recipe_in, tmp_path):
    text = write_texts(tmp_path / "long.jsonl", rows=600)
    recipe = recipe_in(tmp_path, data__train=[{"path": str(text)}],
                       data__prepared=str(tmp_path / "data"))
    out = tmp_path / "cache"
    job = submit(cluster, tmp_path, recipe, "--template", "cache", "--jobs", 2, "--topk", 8,
                 "--out", out, "--ranks-per-node", 1, "--cpus-per-rank", 1, "--time", "10")
    cluster.until(lambda: list(out.glob("shards/*.arrow")), what="its first shard")
    cluster.run("scancel", "--full", "--signal=USR1", f"{job}_0")
    cluster.until(lambda: cluster.run("squeue", "--noheader").stdout == "", what="its end")
    kept = TargetFolder.open(out)
    assert kept.manifest.k == 8 and kept.manifest.rows > 500, output(tmp_path)
    kept.require_sizes()
    logs = output(tmp_path)
    assert "stopped in order (SIGUSR1)" in logs and "attempt 2 of job" in logs, logs
    # Alone the same comes out.
    assert main(["cache", str(recipe), "--out", str(tmp_path / "alone"), "--topk", "8"]) == 0
    assert all((tmp_path / "alone" / path.relative_to(out)).read_bytes() == path.read_bytes()
               for path in out.rglob("*") if path.is_file())


def test_ranks_share_the_cpus_of_a_small_node(recipe_in, tmp_path):
    missing = slurm_cluster.missing()
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    recipe = recipe_in(tmp_path)
    with slurm_cluster.Cluster(1, cpus=5) as small:
        job = submit(small, tmp_path, recipe, "--ranks-per-node", 2)
        assert small.job(job)["CPUs/Task"] == "2"
        small.run("scancel", job)
        done = small.run(sys.executable, "-m", "amid_ds", "submit", recipe, "--ranks-per-node", 2,
                         "--cpus-per-rank", 3, cwd=tmp_path)
        assert done.returncode == 2 and "Slurm refuses" in done.stderr


def test_a_wrong_recipe_fails_in_seconds_and_is_not_started_again(cluster, recipe_in, tmp_path):
    recipe = recipe_in(tmp_path)
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe, "train.stepz=3", ranks_per_node=1)
    assert cluster.wait(job) == "FAILED"
    facts = cluster.job(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    assert output(tmp_path).count("did you mean `steps`") == 1
    assert "Traceback" not in output(tmp_path)


def test_a_killed_node_costs_the_steps_since_the_last_checkpoint(cluster, recipe_in, whole,
                                                                 tmp_path):
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path), ranks_per_node=1)
    cluster.until((tmp_path / "run" / "checkpoints" / "latest").is_file, what="a checkpoint")
    used = cluster.job(job)["NodeList"]
    assert used == "n[1-2]"
    cluster.kill_node("n2")
    try:
        messages = finished(cluster, job, tmp_path, whole(2))
        assert cluster.job(job)["NodeList"] == "n[1,3]" and "resumed after step" in messages
        printed = cluster.run(sys.executable, "-m", "amid_ds", "status", tmp_path / "run").stdout
        assert "state      done" in printed and "restarts   1" in printed
        assert "nodes      n[1,3]" in printed
    finally:
        cluster.restore()


def test_doctor_names_the_slow_node_and_what_a_node_cannot_read(cluster, recipe_in, tmp_path):
    recipe = recipe_in(tmp_path)
    ask = ["srun", "--nodes=3", "--ntasks-per-node=1", sys.executable, "-m", "amid_ds", "doctor",
           recipe]
    cluster.throttle("n3", "200mbit")
    try:
        doctor = cluster.run(*ask, "teacher.model=nowhere/there")
    finally:
        cluster.throttle("n3", None)
    assert doctor.returncode == 1, doctor.stdout + doctor.stderr
    assert "2 of 10 checks failed" in doctor.stderr, doctor.stdout + doctor.stderr
    for what in ("versions", "GPUs", "free space", "rename", "connections", "all-reduce", "student",
                 "clocks"):
        assert f"ok    {what}" in doctor.stdout, doctor.stdout
    assert re.search(r"FAIL  bandwidth    slow: n3 .*\n      remedy: ",
                     doctor.stdout), doctor.stdout
    assert re.search(r"FAIL  teacher      .*nowhere/there.* on n1, n2, n3\n      remedy: ",
                     doctor.stdout), doctor.stdout


def test_a_step_that_hangs_ends_with_the_stack_of_every_thread(recipe_in, tmp_path):
    recipe = recipe_in(tmp_path, train__hang_timeout=8, train__steps=2000)
    ranks = Ranks(2, "train", recipe)
    try:
        deadline = time.monotonic() + 120
        while count_steps(tmp_path / "run") < 3:
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.05)
        ranks.signal(signal.SIGSTOP, 1)
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 1, ranks.output()
    finally:
        ranks.wait(0)
    printed = ranks.output()
    assert re.search(r"rank 0 on .*: step \d+ has not ended after 8 s; it waits for its peers in ",
                     printed), printed
    # The stacks of all threads.
    assert "most recent call first" in printed and "in _watch" in printed
    assert re.search(r"step \d+ hangs; look at rank 1 on .* first: does not answer",
                     printed), printed
    failure = json.loads((tmp_path / "run" / "failures" / "local.0.0.json").read_text())
    # The rank may be stopped at the end of the last step, after its line.
    logged = count_steps(tmp_path / "run")
    assert failure["rank"] == 1 and failure["step"] in (logged, logged + 1)


@pytest.mark.slow
# The batch script's node and the other one.
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_is_cut_off_is_left_behind(cluster, recipe_in, whole, tmp_path, node):
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path, train__hang_timeout=20))
    cluster.until(lambda: count_steps(tmp_path / "run") >= 12, what="steps after a checkpoint")
    cluster.cut_off(node)
    try:
        finished(cluster, job, tmp_path, whole(4))
        assert node not in cluster.hosts(cluster.job(job)["NodeList"])
    finally:
        cluster.restore()


@pytest.mark.slow
def test_a_killed_node_of_the_batch_script_is_left_behind(cluster, recipe_in, whole, tmp_path):
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path))
    cluster.until(lambda: count_steps(tmp_path / "run") >= 12, what="steps after a checkpoint")
    cluster.kill_node("n1")
    try:
        finished(cluster, job, tmp_path, whole(4))
        assert cluster.job(job)["NodeList"] == "n[2-3]"
    finally:
        cluster.restore()


@pytest.mark.slow
@pytest.mark.parametrize("number, rank",
                         [(signal.SIGSTOP, 3), (signal.SIGSTOP, 0), (signal.SIGKILL, 2)])
def test_a_rank_that_is_stopped_or_killed_is_named_and_the_job_goes_on(cluster, recipe_in, whole,
                                                                       tmp_path, number, rank):
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path, train__hang_timeout=10))
    cluster.until(lambda: count_steps(tmp_path / "run") >= 12, what="steps after a checkpoint")
    os.kill(cluster.processes(f"n{1 + rank // 2}", "-m amid_ds train")[rank % 2 - 2], number)
    messages = finished(cluster, job, tmp_path, whole(4))
    host = f"n{1 + rank // 2}"
    assert f"first to fail: rank {rank} on {host} in step" in messages, messages
    if number == signal.SIGSTOP:
        assert f"look at rank {rank} on {host} first: does not answer" in messages, messages
        peer = f"rank {3 - rank} on n{2 - rank // 2}"
        assert f"{peer}: it waits for its peers in " in messages, messages
    assert attempts.read_attempts(tmp_path / "run")[0].failure.rank == rank


@pytest.mark.slow
# To the ranks, or to the batch script.
@pytest.mark.parametrize("asked", ["USR1@40", "B:USR1@40"])
def test_at_the_time_limit_the_run_is_saved_and_goes_on(cluster, recipe_in, tmp_path, asked):
    recipe = recipe_in(tmp_path, train__steps=5000)
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe, ranks_per_node=1, time=2, signal=asked)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", timeout=240,
                  what="the second attempt")
    cluster.until(lambda: len(attempts.read_attempts(tmp_path / "run")) == 2, what="its beginning")
    first = attempts.read_attempts(tmp_path / "run")[0]
    assert first.status == 75 and "(SIGUSR1)" in output(tmp_path)
    cluster.until(lambda: attempts.read_attempts(tmp_path / "run")[1].first_step is not None,
                  what="its first step")
    assert attempts.read_attempts(tmp_path / "run")[1].first_step > first.first_step
    cluster.run("scancel", job)
    # It stays cancelled.
    assert cluster.wait(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_run_that_fails_twice_at_the_same_step_is_not_restarted_and_its_log_ends_with_why(
        cluster, recipe_in, llama_pair, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(llama_pair[0])
    # Only rows with that word give NaN.
    poisoned = make_tokenizer(tmp_path / "broken")("river").input_ids[0]
    broken.model.embed_tokens.weight.data[poisoned] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe_in(tmp_path),
                 f"student.model={tmp_path}/broken", ranks_per_node=1)
    assert cluster.wait(job) == "FAILED" and cluster.job(job)["Restarts"] == "1", output(tmp_path)
    log = (tmp_path / f"slurm-amid_ds-{job}.log").read_text()
    assert "it is not started again: two attempts have ended in the same way" in log, log
    assert re.search(r"first to fail: rank 0 on n1 in step \d+: the loss of step \d+ is nan.*\n$",
                     log), log


@pytest.mark.slow
def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster, recipe_in, whole, tmp_path):
    recipe = recipe_in(tmp_path)
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe)
    cluster.until(lambda: count_steps(tmp_path / "run") >= 3, what="the first steps")
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    finished(cluster, sbatch(cluster, tmp_path, "train.sbatch", recipe), tmp_path, whole(4))


@pytest.mark.slow
def test_a_chain_of_three_jobs_is_one_run_and_jobs_left_over_end_at_once(cluster, recipe_in, whole,
                                                                         tmp_path):
    recipe = recipe_in(tmp_path)
    last = submit(cluster, tmp_path, recipe, "--nodes", 2, "--ranks-per-node", 2, "--chain", 3)
    first, second = str(int(last) - 2), str(int(last) - 1)
    cluster.until(lambda: count_steps(tmp_path / "run") >= 3, what="the first steps")
    cluster.run("scancel", "--signal=USR1", first)
    finished(cluster, last, tmp_path, whole(4))
    assert (cluster.job(first)["JobState"], cluster.job(first)["ExitCode"]) == ("FAILED", "75:0")
    assert cluster.job(second)["JobState"] == "COMPLETED" and "nothing to do" in output(tmp_path)


@pytest.mark.slow
def test_an_array_of_four_with_two_at_once(cluster, recipe_in, tmp_path):
    recipe = recipe_in(tmp_path, train__steps=20)
    submit(cluster, tmp_path, recipe, "--nodes", 1, "--ranks-per-node", 1, "--sweep",
           "train.seed=0,1,2,3", "--at-once", 2)
    runs = [tmp_path / "run" / f"train.seed={seed}" for seed in range(4)]
    cluster.until(lambda: count_steps(runs[0]) >= 2, what="the first steps of the first")
    assert cluster.run("squeue", "--noheader", "--states=RUNNING").stdout.count("\n") <= 2
    # One of them starts again, alone. Not by scancel: while tasks of an array wait, it sends a
    # signal again and again.
    os.kill(max(pid for name in cluster.names for pid in cluster.processes(name, "train.seed=0 ")),
            signal.SIGUSR1)
    cluster.until(lambda: cluster.run("squeue", "--noheader").stdout == "", 300,
                  "the end of the array")
    assert [count_steps(run) for run in runs] == [20] * 4, output(tmp_path)
    assert [len(attempts.read_attempts(run)) for run in runs] == [2, 1, 1, 1]


def test_submit_refuses_what_sbatch_would_let_pass(recipe_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_in(tmp_path)
    template = (ROOT / "slurm" / "train.sbatch").read_text()
    faulty = {
        "late": (template + "#SBATCH --exclusive\n", "--exclusive comes after the first command"),
        "syntax": (template.replace("status=$?", "if ["), "syntax error"),
        "folder": (template.replace("#SBATCH --requeue",
                                    "#SBATCH --requeue\n#SBATCH --error=gone/%j.err"), "gone"),
    }
    for name, (text, named) in faulty.items():
        (tmp_path / f"{name}.sbatch").write_text(text)
        assert main(["submit", str(recipe), "--template", f"{name}.sbatch", "--ranks-per-node",
                     "2"]) == 2
        assert named in capsys.readouterr().err
    # The message of `train`.
    assert main(["submit", str(recipe), "--nodes", "3", "--ranks-per-node", "1"]) == 2
    assert "train.global_batch_size 4 on 3 " in capsys.readouterr().err
    assert main(["submit", str(recipe), "--template", "nosuch"]) == 2
    assert "train_mpi" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", ["train", "train_deepspeed", "train_mpi", "prepare", "cache"])
def test_a_dry_run_prints_the_script_and_leaves_nothing(template, recipe_in, tmp_path, monkeypatch,
                                                        capsys):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_in(tmp_path)
    status = main(["submit", str(recipe), "--template", template, "--nodes", "2",
                   "--ranks-per-node", "2", "--dry-run", "--partition", "fast", "--chain", "2",
                   "train.steps=9"])
    script, messages = capsys.readouterr()
    trains = template not in ("prepare", "cache")
    assert ("fits on 4 x h100-80g (--device): " in messages) == trains, messages
    assert status == 0 and script.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()
    assert "#SBATCH --partition=fast\n" in script and "#SBATCH --no-requeue\n" in script
    assert "REQUEUE=no\n" in script
    assert f"PYTHON={sys.executable}\n" in script
    if template != "prepare":
        assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=2\n" in script


def test_status_prints_step_loss_speed_restarts_and_the_last_error(tmp_path, recipe_in, capsys):
    recipe = recipe_in(tmp_path, train__steps=4)
    run_ranks(1, "train", recipe)
    attempts.append_event(tmp_path / "run", "ended", status=1,
                 failure=vars(attempts.Failure(3, "n2", 4, "OSError: gone", 0.0)))
    assert main(["status", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for words in ("state      done", "step       4 of 4", "loss", "tokens/s", "restarts   0",
                  "last error rank 3 on n2 in step 4: OSError: gone"):
        assert words in printed, printed
    assert main(["status", str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def attempt(status: int | None, step: int | None = 5, error: str = "RuntimeError: out of 3 bytes",
            stepped: bool = True) -> attempts.AttemptRecord:
    failure = (attempts.Failure(0, "n1", step, error, 0.0) if status not in (0, 2, 75, None)
               else None)
    return attempts.AttemptRecord("1", 0, first_step=1 if stepped else None, status=status,
                                  failure=failure)


@pytest.mark.parametrize("job, again", [
    # Done.
    ([attempt(0)], False),
    # A wrong recipe.
    ([attempt(2)], False),
    # Pre-empted, however often.
    ([attempt(75)] * 9, True),
    # Stopped while loading.
    ([attempt(75, stepped=False)] * 4, True),
    # Every attempt ends before its first step.
    ([attempt(75, stepped=False)] * 5, False),
    ([attempt(1)], True),
    # The same error but for a number.
    ([attempt(1), attempt(1, error="RuntimeError: out of 4 bytes")], False),
    ([attempt(1), attempt(75), attempt(1)], False),
    ([attempt(1), attempt(1, step=6)], True),
    ([attempt(1), attempt(1, error="OSError: gone")], True),
    # Could not connect: no step to fail at twice.
    ([attempt(1, stepped=False)] * 3, True),
    ([attempt(1), attempt(1, stepped=False)], True),
    # Slurm itself ended an attempt.
    ([attempt(None), attempt(137)], True),
    ([attempt(1, step=n) for n in range(3)], True),
    # slurm.max_restarts.
    ([attempt(1, step=n) for n in range(4)], False),
])
def test_what_starts_again_and_what_does_not(job, again):
    assert (requeue.refusal(job, max_restarts=3) is None) == again


def test_the_rank_that_failed_first_is_named_also_if_it_could_write_nothing():
    peers = [attempts.Failure(rank, "n1", 7, "RuntimeError: Connection closed by peer", 10.0 + rank)
             for rank in (1, 0)]
    killed = ("srun: error: n2: task 3: Killed\n"
              "srun: error: n1: tasks 0-1: Exited with exit code 1\n")
    first = requeue.first_failure(sorted(peers, key=lambda f: f.time), killed, 137)
    assert (first.rank, first.host, first.step) == (3, "n2", 7) and "Killed" in first.error
    assert requeue.first_exit_status(137, killed) == 137
    assert requeue.first_exit_status(138,
                                       "srun: error: n1: tasks 0-1: User defined signal 1\n") == 75
    assert requeue.first_exit_status(143, "srun: error: n1: task 0: Exited with exit code 2\n"
                                       + killed) == 2
    raised = attempts.Failure(2, "n2", 7, "ValueError: a bad row", 9.0)
    assert requeue.first_failure([raised, *peers],
                                 "srun: error: n1: task 0: Exited with exit code 1", 1) == raised
    assert requeue.first_failure([], "srun: error: n2: task 1: Exited with exit code 127",
                                 127).host == "n2"


def test_the_attempts_of_a_run_are_read_as_they_were_written(tmp_path, monkeypatch):
    for restart in ("", "1"):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart) if restart else monkeypatch.delenv(
            "SLURM_RESTART_COUNT", raising=False)
        with pytest.raises(RuntimeError), attempts.Attempt(rank=0, size=2) as attempt:
            attempt.begin(tmp_path, {"train.log_every": [1, 2]})
            attempt.stepping(3)
            attempt.stepping(4)
            raise RuntimeError("out of memory\nmore of it")
    with open(tmp_path / "attempts.jsonl", "a") as file:
        # A crash in the middle of a line.
        file.write('{"event": "beg')
    first, second = attempts.read_attempts(tmp_path)
    assert (first.job, first.restart, second.restart, second.status) == ("7", 0, 1, 1)
    assert first.first_step == 3 and first.changed == {"train.log_every": [1, 2]}
    assert (second.failure.step, second.failure.error) == (4, "RuntimeError: out of memory")


@pytest.mark.slow
def test_a_job_of_its_own_judges_the_checkpoints_of_a_run(cluster, recipe_in, tmp_path):
    task = write_task(tmp_path / "tasks", "choosing", CHOICE, make_documents(5))
    recipe = recipe_in(tmp_path, train__steps=3, checkpoint__every=1,
                       eval_tasks={"every": 2, "tasks": [str(task)]})
    job = submit(cluster, tmp_path, recipe, "--nodes", 1, "--ranks-per-node", 2)
    assert cluster.wait(job) == "COMPLETED", output(tmp_path)
    cluster.until(lambda: cluster.run("squeue", "--noheader").stdout == "", 300,
                  "the end of the jobs of the tasks")
    scores = read_task_scores(tmp_path / "run")
    assert sorted(line["step"] for line in scores) == [2, 3], output(tmp_path)
    assert kept_steps(RunFolder(tmp_path / "run")) == set()
    assert len(list((tmp_path / "run" / "logs").glob("*-tasks.log"))) == 2
