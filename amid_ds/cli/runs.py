"""The commands about one run: train, plan, prepare, tasks, checkpoints, export, push, status,
report."""

from __future__ import annotations

import argparse

from amid_ds.cli.arguments import Commands, add_command, add_recipe, add_targets, add_trust
from amid_ds.errors import InputError, TrainingError


def add_train(commands: Commands) -> None:
    parser = add_command(commands, _train, "distil by a recipe; resumes by itself")
    add_recipe(parser)


def _train(args: argparse.Namespace) -> None:
    import time

    from amid_ds.distributed.streams import output_is_messages
    from amid_ds.run.start import process_age

    began = time.monotonic() - process_age()
    from amid_ds.cli.functions import train

    with output_is_messages():
        train(args.recipe, args.overrides, began=began)


def add_tasks(commands: Commands) -> None:
    parser = add_command(commands, _tasks, "eval_tasks of a run that its checkpoints wait for")
    parser.add_argument("run_folder", metavar="RUN")


def _tasks(args: argparse.Namespace) -> None:
    from amid_ds.eval.run_tasks import judge_run

    judge_run(args.run_folder)


def add_plan(commands: Commands) -> None:
    parser = add_command(commands, _plan, "a run's memory, time and network traffic, in advance")
    add_recipe(parser, optional=True)
    parser.add_argument("--check", metavar="RUN", help="compare a past run's plan and measurements")
    parser.add_argument("--paper-scale", action="store_true",
                        help="8B to 405B on 64 to 1,024 devices, with each placement")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    parser.add_argument("--device", metavar="NAME", help="h100-80g (default), h200, b200, "
                        "a100-80g, mi300x or another of amid_ds/planning/README.md, cpu, "
                        "or {memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s}")
    parser.add_argument("--storage", type=float, metavar="BYTES/S",
                        help="what a node reads of the file system; default 5e9")
    parser.add_argument("--cache", action="store_true", help="the size of what `cache` writes")
    add_targets(parser)
    parser.add_argument("--json", action="store_true")
    add_trust(parser)


