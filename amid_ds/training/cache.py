"""`amid-ds cache`: the teacher's distributions over the prepared rows, written down once.

The teacher runs alone, over the micro-batches of rows that `train.micro_batch_size` cuts, one to a
data-parallel rank at a time. What it says of a micro-batch depends on nothing else, so the bytes
are the same on any number of ranks, and any number of jobs may write one folder
(data/target_work.py). Rank 0 writes a shard once all its rows are there. A job that is stopped
loses the shards that it had begun, at most a few hundred MB of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from amid_ds.data import Batch, PreparedDataset
from amid_ds.data.batch import require_ids_below
from amid_ds.data.target_shard import (
    EncodedRow,
    SelectedRow,
    encode_targets,
    position_count,
)
from amid_ds.data.target_work import TargetWork
from amid_ds.data.targets import TargetFolder, TargetManifest
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.engine.teacher import OpenTeacher, open_teacher
from amid_ds.errors import TrainingError
from amid_ds.losses.selection import linear_draws, linear_topk, row_uniforms
from amid_ds.monitor.stop_request import StopRequest
from amid_ds.training.cache_plan import (
    CacheArgs,
    CacheTask,
    check_cache,
    load_cache_recipe,
    plan_cache,
    require_cache_room,
)
from amid_ds.training.determinism import deterministic

logger = logging.getLogger(__name__)

CACHE_TIMEOUT_S = 1800.0
# Between two looks at what other jobs still make.
LOOK_S = 2.0


def cache(args: CacheArgs) -> None:
    """`amid-ds cache`, on every rank of any launcher. Raises InputError, Stopped."""
    with init_distributed(CACHE_TIMEOUT_S) as world:
        recipe = world.run_on_main(lambda: load_cache_recipe(args))
        task = world.run_checked(lambda: check_cache(args, recipe, world.size, world.is_main))
        with deterministic(recipe.train.deterministic):
            _cache(task, world)


def _cache(task: CacheTask, world: World) -> None:
    """Write what is missing in the folder."""
    manifest = world.run_on_main(lambda: plan_cache(task))
    work = TargetWork(task.out, manifest)
    if not world.run_on_main(work.start):
        _verify(task, world)
        return
    try:
        world.run_on_main(lambda: require_cache_room(work))
        with StopRequest(None, None, world.is_main) as request:
            _write_missing(task, work, request, world)
        world.run_on_main(work.publish)
    finally:
        work.give_back_all()
    logger.info(f"{task.out}: the teacher's distributions at {manifest.positions:,} positions of "
                f"{manifest.rows:,} rows")


def _verify(task: CacheTask, world: World) -> None:
    """Compare every shard of the complete folder with its checksum, one a rank at a time."""
    folder = world.run_checked(partial(TargetFolder.open, task.out))
    shards = range(folder.manifest.shards)
    for first in tqdm(shards[::world.size], desc="verify", unit="shard", unit_scale=world.size,
                      disable=not world.is_main or None):
        own = first + world.rank
        world.run_checked(partial(folder.require_checksums, shards[own:own + 1]))
    logger.info(f"{task.out} is complete, and its shards are as they were written")


def _write_missing(task: CacheTask, work: TargetWork, request: StopRequest, world: World) -> None:
    rounds = Rounds(work)
    if world.run_on_main(lambda: not work.missing()):
        return
    prepared = PreparedDataset(task.recipe.prepared_dir)
    with _teacher(task, world) as (teacher, world):
        total, done = work.manifest.positions, world.run_on_main(work.finished_positions)
        with tqdm(total=total, initial=done, desc="cache", unit="tok", unit_scale=True,
                  disable=not world.is_main or None) as bar:
            while (units := world.run_on_main(partial(rounds.take, world.dp_size))) is not None:
                bar.update(_one_round(rounds, units, prepared, teacher, world))
                request.obey(world)


@contextlib.contextmanager
def _teacher(task: CacheTask, world: World) -> Iterator[tuple[OpenTeacher, World]]:
    """The teacher, ready to run, and the world in its groups. Collective."""
    world = world.split(task.tensor_parallel, task.shard_over(world))
    with open_teacher(task.recipe, task.deepspeed_config, task.vocab_size, task.is_whole,
                      world) as teacher:
        yield teacher, world


def _one_round(rounds: Rounds, units: Sequence[range], prepared: PreparedDataset,
               teacher: OpenTeacher, world: World) -> int:
    """Select from one micro-batch a data-parallel rank; returns the positions of all of them.

    A rank without one repeats the first: a sharded teacher is gathered by all. No units: other jobs
    have what is left, and nothing is done.
    """
    if not units:
        return 0
    has_own = world.dp_rank < len(units)
    batch = world.run_checked(
        lambda: _batch(prepared, units[world.dp_rank if has_own else 0], teacher.vocab_size))
    own = world.run_checked(
        lambda: _selected_rows(batch.to(world.device), teacher, rounds.manifest))
    rows = world.collect(own if has_own and world.tp_rank == 0 else None)
    return world.run_on_main(partial(rounds.add, units, rows))


def _batch(prepared: PreparedDataset, rows: range, vocab_size: int) -> Batch:
    batch = prepared.batch(list(rows))
    require_ids_below(vocab_size, [batch])
    return batch


def _selected_rows(batch: Batch, teacher: OpenTeacher, manifest: TargetManifest
                   ) -> list[EncodedRow]:
    """What is kept of the batch's rows, as a shard has them. Collective."""
    columns = len(batch.labels[0])
    row_of = batch.valid.cpu().numpy() // columns
    lengths = np.bincount(row_of, minlength=len(batch.rows)).tolist()
    hidden = teacher.hidden_states(batch)
    with teacher.head() as (head, shard):
        if manifest.k is not None:
            top = linear_topk(hidden, head, manifest.k, labels=batch.targets,
                              vocab_size=teacher.vocab_size, shard=shard)
            kept: list[torch.Tensor | None] = [*top[:2], top.label_log_p, top.log_rest, None, None]
        else:
            assert manifest.draws and manifest.exponent and manifest.seed is not None
            uniforms = np.concatenate([
                row_uniforms(manifest.seed, row, length, manifest.draws)
                for row, length in zip(batch.rows, lengths, strict=True)])
            out = linear_draws(hidden, head, torch.from_numpy(uniforms).to(hidden.device),
                               exponent=manifest.exponent, labels=batch.targets,
                               vocab_size=teacher.vocab_size, shard=shard)
            kept = [out.ids, out.log_p, out.label_log_p, None, out.counts, out.log_proposal_sum]
    arrays = [None if column is None else column.cpu().numpy() for column in kept]
    _require_numbers(arrays[2], row_of, batch)
    ends = np.cumsum(lengths)[:-1]
    parts = zip(*([None] * len(lengths) if column is None else np.split(column, ends)
                  for column in arrays), strict=True)
    return [encode_targets(SelectedRow(*part), manifest.layout) for part in parts]


