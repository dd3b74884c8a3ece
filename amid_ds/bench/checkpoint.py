"""`bench checkpoint`: the time that a save costs the training.

Beside it a plain copy in memory and DeepSpeed's own save. One engine, one run: a random Llama of
about 50 M parameters under ZeRO-3 in fp32, moments included, on the launcher's ranks (one, if the
command is run by itself).
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from amid_ds.bench.measure import no_progress, slowest_rank_seconds
from amid_ds.checkpoint.manifest import find_latest_valid
from amid_ds.checkpoint.reshard import load_checkpoint
from amid_ds.checkpoint.saver import Saver
from amid_ds.checkpoint.state import TrainState
from amid_ds.config.recipe import CheckpointPolicy, Recipe
from amid_ds.data import Batch
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine.build import build_engine
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.engine.engine import Engine
from amid_ds.engine.staging import tensors_in
from amid_ds.experiments.small_models import LlamaSize, new_llama
from amid_ds.training.rollout import StepBatch
from amid_ds.training.step import Stepper

SIZE = LlamaSize.of_width(512, layers=10)
VOCAB_SIZE = 16000
SAVE_ROUNDS = 5
AGREEMENTS = 200
TIMEOUT_S = 600


@dataclass(frozen=True)
class CheckpointRow:
    """One rank's shards; seconds are medians over the rounds, of the slowest rank.

    copy_s: the shards copied once in host memory. standing_still_s: what training waits for, i.e.
    staging, and the commit at a later step. megabytes_per_s: of the background write.
    deepspeed_save_s: `save_checkpoint` of the same engine, all of which training waits for.
    verify_and_load_s: at a resume, until the engine can take its first step. agreement_s: the
    small collective that every step makes.
    """

    ranks: int
    megabytes_per_rank: float
    copy_s: float
    standing_still_s: float
    background_write_s: float
    megabytes_per_s: float
    deepspeed_save_s: float
    verify_and_load_s: float
    agreement_s: float


def bench_checkpoint(as_json: bool) -> None:
    """`amid-ds bench checkpoint`: print the row as a table, or as JSON."""
    with init_distributed(TIMEOUT_S) as world, no_progress():
        row = _measure(world)
        if world.is_main and as_json:
            print(json.dumps(asdict(row)))
        elif world.is_main:
            _print(row)


def _measure(world: World) -> CheckpointRow:
    folder = Path(world.run_on_main(tempfile.mkdtemp))
    try:
        return _measure_in(folder, world)
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def _measure_in(folder: Path, world: World) -> CheckpointRow:
    engine = _engine_after_one_step(folder, world)
    saver = Saver(engine, folder / "ours", CheckpointPolicy(), identity={})
    copies, waits, writes, deepspeed_saves = [], [], [], []
    for step in range(1, SAVE_ROUNDS + 1):
        copy_s, size = _copy_seconds(engine, world)
        copies.append(copy_s)
        wait_s, write_s = _save_seconds(saver, step, world)
        waits.append(wait_s)
        writes.append(write_s)
        deepspeed_saves.append(slowest_rank_seconds(
            world, partial(engine.save_checkpoint, folder / "plain", f"step{step}")))
    load_s = slowest_rank_seconds(world, lambda: _resume(engine, folder / "ours"))
    agreements_s = slowest_rank_seconds(
        world, lambda: [world.sum([1.0, 0.0, 0.0]) for _ in range(AGREEMENTS)])
    write_s = statistics.median(writes)
    return CheckpointRow(
        ranks=world.size, megabytes_per_rank=size / 1e6, copy_s=statistics.median(copies),
        standing_still_s=statistics.median(waits), background_write_s=write_s,
        megabytes_per_s=size / 1e6 / write_s, deepspeed_save_s=statistics.median(deepspeed_saves),
        verify_and_load_s=load_s, agreement_s=agreements_s / AGREEMENTS)


def _copy_seconds(engine: Engine, world: World) -> tuple[float, int]:
    """Seconds to copy this rank's shards in memory, and their bytes."""
    shards = list(tensors_in(engine.stage_checkpoint()))
    seconds = slowest_rank_seconds(world, lambda: [shard.clone() for shard in shards])
    return seconds, sum(shard.nbytes for shard in shards)


def _save_seconds(saver: Saver, step: int, world: World) -> tuple[float, float]:
    """Seconds of one save that training waits for, and those of the write in the background."""
    began = time.perf_counter()
    start_s = slowest_rank_seconds(world, lambda: saver.start(TrainState(step)))
    saver.join()
    write_s = world.most(time.perf_counter() - began) - start_s
    waited_s = start_s + slowest_rank_seconds(world, saver.finish)
    # Old checkpoints are removed beside the training, not beside the next measurement.
    saver.close()
    return waited_s, write_s


def _engine_after_one_step(folder: Path, world: World) -> Engine:
    """An engine that has taken one step, so that the optimizer has its moments."""
    world.run_on_main(lambda: new_llama(SIZE, VOCAB_SIZE).save_pretrained(folder / "model"))
    recipe = Recipe.model_validate({
        "student": {"model": str(folder / "model")},
        "data": {"train": [{"path": "none"}]},
        "output_dir": str(folder),
        "train": {"steps": 1, "global_batch_size": world.size},
        "deepspeed": "zero3_fp32.json"})
    config = read_deepspeed_config(recipe, world.dp_size)
    engine = build_engine(recipe, config, VOCAB_SIZE, world)
    ids = torch.randint(VOCAB_SIZE, (1, 64))
    batch = StepBatch([Batch(ids, ids, None, 0, [], [])], tokens=64 * world.size,
                      sequences=world.size, padding=0.0)
    Stepper(recipe, engine, TrainState()).train_step(batch)
    return engine


def _resume(engine: Engine, folder: Path) -> None:
    checkpoint = find_latest_valid(folder, engine.world).checkpoint
    assert checkpoint is not None
    load_checkpoint(engine, checkpoint, consolidated=None)


def _print(row: CheckpointRow) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a save of {row.megabytes_per_rank:,.0f} MB per rank, "
                        f"{row.ranks} rank(s), {SAVE_ROUNDS} rounds")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    background = f"written in the background ({row.megabytes_per_s:,.0f} MB/s)"
    for what, seconds in (("the shards copied once in host memory", row.copy_s),
                          ("training waits (staging + commit)", row.standing_still_s),
                          (background, row.background_write_s),
                          ("DeepSpeed's plain save, training waits", row.deepspeed_save_s),
                          ("resume: verify and load", row.verify_and_load_s),
                          ("the small collective of every step", row.agreement_s)):
        table.add_row(what, f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.2f}")
    table.add_row("training waits ÷ copy", f"{row.standing_still_s / row.copy_s:.2f}")
    table.add_row("training waits ÷ DeepSpeed's save",
                  f"{row.standing_still_s / row.deepspeed_save_s:.2f}")
    Console().print(table)
