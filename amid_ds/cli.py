"""The command line: the only place that parses arguments, and where what happened becomes an exit status.

0 done · 2 the input is wrong (one message) · 75 stopped in good order, start it again · 1 anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amid_ds.distributed.rank_logging import set_up_logging
from amid_ds.distributed.rendezvous import launched_rank
from amid_ds.errors import ExitStatus, InputError, Stopped, TrainingError, exit_status, report_error

if TYPE_CHECKING:
    from amid_ds.cluster.submit import SubmitArgs
    from amid_ds.config.grid import Combination


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
    """argparse takes key=value before the options alone; here they may follow them too."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("amid-ds", description="Distil language models with the AMiD objective.")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)   # the deepspeed launcher's
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="distil (or, without a teacher, train) by a recipe; resumes by itself")
    train.add_argument("recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="does a run fit, how long does it take, what crosses the network")
    plan.add_argument("recipe", nargs="?")
    plan.add_argument("--check", metavar="RUN", help="instead: prediction beside measurement for a run that was made")
    plan.add_argument("--nodes", type=int, default=1, metavar="N")
    plan.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    plan.add_argument("--device", metavar="NAME", help="h100-80g (the default; of a run: its own), h200, a100-80g, "
                      "cpu, or {memory: BYTES, flops: FLOP/s, bandwidth: BYTES/s}")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.set_defaults(run=_plan)

    prepare = commands.add_parser("prepare", help="tokenise and pack a recipe's data once")
    prepare.add_argument("recipe")
    prepare.add_argument("overrides", nargs="*", metavar="key=value")
    prepare.set_defaults(run=_prepare)

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer on a recipe's data")
    tokenizer.add_argument("action", choices=["train"])
    tokenizer.add_argument("recipe")
    tokenizer.add_argument("out", metavar="OUT")
    tokenizer.add_argument("--vocab-size", type=int, default=32000, metavar="V")
    tokenizer.add_argument("--megabytes", type=float, default=500, metavar="M", help="how much of the data to read")
    tokenizer.add_argument("overrides", nargs="*", metavar="key=value")
    tokenizer.set_defaults(run=_tokenizer)

    demo = commands.add_parser("demo", help="the whole job on this machine, without a network")
    demo.add_argument("--out", default="runs/demo", metavar="DIR")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    study = commands.add_parser("study", help="does the method do what its paper says? on this machine's CPU")
    study.add_argument("--out", default="runs/study", metavar="DIR", help="where it is done, and goes on if it was cut")
    study.add_argument("--seeds", type=int, default=3, metavar="N")
    study.set_defaults(run=_study)

    recipes = commands.add_parser("recipes", help="the recipes that come with the package")
    recipes.add_argument("action", nargs="?", choices=["list", "copy"], default="list")
    recipes.add_argument("name", nargs="?", metavar="NAME")
    recipes.add_argument("out", nargs="?", metavar="PATH")
    recipes.set_defaults(run=_recipes)

    evaluate = commands.add_parser("eval", help="perplexity, distance to a teacher, ROUGE-L of generations")
    evaluate.add_argument("model")
    evaluate.add_argument("--teacher", metavar="MODEL")
    evaluate.add_argument("--data", required=True, metavar="FILE")
    evaluate.add_argument("--seq-length", type=int, default=512, metavar="L")
    evaluate.add_argument("--template", metavar="NAME", help="the prompts of instruction and input: minillm or alpaca")
    evaluate.add_argument("--seeds", type=int, metavar="N", help="samples of each prompt; 5 where there are prompts")
    evaluate.add_argument("--new-tokens", type=int, metavar="N", help="in a sample, at most; half of L")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=_eval)

    generate = commands.add_parser("generate", help="a model's answers to prompts, to train on: a recipe's teacher's, "
                                   "or another model's; carries on by itself; also under a launcher")
    generate.add_argument("source", metavar="RECIPE_OR_MODEL")
    generate.add_argument("--prompts", metavar="FILE", help="rows with `prompt`, or what --template makes one of; "
                          "default: the recipe's data.train")
    generate.add_argument("--out", required=True, metavar="FILE", help="jsonl of `prompt` and `response`")
    generate.add_argument("--template", metavar="NAME", help="prompts from `instruction` and `input`")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the most probable token")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts that a rank answers at once")
    generate.add_argument("--end-of-text", metavar="TOKEN", help="default: the tokenizer's own")
    generate.set_defaults(run=_generate)

    checkpoints = commands.add_parser("checkpoints", help="a run's checkpoints, each with its verdict")
    checkpoints.add_argument("run_folder", metavar="RUN")
    checkpoints.set_defaults(run=_checkpoints)

    submit = commands.add_parser("submit", help="check a recipe, make a batch script of a template, give it to Slurm")
    submit.add_argument("recipe")
    submit.add_argument("--template", metavar="NAME", help="train (the default), train_deepspeed, train_mpi, prepare, "
                        "sweep, or a file")
    submit.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before, instead "
                        "of starting the job again")
    submit.add_argument("--sweep", metavar="KEY=A,B,...", action="append", help="an array of jobs, one per value")
    _add_sbatch_options(submit)
    submit.add_argument("overrides", nargs="*", metavar="key=value")
    submit.set_defaults(run=_submit)

    sweep = commands.add_parser("sweep", help="a recipe for each combination of values; a table and figures of them")
    sweep.add_argument("recipe", metavar="RECIPE|FOLDER", help="a recipe; or a sweep's folder: its table again")
    where = sweep.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="one after another on this machine (the default)")
    where.add_argument("--slurm", action="store_true", help="an array of jobs")
    _add_sbatch_options(sweep)
    sweep.add_argument("overrides", nargs="*", metavar="key=a,b,...")
    sweep.set_defaults(run=_sweep)

    status = commands.add_parser("status", help="how a run goes")
    status.add_argument("run_folder", nargs="?", metavar="RUN")
    status.set_defaults(run=_status)

    report = commands.add_parser("report", help="a page about one run or several: curves, times, memory, evaluations")
    report.add_argument("run_folders", nargs="+", metavar="RUN")
    report.add_argument("-o", "--out", default="report.html", metavar="FILE")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="is this environment, cluster and recipe fit to run? also under srun")
    doctor.add_argument("recipe", nargs="?")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.set_defaults(run=_doctor)

    requeue = commands.add_parser("requeue", help="for batch scripts: start the job again, or say why not")
    requeue.add_argument("status", type=int, help="the exit status of srun")
    requeue.add_argument("recipe")
    requeue.add_argument("overrides", nargs="*", metavar="key=value")
    requeue.set_defaults(run=_requeue)

    bench = commands.add_parser("bench", help="measure against the alternatives, in one run")
    bench.add_argument("what", choices=["loss", "step", "data", "checkpoint"])
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)

    export = commands.add_parser("export", help="a checkpoint or run to a folder that from_pretrained opens")
    export.add_argument("source", metavar="CHECKPOINT_OR_RUN")
    export.add_argument("out", metavar="OUT")
    export.add_argument("--dtype", choices=["bf16", "fp32"], help="default: what the student trained in")
    export.add_argument("--step", type=int, metavar="S", help="which checkpoint of a run; default: its newest good one")
    export.set_defaults(run=_export)
    return parser


