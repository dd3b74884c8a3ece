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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amid_ds.config.grid import path_override
from amid_ds.config.library import find_recipe
from amid_ds.config.parse import load_recipe, source_of
from amid_ds.config.published import PublishedRow, published, published_row
from amid_ds.config.recipe import Recipe
from amid_ds.data import read_prompts, read_prompts_with_references, source_columns
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import InputError, TrainingError
from amid_ds.eval.protocol import parse_seeds
from amid_ds.eval.text_metrics import require_rouge
from amid_ds.experiments.sweep import markdown_table, run_logged, run_one
from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import Lease
from amid_ds.files.ownership import is_signed, require_own_folder, sign
from amid_ds.run.folder import RunFolder
from amid_ds.training.job import check_recipe

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

    models, data: the folders of the published ones. seeds: `A,B,…`, of the samples; None: the
    published five. out: None: runs/reproduce/NAME.
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
        return RunFolder(Path(self.recipe.output_dir))

    @property
    def model(self) -> Path:
        """What is evaluated: the best evaluation's student where the recipe selects one."""
        selects = self.recipe.checkpoint.best is not None
        return self.run.best_model if selects else self.run.model

    @property
    def recipe_path(self) -> str:
        """The packaged recipe's file."""
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
        return [*self.row.overrides, *places, path_override("output_dir", self.root / "run"),
                *self.args.overrides]

    @cached_property
    def _named(self) -> Recipe:
        """The recipe with the names that its author gave models and data."""
        return load_recipe(self.recipe_path, self.row.overrides)

    @property
    def models(self) -> dict[str, Path]:
        """The folders of the recipe's models, by key: named as the last part of their hub ids."""
        named = {"student.model": self._named.student.model}
        if self._named.live_teacher is not None:
            named["teacher.model"] = self._named.live_teacher.model
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

    @property
    def asked(self) -> dict[str, object]:
        """What is trained and evaluated, whatever place the inputs are mounted in."""
        return {"name": self.args.name, "recipe": self.row.recipe,
                "overrides": [*self.row.overrides, *self.args.overrides]}

    @property
    def asked_path(self) -> Path:
        """Where `asked` is kept."""
        return self.root / "asked.json"

    def scores(self, name: str) -> Path:
        """The scores of a set: what `eval --json` printed."""
        return self.root / "scores" / f"{name}_{'-'.join(map(str, self.seeds))}.json"


def reproduce(args: ReproduceArgs) -> None:
    """Do what is not done yet, then print the row beside ours, and write reproduced.json and .md.

    Raises InputError that names all models and data that are not there; Stopped; TrainingError.
    """
    row = published_row(args.name)
    # A comma behind a single seed: it is no number of seeds.
    seeds = tuple(published().seeds) if args.seeds is None else parse_seeds(f"{args.seeds},")
    if not seeds or args.ranks < 1:
        raise InputError(f"--seeds {args.seeds} --ranks-per-node {args.ranks}",
                         "one seed or more, and one rank or more", "leave them out")
    task = Reproduction(args, row, seeds)
    require_rouge()
    logger.info(f"{row.method} by {row.recipe}: {task.run.path}")
    _require_inputs(task)
    require_own_folder(task.root, is_signed(task.root, "reproduce"), "--out")
    _require_same_task(task)
    _require_trainable(task)
    sign(task.root, "reproduce")
    with Lease.held(task.root / "lease.json", f"the folder {task.root}") as lease:
        _require_same_task(task)
        replace_text(task.asked_path, json.dumps(task.asked, indent=1) + "\n")
        _split_raw(task)
        if run_one("training", task.recipe_path, task.overrides, args.ranks):
            raise TrainingError(f"the training of {args.name} failed, as the lines above say; the "
                                "same command goes on")
        scores = {name: _score(task, name, lease) for name in published().sets}
        lease.check()
        _report(task, scores)


def _require_inputs(task: Reproduction) -> None:
    """Raise InputError unless every model and every row that is needed is there."""
    raw = [RAW_FILE for file in task.files.values() if task.made(file)]
    files = dict.fromkeys([*(file for file in task.files.values() if not task.made(file)), *raw,
                           *(each.path for each in published().sets.values())])
    expected = [*(model / "config.json" for model in task.models.values()),
                *map(task.data, files)]
    if missing := [str(path) for path in expected if not path.exists()]:
        raise InputError(
            "\n    ".join([f"of the authors' models and data {len(missing)} are not there:",
                           *missing]),
            f"in {task.args.models} a folder for each model ({_names(task.models.values())}), and "
            f"in {task.args.data} the authors' files of instruction, input and output "
            f"({', '.join(files)})",
            "download them, as amid_ds/experiments/README.md says, or name other folders")
    problems = []
    for each in published().sets.values():
        try:
            _read_set(task.data(each.path))
        except InputError as error:
            problems.append(error.found)
    if problems:
        raise InputError("\n    ".join(["of the sets to evaluate on:", *problems]),
                         "rows of instruction, input and output, as the authors publish them",
                         "compare the files with the authors'")


