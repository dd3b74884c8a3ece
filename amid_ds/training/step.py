"""One optimizer step: objective, teacher, forward and backward of every micro-batch, optimizer.

A step's loss is Σ_i w_i · loss_i over the valid tokens of the whole global batch, with w_i = 1/N of
its N tokens; under `normalise: sequence` w_i = 1/(S · n) in a sequence of n of them, of S. So it
does not depend on ranks, micro-batches or masks. DeepSpeed averages gradients over the
data-parallel ranks R; with the loss times R (`Engine.backward`), its
(1/R) Σ_ranks Σ_micro ∇(R · Σ_i w_i loss_i) is ∇ Σ_i w_i loss_i.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from amid_ds.checkpoint.state import TrainState
from amid_ds.config.recipe import Recipe, Train
from amid_ds.config.schedule import learning_rate, step_seed, taid_update
from amid_ds.data import Batch
from amid_ds.distributed.transfer import to_device
from amid_ds.engine.engine import Engine
from amid_ds.errors import TrainingError
from amid_ds.losses import AMiD, PerToken
from amid_ds.models.distiller import LossPart, StepObjectives
from amid_ds.monitor.hang_watchdog import MAX_RANKS_SHOWN
from amid_ds.monitor.step_timer import local_stats, phase, set_peer_stats
from amid_ds.run.log import finite
from amid_ds.training.fetch import AuxiliaryBatch
from amid_ds.training.objective import objectives_at, scheduled_at
from amid_ds.training.rollout import StepBatch

Metrics = dict[str, float | None]
MAX_IDS_SHOWN = 10


class _MicroBatch(NamedTuple):
    """A micro-batch of a step on the device, with its tokens' weights [n] fp32 and objectives."""

    batch: Batch
    weights: Tensor
    parts: list[LossPart]


class _StepSums(NamedTuple):
    """Sums of a step over all ranks: its loss, divergence and cross entropy.

    auxiliary: the mean cross entropy of the auxiliary corpus. statistics: means over the tokens.
    routers: the losses of a mixture's routers, without their weights, and the load of its experts.
    """

    loss: float
    kd: float
    ce: float
    auxiliary: float
    statistics: list[float]
    routers: Metrics


