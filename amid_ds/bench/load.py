"""`bench load`: a model into ZeRO-3's shards, each rank its own bytes, beside `from_pretrained`.

A random Llama in several safetensors files in a temporary folder is loaded by fresh ranks of this
machine's CPU: what loading reads, receives and holds does not depend on the device. First with the
page cache dropped, then from the cache; ways and numbers of ranks take turns. Imports, and what
happens at the first load of a process alone, are not counted: a tiny model is loaded first.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from amid_ds.bench.kernel_counters import KernelFigures, counting, drop_cached
from amid_ds.bench.local_ranks import on_local_ranks
from amid_ds.bench.measure import slowest_rank_seconds
from amid_ds.config.recipe import Recipe, Teacher
from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import DeepSpeedConfig, read_deepspeed_config
from amid_ds.engine.sharding import open_causal_lm
from amid_ds.experiments.small_models import LlamaSize, new_llama
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.loading import from_pretrained_into_shards

LOADED_VOCABULARY = 32000
# 602 M parameters, 1.2 GB in bf16.
LOADED_SIZE = LlamaSize.of_width(2048, layers=8)
TINY_SIZE = LlamaSize.of_width(64, layers=2)
FILE_SIZE = "256MB"
LOAD_RANKS = (2, 4)
LOAD_ROUNDS = 3
# The goals: of a rank's share of the model's bytes, of from_pretrained's seconds at 2 ranks.
MOST_READ = 1.02
MOST_BESIDE_SHARE = 200e6
MOST_RECEIVED = 1e6
MOST_SECONDS = 0.5


@dataclass(frozen=True)
class WayCost:
    """What one way to load costs. Bytes are each rank's, the most of all rounds, of the cold load.

    read_bytes: from files (`KernelFigures.read`). disk_bytes: those of them that the kernel fetched
    from storage; without any the cache could not be dropped. received_bytes: over TCP.
    peak_anonymous_bytes: above what the rank held before. cpu_seconds: of each rank, the least of
    the rounds, which a busy machine changes less. seconds: of the slowest rank, the median of the
    rounds, cold; warm_seconds: the same from the page cache. spread_s: least and most of `seconds`,
    then of `warm_seconds`.
    """

    read_bytes: list[int]
    disk_bytes: list[int]
    received_bytes: list[int]
    peak_anonymous_bytes: list[int]
    cpu_seconds: list[float]
    seconds: float
    warm_seconds: float
    spread_s: list[tuple[float, float]]


@dataclass(frozen=True)
class LoadResult(WayCost):
    """The cost of this package's loading, beside that of `from_pretrained`.

    model_bytes: of the weight files.
    """

    ranks: int
    model_bytes: int
    from_pretrained: WayCost
    at_more_ranks: list[LoadResult] = field(default_factory=list)


@dataclass(frozen=True)
class RankLoad:
    """One rank's figures and CPU seconds of a cold load; the slowest rank's seconds of it and of
    one from the page cache."""

    figures: KernelFigures
    cpu_s: float
    cold_s: float
    warm_s: float


def bench_load(as_json: bool, ranks: int | None = None) -> None:
    """`amid-ds bench load`: measure, then print a table, or JSON alone.

    ranks: 2 and then 4, if it is None; JSON has the second in `at_more_ranks`.
    """
    sizes = LOAD_RANKS if ranks is None else (ranks,)
    with tempfile.TemporaryDirectory() as name:
        results = measure_load(Path(name), LOADED_SIZE, sizes, LOAD_ROUNDS)
    if as_json:
        first, *more = results
        print(json.dumps({**asdict(first), "at_more_ranks": [asdict(result) for result in more]}))
    else:
        _print(results)


def measure_load(folder: Path, size: LlamaSize, rank_counts: Sequence[int], rounds: int
                 ) -> list[LoadResult]:
    """Loads of a model of this size, saved in `folder`, on each number of ranks."""
    save_loaded_models(folder, size)
    loads: dict[tuple[int, str], list[list[RankLoad]]] = {
        (ranks, way): [] for ranks in rank_counts for way in WAYS}
    for _ in range(rounds):
        for (ranks, way), measured in loads.items():
            measured.append(on_local_ranks(ranks, f"bench load, {way}", measure_way, folder, way,
                                           variables={"CUDA_VISIBLE_DEVICES": ""}))
    model_bytes = sum(path.stat().st_size for path in _weight_files(folder / "model"))
    return [LoadResult(**asdict(_cost(loads[ranks, "ours"])), ranks=ranks, model_bytes=model_bytes,
                       from_pretrained=_cost(loads[ranks, "from_pretrained"]))
            for ranks in rank_counts]


def save_loaded_models(folder: Path, size: LlamaSize) -> None:
    """Save a model of `size`, and a tiny one, as "model" and "tiny" in `folder`."""
    for name, model_size in (("tiny", TINY_SIZE), ("model", size)):
        model = new_llama(model_size, LOADED_VOCABULARY).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size=FILE_SIZE)


def measure_way(world: World, folder: Path, way: str) -> RankLoad:
    """This rank's figures of loading `folder`/model. Collective, in fresh processes."""
    import_deepspeed()
    load = WAYS[way]
    load(folder / "tiny", world)
    gc.collect()
    if world.is_main:
        for path in _weight_files(folder / "model"):
            drop_cached(path)
    world.barrier()
    loaded = []
    cpu_s = time.process_time()
    with counting() as figures:
        cold_s = slowest_rank_seconds(
            world, lambda: loaded.append(load(folder / "model", world)))
    cpu_s = time.process_time() - cpu_s
    loaded.clear()
    gc.collect()
    warm_s = slowest_rank_seconds(world, lambda: load(folder / "model", world))
    return RankLoad(figures, cpu_s, cold_s, warm_s)


