"""`amid-ds train`: check everything, build one engine, resume, train, leave the model."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

from amid_ds.checkpoint import reshard
from amid_ds.checkpoint.best import describe_early_end, has_finished
from amid_ds.checkpoint.manifest import Manifest, ResumePoint, find_latest_valid
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.parse import RecipeLike, load_recipe
from amid_ds.config.recipe import Train
from amid_ds.data import prepare_all
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.backend import groups_forgotten, import_libraries
from amid_ds.engine.build import build_engine
from amid_ds.engine.expert_parallel import with_expert_groups
from amid_ds.errors import InputError
from amid_ds.files.lease import Fence
from amid_ds.monitor.hang_watchdog import GRACE_S
from amid_ds.run.attempts import Attempt
from amid_ds.run.provenance import SourceHashes
from amid_ds.run.results import Run
from amid_ds.run.start import StartClock, end_part, imports_kept
from amid_ds.run.warm_start import resolve_student
from amid_ds.training.cached_teacher import require_cache_of_data
from amid_ds.training.callbacks import Callback, Callbacks, load_callbacks
from amid_ds.training.compatibility import pin
from amid_ds.training.determinism import deterministic
from amid_ds.training.job import (
    Job,
    begin_from,
    changes_of,
    check_recipe,
    count_steps,
    hold_run,
    identity_of,
    open_run,
)
from amid_ds.training.placement import place_teacher
from amid_ds.training.rollout import check_prompt_lengths
from amid_ds.training.selection import export_missing_models
from amid_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(recipe: RecipeLike, overrides: Sequence[str] = (), began: float | None = None,
          callbacks: Sequence[Callback] = ()) -> Run:
    """Train by a recipe and return the finished run; every rank of every launcher calls this.

    began: when the start began, by time.monotonic(), such as the process's own; None: now.
    callbacks: told, on rank 0, before those that the recipe names. Raises InputError, TrainingError
    or Stopped.
    """
    with StartClock(time.monotonic() if began is None else began):
        own, timeout = None, Train.model_fields["hang_timeout"].default
        # A recipe that is wrong is reported by all ranks at once, below.
        with contextlib.suppress(InputError):
            own = load_recipe(recipe, overrides)
            timeout = own.train.hang_timeout
        end_part("imports")
        # The hang watchdog ends a step that hangs, before a collective gives up by itself.
        with (groups_forgotten(), init_distributed(timeout + GRACE_S) as world,
              Attempt(world.rank, world.size) as attempt):
            end_part("joining")
            if own is not None:
                with imports_kept():
                    import_libraries()
            end_part("imports")
            # Nodes may see different commits of a model on the hub: rank 0 decides.
            pinned = world.run_on_main(lambda: pin(load_recipe(recipe, overrides)))
            # Nobody else runs the user's own code.
            told = world.run_checked(
                lambda: load_callbacks(pinned.train.callbacks, callbacks) if world.is_main else [])
            job = world.run_checked(lambda: check_recipe(pinned, world.size, world.is_main))
            job = place_teacher(job, world)
            world = world.split(job.recipe.tensor_parallel, ds_config.teacher_shard_ranks(
                job.placed_recipe, job.deepspeed_config))
            world = with_expert_groups(job.placed_recipe, job.deepspeed_config, world)
            with deterministic(pinned.train.deterministic), hold_run(job, world) as fence:
                _train(job, world, attempt, fence, Callbacks(job.run.path, told))
    return Run(job.run.path)


def _train(job: Job, world: World, attempt: Attempt, fence: Fence, callbacks: Callbacks) -> None:
    """Open the run, resume, train; the run's lease is held."""
    world.run_on_main(lambda: begin_from(job))
    job = count_steps(job, world)
    changed = world.run_on_main(lambda: changes_of(job))
    end_part("checks")
    hashes = open_run(job, world)
    end_part("hashing")
    world.run_checked(lambda: attempt.begin(job.run.path, changed))
    resume = find_latest_valid(job.run.checkpoints, world)
    end_part("checks")
    state = world.run_on_main(lambda: TrainState() if resume.checkpoint is None
                              else Manifest.read(resume.checkpoint).state)
    if has_finished(job.recipe, state):
        logger.info("%s %s: nothing to do", job.run.path, describe_early_end(job.recipe, state)
                    or f"has reached its last step {state.step}")
        export_missing_models(job, state, world, fence)
        return
    build_trainer(job, hashes, resume, world, attempt, fence, callbacks).run()


def build_trainer(job: Job, hashes: SourceHashes, resume: ResumePoint, world: World,
                  attempt: Attempt, fence: Fence, callbacks: Callbacks) -> Trainer:
    """Prepared data, the engine, and the state to go on from, put together. Collective."""
    recipe = job.recipe

    def prepare() -> dict[str, object]:
        prepare_all(recipe.data, recipe.train.seq_length, job.tokenizer, recipe.prepared_dir)
        check_prompt_lengths(recipe)
        require_cache_of_data(recipe)
        return identity_of(job, hashes, resume.checkpoint)

    identity = world.run_on_main(prepare)
    end_part("data")
    consolidated = None
    if resume.checkpoint is not None:
        consolidated = reshard.ensure_consolidated(resume.checkpoint, job.layout(world),
                                                   resolve_student(recipe), world)
        end_part("resuming")
    engine = world.run_checked(
        lambda: build_engine(job.placed_recipe, job.deepspeed_config, job.vocab_size, world,
                             resumes=resume.checkpoint is not None,
                             first_pieces=None if job.grown is None else job.grown.first_pieces))
    end_part("engine")
    state = TrainState()
    if resume.checkpoint is not None:
        checkpoint = resume.checkpoint
        state = world.run_checked(lambda: reshard.load_checkpoint(engine, checkpoint, consolidated))
        end_part("resuming")
    # Not before: a student that resumes has no weights until then.
    world.run_checked(lambda: engine.check_models(job.vocab_size, recipe.data.isolates_any))
    end_part("check of logits")
    return Trainer(job, engine, state, identity, resume.damaged, attempt, fence, callbacks)
