"""The training job, top to bottom: check everything, build one engine, resume, step, save.

A step's loss is the sum over its valid tokens divided by the number N of valid tokens in the whole global batch, so it
does not depend on ranks, micro-batches or masks. DeepSpeed averages gradients over the data-parallel ranks R; with
token weights 1/N and the loss times R, its (1/R) Σ_ranks Σ_micro ∇(R · Σ_i loss_i / N) is ∇ Σ_i loss_i / N.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from amid_ds import checkpoint, engine, export, measured, reshard
from amid_ds.config import Recipe, dump_recipe, load_recipe
from amid_ds.data import (
    Batch,
    StepData,
    Steps,
    StreamData,
    check_sources,
    end_of_text,
    fingerprint,
    load_tokenizer,
    merged_places,
    prepare_all,
    require_same_tokenizer,
    stream_summary,
)
from amid_ds.distiller import Distiller
from amid_ds.distributed import World, joined
from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.lives import Life
from amid_ds.losses import AMiD
from amid_ds.losses.fused import IGNORE_INDEX
from amid_ds.meter import Meter, heard, own_figures, phase
from amid_ds.metrics import RunLog, write_atomically
from amid_ds.origin import student_of
from amid_ds.plan import costs_of, device_here
from amid_ds.profile import Profiler
from amid_ds.provenance import model_hash, prepared_hash, provenance
from amid_ds.rollout import Rollouts, Turn, require_room
from amid_ds.schedule import advanced, learning_rate, loss_at, step_seed, turning_points
from amid_ds.stopping import StopRequest
from amid_ds.validation import validate
from amid_ds.watch import Watch
from amid_ds.watchdog import GRACE_S, Watchdog

MODEL = "model"      # in the run's folder: the finished student
# What may differ between the lives of a run, because it does not change what is learnt.
MAY_CHANGE = ("checkpoint", "slurm", "output_dir", "data.workers", "data.prepared", "train.log_every",
              "train.hang_timeout", "train.max_hours", "train.micro_batch_size", "student.activation_checkpointing",
              "train.profile", "teacher.max_tokens_per_pass", "teacher.placement", "tensor_parallel",
              "deepspeed")      # but for its dtype, which is kept as student.dtype
EVALUATION = ("data.eval", "train.eval_every")      # nor these, but where rollouts listen to it


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


def train(recipe_path: str, overrides: Sequence[str]) -> None:
    """`amid-ds train`: every rank of every launcher comes through here. Raises InputError, TrainingError or Stopped."""
    timeout = 1800.0
    with contextlib.suppress(InputError):      # said by all ranks at once below
        timeout = load_recipe(recipe_path, overrides).train.hang_timeout
    # A step that hangs is the watchdog's to end, before a collective gives up by itself.
    with joined(timeout + GRACE_S) as world, Life(world.rank, world.size) as life:
        job = world.together(lambda: check(load_recipe(recipe_path, overrides), world.size))
        world = world.split(job.recipe.tensor_parallel)
        world.main_at_length(lambda: export.start_from(job.recipe))
        changed = world.main_first(lambda: changes_between_lives(job.recipe))
        open_run(job, world)
        world.together(lambda: life.begin(job.run, changed))
        recipe = job.recipe
        found = checkpoint.find(job.run / "checkpoints", world, lambda message: _tell(world, message))
        if found.checkpoint is not None and checkpoint.step_of(found.checkpoint) == recipe.train.steps:
            _tell(world, f"{job.run} has reached its last step {recipe.train.steps}: nothing to do")
            if not world.gather((job.run / MODEL).is_dir())[0]:      # killed between its last save and its export
                leave_model(job, world)
            return
        world.main_at_length(lambda: prepare_all(recipe.data, recipe.train.seq_length, job.tokenizer,
                                                 recipe.prepared_dir))
        world.main_at_length(lambda: require_room(recipe, lambda message: _tell(world, message)))
        identity = world.together(lambda: identity_of(job, found.checkpoint))
        layout = checkpoint.layout(world, engine.stage_of(job.deepspeed_config), job.student_dtype)
        whole = reshard.whole_of(found.checkpoint, layout, student_of(recipe), world) if found.checkpoint else None
        ds = world.together(lambda: engine.build_engine(recipe, job.deepspeed_config, job.objective, job.vocab_size,
                                                       world))
        world.together(lambda: engine.check_models(ds, job.vocab_size, recipe.data.isolates_any))
        state: dict[str, Any] = {"step": 0, "tokens": 0}
        if found.checkpoint is not None:
            loaded = found.checkpoint
            state = world.together(lambda: reshard.load(ds, whole, world) if whole else checkpoint.load(ds, loaded))
        state["tokens_per_pass"] = engine.plan_teaching(ds, recipe, state.get("tokens_per_pass"), world)
        loop(job, ds, {**state, "identity": identity}, found.damaged, world, life)


def _tell(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)


def check(recipe: Recipe, ranks: int) -> Job:
    """Everything about a recipe that can be judged before a model is loaded or a token is prepared."""
    config = engine.read_deepspeed_config(recipe, engine.data_parallel(recipe, ranks))
    objective, *_ = [engine.build_objective(loss_at(recipe.loss, step, recipe.train.steps))
                     for step in turning_points(recipe.loss, recipe.train.steps)]
    refuse_other_run(recipe)
    check_sources(recipe.data)
    student = student_of(recipe)
    widths = {f"student {student.model}": engine.model_config(student.model, **student.opened_with).vocab_size}
    tokenizer = load_tokenizer(student.model, **student.opened_with)
    if recipe.teacher is not None:
        teacher = engine.model_config(recipe.teacher.model, **recipe.teacher.opened_with)
        widths[f"teacher {recipe.teacher.model}"] = teacher.vocab_size
        require_same_tokenizer(tokenizer, load_tokenizer(recipe.teacher.model, **recipe.teacher.opened_with),
                               student.model, recipe.teacher.model)
    engine.refuse_unfit(student.model, **student.opened_with)
    if recipe.teacher is not None:
        engine.refuse_unfit(recipe.teacher.model, **recipe.teacher.opened_with)
    if recipe.rollout is not None:
        end_of_text(tokenizer, recipe.rollout.end_of_text)
    for name, width in widths.items():
        if width < len(tokenizer):
            raise InputError(f"the {name} has a vocabulary of {width}, the tokenizer of {len(tokenizer)}",
                             "a model with a row for every id of the tokenizer",
                             "resize the model's embeddings, or use the tokenizer that it was made with")
    return Job(recipe, config, objective, tokenizer)


def refuse_other_run(recipe: Recipe) -> None:
    """An output folder holds one run: the recipe that it was started with, but for what changes nothing learnt."""
    saved = Path(recipe.output_dir) / "recipe.yaml"
    if not saved.exists():
        return
    before, now = (flat(yaml.safe_load(dump_recipe(r))) for r in (load_recipe(saved), recipe))
    lines = _differences(before, now, recipe.checkpoint.allow_change)
    if lines:
        raise InputError(f"{recipe.output_dir} holds the run of another recipe:\n{lines}",
                         "a new output_dir, or the recipe that the run was started with",
                         "set output_dir to another folder, take the changes back, or name the keys in "
                         "checkpoint.allow_change")


def changes_between_lives(recipe: Recipe) -> dict[str, list[Any]]:
    """The keys in which the recipe differs from that of the life before, each with [before, now]; {} in the first."""
    saved = Path(recipe.output_dir) / "recipe.yaml"
    if not saved.exists():
        return {}
    before, now = (flat(yaml.safe_load(dump_recipe(r))) for r in (load_recipe(saved), recipe))
    return {key: [before.get(key), now.get(key)] for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)}


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
    identity = {**flat(yaml.safe_load(dump_recipe(recipe))), **hashes, "student.dtype": job.student_dtype}
    if saved is not None:
        refuse_changes(saved, identity, recipe.checkpoint.allow_change)
    return identity


def refuse_changes(saved: Path, identity: dict[str, Any], allowed: Sequence[str]) -> None:
    """A run goes on with the teacher, tokenizer, data and objective of the life before, or says what has changed."""
    state = checkpoint.read_manifest(saved)["state"]
    lines = _differences({**state["identity"], "student.dtype": state["student_dtype"]}, identity, allowed)
    if lines:
        raise InputError(f"what {saved} was trained with has changed since:\n{lines}",
                         "the same teacher, tokenizer, data and objective",
                         "take the changes back, take another output_dir, or name the keys in checkpoint.allow_change")


def _differences(before: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> str:
    """A line for each key that differs and may not."""
    listened = any(key.startswith("rollout.adaptive.") for key in (*before, *now))
    free = (*MAY_CHANGE, *(() if listened else EVALUATION), *allowed)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
               and not any(key == name or key.startswith(f"{name}.") for name in free)]
    return "\n".join(f"    - {key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in changed)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested recipe as dotted keys, lists by index."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        leaves.update(flat(child, f"{prefix}.{name}" if prefix else str(name)))
    return leaves


def open_run(job: Job, world: World) -> None:
    """Make the run's folder; write the resolved recipe and where everything came from."""
    def write() -> None:
        try:
            job.run.mkdir(parents=True, exist_ok=True)
            write_atomically(job.run / "recipe.yaml", dump_recipe(job.recipe))
            write_atomically(job.run / "provenance.json", provenance(job.recipe, job.tokenizer, world.size))
        except OSError as error:
            raise InputError(f"the output folder {job.run} cannot be written: {error}", "a folder that can be written",
                             "set output_dir to another folder") from None
    world.main_first(write)


