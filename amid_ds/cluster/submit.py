"""`amid-ds submit`: a recipe and a template become a Slurm job, or a message that says why not.

Everything that can be checked before hours in a queue is checked here: the recipe as `train` does,
the job by `sbatch --test-only`, and the script for faults that this does not report. Recipe, script
and the code's revision are kept in the run's folder and the copy is submitted, so later edits do
not change the job. A sweep's jobs override the recipe, and a resolved recipe accepts fewer
overrides than its file (its defaults look like choices), so theirs is kept unresolved. The code is
not copied: the revision and a patch of uncommitted changes identify it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.cluster import slurm
from amid_ds.cluster.batch_script import log_pattern, read_template, refuse_faults, render
from amid_ds.config.grid import Combination
from amid_ds.config.parse import dump_recipe, load_recipe, merge_overrides
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError, printable
from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
from amid_ds.planning.report import fit_summary
from amid_ds.run import attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.provenance import code_revision, uncommitted_changes
from amid_ds.training.cache_plan import CacheArgs, check_cache, load_cache_recipe
from amid_ds.training.job import check_recipe

# Defaults, as in the templates; fewer CPUs where the partition's nodes have fewer.
CPUS_PER_RANK = 8
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class SubmitArgs:
    """Validated arguments of `submit`. Bad values raise InputError.

    cpus_per_rank: None: as many as the nodes have, CPUS_PER_RANK at most. options: sbatch's own, by
    name. sweep: an array of jobs, one per combination, `at_once` of them at a time (0: all).
    device: the one that the run must fit, as in `plan`; None: its default. cache: for the
    template cache, arguments of CacheArgs by name; jobs: of its array. after: a job without whose
    success this one does not begin.
    """

    template: str = "train"
    nodes: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    cpus_per_rank: int | None = None
    options: Mapping[str, str] | None = None
    chain: int = 1
    sweep: tuple[Combination, ...] = ()
    at_once: int = 0
    device: str | None = None
    cache: Mapping[str, str | int | float] | None = None
    jobs: int = 1
    after: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "chain", "jobs"):
            number = getattr(self, name)
            if number is not None and number < 1:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {number}", "a number from 1 on", f"correct {option}")
        if bool(self.sweep) != (self.template == "sweep"):
            conflict = "for a sweep" if self.sweep else "without --sweep"
            raise InputError(f"the template {self.template} {conflict}",
                             "--sweep KEY=VALUE,VALUE,... and the template sweep together",
                             "add or drop --sweep")
        if (self.cache or self.jobs > 1) and self.template != "cache":
            given = " ".join(self.cache_words) or f"--jobs {self.jobs}"
            raise InputError(f"{given} with the template {self.template}",
                             "--template cache beside its options", "add it, or leave them out")
        if self.at_once < 0 or (self.at_once and not self.sweep):
            conflict = "" if self.sweep else " without --sweep"
            raise InputError(f"--at-once {self.at_once}{conflict}",
                             "the number of a sweep's jobs that run at once, 0 for all",
                             "correct or drop --at-once")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cache_words(self) -> list[str]:
        """The options of `amid-ds cache`, as on a command line."""
        return [word for name, value in (self.cache or {}).items()
                for word in (f"--{name}", str(value))]


def submit(recipe_path: str, overrides: Sequence[str], args: SubmitArgs, dry_run: bool,
           checked: Recipe | None = None) -> str | None:
    """Check, keep copies and submit; the (last) job's id is printed last, and returned.

    A dry run prints the script alone on stdout, and returns None. checked: a recipe of the same
    costs that has been checked in the place of this one, whose teacher is yet to be trained.
    """
    template = read_template(args.template)
    recipe = (_checked_recipe(recipe_path, overrides, args) if checked is None
              else load_recipe(recipe_path, overrides))
    run = RunFolder(Path(recipe.output_dir))
    if args.template not in ("prepare", "cache"):
        print(_fit(checked or recipe, args), file=sys.stderr if dry_run else sys.stdout, flush=True)
    script = render(template, _template_values(recipe, template, args))
    refuse_faults(script, new_folder=run.logs.absolute())
    if dry_run:
        print(script, end="")
        return None
    kept = merge_overrides(recipe_path, overrides) if args.sweep else dump_recipe(recipe)
    folder = _keep_copies(run, kept, script)
    sbatch_arguments = [str(folder / "job.sbatch"), str(folder / "recipe.yaml")]
    estimate = slurm.sbatch_test_only(sbatch_arguments)
    jobs = _submit_chain(sbatch_arguments, args)
    attempts.append_event(run.path, "submitted", jobs=jobs, folder=str(folder))
    # A user's own template may have no line for the logs, where an odd name would be refused.
    print(printable(
        f"recipe, script and code revision are kept in {folder}\n{estimate}\n"
        f"logs: {run.logs}/, the job's in {jobs[0]}.log, the ranks' in {jobs[0]}-NODE.log\n"
        f"how it goes: amid-ds status {shlex.quote(recipe.output_dir)}"))
    if len(jobs) > 1:
        print(f"a chain of {len(jobs)} jobs, one after the other: {' '.join(jobs)}")
    print(jobs[-1])
    return jobs[-1]


def _submit_chain(sbatch_arguments: Sequence[str], args: SubmitArgs) -> list[str]:
    """The ids of args.chain jobs, each of which begins after the one before has ended.

    The first after the success of `args.after`; without it Slurm cancels the job.
    """
    jobs: list[str] = []
    first = ([] if args.after is None else
             [f"--dependency=afterok:{args.after}", "--kill-on-invalid-dep=yes"])
    for _ in range(args.chain):
        dependency = [f"--dependency=afterany:{jobs[-1]}"] if jobs else first
        jobs.append(slurm.sbatch([*dependency, *sbatch_arguments]))
    return jobs


def _checked_recipe(recipe_path: str, overrides: Sequence[str], args: SubmitArgs) -> Recipe:
    """The recipe, checked as `train` does on that number of ranks, for each job of a sweep."""
    recipe = load_recipe(recipe_path, overrides)
    if args.template == "prepare":
        # The least number of ranks that the recipe can be trained on.
        over = 1 if recipe.live_teacher is None else recipe.live_teacher.shard_over or 1
        check_recipe(recipe, recipe.tensor_parallel * over)
    elif args.template == "cache":
        own: Mapping[str, Any] = args.cache or {}
        cache_args = CacheArgs(recipe_path, overrides, **own)
        check_cache(cache_args, load_cache_recipe(cache_args), args.ranks)
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


def _template_values(recipe: Recipe, template: str,
                     args: SubmitArgs) -> dict[str, str | Sequence[str]]:
    """Values for the lines marked EDIT: sbatch's options and the script's variables, by name."""
    logs = RunFolder(Path(recipe.output_dir)).logs.absolute()
    log_name = "%A_%a" if args.sweep or args.template == "cache" else "%j"
    values: dict[str, str | Sequence[str]] = {
        "nodes": str(args.nodes),
        "ntasks-per-node": str(args.ranks_per_node),
        "gpus-per-node": str(args.ranks_per_node),
        "cpus-per-task": str(_cpus_per_task(template, args)),
        "output": log_pattern(logs, f"{log_name}.log"),
        "NODE_LOG": log_pattern(logs, f"{log_name}-%N.log"),
        "PYTHON": sys.executable,
        "RANKS_PER_NODE": str(args.ranks_per_node),
        **(args.options or {}),
    }
    if args.chain > 1:
        values |= {"REQUEUE": "no", "requeue": ""}
    if args.template == "cache":
        values |= {"array": f"0-{args.jobs - 1}", "OPTIONS": args.cache_words}
    if args.sweep:
        limit = f"%{args.at_once}" if args.at_once else ""
        # The script splits each again, as a shell splits a command line.
        settings = [shlex.join(combination.overrides(recipe.output_dir))
                    for combination in args.sweep]
        values |= {"array": f"0-{len(args.sweep) - 1}{limit}", "SETTINGS": settings,
                   "RUNS": recipe.output_dir}
    return values


def _cpus_per_task(template: str, args: SubmitArgs) -> int:
    """The CPUs of a rank, or of the launcher of a node's ranks, or of the one that prepares."""
    ranks_per_task = args.ranks_per_node if args.template == "train_deepspeed" else 1
    if args.cpus_per_rank is not None:
        return args.cpus_per_rank * ranks_per_task
    # As sbatch chooses: its variable overrides the script.
    options = args.options or {}
    partition = os.environ.get("SBATCH_PARTITION") or options.get("partition")
    if partition is None and (line := re.search(r"^#SBATCH (?:--partition[= ]|-p ?)(\S+)",
                                                template, re.M)):
        partition = line[1]
    of_node = slurm.cpus_of_nodes(args.nodes, partition)
    if of_node is None:
        return CPUS_PER_RANK * ranks_per_task
    ranks_of_node = 1 if args.template == "prepare" else args.ranks_per_node
    return max(1, min(CPUS_PER_RANK, of_node // ranks_of_node)) * ranks_per_task


def _keep_copies(run: RunFolder, recipe: str, script: str) -> Path:
    """Make the folder of logs and that of this submission, submissions/0001, 0002, ...; the latter.

    Two submissions at the same time get two folders.
    """
    code = json.dumps({"revision": code_revision(), "command": sys.argv}, indent=1)
    files = {"recipe.yaml": recipe, "job.sbatch": script, "code.json": code + "\n"}
    changes = uncommitted_changes()
    if changes:
        files["code.patch"] = changes
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        run.submissions.mkdir(exist_ok=True)
        folder = _new_submission(run.submissions.resolve())
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the output folder {run.path} cannot be written: {error}",
                         "a folder that can be written",
                         "set output_dir to another folder") from None
    return folder


def _new_submission(submissions: Path) -> Path:
    last = max((int(path.name) for path in submissions.iterdir() if path.name.isdecimal()),
               default=0)
    for number in itertools.count(last + 1):
        try:
            (submissions / f"{number:04d}").mkdir()
            break
        except FileExistsError:
            continue
    return submissions / f"{number:04d}"
