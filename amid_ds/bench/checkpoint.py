"""What a save costs the training: how long it stands still, beside a plain copy in memory and DeepSpeed's own save.

One engine, one run: a random Llama of about 50 M parameters under ZeRO-3 in fp32, moments and all, on whatever ranks
the launcher gives (one, when the command is run by itself).
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amid_ds.bench.measure import slowest
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
from amid_ds.training.rollout import StepBatch
from amid_ds.training.step import Stepper

HIDDEN, LAYERS, VOCABULARY = 512, 10, 16000
ROUNDS = 5


@dataclass(frozen=True)
class CheckpointRow:
    """One rank's shards; seconds are medians over the rounds, of the slowest rank."""

    ranks: int
    megabytes_per_rank: float
    copy_s: float                    # the shards copied once in host memory
    standing_still_s: float          # what training waits for: staging, and the commit at a later step
    background_write_s: float
    megabytes_per_s: float           # of the background write
    deepspeed_save_s: float          # engine.save_checkpoint of the same engine, which training waits for whole
    verify_and_load_s: float         # at a resume, until the engine could take its first step
    agreement_s: float               # the small collective that every step makes


def bench_checkpoint(as_json: bool) -> None:
    """`amid-ds bench checkpoint`."""
    with init_distributed(600) as world:
        row = _measure(world)
        if world.is_main and as_json:
            print(json.dumps(asdict(row)))
        elif world.is_main:
            _print(row)


def _measure(world: World) -> CheckpointRow:
    folder = Path(world.run_on_main(tempfile.mkdtemp))
    try:
        engine = _engine(folder, world)
        saver = Saver(engine, folder / "ours", CheckpointPolicy(), {})
        copy, still, write, plain = [], [], [], []
        for step in range(1, ROUNDS + 1):
            staged = engine.stage_checkpoint()
            size = sum(tensor.nbytes for tensor in _tensors(staged))
            copy.append(slowest(world, lambda staged=staged: [t.clone() for t in _tensors(staged)]))   # type: ignore[misc]
            del staged
            began = time.perf_counter()
            started = slowest(world, lambda step=step: saver.start(TrainState(step)))   # type: ignore[misc]
            saver.join()
            write.append(max(world.gather(time.perf_counter() - began)) - started)
            still.append(started + slowest(world, saver.finish))
            plain.append(slowest(world, lambda step=step: engine.save_checkpoint(   # type: ignore[misc]
                folder / "plain", f"step{step}")))
        load = slowest(world, lambda: _resume(engine, folder / "ours"))
        agreement = slowest(world, lambda: [world.sum([1.0, 0.0, 0.0]) for _ in range(200)]) / 200
        seconds = statistics.median(write)
        return CheckpointRow(world.size, size / 1e6, statistics.median(copy), statistics.median(still), seconds,
                             size / 1e6 / seconds, statistics.median(plain), load, agreement)
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def _engine(folder: Path, world: World) -> Engine:
    """An engine that has taken one step, so that the optimizer has its moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> None:
        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
                             num_attention_heads=8, vocab_size=VOCABULARY, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder / "model")

    world.run_on_main(make)
    recipe = Recipe.model_validate({
        "student": {"model": str(folder / "model")}, "data": {"train": [{"path": "none"}]}, "output_dir": str(folder),
        "train": {"steps": 1, "global_batch_size": world.size}, "deepspeed": "zero3_fp32.json"})
    config = read_deepspeed_config(recipe, world.dp_size)
    engine = build_engine(recipe, config, VOCABULARY, world)
    ids = torch.randint(VOCABULARY, (1, 64))
    Stepper(recipe, engine, TrainState()).train_step(StepBatch([Batch(ids, ids, None, 0, [], [])], 64 * world.size, 0.0))
    return engine


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def _resume(engine: Engine, folder: Path) -> None:
    checkpoint = find_latest_valid(folder, engine.world).checkpoint
    assert checkpoint is not None
    load_checkpoint(engine, checkpoint, None)


def _print(row: CheckpointRow) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a save of {row.megabytes_per_rank:,.0f} MB per rank, {row.ranks} rank(s), {ROUNDS} rounds")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    for what, seconds in (("the shards copied once in host memory", row.copy_s),
                          ("training stands still (staging + commit)", row.standing_still_s),
                          (f"written in the background ({row.megabytes_per_s:,.0f} MB/s)", row.background_write_s),
                          ("DeepSpeed's plain save, all of it standing still", row.deepspeed_save_s),
                          ("resume: verify and load", row.verify_and_load_s),
                          ("the agreement of every step", row.agreement_s)):
        table.add_row(what, f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.2f}")
    table.add_row("standing still ÷ copy", f"{row.standing_still_s / row.copy_s:.2f}")
    table.add_row("standing still ÷ DeepSpeed's save", f"{row.standing_still_s / row.deepspeed_save_s:.2f}")
    Console().print(table)
