"""`amid-ds submit`: a recipe and a template become a Slurm job, or a message that says why not.

Everything that can be checked before hours in a queue is checked here: the recipe as `train` does,
the job by `sbatch --test-only`, and the script for faults that this does not report. Recipe, script
and the code's revision are kept in the run's folder and the copy is submitted, so later edits do
not change the job. A sweep's jobs override the recipe, and a resolved recipe accepts fewer
overrides than its file (its defaults look like choices), so theirs is kept unresolved. The code is
not copied: the revision and a patch of uncommitted changes identify it.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amid_ds.cluster import slurm
from amid_ds.config.grid import Combination
from amid_ds.config.library import packaged_folder
from amid_ds.config.parse import dump_recipe, load_recipe, merge_overrides
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError
from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
from amid_ds.planning.report import fit_summary
from amid_ds.run import attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.provenance import code_revision, uncommitted_changes
from amid_ds.training.job import check_recipe

# Defaults, as in the templates.
CPUS_PER_RANK = 8
RANKS_PER_NODE = 8
# sbatch's own options that `submit` passes on.
SBATCH_OPTIONS = ("time", "partition", "account", "qos", "signal")


@dataclass(frozen=True)
class SubmitArgs:
    """Validated arguments of `submit`. Bad values raise InputError.

    options: sbatch's own, by name. sweep: an array of jobs, one per combination, `at_once` of them
    at a time (0: all). device: the one that the run must fit, as in `plan`; None: its default.
    """

    template: str = "train"
    nodes: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    cpus_per_rank: int = CPUS_PER_RANK
    options: Mapping[str, str] | None = None
    chain: int = 1
    sweep: tuple[Combination, ...] = ()
    at_once: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "chain"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {getattr(self, name)}", "a number from 1 on",
                                 f"correct {option}")
        if bool(self.sweep) != (self.template == "sweep"):
            conflict = "for a sweep" if self.sweep else "without --sweep"
            raise InputError(f"the template {self.template} {conflict}",
                             "--sweep KEY=VALUE,VALUE,... and the template sweep together",
                             "add or drop --sweep")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def submit(recipe_path: str, overrides: Sequence[str], args: SubmitArgs, dry_run: bool) -> None:
    """Check, keep copies and submit; the (last) job's id is printed last.

    A dry run prints the script alone on stdout.
    """
    template = find_template(args.template).read_text(encoding="utf-8")
    recipe = _checked_recipe(recipe_path, overrides, args)
    run = RunFolder(Path(recipe.output_dir))
    if args.template != "prepare":
        print(_fit(recipe, args), file=sys.stderr if dry_run else sys.stdout, flush=True)
    script = render(template, _template_values(recipe, args))
    refuse_faults(script, new_folder=run.logs.resolve())
    if dry_run:
        print(script, end="")
        return
    folder = _next_submission(run)
    kept = merge_overrides(recipe_path, overrides) if args.sweep else dump_recipe(recipe)
    _keep_copies(folder, run, kept, script)
    run.logs.mkdir(exist_ok=True)
    sbatch_arguments = [str(folder / "job.sbatch"), str(folder / "recipe.yaml")]
    estimate = slurm.sbatch_test_only(sbatch_arguments)
    jobs = _submit_chain(sbatch_arguments, args.chain)
    attempts.append_event(run.path, "submitted", jobs=jobs, folder=str(folder))
    print(f"recipe, script and code revision are kept in {folder}\n{estimate}\n"
          f"logs: {run.logs}/, the job's in {jobs[0]}.log, the ranks' in {jobs[0]}-NODE.log\n"
          f"how it goes: amid-ds status {recipe.output_dir}")
    if len(jobs) > 1:
        print(f"a chain of {len(jobs)} jobs, one after the other: {' '.join(jobs)}")
    print(jobs[-1])


def _submit_chain(sbatch_arguments: Sequence[str], length: int) -> list[str]:
    """The ids of `length` jobs, each of which begins after the one before has ended."""
    jobs: list[str] = []
    for _ in range(length):
        dependency = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(slurm.sbatch([*dependency, *sbatch_arguments]))
    return jobs


def _checked_recipe(recipe_path: str, overrides: Sequence[str], args: SubmitArgs) -> Recipe:
    """The recipe, checked as `train` does on that number of ranks, for each job of a sweep."""
    recipe = load_recipe(recipe_path, overrides)
    if args.template == "prepare":
        check_recipe(recipe, recipe.tensor_parallel)
    elif not args.sweep:
        check_recipe(recipe, args.ranks)
    for combination in args.sweep:
        job_overrides = [*overrides, *combination.overrides(recipe.output_dir)]
        check_recipe(load_recipe(recipe_path, job_overrides), args.ranks)
    return recipe


def _fit(recipe: Recipe, args: SubmitArgs) -> str:
    """The plan's sentence on memory and time; or why there is none, which is no error."""
    device = find_device(args.device or DEFAULT_DEVICE, args.ranks_per_node)
    try:
        return fit_summary(recipe, args.nodes, args.ranks_per_node, device)
    except InputError as error:
        # A model that cannot be built on the meta device may still train.
        return f"whether it fits cannot be told: {error.found}"


