"""The commands about many runs and Slurm: submit, sweep, doctor, requeue."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from amid_ds.cli.arguments import Commands, add_command, add_recipe
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from amid_ds.cluster.submit import SubmitArgs
    from amid_ds.config.grid import Combination


def add_submit(commands: Commands) -> None:
    parser = add_command(commands, _submit, "check a recipe and submit it to Slurm")
    add_recipe(parser)
    parser.add_argument("--template", metavar="NAME", help="train (default), train_deepspeed, "
                        "train_mpi, prepare, sweep, or a file")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs in sequence")
    parser.add_argument("--sweep", metavar="KEY=A,B,...", action="append", help="an array job")
    _add_sbatch_options(parser)


def _add_sbatch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="8 under Slurm, else 1")
    parser.add_argument("--cpus-per-rank", type=int, default=8, metavar="C")
    parser.add_argument("--at-once", type=int, default=0, metavar="M", help="jobs of a sweep")
    for name in ("time", "partition", "account", "qos", "signal"):
        parser.add_argument(f"--{name}", help="sbatch's option of that name")
    parser.add_argument("--device", metavar="NAME", help="as in plan; default h100-80g")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def _submit_args(args: argparse.Namespace, template: str, chain: int,
                 sweep: tuple[Combination, ...]) -> SubmitArgs:
    from amid_ds.cluster.submit import RANKS_PER_NODE, SBATCH_OPTIONS, SubmitArgs

    chosen = vars(args)
    options = {name: chosen[name] for name in SBATCH_OPTIONS if chosen[name] is not None}
    return SubmitArgs(template=template, nodes=args.nodes,
                      ranks_per_node=args.ranks_per_node or RANKS_PER_NODE,
                      cpus_per_rank=args.cpus_per_rank, options=options, chain=chain, sweep=sweep,
                      at_once=args.at_once, device=args.device)


def _submit(args: argparse.Namespace) -> None:
    from amid_ds.cluster.submit import submit
    from amid_ds.config.grid import sweep_combinations

    sweep = sweep_combinations(args.sweep) if args.sweep else ()
    template = args.template or ("sweep" if sweep else "train")
    submit_args = _submit_args(args, template, args.chain, sweep)
    submit(args.recipe, args.overrides, submit_args, args.dry_run)


def add_sweep(commands: Commands) -> None:
    parser = add_command(commands, _sweep, "one run per combination of values, and a table")
    parser.add_argument("recipe", metavar="RECIPE|FOLDER", help="a sweep's FOLDER: its table again")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="on this machine, in turn (default)")
    where.add_argument("--slurm", action="store_true", help="an array of jobs")
    _add_sbatch_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=a,b,...")


def _sweep(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.cluster.submit import RANKS_PER_NODE, submit
    from amid_ds.experiments.sweep import plan_sweep, run_here, write_results

    if Path(args.recipe).is_dir():
        write_results(Path(args.recipe))
        return
    if args.nodes != 1 and not args.slurm:
        raise InputError(f"--nodes {args.nodes} without --slurm", "one node: this machine",
                         "add --slurm, or leave --nodes out")
    ranks = (args.ranks_per_node or (RANKS_PER_NODE if args.slurm else 1)) * args.nodes
    sweep = plan_sweep(args.recipe, args.overrides, ranks)
    unfinished = sweep.unfinished()
    if args.slurm and unfinished:
        submit(args.recipe, sweep.fixed, _submit_args(args, "sweep", 1, unfinished), args.dry_run)
    elif args.dry_run:
        print("\n".join(run.name for run in unfinished))
    else:
        run_here(sweep, ranks)
        write_results(sweep.folder)


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
