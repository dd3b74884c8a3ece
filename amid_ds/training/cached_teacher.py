"""A teacher of which there is a cache: whether it is of this run, and whether its loss can use it.

A cache is as much a part of what a run learns from as its data are. So it is checked before
anything is loaded, all that is wrong with it in one message, and again once the data are prepared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from amid_ds.config.recipe import Recipe
from amid_ds.data import TargetFolder, stack_targets, tokenizer_fingerprint, vocabulary_size
from amid_ds.data.manifest import read_prepared_manifest
from amid_ds.errors import InputError
from amid_ds.losses import SparseTargets
from amid_ds.losses.sparse import Rest
from amid_ds.losses.sparse_checks import check_targets
from amid_ds.models.distiller import StepObjective
from amid_ds.run.provenance import prepared_hash
from amid_ds.training.objective import every_objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_cache(recipe: Recipe) -> TargetFolder | None:
    """The recipe's cache; None where its teacher is none. Raises InputError for no whole one."""
    teacher = recipe.cached_teacher
    return None if teacher is None else TargetFolder.open(Path(teacher.cached))


def open_targets(recipe: Recipe) -> tuple[TargetFolder, Rest | None] | None:
    """The recipe's cache, with its `teacher.rest`, as `PreparedLoader` has them."""
    teacher, cache = recipe.cached_teacher, open_cache(recipe)
    return None if teacher is None or cache is None else (cache, teacher.rest)


def check_cached_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase,
                         shards: bool = True) -> None:
    """Raise InputError, with all that is wrong, unless the recipe can learn from its cache.

    shards: look at the size of every shard too; of many ranks one does it for all. None is read to
    its end: each row has a checksum. Where the data are not prepared yet, `require_cache_of_data`
    compares them later.
    """
    cache = open_cache(recipe)
    if cache is None:
        return
    if shards:
        cache.require_sizes()
    problems = [*_of_another_tokenizer(cache, tokenizer), *_of_other_data(cache, recipe),
                *_losses_refused(cache, recipe)]
    if problems:
        raise InputError(
            f"the run cannot learn from the cache {cache.path}:\n    - "
            + "\n    - ".join(problems),
            "a cache of these rows, and losses that what it keeps is enough for",
            "write one with `amid-ds cache`, name another in teacher.cached, change the loss, or "
            "name the teacher itself as teacher.model")


def require_cache_of_data(recipe: Recipe) -> None:
    """Raise InputError unless the recipe's cache, if it has one, is of its prepared data."""
    cache = open_cache(recipe)
    problems = [] if cache is None else _of_other_data(cache, recipe)
    if cache is not None and problems:
        raise InputError(f"the cache {cache.path}: {problems[0]}",
                         "a cache of the rows that are trained on",
                         "write one with `amid-ds cache`, or name another in teacher.cached")


def _of_another_tokenizer(cache: TargetFolder, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found, size = cache.manifest, vocabulary_size(tokenizer)
    if found.tokenizer_sha256 == tokenizer_fingerprint(tokenizer):
        return []
    sizes = f": it has {found.vocab_size} ids, the student's {size}" * (found.vocab_size != size)
    return [f"the teacher {found.teacher} that it is of has another tokenizer than the "
            f"student{sizes}"]


def _of_other_data(cache: TargetFolder, recipe: Recipe) -> list[str]:
    manifest = read_prepared_manifest(recipe.prepared_dir)
    if manifest is None or cache.manifest.data_sha256 == prepared_hash(recipe.prepared_dir):
        return []
    rows = sum(source["rows"] for source in manifest["sources"])
    return [f"it is of other data: of {cache.manifest.rows} rows, and {recipe.prepared_dir} has "
            f"{rows}" + ", as many but not the same" * (rows == cache.manifest.rows)]


def _losses_refused(cache: TargetFolder, recipe: Recipe) -> list[str]:
    """What a loss of the recipe asks that the cache does not tell, each once, by its place."""
    teacher = recipe.cached_teacher
    assert teacher is not None
    row = cache.row(0)
    try:
        kept = stack_targets([row], teacher.rest)
    except InputError as error:
        return [f"`teacher.rest`: {error.found}; {error.remedy}"]
    problems: dict[str, None] = {}
    for objectives in every_objective(recipe):
        losses = {f"data.train.{number}.loss" if number in recipe.source_losses else "loss": each
                  for number, each in objectives.by_source.items()} or {"loss": objectives.base}
        # In a step that looks at the teacher at all, every loss is computed from what is kept.
        if any(each.kd_weight or each.amid.token_weight is not None for each in losses.values()):
            problems |= {f"`{place}`: {problem}": None for place, each in losses.items()
                         for problem in _refused(each, kept, cache.manifest.vocab_size)}
    return list(problems)


def _refused(objective: StepObjective, kept: SparseTargets, vocabulary: int) -> list[str]:
    """Why the loss cannot be had of such targets; [] where it can."""
    try:
        check_targets(kept, objective.amid, torch.ones(len(kept)), vocabulary,
                      objective.statistics, by_value=False)
    except InputError as error:
        return [f"{error.found}, and it takes {error.expected}; {error.remedy}"]
    return []
