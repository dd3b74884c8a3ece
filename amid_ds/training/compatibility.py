"""What a resumed run may change, and the refusal of everything else.

A run is identified by what it learns from: the resolved recipe and hashes of what that names, as
flat keys. A checkpoint keeps this identity, and a later attempt must have the same one, apart from
keys that do not affect what is learnt and keys that the user allows by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from amid_ds.checkpoint.manifest import Manifest
from amid_ds.config.parse import default_of, flattened, load_recipe, resolved
from amid_ds.config.recipe import PretrainedModel, Recipe, Teacher
from amid_ds.errors import InputError
from amid_ds.models.loading import resolved_commit
from amid_ds.run.folder import RunFolder

# Keys that a resumed run may change: they do not affect what is learnt. Of `deepspeed` that is all
# but the precision, which the identity has as student.dtype.
MAY_CHANGE = ("checkpoint", "slurm", "output_dir", "data.workers", "data.prepared",
              "train.log_every", "train.statistics", "train.trackers", "train.callbacks",
              "train.samples", "eval_tasks", "train.hang_timeout", "train.max_hours",
              "train.micro_batch_size", "train.deterministic",
              "student.activation_checkpointing", "train.profile",
              "teacher.max_tokens_per_pass", "teacher.cached", "teacher.placement",
              "teacher.shard_over", "tensor_parallel", "expert_parallel", "deepspeed")
# No leave to change these, and the reason: a checkpoint holds the tensors that were trained, and
# the moments of the optimizer that trained them.
KEPT = ("train.optimizer", "student.freeze", "student.lora.rank", "student.lora.alpha",
        "student.lora.targets", "student.lora.modules_to_save")
WHY_KEPT = ("; no leave changes it, because a checkpoint has no other optimizer's moments, and no "
            "other tensors than were trained, at their own scale: take another output_dir, and "
            "this run as student.model")
# By section the keys whose defaults are not what runs did whose recipe.yaml lacks them. Version 0.1
# had none of the first two of `train`, and wrote the third; mixtures had no loss of their routers.
CHANGED_DEFAULTS: dict[str, dict[str, object]] = {
    "train": {"betas": [0.9, 0.999], "decay_all": True, "weight_decay": 0.01},
    "student": {"router_aux_loss": 0.0}}
# Where the recipe names none of these, the teacher lies as the run began.
PLACES = {"placement", "shard_over"}
# Also free, unless rollout.adaptive uses the validation loss.
EVALUATION_KEYS = ("data.eval", "train.eval_every")


def pin(recipe: Recipe) -> Recipe:
    """The recipe with the commit of each model on the hub as its `revision`, and with the old
    defaults where the run in the output folder began with them.

    A branch moves: where the recipe names no revision, it is the commit that the run began with, in
    a new run today's. One that it does name must still be that commit. A key of CHANGED_DEFAULTS
    that the recipe does not name is likewise what it was when the run began.
    """
    began = _recipe_of_run(recipe.output_dir)
    if began is not None:
        recipe = _with_defaults(recipe, lambda section, key, value:
                                getattr(getattr(began, section), key) == value)
    pinned: dict[str, object] = {}
    for section in ("student", "teacher"):
        model = getattr(recipe, section)
        if not isinstance(model, PretrainedModel):
            continue
        before = getattr(began, section, None)
        if not isinstance(before, type(model)):
            # Another kind of teacher, which is refused later.
            before = None
        kept: dict[str, object] = {"revision": _commit(model, before)}
        delta = getattr(model, "delta", None)
        if delta is not None:
            had = getattr(before, "delta", None)
            kept["delta"] = delta.model_copy(update={
                name: base.model_copy(update={"revision": _commit(base, getattr(had, name, None))})
                for name, base in delta.bases.items()})
        if isinstance(before, Teacher) and not PLACES & model.model_fields_set:
            # It was zero3 by default.
            kept["placement"] = before.placement
        pinned[section] = model.model_copy(update=kept)
    return recipe.model_copy(update=pinned)


def _commit(model: PretrainedModel, before: PretrainedModel | None) -> str | None:
    """The commit of a model on the hub: that of the run's begin, or what its revision is now."""
    if model.revision is None and before is not None and before.model == model.model:
        return before.revision
    return resolved_commit(model.model, model.revision) or model.revision


