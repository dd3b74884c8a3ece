"""How often a run reads its prepared rows, and how many steps `train.epochs` are.

Both follow from the counts in the manifest of the prepared data, which every rank of any layout
reads alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amid_ds.config.rate_section import require_room
from amid_ds.config.recipe import Data, Recipe
from amid_ds.data.manifest import PREPARED_FORMAT, read_prepared_manifest
from amid_ds.data.order import samples_per_source
from amid_ds.errors import InputError


def epoch_steps(rows: Sequence[int], global_batch_size: int) -> int:
    """The optimizer steps of one epoch: the whole global batches in the rows of all sources.

    rows: of each source. 11,435 rows in batches of 32 are 357 steps, as where a sampler drops what
    is left of each epoch. Here the order runs on instead: the 11 rows that are left are read first
    in the next 357 steps, so no row is left out, and none is read more often than there are epochs.
    That holds for one source. Several are read by weight: one whose share of the weights is less
    than its share of the rows is read less than once an epoch, one with a greater share again.
    """
    return sum(rows) // global_batch_size


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with `train.steps` in place of `train.epochs`, once its data are prepared.

    The same recipe where it names steps, or its data are not prepared yet. Raises InputError for
    epochs of no step, and where wsd's warm-up and way down have no room.
    """
    train = recipe.train
    rows = None
    if train.epochs is not None:
        rows = _prepared_rows(recipe.data, train.seq_length, recipe.prepared_dir)
    if rows is None:
        return recipe
    assert train.epochs is not None
    steps = train.epochs * epoch_steps(rows, train.global_batch_size)
    if steps == 0:
        raise InputError(f"train.epochs {train.epochs} of {sum(rows):,} rows, which are less than "
                         f"one global batch of {train.global_batch_size:,}",
                         "one batch in an epoch, or more",
                         "lower train.global_batch_size, or name train.steps instead of epochs")
    if train.decay_steps is not None:
        try:
            require_room(steps, train.warmup_steps, train.decay_steps)
        except ValueError as error:
            raise InputError(f"train.epochs {train.epochs} are {steps} steps, and "
                             f"train.decay_steps {train.decay_steps}: {error}",
                             "a warm-up and a way down within the run",
                             "change one of the three") from None
    counted = train.model_copy(update={"steps": steps, "epochs": None})
    return recipe.model_copy(update={"train": counted})


def planned_epochs(recipe: Recipe, samples: int) -> list[float] | None:
    """Passes over each source after `samples` rows of a run, from its prepared data.

    None if the sources are streamed, or not yet prepared in rows of `seq_length`.
    """
    rows = _prepared_rows(recipe.data, recipe.train.seq_length, recipe.prepared_dir)
    if rows is None:
        return None
    counts = samples_per_source(samples, [source.weight for source in recipe.data.train])
    return [count / total for count, total in zip(counts, rows, strict=True)]


def _prepared_rows(data: Data, seq_length: int, folder: Path) -> list[int] | None:
    """The rows of each source; None if they are streamed, or not yet prepared in `folder`."""
    manifest = None if data.streams else read_prepared_manifest(folder)
    if manifest is None or manifest["plan"]["format"] != PREPARED_FORMAT:
        return None
    plan = manifest["plan"]
    if (plan["seq_length"] != seq_length
            or [source["path"] for source in plan["sources"]]
            != [source.path for source in data.train]):
        return None
    return [source["rows"] for source in manifest["sources"]]
