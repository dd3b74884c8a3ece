"""The training loop: fetch, reduce step info, roll out, step, monitor, evaluate, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from amid_ds.checkpoint.best import describe_early_end, has_finished
from amid_ds.checkpoint.manifest import checkpoint_name
from amid_ds.checkpoint.saver import Saver
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.schedule import learning_rate
from amid_ds.data import StreamLoader, merge_stream_states
from amid_ds.engine.engine import Engine
from amid_ds.errors import Stopped
from amid_ds.files.lease import Fence, LeaseLostError
from amid_ds.monitor.monitors import Monitors, PlannedCosts
from amid_ds.monitor.step_timer import phase
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.planning.devices import local_device
from amid_ds.planning.estimate import planned_flops
from amid_ds.run.attempts import Attempt
from amid_ds.run.log import RunLog, read_metrics
from amid_ds.run.start import end_start
from amid_ds.training.callbacks import Callbacks
from amid_ds.training.fetch import (
    AuxiliaryBatch,
    FetchedStep,
    StepInfo,
    describe_epochs,
    fetch_steps,
    open_step_data,
    reduce_step_info,
)
from amid_ds.training.job import Job, export_final_model
from amid_ds.training.rollout import Rollouts, StepBatch
from amid_ds.training.sample_scores import SampleScores
from amid_ds.training.selection import Selection, export_best_model
from amid_ds.training.step import Metrics, Stepper
from amid_ds.training.validation import validate

logger = logging.getLogger(__name__)


class Trainer(Stepper):
    """One attempt of a run, from `state` to the recipe's last step.

    All ranks make the same calls.
    """

    def __init__(self, job: Job, engine: Engine, state: TrainState, identity: Mapping[str, object],
                 damaged: frozenset[Path], attempt: Attempt, fence: Fence,
                 callbacks: Callbacks) -> None:
        super().__init__(job.recipe, engine, state)
        self.job, self.attempt, self.fence, self.callbacks = job, attempt, fence, callbacks
        # On rank 0, once another process has taken over the run; every rank raises it together.
        self.lost: LeaseLostError | None = None
        self.data, self.auxiliary = self.world.run_checked(
            lambda: open_step_data(job, state, self.world))
        self.rollouts = self._open_rollouts()
        self.selection = Selection(self.recipe, state)
        self.samples = self.world.run_checked(
            lambda: SampleScores(self.recipe, engine, job.tokenizer))
        self.saver = Saver(engine, job.run.checkpoints, self.recipe.checkpoint, identity, damaged,
                           fence, self._saved, self.selection.lost)
        self.saved_step = state.step

    def run(self) -> None:
        """Make every step that is left; each orderly way out ends with a finished save.

        Raises Stopped where the run was asked to stop, InputError for damaged data, TrainingError
        for a NaN, for a callback that fails, or where checkpoints cannot be saved.
        """
        with (self._open_log() as self.log, self._open_stop_request() as self.stop,
              self._open_monitors() as monitors):
            self._log_start()
            for fetched in fetch_steps(self.data, self.auxiliary, self.job.vocab_size,
                                       self.state.step, self.recipe.train.total_steps,
                                       self.job.grown):
                monitors.step_begin(self.state.step + 1)
                info = self._reduce_info(fetched)
                if info.stop:
                    break
                monitors.step_agreed()
                batch = self._roll_out(StepBatch(fetched.window, info.tokens, info.sequences,
                                                 info.padding))
                with monitors.train_step(self.engine):
                    metrics = self.train_step(batch, self._auxiliary_batch(fetched, info))
                self._end_start()
                self._log_step(metrics, batch, info, monitors)
                self._evaluate(monitors)
                self._save_if_due()
                if self.selection.has_ended:
                    break
                monitors.restart_clock()
            monitors.rest()
            self._finish()

    def _end_start(self) -> None:
        """After the first step: where the time went until then, in the log and provenance.json."""
        start = end_start("first step")
        if start is None or not self.world.is_main or not self._holds_run():
            return
        logger.info("%s", start)
        try:
            start.record(self.job.run)
        except OSError as error:
            logger.warning("the times of the start could not be written: %s", error)

    def _reduce_info(self, fetched: FetchedStep) -> StepInfo:
        """The step's agreement; a save that every rank has written is committed."""
        if self.lost is not None:
            fetched = fetched._replace(error=self.lost)
        ends = self.stop.reason() is not None or self.callbacks.failure is not None
        info = reduce_step_info(fetched, ends, self.saver.writing, self.world)
        if self.saver.pending and not info.writing:
            with phase("checkpoint"):
                self.saver.finish()
        return info

    def _auxiliary_batch(self, fetched: FetchedStep, info: StepInfo) -> AuxiliaryBatch | None:
        if self.auxiliary is None:
            return None
        return AuxiliaryBatch(fetched.auxiliary, info.auxiliary_tokens)

    def _open_rollouts(self) -> Rollouts | None:
        rollout = self.recipe.rollout
        if rollout is None or rollout.adaptive is None:
            # An earlier attempt had adaptive rollouts; this one keeps no replay buffer for them.
            self.state.rollout = None
        if rollout is None:
            return None
        return self.world.run_checked(
            lambda: Rollouts(self.recipe, self.engine, self.job.tokenizer, self.state))

    def _roll_out(self, batch: StepBatch) -> StepBatch:
        """The batch that the step learns from: the data's, or one of student samples."""
        if self.rollouts is None:
            return batch
        with phase("rollout"):
            return self.rollouts.batch_for_step(batch)

    def _evaluate(self, monitors: Monitors) -> None:
        """Evaluate where that is due, before the save: a resumed run has had it."""
        train, step = self.recipe.train, self.state.step
        due = step == train.total_steps or (train.eval_every > 0 and step % train.eval_every == 0)
        if not self.recipe.data.eval or not due:
            return
        monitors.evaluation_begin()
        with phase("evaluation"):
            metrics = self.world.run_checked(lambda: validate(self.recipe, self.engine,
                                                              self.job.grown))
            self.world.run_checked(
                lambda: self.samples.add_to(metrics, monitors.evaluation_begin))
            # What is decided by them is decided alike: the same digits on every rank.
            metrics = self.world.broadcast(metrics)
            if self._holds_run():
                self.log.evaluation(step, metrics)
                self.callbacks.evaluation(step, metrics)
        if self.rollouts is not None:
            self.rollouts.update_threshold(metrics)
        if self.selection.improves(metrics):
            with phase("checkpoint"):
                # The best so far may be still being written: it is there then, or never was best.
                self.saver.finish()
        self.selection.note(step, metrics)

    def _save_if_due(self) -> None:
        step = self.state.step
        if (step % self.recipe.checkpoint.every == 0 or step == self.recipe.train.total_steps
                or self.selection.is_best(step)):
            self._save()

    def _save(self) -> None:
        """Begin to save the state that the last step has left. Collective."""
        with phase("checkpoint"):
            if isinstance(self.data, StreamLoader):
                states = self.world.collect(self.data.state(self.state.step))
                if states is not None:
                    # Rank 0 writes them into the manifest.
                    self.state.streams = merge_stream_states(states)
            self.saver.start(self.state, self.rollouts.checkpoint_files
                             if self.rollouts is not None else {})
        self.saved_step = self.state.step

    def _saved(self, step: int) -> None:
        """On rank 0: the checkpoint of `step` is there."""
        self.attempt.saved(step)
        self.callbacks.checkpoint(step, self.job.run.checkpoints / checkpoint_name(step))

    def _finish(self) -> None:
        """Save the last step, wait, and export the model; or raise Stopped where steps are left."""
        self.world.run_checked(self.fence.check)
        if self.state.step != self.saved_step:
            self._save()
        self.saver.close()
        self.world.run_checked(self.callbacks.check)
        if not has_finished(self.recipe, self.state):
            reason = self.world.first(self.stop.reason())
            self.stop.honoured()
            logger.info("stopped in order after step %d (%s); the same command goes on from there",
                        self.state.step, reason)
            raise Stopped
        logger.info("epochs read: %s", describe_epochs(self.job, self.data, self.state,
                                                       self.state.step))
        logger.info("done: %d steps, checkpoint in %s", self.state.step, self.job.run.checkpoints)
        if early := describe_early_end(self.recipe, self.state):
            logger.info("%s", early)
        # A request to stop waits for them.
        export_final_model(self.job, self.state.step, self.world, self.fence)
        export_best_model(self.job, self.state, self.world, self.fence)

    def _log_step(self, metrics: Metrics, batch: StepBatch, info: StepInfo,
                  monitors: Monitors) -> None:
        """Log the step's metrics, if it is one of every `log_every` steps or the last."""
        step = self.state.step
        seconds = monitors.step_end(batch.sampled)
        metrics |= {"padding": batch.padding, **batch.metrics, "data_wait": info.waited / seconds}
        if self.rollouts is not None:
            # The tokens learnt from, over a time that includes their sampling.
            metrics["tokens_per_second"] = batch.tokens / seconds
        logged = self.recipe.train.logs(step)
        if logged:
            metrics |= monitors.metrics(uses_teacher=metrics["kd_loss"] is not None)
            logged = self._holds_run()
        self.log.step(step, metrics if logged else None, monitors.slowest_name)
        if self.lost is None:
            self.callbacks.step(step, metrics)

    def _holds_run(self) -> bool:
        """False, on rank 0, once another process has taken over: the log gets no further line.

        The other ranks hear of it in the next step's agreement, or in `_finish`.
        """
        try:
            self.fence.check()
        except LeaseLostError as error:
            self.lost = error
        return self.lost is None

    def _open_log(self) -> RunLog:
        run = self.job.run if self.world.is_main else None
        return self.world.run_checked(
            lambda: RunLog(run, self.state.step, self.recipe.train.total_steps))

    def _open_stop_request(self) -> StopRequest:
        return StopRequest(self.job.run, self.recipe.train.max_hours, self.world.is_main)

    def _open_monitors(self) -> Monitors:
        # What is measured is planned with the placement that the teacher has.
        return Monitors(self.job.placed_recipe, self.world, self.attempt, self._planned_costs(),
                        self.state.step)

    def _planned_costs(self) -> PlannedCosts:
        """The planned FLOPs of a step and the device's peak on rank 0, which logs them.

        None on other ranks.
        """
        if not self.world.is_main:
            return PlannedCosts({}, None)
        device = local_device(self.world.on_host)
        if device is None:
            logger.info("the peak FLOP/s of %s is not known: perf/mfu will be null",
                        torch.cuda.get_device_name())
        try:
            return PlannedCosts(*planned_flops(self.job.placed_recipe, self.world.size,
                                               device))
        except Exception as error:
            # A model that cannot run on the meta device may still train.
            logger.info("the FLOPs of a step cannot be counted, there will be no MFU: %s", error)
            return PlannedCosts({}, None)

    def _log_start(self) -> None:
        train = self.recipe.train
        begin = f"resumed after step {self.state.step}" if self.state.step else "from the start"
        teacher = "" if self.recipe.teacher is not None else "no teacher: cross entropy alone, "
        logger.info("%d rank(s), %d rows of %d tokens a step, %s%s", self.world.size,
                    train.global_batch_size, train.seq_length, teacher, begin)
        logger.info("epochs by the last step: %s", describe_epochs(self.job, self.data, self.state,
                                                                   train.total_steps))
        self.world.run_checked(self._compare_rates)

    def _compare_rates(self) -> None:
        """Say so where the last step was made at another rate than this recipe has there.

        So it is where a branch begins after the step at which its way down does.
        """
        step = self.state.step
        if not step or not self.world.is_main:
            return
        now = learning_rate(self.recipe.train, step - 1)
        for line in read_metrics(self.job.run.path):
            if line["step"] == step and not math.isclose(line["learning_rate"], now):
                logger.warning("step %d was made at a learning rate of %.4g, this recipe has %.4g "
                               "there: to branch off without a jump, go on from a checkpoint at "
                               "which both are the same", step, line["learning_rate"], now)