def _read_set(path: Path) -> None:
    """Read every row: one that has no answer would end the evaluation after the training.

    Warn where rows have a prompt of their own, as the authors' files do, and it is not the one that
    is made of them: then ours and theirs are asked different things. Raises InputError.
    """
    source = source_of({"path": str(path), "template": TEMPLATE})
    made = [prompt for prompt, _ in read_prompts_with_references(source, "error")]
    if not made:
        raise InputError(f"{path} has no rows", "a set to evaluate on", "check the file")
    if "prompt" not in source_columns(source):
        return
    own = read_prompts(source_of({"path": str(path), "text": "prompt"}), "error")
    # Their code takes <n> for a line end.
    pairs = zip((text.replace("<n>", "\n") for text in own), made, strict=True)
    others = sum(text != prompt for text, prompt in pairs)
    if others:
        logger.warning(f"{path}: in {others} of {len(made)} rows the column `prompt` is not what "
                       f"the template {TEMPLATE} makes of instruction and input; the template's "
                       "is used")


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _require_same_task(task: Reproduction) -> None:
    """Raise InputError if the folder's training or evaluation is another."""
    path = task.asked_path
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != task.asked:
        raise InputError(f"{task.root} reproduces something else: {before}", f"{task.asked}",
                         "name another --out")


def _require_trainable(task: Reproduction) -> None:
    """Raise InputError for what `train` would refuse. RAW_FILE stands for parts not made yet."""
    unmade = [path_override(key, task.data(RAW_FILE)) for key, file in task.files.items()
              if (part := task.made(file)) is not None and not part.is_file()]
    if unmade:
        _raw_lines(task)
    check_recipe(load_recipe(task.recipe_path, [*task.overrides, *unmade]), task.args.ranks)


def _raw_lines(task: Reproduction) -> list[str]:
    """The lines of RAW_FILE. Raises InputError where none is left to train on."""
    raw = task.data(RAW_FILE)
    # At line feeds alone: a text may hold other characters that end a line for `splitlines`.
    with raw.open(encoding="utf-8", newline="\n") as file:
        lines = list(file)
    if len(lines) <= HELD_OUT_ROWS:
        raise InputError(f"{raw} has {len(lines)} rows",
                         f"more than the {HELD_OUT_ROWS} that are held out", "check the file")
    return lines


def _split_raw(task: Reproduction) -> None:
    """Write the rows that are held out, and those that train, once."""
    parts = [task.root / DATA_ROOT / file for file in (HELD_OUT_FILE, TRAIN_FILE)]
    if all(part.is_file() for part in parts):
        return
    lines = _raw_lines(task)
    for part, own in zip(parts, (lines[:HELD_OUT_ROWS], lines[HELD_OUT_ROWS:]), strict=True):
        part.parent.mkdir(parents=True, exist_ok=True)
        replace_text(part, "".join(own))


def _score(task: Reproduction, name: str, lease: Lease) -> Mapping[str, float]:
    """The scores of a set, made once for the model: what `eval --json` prints."""
    path = task.scores(name)
    made = (task.model / "config.json").stat().st_mtime
    if not path.is_file() or path.stat().st_mtime < made:
        path.parent.mkdir(exist_ok=True)
        log = path.with_suffix(".log")
        logger.info(f"evaluation of {name}: {log}")
        seeds = "".join(f"{seed}," for seed in task.seeds)
        command = launch_command(
            task.args.ranks, "eval", str(task.model), "--data",
            str(task.data(published().sets[name].path)), "--template", TEMPLATE, "--protocol",
            PROTOCOL, "--seeds", seeds, "--json")
        status = run_logged(command, log)
        printed = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
                   if line.startswith('{"loss"')]
        if status or not printed:
            raise TrainingError(f"the evaluation of {name} ended with status {status}; {log} says "
                                "why, and the same command goes on")
        lease.check()
        replace_text(path, printed[-1] + "\n")
    scores: Mapping[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores


def _report(task: Reproduction, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print the table and write it, and the same as JSON. In per cent, as the papers."""
    row = task.row
    here, std, sem = ({name: 100 * each[key] for name, each in scores.items()
                       if each[key] is not None}
                      for key in ("rouge_l", "rouge_l_std", "rouge_l_sem"))
    average = (statistics.fmean(row.rouge_l.values()) if row.average is None else row.average)
    lines: list[tuple[str, Mapping[str, float], float | None]] = [
        (f"published: {row.method}", row.rouge_l, average),
        ("here", here, statistics.fmean(here.values())),
        ("here: ± standard deviation over the seeds", std, None),
        ("here: ± standard error", sem, None)]
    table = markdown_table(["ROUGE-L", *scores, "average"], [
        [title, *(_hundredths(values.get(name)) for name in scores), _hundredths(mean)]
        for title, values, mean in lines])
    text = (f"{table}\nPublished: {row.source}. Here: the recipe {row.recipe} with "
            f"{' '.join([*row.overrides, *task.args.overrides]) or 'no override'}; seeds "
            f"{', '.join(map(str, task.seeds))}. What differs, beside what the recipe's header "
            f"says: {row.differs}.\n")
    result = {
        **task.asked, "method": row.method, "source": row.source, "differs": row.differs,
        "model": str(task.model), "seeds": task.seeds,
        "protocol": next(iter(scores.values()))["protocol"],
        "published": {**row.rouge_l, "average": average},
        "rouge_l": {**here, "average": statistics.fmean(here.values())},
        "rouge_l_std": std, "rouge_l_sem": sem}
    replace_text(task.root / "reproduced.json", json.dumps(result, indent=1) + "\n")
    replace_text(task.root / "reproduced.md", text)
    print(f"{text}\nin per cent; also {task.root / 'reproduced.json'} and reproduced.md")


def _hundredths(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
