"""The changes of a recipe that would make it fit, each with its price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from amid_ds.config.parse import dump_recipe, parse_recipe
from amid_ds.config.recipe import Lora, Recipe
from amid_ds.errors import InputError
from amid_ds.planning.estimate import Plan, estimate_plan

TENSOR_PARALLEL_SIZES = (2, 4, 8)
OFFLOAD_CONFIG = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class Change:
    """`overrides` as on the command line, and the sections of the recipe that they replace."""

    overrides: str
    sections: Mapping[str, object]


def find_remedies(recipe: Recipe, nodes: int, plan: Plan) -> list[str]:
    """The changes with which `recipe` fits on the ranks and device of `plan`, a line each.

    Single changes; pairs of them where no single one is enough; an empty list where no pair is
    either.
    """
    changes = list(_changes(recipe))
    for candidates in (changes, _pairs(changes)):
        remedies = [remedy for change in candidates
                    if (remedy := _try_change(recipe, nodes, plan, change)) is not None]
        if remedies:
            return remedies
    return []


def _changes(recipe: Recipe) -> Iterator[Change]:
    train, teacher = recipe.train, recipe.live_teacher
    if teacher is not None and teacher.placement in ("node", "replicated"):
        zero3 = {"placement": "zero3", "shard_over": None}
        yield Change("teacher.placement=zero3", {"teacher": teacher.model_copy(update=zero3)})
    half = train.micro_batch_size
    while half > 1 and half % 2 == 0:
        half //= 2
        yield Change(f"train.micro_batch_size={half}",
                     {"train": train.model_copy(update={"micro_batch_size": half})})
    yield Change("student.activation_checkpointing=true",
                 {"student": recipe.student.model_copy(update={"activation_checkpointing": True})})
    for size in TENSOR_PARALLEL_SIZES:
        if size > recipe.tensor_parallel:
            yield Change(f"tensor_parallel={size}", {"tensor_parallel": size})
    yield Change(f"deepspeed={OFFLOAD_CONFIG}", {"deepspeed": OFFLOAD_CONFIG})
    if recipe.student.lora is None:
        # Last: it is another run that is learnt.
        yield Change(f"student.lora.rank={Lora().rank}",
                     {"student": recipe.student.model_copy(update={"lora": Lora()})})


def _pairs(changes: Sequence[Change]) -> list[Change]:
    """Every two changes that replace different sections."""
    return [Change(f"{first.overrides} {second.overrides}", {**first.sections, **second.sections})
            for position, first in enumerate(changes) for second in changes[position + 1:]
            if not first.sections.keys() & second.sections.keys()]


def _try_change(recipe: Recipe, nodes: int, plan: Plan, change: Change) -> str | None:
    """The change, its memory and its time as one line; None where it is not enough."""
    try:
        changed = parse_recipe(dump_recipe(recipe.model_copy(update=change.sections)),
                               change.overrides)
        other = estimate_plan(changed, nodes, plan.ranks, plan.device)
    except InputError:
        # What this recipe, these ranks or this batch cannot have.
        return None
    if not other.fits:
        return None
    return (f"{change.overrides}: {other.memory_per_rank['total'] / 1e9:.1f} GB, "
            f"{other.seconds_per_step / plan.seconds_per_step:.2f} x the time of a step")
