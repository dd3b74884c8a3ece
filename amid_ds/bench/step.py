"""`bench step`: the cost of distilling beside training alone, and beside the usual way to distil.

Four things on the same tokens in the same layout: (a) the student's own step, cross entropy through
the fused head; (b) the teacher's forward with its head; (c) the distillation step; (d) the usual
way: a second ZeRO-3 engine for the teacher, full logits of both models and the objective written
out. (a) and (c) are the trainer's own step. Times come from one set of ranks that holds all four
and runs them in turn; each peak of memory comes from ranks of its own. The ranks are started here:
two on a CPU, one for each GPU of this machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amid_ds.bench.measure import process_bytes, reset_peak_rss, slowest_rank_seconds
from amid_ds.bench.optimizer import optimizer_seconds
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.recipe import Dtype, Recipe, Train
from amid_ds.data import Batch
from amid_ds.distributed.launch import free_port
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.build import build_engine
from amid_ds.engine.gather import full_numel
from amid_ds.errors import TrainingError
from amid_ds.experiments.small_models import LlamaSize, new_llama
from amid_ds.losses.reference import naive_loss
from amid_ds.models import loading
from amid_ds.models.heads import head_of
from amid_ds.training.objective import objective_at
from amid_ds.training.rollout import StepBatch
from amid_ds.training.step import Stepper

MICRO_BATCHES = 4
CPU_RANKS = 2
# ZeRO-3 records its trace of modules in the second step.
WARM_UP_ROUNDS = 2
# Hidden states that the head gets in one product in (b).
HEAD_ROWS = 256
# Names in spread_s and in the timings.
STEP_VARIANTS = ("student", "teacher", "distillation", "usual")
# Those whose peak of memory is measured: names in peak_bytes.
PEAK_VARIANTS = ("student", "distillation", "usual")
VARIANT_TITLES = {"student": "(a) the student by itself", "teacher": "(b) the teacher's forward",
                  "distillation": "(c) distillation", "usual": "(d) two engines, full logits"}


@dataclass(frozen=True)
class StepScale:
    """The models, as (width, layers), their vocabulary, and micro-batches of `rows` x `length`."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    rounds: int
    dtype: Dtype


STEP_SCALES = {
    # 50 M and 147 M parameters.
    "cpu": StepScale((512, 8), (768, 13), 32000, 1, 512, 3, "fp32"),
    # 0.5 B and 7.6 B.
    "cuda": StepScale((1024, 24), (4096, 32), 128256, 4, 2048, 10, "bf16"),
}


@dataclass(frozen=True)
class StepResult:
    """Seconds are medians over the rounds, of the slowest rank; bytes are the largest rank's.

    spread_s: least and most seconds by variant. peak_bytes: by variant, resident on a CPU,
    allocated on a GPU. largest_layer_bytes: of the teacher, gathered at once. teacher_gather_bytes:
    in a step of 1 and of 8 micro-batches, `ga1` and `ga8`. optimizer_s: of a step over a rank's
    part of the student, by `optimizer_seconds`.
    """

    ranks: int
    student_step_s: float
    teacher_forward_s: float
    distillation_step_s: float
    usual_step_s: float
    spread_s: dict[str, tuple[float, float]]
    peak_bytes: dict[str, int]
    teacher_shard_bytes: int
    largest_layer_bytes: int
    teacher_gather_bytes: dict[str, int]
    optimizer_s: dict[str, float | None]


@dataclass(frozen=True)
class StepTimings:
    """Measured on the ranks that hold all variants: seconds by variant and round, and sizes."""

    seconds: dict[str, list[float]]
    teacher_gather_bytes: dict[str, int]
    teacher_shard_bytes: int
    largest_layer_bytes: int


