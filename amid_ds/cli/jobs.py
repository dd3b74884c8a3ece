"""The commands about many runs and Slurm: submit, sweep, chain, reproduce, doctor, requeue."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from amid_ds.cli.arguments import Commands, add_command, add_recipe, add_targets
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amid_ds.cluster.submit import SubmitArgs
    from amid_ds.config.grid import Combination

# Options of `submit` and of `sweep --slurm` that mean nothing on this machine alone.
SLURM_OPTIONS = ("nodes", "cpus_per_rank", "at_once", "time", "partition", "account", "qos",
                 "signal", "device")


def add_submit(commands: Commands) -> None:
    parser = add_command(commands, _submit, "check a recipe and submit it to Slurm")
    add_recipe(parser)
    parser.add_argument("--template", metavar="NAME", help="train (default), train_deepspeed, "
                        "train_mpi, prepare, cache, sweep, or a file")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="of --template cache, "
                        "which write one folder together; and its options:")
    parser.add_argument("--out", metavar="DIR", help="default: beside the prepared data")
    add_targets(parser)
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs in sequence")
    parser.add_argument("--sweep", metavar="KEY=A,B,...", action="append", help="an array job")
    _add_sbatch_options(parser)


def _add_sbatch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="8 under Slurm, else 1")
    # Those of Slurm alone, None if they are not given: SLURM_OPTIONS.
    parser.add_argument("--nodes", type=int, metavar="N")
    parser.add_argument("--cpus-per-rank", type=int, metavar="C",
                        help="8, or fewer where the partition's nodes have fewer")
    parser.add_argument("--at-once", type=int, metavar="M", help="jobs of a sweep")
    for name in ("time", "partition", "account", "qos", "signal"):
        parser.add_argument(f"--{name}", help="sbatch's option of that name")
    parser.add_argument("--device", metavar="NAME", help="as in plan; default h100-80g")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def _add_where(parser: argparse.ArgumentParser, of_slurm: str) -> None:
    """Where many runs are made, and the options of Slurm. of_slurm: what --slurm submits."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="on this machine, in turn (default)")
    where.add_argument("--slurm", action="store_true", help=of_slurm)
    _add_sbatch_options(parser)


def _submit_args(args: argparse.Namespace, template: str, chain: int,
                 sweep: tuple[Combination, ...]) -> SubmitArgs:
    from amid_ds.cluster.batch_script import SBATCH_OPTIONS
    from amid_ds.cluster.submit import RANKS_PER_NODE, SubmitArgs

    chosen = vars(args)
    options = {name: chosen[name] for name in SBATCH_OPTIONS if chosen[name] is not None}
    return SubmitArgs(template=template, nodes=_given(args.nodes, 1),
                      ranks_per_node=_given(args.ranks_per_node, RANKS_PER_NODE),
                      cpus_per_rank=args.cpus_per_rank, options=options, chain=chain, sweep=sweep,
                      at_once=_given(args.at_once, 0), device=args.device)


def _ranks(args: argparse.Namespace) -> int:
    """The ranks of each of many runs. Raises InputError for none, and for Slurm's options without
    --slurm."""
    from amid_ds.cluster.submit import RANKS_PER_NODE

    if not args.slurm:
        _refuse_options(args, SLURM_OPTIONS, "without --slurm", "add --slurm, or leave them out")
    ranks_per_node = _given(args.ranks_per_node, RANKS_PER_NODE if args.slurm else 1)
    ranks = ranks_per_node * _given(args.nodes, 1)
    if ranks < 1:
        raise InputError(f"runs on {ranks} ranks", "1 rank or more",
                         "correct --nodes and --ranks-per-node")
    return ranks


def _given(number: int | None, default: int) -> int:
    return default if number is None else number


def _refuse_options(args: argparse.Namespace, names: Sequence[str], where: str,
                    remedy: str) -> None:
    """Raise InputError for those of these arguments that were given, where they have no effect."""
    # 0 is given too.
    given = [name for name in names
             if vars(args)[name] is not False and vars(args)[name] not in (None, [])]
    if given:
        options = ["key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
                   for name in given]
        raise InputError(f"{', '.join(options)} {where}", "options that have an effect", remedy)