def _plan(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.cli.functions import plan
    from amid_ds.config.parse import load_recipe
    from amid_ds.planning.check import check_plan
    from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
    from amid_ds.planning.paper_scale import print_paper_scale
    from amid_ds.planning.report import print_check, print_plan

    given = [name for name, value in (("a recipe", args.recipe), ("--check", args.check),
                                      ("--paper-scale", args.paper_scale)) if value]
    if len(given) != 1:
        raise InputError(f"amid-ds plan with {' and '.join(given) or 'nothing'}",
                         "one of RECIPE, --check RUN and --paper-scale", "leave the others out")
    kept = [f"--{name}" for name in ("topk", "sample", "exponent")
            if getattr(args, name) is not None]
    if (kept and not args.cache) or (args.cache and not args.recipe):
        raise InputError(" and ".join([*kept, "--cache"] if args.cache else kept)
                         + (" without a recipe" if args.cache else " without --cache"),
                         "RECIPE --cache, with what is kept", "add it, or leave them out")
    if args.paper_scale:
        print_paper_scale(find_device(args.device or DEFAULT_DEVICE, 1), args.json)
        return
    if args.check is not None:
        check = check_plan(Path(args.check), args.device, args.trust_remote_code)
        print_check(check, args.json)
        return
    if args.trust_remote_code:
        raise InputError("--trust-remote-code beside a recipe", "the recipe's own keys",
                         "set trust_remote_code: true in it, beside the model")
    if args.cache:
        _print_cache_size(args)
        return
    recipe = load_recipe(args.recipe, args.overrides)
    made = plan(recipe, nodes=args.nodes, ranks_per_node=args.ranks_per_node, device=args.device,
                storage=args.storage)
    print_plan(made, recipe, args.json)
    if not made.fits:
        raise TrainingError("the run does not fit")


def _print_cache_size(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from amid_ds.training.cache_plan import CacheArgs, cache_size

    size = cache_size(CacheArgs(args.recipe, args.overrides, None, args.topk, args.sample,
                                args.exponent))
    print(json.dumps(asdict(size)) if args.json else size)


def add_prepare(commands: Commands) -> None:
    parser = add_command(commands, _prepare, "tokenise and pack a recipe's data once")
    add_recipe(parser)


def _prepare(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.config.parse import load_recipe
    from amid_ds.data import load_tokenizer, prepare_all
    from amid_ds.run.folder import RunFolder
    from amid_ds.run.places import check_places
    from amid_ds.run.warm_start import resolve_student
    from amid_ds.training.rollout import check_prompt_lengths

    recipe = load_recipe(args.recipe, args.overrides)
    check_places(recipe)
    student = resolve_student(recipe)
    tokenizer = load_tokenizer(student.model, **student.hub_kwargs)
    prepare_all(recipe.data, recipe.train.seq_length, tokenizer, recipe.prepared_dir, verify=True,
                run_lease=RunFolder(Path(recipe.output_dir)).lease)
    check_prompt_lengths(recipe)


def add_checkpoints(commands: Commands) -> None:
    parser = add_command(commands, _checkpoints, "a run's checkpoints, verified")
    parser.add_argument("run_folder", metavar="RUN")


def _checkpoints(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.manifest import print_checkpoints

    print_checkpoints(args.run_folder)


def add_export(commands: Commands) -> None:
    parser = add_command(commands, _export, "a checkpoint or run, for from_pretrained")
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: as trained")
    parser.add_argument("--step", type=int, metavar="S", help="default: the newest valid one")
    parser.add_argument("--merge", action="store_true", help="of a run with student.lora: the "
                        "whole model instead of its adapters")
    parser.add_argument("--into", metavar="ORIGINAL", help="a copy of this multimodal folder, its "
                        "language part replaced by the run's")
    add_trust(parser)


def _export(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.export import export
    from amid_ds.checkpoint.into import export_into

    if args.into is not None:
        if args.dtype is not None:
            raise InputError("--dtype, and --into, which keeps the dtypes of its files",
                             "one of the two", "leave --dtype out")
        print(export_into(args.source, args.out, args.into, args.step, args.trust_remote_code,
                          args.merge))
        return
    print(export(args.source, args.out, args.dtype, args.step, args.trust_remote_code,
                 args.merge))


def add_push(commands: Commands) -> None:
    parser = add_command(commands, _push, "a run's model, or a model's folder, to the hub")
    parser.add_argument("source", metavar="MODEL_OR_RUN")
    parser.add_argument("repository", metavar="owner/name", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main; made if it is not "
                        "there")
    parser.add_argument("--license", metavar="ID", help="of the hub's list, as apache-2.0; "
                        "default: the card's")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, without a "
                        "network")


def _push(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.push import push

    push(args.source, args.repository, args.private, args.revision, args.license, args.dry_run)


def add_status(commands: Commands) -> None:
    parser = add_command(commands, _status, "a run's state, step, speed, time left and last error")
    parser.add_argument("run_folder", nargs="?", metavar="RUN")


def _status(args: argparse.Namespace) -> None:
    from amid_ds.cluster.status import print_status

    print_status(args.run_folder)


def add_report(commands: Commands) -> None:
    parser = add_command(commands, _report, "a page about one or several runs")
    parser.add_argument("run_folders", nargs="+", metavar="RUN")
    parser.add_argument("-o", "--out", default="report.html", metavar="FILE",
                        help="default report.html")
    parser.add_argument("--picture", metavar="PNG", help="also a picture of the evaluations, with "
                        "sample answers")
    add_trust(parser)


def _report(args: argparse.Namespace) -> None:
    from amid_ds.experiments.report import report

    report(args.run_folders, args.out, args.trust_remote_code, args.picture)