def bench_step(as_json: bool, rows: int | None = None, length: int | None = None,
               vocabulary: int | None = None, student: tuple[int, int] | None = None,
               teacher: tuple[int, int] | None = None) -> None:
    """`amid-ds bench step`: measure, then print a table, or JSON alone.

    rows, length, vocabulary, student, teacher: as StepScale has them; None: this device's own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = torch.cuda.device_count() if device == "cuda" else CPU_RANKS
    usual = STEP_SCALES[device]
    scale = replace(usual, rows=rows or usual.rows, length=length or usual.length,
                    vocabulary=vocabulary or usual.vocabulary, student=student or usual.student,
                    teacher=teacher or usual.teacher)
    result = measure_step(scale, ranks)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print(result, device, scale)


def measure_step(scale: StepScale, size: int) -> StepResult:
    """Times and peaks at `scale`, on `size` ranks of this machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_models(folder, scale)
        timings = StepTimings(**_on_ranks(size, folder, "times", scale))
        peaks = {variant: _on_ranks(size, folder, variant, scale)["peak_bytes"]
                 for variant in PEAK_VARIANTS}
        optimizers = _on_ranks(size, folder, "optimizer", scale)
    seconds = timings.seconds
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    return StepResult(
        ranks=size, student_step_s=median["student"], teacher_forward_s=median["teacher"],
        distillation_step_s=median["distillation"], usual_step_s=median["usual"],
        spread_s={variant: (min(values), max(values)) for variant, values in seconds.items()},
        peak_bytes=peaks, teacher_shard_bytes=timings.teacher_shard_bytes,
        largest_layer_bytes=timings.largest_layer_bytes,
        teacher_gather_bytes=timings.teacher_gather_bytes, optimizer_s=optimizers)


def _make_models(folder: Path, scale: StepScale) -> None:
    for name, (width, layers) in (("student", scale.student), ("teacher", scale.teacher)):
        model = new_llama(LlamaSize.of_width(width, layers), scale.vocabulary)
        model.to(loading.DTYPES[scale.dtype]).save_pretrained(folder / name)


