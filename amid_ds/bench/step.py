"""`bench step`: the cost of distilling beside training alone, and beside the usual way to distil.

On the same tokens in the same layout: (a) the student's own step, cross entropy through the fused
head; (b) the teacher's forward with its head; (c) the distillation step; (d) the usual way: a
second ZeRO-3 engine for the teacher, full logits of both models and the objective written out; (e),
(f) distillation from a cache, of the 64 most probable ids with AMiD and of 50 draws with forward
KL, with ids and numbers that are made up. (a), (c), (e) and (f) are the trainer's own step. Where
one set of ranks can hold them all, it runs them in turn, and each peak of memory comes from ranks
of its own; else times do too, one variant after the other, and (d) is left out where it does not
fit even so. The ranks are started here: two on a CPU, one for each GPU of this machine.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from amid_ds.bench.local_ranks import on_local_ranks
from amid_ds.bench.measure import process_bytes, reset_peak_rss, slowest_rank_seconds
from amid_ds.bench.optimizer import optimizer_seconds
from amid_ds.bench.step_scale import (
    CACHED_VARIANTS,
    MICRO_BATCHES,
    STEP_SCALES,
    STEP_VARIANTS,
    StepScale,
    fitting_scale,
    save_configs,
    save_models,
)
from amid_ds.checkpoint.state import TrainState
from amid_ds.data import Batch
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.build import build_engine
from amid_ds.engine.gather import full_numel
from amid_ds.engine.sharding import open_causal_lm
from amid_ds.losses import SparseTargets
from amid_ds.losses.reference import naive_loss
from amid_ds.models import loading
from amid_ds.models.heads import head_of
from amid_ds.models.shape import embedding_of
from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
from amid_ds.training.objective import objective_at
from amid_ds.training.rollout import StepBatch
from amid_ds.training.step import Stepper

CPU_RANKS = 2
# ZeRO-3 records its trace of modules in the second step.
WARM_UP_ROUNDS = 2
# Hidden states that the head gets in one product in (b).
HEAD_ROWS = 256
VARIANT_TITLES = {"student": "(a) the student by itself", "teacher": "(b) the teacher's forward",
                  "distillation": "(c) distillation", "usual": "(d) two engines, full logits",
                  "topk_64": "(e) from a cache, 64 most probable",
                  "sample_50": "(f) from a cache, 50 draws"}


@dataclass(frozen=True)
class StepResult:
    """Seconds are medians over the rounds, of the slowest rank; bytes are the largest rank's.

    What does not fit the device is None. cached_step_s: by variant. spread_s: least and most
    seconds by variant. peak_bytes: by variant but the teacher's, resident on a CPU, allocated on a
    GPU. largest_layer_bytes: of the teacher, gathered at once. teacher_gather_bytes: in a step of 1
    and of 8 micro-batches, `ga1` and `ga8`. at_once: whether one set of ranks was timed, which held
    all variants. optimizer_s: of a step over a rank's part of the student, by `optimizer_seconds`.
    """

    ranks: int
    scale: StepScale
    at_once: bool
    student_step_s: float
    teacher_forward_s: float
    distillation_step_s: float
    usual_step_s: float | None
    cached_step_s: dict[str, float]
    spread_s: dict[str, tuple[float, float]]
    peak_bytes: dict[str, int | None]
    teacher_shard_bytes: int
    largest_layer_bytes: int
    teacher_gather_bytes: dict[str, int]
    optimizer_s: dict[str, float | None]


@dataclass(frozen=True)
class Measured:
    """What ranks have measured of the variants that they hold.

    seconds: by variant and round. peak_bytes: of the only variant, None of several. sizes: of the
    teacher, by their names in StepResult; {} without (c). optimizer_s: {} but of ranks without a
    variant.
    """

    seconds: dict[str, list[float]]
    peak_bytes: int | None
    sizes: dict[str, int]
    optimizer_s: dict[str, float | None] = field(default_factory=dict)


def bench_step(as_json: bool, rows: int | None = None, length: int | None = None,
               vocabulary: int | None = None, student: tuple[int, int] | None = None,
               teacher: tuple[int, int] | None = None) -> None:
    """`amid-ds bench step`: measure, then print a table, or JSON alone.

    rows, length, vocabulary, student, teacher: as StepScale has them; None: this device's own, with
    as many rows as fit. Raises InputError for a shape that cannot be, or does not fit.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = torch.cuda.device_count() if kind == "cuda" else CPU_RANKS
    device = find_device("cpu", ranks)
    if kind == "cuda":
        device = replace(find_device(DEFAULT_DEVICE, ranks),
                         memory=torch.cuda.get_device_properties(0).total_memory)
    own = STEP_SCALES[kind]
    scale = replace(own, rows=own.rows if rows is None else rows,
                    length=own.length if length is None else length,
                    vocabulary=own.vocabulary if vocabulary is None else vocabulary,
                    student=student or own.student, teacher=teacher or own.teacher)
    with tempfile.TemporaryDirectory() as name:
        save_configs(Path(name), scale.check())
        scale, variants, at_once = fitting_scale(scale, Path(name), ranks, device,
                                                 may_shrink=rows is None)
        result = measure_step(Path(name), scale, ranks, variants, at_once)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print(result, kind)


