"""The training loop: fetch, reduce step info, roll out, step, monitor, evaluate, save.

A step's loss is the sum over its valid tokens divided by the number N of valid tokens in the whole
global batch, so it does not depend on ranks, micro-batches or masks. DeepSpeed averages gradients over
the data-parallel ranks R; with token weights 1/N and the loss times R (`Engine.backward`), its
(1/R) Σ_ranks Σ_micro ∇(R · Σ_i loss_i / N) is ∇ Σ_i loss_i / N.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from amid_ds.checkpoint.saver import Saver
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.schedule import learning_rate, step_seed, taid_update
from amid_ds.data import Batch, StreamData, merged_places
from amid_ds.engine.engine import Engine
from amid_ds.errors import Stopped, TrainingError
from amid_ds.losses.fused import IGNORE_INDEX
from amid_ds.models.distiller import StepObjective
from amid_ds.monitor.monitors import Monitors, PlannedCosts
from amid_ds.monitor.step_timer import local_stats, phase, set_peer_stats
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.planning.devices import local_device
from amid_ds.planning.estimate import planned_flops
from amid_ds.run.attempts import Attempt
from amid_ds.run.log import RunLog
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
from amid_ds.training.objective import objective_at
from amid_ds.training.rollout import Rollouts, StepBatch
from amid_ds.training.validation import validate

logger = logging.getLogger(__name__)

Metrics = dict[str, float | None]


class _MicroBatch(NamedTuple):
    """A micro-batch of a step with its own objective and token divisor; no teacher without hidden states."""

    batch: Batch
    divisor: float
    objective: StepObjective


class _StepSums(NamedTuple):
    """Sums of a step over all ranks: its loss, divergence and cross entropy, and the auxiliary corpus's mean
    cross entropy."""

    loss: float
    kd: float
    ce: float
    auxiliary: float


class Trainer:
    """One attempt of a run, from `state` to the recipe's last step. All ranks make the same calls."""

    def __init__(self, job: Job, engine: Engine, state: TrainState, identity: Mapping[str, object],
                 damaged: frozenset[Path], attempt: Attempt) -> None:
        self.job, self.recipe, self.engine, self.world = job, job.recipe, engine, engine.world
        self.state, self.attempt = state, attempt
        self.teacher_batch = engine.choose_teacher_batch(job.recipe, state.teacher_tokens_per_pass)
        state.teacher_tokens_per_pass = self.teacher_batch.tokens_per_pass
        self.data, self.auxiliary = self.world.run_checked(lambda: open_step_data(job, state, self.world))
        self.rollouts = self._open_rollouts()
        self.saver = Saver(engine, job.run.checkpoints, self.recipe.checkpoint, identity, damaged)
        self.saved_step = state.step

    def run(self) -> None:
        """Make every step that is left; each orderly way out ends with a finished save.

        Raises Stopped where the run was asked to stop, InputError for damaged data, TrainingError for
        a NaN or where checkpoints cannot be saved.
        """
        with self._open_log() as self.log, self._open_stop_request() as self.stop, self._open_monitors() as monitors:
            self._log_start()
            for fetched in fetch_steps(self.data, self.auxiliary, self.state.step, self.recipe.train.steps):
                monitors.step_begin(self.state.step + 1)
                info = self._reduce_info(fetched)
                if info.stop:
                    break
                monitors.step_agreed()
                batch = self._roll_out(StepBatch(fetched.window, info.tokens, info.padding))
                with monitors.train_step(self.engine):
                    metrics = self.train_step(batch, self._auxiliary_batch(fetched, info))
                self._log_step(metrics, batch, info, monitors)
                self._evaluate(monitors)
                self._save_if_due()
                monitors.restart_clock()
            monitors.rest()
            self._finish()

    def train_step(self, batch: StepBatch, auxiliary: AuxiliaryBatch | None = None) -> Metrics:
        """Make one optimizer step and update the state; returns the step's metrics.

        The auxiliary corpus adds its coefficient times its mean cross entropy. Where the batch is
        sampled by the student, its cross entropy does not count. One small collective beside
        DeepSpeed's. Raises TrainingError, before the optimizer step, for a NaN or Inf.
        """
        began = time.monotonic()
        recipe, step = self.recipe, self.state.step
        objective = objective_at(recipe.loss, step, recipe.train.steps, self.state.taid)
        rate = learning_rate(recipe.train, step)
        torch.manual_seed(step_seed(recipe.train.seed, step, self.world.dp_rank))
        self.engine.start_step(rate)
        micro_batches = self._micro_batches(batch, auxiliary, objective)
        losses = self._forward_backward(micro_batches, len(batch.window), objective)
        sums = self._reduce(losses, len(batch.window))
        self._require_finite(f"the loss of step {step + 1} is {sums.loss}", sums.loss, losses, micro_batches)
        with phase("optimizer"):
            norm = self.engine.optimizer_step()
        self._require_finite(f"the gradient norm of step {step + 1} is not finite", norm, losses, micro_batches)
        uses_teacher = self.engine.distiller.uses_teacher(objective)
        if uses_teacher and recipe.loss.adaptive is not None:
            self.state.taid = taid_update(recipe.loss.adaptive, self.state.taid, sums.kd, step, recipe.train.steps)
        self.state.step, self.state.tokens = step + 1, self.state.tokens + int(batch.tokens)
        metrics: Metrics = {} if auxiliary is None else {"auxiliary_loss": sums.auxiliary}
        return metrics | {
            "tokens": self.state.tokens, "loss": sums.loss, "kd_loss": sums.kd if uses_teacher else None,
            "ce_loss": sums.ce, "grad_norm": norm, "learning_rate": rate,
            "alpha": objective.amid.alpha if uses_teacher else None,
            "lam": objective.amid.lam if uses_teacher else None,
            **{name: value for name, value in objective.scheduled.items() if name not in ("alpha", "lam")},
            "tokens_per_second": batch.tokens / (time.monotonic() - began)}

    def _micro_batches(self, batch: StepBatch, auxiliary: AuxiliaryBatch | None,
                       objective: StepObjective) -> list[_MicroBatch]:
        """The step's micro-batches, those of the auxiliary corpus last; each window is divided once by its own
        valid tokens."""
        own = replace(objective, ce_weight=0.0) if batch.sampled else objective
        micro_batches = [_MicroBatch(each.to(self.world.device), max(batch.tokens, 1.0), own)
                         for each in batch.window]
        if auxiliary is not None:
            assert self.recipe.data.auxiliary is not None
            cross_entropy = replace(objective, kd_weight=0.0, ce_weight=1.0)
            divisor = max(auxiliary.tokens, 1.0) / self.recipe.data.auxiliary.weight
            micro_batches += [_MicroBatch(each.to(self.world.device), divisor, cross_entropy)
                              for each in auxiliary.window]
        return micro_batches

    def _forward_backward(self, micro_batches: list[_MicroBatch], with_teacher: int,
                          objective: StepObjective) -> Tensor:
        """Losses [micro-batches, 3] float64: weighted loss, divergence and cross entropy; gradients are accumulated.

        The teacher runs first, over the first `with_teacher` micro-batches at once.
        """
        distiller, train = self.engine.distiller, self.recipe.train
        teacher_hidden: list[Tensor | None] = [None] * len(micro_batches)
        uses_teacher = distiller.uses_teacher(objective)
        if uses_teacher:
            with phase("teacher"):
                teacher_hidden[:with_teacher] = self.engine.teacher_hidden_states(
                    [each.batch for each in micro_batches[:with_teacher]],
                    train.micro_batch_size * train.seq_length, self.teacher_batch)
        losses = []
        with self.engine.gathered_head(distiller.teacher if uses_teacher else None):
            for index, (batch, divisor, own) in enumerate(micro_batches):
                token_weights = (batch.labels != IGNORE_INDEX).float() / divisor
                with phase("forward"):
                    last = index == len(micro_batches) - 1
                    loss = self.engine.forward(batch, token_weights, teacher_hidden[index], own, last)
                # Its memory is free for the next micro-batch's activations.
                teacher_hidden[index] = None
                with phase("backward"):
                    self.engine.backward(loss.loss)
                losses.append(torch.stack([loss.loss.detach(), loss.kd, loss.ce]))
        return torch.stack(losses).double()

    def _reduce(self, losses: Tensor, with_teacher: int) -> _StepSums:
        """The step's sums over all ranks, in one collective that also spreads each rank's own statistics."""
        main, added = losses[:with_teacher], losses[with_teacher:]
        own_loss = losses[:, 0].sum().item()
        (loss, kd, ce, auxiliary), peers = self.world.sum_beside(
            [own_loss, *main[:, 1:].sum(0).tolist(), added[:, 2].sum().item()], [own_loss, *local_stats()])
        set_peer_stats(peers)
        weight = self.recipe.data.auxiliary.weight if self.recipe.data.auxiliary is not None else 1.0
        return _StepSums(loss, kd, ce, auxiliary / weight)

    def _require_finite(self, problem: str, value: float | None, losses: Tensor,
                        micro_batches: list[_MicroBatch]) -> None:
        """Raise TrainingError, on every rank alike, unless the reduced `value` is a finite number.

        The message names the ranks and rows behind it. The weights are those of the step before.
        """
        if value is not None and math.isfinite(value):
            return
        bad = [index for index, finite in enumerate(losses[:, 0].isfinite().tolist()) if not finite]
        report = self.world.gather([source for index in bad for source in micro_batches[index].batch.sources])
        lines = [f"    - rank {rank}: {', '.join(sources)}" for rank, sources in enumerate(report) if sources]
        if not lines:
            # Every loss was finite and the sum of the gradients was not: any rank's rows may be behind it.
            everyone = self.world.gather([source for each in micro_batches for source in each.batch.sources])
            lines = [f"    - rank {rank} (its losses were finite): {', '.join(sources)}"
                     for rank, sources in enumerate(everyone)]
        raise TrainingError(f"{problem}; no optimizer step was taken. Where it arose:\n" + "\n".join(lines))

    def _reduce_info(self, fetched: FetchedStep) -> StepInfo:
        """The step's agreement; a save that every rank has written is committed."""
        info = reduce_step_info(fetched, self.stop.reason() is not None, self.saver.writing, self.world)
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
            # Left by an attempt with another scheme; no checkpoint of this one has its buffer.
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
        due = step == train.steps or (train.eval_every > 0 and step % train.eval_every == 0)
        if not self.recipe.data.eval or not due:
            return
        monitors.evaluation_begin()
        with phase("evaluation"):
            metrics = self.world.run_checked(lambda: validate(self.recipe, self.engine))
            self.log.evaluation(step, metrics)
        if self.rollouts is not None:
            self.rollouts.update_threshold(metrics)

    def _save_if_due(self) -> None:
        if self.state.step % self.recipe.checkpoint.every == 0 or self.state.step == self.recipe.train.steps:
            self._save()

    def _save(self) -> None:
        """Begin to save the state that the last step has left. Collective."""
        with phase("checkpoint"):
            if isinstance(self.data, StreamData):
                self.state.streams = merged_places(self.world.gather(self.data.state(self.state.step)))
            self.saver.start(self.state, self.rollouts.checkpoint_files if self.rollouts is not None else {})
        self.saved_step = self.state.step

    def _finish(self) -> None:
        """Save the last step, wait for it, and export the model; or raise Stopped where steps are left."""
        if self.state.step != self.saved_step:
            self._save()
        self.saver.finish()
        if self.state.step < self.recipe.train.steps:
            reasons = {reason for reason in self.world.gather(self.stop.reason()) if reason is not None}
            self.stop.honoured()
            logger.info("stopped in order after step %d (%s); the same command goes on from there",
                        self.state.step, ", ".join(sorted(reasons)))
            raise Stopped
        logger.info("epochs read: %s", describe_epochs(self.job, self.data, self.state))
        logger.info("done: %d steps, checkpoint in %s", self.state.step, self.job.run.checkpoints)
        # A request to stop waits for it.
        export_final_model(self.job, self.world)

    def _log_step(self, metrics: Metrics, batch: StepBatch, info: StepInfo, monitors: Monitors) -> None:
        """Close the step for the monitors, and log its metrics every `log_every` steps and at the last one."""
        train, step = self.recipe.train, self.state.step
        seconds = monitors.step_end(batch.sampled)
        metrics |= {"padding": batch.padding, **batch.metrics, "data_wait": info.waited / seconds}
        if self.rollouts is not None:
            # The tokens learnt from, over a time that includes their sampling.
            metrics["tokens_per_second"] = batch.tokens / seconds
        logged = step % train.log_every == 0 or step == train.steps
        if logged:
            metrics |= monitors.metrics(uses_teacher=metrics["kd_loss"] is not None)
        self.log.step(step, metrics if logged else None, monitors.slowest_name)

    def _open_log(self) -> RunLog:
        return RunLog(self.job.run if self.world.is_main else None, self.state.step, self.recipe.train.steps)

    def _open_stop_request(self) -> StopRequest:
        return StopRequest(self.job.run, self.recipe.train.max_hours, self.world.is_main)

    def _open_monitors(self) -> Monitors:
        hosts = self.world.gather(socket.gethostname())
        costs = self._planned_costs(hosts)
        return Monitors(self.recipe, self.world, self.attempt, hosts, costs, self.state.step)

    def _planned_costs(self, hosts: list[str]) -> PlannedCosts:
        """The planned FLOPs of a step and the device's peak on rank 0, which logs them; none on other ranks."""
        if not self.world.is_main:
            return PlannedCosts({}, None)
        device = local_device(hosts.count(hosts[0]))
        if device is None:
            logger.info("no peak is known of %s: there will be no MFU", torch.cuda.get_device_name())
        try:
            return PlannedCosts(*planned_flops(self.recipe, self.world.size, device))
        except Exception as error:
            # A model that cannot run on the meta device may still train.
            logger.info("the FLOPs of a step cannot be counted, there will be no MFU: %s", error)
            return PlannedCosts({}, None)

    def _log_start(self) -> None:
        train = self.recipe.train
        begin = f"resumed after step {self.state.step}" if self.state.step else "from the start"
        teacher = "" if self.recipe.teacher is not None else "no teacher: cross entropy alone, "
        logger.info("%d rank(s), %d rows of %d tokens a step, %s%s", self.world.size, train.global_batch_size,
                    train.seq_length, teacher, begin)
        logger.info("epochs by the last step: %s", describe_epochs(self.job, self.data, self.state))
