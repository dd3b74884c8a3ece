"""`amid-ds requeue`, for a batch script at its end: name the first failure, requeue or explain.

Slurm's own requeue does not know why a job ended. The rules: a run that is done (0) or has wrong
input (2) is never requeued; one that stopped in good order (75) is, unless several attempts in a
row stopped before their first step; any other end is requeued at most `slurm.max_restarts` times
per job. Two attempts that reached a step and failed at the same one in the same way end the job
too, because a third would fail there as well.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from amid_ds.cluster import slurm
from amid_ds.config.parse import load_recipe
from amid_ds.errors import ExitStatus, InputError, printable
from amid_ds.files.lease import current_attempt
from amid_ds.run import attempts
from amid_ds.run.attempts import HANG_ERROR, AttemptRecord, Failure

logger = logging.getLogger(__name__)

# So many attempts in a row that were stopped before their first step are no accident.
MAX_IDLE_ATTEMPTS = 5
# A batch script prints this as an attempt begins; scripts of version 0.1 say `life`.
ATTEMPT_HEADING = re.compile(r"amid-ds: (?:attempt|life) \d")
# srun's line about a task that ended badly, e.g. `srun: error: n2: task 3: Killed`.
TASK_END = re.compile(
    r"^srun: error: (?P<host>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<end>.*)$", re.M)
OWN_OUTPUT = Path("/proc/self/fd/1")
GOOD_ENDS = (ExitStatus.DONE, ExitStatus.BAD_INPUT, ExitStatus.RESTART)
SRUN_DIED_OF_USR1 = 128 + signal.SIGUSR1
POLL_S = 2


def requeue_or_explain(status: int, recipe_path: str, overrides: Sequence[str]) -> None:
    """`amid-ds requeue STATUS RECIPE`; `status` is srun's, after the ranks have ended."""
    refuse_outside_a_job()
    recipe = load_recipe(recipe_path, overrides)
    run = Path(recipe.output_dir)
    log = _attempt_log()
    status = first_exit_status(status, log)
    failure = None
    if status not in GOOD_ENDS:
        failure = first_failure(attempts.read_failures(run), log, status)
    # Ranks that ended before they made the folder count as an attempt too.
    run.mkdir(parents=True, exist_ok=True)
    attempts.append_event(run, "ended", status=status, failure=asdict(failure) if failure else None)
    job, _ = current_attempt()
    of_this_job = [attempt for attempt in attempts.read_attempts(run) if attempt.job == job]
    why_not = refusal(of_this_job, recipe.slurm.max_restarts)
    if why_not is None and os.environ.get("REQUEUE", "yes") == "no":
        why_not = "the script says REQUEUE=no"
    if why_not is None:
        why_not = _end_by_slurm(slurm.show_job(slurm.current_job()))
    if why_not is None and failure is not None:
        _wait_for_silent_nodes()
    decision = "it is started again" if why_not is None else f"it is not started again: {why_not}"
    print(f"amid-ds: the attempt ended with status {status}: {decision}", flush=True)
    if failure is not None:
        print(f"amid-ds: first to fail: {printable(str(failure))}", flush=True)
    if why_not is None:
        slurm.requeue_job(slurm.current_job())


def refusal(job_attempts: Sequence[AttemptRecord], max_restarts: int) -> str | None:
    """The reason not to requeue a job after these attempts, oldest first; None to requeue it."""
    status = job_attempts[-1].status
    if status == ExitStatus.RESTART:
        return _idle_refusal(job_attempts)
    if status == ExitStatus.DONE:
        return "the run is done"
    if status == ExitStatus.BAD_INPUT:
        return "its input is wrong"
    failed = [attempt for attempt in job_attempts if attempt.status not in (*GOOD_ENDS, None)]
    if len(failed) > max_restarts:
        return f"it has failed {len(failed)} times and slurm.max_restarts is {max_restarts}"
    stepped = [attempt for attempt in failed if attempt.first_step is not None]
    if len(stepped) > 1 and failed[-1] is stepped[-1] and _same_failure(*stepped[-2:]):
        return f"two attempts have ended in the same way: {stepped[-1].failure}"
    return None


def _end_by_slurm(job_facts: Mapping[str, str]) -> str | None:
    """The reason not to requeue a job that Slurm is ending, as after scancel: it would start again.

    None for one at its time limit, and for one of which Slurm says nothing.
    """
    state = job_facts.get("JobState", "RUNNING")
    if state == "RUNNING" or job_facts.get("Reason") == "TimeLimit":
        return None
    return f"Slurm is ending the job ({state.lower()})"