def _ours(model: Path, world: World) -> nn.Module:
    """As `build_engine` loads a teacher."""
    with freed_memory_given_back():
        opened = open_causal_lm(Teacher(model=str(model)), "auto", _config(model, world), world)
        return opened.read(world)


def _from_pretrained(model: Path, world: World) -> nn.Module:
    """As a script of one's own loads it under ZeRO-3: rank 0 reads, each rank keeps its part."""
    from transformers import AutoModelForCausalLM

    with from_pretrained_into_shards(_config(model, world)):
        return AutoModelForCausalLM.from_pretrained(str(model), dtype="auto")


WAYS: dict[str, Callable[[Path, World], nn.Module]] = {
    "ours": _ours, "from_pretrained": _from_pretrained}


def _config(model: Path, world: World) -> DeepSpeedConfig:
    recipe = Recipe.model_validate({
        "student": {"model": str(model)}, "data": {"train": [{"path": "none"}]},
        "output_dir": str(model), "deepspeed": "zero3.json",
        "train": {"steps": 1, "global_batch_size": world.dp_size}})
    return read_deepspeed_config(recipe, world.dp_size)


def _weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _cost(rounds: Sequence[Sequence[RankLoad]]) -> WayCost:
    """The cost from the loads of every round, by rank."""
    by_rank = [[load.figures for load in loads] for loads in zip(*rounds, strict=True)]
    cold, warm = ([getattr(loads[0], name) for loads in rounds] for name in ("cold_s", "warm_s"))
    return WayCost(
        read_bytes=[max(each.read for each in figures) for figures in by_rank],
        disk_bytes=[max(each.disk for each in figures) for figures in by_rank],
        received_bytes=[max(each.received for each in figures) for figures in by_rank],
        peak_anonymous_bytes=[max(each.peak_anonymous for each in figures) for figures in by_rank],
        cpu_seconds=[min(load.cpu_s for load in loads) for loads in zip(*rounds, strict=True)],
        seconds=statistics.median(cold), warm_seconds=statistics.median(warm),
        spread_s=[(min(seconds), max(seconds)) for seconds in (cold, warm)])


def _print(results: Sequence[LoadResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a model of {results[0].model_bytes / 1e6:,.0f} MB in bf16 into ZeRO-3's "
                        f"shards, {LOAD_ROUNDS} rounds; read, received and held at the peak "
                        "(anonymous): MB of the ranks, least to most")
    for heading in ("ranks", "way", "cold s", "cached s", "CPU s", "read", "received", "peak"):
        table.add_column(heading, justify="left" if heading == "way" else "right",
                         no_wrap=heading == "way")
    for result in results:
        for way, cost in (("amid-ds", result), ("from_pretrained", result.from_pretrained)):
            table.add_row(str(result.ranks), way, f"{cost.seconds:.2f}", f"{cost.warm_seconds:.2f}",
                          f"{max(cost.cpu_seconds):.2f}",
                          *(f"{min(values) / 1e6:,.0f} to {max(values) / 1e6:,.0f}" for values in
                            (cost.read_bytes, cost.received_bytes, cost.peak_anonymous_bytes)))
    console = Console()
    console.print(table)
    goals = Table("ranks", "goal", "measured", "met")
    for result in results:
        for goal, measured, met in goals_of(result):
            goals.add_row(str(result.ranks), goal, measured, "yes" if met else "no")
    console.print(goals)
    if sum(results[0].from_pretrained.disk_bytes) < results[0].model_bytes / 2:
        console.print("the page cache could not be dropped: the cold seconds are cached ones too")


def goals_of(result: LoadResult) -> list[tuple[str, str, bool]]:
    """(The goal, what was measured, whether it is met) of each goal that loading has."""
    share = result.model_bytes / result.ranks
    read, received = max(result.read_bytes), max(result.received_bytes)
    beside = max(result.peak_anonymous_bytes) - share
    of_seconds = result.seconds / result.from_pretrained.seconds
    return [
        (f"read <= {MOST_READ} x a rank's share", f"{read / share:.3f} x",
         read <= MOST_READ * share),
        ("received: agreement alone, < 1 MB", f"{received / 1e6:.2f} MB", received < MOST_RECEIVED),
        (f"peak <= the share + {MOST_BESIDE_SHARE / 1e6:.0f} MB", f"+ {beside / 1e6:.0f} MB",
         beside <= MOST_BESIDE_SHARE),
        (f"seconds <= {MOST_SECONDS} x from_pretrained's", f"{of_seconds:.2f} x",
         of_seconds <= MOST_SECONDS)]
