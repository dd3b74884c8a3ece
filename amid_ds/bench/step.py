"""What distilling costs beside training alone, and beside the way it is usually done.

Four things on the same tokens in the same layout: (a) the student's own step with cross entropy through the fused head,
(b) the teacher's forward with its head, (c) the distillation step, (d) a second ZeRO-3 engine for the teacher, full
logits of both models and the objective written out. (a) and (c) are `Stepper.train_step` itself. Times come from one set of
ranks that holds all four and takes them in turn; peaks of memory from ranks of their own for each. The ranks are
started here: two on a CPU, one for each GPU of this machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amid_ds.bench.measure import slowest, status_bytes
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.recipe import Dtype, Recipe
from amid_ds.data import Batch
from amid_ds.distributed.launch import free_port
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine import ds_config
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.build import build_engine
from amid_ds.engine.gather import full_numel
from amid_ds.errors import TrainingError
from amid_ds.losses.reference import naive_loss
from amid_ds.models import loading
from amid_ds.models.heads import head_of
from amid_ds.training.objective import objective_at
from amid_ds.training.rollout import StepBatch
from amid_ds.training.step import Stepper

MICRO_BATCHES = 4
# Rows of hidden states that the teacher's head takes at once.
HEAD_ROWS = 256


@dataclass(frozen=True)
class Scale:
    """What is measured: two Llamas as (width, layers), one vocabulary, and micro-batches of `rows` x `length`."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    rounds: int
    dtype: Dtype


SCALES = {"cpu": Scale((512, 8), (768, 13), 32000, 1, 512, 3, "fp32"),             # 50 M and 147 M parameters
          "cuda": Scale((1024, 24), (4096, 32), 128256, 4, 2048, 10, "bf16")}      # 0.5 B and 7.6 B
WAYS = ("student", "teacher", "distillation", "usual")


@dataclass(frozen=True)
class StepResult:
    """Seconds are medians over the rounds, of the slowest rank; bytes are one rank's, the largest."""

    ranks: int
    student_step_s: float                # (a)
    teacher_forward_s: float             # (b)
    distillation_step_s: float           # (c)
    usual_step_s: float                  # (d)
    spread_s: dict[str, tuple[float, float]]      # least and most of each of the four
    peak_bytes: dict[str, int]           # of (a), (c), (d): resident on a CPU, allocated on a GPU
    teacher_shard_bytes: int
    largest_layer_bytes: int             # of the teacher: what one gather puts together
    teacher_gather_bytes: dict[str, int] # in a step of 1 and of 8 micro-batches


def bench_step(as_json: bool) -> None:
    """`amid-ds bench step`: measure, then print a table, or JSON alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(SCALES[device], torch.cuda.device_count() if device == "cuda" else 2)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print(result, device, SCALES[device])


def measure(scale: Scale, size: int) -> StepResult:
    """All of it at `scale`, on `size` ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        _make_models(Path(folder), scale)
        timed = _on_ranks(size, Path(folder), "times", scale)
        measured = {way: _on_ranks(size, Path(folder), way, scale) for way in ("student", "distillation", "usual")}
    median = {way: statistics.median(values) for way, values in timed["seconds"].items()}
    return StepResult(
        size, median["student"], median["teacher"], median["distillation"], median["usual"],
        {way: (min(values), max(values)) for way, values in timed["seconds"].items()},
        {way: values["peak_bytes"] for way, values in measured.items()},
        timed["teacher_shard_bytes"], timed["largest_layer_bytes"], timed["teacher_gather_bytes"])


def _make_models(folder: Path, scale: Scale) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, (width, layers) in (("student", scale.student), ("teacher", scale.teacher)):
        config = LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                             num_attention_heads=max(1, width // 64), vocab_size=scale.vocabulary,
                             tie_word_embeddings=True)
        LlamaForCausalLM(config).to(loading.DTYPES[scale.dtype]).save_pretrained(folder / name)


