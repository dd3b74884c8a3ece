"""What a run is before its first step: the checked recipe, its identity, its folder, and the
model that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amid_ds.checkpoint import export
from amid_ds.checkpoint.manifest import (
    checkpoint_name,
)
from amid_ds.config.parse import dump_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.config.schedule import loss_at, turning_points
from amid_ds.data import (
    check_sources,
    end_of_text,
    fingerprint,
    load_tokenizer,
    require_same_tokenizer,
)
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.errors import InputError, TrainingError
from amid_ds.files import replace_text
from amid_ds.losses import AMiD
from amid_ds.models import loading
from amid_ds.run.provenance import model_hash, prepared_hash, provenance
from amid_ds.run.warm_start import resolve_student
from amid_ds.training.compatibility import (
    flatten,
    refuse_changes,
    refuse_other_run,
)
from amid_ds.training.objective import build_objective

FINAL_MODEL = "model"      # in the run's folder: the finished student


@dataclass(frozen=True)
class Job:
    """What is known before a weight is read."""

    recipe: Recipe
    deepspeed_config: dict[str, Any]
    objective: AMiD
    tokenizer: Any

    @property
    def run(self) -> Path:
        return Path(self.recipe.output_dir)

    @property
    def student_dtype(self) -> str:
        """What the student trains in; the optimizer's weights are in fp32 always."""
        return "bf16" if self.deepspeed_config.get("bf16", {}).get("enabled") else "fp32"

    @property
    def vocab_size(self) -> int:
        """The ids that both models share; a wider model's further columns are padding."""
        return len(self.tokenizer)


def tell_main(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)


def check_recipe(recipe: Recipe, ranks: int) -> Job:
    """Everything about a recipe that can be judged before a model is loaded or a token is prepared."""
    config = ds_config.read_deepspeed_config(recipe, ds_config.data_parallel_size(recipe, ranks))
    objective, *_ = [build_objective(loss_at(recipe.loss, step, recipe.train.steps))
                     for step in turning_points(recipe.loss, recipe.train.steps)]
    refuse_other_run(recipe)
    check_sources(recipe.data)
    student = resolve_student(recipe)
    widths = {f"student {student.model}": loading.model_config(student.model, **student.hub_kwargs).vocab_size}
    tokenizer = load_tokenizer(student.model, **student.hub_kwargs)
    if recipe.teacher is not None:
        teacher = loading.model_config(recipe.teacher.model, **recipe.teacher.hub_kwargs)
        widths[f"teacher {recipe.teacher.model}"] = teacher.vocab_size
        require_same_tokenizer(tokenizer, load_tokenizer(recipe.teacher.model, **recipe.teacher.hub_kwargs),
                               student.model, recipe.teacher.model)
    loading.require_supported(student.model, **student.hub_kwargs)
    if recipe.teacher is not None:
        loading.require_supported(recipe.teacher.model, **recipe.teacher.hub_kwargs)
    if recipe.rollout is not None:
        end_of_text(tokenizer, recipe.rollout.end_of_text)
    for name, width in widths.items():
        if width < len(tokenizer):
            raise InputError(f"the {name} has a vocabulary of {width}, the tokenizer of {len(tokenizer)}",
                             "a model with a row for every id of the tokenizer",
                             "resize the model's embeddings, or use the tokenizer that it was made with")
    return Job(recipe, config, objective, tokenizer)


def identity_of(job: Job, saved: Path | None) -> dict[str, Any]:
    """What a run learns from, as flat keys: the resolved recipe, and hashes of what it names. Kept in checkpoints.

    Raises InputError where the checkpoint `saved` learnt from something else.
    """
    recipe = job.recipe
    hashes: dict[str, Any] = {"tokenizer.sha256": fingerprint(job.tokenizer),
                              "data.sha256": None if recipe.data.streams else prepared_hash(recipe.prepared_dir)}
    if recipe.data.auxiliary is not None:
        hashes["auxiliary.sha256"] = prepared_hash(recipe.prepared_dir / "auxiliary")
    if recipe.teacher is not None:
        hashes["teacher.sha256"] = model_hash(recipe.teacher.model)
    identity = {**flatten(yaml.safe_load(dump_recipe(recipe))), **hashes, "student.dtype": job.student_dtype}
    if saved is not None:
        refuse_changes(saved, identity, recipe.checkpoint.allow_change)
    return identity


def open_run(job: Job, world: World) -> None:
    """Make the run's folder; write the resolved recipe and where everything came from."""
    def write() -> None:
        try:
            job.run.mkdir(parents=True, exist_ok=True)
            replace_text(job.run / "recipe.yaml", dump_recipe(job.recipe))
            replace_text(job.run / "provenance.json", provenance(job.recipe, job.tokenizer, world.size))
        except OSError as error:
            raise InputError(f"the output folder {job.run} cannot be written: {error}", "a folder that can be written",
                             "set output_dir to another folder") from None
    world.run_on_main(write)


def leave_model(job: Job, world: World) -> None:
    """The finished run's student in the run's folder, as an ordinary Hugging Face folder. Collective."""
    last = job.run / "checkpoints" / checkpoint_name(job.recipe.train.steps)

    def write() -> None:
        if not last.is_dir():
            raise TrainingError(f"the last checkpoint {last} could not be saved\n  make room, and start again: the run "
                                "goes on from the one before")
        export.write_export(last, job.recipe, job.run / FINAL_MODEL)

    world.run_on_main(write)
    tell_main(world, f"{job.run.name}: the model is in {job.run / FINAL_MODEL}")