def _require_numbers(label_log_p: np.ndarray | None, row_of: np.ndarray, batch: Batch) -> None:
    """Raise TrainingError, naming the row, where the teacher's logits are no numbers."""
    assert label_log_p is not None
    wrong = np.flatnonzero(np.isnan(label_log_p))
    if len(wrong):
        raise TrainingError(f"{batch.sources[row_of[wrong[0]]]}: the teacher's logits hold NaN or "
                            "infinity\n  its weights are damaged, or too large for its dtype")


@dataclass
class Rounds:
    """On rank 0: which micro-batches are next, and the shards that they make.

    waiting: micro-batches of claimed shards that are still to be done; parts: of each claimed
    shard, the rows so far, by the first row of their micro-batch.
    """

    work: TargetWork
    waiting: deque[tuple[int, range]] = field(default_factory=deque)
    parts: dict[int, dict[int, list[EncodedRow]]] = field(default_factory=dict)

    @property
    def manifest(self) -> TargetManifest:
        return self.work.manifest

    def take(self, count: int) -> list[range] | None:
        """The rows of at most `count` micro-batches; [] while others make all that is left; None:
        every shard is there."""
        while len(self.waiting) < count and self._claim(wait=False):
            pass
        if not self.waiting and not self._claim(wait=True):
            if not self.work.missing():
                return None
            time.sleep(LOOK_S)
        taken = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        return [rows for _, rows in taken]

    def _claim(self, wait: bool) -> bool:
        shard = self.work.claim(wait)
        if shard is None:
            return False
        rows, size = self.manifest.shard_range(shard), self.manifest.micro_batch_size
        self.waiting += [(shard, rows[i:i + size]) for i in range(0, len(rows), size)]
        self.parts[shard] = {}
        return True

    def add(self, units: Sequence[range], rows: Sequence[list[EncodedRow] | None] | None) -> int:
        """Take what the ranks have selected, by rank, and write the shards that are complete."""
        assert rows is not None
        positions = 0
        for unit, selected in zip(units, [own for own in rows if own is not None], strict=True):
            shard = unit[0] // self.manifest.shard_rows
            part = self.parts[shard]
            part[unit[0]] = selected
            positions += sum(position_count(row) for row in selected)
            whole = self.manifest.shard_range(shard)
            if sum(map(len, part.values())) == len(whole):
                self.work.finish(shard, [row for first in sorted(part) for row in part[first]])
                del self.parts[shard]
        return positions