class Stepper:
    """Makes optimizer steps of a recipe with an engine, and keeps `state` up to date.

    All ranks make the same calls.
    """

    def __init__(self, recipe: Recipe, engine: Engine, state: TrainState) -> None:
        self.recipe, self.engine, self.state, self.world = recipe, engine, state, engine.world
        self.teacher_batch = engine.choose_teacher_batch(recipe, state.teacher_tokens_per_pass)
        state.teacher_tokens_per_pass = self.teacher_batch.tokens_per_pass
        self.routers = engine.distiller.routers

    def train_step(self, batch: StepBatch, auxiliary: AuxiliaryBatch | None = None) -> Metrics:
        """Make one optimizer step and update the state; returns the step's metrics.

        The auxiliary corpus adds its coefficient times its mean cross entropy over tokens. Two
        small collectives beside DeepSpeed's, and one for a mixture's routers. Raises TrainingError,
        before the optimizer step, for a NaN or Inf.
        """
        began = time.monotonic()
        recipe, step = self.recipe, self.state.step
        objectives = objectives_at(recipe, step, self.state.taid)
        scheduled = scheduled_at(recipe, step, self.state.taid)
        shown = objectives.sampled if batch.sampled else objectives.base
        uses_teacher = self.engine.distiller.uses_teacher(objectives.of_step(batch.sampled))
        rate = learning_rate(recipe.train, step)
        torch.manual_seed(step_seed(recipe.train.seed, step, self.world.dp_rank))
        self.engine.start_step(rate)
        if not uses_teacher:
            batch = _without_targets(batch)
        micro_batches = self._micro_batches(batch, auxiliary, objectives)
        if self.routers is not None:
            self.routers.start_step(recipe.train.logs(step + 1))
        losses, statistics, of_routers, tokens = self._forward_backward(
            micro_batches, len(batch.window), uses_teacher)
        sums = self._reduce(losses, statistics, of_routers, len(batch.window))
        self._require_finite(f"the loss of step {step + 1} is {sums.loss}", sums.loss, tokens,
                             micro_batches)
        with phase("optimizer"):
            norm = self.engine.optimizer_step()
        self._require_finite(f"the gradient norm of step {step + 1} is not finite", norm, tokens,
                             micro_batches)
        if uses_teacher and recipe.loss.adaptive is not None:
            self.state.taid = taid_update(recipe.loss.adaptive, self.state.taid, sums.kd, step,
                                          recipe.train.total_steps)
        self.state.step, self.state.tokens = step + 1, self.state.tokens + int(batch.tokens)
        metrics: Metrics = {} if auxiliary is None else {"auxiliary_loss": sums.auxiliary}
        return {**metrics, "tokens": self.state.tokens, "loss": sums.loss,
                # One that the loss does not count may be infinite.
                "kd_loss": finite(sums.kd) if uses_teacher else None, "ce_loss": finite(sums.ce),
                **sums.routers, "grad_norm": norm, **_learning_rates(recipe.train, rate),
                **scheduled, **_objective_metrics(shown.amid, uses_teacher),
                **self._statistics(sums.statistics, uses_teacher),
                "tokens_per_second": batch.tokens / (time.monotonic() - began)}

    def _statistics(self, means: list[float], uses_teacher: bool) -> Metrics:
        """The recipe's statistics by name; None without the teacher, but for the entropy of a
        student that has none."""
        alone = {"student_entropy"} if self.recipe.teacher is None else set()
        return {name: finite(mean) if uses_teacher or name in alone else None for name, mean
                in zip(self.recipe.train.statistics, means, strict=True)}

    def _micro_batches(self, batch: StepBatch, auxiliary: AuxiliaryBatch | None,
                       objectives: StepObjectives) -> list[_MicroBatch]:
        """The step's micro-batches, those of the auxiliary corpus last.

        Each window is divided once, by its own valid tokens or sequences.
        """
        device, by_sequence = self.world.device, self.recipe.loss.normalise == "sequence"

        def equal_weights(each: Batch, divisor: float) -> Tensor:
            return torch.ones(len(each.valid), device=device) / divisor

        micro_batches = [_MicroBatch(
            each.to(device),
            to_device(each.sequence_weights(batch.sequences), device) if by_sequence
            else equal_weights(each, max(batch.tokens, 1.0)),
            [part.to(device) for part in objectives.parts(each, batch.sampled)])
            for each in batch.window]
        if auxiliary is not None:
            assert self.recipe.data.auxiliary is not None
            cross_entropy = [LossPart(replace(objectives.base, kd_weight=0.0, ce_weight=1.0,
                                          statistics=()))]
            divisor = max(auxiliary.tokens, 1.0) / self.recipe.data.auxiliary.weight
            micro_batches += [_MicroBatch(each.to(device), equal_weights(each, divisor),
                                          cross_entropy) for each in auxiliary.window]
        return micro_batches

    def _forward_backward(self, micro_batches: list[_MicroBatch], main_count: int,
                          uses_teacher: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Losses [micro-batches, 3] float64: weighted loss, divergence and cross entropy; sums of
        the statistics [m] float64; of a mixture's routers [k] float64 (`_router_sums`); and of each
        micro-batch its tokens' as `MicroBatchLoss` has them.

        Gradients are accumulated. The teacher runs first, over the first `main_count`
        micro-batches at once; then the student, where its routers' choices must be known.
        """
        distiller, train = self.engine.distiller, self.recipe.train
        teacher_hidden: list[Tensor | None] = [None] * len(micro_batches)
        if uses_teacher and distiller.teacher is not None:
            with phase("teacher"):
                teacher_hidden[:main_count] = self.engine.teacher_hidden_states(
                    [each.batch for each in micro_batches[:main_count]],
                    train.micro_batch_size * train.seq_length, self.teacher_batch)
        if self.routers is not None and self.routers.has_loss and main_count > 1:
            with phase("forward"):
                self.routers.count_ahead(distiller.student,
                                         [each.batch for each in micro_batches[:main_count]])
        losses, tokens, statistics, of_routers = [], [], [], []
        with self.engine.gathered_head(distiller.teacher if uses_teacher else None):
            for index, (batch, weights, parts) in enumerate(micro_batches):
                with phase("forward"):
                    last = index == len(micro_batches) - 1
                    loss = self.engine.forward(batch, weights, teacher_hidden[index], parts, last,
                                               routed=index < main_count)
                # Its memory is free for the next micro-batch's activations.
                teacher_hidden[index] = None
                with phase("backward"):
                    self.engine.backward(loss.loss)
                losses.append(torch.stack([loss.loss.detach(), loss.kd, loss.ce]))
                tokens.append(loss.tokens)
                statistics.append(loss.statistics)
                if loss.routers is not None:
                    of_routers.append(loss.routers)
        # The auxiliary corpus has none.
        return (torch.stack(losses).double(),
                torch.stack(statistics[:main_count]).double().sum(0),
                self._router_sums(of_routers), tokens)

    def _router_sums(self, losses: list[Tensor]) -> Tensor:
        """[k] float64 to be summed over the ranks: the two losses of the micro-batches, if they
        have some, then the load of the experts, if it is asked for."""
        parts = [torch.stack(losses).sum(0)] if losses else []
        if self.routers is not None and self.routers.load is not None:
            parts.append(self.routers.load)
        return torch.cat(parts) if parts else self.world.numbers([])

    def _router_metrics(self, sums: list[float]) -> Metrics:
        """The metrics of a mixture's routers from `_router_sums`; of a dense model 0."""
        if self.routers is None:
            return {"router_aux_loss": 0.0}
        metrics: Metrics = {"router_aux_loss": None}
        weights = self.routers.weights
        if self.routers.has_loss:
            balance, z, *sums = sums
            metrics |= {"router_aux_loss": finite(balance) if weights.balance else None,
                        **({"router_z_loss": finite(z)} if weights.z else {})}
        return metrics | self.routers.load_metrics(sums)

    def _reduce(self, losses: Tensor, statistics: Tensor, of_routers: Tensor, main_count: int
                ) -> _StepSums:
        """The step's sums over all ranks, in the collectives that spread the ranks' statistics too.
        """
        main, added = losses[:main_count], losses[main_count:]
        stats = local_stats()
        summands, candidates = self.world.numbers([*stats.summands, *stats.candidates]).split(
            [len(stats.summands), len(stats.candidates)])
        # Summed on the device, so that the host waits for it once.
        own_loss = losses[:, 0].sum()[None]
        (loss, kd, ce, auxiliary, *sums), peaks = self.world.sum_with_peaks(
            torch.cat([own_loss, main[:, 1:].sum(0), added[:, 2].sum()[None], statistics,
                       of_routers, summands]),
            torch.cat([own_loss, candidates]))
        count, before = len(statistics), len(statistics) + len(of_routers)
        set_peer_stats(loss, sums[before:], peaks)
        weight = (self.recipe.data.auxiliary.weight if self.recipe.data.auxiliary is not None
                  else 1.0)
        return _StepSums(loss, kd, ce, auxiliary / weight, sums[:count],
                         self._router_metrics(sums[count:before]))

    def _require_finite(self, problem: str, value: float | None, tokens: list[Tensor],
                        micro_batches: list[_MicroBatch]) -> None:
        """Raise TrainingError, on every rank alike, unless the reduced `value` is a finite number.

        The message names the ranks, rows and tokens behind it. The weights are those of the step
        before.
        """
        if value is not None and math.isfinite(value):
            return
        places = [place for each, own in zip(micro_batches, tokens, strict=True)
                  for place in _bad_places(each.batch, own)]
        if value == math.inf:
            problem += (" (a token has no probability in one distribution and some in the other: a "
                        f"logit of -inf{self._banned_ids()})")
        lines = self._lines_by_rank(places)
        if not lines:
            # Every loss was finite and the sum of the gradients was not: any rank's rows may be
            # behind it.
            lines = self._lines_by_rank([source for each in micro_batches
                                         for source in each.batch.sources],
                                        " (its losses were finite)")
        raise TrainingError(f"{problem}; no optimizer step was taken. Where it arose:\n"
                            + "\n".join(lines))

    def _lines_by_rank(self, own: list[str], note: str = "") -> list[str]:
        """A line for each of the first ranks that have something, the same on all. Collective."""
        everyone, lines = self.world.collect(own), []
        if everyone is not None:
            lines = [f"    - rank {rank}{note}: {', '.join(parts)}"
                     for rank, parts in enumerate(everyone) if parts]
            more = len(lines) - MAX_RANKS_SHOWN
            if more > 0:
                lines[MAX_RANKS_SHOWN:] = [f"    - and {more} more ranks"]
        return self.world.broadcast(lines)

    def _banned_ids(self) -> str:
        """Which ids the two heads' biases give no probability, as a part of a message. Collective.
        """
        distiller = self.engine.distiller
        with (self.engine.gathered_head(distiller.student),
              self.engine.gathered_head(distiller.teacher)):
            start = 0 if distiller.head.shard is None else distiller.head.shard.start
            own = [[] if head is None else [i + start for bias in head.biases
                                            for i in (bias == -math.inf).nonzero()[:, 0].tolist()]
                   for head in distiller.head.heads()]
        said = ""
        of_heads = zip(*self.world.gather_in_group(own), strict=True)
        for name, ids in zip(("student", "teacher"), of_heads, strict=True):
            if some := sorted({i for part in ids for i in part if i < distiller.head.vocab_size}):
                more = f" and {len(some) - MAX_IDS_SHOWN} more" * (len(some) > MAX_IDS_SHOWN)
                said += (f", the {name}'s for id {', '.join(map(str, some[:MAX_IDS_SHOWN]))}{more}")
        return said


def _without_targets(batch: StepBatch) -> StepBatch:
    """The batch of a step that does not learn from the teacher: no cached targets are moved."""
    return batch._replace(window=[each if each.teacher_targets is None
                                  else replace(each, teacher_targets=None)
                                  for each in batch.window])


def _learning_rates(train: Train, rate: float) -> Metrics:
    """The step's rate of AdamW, and of Muon where it is the recipe's optimizer."""
    rates: Metrics = {"learning_rate": rate}
    if train.muon_ratio is not None:
        rates["learning_rate_muon"] = rate * train.muon_ratio
    return rates


def _bad_places(batch: Batch, tokens: Tensor) -> Iterator[str]:
    """The rows in which a token's divergence or cross entropy is not finite, and the first such
    token of each."""
    bad = ~tokens.isfinite()
    seen = set()
    for index in bad.any(-1).nonzero()[:, 0].tolist():
        row, column = divmod(int(batch.valid[index]), batch.labels.shape[1])
        if row not in seen:
            seen.add(row)
            part = "divergence" if bad[index, 0] else "cross entropy"
            yield (f"{batch.sources[row]} (the {part} at token {column + 1} of the row, which id "
                   f"{int(batch.labels[row, column])} follows, is "
                   f"{tokens[index][bad[index]][0].item()})")


def _objective_metrics(amid: AMiD, uses_teacher: bool) -> Metrics:
    """`alpha` and `lam`; None without the teacher, or where each token has its own."""
    return {name: None if isinstance(number, PerToken) or not uses_teacher else number
            for name, number in (("alpha", amid.alpha), ("lam", amid.lam))}