def find_template(name: str) -> Path:
    """The packaged template of that name, or the file of that path. Raises InputError."""
    folder = packaged_folder("slurm")
    for path in (folder / f"{name}.sbatch", Path(name)):
        if path.is_file():
            return path
    packaged = ", ".join(sorted(path.stem for path in folder.glob("*.sbatch")))
    raise InputError(f"the template {name} is not there",
                     f"one of {packaged}; or the path of a script of your own", "check --template")


def _template_values(recipe: Recipe, args: SubmitArgs) -> dict[str, str]:
    """Values for the lines marked EDIT: sbatch's options and the script's variables, by name."""
    logs = RunFolder(Path(recipe.output_dir)).logs.resolve()
    log_name = "%A_%a" if args.sweep else "%j"
    ranks_per_task = args.ranks_per_node if args.template == "train_deepspeed" else 1
    values = {
        "nodes": str(args.nodes),
        "ntasks-per-node": str(args.ranks_per_node),
        "gpus-per-node": str(args.ranks_per_node),
        "cpus-per-task": str(args.cpus_per_rank * ranks_per_task),
        "output": shlex.quote(f"{logs}/{log_name}.log"),
        "NODE_LOG": shlex.quote(f"{logs}/{log_name}-%N.log"),
        "PYTHON": shlex.quote(sys.executable),
        "RANKS_PER_NODE": str(args.ranks_per_node),
        **(args.options or {}),
    }
    if args.chain > 1:
        values |= {"REQUEUE": "no", "requeue": ""}
    if args.sweep:
        limit = f"%{args.at_once}" if args.at_once else ""
        settings = [shlex.join(combination.overrides(recipe.output_dir))
                    for combination in args.sweep]
        values |= {"array": f"0-{len(args.sweep) - 1}{limit}",
                   "SETTINGS": f"({shlex.join(settings)})",
                   "RUNS": shlex.quote(recipe.output_dir)}
    return values


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with `values` in its lines marked EDIT.

    sbatch's options without such a line get one after the template's own. The key `requeue` turns
    `--requeue` into `--no-requeue`.
    """
    lines: list[str] = []
    used = set()
    options_end = 0
    for line in template.splitlines():
        match = re.match(r"(#SBATCH --|(?:export )?)([\w-]+)=.*# EDIT", line)
        if match and match[2] in values:
            line = f"{match[1]}{match[2]}={values[match[2]]}"
            used.add(match[2])
        elif line.strip() == "#SBATCH --requeue" and "requeue" in values:
            line = "#SBATCH --no-requeue"
        lines.append(line)
        if line.startswith("#SBATCH"):
            options_end = len(lines)
    added = [name for name in values if name in SBATCH_OPTIONS and name not in used]
    lines[options_end:options_end] = [f"#SBATCH --{name}={values[name]}" for name in added]
    return "\n".join(lines) + "\n"


def refuse_faults(script: str, new_folder: Path) -> None:
    """Raise InputError for faults that `sbatch --test-only` does not report.

    `new_folder` counts as there: it is made before the job is submitted.
    """
    faults = list(_faults(script, new_folder))
    if faults:
        lines = "\n".join(f"    - {fault}" for fault in faults)
        raise InputError(f"the batch script has {len(faults)} fault(s):\n{lines}",
                         "a script that bash and sbatch understand as it was meant",
                         "fix the template; amid-ds submit --dry-run shows the script")


def _faults(script: str, new_folder: Path) -> Iterator[str]:
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if syntax.returncode:
        yield f"bash: {syntax.stderr.strip()}"
    if not script.startswith("#!"):
        yield "line 1: sbatch wants an interpreter there, such as #!/bin/bash"
    first_command = None
    for number, line in enumerate(script.splitlines(), 1):
        if line.startswith("#SBATCH"):
            if first_command is not None:
                yield (f"line {number}: {line.strip()} comes after the first command (line "
                       f"{first_command}): sbatch ignores it")
            yield from (f"line {number}: {fault}" for fault in _missing_folders(line, new_folder))
        elif first_command is None and line.strip() and not line.lstrip().startswith("#"):
            first_command = number


def _missing_folders(line: str, new_folder: Path) -> Iterator[str]:
    """Missing folders of a log, or to work in: such a job would end without a trace."""
    for word in shlex.split(line, comments=False)[1:]:
        name, _, value = word.partition("=")
        if name not in ("--output", "--error", "--chdir") or not value:
            continue
        folder = Path(value) if name == "--chdir" else Path(value).parent
        if not folder.is_dir() and folder != new_folder:
            yield f"the folder {folder} of {name} is not there"


def _next_submission(run: RunFolder) -> Path:
    """The folder of the next submission: submissions/0001, 0002, ..."""
    folders = run.submissions.glob("*") if run.submissions.is_dir() else ()
    numbers = [int(path.name) for path in folders if path.name.isdigit()]
    return run.submissions.resolve() / f"{max(numbers, default=0) + 1:04d}"


def _keep_copies(folder: Path, run: RunFolder, recipe: str, script: str) -> None:
    code = json.dumps({"revision": code_revision(), "command": sys.argv}, indent=1)
    files = {"recipe.yaml": recipe, "job.sbatch": script, "code.json": code + "\n"}
    changes = uncommitted_changes()
    if changes:
        files["code.patch"] = changes
    try:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the output folder {run.path} cannot be written: {error}",
                         "a folder that can be written",
                         "set output_dir to another folder") from None