def _idle_refusal(job_attempts: Sequence[AttemptRecord]) -> str | None:
    recent = job_attempts[-MAX_IDLE_ATTEMPTS:]
    idle = [attempt for attempt in recent
            if attempt.status == ExitStatus.RESTART and attempt.first_step is None]
    if len(idle) < MAX_IDLE_ATTEMPTS:
        return None
    return (f"{MAX_IDLE_ATTEMPTS} attempts in a row were stopped before their first step; is "
            "--time longer than --signal takes off it?")


def _same_failure(one: AttemptRecord, other: AttemptRecord) -> bool:
    """True if both failed in the same step with the same error, numbers and addresses aside."""
    if one.failure is None or other.failure is None or one.failure.step is None:
        return False
    errors = {re.sub(r"\b0x[0-9a-f]+|\d+", "#", failure.error)
              for failure in (one.failure, other.failure)}
    return one.failure.step == other.failure.step and len(errors) == 1


def first_exit_status(status: int, log: str) -> int:
    """The exit status of the task that ended first; srun's own `status` where its log has none.

    srun returns its tasks' highest status, so tasks it killed after the first failure mask the
    first one's; recover that from srun's log. A rank that was asked to stop while it was still
    loading dies of the signal: it had nothing to save, so it counts as stopped in good order.
    """
    task = TASK_END.search(log)
    if task is None:
        # srun itself may have died of it before it had started a task.
        return int(ExitStatus.RESTART) if status == SRUN_DIED_OF_USR1 else status
    if task["end"].startswith("User defined signal 1"):
        return int(ExitStatus.RESTART)
    exited = re.fullmatch(r"Exited with exit code (\d+)", task["end"])
    if exited is not None and int(exited[1]) in (ExitStatus.BAD_INPUT, ExitStatus.RESTART):
        return int(exited[1])
    return status


def first_failure(failures: Sequence[Failure], log: str, status: int) -> Failure:
    """The failure of the rank that failed first.

    `failures` are those that ranks recorded, earliest first; `log` has srun's lines about its
    tasks. A rank that was killed records nothing, and its peers' failures follow from its death,
    so srun's line about it comes first then.
    """
    task = TASK_END.search(log)
    hung = any(failure.error.startswith(HANG_ERROR) for failure in failures)
    # Of a step that hung, the watchdog has recorded the rank, and srun kills the others.
    if task is not None and not task["end"].startswith("Exited") and not hung:
        rank = _first_task(task)
        if not any(failure.rank == rank for failure in failures):
            step = max((failure.step for failure in failures if failure.step is not None),
                       default=None)
            error = f"it was ended by a signal ({task['end']})"
            return Failure(rank, task["host"], step, error, time.time())
    if failures:
        return failures[0]
    if task is not None:
        return Failure(_first_task(task), task["host"], None, task["end"], time.time())
    nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
    return Failure(None, nodes, None, f"exit status {status}, no rank recorded why", time.time())


def _first_task(task: re.Match[str]) -> int:
    """The first rank of a list of tasks such as `0-1,3`."""
    return int(re.split("[,-]", task["tasks"])[0])


def _attempt_log() -> str:
    """The part of the job's log that the current attempt has written; '' if it cannot be read.

    The log is this process's own output; the name that scontrol prints is wrong after a `%%`.
    """
    try:
        if not OWN_OUTPUT.is_file():
            return ""
        text = OWN_OUTPUT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    headings = [match.start() for match in ATTEMPT_HEADING.finditer(text)]
    return text[headings[-1]:] if headings else text


def _wait_for_silent_nodes() -> None:
    """Wait until Slurm has noticed every dead node of this job.

    Otherwise the requeued job could get the same node again. Having noticed one, Slurm requeues
    the job itself and ends this script.
    """
    nodes = slurm.expand_hosts(os.environ["SLURM_JOB_NODELIST"])
    silent = [node for node in nodes if not slurm.node_is_up(node)]
    if not silent:
        return
    patience_s = slurm.node_timeout() * 2 + 60
    logger.warning(f"{', '.join(silent)} cannot be reached: waiting up to {patience_s} s for Slurm "
                   "to notice")
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and not all(slurm.node_is_up(node) for node in silent):
        time.sleep(POLL_S)


def refuse_outside_a_job() -> None:
    """Raise InputError outside a Slurm job."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("this is not a Slurm job",
                         "a batch script made from slurm/*.sbatch, which calls this at its end",
                         "to submit a run: amid-ds submit RECIPE")
