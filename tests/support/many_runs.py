"""Many short runs of `amid-ds train` in one start of ranks, in one process group."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from amid_ds.errors import InputError, RankError
from support.ranks import Ranks, _become

Kind = Literal["done", "refused", "broken"]
# Seconds for one run, before its ranks are killed.
LIMIT = 90.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: refused is an InputError that all ranks have, broken anything else."""

    kind: Kind
    # What was found, or the error and its message; nothing of a run that is done.
    words: str = ""
    # What rank 0 has logged; of one that is broken, all ranks.
    log: str = ""


def train_many(recipes: Sequence[Path], ranks: int = 2) -> list[Outcome]:
    """Run each recipe in turn, in one start of ranks for as long as none is broken.

    The second time that one is in the list its run goes on from its first checkpoint: the later is
    removed, and what the run had left, its metrics and its model, is in `before(run)`.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(recipes):
        outcomes += _one_start(recipes[len(outcomes):], ranks)
    return outcomes


def _one_start(recipes: Sequence[Path], size: int) -> list[Outcome]:
    """The outcomes up to the first that is broken, which ends the ranks."""
    ranks = Ranks(size, *recipes, target=_train_each)
    said = [Path(f"{ranks.log(rank)}.ends") for rank in range(size)]
    known, since = -1, time.monotonic()
    while any(process.is_alive() for process in ranks.processes):
        now = len(_ends(said[0]))
        if now != known:
            known, since = now, time.monotonic()
        # A rank that has died, or hangs, ends the others.
        late = time.monotonic() - since > LIMIT
        if late or any(process.exitcode not in (None, 0) for process in ranks.processes):
            time.sleep(0.5)
            break
        time.sleep(0.02)
    ranks.wait(timeout=0.5)
    ends = [_ends(path) for path in said]
    logs = [ranks.output(rank).split(_MARK)[1:] for rank in range(size)]
    outcomes = []
    for number in range(len(recipes)):
        own = [rank_ends[number] for rank_ends in ends if number < len(rank_ends)]
        broken = [end for end in own if end["kind"] == "broken"]
        log = "\n".join(each[number] for each in logs if number < len(each))
        if broken or len(own) < size:
            # The first cause is that of a rank that did not only hear of another's.
            cause = min(broken, key=lambda end: end["heard"], default={
                "words": f"hangs, or a rank was killed: {log[-300:]}"})
            return [*outcomes, Outcome("broken", cause["words"], log)]
        outcomes.append(Outcome(own[0]["kind"], own[0]["words"], logs[0][number]))
    return outcomes


def _ends(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


_MARK = "\n=== the next run\n"


def _train_each(argv: list[str], variables: dict[str, str], log: str) -> None:
    """One rank: train by each recipe of argv; a line of JSON in `log`.ends for each."""
    os.setsid()
    _become(variables, log)
    from amid_ds.distributed.rendezvous import init_distributed
    from amid_ds.training import train as module

    with init_distributed(60) as world:
        # DeepSpeed keeps the groups of its first engine: all runs share one process group.
        module.init_distributed = lambda timeout: contextlib.nullcontext(world)
        for recipe in argv:
            os.write(1, _MARK.encode())
            end: dict[str, object] = {"kind": "done", "words": "", "heard": False}
            try:
                world.run_on_main(lambda recipe=recipe: _forget_last_step(recipe))
                module.train(recipe, [])
            except InputError as error:
                end |= {"kind": "refused", "words": error.found}
            except BaseException as error:
                os.write(2, traceback.format_exc().encode())
                end |= {"kind": "broken", "words": f"{type(error).__name__}: {error}",
                        "heard": "onnection" in str(error) or isinstance(error, RankError)}
            with Path(f"{log}.ends").open("a") as file:
                file.write(json.dumps(end) + "\n")
            if end["kind"] == "broken":
                os._exit(1)
    os._exit(0)


def before(run: Path) -> Path:
    """What a run had left before it was begun again."""
    return run.with_name(f"{run.name}.before")


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
