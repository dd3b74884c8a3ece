"""The command line: the only place that parses arguments and turns an outcome into an exit status.

Each command has two functions, side by side: `_add_X` declares its arguments, `_X` imports what it
needs and runs it. `errors.ExitStatus` has the exit statuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from amid_ds.distributed.launch import launched_rank
from amid_ds.distributed.rank_logging import set_up_logging
from amid_ds.errors import ExitStatus, InputError, Stopped, TrainingError, exit_status, report_error

if TYPE_CHECKING:
    from amid_ds.cluster.submit import SubmitArgs
    from amid_ds.config.grid import Combination

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = _parse(argv)
    set_up_logging()
    try:
        args.run(args)
    except (InputError, TrainingError, Stopped) as error:
        # The ranks have agreed on the error before it gets here, so one of them reports it.
        if launched_rank() == 0 and not isinstance(error, Stopped):
            report_error(error)
        return exit_status(error)
    except KeyboardInterrupt:
        return ExitStatus.FAILED
    return ExitStatus.DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments. Overrides `key=value` may follow options, which argparse rejects."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = [*getattr(args, "overrides", []), *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "amid-ds", description="Distil language models with the AMiD objective.")
    # The deepspeed launcher passes it to every rank.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_train, _add_plan, _add_prepare, _add_tokenizer, _add_demo, _add_study,
                _add_recipes, _add_eval, _add_generate, _add_checkpoints, _add_submit, _add_sweep,
                _add_status, _add_report, _add_doctor, _add_requeue, _add_bench, _add_export):
        add(commands)
    return parser


def _command(commands: Commands, run: Callable[[argparse.Namespace], None],
             description: str) -> argparse.ArgumentParser:
    """A parser for the command that `run` is named after: `_train` runs `amid-ds train`."""
    parser = commands.add_parser(run.__name__.removeprefix("_"), help=description)
    parser.set_defaults(run=run)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("recipe", nargs="?" if optional else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _add_train(commands: Commands) -> None:
    parser = _command(commands, _train, "distil by a recipe; resumes by itself")
    _add_recipe(parser)


def _train(args: argparse.Namespace) -> None:
    from amid_ds.training.train import train

    train(args.recipe, args.overrides)


def _add_plan(commands: Commands) -> None:
    parser = _command(commands, _plan, "a run's memory, time and network traffic, in advance")
    _add_recipe(parser, optional=True)
    parser.add_argument("--check", metavar="RUN", help="compare a past run's plan and measurements")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    parser.add_argument("--device", metavar="NAME", help="h100-80g (default), h200, a100-80g, cpu, "
                        "or {memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s}")
    parser.add_argument("--json", action="store_true")


def _plan(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.config.parse import load_recipe
    from amid_ds.planning.check import check_plan
    from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
    from amid_ds.planning.plan import make_plan
    from amid_ds.planning.report import print_check, print_plan

    if (args.recipe is None) == (args.check is None):
        raise InputError(f"the recipe {args.recipe} and the run {args.check}", "one of the two",
                         "amid-ds plan RECIPE, or amid-ds plan --check RUN")
    if args.check is not None:
        print_check(check_plan(Path(args.check), args.device), args.json)
        return
    recipe = load_recipe(args.recipe, args.overrides)
    device = find_device(args.device or DEFAULT_DEVICE, args.ranks_per_node)
    made = make_plan(recipe, args.nodes, args.ranks_per_node, device)
    print_plan(made, recipe, args.json)
    if not made.fits:
        raise TrainingError("the run does not fit")


def _add_prepare(commands: Commands) -> None:
    parser = _command(commands, _prepare, "tokenise and pack a recipe's data once")
    _add_recipe(parser)


def _prepare(args: argparse.Namespace) -> None:
    from amid_ds.config.parse import load_recipe
    from amid_ds.data import load_tokenizer, prepare_all
    from amid_ds.run.warm_start import resolve_student
    from amid_ds.training.rollout import check_prompt_lengths

    recipe = load_recipe(args.recipe, args.overrides)
    student = resolve_student(recipe)
    tokenizer = load_tokenizer(student.model, **student.hub_kwargs)
    prepare_all(recipe.data, recipe.train.seq_length, tokenizer, recipe.prepared_dir, verify=True)
    check_prompt_lengths(recipe)


def _add_tokenizer(commands: Commands) -> None:
    parser = _command(commands, _tokenizer, "train a tokenizer on a recipe's data")
    parser.add_argument("action", choices=["train"])
    parser.add_argument("recipe")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="V")
    parser.add_argument("--megabytes", type=float, default=500, metavar="M", help="of data to read")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _tokenizer(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.config.parse import load_recipe
    from amid_ds.data import sample_texts, train_sentencepiece

    data = load_recipe(args.recipe, args.overrides).data
    train_sentencepiece(sample_texts(data, int(args.megabytes * 1e6)), Path(args.out),
                        args.vocab_size)
    print(args.out)


def _add_demo(commands: Commands) -> None:
    parser = _command(commands, _demo, "the whole job on this machine, in minutes")
    parser.add_argument("--out", default="runs/demo", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)


def _demo(args: argparse.Namespace) -> None:
    from amid_ds.experiments.demo import demo

    demo(args.out, args.seed)


def _add_study(commands: Commands) -> None:
    parser = _command(commands, _study, "the paper's claims about α, tested on a CPU")
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="resumes there")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")


def _study(args: argparse.Namespace) -> None:
    from amid_ds.experiments.study import study

    study(args.out, args.seeds)


def _add_recipes(commands: Commands) -> None:
    parser = _command(commands, _recipes, "list or copy the packaged recipes")
    parser.add_argument("action", nargs="?", choices=["list", "copy"], default="list")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("out", nargs="?", metavar="PATH")


def _recipes(args: argparse.Namespace) -> None:
    from amid_ds.config.library import copy_recipe, list_recipes

    if args.action == "list":
        list_recipes()
    else:
        copy_recipe(args.name or "", args.out)


def _add_eval(commands: Commands) -> None:
    parser = _command(commands, _eval, "perplexity, divergence from a teacher, ROUGE-L")
    parser.add_argument("model")
    parser.add_argument("--teacher", metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--seq-length", type=int, default=512, metavar="L")
    parser.add_argument("--template", metavar="NAME", help="of the prompts: minillm or alpaca")
    parser.add_argument("--seeds", type=int, metavar="N", help="samples per prompt; default 5")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="per sample; default half of L")
    parser.add_argument("--json", action="store_true")


def _eval(args: argparse.Namespace) -> None:
    from amid_ds.eval.evaluate import EvalArgs, evaluate_command

    evaluate_command(EvalArgs(args.model, args.teacher, args.data, args.seq_length, args.template,
                              args.seeds, args.new_tokens), args.json)


def _add_generate(commands: Commands) -> None:
    parser = _command(commands, _generate, "a model's responses to prompts, to train on")
    parser.add_argument("source", metavar="RECIPE_OR_MODEL")
    parser.add_argument("--prompts", metavar="FILE", help="default: the recipe's data.train")
    parser.add_argument("--out", required=True, metavar="FILE", help="jsonl: prompt and response")
    parser.add_argument("--template", metavar="NAME", help="of the prompts: minillm or alpaca")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="0: the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts of a rank")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="default: the tokenizer's own")


def _generate(args: argparse.Namespace) -> None:
    from amid_ds.eval.generate import GenerateArgs, generate

    generate(GenerateArgs(**{name: value for name, value in vars(args).items()
                             if name in GenerateArgs.__dataclass_fields__}))


def _add_checkpoints(commands: Commands) -> None:
    parser = _command(commands, _checkpoints, "a run's checkpoints, verified")
    parser.add_argument("run_folder", metavar="RUN")


def _checkpoints(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.manifest import print_checkpoints

    print_checkpoints(args.run_folder)


def _add_submit(commands: Commands) -> None:
    parser = _command(commands, _submit, "check a recipe and submit it to Slurm")
    _add_recipe(parser)
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


def _add_sweep(commands: Commands) -> None:
    parser = _command(commands, _sweep, "one run per combination of values, and a table")
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


def _add_status(commands: Commands) -> None:
    parser = _command(commands, _status, "a run's state, step, speed, time left and last error")
    parser.add_argument("run_folder", nargs="?", metavar="RUN")


def _status(args: argparse.Namespace) -> None:
    from amid_ds.cluster.status import print_status

    print_status(args.run_folder)


def _add_report(commands: Commands) -> None:
    parser = _command(commands, _report, "a page about one or several runs")
    parser.add_argument("run_folders", nargs="+", metavar="RUN")
    parser.add_argument("-o", "--out", default="report.html", metavar="FILE")


def _report(args: argparse.Namespace) -> None:
    from amid_ds.experiments.report import report

    report(args.run_folders, args.out)


def _add_doctor(commands: Commands) -> None:
    parser = _command(commands, _doctor, "check environment, cluster and recipe; also under srun")
    _add_recipe(parser, optional=True)


def _doctor(args: argparse.Namespace) -> None:
    from amid_ds.cluster.doctor import doctor

    doctor(args.recipe, args.overrides)


def _add_requeue(commands: Commands) -> None:
    parser = _command(commands, _requeue, "for batch scripts: requeue, or explain why not")
    parser.add_argument("status", type=int, help="the exit status of srun")
    _add_recipe(parser)


def _requeue(args: argparse.Namespace) -> None:
    from amid_ds.cluster.requeue import requeue_or_explain

    requeue_or_explain(args.status, args.recipe, args.overrides)


def _add_bench(commands: Commands) -> None:
    parser = _command(commands, _bench, "measure against the alternatives, in one run")
    parser.add_argument("what", choices=["loss", "step", "data", "checkpoint"])
    parser.add_argument("--json", action="store_true")


def _bench(args: argparse.Namespace) -> None:
    from amid_ds.bench import checkpoint, data, loss, step

    {"loss": loss.bench_loss, "step": step.bench_step, "data": data.bench_data,
     "checkpoint": checkpoint.bench_checkpoint}[args.what](args.json)


def _add_export(commands: Commands) -> None:
    parser = _command(commands, _export, "a checkpoint or run, for from_pretrained")
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: as trained")
    parser.add_argument("--step", type=int, metavar="S", help="default: the newest valid one")


def _export(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.export import export

    print(export(args.source, args.out, args.dtype, args.step))
