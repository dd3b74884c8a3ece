"""The commands that bring their own models and data: recipes, demo, study, bench."""

from __future__ import annotations

import argparse

from amid_ds.cli.arguments import Commands, add_command


def add_recipes(commands: Commands) -> None:
    parser = add_command(commands, _recipes, "list or copy the packaged recipes")
    parser.add_argument("action", nargs="?", choices=["list", "copy"], default="list")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("out", nargs="?", metavar="PATH")


def _recipes(args: argparse.Namespace) -> None:
    from amid_ds.config.library import copy_recipe, list_recipes

    if args.action == "list":
        list_recipes()
    else:
        copy_recipe(args.name or "", args.out)


def add_demo(commands: Commands) -> None:
    parser = add_command(commands, _demo, "the whole job on this machine, in minutes")
    parser.add_argument("--out", default="runs/demo", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)


def _demo(args: argparse.Namespace) -> None:
    from amid_ds.experiments.demo import demo

    demo(args.out, args.seed)


def add_study(commands: Commands) -> None:
    parser = add_command(commands, _study, "the paper's claims about α, tested on a CPU")
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="resumes there")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")


def _study(args: argparse.Namespace) -> None:
    from amid_ds.experiments.study import study

    study(args.out, args.seeds)


def add_bench(commands: Commands) -> None:
    parser = add_command(commands, _bench, "measure against the alternatives, in one run")
    parser.add_argument("what", choices=["loss", "step", "data", "checkpoint"])
    parser.add_argument("--json", action="store_true")


def _bench(args: argparse.Namespace) -> None:
    from amid_ds.bench import checkpoint, data, loss, step

    {"loss": loss.bench_loss, "step": step.bench_step, "data": data.bench_data,
     "checkpoint": checkpoint.bench_checkpoint}[args.what](args.json)
