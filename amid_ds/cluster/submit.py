"""`amid-ds submit`: a recipe and a template become a job that Slurm will take, or a message that says why not.

All that can be judged before hours of waiting in a queue is judged here: the recipe as `train` would, the job as
`sbatch --test-only` does, and what that does not see. What is submitted is a copy: recipe, script and the code's
revision are kept in the run's folder, so that the job runs what was checked whatever is edited meanwhile. A sweep's
jobs override that copy, and a resolved recipe cannot be overridden as the file can (its defaults look like choices), so
theirs stays unresolved. The code itself is not copied: the revision, with a patch of what was not committed, is enough
to find it again.
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
from typing import Any

from amid_ds.cluster import slurm
from amid_ds.config.grid import Combination
from amid_ds.config.library import packaged_folder
from amid_ds.config.parse import dump_recipe, load_recipe, merge_overrides
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError
from amid_ds.plan import DEFAULT_DEVICE, find_device, fit_in_words
from amid_ds.run import attempts
from amid_ds.run.provenance import code_revision, uncommitted_changes
from amid_ds.training.job import check_recipe

CPUS_PER_RANK = RANKS_PER_NODE = 8      # where nobody says otherwise, as the templates have it


@dataclass(frozen=True)
class SubmitArgs:
    """What the command line asks for. `options`: sbatch's own, by name, such as time and partition."""

    template: str = "train"
    nodes: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    cpus_per_rank: int = CPUS_PER_RANK
    options: Mapping[str, str] | None = None
    chain: int = 1
    sweep: tuple[Combination, ...] = ()      # an array of jobs, one for each
    at_once: int = 0              # of a sweep; 0: all
    device: str | None = None     # that the run must fit, as plan has it; None: plan's default

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "chain"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}", "a number from 1 on", "mend it")
        if bool(self.sweep) != (self.template == "sweep"):
            raise InputError(f"the template {self.template} " + ("for a sweep" if self.sweep else "without --sweep"),
                             "--sweep KEY=VALUE,VALUE,... and the template sweep together", "add or drop --sweep")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def submit(recipe_path: str, overrides: Sequence[str], wish: SubmitArgs, dry_run: bool) -> None:
    """Check, keep copies, submit; the last line printed is the (last) job's id. A dry run prints the script alone."""
    template = find_template(wish.template).read_text(encoding="utf-8")
    recipe = _checked(recipe_path, overrides, wish)
    if wish.template != "prepare":      # of a dry run stdout is the script alone
        print(_fit(recipe, wish), file=sys.stderr if dry_run else sys.stdout, flush=True)
    folder = _next_folder(Path(recipe.output_dir) / "submissions")
    script = render(template, _values(recipe, wish))
    refuse_faults(script, made=Path(recipe.output_dir).resolve() / "logs")
    if dry_run:
        print(script, end="")
        return
    _keep(folder, recipe, merge_overrides(recipe_path, overrides) if wish.sweep else dump_recipe(recipe), script)
    arguments = [str(folder / "job.sbatch"), str(folder / "recipe.yaml")]
    (Path(recipe.output_dir) / "logs").mkdir(exist_ok=True)
    said = slurm.sbatch_test_only(arguments)
    jobs: list[str] = []
    for _ in range(wish.chain):
        dependency = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(slurm.sbatch([*dependency, *arguments]))
    attempts.append_event(Path(recipe.output_dir), "submitted", jobs=jobs, folder=str(folder))
    print(f"recipe, script and code revision are kept in {folder}\n{said}\n"
          f"logs: {Path(recipe.output_dir) / 'logs'}/, the job's in {jobs[0]}.log, the ranks' in {jobs[0]}-NODE.log\n"
          f"how it goes: amid-ds status {recipe.output_dir}")
    if len(jobs) > 1:
        print(f"a chain of {len(jobs)} jobs, one after the other: {' '.join(jobs)}")
    print(jobs[-1])


def _checked(recipe_path: str, overrides: Sequence[str], wish: SubmitArgs) -> Recipe:
    """The recipe, judged as `train` would on as many ranks, for each value of a sweep."""
    recipe = load_recipe(recipe_path, overrides)
    if wish.template == "prepare":
        check_recipe(recipe, recipe.tensor_parallel)
    elif not wish.sweep:
        check_recipe(recipe, wish.ranks)
    for run in wish.sweep:
        check_recipe(load_recipe(recipe_path, [*overrides, *run.overrides(recipe.output_dir)]), wish.ranks)
    return recipe


def _fit(recipe: Recipe, wish: SubmitArgs) -> str:
    device = find_device(wish.device or DEFAULT_DEVICE, wish.ranks_per_node)
    try:
        return fit_in_words(recipe, wish.nodes, wish.ranks_per_node, device)
    except InputError as error:      # a model that does not run on the meta device may still train
        return f"whether it fits cannot be told: {error.found}"


