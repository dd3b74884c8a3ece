"""`amid-ds status`: a run's progress, from its own files and from Slurm's view of its job."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amid_ds.checkpoint.best import describe_best, describe_early_end
from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints, newest_state
from amid_ds.cluster import slurm
from amid_ds.config.parse import load_recipe
from amid_ds.errors import ExitStatus, InputError, printable
from amid_ds.run import attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics

# The speed is the median over this many of the last logged steps.
RECENT_LINES = 20
ACTIVE_JOB_STATES = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
STATE_BY_STATUS: dict[int, str] = {
    ExitStatus.DONE: "done",
    ExitStatus.BAD_INPUT: "its input was wrong",
    ExitStatus.RESTART: "stopped in good order; start it again to go on",
}


def print_status(run: str | None) -> None:
    """Print the status of one run, or of every run under ./runs."""
    if run is not None and not is_run(Path(run)):
        raise InputError(f"{run} is not the folder of a run",
                         "a folder with recipe.yaml or submissions/",
                         "give the recipe's output_dir")
    if run is not None:
        folders = [Path(run)]
    else:
        folders = sorted(path for path in Path("runs").glob("*") if is_run(path))
    if not folders:
        raise InputError("no run under ./runs", "runs/NAME with recipe.yaml",
                         "amid-ds status RUN, with its output_dir")
    for folder in folders:
        print(printable(str(folder), keep=""))
        for name, value in run_status(folder).items():
            print(f"  {name:<10} {printable(value, keep='')}")


def is_run(folder: Path) -> bool:
    """True for the folder of a run that has begun or been submitted."""
    return RunFolder(folder).exists or RunFolder(folder).submissions.is_dir()


def run_status(run: Path) -> dict[str, str]:
    """The lines that `status` prints, by name; facts not known yet are left out."""
    history = attempts.read_attempts(run)
    submitted = [event for event in attempts.read_events(run) if event["event"] == "submitted"]
    total = _total_steps(run, submitted)
    lines = read_metrics(run)
    reached = newest_state(RunFolder(run))
    early = best = None
    if reached is not None and RunFolder(run).exists:
        recipe = load_recipe(RunFolder(run).recipe)
        early, best = describe_early_end(recipe, reached), describe_best(recipe, reached)
    job = _latest_job(history, submitted)
    job_facts = slurm.show_job(job) if job is not None and slurm.slurm_available() else {}
    status = {"state": f"done, {early}" if early else _state(run, history, total, job_facts),
              "step": f"{lines[-1]['step'] if lines else 0} of {total or 'a number not known yet'}"}
    if lines:
        status |= _progress(lines, None if early else total)
    if best is not None:
        status["best"] = best
    status["restarts"] = str(max(0, len(history) - 1))
    if job is not None:
        status["job"] = job
    if history:
        status["nodes"] = history[-1].nodes
    failed = [attempt for attempt in history if attempt.failure is not None]
    if failed:
        last = failed[-1]
        status["last error"] = f"{last.failure} (job {last.job}, restart {last.restart})"
    return status


def _total_steps(run: Path, submitted: Sequence[Mapping[str, Any]]) -> int | None:
    """`train.steps` of the run's recipe, or of the newest one submitted.

    None without any, and where a submitted one has epochs: the run will count their steps.
    """
    recipes = [RunFolder(run).recipe,
               *(Path(event["folder"]) / "recipe.yaml" for event in reversed(submitted))]
    return next((load_recipe(path).train.steps for path in recipes if path.is_file()), None)


def _latest_job(history: Sequence[attempts.AttemptRecord],
                submitted: Sequence[Mapping[str, Any]]) -> str | None:
    last = history[-1] if history else None
    if submitted and (last is None or submitted[-1]["time"] > last.began):
        return str(submitted[-1]["jobs"][0])
    return last.job if last is not None else None


def _state(run: Path, history: Sequence[attempts.AttemptRecord], total: int | None,
           job_facts: Mapping[str, str]) -> str:
    saved = list_checkpoints(RunFolder(run).checkpoints)
    if saved and checkpoint_step(saved[-1]) == total:
        return "done"
    job_state = job_facts.get("JobState", "")
    if job_state in ACTIVE_JOB_STATES:
        reason = job_facts.get("Reason", "None")
        waits_for = f" ({reason})" if job_state == "PENDING" and reason != "None" else ""
        return job_state.lower() + waits_for
    status = history[-1].status if history else None
    if status is not None:
        return STATE_BY_STATUS.get(status, f"failed (status {status})")
    if job_state:
        return job_state.lower()
    return "running, or killed before it could write its exit status" if history else "not begun"


def _progress(lines: Sequence[Mapping[str, Any]], total: int | None) -> dict[str, str]:
    """Loss, speed and time left, from the lines of metrics.jsonl."""
    last = lines[-1]
    speed = statistics.median(line["tokens_per_second"] for line in lines[-RECENT_LINES:])
    progress = {"loss": f"{last['loss']:.4f}", "tokens/s": f"{speed:,.0f}"}
    steps_left = (total or 0) - last["step"]
    if steps_left > 0 and speed > 0:
        tokens_per_step = last["tokens"] / last["step"]
        minutes, seconds = divmod(int(steps_left * tokens_per_step / speed), 60)
        progress["time left"] = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return progress
