"""Many short runs of `amid-ds train` in one start of ranks, in one process group."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from amid_ds.distributed.world import World
from amid_ds.errors import InputError, RankError
from support.ranks import Ranks, world_main

# Seconds for one run, before its ranks are killed.
LIMIT = 90.0
BEGIN = "\n=== a run begins\n"
END = "\n=== it has ended: "


@dataclass(frozen=True)
class Outcome:
    """How a run ended: refused is an InputError that all ranks have, broken anything else."""

    kind: Literal["done", "refused", "broken"]
    # What was found, or the error and its message; nothing of a run that is done.
    words: str = ""
    # What rank 0 has logged; of one that is broken, all ranks.
    log: str = ""


def train_many(recipes: Sequence[Path], size: int = 2) -> list[Outcome]:
    """Run each recipe in turn, in one start of `size` ranks for as long as none is broken.

    The second time that one is in the list its run goes on from its first checkpoint: the later is
    removed, and what the run had left, its metrics and its model, is in `before(run)`.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(recipes):
        outcomes += _one_start(recipes[len(outcomes):], size)
    return outcomes


def before(run: Path) -> Path:
    """What a run had left before it was begun again."""
    return run.with_name(f"{run.name}.before")


def _one_start(recipes: Sequence[Path], size: int) -> list[Outcome]:
    """The outcomes up to the first that is broken, which ends the ranks."""
    ranks = Ranks(size, *recipes, target=functools.partial(world_main, _train_each))
    ended, since = 0, time.monotonic()
    # A rank that has died, or hangs, ends the others.
    while (all(process.is_alive() for process in ranks.processes)
           and time.monotonic() - since < LIMIT):
        time.sleep(0.05)
        if ranks.log(0).exists() and (now := ranks.output().count(END)) != ended:
            ended, since = now, time.monotonic()
    ranks.wait(timeout=5)
    logs = [ranks.output(rank).split(BEGIN)[1:] for rank in range(size)]
    outcomes: list[Outcome] = []
    for number in range(len(recipes)):
        of_run = [log[number] if number < len(log) else "" for log in logs]
        ends = [json.loads(match[1]) for log in of_run
                if (match := re.search(rf"{re.escape(END)}(.*)\n", log))]
        broken = [end for end in ends if end["kind"] == "broken"]
        if broken or len(ends) < size:
            # Not that of a rank that only heard of another's.
            cause = min(broken, key=lambda end: end["heard"],
                        default={"words": f"it hangs or was killed, after: {of_run[0][-200:]}"})
            return [*outcomes, Outcome("broken", cause["words"], "\n".join(of_run))]
        outcomes.append(Outcome(ends[0]["kind"], ends[0]["words"], of_run[0]))
    return outcomes


def _train_each(world: World, *recipes: str) -> None:
    """On one rank: train by each recipe, and write how it ended, as JSON behind END."""
    from amid_ds.training import train as module
    from amid_ds.training import trainer

    # DeepSpeed keeps the groups of its first engine: all runs share one process group.
    module.init_distributed = lambda timeout: contextlib.nullcontext(world)
    # For the MFU alone, and a fifth of the time of a tiny run.
    trainer.planned_flops = lambda *arguments: ({}, None)
    for recipe in recipes:
        os.write(1, BEGIN.encode())
        end: dict[str, object] = {"kind": "done", "words": "", "heard": False}
        try:
            world.run_on_main(lambda recipe=recipe: _forget_last_step(recipe))
            module.run_training(recipe, [])
        except InputError as error:
            end |= {"kind": "refused", "words": error.found}
        except Exception as error:
            heard = isinstance(error, RankError) or "onnection" in str(error)
            end |= {"kind": "broken", "words": f"{type(error).__name__}: {error}", "heard": heard}
            raise
        finally:
            os.write(1, f"{END}{json.dumps(end)}\n".encode())


def _forget_last_step(recipe: str) -> None:
    """Leave the recipe's run as it was after its first checkpoint, if it has been run."""
    run = Path(yaml.safe_load(Path(recipe).read_text())["output_dir"])
    if not run.exists():
        return
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    if len(checkpoints) < 2:
        raise InputError(f"{run} has {len(checkpoints)} checkpoint(s)", "two", "train it first")
    shutil.rmtree(checkpoints[-1])
    before(run).mkdir()
    shutil.copy(run / "metrics.jsonl", before(run))
    (run / "model").rename(before(run) / "model")
