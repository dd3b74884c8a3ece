"""`amid-ds train`: check everything, build one engine, resume, train, leave the model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from amid_ds.checkpoint import export, reshard
from amid_ds.checkpoint.manifest import (
    checkpoint_step,
    current_layout,
    find_latest_valid,
    load_checkpoint,
)
from amid_ds.config.parse import load_recipe
from amid_ds.data import (
    prepare_all,
)
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.engine import build, ds_config, engine
from amid_ds.errors import InputError
from amid_ds.monitor.hang_watchdog import GRACE_S
from amid_ds.run.attempts import Attempt
from amid_ds.run.warm_start import resolve_student
from amid_ds.training.compatibility import (
    changes_since_last_attempt,
)
from amid_ds.training.job import (
    FINAL_MODEL,
    check_recipe,
    identity_of,
    leave_model,
    open_run,
    tell_main,
)
from amid_ds.training.rollout import check_prompt_lengths
from amid_ds.training.trainer import (
    run_training,
)


def train(recipe_path: str, overrides: Sequence[str]) -> None:
    """`amid-ds train`: every rank of every launcher comes through here. Raises InputError, TrainingError or Stopped."""
    timeout = 1800.0
    with contextlib.suppress(InputError):      # said by all ranks at once below
        timeout = load_recipe(recipe_path, overrides).train.hang_timeout
    # A step that hangs is the watchdog's to end, before a collective gives up by itself.
    with init_distributed(timeout + GRACE_S) as world, Attempt(world.rank, world.size) as life:
        job = world.run_checked(lambda: check_recipe(load_recipe(recipe_path, overrides), world.size))
        world = world.split(job.recipe.tensor_parallel)
        world.run_on_main(lambda: export.start_from(job.recipe))
        changed = world.run_on_main(lambda: changes_since_last_attempt(job.recipe))
        open_run(job, world)
        world.run_checked(lambda: life.begin(job.run, changed))
        recipe = job.recipe
        found = find_latest_valid(job.run / "checkpoints", world, lambda message: tell_main(world, message))
        if found.checkpoint is not None and checkpoint_step(found.checkpoint) == recipe.train.steps:
            tell_main(world, f"{job.run} has reached its last step {recipe.train.steps}: nothing to do")
            if not world.gather((job.run / FINAL_MODEL).is_dir())[0]:      # killed between its last save and its export
                leave_model(job, world)
            return
        world.run_on_main(lambda: prepare_all(recipe.data, recipe.train.seq_length, job.tokenizer,
                                                 recipe.prepared_dir))
        world.run_on_main(lambda: check_prompt_lengths(recipe, lambda message: tell_main(world, message)))
        identity = world.run_checked(lambda: identity_of(job, found.checkpoint))
        layout = current_layout(world, ds_config.zero_stage(job.deepspeed_config), job.student_dtype)
        whole = reshard.ensure_consolidated(found.checkpoint, layout, resolve_student(recipe), world) if found.checkpoint else None
        ds = world.run_checked(lambda: build.build_engine(recipe, job.deepspeed_config, job.objective, job.vocab_size,
                                                       world))
        world.run_checked(lambda: engine.check_models(ds, job.vocab_size, recipe.data.isolates_any))
        state: dict[str, Any] = {"step": 0, "tokens": 0}
        if found.checkpoint is not None:
            loaded = found.checkpoint
            state = world.run_checked(lambda: reshard.load_consolidated(ds, whole, world) if whole else load_checkpoint(ds, loaded))
        state["tokens_per_pass"] = engine.choose_teacher_batch(ds, recipe, state.get("tokens_per_pass"), world)
        run_training(job, ds, {**state, "identity": identity}, found.damaged, world, life)
