"""`eval_tasks` while a run trains: its checkpoints go to jobs of their own, or wait for its end.

In a Slurm job each checkpoint that is to be judged is kept, by hard links, and a job of one GPU is
submitted for it. Elsewhere the model is exported at once, so that a disk need not hold the
optimizer's state of all of them, and all are judged after the run, in one process on rank 0's GPU.
Neither ends a run: what fails is said, and `amid-ds tasks RUN` does the rest at any time.
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints
from amid_ds.cluster import slurm
from amid_ds.cluster.batch_script import log_pattern, read_template, render
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.launch import RANK_VARIABLES
from amid_ds.distributed.leash import start_on_leash
from amid_ds.errors import InputError, expected_error
from amid_ds.eval.run_tasks import (
    export_kept,
    keep_for_tasks,
    kept_steps,
    step_lease,
)
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Lease
from amid_ds.run.folder import RunFolder
from amid_ds.training.callbacks import Callback, CheckpointEvent

# Of the ranks of a run, not of what is started for it.
LAUNCH_VARIABLES = (*RANK_VARIABLES, "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Slurm's variables about the run's job that are also options of the new one.
JOB_OPTIONS = {"partition": "SLURM_JOB_PARTITION", "account": "SLURM_JOB_ACCOUNT",
               "qos": "SLURM_JOB_QOS"}
CPUS = 8

logger = logging.getLogger(__name__)


class TaskJobs(Callback):
    """Has the checkpoints of a run judged, while it trains and at its end. On rank 0."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.eval_tasks is not None
        self.every, self.run = recipe.eval_tasks.every, RunFolder(Path(recipe.output_dir))
        self.submitted: set[int] = set()
        self.failed: set[str] = set()

    def checkpoint(self, event: CheckpointEvent) -> None:
        """Keep the checkpoint if it is to be judged, and submit its job or export its model."""
        if event.step % self.every == 0:
            self._keep(event.checkpoint, event.step)

    def finish(self) -> None:
        """After the run's end: see to what is left, and to the last checkpoint."""
        for last in list_checkpoints(self.run.checkpoints)[-1:]:
            self._keep(last, checkpoint_step(last))
        waiting = kept_steps(self.run)
        if _can_submit():
            if waiting - self.submitted:
                self._try(self._submit)
        elif waiting:
            try:
                self._try(self._judge)
            except KeyboardInterrupt:
                self._say_once("interrupted")
                raise

    def _keep(self, checkpoint: Path, step: int) -> None:
        def keep() -> None:
            if not keep_for_tasks(self.run, checkpoint):
                return
            if _can_submit():
                self._submit()
                return
            with Lease.held(step_lease(self.run, step), f"{self.run.task_checkpoints}"):
                export_kept(self.run, step)

        self._try(keep)

    def _try(self, work: Callable[[], None]) -> None:
        """Do something for the tasks; what fails is said once and ends no run."""
        try:
            work()
        except Exception as error:
            self._say_once(str(expected_error(error) or f"{type(error).__name__}: {error}"))

    def _say_once(self, reason: str) -> None:
        """Say why checkpoints wait, and the command that judges them."""
        if reason not in self.failed:
            self.failed.add(reason)
            logger.warning("the tasks of %s wait: %s\n  to judge what waits: amid-ds tasks %s",
                           self.run.path.name, reason, shlex.quote(str(self.run.path)))

    def _submit(self) -> None:
        """Submit a job that judges all that waits. Raises InputError."""
        logs, script = self.run.logs.absolute(), self.run.task_checkpoints / "job.sbatch"
        logs.mkdir(exist_ok=True)
        options = {name: os.environ[variable] for name, variable in JOB_OPTIONS.items()
                   if os.environ.get(variable)}
        cpus = slurm.cpus_of_nodes(1, options.get("partition"))
        replace_text(script, render(read_template("eval_tasks"), {
            "gpus-per-node": str(int(torch.cuda.is_available())),
            "cpus-per-task": str(min(CPUS, cpus or CPUS)),
            "output": log_pattern(logs, "%j-tasks.log"),
            "PYTHON": sys.executable, **options}))
        waiting = kept_steps(self.run)
        job = slurm.sbatch([str(script), str(self.run.path)], _outside_the_job())
        self.submitted |= waiting
        logger.info("%s: job %s judges step %s, its log is %s", self.run.path.name, job,
                    ", ".join(map(str, sorted(waiting))), logs / f"{job}-tasks.log")

    def _judge(self) -> None:
        """Judge all that waits here, in a process of its own. Raises InputError."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        command = [sys.executable, "-m", "amid_ds", "tasks", str(self.run.path)]
        with start_on_leash(command, env=_outside_the_job()) as process:
            status = process.wait()
        if status:
            raise InputError(f"`{shlex.join(command[1:])}` ended with exit status {status}",
                             "0, and no checkpoint that waits", "look at what it said above")


def _can_submit() -> bool:
    """True in a Slurm job from which another may be submitted."""
    return "SLURM_JOB_ID" in os.environ and slurm.slurm_available()


def _outside_the_job() -> dict[str, str]:
    """This process's environment without what says which rank of which job it is."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES
            and (not name.startswith("SLURM_") or name == "SLURM_CONF")}
