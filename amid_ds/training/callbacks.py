"""Callbacks: classes of the user's own that a run tells of steps, evaluations and checkpoints."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from amid_ds.errors import InputError, TrainingError, suggest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEvent:
    """Optimizer step `step` (from 1) of the run in the folder `run` is done.

    metrics: by the names of metrics.jsonl, None for what the run lacks; those of times and memory
    are there in logged steps alone.
    """

    run: Path
    step: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class EvaluationEvent:
    """The run was evaluated after `step`: the metrics of eval.jsonl, by the set's name."""

    run: Path
    step: int
    sets: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class CheckpointEvent:
    """The checkpoint of `step` is complete in the folder `checkpoint`, on all ranks."""

    run: Path
    step: int
    checkpoint: Path


Event: TypeAlias = StepEvent | EvaluationEvent | CheckpointEvent


class Callback:
    """What is told of a run's events, on rank 0, which waits until each call returns.

    Define those of the three that you need. What a call raises ends the run on all ranks, after a
    last checkpoint. To end it without an error, create the file STOP in the run's folder.
    """

    def step(self, event: StepEvent) -> None:
        """After every optimizer step, once its line is in metrics.jsonl."""

    def evaluation(self, event: EvaluationEvent) -> None:
        """After every evaluation, once its lines are in eval.jsonl."""

    def checkpoint(self, event: CheckpointEvent) -> None:
        """After every checkpoint, once it is complete."""


# A call of these runs none of their lines.
_DONE_LATER = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
EVENTS = [name for name in vars(Callback) if not name.startswith("_")]


class Callbacks:
    """A run's callbacks on rank 0, told in their order; on every other rank there are none.

    failure: the error of the first call that failed; nothing is told after it.
    """

    def __init__(self, run: Path, told: Sequence[object]) -> None:
        self.run, self.told = run, told
        self.failure: TrainingError | None = None

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Tell of a step and its metrics."""
        self._tell("step", StepEvent(self.run, step, dict(metrics)))

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, float | None]]) -> None:
        """Tell of the metrics of every evaluation set, by its name, after `step`."""
        # A copy: what is decided by them is decided alike on every rank.
        copied = {name: dict(metrics) for name, metrics in sets.items()}
        self._tell("evaluation", EvaluationEvent(self.run, step, copied))

    def checkpoint(self, step: int, checkpoint: Path) -> None:
        """Tell of a checkpoint that is complete."""
        self._tell("checkpoint", CheckpointEvent(self.run, step, checkpoint))

    def _tell(self, name: str, event: Event) -> None:
        for told in self.told:
            if self.failure is not None:
                return
            try:
                getattr(told, name, _nothing)(event)
            # A call of sys.exit would leave the other ranks waiting.
            except (Exception, SystemExit) as error:
                failed = (f"the callback {_name_of(told)} failed in `{name}` of step {event.step}: "
                          f"{type(error).__name__}: {error}")
                logger.error("%s; the run ends", failed, exc_info=error)
                self.failure = TrainingError(f"{failed}\n  what the run has saved is whole: "
                                             "correct the callback and start again")
                self.failure.__cause__ = error

    def check(self) -> None:
        """Raise the TrainingError of a call that failed."""
        if self.failure is not None:
            raise self.failure


def load_callbacks(names: Sequence[str], given: Sequence[object] = ()) -> list[object]:
    """The callbacks `given`, then one of each class of `names`, each `package.module:Class`.

    Their modules are also looked for in the current folder. Raises InputError for what cannot be
    imported or made, and for an object that defines no event.
    """
    return [*map(_checked, given), *(_checked(_load(name)) for name in names)]


def _load(name: str) -> object:
    module_name, _, class_name = name.partition(":")
    # Last: a file here does not take the place of an installed package.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        if not isinstance(made := getattr(module, class_name, None), type):
            classes = [key for key, value in vars(module).items() if isinstance(value, type)]
            raise InputError(f"train.callbacks: {module_name} has no class {class_name}",
                             f"a class of {getattr(module, '__file__', module_name)}",
                             suggest(class_name, classes))
        return made()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        missing = (isinstance(error, ModuleNotFoundError)
                   and f"{module_name}.".startswith(f"{error.name}."))
        remedy = (f"install it, set PYTHONPATH, or start where it lies; this is {os.getcwd()}"
                  if missing else "correct it there, or leave it out of train.callbacks")
        raise InputError(f"the callback {name} cannot be made: {type(error).__name__}: {error}"
                         f"{_raised_in(error)}", "a module that can be imported, and in it a class "
                         "that is made without arguments", remedy) from error


def _raised_in(error: BaseException) -> str:
    """The line of somebody else's file that the error comes from; nothing if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _checked(told: object) -> object:
    """`told`, if it can be told of an event. Raises InputError."""
    expected = f"an object with methods of one argument, one or more of {', '.join(EVENTS)}"
    if isinstance(told, type):
        raise InputError(f"the callback {told.__module__}:{told.__qualname__} is a class", expected,
                         f"make one: {told.__name__}()")
    own = [name for name in EVENTS if hasattr(told, name)
           and getattr(type(told), name, None) is not getattr(Callback, name)]
    if not own:
        raise InputError(f"the callback {_name_of(told)} is told of nothing", expected,
                         "define the method of an event")
    for name in own:
        method = getattr(told, name)
        if not _takes_an_event(method):
            raise InputError(f"`{name}` of the callback {_name_of(told)} does not take an event",
                             f"def {name}(self, event)", "correct its arguments")
    return told


def _takes_an_event(method: object) -> bool:
    """False for what cannot be called with one argument, or whose call alone does nothing."""
    if not callable(method) or any(test(method) for test in _DONE_LATER):
        return False
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    except ValueError:
        # Written in C, without a signature.
        pass
    return True


def _name_of(told: object) -> str:
    return f"{type(told).__module__}:{type(told).__qualname__}"


def _nothing(_event: Event) -> None:
    """What an object does that does not define the event."""
