"""`amid-ds reproduce`: a published row trained, selected and evaluated, and printed beside ours.

The parts are the commands that a user would type: `train` of a packaged recipe with the row's
overrides, then `eval` of the five sets by the published protocol, each in processes of its own.
What is finished stays in the folder, so the same command goes on after a kill. Models and data are
the authors'; they are looked for before anything begins, all of them at once.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amid_ds.config.grid import path_override
from amid_ds.config.library import find_recipe
from amid_ds.config.parse import load_recipe, source_of
from amid_ds.config.published import PublishedRow, published, published_row
from amid_ds.config.recipe import Recipe
from amid_ds.data import read_prompts_with_references
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval.protocol import parse_seeds
from amid_ds.eval.text_metrics import require_rouge
from amid_ds.experiments.sweep import markdown_table, run_logged, run_one
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Lease
from amid_ds.files.ownership import is_signed, require_own_folder, sign
from amid_ds.run.folder import RunFolder

logger = logging.getLogger(__name__)

PROTOCOL, TEMPLATE = "minillm", "minillm"
# The authors' scripts hold the first rows of this file out and train on the others.
RAW_FILE, HELD_OUT_FILE, TRAIN_FILE = ("dolly/raw.jsonl", "dolly/heldout.jsonl",
                                       "dolly/train.jsonl")
HELD_OUT_ROWS = 1000
# A recipe's paths to data begin with it.
DATA_ROOT = "data"


@dataclass(frozen=True)
class ReproduceArgs:
    """The arguments of `amid-ds reproduce`.

    models, data: the folders of the published ones. seeds: of the samples, as `eval --seeds` has
    them; None: the published five. out: None: runs/reproduce/NAME.
    """

    name: str
    models: str
    data: str
    seeds: str | None = None
    out: str | None = None
    ranks: int = 1
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Reproduction:
    """A published row, and what reproduces it."""

    args: ReproduceArgs
    row: PublishedRow
    seeds: tuple[int, ...]

    @property
    def root(self) -> Path:
        """The folder of all that is made."""
        return Path(self.args.out or f"runs/reproduce/{self.args.name}")

    @property
    def run(self) -> RunFolder:
        """The training's."""
        return RunFolder(self.root / "run")

    @property
    def recipe_path(self) -> str:
        return str(find_recipe(self.row.recipe))

    @cached_property
    def recipe(self) -> Recipe:
        """As it is trained."""
        return load_recipe(self.recipe_path, self.overrides)

    @cached_property
    def overrides(self) -> list[str]:
        """The row's, the places of models and data, and the user's, which come last."""
        places = [path_override(key, place) for key, place in self.models.items()]
        places += [path_override(key, self.made(file) or self.data(file))
                   for key, file in self.files.items()]
        return [*self.row.overrides, *places, path_override("output_dir", self.run.path),
                *self.args.overrides]

    @cached_property
    def _named(self) -> Recipe:
        """The recipe with the names that its author gave models and data."""
        return load_recipe(self.recipe_path, self.row.overrides)

    @property
    def models(self) -> dict[str, Path]:
        """The folders of the recipe's models, by key: named as the last part of their hub ids."""
        named = {"student.model": self._named.student.model}
        if self._named.teacher is not None:
            named["teacher.model"] = self._named.teacher.model
        return {key: Path(self.args.models) / Path(model).name for key, model in named.items()}

    @property
    def files(self) -> dict[str, str]:
        """The recipe's data, by key: paths in the folder of the published data."""
        data = self._named.data
        paths = {f"data.{part}.{number}.path": rows.path for part in ("train", "eval")
                 for number, rows in enumerate(getattr(data, part))}
        if data.auxiliary is not None:
            paths["data.auxiliary.path"] = data.auxiliary.path
        return {key: str(Path(path).relative_to(DATA_ROOT)) for key, path in paths.items()}

    def data(self, file: str) -> Path:
        """A file or folder of the published data."""
        return Path(self.args.data) / file

    def made(self, file: str) -> Path | None:
        """Where a part of RAW_FILE is written; None for what is published as it is."""
        return self.root / DATA_ROOT / file if file in (HELD_OUT_FILE, TRAIN_FILE) else None

    def scores(self, name: str) -> Path:
        """The scores of a set: what `eval --json` printed."""
        return self.root / "scores" / f"{name}_{'-'.join(map(str, self.seeds))}.json"


def reproduce(args: ReproduceArgs) -> None:
    """Do what is not done yet, then print the row beside ours, and write reproduced.json and .md.

    Raises InputError that names all models and data that are not there; Stopped; TrainingError.
    """
    row = published_row(args.name)
    seeds = tuple(published().seeds) if args.seeds is None else parse_seeds(args.seeds)
    if not seeds:
        raise InputError(f"--seeds {args.seeds}", "one seed or more", "leave --seeds out")
    task = Reproduction(args, row, seeds)
    require_rouge()
    _require_inputs(task)
    require_own_folder(task.root, is_signed(task.root, "reproduce"), "--out")
    sign(task.root, "reproduce")
    with Lease.held(task.root / "lease.json", f"the folder {task.root}"):
        _require_same_task(task)
        _split_raw(task)
        if run_one("training", task.recipe_path, task.overrides, args.ranks):
            raise TrainingError(f"the training of {args.name} failed; the same command goes on")
        _report(task, {name: _score(task, name) for name in published().sets})


def _require_inputs(task: Reproduction) -> None:
    """Raise InputError unless every model and every row that is needed is there."""
    raw = [RAW_FILE for file in task.files.values() if task.made(file)]
    files = dict.fromkeys([*(file for file in task.files.values() if not task.made(file)), *raw,
                           *(each.path for each in published().sets.values())])
    expected = [*(model / "config.json" for model in task.models.values()),
                *map(task.data, files)]
    if missing := [str(path) for path in expected if not path.exists()]:
        raise InputError(
            f"{args_of(task)}: {len(missing)} of {len(expected)} are not there:\n    "
            + "\n    ".join(missing),
            f"in {task.args.models} a folder for each model ({_names(task.models.values())}), and "
            f"in {task.args.data} the authors' files of instruction, input and output "
            f"({', '.join(files)})",
            "download them, as amid_ds/experiments/README.md says, or name other folders")
    for each in published().sets.values():
        source = source_of({"path": str(task.data(each.path)), "template": TEMPLATE})
        # Every row is read: one that has no answer would end the evaluation after the training.
        if not sum(1 for _ in read_prompts_with_references(source, "error")):
            raise InputError(f"{source.path} has no rows", "a set to evaluate on", "check the file")


def args_of(task: Reproduction) -> str:
    """The arguments that name the inputs, for messages."""
    return f"--models {task.args.models} --data {task.args.data}"


def _names(paths: Iterator[Path] | Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