def _on_ranks(size: int, folder: Path, part: str, scale: Scale) -> dict[str, Any]:
    """Run `part` on `size` fresh ranks of this machine and return what rank 0 found."""
    threads = str(max(1, (os.cpu_count() or 1) // size))
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": threads}
    spawn = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    os.environ.update(common)                # torch reads its number of threads when a rank imports it
    try:
        ranks = [spawn.Process(target=_be_a_rank, args=(rank, folder, part, scale)) for rank in range(size)]
        for rank in ranks:
            rank.start()
    finally:
        os.environ.clear()                   # this process is no rank
        os.environ.update(before)
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise TrainingError(f"bench step, {part}: ranks ended with {[rank.exitcode for rank in ranks]}")
    return dict(json.loads((folder / f"{part}.json").read_text()))


def _be_a_rank(rank: int, folder: Path, part: str, scale: Scale) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with init_distributed(1800) as world:
        found = _times(folder, world, scale) if part == "times" else _peak(part, folder, world, scale)
        if world.is_main:
            (folder / f"{part}.json").write_text(json.dumps(found))


def _times(folder: Path, world: World, scale: Scale) -> dict[str, Any]:
    alone, ours, usual = (_Ours(folder, world, scale, with_teacher=False), _Ours(folder, world, scale, with_teacher=True),
                          _Usual(folder, world, scale))
    lone = _Ours(folder, world, scale, with_teacher=True)      # a forward in between would cost `ours` its prefetch trace
    steps: dict[str, Callable[[], None]] = {"student": alone.step, "teacher": lone.teacher_forward,
                                            "distillation": ours.step, "usual": usual.step}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(2 + scale.rounds):        # two to warm up: ZeRO-3 records its trace in the second
        for way in WAYS:
            elapsed = slowest(world, steps[way])
            if turn > 1:
                seconds[way].append(elapsed)
    return {"seconds": seconds, "teacher_gather_bytes": {f"ga{n}": ours.gathered_in_a_step(n) for n in (1, 8)},
            **ours.teacher_sizes()}


def _peak(way: str, folder: Path, world: World, scale: Scale) -> dict[str, Any]:
    """The peak of a step after the first ones, when the optimizer has its moments."""
    step = (_Usual(folder, world, scale) if way == "usual" else _Ours(folder, world, scale, way == "distillation")).step
    step()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")     # sets the high-water mark to what is resident now
    step()
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else status_bytes("VmHWM")
    return {"peak_bytes": max(world.gather(peak))}


class _Ours:
    """Our engine and its optimizer step; with the teacher, or cross entropy alone."""

    def __init__(self, folder: Path, world: World, scale: Scale, with_teacher: bool) -> None:
        self.world, self.scale = world, scale
        recipe = _recipe(folder, world, scale, with_teacher)
        config = ds_config.read_deepspeed_config(recipe, world.dp_size)
        self.engine = build_engine(recipe, config, scale.vocabulary, world)
        self.stepper = Stepper(recipe, self.engine, TrainState())
        self.window = [_batch(index, world, scale) for index in range(MICRO_BATCHES)]

    def step(self) -> None:
        self._step(self.window)

    def _step(self, window: list[Batch]) -> None:
        valid = sum(batch.labels.numel() for batch in window) * self.world.size
        self.stepper.train_step(StepBatch(window, valid, 0.0))

    @torch.no_grad()
    def teacher_forward(self) -> None:
        """The teacher's body over the window, and its head: what a forward of the model by itself computes."""
        teacher = self.engine.distiller.teacher
        assert teacher is not None
        self.engine.start_step(0.0)
        batches = [batch.to(self.world.device) for batch in self.window]
        window = self.engine.teacher_hidden_states(batches, batches[0].labels.numel(), self.stepper.teacher_batch)
        with self.engine.gathered_head(teacher):
            weight = head_of(teacher).weight
            for hidden in window:
                for rows in hidden.split(HEAD_ROWS):
                    rows.to(weight.device) @ weight.t()

    def gathered_in_a_step(self, micro_batches: int) -> int:
        """Bytes of the teacher that one step gathers."""
        window = [_batch(index, self.world, self.scale) for index in range(micro_batches)]
        before = self.engine.gathered_bytes.teacher
        self._step(window)
        return self.engine.gathered_bytes.teacher - before

    def teacher_sizes(self) -> dict[str, int]:
        """Bytes of the teacher's shards on this rank, and of the largest layer that one gather puts together."""
        teacher: Any = self.engine.distiller.teacher
        layers = [[teacher.get_input_embeddings().weight], list(teacher.model.layers[0].parameters())]
        largest = max(sum(full_numel(parameter) for parameter in layer) for layer in layers)
        return {"teacher_shard_bytes": self.engine.resident_bytes()["teacher_weights"],
                "largest_layer_bytes": largest * layers[0][0].element_size()}


class _Usual:
    """Two ZeRO-3 engines, full logits of both models for every micro-batch, the objective written out."""

    def __init__(self, folder: Path, world: World, scale: Scale) -> None:
        deepspeed = import_deepspeed()
        recipe = _recipe(folder, world, scale, with_teacher=True)
        config = ds_config.read_deepspeed_config(recipe, world.dp_size)
        self.world, self.objective = world, objective_at(recipe.loss, 0, recipe.train.steps).amid
        student, teacher = (loading.load_causal_lm(str(folder / name), scale.dtype, ds_config.sharded_loading(config))
                            for name in ("student", "teacher"))
        teacher.requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        self.student, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config,
                                                dist_init_required=False)
        self.teacher, *_ = deepspeed.initialize(model=teacher, config=config, dist_init_required=False)
        self.window = [_batch(index, world, scale) for index in range(MICRO_BATCHES)]

    def step(self) -> None:
        for index, batch in enumerate(self.window):
            ids = batch.input_ids.to(self.world.device)
            self.student.set_gradient_accumulation_boundary(index == len(self.window) - 1)
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits
            logits = self.student(input_ids=ids, use_cache=False).logits
            loss = naive_loss(logits.float(), target.float(), self.objective).mean() / len(self.window)
            self.student.backward(loss, scale_wrt_gas=False)
        self.student.step()


def _recipe(folder: Path, world: World, scale: Scale, with_teacher: bool) -> Recipe:
    return Recipe.model_validate({
        "student": {"model": str(folder / "student")},
        **({"teacher": {"model": str(folder / "teacher")}} if with_teacher else {}),
        "data": {"train": [{"path": "none"}]}, "output_dir": str(folder),
        "train": {"steps": 100, "seq_length": scale.length, "micro_batch_size": scale.rows,
                  "global_batch_size": scale.rows * MICRO_BATCHES * world.dp_size},
        "deepspeed": "zero3_fp32.json" if scale.dtype == "fp32" else "zero3.json"})


def _batch(index: int, world: World, scale: Scale) -> Batch:
    draw = torch.Generator().manual_seed(index * world.size + world.rank)
    ids = torch.randint(scale.vocabulary, (scale.rows, scale.length), generator=draw)
    return Batch(ids, ids.roll(-1, 1), None, 0, [], [])


def _print(result: StepResult, device: str, scale: Scale) -> None:
    from rich.console import Console
    from rich.table import Table

    together = result.student_step_s + result.teacher_forward_s
    table = Table(title=f"a step of {MICRO_BATCHES} micro-batches of {scale.rows} x {scale.length} tokens on each of "
                        f"{result.ranks} rank(s), {device}, {scale.dtype}")
    for heading in ("what", "seconds", "least to most", "peak MB"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    titles = {"student": "(a) the student by itself", "teacher": "(b) the teacher's forward",
              "distillation": "(c) distillation", "usual": "(d) two engines, full logits"}
    seconds = dict(zip(WAYS, (result.student_step_s, result.teacher_forward_s, result.distillation_step_s,
                              result.usual_step_s), strict=True))
    for way in WAYS:
        low, high = result.spread_s[way]
        peak = result.peak_bytes.get(way)
        table.add_row(titles[way], f"{seconds[way]:.2f}", f"{low:.2f} to {high:.2f}",
                      f"{peak / 1e6:,.0f}" if peak else "")
    table.add_row("(c) ÷ ((a) + (b))", f"{result.distillation_step_s / together:.2f}")
    table.add_row("(c) ÷ (d)", f"{result.distillation_step_s / result.usual_step_s:.2f}", "",
                  f"{result.peak_bytes['distillation'] / result.peak_bytes['usual']:.2f}")
    extra = result.peak_bytes["distillation"] - result.peak_bytes["student"]
    table.add_row("(c) - (a)", f"{result.distillation_step_s - result.student_step_s:.2f}", "", f"{extra / 1e6:,.0f}")
    table.add_row("the teacher's shards", "", "", f"{result.teacher_shard_bytes / 1e6:,.0f}")
    table.add_row("its largest gathered layer", "", "", f"{result.largest_layer_bytes / 1e6:,.0f}")
    gathered = result.teacher_gather_bytes
    table.add_row("gathered of the teacher, 1 and 8 micro-batches", "", "",
                  f"{gathered['ga1'] / 1e6:,.0f} and {gathered['ga8'] / 1e6:,.0f}")
    Console().print(table)
