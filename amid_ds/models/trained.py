"""Which of the student's parameters train: all, all but what `student.freeze` names, or adapters.

Decided on the meta model, before a weight is read, so that what names nothing is refused there.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase

from torch import nn

from amid_ds.config.recipe import Student
from amid_ds.errors import InputError
from amid_ds.models.adapters import FirstValues, first_values, inject
from amid_ds.models.weights import MAX_NAMES

logger = logging.getLogger(__name__)


def choose_trained(model: nn.Module, student: Student, seed: int = 0) -> FirstValues:
    """Let what the recipe names of `model` train, in place; with `lora`, put its adapters there.

    Returns what makes the adapters' first values, by `seed`, which they do not have yet. model:
    whole, on the meta device, or in ZeRO-3's shards, not yet split. Raises InputError for patterns
    and targets that name nothing of it.
    """
    if student.lora is not None:
        inject(model, student.lora)
        return first_values(model, seed)
    if student.freeze:
        freeze(model, student.freeze)
    return {}


def trains_in_part(student: Student) -> bool:
    """True where a part of the student is frozen, and so in no checkpoint."""
    return student.lora is not None or bool(student.freeze)


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Freeze the parameters of `model` that a pattern names, in place.

    A pattern is one of fnmatch for whole parts of a name, which stand between dots: `embed_tokens`,
    `layers.0.*`, `model.embed_tokens*` and `*.bias` all name what they look like. A parameter with
    two names, such as a tied head, is frozen by either. Raises InputError where a pattern names
    nothing, and where nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(_names(pattern, name) for name, _ in named):
            shown = ", ".join([name for name, _ in named][:MAX_NAMES])
            raise InputError(f"student.freeze has {pattern!r}, which names no parameter of the "
                             f"model {type(model).__name__}",
                             f"patterns of whole parts of its parameters' names: {shown}, …",
                             "correct the pattern, or leave it out")
    frozen = {id(parameter): name for name, parameter in named
              if any(_names(pattern, name) for pattern in patterns)}
    if len(frozen) == len({id(parameter) for _, parameter in named}):
        raise InputError(f"student.freeze {patterns} names every parameter of the model "
                         f"{type(model).__name__}", "something to train",
                         "name less, or score the model with amid-ds eval")
    for _, parameter in named:
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    # A tied parameter has several names, of which a pattern may have meant one.
    tied = [name for name, parameter in named if id(parameter) in frozen
            and not any(_names(pattern, name) for pattern in patterns)]
    for name in tied:
        logger.info("student.freeze: %s is frozen too, it is one weight with %s", name,
                    frozen[id(dict(named)[name])])


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")
