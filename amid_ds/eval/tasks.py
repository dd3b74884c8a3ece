"""Benchmarks of a model by lm-evaluation-harness, on one process or under a launcher.

The harness chooses the documents, builds prompts and computes metrics, on every rank alike. The
ranks share what costs time, the passes through the model: each answers the requests of its own
documents, and all of them hear every answer. So the numbers do not depend on the ranks.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from amid_ds.config.recipe import Dtype
from amid_ds.data import load_tokenizer
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.eval.cached import check_eval_data
from amid_ds.eval.evaluate import (
    Scores,
    TaskScores,
    agreed_on,
    evaluate,
    load_model,
    load_models,
)
from amid_ds.eval.protocol import EvalArgs
from amid_ds.models.kernel_packages import is_installed
from amid_ds.run.log import finite

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Requests that a rank answers at once.
BATCH_SIZE = 16
# The harness's own defaults, so that its numbers are ours.
SEEDS = {"random": 0, "torch": 1234, "fewshot": 1234}
BOOTSTRAP_ROUNDS = 100_000
YAML_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskArgs:
    """What is asked of the harness.

    tasks: names of its tasks, groups and tags, or paths of YAML files that define one. limit: the
    first documents of each task alone; None: all. apply_chat_template: prompts are messages in the
    tokenizer's chat template, examples turns of the conversation.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not all(name.strip() for name in self.tasks):
            raise InputError(f"--tasks {','.join(self.tasks)}", "names with commas between them",
                             "e.g. --tasks arc_easy,hellaswag")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}", "documents of a task, from 1 on",
                             "correct --limit, or leave it out for all")


def check_tasks(names: Sequence[str]) -> None:
    """Raise InputError if lm-evaluation-harness is not installed, or does not know one of these.

    Reads no data. Of names, not of paths alone, it takes seconds: the harness reads all its YAML.
    """
    _known_tasks(names)


def _known_tasks(names: Sequence[str]) -> Any:
    """The harness's index of tasks, in which all of `names` are."""
    if not is_installed("lm_eval"):
        raise InputError("the Python package lm_eval is not installed",
                         "lm-evaluation-harness, for benchmarks",
                         "pip install 'amid-ds[tasks]', or leave the tasks out")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [Path(name) for name in names if name.endswith(YAML_ENDINGS)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"the task {path} is not there", "a YAML file that defines a task",
                             "check the path")
        # The harness opens those by their name alone.
        if re.search(r"^group:", path.read_text(encoding="utf-8", errors="replace"), re.M):
            raise InputError(f"{path} defines a group of tasks", "a YAML file that defines a task",
                             "name the files of its tasks")
    manager = TaskManager(include_defaults=len(paths) < len(names))
    for name in names:
        if not name.endswith(YAML_ENDINGS) and name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise InputError(f"the task {name!r}, which lm-evaluation-harness does not have",
                             "one of its tasks, or the path of a YAML file that defines one",
                             f"did you mean {', '.join(near)}?" if near else
                             "`lm_eval ls tasks` prints all of them")
    return manager


def open_tasks(args: TaskArgs) -> Any:
    """The tasks with their data, as the harness evaluates them. Raises InputError."""
    manager = _known_tasks(args.tasks)
    named = ", ".join(args.tasks)
    try:
        # A task's Python may print.
        with contextlib.redirect_stdout(sys.stderr):
            opened = manager.load(list(args.tasks))
    except Exception as error:
        # Whatever a YAML file and its Python, a package that it wants, or the hub answers.
        raise InputError(f"the tasks {named} cannot be loaded: {type(error).__name__}: {error}",
                         "tasks whose data are on this disk or can be fetched, and whose packages "
                         "are installed",
                         "load them once where there is a network; HF_HUB_OFFLINE=1 then looks on "
                         "the disk alone") from None
    for name, task in opened["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"the task {name} runs code that the model writes",
                             "a task that runs none",
                             "leave it out, or run `lm_eval` by itself where that is safe")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    return opened


def score_tasks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, opened: Any, args: TaskArgs,
                world: World | None = None) -> TaskScores:
    """The scores of `model` on tasks that `open_tasks` has opened, on every rank.

    Collective: one of objects for each kind of request; world None: this process alone. Raises
    InputError where the model is none for a task.
    """
    scores: TaskScores = agreed_on(world, lambda: _evaluate(model, tokenizer, opened, args, world))
    # Standard errors that are drawn are rank 0's alone.
    return scores if world is None else world.broadcast(scores)


def _evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, opened: Any, args: TaskArgs,
              world: World | None) -> TaskScores:
    from lm_eval.evaluator import evaluate as evaluate_by_harness

    if args.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError("--apply-chat-template, and the tokenizer has no chat template",
                         "a model that was trained on conversations", "leave it out")
    is_main = world is None or world.is_main
    random.seed(SEEDS["random"])
    torch.manual_seed(SEEDS["torch"])
    # The harness prints what it does.
    with contextlib.redirect_stdout(sys.stderr), _refusals_are_bad_input():
        results = evaluate_by_harness(
            lm=_shared_model(model, tokenizer, world), task_dict=opened, limit=args.limit,
            # Standard errors that are drawn are drawn in processes of their own.
            bootstrap_iters=BOOTSTRAP_ROUNDS if is_main else 0, log_samples=False,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.apply_chat_template)
    return _numbers(results["results"])


