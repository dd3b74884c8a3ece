"""The data of each step on this rank, and the one agreement of all ranks before the step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from amid_ds.checkpoint.state import TrainState
from amid_ds.data import Batch, PreparedLoader, StepLoader, StreamLoader, stream_summary
from amid_ds.data.batch import require_ids_below
from amid_ds.data.grown import GrownVocabulary
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.monitor.step_timer import phase
from amid_ds.training.cached_teacher import open_targets
from amid_ds.training.job import Job


class FetchedStep(NamedTuple):
    """One step's micro-batches on this rank, or the error because of which it is not made.

    window: those of the sources; auxiliary: of the auxiliary corpus. waited: seconds for both.
    """

    window: list[Batch]
    auxiliary: list[Batch]
    waited: float
    error: InputError | TrainingError | None = None


class AuxiliaryBatch(NamedTuple):
    """A step's micro-batches of the auxiliary corpus on this rank.

    tokens: its valid ones in the global batch.
    """

    window: list[Batch]
    tokens: float


class StepInfo(NamedTuple):
    """A step's facts that all ranks share at its beginning.

    tokens, auxiliary_tokens: valid ones in the global batch. sequences: those that have a valid
    token. padding: the share of the global batch's positions that hold nothing. waited: seconds for
    data, mean over ranks. stop: a rank was asked to stop. writing: a rank still writes a
    checkpoint.
    """

    tokens: float
    auxiliary_tokens: float
    sequences: float
    padding: float
    waited: float
    stop: bool
    writing: bool


def open_step_data(job: Job, state: TrainState,
                   world: World) -> tuple[StepLoader, PreparedLoader | None]:
    """The rows to train on and, where the recipe has one, the auxiliary corpus.

    Every step has as many rows of the one as of the other.
    """
    train, data = job.recipe.train, job.recipe.data
    layout: Any = {"global_batch_size": train.global_batch_size,
                   "micro_batch_size": train.micro_batch_size,
                   "dp_rank": world.dp_rank, "dp_size": world.dp_size, "workers": data.workers}
    prepared = job.recipe.prepared_dir
    steps: StepLoader
    if data.streams:
        steps = StreamLoader(data, train.seq_length, job.tokenizer, state.streams, **layout)
    else:
        weights = [source.weight for source in data.train]
        steps = PreparedLoader(prepared, seed=train.seed, weights=weights,
                               targets=open_targets(job.recipe), **layout)
    if data.auxiliary is None:
        return steps, None
    return steps, PreparedLoader(prepared / "auxiliary", seed=train.seed, **layout)


def fetch_steps(data: StepLoader, auxiliary: PreparedLoader | None, vocab_size: int, start: int,
                stop: int, grown: GrownVocabulary | None = None) -> Iterator[FetchedStep]:
    """Yield each step's data, whose labels are ids below `vocab_size`.

    grown: what new tokens are to the teacher, for which the sources' rows are then written too.

    On InputError yield one last item that carries it, so that `reduce_step_info` can raise it on
    every rank.
    """
    both: list[StepLoader] = [data] if auxiliary is None else [data, auxiliary]
    windows = zip(*(each.windows(start, stop) for each in both), strict=True)
    while True:
        waited_before = sum(each.waited for each in both)
        try:
            with phase("data"):
                window = next(windows, None)
                require_ids_below(vocab_size, itertools.chain(*(window or [])))
                if grown is not None and window is not None:
                    window = grown.with_teachers_rows(window[0]), *window[1:]
        except InputError as error:
            yield FetchedStep([], [], 0.0, error)
            return
        if window is None:
            return
        waited = sum(each.waited for each in both) - waited_before
        yield FetchedStep(window[0], window[1] if auxiliary is not None else [], waited)


def reduce_step_info(fetched: FetchedStep, stop: bool, writing: bool, world: World) -> StepInfo:
    """The one agreement of every step: one collective.

    Raises, on every rank, the error that any rank has.
    """
    valid = [sum(len(batch.valid) for batch in window)
             for window in (fetched.window, fetched.auxiliary)]
    sequences = sum(batch.sequence_count for batch in fetched.window)
    batches = [*fetched.window, *fetched.auxiliary]
    padding, positions = (sum(batch.padding for batch in batches),
                          sum(batch.input_ids.numel() for batch in batches))
    (tokens, auxiliary_tokens, all_sequences, padding_sum, positions_sum, waited, stopping,
     still_writing, broken) = world.sum([*valid, sequences, padding, positions, fetched.waited,
                                         stop, writing, fetched.error is not None])
    if broken:
        world.run_checked(lambda: _raise(fetched.error))
    return StepInfo(tokens, auxiliary_tokens, all_sequences, padding_sum / positions_sum,
                    waited / world.dp_size, stopping > 0, still_writing > 0)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def describe_epochs(job: Job, data: StepLoader, state: TrainState, step: int) -> str:
    """The number of times that each source is read by the end of `step`.

    Of streamed sources: that it has been read so far, and what was left out.
    """
    if isinstance(data, PreparedLoader):
        epochs = zip(job.recipe.data.train, data.epochs(step), strict=True)
        return ", ".join(f"{source.path} {count:.3g}"
                         + (" (its rows come again)" if count > 1 else "")
                         for source, count in epochs)
    return ("unknown, the sources are streamed; so far "
            f"{stream_summary(job.recipe.data, state.streams)}")