def _with_defaults(recipe: Recipe, had: Callable[[str, str, object], bool]) -> Recipe:
    """The recipe with those of CHANGED_DEFAULTS that `had` is true of (a section, a key, its value)
    where it does not name the key."""
    changed: dict[str, object] = {}
    for section, defaults in CHANGED_DEFAULTS.items():
        own = getattr(recipe, section)
        changed[section] = own.model_copy(update={
            key: value for key, value in defaults.items()
            if key not in own.model_fields_set and had(section, key, value)})
    return recipe.model_copy(update=changed)


def _recipe_of_run(output_dir: str) -> Recipe | None:
    """The recipe of the run in the folder; None where there is none."""
    saved = RunFolder(Path(output_dir)).recipe
    if not saved.exists():
        return None
    # A run's recipe names every key that its version knew.
    return _with_defaults(load_recipe(saved), lambda *_: True)


def refuse_other_run(recipe: Recipe) -> None:
    """Raise InputError where the output folder holds the run of another recipe."""
    began = _recipe_of_run(recipe.output_dir)
    if began is None:
        return
    # The number of steps is compared once it is known.
    unknown = () if recipe.train.epochs is None else ("train.steps", "train.epochs")
    lines = _differences(flat_recipe(began), flat_recipe(recipe),
                         (*recipe.checkpoint.allow_change, *unknown))
    if lines:
        raise InputError(f"{recipe.output_dir} holds the run of another recipe:\n{lines}",
                         "a new output_dir, or the recipe that the run was started with",
                         "set output_dir to another folder, take the changes back, or name the "
                         "keys in checkpoint.allow_change")


def changes_since_last_attempt(recipe: Recipe) -> dict[str, list[object]]:
    """The recipe's keys that differ from the last attempt's, each with [before, now].

    {} in the first attempt.
    """
    began = _recipe_of_run(recipe.output_dir)
    if began is None:
        return {}
    before, now = flat_recipe(began), flat_recipe(recipe)
    return {key: [before.get(key), now.get(key)] for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)}


def refuse_other_identity(checkpoint: Path, identity: Mapping[str, object],
                          allowed: Sequence[str]) -> None:
    """Raise InputError if the checkpoint learnt from another teacher, tokenizer, data or loss."""
    saved = Manifest.read(checkpoint)
    before = {**saved.identity, "student.dtype": saved.layout.student_dtype}
    lines = _differences(before, identity, allowed)
    if lines:
        raise InputError(f"what {checkpoint} was trained with has changed since:\n{lines}",
                         "the same teacher, tokenizer, data and objective",
                         "take the changes back, take another output_dir, or name the keys in "
                         "checkpoint.allow_change")


def _differences(before: Mapping[str, object], now: Mapping[str, object],
                 allowed: Sequence[str]) -> str:
    """A line for each key that differs and may not.

    A key that an older version did not know has had its default, that of then.
    """
    uses_evaluation = any(key.startswith("rollout.adaptive.") for key in (*before, *now))
    free = (*MAY_CHANGE, *(() if uses_evaluation else EVALUATION_KEYS), *allowed)
    before = {**{key: _default_in(before, key) for key in now.keys() - before.keys()},
              **flattened(CHANGED_DEFAULTS), **before}
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
               and (_is_any(key, KEPT) or not _is_any(key, free))]
    return "\n".join(f"    - {key}: {before.get(key)!r} before, {now.get(key)!r} now"
                     f"{WHY_KEPT * _is_any(key, KEPT)}" for key in changed)


def _default_in(before: Mapping[str, object], key: str) -> object:
    """The value of a key that `before` lacks: its default, or None where its section was not there.
    """
    section = key.rpartition(".")[0]
    was_there = not section or any(other.startswith(f"{section}.") for other in before)
    return default_of(key) if was_there or default_of(section) is not None else None


def _is_any(key: str, names: Sequence[str]) -> bool:
    """True for a key that is one of `names`, or in the section that one of them is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat_recipe(recipe: Recipe) -> dict[str, object]:
    """The resolved recipe as dotted keys, lists by index."""
    return flattened(resolved(recipe))