def loop(job: Job, ds: Any, state: dict[str, Any], damaged: frozenset[Path], world: World, life: Life) -> None:
    """Optimizer steps from `state["step"]` to the recipe's last; every orderly way out ends with a finished save."""
    recipe = job.recipe
    data, auxiliary = world.together(lambda: step_data(job, state, world))
    log = RunLog(job.run if world.is_main else None, state["step"], recipe.train.steps, job.run.name)
    log.say(f"{world.size} rank(s), {recipe.train.global_batch_size} rows of {recipe.train.seq_length} tokens a step, "
            + ("" if recipe.teacher else "no teacher: cross entropy alone, ")
            + (f"resumed after step {state['step']}" if state["step"] else "from the start"))
    log.say(f"epochs by the last step: {epochs_of(job, data, state)}")
    if recipe.rollout is None or recipe.rollout.adaptive is None:
        state.pop("rollout", None)      # of a life before, whose buffer no checkpoint of this one has
    rollouts = None if recipe.rollout is None else world.together(
        lambda: Rollouts(recipe, ds, job.tokenizer, state, world))
    saver = checkpoint.Saver(ds, job.run / "checkpoints", recipe.checkpoint, world, log.alarm, damaged)
    saved = state["step"]
    with (StopRequest(job.run, recipe.train.max_hours, world.is_main) as request, contextlib.closing(log),
          Watchdog(recipe.train.hang_timeout, world, life) as watchdog,
          Meter(world.device, *costs(job, world, watchdog.hosts, log)) as meter):
        watch = Watch([f"rank {rank} on {host}" for rank, host in enumerate(watchdog.hosts)], log.alarm,
                      world.tp_size)
        profiler = Profiler(recipe.train.profile, job.run, world.rank, meter, log.say)
        began, first = time.monotonic(), state["step"]
        lined = first
        for reading in readings(data, auxiliary, state["step"], recipe.train.steps):
            watchdog.step(state["step"] + 1)
            profiler.step(state["step"] + 1)
            agreed = agree(reading, request.reason() is not None, saver.writing, world)
            if saver.pending and not agreed.writing:
                with phase("checkpoint"):
                    saver.finish()
            if agreed.stop:
                break
            life.stepping(state["step"] + 1)
            second = None if auxiliary is None else Second(reading.auxiliary, agreed.auxiliary_tokens)
            turn = Turn(reading.window, agreed.tokens, agreed.padding)
            if rollouts is not None:
                with phase("rollout"):
                    turn = rollouts.turn(turn)
            measures = world.is_main and state["step"] + 1 == first + measured.STEP
            with (measured.measured(ds, recipe, world, watchdog.hosts, state["step"] + 1) if measures
                  else contextlib.nullcontext()):
                values = step(job, ds, turn.window, turn.tokens, state, world, second, turn.sampled)
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
                    figures = world.together(lambda: validate(recipe, ds, world))
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


