"""From a recipe to a finished model on a real Slurm cluster, whatever happens to its nodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
import small

from amid_ds import lives, requeue

ROOT = Path(__file__).parent.parent
LAYOUT = {"--nodes": 2, "--ntasks-per-node": 2, "--gpus-per-node": 2, "--cpus-per-task": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.Cluster]:
    missing = slurm_cluster.missing()
    if missing:
        assert "CI" not in os.environ, f"CI tests Slurm, and there is no {', '.join(missing)}"
        pytest.skip(f"no {', '.join(missing)}; see tests/slurm_cluster.py for what to install")
    with slurm_cluster.Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    small.make_model(root / "student", "llama", 0)
    small.make_model(root / "teacher", "llama", 1)
    small.make_text(root / "text.jsonl")
    return root


def recipe_of(models: Path, folder: Path, run: str = "run", **changes) -> Path:
    """Steps of a fifth of a second and more, so that there is time to interfere."""
    return small.make_recipe(folder / f"{run}.yaml", models / "student", models / "teacher", models / "text.jsonl",
                             folder / run, **{"data__prepared": str(models / "data"), **changes})


def sbatch(cluster, folder: Path, template: str, *arguments: object, **options: object) -> str:
    """A template as it stands, by hand: its EDIT lines overridden on the command line. The job's id."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = cluster.run("sbatch", "--parsable", *flags, ROOT / "slurm" / template, *arguments, cwd=folder,
                       PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def output(folder: Path) -> str:
    """Every log of every job in the folder, for a look when something failed."""
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("**/*.log")))


def steps_of(run: Path) -> int:
    return len(small.metrics(run)) if (run / "metrics.jsonl").exists() else 0


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in small.metrics(run)]


def test_a_signal_reaches_every_rank_and_the_job_goes_on_as_if_there_had_been_none(cluster, models, tmp_path):
    recipe = recipe_of(models, tmp_path, train__steps=60, checkpoint__every=1000)
    small.run(4, "train", recipe, f"output_dir={tmp_path / 'whole'}")
    job = sbatch(cluster, tmp_path, "train.sbatch", recipe, nodes=2, ntasks_per_node=2, gpus_per_node=2,
                 cpus_per_task=1)
    cluster.until(lambda: steps_of(tmp_path / "run") >= 3, what="the first steps")
    cluster.run("scancel", "--signal=USR1", job)      # what --signal sends before the time limit
    assert cluster.wait(job) == "COMPLETED", output(tmp_path)
    assert cluster.job(job)["Restarts"] == "1", output(tmp_path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert "stopped in order" in output(tmp_path) and "it is started again" in output(tmp_path)


def lived(status: int | None, step: int | None = 5, error: str = "RuntimeError: out of 3 bytes", came: bool = True,
          ) -> lives.Record:
    failure = lives.Failure(0, "n1", step, error, 0.0) if status not in (0, 2, 75, None) else None
    return lives.Record("1", 0, first_step=1 if came else None, status=status, failure=failure)


@pytest.mark.parametrize("job, again", [
    ([lived(0)], False),                                                      # done
    ([lived(2)], False),                                                      # a wrong recipe
    ([lived(75)] * 9, True),                                                  # pre-empted, however often
    ([lived(1)], True),
    ([lived(1), lived(1, error="RuntimeError: out of 4 bytes")], False),      # the same but for a number
    ([lived(1), lived(75), lived(1)], False),
    ([lived(1), lived(1, step=6)], True),
    ([lived(1), lived(1, error="OSError: gone")], True),
    ([lived(1, came=False)] * 3, True),                                       # could not connect: no such life
    ([lived(1), lived(1, came=False)], True),
    ([lived(None), lived(137)], True),                                        # a life that Slurm itself ended
    ([lived(1, step=n) for n in range(3)], True),
    ([lived(1, step=n) for n in range(4)], False),                            # slurm.max_restarts
])
def test_what_starts_again_and_what_does_not(job, again):
    assert (requeue.refusal(job, max_restarts=3) is None) == again


def test_the_rank_that_failed_first_is_named_also_where_it_could_leave_no_word():
    peers = [lives.Failure(rank, "n1", 7, "RuntimeError: Connection closed by peer", 10.0 + rank) for rank in (1, 0)]
    killed = "srun: error: n2: task 3: Killed\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"
    first = requeue.first_failure(sorted(peers, key=lambda f: f.time), killed, 137)
    assert (first.rank, first.host, first.step) == (3, "n2", 7) and "Killed" in first.error
    raised = lives.Failure(2, "n2", 7, "ValueError: a bad row", 9.0)
    assert requeue.first_failure([raised, *peers], "srun: error: n1: task 0: Exited with exit code 1", 1) == raised
    assert requeue.first_failure([], "srun: error: n2: task 1: Exited with exit code 127", 127).host == "n2"


def test_the_story_of_a_run_is_read_as_it_was_written(tmp_path, monkeypatch):
    for restart in ("", "1"):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart) if restart else monkeypatch.delenv(
            "SLURM_RESTART_COUNT", raising=False)
        with pytest.raises(RuntimeError), lives.Life(rank=0, size=2) as life:
            life.begin(tmp_path, {"train.log_every": [1, 2]})
            life.stepping(3)
            life.stepping(4)
            raise RuntimeError("out of memory\nmore of it")
    with open(tmp_path / "lives.jsonl", "a") as file:
        file.write('{"event": "beg')      # a crash in the middle of a line
    first, second = lives.records(tmp_path)
    assert (first.job, first.restart, second.restart, second.status) == ("7", 0, 1, 1)
    assert first.first_step == 3 and first.changed == {"train.log_every": [1, 2]}
    assert (second.failure.step, second.failure.error) == (4, "RuntimeError: out of memory")