def _submit(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from amid_ds.cluster.submit import submit
    from amid_ds.config.grid import sweep_combinations

    sweep = sweep_combinations(args.sweep) if args.sweep else ()
    template = args.template or ("sweep" if sweep else "train")
    cache = {name: value for name in ("out", "topk", "sample", "exponent")
             if (value := getattr(args, name)) is not None}
    submit_args = replace(_submit_args(args, template, args.chain, sweep), cache=cache,
                          jobs=args.jobs)
    submit(args.recipe, args.overrides, submit_args, args.dry_run)


def add_sweep(commands: Commands) -> None:
    parser = add_command(commands, _sweep, "one run per combination of values, and a table")
    parser.add_argument("recipe", metavar="RECIPE|FOLDER", help="a sweep's FOLDER: its table again")
    _add_where(parser, "an array of jobs")
    parser.add_argument("overrides", nargs="*", metavar="key=a,b,...")


def _sweep(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.cluster.submit import submit
    from amid_ds.experiments.sweep import plan_sweep, run_here, write_results

    if Path(args.recipe).is_dir():
        words = (*SLURM_OPTIONS, "ranks_per_node", "here", "slurm", "dry_run", "overrides")
        _refuse_options(args, words, "with a sweep's folder", "give the folder alone")
        write_results(Path(args.recipe))
        return
    ranks = _ranks(args)
    sweep = plan_sweep(args.recipe, args.overrides, ranks)
    unfinished = sweep.unfinished()
    if args.slurm and unfinished:
        submit(args.recipe, sweep.fixed, _submit_args(args, "sweep", 1, unfinished), args.dry_run)
    elif args.dry_run:
        print("\n".join(run.name for run in unfinished))
    else:
        run_here(sweep, ranks)
        write_results(sweep.folder)


def add_chain(commands: Commands) -> None:
    parser = add_command(commands, _chain, "runs of which each one's student teaches the next")
    parser.add_argument("chain", metavar="CHAIN", help="a YAML file: base, output_dir, chain")
    _add_where(parser, "a job for each link, in sequence")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all links")


def _chain(args: argparse.Namespace) -> None:
    from amid_ds.experiments.chain import plan_chain, run_chain, submit_chain

    ranks = _ranks(args)
    chain = plan_chain(args.chain, args.overrides, ranks)
    if args.slurm and chain.unfinished:
        submit_chain(chain, _submit_args(args, "train", 1, ()), args.dry_run)
    elif args.dry_run:
        print("\n".join(link.name for link in chain.unfinished))
    else:
        run_chain(chain, ranks)


def add_reproduce(commands: Commands) -> None:
    parser = add_command(commands, _reproduce, "a published row: train, select, evaluate, compare")
    parser.add_argument("name", metavar="NAME", help="of a row, such as amid, abkd or gkd")
    parser.add_argument("--models", required=True, metavar="DIR", help="the authors' models")
    parser.add_argument("--data", required=True, metavar="DIR", help="the authors' sets")
    parser.add_argument("--seeds", metavar="A,B,...", help="of the samples; default the published")
    parser.add_argument("--out", metavar="DIR", help="default runs/reproduce/NAME; resumes there")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _reproduce(args: argparse.Namespace) -> None:
    from amid_ds.experiments.reproduce import ReproduceArgs, reproduce

    reproduce(ReproduceArgs(args.name, args.models, args.data, args.seeds, args.out,
                            args.ranks_per_node, args.overrides))


def add_doctor(commands: Commands) -> None:
    parser = add_command(commands, _doctor,
                         "check environment, cluster and recipe; also under srun")
    add_recipe(parser, optional=True)


def _doctor(args: argparse.Namespace) -> None:
    from amid_ds.cluster.doctor import doctor

    doctor(args.recipe, args.overrides)


def add_requeue(commands: Commands) -> None:
    parser = add_command(commands, _requeue, "for batch scripts: requeue, or explain why not")
    parser.add_argument("status", type=int, help="the exit status of srun")
    add_recipe(parser)


def _requeue(args: argparse.Namespace) -> None:
    from amid_ds.cluster.requeue import requeue_or_explain

    requeue_or_explain(args.status, args.recipe, args.overrides)