def save(saver: checkpoint.Saver, state: dict[str, Any], data: Steps, rollouts: Rollouts | None, world: World) -> None:
    """Begin to save where the training, the data and the student's own words stand. Collective."""
    with phase("checkpoint"):
        saver.start(with_places(state, data, world), rollouts.files if rollouts is not None else {})


def costs(job: Job, world: World, hosts: list[str], log: RunLog) -> tuple[dict[str, float], float | None]:
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


def leave_model(job: Job, world: World) -> None:
    """The finished run's student in the run's folder, as an ordinary Hugging Face folder. Collective."""
    last = job.run / "checkpoints" / checkpoint.name_of(job.recipe.train.steps)

    def write() -> None:
        if not last.is_dir():
            raise TrainingError(f"the last checkpoint {last} could not be saved\n  make room, and start again: the run "
                                "goes on from the one before")
        export.write(last, job.recipe, job.run / MODEL)

    world.main_at_length(write)
    _tell(world, f"{job.run.name}: the model is in {job.run / MODEL}")


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


def with_places(state: dict[str, Any], data: Steps, world: World) -> dict[str, Any]:
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


class Reading(NamedTuple):
    """One step's micro-batches on this rank, the seconds that it waited for them, or why there are none."""

    window: list[Batch]
    auxiliary: list[Batch]
    waited: float
    error: InputError | None = None