@contextlib.contextmanager
def _refusals_are_bad_input() -> Iterator[None]:
    """What the harness refuses of a task or a model, as InputError."""
    try:
        yield
    except InputError:
        raise
    except (AssertionError, ValueError) as error:
        # Most of its assertions have no text but their own line.
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise InputError(f"a task cannot be run: {said}",
                         "tasks for a causal language model with as many positions",
                         "choose others") from None


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> TaskScores:
    """The harness's results without names of filters that do nothing: `acc,none` is `acc`."""
    scores: TaskScores = {}
    for name, metrics in results.items():
        # Other keys have no comma: alias, sample_len.
        numbers = {key.removesuffix(",none"): finite(float(value))
                   for key, value in metrics.items()
                   if "," in key and isinstance(value, int | float)}
        if numbers:
            scores[name] = numbers
    return scores


def _shared_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World | None) -> Any:
    """The harness's own face of a transformers model, whose requests the ranks share."""
    from lm_eval.api import task as harness_task
    from lm_eval.models.huggingface import HFLM

    rank, size = (0, 1) if world is None else (world.rank, world.size)
    is_quiet = rank > 0 or not sys.stderr.isatty()
    # The bar of the building of prompts, which has no switch.
    harness_task.tqdm = partial(tqdm, disable=is_quiet)

    def shared(answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        """The answers to all requests; this rank's documents are answered here, whole: the choices
        of one share their context."""
        own = [index for index, request in enumerate(requests) if request.doc_id % size == rank]

        def answer_own() -> list[Any]:
            with _refusals_are_bad_input():
                return answer([requests[index] for index in own]) if own else []

        pairs = list(zip(own, agreed_on(world, answer_own), strict=True))
        by_rank = [pairs] if world is None else world.gather(pairs)
        known = dict(pair for of_rank in by_rank for pair in of_rank)
        return [known[index] for index in range(len(requests))]

    class SharedLM(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return shared(partial(super().loglikelihood, disable_tqdm=is_quiet), requests)

        def loglikelihood_rolling(self, requests: list[Any],
                                  disable_tqdm: bool = False) -> list[Any]:
            return shared(partial(super().loglikelihood_rolling, disable_tqdm=True), requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return shared(partial(super().generate_until, disable_tqdm=is_quiet), requests)

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False,
                                  override_bs: int | None = None) -> list[Any]:
            return super()._loglikelihood_tokens(requests, is_quiet, override_bs)

    return SharedLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE)


def run_tasks(model: str, tasks: Sequence[str], *, limit: int | None = None,
              apply_chat_template: bool = False, trust_remote_code: bool = False,
              dtype: Dtype = "auto", world: World | None = None) -> TaskScores:
    """The scores of the model `model`, a folder or an id on the hub, by task; see TaskArgs.

    dtype auto: that of its checkpoint. Collective; world None: this process alone. Raises
    InputError for an unknown task before anything is read of the model.
    """
    args = TaskArgs(tuple(tasks), limit, apply_chat_template)
    opened = agreed_on(world, lambda: open_tasks(args))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if world is not None:
        device = world.device
    tokenizer = agreed_on(world, lambda: load_tokenizer(model, trust_remote_code=trust_remote_code))
    loaded = agreed_on(world, lambda: load_model(model, trust_remote_code, dtype).to(device))
    return score_tasks(loaded, tokenizer, opened, args, world)


def evaluate_named(model: str, rows: EvalArgs | None, tasks: TaskArgs | None, world: World, *,
                   trust_remote_code: bool = False) -> Scores:
    """What `amid-ds eval` says of a model, on every rank: its scores on rows, on tasks, or on both.

    rows: the data that it is scored on, with its teacher. Collective. Raises InputError,
    TrainingError.
    """
    if rows is None:
        assert tasks is not None
        return Scores(tasks=run_tasks(model, tasks.tasks, limit=tasks.limit,
                                      apply_chat_template=tasks.apply_chat_template,
                                      trust_remote_code=trust_remote_code, world=world))
    world.run_checked(partial(check_eval_data, rows))
    opened = None if tasks is None else world.run_checked(partial(open_tasks, tasks))
    loaded, teacher, tokenizer = world.run_checked(partial(load_models, rows, world.device))
    scores = evaluate(rows, loaded, teacher, tokenizer, world)
    if tasks is None:
        return scores
    return replace(scores, tasks=score_tasks(loaded, tokenizer, opened, tasks, world))


def print_with_tasks(model: str, scores: Scores) -> None:
    """Print the scores of a model, those of tasks with their standard errors, as one table."""
    from rich.table import Table

    from amid_ds.run.console import PlainConsole

    table = Table(title=model, caption=scores.protocol)
    for heading in ("", "score", "value", "± standard error"):
        table.add_column(heading, justify="left" if heading in ("", "score") else "right",
                         overflow="fold")
    held_out: dict[str, float | None] = {key: value for key, value in scores.report().items()
                                         if isinstance(value, float)}
    for name, metrics in {"held-out": held_out, **(scores.tasks or {})}.items():
        for metric, value, error in _with_errors(metrics):
            table.add_row(name, metric, "-" if value is None else f"{value:.4f}",
                          "" if error is None else f"{error:.4f}")
        table.add_section()
    PlainConsole().print(table)


def _with_errors(metrics: Mapping[str, float | None]
                 ) -> Iterator[tuple[str, float | None, float | None]]:
    """(name, value, standard error) of each metric; the error None where there is none."""
    errors = {re.sub(r"_stderr(?=,|$)", "", name): value for name, value in metrics.items()
              if re.search(r"_stderr(,|$)", name)}
    for name, value in metrics.items():
        if not re.search(r"_stderr(,|$)", name):
            yield name, value, errors.get(name)
