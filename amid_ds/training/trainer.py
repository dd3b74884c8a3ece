"""The training job, top to bottom: check everything, build one engine, resume, step, save.

A step's loss is the sum over its valid tokens divided by the number N of valid tokens in the whole global batch, so it
does not depend on ranks, micro-batches or masks. DeepSpeed averages gradients over the data-parallel ranks R; with
token weights 1/N and the loss times R, its (1/R) Σ_ranks Σ_micro ∇(R · Σ_i loss_i / N) is ∇ Σ_i loss_i / N.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amid_ds.checkpoint.saver import Saver
from amid_ds.config.recipe import Recipe
from amid_ds.config.schedule import learning_rate, loss_at, step_seed, taid_update
from amid_ds.data import (
    Batch,
    StepData,
    Steps,
    StreamData,
    merged_places,
    stream_summary,
)
from amid_ds.distributed.world import World
from amid_ds.engine import engine, gather
from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.losses.fused import IGNORE_INDEX
from amid_ds.models.distiller import Distiller
from amid_ds.monitor import memory_probe
from amid_ds.monitor.anomalies import AnomalyMonitor
from amid_ds.monitor.hang_watchdog import HangWatchdog
from amid_ds.monitor.profiler import Profiler
from amid_ds.monitor.step_timer import StepTimer, local_stats, phase, set_peer_stats
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.plan import costs_of, device_here
from amid_ds.run.attempts import Attempt
from amid_ds.run.log import RunLog
from amid_ds.training.job import (
    Job,
    leave_model,
)
from amid_ds.training.objective import build_objective
from amid_ds.training.rollout import Rollouts, StepBatch
from amid_ds.training.validation import validate


def run_training(job: Job, ds: Any, state: dict[str, Any], damaged: frozenset[Path], world: World, life: Attempt) -> None:
    """Optimizer steps from `state["step"]` to the recipe's last; every orderly way out ends with a finished save."""
    recipe = job.recipe
    data, auxiliary = world.run_checked(lambda: step_data(job, state, world))
    log = RunLog(job.run if world.is_main else None, state["step"], recipe.train.steps, job.run.name)
    log.say(f"{world.size} rank(s), {recipe.train.global_batch_size} rows of {recipe.train.seq_length} tokens a step, "
            + ("" if recipe.teacher else "no teacher: cross entropy alone, ")
            + (f"resumed after step {state['step']}" if state["step"] else "from the start"))
    log.say(f"epochs by the last step: {epochs_of(job, data, state)}")
    if recipe.rollout is None or recipe.rollout.adaptive is None:
        state.pop("rollout", None)      # of a life before, whose buffer no checkpoint of this one has
    rollouts = None if recipe.rollout is None else world.run_checked(
        lambda: Rollouts(recipe, ds, job.tokenizer, state, world))
    saver = Saver(ds, job.run / "checkpoints", recipe.checkpoint, world, log.alarm, damaged)
    saved = state["step"]
    with (StopRequest(job.run, recipe.train.max_hours, world.is_main) as request, contextlib.closing(log),
          HangWatchdog(recipe.train.hang_timeout, world, life) as watchdog,
          StepTimer(world.device, *planned_costs(job, world, watchdog.hosts, log)) as meter):
        watch = AnomalyMonitor([f"rank {rank} on {host}" for rank, host in enumerate(watchdog.hosts)], log.alarm,
                      world.tp_size)
        profiler = Profiler(recipe.train.profile, job.run, world.rank, meter, log.say)
        began, first = time.monotonic(), state["step"]
        lined = first
        for reading in fetch_steps(data, auxiliary, state["step"], recipe.train.steps):
            watchdog.step(state["step"] + 1)
            profiler.step(state["step"] + 1)
            agreed = reduce_step_info(reading, request.reason() is not None, saver.writing, world)
            if saver.pending and not agreed.writing:
                with phase("checkpoint"):
                    saver.finish()
            if agreed.stop:
                break
            life.stepping(state["step"] + 1)
            second = None if auxiliary is None else AuxiliaryBatch(reading.auxiliary, agreed.auxiliary_tokens)
            turn = StepBatch(reading.window, agreed.tokens, agreed.padding)
            if rollouts is not None:
                with phase("rollout"):
                    turn = rollouts.turn(turn)
            measures = world.is_main and state["step"] + 1 == first + memory_probe.PROBED_STEP
            with (memory_probe.probe_step(ds, recipe, world, watchdog.hosts, state["step"] + 1) if measures
                  else contextlib.nullcontext()):
                values = train_step(job, ds, turn.window, turn.tokens, state, world, second, turn.sampled)
            values |= {"padding": turn.padding, **turn.told}
            seconds = time.monotonic() - began
            if rollouts is not None:      # the tokens learnt from, and sampled on the way
                values["tokens_per_second"] = turn.tokens / seconds
            values["data_wait"] = agreed.waited / seconds
            watch.step(state["step"], meter.peers, seconds, turn.sampled)
            logged = state["step"] % recipe.train.log_every == 0 or state["step"] == recipe.train.steps
            if logged:
                values |= meter.line(state["step"] - lined, ds.module.has_lesson)
                values["perf/slowest_rank"] = watch.slowest
                lined = state["step"]
            log.step(state["step"], values if logged else None, watch.slowest_name)
            if recipe.data.eval and evaluates(recipe, state["step"]):      # before the save: a resumed run has had it
                watchdog.step(state["step"])
                with phase("evaluation"):
                    figures = world.run_checked(lambda: validate(recipe, ds, world))
                    log.evaluation(state["step"], figures)
                if rollouts is not None:
                    rollouts.judge(figures)
            if state["step"] % recipe.checkpoint.every == 0 or state["step"] == recipe.train.steps:
                save(saver, state, data, rollouts, world)
                saved = state["step"]
            began = time.monotonic()
        watchdog.rest()
        profiler.end()
        if state["step"] != saved:
            save(saver, state, data, rollouts, world)
        saver.finish()
        if state["step"] < recipe.train.steps:
            reasons = {why for why in world.gather(request.reason()) if why is not None}
            request.honoured()
            log.say(f"stopped in order after step {state['step']} ({', '.join(sorted(reasons))}); "
                    "the same command goes on from there")
            raise Stopped
        log.say(f"epochs read: {epochs_of(job, data, state)}")
        log.say(f"done: {recipe.train.steps} steps, checkpoint in {job.run / 'checkpoints'}")
        leave_model(job, world)      # a request to stop waits for it