class Second(NamedTuple):
    """A step's micro-batches of the auxiliary corpus, and the valid tokens that the global batch has of it."""

    window: list[Batch]
    tokens: float


def readings(data: Steps, auxiliary: StepData | None, start: int, stop: int) -> Iterator[Reading]:
    """The steps' readings; the first that fails is the last, and is for all ranks to hear of."""
    both: list[Steps] = [data] if auxiliary is None else [data, auxiliary]
    windows = zip(*(each.windows(start, stop) for each in both), strict=True)
    while True:
        before = sum(each.waited for each in both)
        try:
            with phase("data"):
                found = next(windows, None)
        except InputError as error:
            yield Reading([], [], 0.0, error)
            return
        if found is None:
            return
        yield Reading(found[0], found[1] if auxiliary is not None else [], sum(each.waited for each in both) - before)


class Agreed(NamedTuple):
    """What the ranks know together at the beginning of a step."""

    tokens: float                    # valid ones in the global batch
    auxiliary_tokens: float          # and in that of the auxiliary corpus
    padding: float                   # the share of the global batch's places that hold nothing
    waited: float                    # seconds for data, mean over ranks
    stop: bool                       # somebody was asked to stop
    writing: bool                    # somebody still writes a checkpoint


def agree(reading: Reading, stop: bool, writing: bool, world: World) -> Agreed:
    """The one agreement of every step. Raises, on every rank, what any rank's data are damaged by."""
    valid = [sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in window)
             for window in (reading.window, reading.auxiliary)]
    both = [*reading.window, *reading.auxiliary]
    padding, places = sum(batch.padding for batch in both), sum(batch.input_ids.numel() for batch in both)
    *tokens, padding_sum, places_sum, waited, stopping, still_writing, broken = world.sum(
        [*valid, padding, places, reading.waited, stop, writing, reading.error is not None])
    if broken:
        world.together(lambda: _raise(reading.error))
    return Agreed(tokens[0], tokens[1], padding_sum / places_sum, waited / world.dp_size, stopping > 0,
                  still_writing > 0)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def evaluates(recipe: Recipe, step: int) -> bool:
    """Whether the evaluation sets are due after `step`: every `eval_every` steps and after the last."""
    every = recipe.train.eval_every
    return step == recipe.train.steps or (every > 0 and step % every == 0)


def step(job: Job, ds: Any, window: list[Batch], tokens: float, state: dict[str, Any], world: World,
         second: Second | None = None, sampled: bool = False) -> dict[str, float | None]:
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
    engine.begin_window(ds)
    train = job.recipe.train
    aim = loss_at(job.recipe.loss, state["step"], train.steps, state.get("interpolation"))
    objective = engine.build_objective(aim)
    distiller.pursue(objective, aim.kd_weight, aim.ce_weight)   # type: ignore[arg-type]   # loss_at gives numbers
    per_pass = max(1, state["tokens_per_pass"] // (train.micro_batch_size * train.seq_length))
    with phase("teacher"):
        lessons = [*distiller.teach(batches[:len(window)], per_pass), *[None for _ in more]]
    sums = []
    with engine.gathered_head(distiller.teacher if distiller.has_lesson else None):
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
        [part, *main[:, 1:].sum(0).tolist(), added[:, 2].sum().item()], [part, *own_figures()])
    heard(peers)
    if not torch.isfinite(torch.tensor(loss_sum)):
        _stop_on_non_finite(f"the loss of step {number} is {loss_sum}", per_micro, [*window, *more], world)
    with phase("optimizer"):
        norm = engine.take_step(ds, world)
    if norm is None:
        _stop_on_non_finite(f"the gradient norm of step {number} is not finite", per_micro, [*window, *more], world)
    if distiller.has_lesson and (adaptive := job.recipe.loss.adaptive) is not None:
        state["interpolation"] = advanced(adaptive, state.get("interpolation"), kd_sum, state["step"], train.steps)
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
