"""`eval_tasks` of a recipe: checkpoints of a run, kept until benchmarks have judged them.

    RUN/eval_tasks/step_00005000     the checkpoint's files, hard links: they stay when the run
                                     removes its own
    RUN/eval_tasks/model_00005000    the model exported from it, in its place
    RUN/eval_tasks.jsonl             the scores; the step's folder is gone then

Any number of processes may judge a run's checkpoints together: each step is one's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

from amid_ds.checkpoint.card import CARD_FILE
from amid_ds.checkpoint.export import find_checkpoint, write_export
from amid_ds.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    checkpoint_name,
    checkpoint_step,
)
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.config.reporting_section import EvalTasks
from amid_ds.errors import InputError
from amid_ds.eval.tasks import check_tasks, run_tasks
from amid_ds.files.append import append_line
from amid_ds.files.lease import Lease, LeaseHeldError
from amid_ds.files.ownership import replacing_folder
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_task_scores
from amid_ds.run.places import is_exported

logger = logging.getLogger(__name__)


def keep_for_tasks(run: RunFolder, checkpoint: Path) -> bool:
    """Keep a checkpoint of the run until it is judged. False if it has been, or is kept already.

    It takes no room until the run removes its own, nor time, but where the file system has no hard
    links. Raises OSError.
    """
    step = checkpoint_step(checkpoint)
    if step in judged_steps(run) or step in kept_steps(run):
        return False
    run.task_checkpoints.mkdir(exist_ok=True)
    with replacing_folder(run.task_checkpoints / checkpoint.name) as staging:
        for name in (*Manifest.read(checkpoint).files, MANIFEST_FILE):
            try:
                os.link(checkpoint / name, staging / name)
            except OSError:
                shutil.copyfile(checkpoint / name, staging / name)
    return True


def judged_steps(run: RunFolder) -> set[int]:
    """The steps whose checkpoints have scores."""
    return {line["step"] for line in read_task_scores(run.path)}


def kept_steps(run: RunFolder) -> set[int]:
    """The steps whose checkpoints wait, or are being judged."""
    names = os.listdir(run.task_checkpoints) if run.task_checkpoints.is_dir() else []
    return {int(match[1]) for name in names
            if (match := re.fullmatch(r"(?:step|model)_(\d{8,})", name))}


def export_kept(run: RunFolder, step: int) -> Path:
    """The folder of the model of a kept step, exported, whose checkpoint is gone then.

    The caller has the step's lease. Raises InputError.
    """
    model = _model_of(run, step)
    checkpoint = run.task_checkpoints / checkpoint_name(step)
    if not is_exported(model):
        _, recipe = find_checkpoint(checkpoint)
        write_export(checkpoint, recipe, model, whole=True)
    _remove(checkpoint, MANIFEST_FILE)
    return model


def _model_of(run: RunFolder, step: int) -> Path:
    return run.task_checkpoints / f"model_{step:08d}"


def step_lease(run: RunFolder, step: int) -> Path:
    """The lease of whoever exports or judges a kept step."""
    return run.task_checkpoints / f"step_{step:08d}.lease.json"


def judge_run(folder: str) -> None:
    """`amid-ds tasks RUN`: judge every checkpoint that waits, the earliest first.

    Those that another process is at are left to it; one that cannot be judged waits on, and the
    others are. Raises InputError, for such a one at the end.
    """
    run = RunFolder(Path(folder))
    if not run.exists:
        raise InputError(f"{folder} is not the folder of a run", "a folder with recipe.yaml",
                         "give the recipe's output_dir")
    recipe = load_recipe(run.recipe)
    asked = recipe.eval_tasks
    if asked is None:
        raise InputError(f"the recipe of {folder} has no eval_tasks", "a run whose recipe has some",
                         "of any model: amid-ds eval MODEL --tasks A,B")
    check_tasks(asked.tasks)
    seen: set[int] = set()
    failure: InputError | None = None
    if not kept_steps(run):
        logger.info("%s: no checkpoint waits for its tasks", run.path.name)
    while waiting := sorted(kept_steps(run) - seen):
        step = waiting[0]
        seen.add(step)
        try:
            with Lease.held(step_lease(run, step),
                            f"{run.task_checkpoints} of step {step}") as lease:
                if step in kept_steps(run):
                    _judge(run, step, recipe, asked, lease)
        except LeaseHeldError as held:
            logger.info("step %d is another process's: %s", step, held.found)
        except InputError as error:
            logger.warning("step %d waits on: %s", step, error.found)
            failure = failure or error
    if failure is not None:
        raise failure


def _judge(run: RunFolder, step: int, recipe: Recipe, asked: EvalTasks, lease: Lease) -> None:
    """Add the scores of a kept step to the run's, and remove what was kept."""
    if step not in judged_steps(run):
        model = export_kept(run, step)
        scores = run_tasks(str(model), asked.tasks, apply_chat_template=asked.apply_chat_template,
                           trust_remote_code=recipe.student.trust_remote_code)
        # Another may have taken over while this process was suspended.
        lease.check()
        # Together: a step is judged or it is not.
        append_line(run.task_scores, "\n".join(
            json.dumps({"step": step, "name": name, **metrics}, allow_nan=False)
            for name, metrics in scores.items()))
        for name, metrics in scores.items():
            logger.info("%s: step %d  %s: %s", run.path.name, step, name, "  ".join(
                f"{metric} {value:.4g}" for metric, value in metrics.items() if value is not None))
    _remove(run.task_checkpoints / checkpoint_name(step), MANIFEST_FILE)
    if is_exported(_model_of(run, step)):
        _remove(_model_of(run, step), CARD_FILE)


def _remove(folder: Path, sign: str) -> None:
    """Remove a folder if it has its sign, which goes last: what is cut off is done next time."""
    if not (folder / sign).is_file():
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != sign:
            entry.unlink()
    shutil.rmtree(folder)