def measure_step(folder: Path, scale: StepScale, ranks: int, variants: Sequence[str],
                 at_once: bool) -> StepResult:
    """Times and peaks of `variants` on `ranks` ranks of this machine, the models in `folder`."""
    save_models(folder, scale)
    together = _on_ranks(ranks, folder, variants, scale, scale.rounds) if at_once else None
    alone = {variant: _on_ranks(ranks, folder, [variant], scale, 0 if at_once else scale.rounds)
             for variant in variants if variant != "teacher" or not at_once}
    seconds = together.seconds if together is not None else {
        variant: one.seconds[variant] for variant, one in alone.items()}
    sizes = (together or alone["distillation"]).sizes
    optimizer = _on_ranks(ranks, folder, [], scale, 0).optimizer_s
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    return StepResult(
        ranks=ranks, scale=scale, at_once=at_once, student_step_s=median["student"],
        teacher_forward_s=median["teacher"], distillation_step_s=median["distillation"],
        usual_step_s=median.get("usual"),
        cached_step_s={variant: median[variant] for variant in CACHED_VARIANTS},
        spread_s={variant: (min(values), max(values)) for variant, values in seconds.items()},
        peak_bytes={variant: alone[variant].peak_bytes if variant in alone else None
                    for variant in STEP_VARIANTS if variant != "teacher"},
        teacher_shard_bytes=sizes["teacher_shard_bytes"],
        largest_layer_bytes=sizes["largest_layer_bytes"],
        teacher_gather_bytes={"ga1": sizes["ga1"], "ga8": sizes["ga8"]},
        optimizer_s=optimizer)


def _on_ranks(size: int, folder: Path, variants: Sequence[str], scale: StepScale,
              rounds: int) -> Measured:
    """Measure `variants` on `size` fresh ranks of this machine that hold all of them.

    No variant: the optimizer's step by itself.
    """
    title = f"bench step, {', '.join(variants) or 'optimizer'}"
    return on_local_ranks(size, title, _measure, folder, variants, scale, rounds)[0]