def save(saver: Saver, state: dict[str, Any], data: Steps, rollouts: Rollouts | None, world: World) -> None:
    """Begin to save where the training, the data and the student's own words stand. Collective."""
    with phase("checkpoint"):
        saver.start(with_stream_states(state, data, world), rollouts.files if rollouts is not None else {})


def planned_costs(job: Job, world: World, hosts: list[str], log: RunLog) -> tuple[dict[str, float], float | None]:
    """The planned FLOPs of a step on rank 0, which writes of them, and its device's peak; nothing on other ranks."""
    if not world.is_main:
        return {}, None
    device = device_here(hosts.count(hosts[0]))
    if device is None:
        log.say(f"no peak is known of {torch.cuda.get_device_name()}: there will be no MFU")
    try:
        return costs_of(job.recipe, world.size, device)
    except Exception as error:      # a model that cannot run on the meta device may still train
        log.say(f"the FLOPs of a step cannot be counted, there will be no MFU: {error}")
        return {}, None


def step_data(job: Job, state: dict[str, Any], world: World) -> tuple[Steps, StepData | None]:
    """The rows to train on and, where there is one, the auxiliary corpus: as many of its rows in every step."""
    train, data = job.recipe.train, job.recipe.data
    layout: Any = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size,
                   "dp_rank": world.dp_rank, "dp_size": world.dp_size, "workers": data.workers}
    weights = [source.weight for source in data.train]
    prepared = job.recipe.prepared_dir
    return (StreamData(data, train.seq_length, job.tokenizer, state.get("streams"), **layout) if data.streams
            else StepData(prepared, seed=train.seed, weights=weights, **layout),
            None if data.auxiliary is None else StepData(prepared / "auxiliary", seed=train.seed, **layout))


def with_stream_states(state: dict[str, Any], data: Steps, world: World) -> dict[str, Any]:
    """The state that a checkpoint keeps: with the places of streamed sources. Collective where there are any."""
    if isinstance(data, StreamData):
        state["streams"] = merged_places(world.gather(data.state(state["step"])))
    return state