def find_template(name: str) -> Path:
    """One of ours by its name, or a file of the user's."""
    folder = packaged_folder("slurm")
    for path in (folder / f"{name}.sbatch", Path(name)):
        if path.is_file():
            return path
    ours = ", ".join(sorted(path.stem for path in folder.glob("*.sbatch")))
    raise InputError(f"the template {name} is not there", f"one of {ours}; or the path of a script of your own",
                     "check --template")


def _values(recipe: Recipe, wish: SubmitArgs) -> dict[str, str]:
    """What goes into the lines marked EDIT: sbatch's options by their names, the script's variables by theirs."""
    logs = Path(recipe.output_dir).resolve() / "logs"
    job = "%A_%a" if wish.sweep else "%j"
    per_task = wish.cpus_per_rank * (wish.ranks_per_node if wish.template == "train_deepspeed" else 1)
    values = {
        "nodes": str(wish.nodes), "ntasks-per-node": str(wish.ranks_per_node),
        "gpus-per-node": str(wish.ranks_per_node), "cpus-per-task": str(per_task),
        "output": shlex.quote(f"{logs}/{job}.log"), "NODE_LOG": shlex.quote(f"{logs}/{job}-%N.log"),
        "PYTHON": shlex.quote(sys.executable), "RANKS_PER_NODE": str(wish.ranks_per_node), **(wish.options or {})}
    if wish.chain > 1:
        values |= {"REQUEUE": "no", "requeue": ""}
    if wish.sweep:
        limit = f"%{wish.at_once}" if wish.at_once else ""
        settings = [shlex.join(run.overrides(recipe.output_dir)) for run in wish.sweep]
        values |= {"array": f"0-{len(wish.sweep) - 1}{limit}", "SETTINGS": f"({shlex.join(settings)})",
                   "RUNS": shlex.quote(recipe.output_dir)}
    return values


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with `values` in its lines marked EDIT. sbatch's options that have no line get one, where the
    template's own end; `requeue` turns the line of that name around."""
    lines, placed, last = [], set(), 0
    for line in template.splitlines():
        match = re.match(r"(#SBATCH --|(?:export )?)([\w-]+)=.*# EDIT", line)
        if match and match[2] in values:
            line = f"{match[1]}{match[2]}={values[match[2]]}"
            placed.add(match[2])
        elif line.strip() == "#SBATCH --requeue" and "requeue" in values:
            line = "#SBATCH --no-requeue"
        lines.append(line)
        if line.startswith("#SBATCH"):
            last = len(lines)
    extra = [name for name in values if name in SBATCH_OPTIONS and name not in placed]
    lines[last:last] = [f"#SBATCH --{name}={values[name]}" for name in extra]
    return "\n".join(lines) + "\n"


SBATCH_OPTIONS = ("time", "partition", "account", "qos", "signal")      # sbatch's own that `submit` passes on


def refuse_faults(script: str, made: Path) -> None:
    """Raise InputError for what `sbatch --test-only` does not see. `made` is a folder that will be there."""
    faults = list(_faults(script, made))
    if faults:
        lines = "\n".join(f"    - {fault}" for fault in faults)
        raise InputError(f"the batch script has {len(faults)} fault(s):\n{lines}",
                         "a script that bash and sbatch understand as it was meant",
                         "mend the template; amid-ds submit --dry-run shows the script")


def _faults(script: str, made: Path) -> Iterator[str]:
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if syntax.returncode:
        yield f"bash: {syntax.stderr.strip()}"
    if not script.startswith("#!"):
        yield "line 1: sbatch wants an interpreter there, such as #!/bin/bash"
    command = None
    for number, line in enumerate(script.splitlines(), 1):
        if line.startswith("#SBATCH"):
            if command is not None:
                yield f"line {number}: {line.strip()} comes after the first command (line {command}): sbatch ignores it"
            yield from (f"line {number}: {fault}" for fault in _missing_folder(line, made))
        elif command is None and line.strip() and not line.lstrip().startswith("#"):
            command = number


def _missing_folder(line: str, made: Path) -> Iterator[str]:
    """The folder of a log, or to work in, that is not there: the job would end without a trace."""
    for word in shlex.split(line, comments=False)[1:]:
        name, _, value = word.partition("=")
        folder = Path(value).parent if name in ("--output", "--error") else Path(value)
        if name in ("--output", "--error", "--chdir") and value and not folder.is_dir() and folder != made:
            yield f"the folder {folder} of {name} is not there"


def _next_folder(parent: Path) -> Path:
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdigit()] if parent.is_dir() else []
    return parent.resolve() / f"{max(taken, default=0) + 1:04d}"


def _keep(folder: Path, recipe: Recipe, copy: str, script: str) -> None:
    try:
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(copy, encoding="utf-8")
        (folder / "job.sbatch").write_text(script, encoding="utf-8")
        facts: dict[str, Any] = {"revision": code_revision(), "command": sys.argv}
        (folder / "code.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        changes = uncommitted_changes()
        if changes:
            (folder / "code.patch").write_text(changes, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the output folder {recipe.output_dir} cannot be written: {error}",
                         "a folder that can be written", "set output_dir to another folder") from None
