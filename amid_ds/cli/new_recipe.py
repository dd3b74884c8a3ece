"""`amid-ds recipes new`: a recipe from the answers to five questions, each checked at once."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from amid_ds.config.library import new_file_at, write_new_file
from amid_ds.config.parse import parse_recipe
from amid_ds.config.strict import load_yaml
from amid_ds.errors import InputError, printable

if TYPE_CHECKING:
    from amid_ds.eval.rows import RowOptions

_T = TypeVar("_T")
NO_TEACHER = "none"
# Tokens, where the models take as many.
USUAL_ROW = 2048
# Of a rank, in an optimizer step.
ROWS_OF_A_RANK = 8
GPUS_OF_A_NODE = 8
LENGTH = re.compile(r"(\d+(?:\.\d+)?(?:e\d\d?)?)\s*([kmbt]?)\s*(steps?|epochs?|tokens?|)",
                    re.IGNORECASE)
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class RecipeAnswers:
    """rows: a source of data.train. length: a number and "steps", "epochs" or "tokens"."""

    student: str
    teacher: str | None
    rows: dict[str, str]
    length: tuple[int, str]
    gpus: int

    @property
    def batch(self) -> int:
        return ROWS_OF_A_RANK * max(1, self.gpus)

    def steps(self, seq_length: int) -> int | None:
        """Of the whole run; None: there are epochs instead."""
        number, what = self.length
        if what == "tokens":
            return math.ceil(number / (self.batch * seq_length))
        return number if what == "steps" else None


def new_recipe(path: str) -> None:
    """Ask, write the recipe to `path`, a new file, and print the next commands.

    Raises InputError for a file that is there, for answers that end too early, and, where nobody
    sits at a terminal, for a wrong answer. Until the last one is given nothing is written.
    """
    target = new_file_at(Path(path), "distil.yaml")
    with contextlib.suppress(ImportError):
        # A line can be edited, and TAB completes a path.
        import readline

        readline.parse_and_bind("tab: complete")
        # A path may hold spaces.
        readline.set_completer_delims("\n")
    _say("Five questions. Enter takes what stands in brackets.")
    student = _ask(1, "Student: a folder, an id on the hub, or a run", "", _student)
    teacher = _ask(2, "Teacher: a folder or an id on the hub; none: plain training", NO_TEACHER,
                   lambda answer: _teacher(answer, student))
    rows = _ask(3, "Training data: a file, folder or glob, or a data set on the hub", "",
                lambda answer: _rows(answer, student))
    length = _ask(4, "Length, such as 500 steps, 3 epochs, 1B tokens", "1000 steps", _length)
    gpus = _ask(5, "GPUs of a node; 0: this machine's CPU", str(GPUS_OF_A_NODE), _gpus)
    text = _recipe_text(RecipeAnswers(student, teacher, rows, length, gpus),
                        f"runs/{target.stem}")
    parse_recipe(text, "the recipe of these answers")
    write_new_file(target, text)
    _say(_next_commands(str(target), gpus))


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _ask(number: int, question: str, default: str, read: Callable[[str], _T]) -> _T:
    """What `read` makes of the answer; at a terminal it is asked again while it is wrong."""
    while True:
        try:
            answer = input(f"\n{number}. {question}{f' [{default}]' if default else ''}: ").strip()
        except (EOFError, UnicodeError):
            raise InputError(f"no answer to question {number}", "an answer to each of the five",
                             "answer at a terminal, or give a line for each on stdin") from None
        try:
            if not answer and not default:
                raise InputError("an empty answer", question, "there is no default: name one")
            return read(answer or default)
        except InputError as error:
            if not sys.stdin.isatty():
                raise
            _say(textwrap.indent(str(error), "   "))


def _student(answer: str) -> str:
    from amid_ds.run.warm_start import find_run

    return answer if find_run(answer) else _model(answer)


def _teacher(answer: str, student: str) -> str | None:
    from amid_ds.data import load_tokenizer
    from amid_ds.data.tokenizer import require_same_tokenizer

    if answer.lower() == NO_TEACHER:
        return None
    if Path(_model(answer)).is_dir() and (Path(student) / "config.json").is_file():
        require_same_tokenizer(load_tokenizer(student), load_tokenizer(answer), student, answer)
        _say("   It has the student's tokenizer.")
    return answer


def _model(answer: str) -> str:
    """The folder or id of a model. Raises InputError."""
    from amid_ds.data.locate import is_hub_id
    from amid_ds.models.loading import model_config

    if Path(answer).exists():
        config = model_config(answer)
        _say(f"   A model of the type {config.model_type}.")
    elif is_hub_id(answer):
        _say("   No folder here, so an id on the hub; it is looked up by the next command.")
    else:
        raise InputError(f"there is no model {answer!r}", "a folder with config.json and weights, "
                         "or owner/name on the hub", "check the path")
    return answer


def _rows(answer: str, student: str) -> dict[str, str]:
    """A source of data.train, its columns found in its first file. Raises InputError."""
    from amid_ds.config.parse import source_of
    from amid_ds.data import load_tokenizer
    from amid_ds.data.chat import require_chat_template
    from amid_ds.data.locate import is_hub_id
    from amid_ds.data.sources import check_sources, source_columns
    from amid_ds.eval.rows import RowOptions

    if is_hub_id(answer):
        _say("   No file here, so a data set on the hub, with a column `text`.")
        return {"path": answer, "text": "text"}
    columns = source_columns(source_of({"path": answer}))
    try:
        data = RowOptions().data(answer)
    except InputError:
        options = _ask(3, f"Its columns are {', '.join(columns)}. Which is the text, or which two "
                       "are prompt,response?", "", lambda names: _named_columns(names, columns))
        data = options.data(answer)
    check_sources(data)
    found: dict[str, str] = data.train[0].model_dump(exclude_unset=True)
    kinds = {name: value for name, value in found.items() if name != "path"} or {"text": "text"}
    if "messages" in kinds and (Path(student) / "config.json").is_file():
        require_chat_template(load_tokenizer(student))
    _say(f"   Rows with {' and '.join(kinds)}.")
    return {"path": answer, **kinds}


def _named_columns(answer: str, columns: Sequence[str]) -> RowOptions:
    from amid_ds.eval.rows import RowOptions

    names = [name.strip() for name in answer.split(",")]
    if not set(names) <= set(columns) or len(names) > 2:
        raise InputError(f"the columns {answer!r}", f"one or two of {', '.join(columns)}",
                         "such as text, or prompt,response")
    return (RowOptions(text=names[0]) if len(names) == 1 else
            RowOptions(prompt=names[0], response=names[1]))


def _length(answer: str) -> tuple[int, str]:
    found = LENGTH.fullmatch(answer)
    number = float(found[1]) * FACTORS[found[2].lower()] if found else 0
    if found is None or number < 1 or number != int(number):
        raise InputError(f"the length {answer!r}", "a whole number of steps, epochs or tokens",
                         "such as 500 steps, 3 epochs, 1B tokens")
    return int(number), f"{found[3].lower().rstrip('s') or 'step'}s"


def _gpus(answer: str) -> int:
    if not re.fullmatch(r"\d{1,4}", answer):
        raise InputError(f"{answer!r} GPUs", "a whole number, 0 for none", "count a node's GPUs")
    return int(answer)


def _recipe_text(answers: RecipeAnswers, output_dir: str) -> str:
    seq_length = min([USUAL_ROW, *_positions(answers.student), *_positions(answers.teacher)])
    steps = answers.steps(seq_length)
    tokens = answers.batch * seq_length
    held_out = {**answers.rows, "path": "heldout.jsonl"}
    lines = [
        "# Every key, its default and meaning: amid_ds/config/README.md.",
        f"student: {{model: {_yaml(answers.student)}}}",
        *([f"teacher: {{model: {_yaml(answers.teacher)}}}"] if answers.teacher else
          ["# No teacher: cross entropy alone."]),
        "data:",
        f"  train: [{_mapping(answers.rows)}]",
        f"  # eval: [{_mapping(held_out)}]    # other rows, every train.eval_every steps",
        *(["loss: {alpha: -1.0, lam: 0.1, divergence: kl, order: pr}    # or {preset: skl}"]
          if answers.teacher else []),
        "train:",
        f"  epochs: {answers.length[0]}" if steps is None else
        f"  steps: {steps}    # {steps * tokens:,} tokens",
        f"  seq_length: {seq_length}",
        "  micro_batch_size: 1    # rows of a rank at once: raise it as far as `plan` says it fits",
        f"  global_batch_size: {answers.batch}    # {tokens:,} tokens a step",
        "  learning_rate: 1.0e-4",
        *([] if steps is None else [f"  warmup_steps: {steps // 20}"]),
        "deepspeed: ds_configs/zero3.json    # bf16" if answers.gpus else
        "deepspeed: ds_configs/zero3_fp32.json",
        f"checkpoint: {{every: {max(1, min(500, (steps or 2000) // 4))}, keep: 2}}",
        f"output_dir: {_yaml(output_dir)}"]
    return "\n".join([*lines, ""])


def _positions(model: str | None) -> list[int]:
    """The most tokens of a row that the model of a folder was made for; [] where it is not said."""
    from amid_ds.models.loading import model_config
    from amid_ds.models.shape import text_config

    if model is None or not (Path(model) / "config.json").is_file():
        return []
    most = getattr(text_config(model_config(model)), "max_position_embeddings", None)
    return [most] if isinstance(most, int) and most > 1 else []


def _mapping(values: dict[str, str]) -> str:
    return f"{{{', '.join(f'{key}: {_yaml(value)}' for key, value in values.items())}}}"


def _yaml(text: str) -> str:
    """`text` inside a list or mapping in one line, in quotes where it would be something else."""
    plain = re.fullmatch(r"\w[\w./-]*", text) and load_yaml(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _next_commands(recipe: str, gpus: int) -> str:
    import shlex

    path = shlex.quote(recipe)
    ranks = f" --ranks-per-node {gpus}" if gpus else ""
    train = (f"deepspeed --num_gpus {gpus} --module amid_ds train {path}" if gpus > 1 else
             f"amid-ds train {path}")
    return "\n".join([
        f"\n{recipe} is written. Next:",
        f"  amid-ds plan {path}{ranks}{'' if gpus else ' --device cpu'}    # does it fit?",
        f"  {train}    # the same line resumes",
        f"  amid-ds submit {path}{ranks}    # or on a Slurm cluster"])