def epochs_of(job: Job, data: Steps, state: dict[str, Any]) -> str:
    """How often each source is read through by the last step; one whose weight asks for more than it has comes again.
    Of streamed sources: how often they have been so far, and what was left out."""
    if isinstance(data, StepData):
        epochs = zip(job.recipe.data.train, data.epochs(job.recipe.train.steps), strict=True)
        return ", ".join(f"{source.path} {count:.3g}" + (" (its rows come again)" if count > 1 else "")
                         for source, count in epochs)
    return f"unknown, the sources are streamed; so far {stream_summary(job.recipe.data, state.get('streams'))}"


class FetchedStep(NamedTuple):
    """One step's micro-batches on this rank, the seconds that it waited for them, or why there are none."""

    window: list[Batch]
    auxiliary: list[Batch]
    waited: float
    error: InputError | None = None


class AuxiliaryBatch(NamedTuple):
    """A step's micro-batches of the auxiliary corpus, and the valid tokens that the global batch has of it."""

    window: list[Batch]
    tokens: float


def fetch_steps(data: Steps, auxiliary: StepData | None, start: int, stop: int) -> Iterator[FetchedStep]:
    """The steps' readings; the first that fails is the last, and is for all ranks to hear of."""
    both: list[Steps] = [data] if auxiliary is None else [data, auxiliary]
    windows = zip(*(each.windows(start, stop) for each in both), strict=True)
    while True:
        before = sum(each.waited for each in both)
        try:
            with phase("data"):
                found = next(windows, None)
        except InputError as error:
            yield FetchedStep([], [], 0.0, error)
            return
        if found is None:
            return
        yield FetchedStep(found[0], found[1] if auxiliary is not None else [], sum(each.waited for each in both) - before)


class StepInfo(NamedTuple):
    """What the ranks know together at the beginning of a step."""

    tokens: float                    # valid ones in the global batch
    auxiliary_tokens: float          # and in that of the auxiliary corpus
    padding: float                   # the share of the global batch's places that hold nothing
    waited: float                    # seconds for data, mean over ranks
    stop: bool                       # somebody was asked to stop
    writing: bool                    # somebody still writes a checkpoint


def reduce_step_info(reading: FetchedStep, stop: bool, writing: bool, world: World) -> StepInfo:
    """The one agreement of every step. Raises, on every rank, what any rank's data are damaged by."""
    valid = [sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in window)
             for window in (reading.window, reading.auxiliary)]
    both = [*reading.window, *reading.auxiliary]
    padding, places = sum(batch.padding for batch in both), sum(batch.input_ids.numel() for batch in both)
    *tokens, padding_sum, places_sum, waited, stopping, still_writing, broken = world.sum(
        [*valid, padding, places, reading.waited, stop, writing, reading.error is not None])
    if broken:
        world.run_checked(lambda: _raise(reading.error))
    return StepInfo(tokens[0], tokens[1], padding_sum / places_sum, waited / world.dp_size, stopping > 0,
                  still_writing > 0)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def evaluates(recipe: Recipe, step: int) -> bool:
    """Whether the evaluation sets are due after `step`: every `eval_every` steps and after the last."""
    every = recipe.train.eval_every
    return step == recipe.train.steps or (every > 0 and step % every == 0)


