"""What a resumed run may change, and the refusal of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from amid_ds.checkpoint.manifest import (
    read_manifest,
)
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError

# What may differ between the lives of a run, because it does not change what is learnt.
MAY_CHANGE = ("checkpoint", "slurm", "output_dir", "data.workers", "data.prepared", "train.log_every",
              "train.hang_timeout", "train.max_hours", "train.micro_batch_size", "student.activation_checkpointing",
              "train.profile", "teacher.max_tokens_per_pass", "teacher.placement", "tensor_parallel",
              "deepspeed")      # but for its dtype, which is kept as student.dtype
EVALUATION_KEYS = ("data.eval", "train.eval_every")      # nor these, but where rollouts listen to it


def refuse_other_run(recipe: Recipe) -> None:
    """An output folder holds one run: the recipe that it was started with, but for what changes nothing learnt."""
    saved = Path(recipe.output_dir) / "recipe.yaml"
    if not saved.exists():
        return
    before, now = (flatten(yaml.safe_load(dump_recipe(r))) for r in (load_recipe(saved), recipe))
    lines = _differences(before, now, recipe.checkpoint.allow_change)
    if lines:
        raise InputError(f"{recipe.output_dir} holds the run of another recipe:\n{lines}",
                         "a new output_dir, or the recipe that the run was started with",
                         "set output_dir to another folder, take the changes back, or name the keys in "
                         "checkpoint.allow_change")


def changes_since_last_attempt(recipe: Recipe) -> dict[str, list[Any]]:
    """The keys in which the recipe differs from that of the life before, each with [before, now]; {} in the first."""
    saved = Path(recipe.output_dir) / "recipe.yaml"
    if not saved.exists():
        return {}
    before, now = (flatten(yaml.safe_load(dump_recipe(r))) for r in (load_recipe(saved), recipe))
    return {key: [before.get(key), now.get(key)] for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)}


def refuse_changes(saved: Path, identity: dict[str, Any], allowed: Sequence[str]) -> None:
    """A run goes on with the teacher, tokenizer, data and objective of the life before, or says what has changed."""
    state = read_manifest(saved)["state"]
    lines = _differences({**state["identity"], "student.dtype": state["student_dtype"]}, identity, allowed)
    if lines:
        raise InputError(f"what {saved} was trained with has changed since:\n{lines}",
                         "the same teacher, tokenizer, data and objective",
                         "take the changes back, take another output_dir, or name the keys in checkpoint.allow_change")


def _differences(before: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> str:
    """A line for each key that differs and may not."""
    listened = any(key.startswith("rollout.adaptive.") for key in (*before, *now))
    free = (*MAY_CHANGE, *(() if listened else EVALUATION_KEYS), *allowed)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
               and not any(key == name or key.startswith(f"{name}.") for name in free)]
    return "\n".join(f"    - {key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in changed)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested recipe as dotted keys, lists by index."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        leaves.update(flatten(child, f"{prefix}.{name}" if prefix else str(name)))
    return leaves
