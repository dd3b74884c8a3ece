"""A warm start: `student.model` may name a run or a checkpoint, and this run begins with what was trained there.

Such a student is exported once into the new run's folder (export.py), so that the run does not depend on the other one
from then on. Before that, config and tokenizer are those that the other run began with.
"""

from __future__ import annotations

from pathlib import Path

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Student

START_MODEL = "start"      # in a run's folder: the student as it began, where `student.model` names another run


def find_run(model: str) -> Path | None:
    """The run that `model` names, by its folder or by that of a checkpoint in it; None for any other model."""
    path = Path(model)
    if (path / "recipe.yaml").is_file():
        return path
    run = path.parent.parent
    return run if path.parent.name == "checkpoints" and (run / "recipe.yaml").is_file() else None


def resolve_student(recipe: Recipe, run: Path | None = None) -> Student:
    """The recipe's student as `from_pretrained` opens it, in `run` (None: the recipe's output_dir)."""
    student, run = recipe.student, run or Path(recipe.output_dir)
    while not (run / START_MODEL).is_dir():
        other = find_run(student.model)
        if other is None:
            return student
        run, student = other, load_recipe(other / "recipe.yaml").student
    return student.model_copy(update={"model": str(run / START_MODEL), "revision": None})