def train_step(job: Job, ds: Any, window: list[Batch], tokens: float, state: dict[str, Any], world: World,
         second: AuxiliaryBatch | None = None, sampled: bool = False) -> dict[str, float | None]:
    """One optimizer step over the accumulation window, `tokens` valid ones in the global batch; updates `state`.

    The `second` corpus adds its coefficient times its mean cross entropy. Where the window is `sampled`, the student's
    own words, its cross entropy does not count. Returns what metrics.jsonl says of the step.
    One small collective beside DeepSpeed's.
    """
    began = time.monotonic()
    distiller: Distiller = ds.module
    more = [] if second is None else second.window
    batches = [batch.to(world.device) for batch in (*window, *more)]
    # Each window is divided once by its own valid tokens.
    coefficient = 1.0 if job.recipe.data.auxiliary is None else job.recipe.data.auxiliary.weight
    divisors = [max(tokens, 1.0)] * len(window) + [max(second.tokens, 1.0) / coefficient for _ in more if second]
    number = state["step"] + 1
    torch.manual_seed(step_seed(job.recipe.train.seed, state["step"], world.dp_rank))
    lr = learning_rate(job.recipe.train, state["step"])
    for group in ds.optimizer.param_groups:
        group["lr"] = lr
    engine.start_step(ds)
    train = job.recipe.train
    aim = loss_at(job.recipe.loss, state["step"], train.steps, state.get("interpolation"))
    objective = build_objective(aim)
    distiller.pursue(objective, aim.kd_weight, aim.ce_weight)   # type: ignore[arg-type]   # loss_at gives numbers
    per_pass = max(1, state["tokens_per_pass"] // (train.micro_batch_size * train.seq_length))
    with phase("teacher"):
        lessons = [*distiller.teach(batches[:len(window)], per_pass), *[None for _ in more]]
    sums = []
    with gather.gathered_head(distiller.teacher if distiller.has_lesson else None):
        for index, batch in enumerate(batches):
            weights = (batch.labels != IGNORE_INDEX).float() / divisors[index]
            ds.set_gradient_accumulation_boundary(index == len(batches) - 1)
            with phase("forward"):
                loss, kd, ce = ds(batch.input_ids, batch.labels, weights, lessons[index], batch.positions,
                                  1.0 if index >= len(window) else 0.0 if sampled else None)
            lessons[index] = None      # its memory is free for the next micro-batch's activations
            with phase("backward"):
                ds.backward(loss * world.dp_size, scale_wrt_gas=False)
            sums.append(torch.stack([loss.detach(), kd, ce]))
    per_micro = torch.stack(sums).double()
    main, added = per_micro[:len(window)], per_micro[len(window):]
    part = per_micro[:, 0].sum().item()
    (loss_sum, kd_sum, ce_sum, added_sum), peers = world.sum_beside(
        [part, *main[:, 1:].sum(0).tolist(), added[:, 2].sum().item()], [part, *local_stats()])
    set_peer_stats(peers)
    if not torch.isfinite(torch.tensor(loss_sum)):
        _stop_on_non_finite(f"the loss of step {number} is {loss_sum}", per_micro, [*window, *more], world)
    with phase("optimizer"):
        norm = engine.optimizer_step(ds, world)
    if norm is None:
        _stop_on_non_finite(f"the gradient norm of step {number} is not finite", per_micro, [*window, *more], world)
    if distiller.has_lesson and (adaptive := job.recipe.loss.adaptive) is not None:
        state["interpolation"] = taid_update(adaptive, state.get("interpolation"), kd_sum, state["step"], train.steps)
    state["step"], state["tokens"] = number, state["tokens"] + int(tokens)
    seconds = time.monotonic() - began
    taught = distiller.has_lesson
    return {
        **({} if second is None else {"auxiliary_loss": added_sum / coefficient}),
        "tokens": state["tokens"], "loss": loss_sum, "kd_loss": kd_sum if taught else None, "ce_loss": ce_sum,
        "grad_norm": norm, "learning_rate": lr,
        "alpha": objective.alpha if taught else None, "lam": objective.lam if taught else None,
        **{name: getattr(aim, name) for name in job.recipe.loss.scheduled if name not in ("alpha", "lam")},
        "tokens_per_second": tokens / seconds}


def _stop_on_non_finite(what: str, per_micro: torch.Tensor, window: list[Batch], world: World) -> None:
    """Name the rank and the rows behind a NaN or Inf, on every rank alike. The weights are those of the step before."""
    bad = [index for index, finite in enumerate(per_micro[:, 0].isfinite().tolist()) if not finite]
    report = world.gather([source for index in bad for source in window[index].sources])
    lines = [f"    - rank {rank}: {', '.join(sources)}" for rank, sources in enumerate(report) if sources]
    if not lines:      # every loss was finite: the gradients' sum was not, and any rank's rows may be behind it
        every = world.gather([source for batch in window for source in batch.sources])
        lines = [f"    - rank {rank} (its losses were finite): {', '.join(s)}" for rank, s in enumerate(every)]
    raise TrainingError(f"{what}; no optimizer step was taken. Where it arose:\n" + "\n".join(lines))
