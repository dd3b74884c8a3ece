"""What the batch script asks after a life: name the rank that failed first, and start again or let it be.

Slurm's own requeue knows nothing of why a job ended. The rules: a run that is done (0) or whose input is wrong (2) is
never started again; one that stopped in good order (75) always is; any other end at most `slurm.max_restarts` times per
job, and not after two lives that came to step and failed at the same step in the same way, because a third would too.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from amid_ds.cluster import slurm
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.run import attempts
from amid_ds.run.attempts import AttemptRecord, Failure

DONE, WRONG, STOPPED = 0, 2, 75
IDLE_ATTEMPTS = 5      # stopped before their first step: as many in a row are no accident
FIRST_LINE = "amid-ds: life "      # what a batch script prints when a life begins
# srun: error: n2: task 3: Killed
TASK = re.compile(r"^srun: error: (?P<host>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<end>.*)$", re.M)


def requeue_or_explain(status: int, recipe_path: str, overrides: Sequence[str]) -> None:
    """`amid-ds requeue STATUS RECIPE`: to be run by the batch script when its ranks have ended with `status`."""
    refuse_outside_a_job()
    recipe = load_recipe(recipe_path, overrides)
    run = Path(recipe.output_dir)
    log = _words_of(slurm.show_job(slurm.current_job()))
    status = first_exit_status(status, log)
    failure = None
    if status not in (DONE, WRONG, STOPPED):
        failure = first_failure(attempts.read_failures(run), log, status)
    run.mkdir(parents=True, exist_ok=True)      # ranks that never came so far are counted too
    attempts.append_event(run, "ended", status=status, failure=asdict(failure) if failure else None)
    of_this_job = [life for life in attempts.read_attempts(run) if life.job == attempts.current_attempt()[0]]
    why_not = refusal(of_this_job, recipe.slurm.max_restarts)
    if why_not is None and os.environ.get("REQUEUE", "yes") == "no":
        why_not = "the script says REQUEUE=no"
    if why_not is None and failure is not None:
        _wait_for_silent_nodes()
    print(f"amid-ds: the life ended with status {status}: "
          + ("it is started again" if why_not is None else f"it is not started again: {why_not}"), flush=True)
    if failure is not None:
        print(f"amid-ds: first to fail: {failure}", flush=True)
    if why_not is None:
        slurm.requeue_job(slurm.current_job())


def refusal(job: Sequence[AttemptRecord], max_restarts: int) -> str | None:
    """Why a job whose lives so far were these is not started again; None: it is."""
    status = job[-1].status
    if status == STOPPED:
        idle = [life.status == STOPPED and life.first_step is None for life in job[-IDLE_ATTEMPTS:]]
        return (f"{IDLE_ATTEMPTS} lives in a row were stopped before their first step; is --time longer than --signal "
                "takes off it?" if idle == [True] * IDLE_ATTEMPTS else None)
    if status == DONE:
        return "the run is done"
    if status == WRONG:
        return "its input is wrong"
    failed = [life for life in job if life.status not in (DONE, WRONG, STOPPED, None)]
    if len(failed) > max_restarts:
        return f"it has failed {len(failed)} times and slurm.max_restarts is {max_restarts}"
    came_to_step = [life for life in failed if life.first_step is not None]
    if len(came_to_step) > 1 and failed[-1] is came_to_step[-1] and _same_end(*came_to_step[-2:]):
        return f"two lives have ended in the same way: {came_to_step[-1].failure}"
    return None


def _same_end(one: AttemptRecord, other: AttemptRecord) -> bool:
    if one.failure is None or other.failure is None:
        return False
    way = [(failure.step, re.sub(r"\b0x[0-9a-f]+|\d+", "#", failure.error)) for failure in (one.failure, other.failure)]
    return way[0] == way[1] and way[0][0] is not None


def first_exit_status(status: int, log: str) -> int:
    """srun's own status is the highest of its tasks: those that it ended because of the first hide that one's.

    A rank that was asked to stop while it was still being loaded dies of the signal: it had nothing to save.
    """
    tasks = TASK.search(log)
    if tasks is not None and tasks["end"].startswith("User defined signal 1"):
        return STOPPED
    said = re.fullmatch(r"Exited with exit code (\d+)", tasks["end"]) if tasks is not None else None
    return int(said[1]) if said is not None and int(said[1]) in (WRONG, STOPPED) else status


def first_failure(words: Sequence[Failure], log: str, status: int) -> Failure:
    """The rank that failed first, from what ranks have left and from srun's lines on how its tasks ended.

    A rank that was killed leaves no words, and those of its peers come from its death: srun's word goes first then.
    """
    step = max((failure.step for failure in words if failure.step is not None), default=None)
    tasks = TASK.search(log)
    hung = any("has not ended" in failure.error for failure in words)      # the watchdog has named the rank
    if tasks is not None and not tasks["end"].startswith("Exited") and not hung:
        rank = int(re.split("[,-]", tasks["tasks"])[0])
        if not any(failure.rank == rank for failure in words):
            return Failure(rank, tasks["host"], step, f"it was ended by a signal ({tasks['end']})", time.time())
    if words:
        return words[0]
    if tasks is not None:
        rank = int(re.split("[,-]", tasks["tasks"])[0])
        return Failure(rank, tasks["host"], None, tasks["end"], time.time())
    return Failure(None, os.environ.get("SLURM_JOB_NODELIST", "?"), None, f"exit status {status}, no last words",
                   time.time())


def _words_of(facts: dict[str, str]) -> str:
    """What the job's log holds of this life."""
    try:
        text = Path(facts["StdOut"]).read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError):
        return ""
    return text[text.rfind(FIRST_LINE) + 1:]


def _wait_for_silent_nodes() -> None:
    """A dead node that Slurm has not noticed would be handed out again: wait until it has, whereupon it requeues the
    job itself, and ends this script."""
    silent = [node for node in slurm.expand_hosts(os.environ["SLURM_JOB_NODELIST"]) if not slurm.node_is_up(node)]
    if not silent:
        return
    patience = slurm.node_timeout() * 2 + 60
    print(f"amid-ds: {', '.join(silent)} cannot be reached: waiting up to {patience} s for Slurm to notice", flush=True)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not all(slurm.node_is_up(node) for node in silent):
        time.sleep(2)


def refuse_outside_a_job() -> None:
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("this is not a Slurm job", "a batch script made from slurm/*.sbatch, which calls this at its "
                         "end", "to submit a run: amid-ds submit RECIPE")
