"""A warm start: `student.model` may name a run or a checkpoint, whose weights this run begins with.

The weights are exported once into the new run's folder (checkpoint/export.py), which makes the run
independent of the other one. Before that, config and tokenizer are those the other run began with.
"""

from __future__ import annotations

from pathlib import Path

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.errors import InputError
from amid_ds.run.folder import RunFolder


def find_run(model: str) -> Path | None:
    """The run that `model` names by its folder or by that of one of its checkpoints.

    None for any other model.
    """
    path = Path(model)
    if RunFolder(path).exists:
        return path
    run = RunFolder(path.parent.parent)
    return run.path if path.parent.name == run.checkpoints.name and run.exists else None


def resolve_student(recipe: Recipe, run: Path | None = None) -> Student:
    """The recipe's student with a `model` that `from_pretrained` opens.

    `run`: the run's folder; None: the recipe's output_dir. A student that names another run is
    that run's start_model, or in turn the student of that run's recipe; whether code that comes
    with it may run is said by `recipe`, and so is what of it trains. Raises InputError where that
    leads back to where it began.
    """
    student, folder = recipe.student, RunFolder(run or Path(recipe.output_dir))
    chain = [folder.path]
    while not folder.start_model.is_dir():
        other = find_run(student.model)
        if other is None:
            return recipe.student.model_copy(update={
                "model": student.model, "revision": student.revision,
                "trust_remote_code": student.trust_remote_code})
        chain.append(other)
        if other.resolve() in [earlier.resolve() for earlier in chain[:-1]]:
            raise InputError(
                f"student.model leads back to a run itself: {' -> '.join(map(str, chain))}",
                "a model, or another run that began with one",
                "name the model that the student begins with")
        folder = RunFolder(other)
        student = load_recipe(folder.recipe).trusting(recipe.student.trust_remote_code).student
    return recipe.student.model_copy(update={
        "model": str(folder.start_model), "revision": None,
        "trust_remote_code": student.trust_remote_code})


def kept_student(recipe: Recipe, run: RunFolder) -> Student:
    """The student whose config and tokenizer an export of `run` takes.

    They are kept in the run's folder, but for models with code of their own, and for runs that
    began under version 0.1.
    """
    if run.student_files.is_dir() and not recipe.student.trust_remote_code:
        return recipe.student.model_copy(update={"model": str(run.student_files),
                                                 "revision": None})
    return resolve_student(recipe, run.path)


def frozen_models(recipe: Recipe) -> dict[str, Teacher]:
    """The models that are loaded to distil from, by the recipe's keys; {} where there is none.

    The teacher; with a delta then the teacher's base, and the student's, which is the student as
    the run begins with it if the recipe names no other. All have the teacher's dtype and placement.
    Raises InputError as `resolve_student` does.
    """
    teacher = recipe.live_teacher
    if teacher is None or teacher.delta is None:
        return {} if teacher is None else {"teacher": teacher}
    bases = {"base": teacher.delta.base,
             "student_base": teacher.delta.student_base or resolve_student(recipe)}
    return {"teacher": teacher.model_copy(update={"delta": None}),
            **{f"teacher.delta.{name}": teacher.model_copy(update={
                "delta": None, "model": base.model, **base.hub_kwargs})
               for name, base in bases.items()}}