def _on_ranks(size: int, folder: Path, part: str, scale: StepScale) -> Any:
    """Run `part` on `size` fresh ranks of this machine and return rank 0's result, as JSON.

    `part`: "times", "optimizer", or a variant for its peak.
    """
    threads = str(max(1, (os.cpu_count() or 1) // size))
    variables = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": threads}
    spawn = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    # Set here, because torch reads its number of threads when a rank imports it.
    os.environ.update(variables)
    try:
        ranks = [spawn.Process(target=_run_rank, args=(rank, folder, part, scale))
                 for rank in range(size)]
        for rank in ranks:
            rank.start()
    finally:
        # This process is no rank.
        os.environ.clear()
        os.environ.update(before)
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        statuses = [rank.exitcode for rank in ranks]
        raise TrainingError(f"bench step, {part}: ranks ended with {statuses}")
    return json.loads((folder / f"{part}.json").read_text())


def _run_rank(rank: int, folder: Path, part: str, scale: StepScale) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    result: Mapping[str, object]
    with init_distributed(Train.model_fields["hang_timeout"].default) as world:
        if part == "times":
            result = asdict(_time_variants(folder, world, scale))
        elif part == "optimizer":
            student: Any = loading.meta_model(str(folder / "student"))
            result = optimizer_seconds(world, student.num_parameters() // world.size)
        else:
            result = {"peak_bytes": _peak_bytes(part, folder, world, scale)}
        if world.is_main:
            (folder / f"{part}.json").write_text(json.dumps(result))


def _time_variants(folder: Path, world: World, scale: StepScale) -> StepTimings:
    alone = _OurStep(folder, world, scale, with_teacher=False)
    ours = _OurStep(folder, world, scale, with_teacher=True)
    usual = _UsualStep(folder, world, scale)
    # Not the forward of `ours`: that would cost it its prefetch trace.
    teacher = _OurStep(folder, world, scale, with_teacher=True)
    variants: dict[str, Callable[[], None]] = {
        "student": alone.step, "teacher": teacher.teacher_forward,
        "distillation": ours.step, "usual": usual.step}
    seconds: dict[str, list[float]] = {variant: [] for variant in STEP_VARIANTS}
    for round_number in range(WARM_UP_ROUNDS + scale.rounds):
        for variant in STEP_VARIANTS:
            elapsed = slowest_rank_seconds(world, variants[variant])
            if round_number >= WARM_UP_ROUNDS:
                seconds[variant].append(elapsed)
    gathered = {f"ga{count}": ours.teacher_bytes_gathered(count) for count in (1, 8)}
    return StepTimings(seconds, gathered, ours.teacher_shard_bytes(), ours.largest_layer_bytes())


def _peak_bytes(variant: str, folder: Path, world: World, scale: StepScale) -> int:
    """The largest rank's peak in a step after the first, when the optimizer has its moments."""
    if variant == "usual":
        step = _UsualStep(folder, world, scale).step
    else:
        step = _OurStep(folder, world, scale, with_teacher=variant == "distillation").step
    step()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return max(world.gather(torch.cuda.max_memory_allocated()))
    reset_peak_rss()
    step()
    return max(world.gather(process_bytes("VmHWM")))


class _OurStep:
    """One engine and the trainer's step; with the teacher, or cross entropy alone."""

    def __init__(self, folder: Path, world: World, scale: StepScale, with_teacher: bool) -> None:
        self.world, self.scale = world, scale
        self.recipe = _recipe(folder, world, scale, with_teacher)
        config = ds_config.read_deepspeed_config(self.recipe, world.dp_size)
        self.engine = build_engine(self.recipe, config, scale.vocabulary, world)
        self.stepper = Stepper(self.recipe, self.engine, TrainState())
        self.window = [_batch(index, world, scale) for index in range(MICRO_BATCHES)]

    def step(self) -> None:
        self._step(self.window)

    def _step(self, window: list[Batch]) -> None:
        valid = sum(batch.labels.numel() for batch in window) * self.world.size
        self.stepper.train_step(StepBatch(window, valid, padding=0.0))

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

    def teacher_shard_bytes(self) -> int:
        """Bytes of the teacher's parameters that this rank holds."""
        return self.engine.resident_bytes()["teacher_weights"]

    def largest_layer_bytes(self) -> int:
        """Bytes of the teacher's embedding or of one of its blocks, gathered."""
        teacher: Any = self.engine.distiller.teacher
        embedding = teacher.get_input_embeddings().weight
        block = sum(full_numel(parameter) for parameter in teacher.model.layers[0].parameters())
        return max(full_numel(embedding), block) * embedding.element_size()


class _UsualStep:
    """Two ZeRO-3 engines, full logits of both models, the objective written out."""

    def __init__(self, folder: Path, world: World, scale: StepScale) -> None:
        deepspeed = import_deepspeed()
        recipe = _recipe(folder, world, scale, with_teacher=True)
        config = ds_config.read_deepspeed_config(recipe, world.dp_size)
        self.world = world
        self.objective = objective_at(recipe.loss, 0, recipe.train.total_steps).amid
        sharded = ds_config.sharded_loading(config)
        student, teacher = (loading.load_causal_lm(str(folder / name), scale.dtype, sharded)
                            for name in ("student", "teacher"))
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


def _recipe(folder: Path, world: World, scale: StepScale, with_teacher: bool) -> Recipe:
    recipe: dict[str, object] = {
        "student": {"model": str(folder / "student")},
        "data": {"train": [{"path": "none"}]},
        "output_dir": str(folder),
        "train": {"steps": 100, "seq_length": scale.length, "micro_batch_size": scale.rows,
                  "global_batch_size": scale.rows * MICRO_BATCHES * world.dp_size},
        "deepspeed": "zero3_fp32.json" if scale.dtype == "fp32" else "zero3.json",
    }
    if with_teacher:
        recipe["teacher"] = {"model": str(folder / "teacher")}
    return Recipe.model_validate(recipe)


def _batch(index: int, world: World, scale: StepScale) -> Batch:
    """Random tokens, the same in every variant."""
    generator = torch.Generator().manual_seed(index * world.size + world.rank)
    ids = torch.randint(scale.vocabulary, (scale.rows, scale.length), generator=generator)
    return Batch(ids, ids.roll(-1, 1), None, 0, [], [])


def _print(result: StepResult, device: str, scale: StepScale) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds = {"student": result.student_step_s, "teacher": result.teacher_forward_s,
               "distillation": result.distillation_step_s, "usual": result.usual_step_s}
    peaks = result.peak_bytes
    table = Table(title=f"a step of {MICRO_BATCHES} micro-batches of {scale.rows} x {scale.length} "
                        f"tokens on each of {result.ranks} rank(s), {device}, {scale.dtype}")
    for heading in ("what", "seconds", "least to most", "peak MB"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for variant in STEP_VARIANTS:
        low, high = result.spread_s[variant]
        table.add_row(VARIANT_TITLES[variant], f"{seconds[variant]:.2f}",
                      f"{low:.2f} to {high:.2f}", _mb(peaks.get(variant)))
    both = seconds["student"] + seconds["teacher"]
    table.add_row("(c) ÷ ((a) + (b))", f"{seconds['distillation'] / both:.2f}")
    table.add_row("(c) ÷ (d)", f"{seconds['distillation'] / seconds['usual']:.2f}", "",
                  f"{peaks['distillation'] / peaks['usual']:.2f}")
    table.add_row("(c) - (a)", f"{seconds['distillation'] - seconds['student']:.2f}", "",
                  _mb(peaks["distillation"] - peaks["student"]))
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