def _measure(world: World, folder: Path, variants: Sequence[str], scale: StepScale,
             rounds: int) -> Measured:
    """Seconds of each variant in `rounds` rounds, in turn; the peak of one by itself. Collective.
    """
    if not variants:
        student: Any = loading.meta_model(str(folder / "student"))
        return Measured({}, None, {}, optimizer_seconds(
            world, student.num_parameters() // world.size))
    steps = {variant: _UsualStep(folder, world, scale) if variant == "usual"
             else _OurStep(folder, world, scale, variant) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    # One at least: then the optimizer has its moments.
    for round_number in range(WARM_UP_ROUNDS + rounds if rounds else 1):
        for variant, step in steps.items():
            elapsed = slowest_rank_seconds(world, step.step)
            if round_number >= WARM_UP_ROUNDS:
                seconds[variant].append(elapsed)
    peak = _peak_bytes(world, steps[variants[0]].step) if len(variants) == 1 else None
    ours = steps.get("distillation")
    sizes = ours.sizes() if isinstance(ours, _OurStep) and rounds else {}
    return Measured(seconds, peak, sizes)


def _peak_bytes(world: World, step: Callable[[], None]) -> int:
    """The largest rank's peak in a step. Collective."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return world.most(torch.cuda.max_memory_allocated())
    reset_peak_rss()
    step()
    return world.most(process_bytes("VmHWM"))


class _OurStep:
    """One engine and the trainer's step: `student`, cross entropy alone; `distillation`; those of
    CACHED_VARIANTS; `teacher`, that model's forward alone."""

    def __init__(self, folder: Path, world: World, scale: StepScale, variant: str) -> None:
        self.world, self.scale = world, scale
        self.recipe = scale.recipe(folder, world.dp_size, variant)
        config = ds_config.read_deepspeed_config(self.recipe, world.dp_size)
        self.engine = build_engine(self.recipe, config, scale.vocabulary, world)
        self.stepper = Stepper(self.recipe, self.engine, TrainState())
        self.window = [_batch(index, world, scale) for index in range(MICRO_BATCHES)]
        if variant in CACHED_VARIANTS:
            self.window = [_with_targets(batch, variant, scale.vocabulary)
                           for batch in self.window]
        self.forward_only = variant == "teacher"

    def step(self) -> None:
        if self.forward_only:
            self.teacher_forward()
        else:
            self._step(self.window)

    def _step(self, window: list[Batch]) -> None:
        valid = sum(batch.labels.numel() for batch in window) * self.world.size
        rows = sum(len(batch.labels) for batch in window) * self.world.size
        self.stepper.train_step(StepBatch(window, valid, sequences=rows, padding=0.0))

    @torch.no_grad()
    def teacher_forward(self) -> None:
        """The teacher's body over the window, and its head, as in a forward of that model alone."""
        teacher = self.engine.distiller.teacher
        assert teacher is not None
        self.engine.start_step(learning_rate=0.0)
        batches = [batch.to(self.world.device) for batch in self.window]
        window = self.engine.teacher_hidden_states(batches, batches[0].labels.numel(),
                                                   self.stepper.teacher_batch)
        with self.engine.gathered_head(teacher):
            weight = head_of(teacher).weight
            for hidden in window:
                for rows in hidden.split(HEAD_ROWS):
                    rows.to(weight.device) @ weight.t()

    def teacher_bytes_gathered(self, micro_batches: int) -> int:
        """Bytes of the teacher gathered in a step of so many micro-batches."""
        window = [_batch(index, self.world, self.scale) for index in range(micro_batches)]
        before = self.engine.gathered_bytes.teacher
        self._step(window)
        return self.engine.gathered_bytes.teacher - before

    def sizes(self) -> dict[str, int]:
        """Bytes of the teacher: this rank's shards, its embedding or a block (the larger) gathered,
        and what 1 and 8 micro-batches gather."""
        teacher: Any = self.engine.distiller.teacher
        embedding = embedding_of(teacher).weight
        block = sum(full_numel(parameter) for parameter in teacher.model.layers[0].parameters())
        return {"teacher_shard_bytes": self.engine.resident_bytes()["teacher_weights"],
                "largest_layer_bytes":
                    max(full_numel(embedding), block) * embedding.element_size(),
                **{f"ga{count}": self.teacher_bytes_gathered(count) for count in (1, 8)}}


class _UsualStep:
    """Two ZeRO-3 engines, full logits of both models, the objective written out."""

    def __init__(self, folder: Path, world: World, scale: StepScale) -> None:
        deepspeed = import_deepspeed()
        recipe = scale.recipe(folder, world.dp_size, "usual")
        config = ds_config.read_deepspeed_config(recipe, world.dp_size)
        self.world = world
        self.objective = objective_at(recipe.loss, 0, recipe.train.total_steps).amid
        assert recipe.live_teacher is not None
        student, teacher = (
            open_causal_lm(model, scale.dtype, config, world).read(world)
            for model in (recipe.student, recipe.live_teacher))
        teacher.requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        self.student, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config,
                                                dist_init_required=False)
        self.teacher, *_ = deepspeed.initialize(model=teacher, config=config,
                                                dist_init_required=False)
        self.window = [_batch(index, world, scale) for index in range(MICRO_BATCHES)]

    def step(self) -> None:
        for index, batch in enumerate(self.window):
            ids = batch.input_ids.to(self.world.device)
            self.student.set_gradient_accumulation_boundary(index == len(self.window) - 1)
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits
            logits = self.student(input_ids=ids, use_cache=False).logits
            per_token = naive_loss(logits.float(), target.float(), self.objective)
            self.student.backward(per_token.mean() / len(self.window), scale_wrt_gas=False)
        self.student.step()


def _batch(index: int, world: World, scale: StepScale) -> Batch:
    """Random tokens, the same in every variant."""
    generator = torch.Generator().manual_seed(index * world.size + world.rank)
    ids = torch.randint(scale.vocabulary, (scale.rows, scale.length), generator=generator)
    return Batch(ids, ids.roll(-1, 1), None, 0, [], [])


def _with_targets(batch: Batch, variant: str, vocabulary: int) -> Batch:
    """The batch with made-up targets such as the variant's cache has: each id once in a row."""
    kept, tokens = min(CACHED_VARIANTS[variant], vocabulary), len(batch.valid)
    generator = torch.Generator().manual_seed(len(batch.valid))
    first = torch.randint(vocabulary, (tokens, 1), generator=generator)
    ids = (first + torch.arange(kept) * (vocabulary // kept)) % vocabulary
    log_p = torch.randn(tokens, kept, generator=generator).log_softmax(-1)
    of_label = torch.full((tokens,), math.log(0.1))
    if variant.startswith("sample"):
        weights = torch.full((tokens, kept), 1 / kept)
        targets = SparseTargets(ids, log_p, weights=weights, label_log_probabilities=of_label,
                                rest="drop")
    else:
        targets = SparseTargets(ids, log_p + math.log(0.9), of_label,
                                label_log_probabilities=of_label)
    return replace(batch, teacher_targets=targets)


def _print(result: StepResult, kind: str) -> None:
    from rich.console import Console
    from rich.table import Table

    scale, peaks = result.scale, result.peak_bytes
    seconds = {"student": result.student_step_s, "teacher": result.teacher_forward_s,
               "distillation": result.distillation_step_s}
    if result.usual_step_s is not None:
        seconds["usual"] = result.usual_step_s
    seconds |= result.cached_step_s
    table = Table(title=f"a step of {MICRO_BATCHES} micro-batches of {scale.rows} x {scale.length} "
                        f"tokens on each of {result.ranks} rank(s), {kind}, {scale.dtype}")
    for heading in ("what", "seconds", "least to most", "peak MB"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for variant, value in seconds.items():
        low, high = result.spread_s[variant]
        table.add_row(VARIANT_TITLES[variant], f"{value:.2f}", f"{low:.2f} to {high:.2f}",
                      _mb(peaks.get(variant)))
    ours, both = seconds["distillation"], seconds["student"] + seconds["teacher"]
    table.add_row("(c) ÷ ((a) + (b))", f"{ours / both:.2f}")
    if peaks["usual"]:
        table.add_row("(c) ÷ (d)", f"{ours / seconds['usual']:.2f}", "",
                      f"{(peaks['distillation'] or 0) / peaks['usual']:.2f}")
    else:
        table.add_row(VARIANT_TITLES["usual"], "no room")
    table.add_row("(c) - (a)", f"{ours - seconds['student']:.2f}", "",
                  _mb((peaks["distillation"] or 0) - (peaks["student"] or 0)))
    for variant, value in result.cached_step_s.items():
        table.add_row(f"{VARIANT_TITLES[variant][:3]} ÷ (a)", f"{value / seconds['student']:.2f}",
                      "", f"{(peaks[variant] or 0) / (peaks['student'] or 1):.2f}")
    table.add_row("the teacher's shards", "", "", _mb(result.teacher_shard_bytes))
    table.add_row("its largest gathered layer", "", "", _mb(result.largest_layer_bytes))
    gathered = result.teacher_gather_bytes
    table.add_row("gathered of the teacher, 1 and 8 micro-batches", "", "",
                  f"{_mb(gathered['ga1'])} and {_mb(gathered['ga8'])}")
    for name, took in result.optimizer_s.items():
        table.add_row(f"an optimizer's step, {name}", "" if took is None else f"{took:.4f}")
    Console().print(table)


def _mb(size: int | None) -> str:
    """Bytes as megabytes; '' for None."""
    return "" if size is None else f"{size / 1e6:,.0f}"