def _add_sbatch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="one per GPU: 8 under Slurm, else 1")
    parser.add_argument("--cpus-per-rank", type=int, default=8, metavar="C")
    parser.add_argument("--at-once", type=int, default=0, metavar="M", help="of a sweep's jobs, run M at a time")
    for name in ("time", "partition", "account", "qos", "signal"):
        parser.add_argument(f"--{name}", help="as sbatch has it")
    parser.add_argument("--device", metavar="NAME", help="as plan has it: what a run must fit, h100-80g by default")
    parser.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")


def _train(args: argparse.Namespace) -> None:
    from amid_ds.training.train import train

    train(args.recipe, args.overrides)


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
    made = make_plan(recipe, args.nodes, args.ranks_per_node,
                     find_device(args.device or DEFAULT_DEVICE, args.ranks_per_node))
    print_plan(made, recipe, args.json)
    if not made.fits:
        raise TrainingError("the run does not fit")


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


def _tokenizer(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.config.parse import load_recipe
    from amid_ds.data import sample_texts, train_sentencepiece

    data = load_recipe(args.recipe, args.overrides).data
    train_sentencepiece(sample_texts(data, int(args.megabytes * 1e6)), Path(args.out), args.vocab_size)
    print(args.out)


def _demo(args: argparse.Namespace) -> None:
    from amid_ds.experiments.demo import demo

    demo(args.out, args.seed)


def _study(args: argparse.Namespace) -> None:
    from amid_ds.experiments.study import study

    study(args.out, args.seeds)


def _recipes(args: argparse.Namespace) -> None:
    from amid_ds.config.library import copy_recipe, list_recipes

    if args.action == "list":
        list_recipes()
    else:
        copy_recipe(args.name or "", args.out)


def _eval(args: argparse.Namespace) -> None:
    from amid_ds.eval.evaluate import EvalArgs, evaluate_command

    evaluate_command(EvalArgs(args.model, args.teacher, args.data, args.seq_length, args.template, args.seeds,
                              args.new_tokens), args.json)


def _generate(args: argparse.Namespace) -> None:
    from amid_ds.eval.generate import GenerateArgs, generate

    generate(GenerateArgs(**{name: value for name, value in vars(args).items()
                             if name in GenerateArgs.__dataclass_fields__}))


def _bench(args: argparse.Namespace) -> None:
    from amid_ds.bench import checkpoint, data, loss, step

    {"loss": loss.bench_loss, "step": step.bench_step, "data": data.bench_data,
     "checkpoint": checkpoint.bench_checkpoint}[args.what](args.json)


def _checkpoints(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.manifest import print_checkpoints

    print_checkpoints(args.run_folder)


def _submit(args: argparse.Namespace) -> None:
    from amid_ds.cluster.submit import submit
    from amid_ds.config.grid import sweep_combinations

    sweep = sweep_combinations(args.sweep) if args.sweep else ()
    wish = _wish(args, args.template or ("sweep" if sweep else "train"), args.chain, sweep)
    submit(args.recipe, args.overrides, wish, args.dry_run)


def _wish(args: argparse.Namespace, template: str, chain: int, sweep: tuple[Combination, ...]) -> SubmitArgs:
    from amid_ds.cluster.submit import OPTIONS, RANKS_PER_NODE, SubmitArgs

    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    return SubmitArgs(template, args.nodes, args.ranks_per_node or RANKS_PER_NODE, args.cpus_per_rank, options, chain, sweep,
                args.at_once, args.device)


def _sweep(args: argparse.Namespace) -> None:
    from pathlib import Path

    from amid_ds.cluster.submit import RANKS_PER_NODE, submit
    from amid_ds.experiments.plots import require_matplotlib
    from amid_ds.experiments.sweep import plan_sweep, run_here, write_results

    if Path(args.recipe).is_dir():
        write_results(Path(args.recipe))
        return
    if args.nodes != 1 and not args.slurm:
        raise InputError(f"--nodes {args.nodes} without --slurm", "one node: the runs are made on this machine",
                         "add --slurm, or leave --nodes out")
    require_matplotlib()      # or say now that it is missing, not after the runs
    ranks = (args.ranks_per_node or (RANKS_PER_NODE if args.slurm else 1)) * args.nodes
    sweep = plan_sweep(args.recipe, args.overrides, ranks)
    unfinished = sweep.unfinished()
    if args.slurm and unfinished:
        submit(args.recipe, sweep.fixed, _wish(args, "sweep", 1, unfinished), args.dry_run)
    elif args.dry_run:
        print("\n".join(run.name for run in unfinished))
    else:
        run_here(sweep, ranks)
        write_results(sweep.folder)


def _status(args: argparse.Namespace) -> None:
    from amid_ds.cluster.status import print_status

    print_status(args.run_folder)


def _report(args: argparse.Namespace) -> None:
    from amid_ds.experiments.report import report

    report(args.run_folders, args.out)


def _doctor(args: argparse.Namespace) -> None:
    from amid_ds.cluster.doctor import doctor

    doctor(args.recipe, args.overrides)


def _requeue(args: argparse.Namespace) -> None:
    from amid_ds.cluster.requeue import requeue_or_explain

    requeue_or_explain(args.status, args.recipe, args.overrides)


def _export(args: argparse.Namespace) -> None:
    from amid_ds.checkpoint.export import export

    print(export(args.source, args.out, args.dtype, args.step))
