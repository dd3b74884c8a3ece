"""The commands that bring what they need: recipes, demo, study, bench, completion."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from amid_ds.cli.arguments import Commands, add_command
from amid_ds.errors import InputError


def add_recipes(commands: Commands) -> None:
    parser = add_command(commands, _recipes, "list, copy or write recipes; their schema")
    actions = parser.add_subparsers(metavar="ACTION")
    add_command(actions, _recipes_list, "the packaged recipes (what `recipes` alone does)")
    copy = add_command(actions, _recipes_copy, "copy a packaged recipe, to read and change")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("out", nargs="?", metavar="PATH", help="a file or folder; default NAME.yaml")
    new = add_command(actions, _recipes_new, "write a recipe from the answers to five questions")
    new.add_argument("path", nargs="?", default="distil.yaml", metavar="PATH",
                     help="default distil.yaml; must not be there yet")
    add_command(actions, _recipes_schema, "the recipe's JSON Schema, for editors")


def _recipes(args: argparse.Namespace) -> None:
    from amid_ds.config.library import list_recipes

    list_recipes()


def _recipes_list(args: argparse.Namespace) -> None:
    _recipes(args)


def _recipes_copy(args: argparse.Namespace) -> None:
    from amid_ds.config.library import copy_recipe

    copy_recipe(args.name, args.out)


def _recipes_new(args: argparse.Namespace) -> None:
    from amid_ds.cli.new_recipe import new_recipe

    new_recipe(args.path)


def _recipes_schema(args: argparse.Namespace) -> None:
    import json

    from amid_ds.config.recipe_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def add_demo(commands: Commands) -> None:
    parser = add_command(commands, _demo, "the whole job on this machine, in minutes")
    parser.add_argument("--out", default="runs/demo", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)


def _demo(args: argparse.Namespace) -> None:
    from amid_ds.experiments.demo import demo

    demo(args.out, args.seed)


def add_study(commands: Commands) -> None:
    parser = add_command(commands, _study, "claims about α, pruning and caches, tested on a CPU")
    parser.add_argument("what", nargs="?", choices=["alpha", "pruning", "cached"], default="alpha")
    parser.add_argument("--out", metavar="DIR", help="resumes there; default runs/study, "
                        "of pruning runs/study-pruning")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")


def _study(args: argparse.Namespace) -> None:
    from amid_ds.experiments.cached_study import cached_study
    from amid_ds.experiments.pruning_study import pruning_study
    from amid_ds.experiments.study import study

    if args.what == "cached":
        cached_study(args.out or "runs/study", args.seeds)
    elif args.what == "pruning":
        pruning_study(args.out or "runs/study-pruning", args.seeds)
    else:
        study(args.out or "runs/study", args.seeds)


# The options of each benchmark beside --json, as its function names them.
BENCH_OPTIONS: dict[str, set[str]] = {
    "loss": {"predict", "tokens", "vocabulary", "student_width", "teacher_width", "alpha"},
    "step": {"rows", "length", "vocabulary", "student", "teacher"},
    "load": {"ranks"}, "data": set(), "checkpoint": set()}


def add_bench(commands: Commands) -> None:
    parser = add_command(commands, _bench, "measure against the alternatives, in one run")
    parser.add_argument("what", choices=list(BENCH_OPTIONS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vocabulary", type=_positive, metavar="V", help="of loss and step")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--predict", metavar="DEVICE",
                      help="a roofline for this device instead of a measurement; with it:")
    loss.add_argument("--tokens", type=_positive, metavar="N", help="default 8192")
    for side in ("student", "teacher"):
        loss.add_argument(f"--{side}-width", type=_positive, metavar="H", help="default 4096")
    loss.add_argument("--alpha", type=float, metavar="A", help="default -1")
    load = parser.add_argument_group("load")
    load.add_argument("--ranks", type=_positive, metavar="N", help="default 2 and then 4")
    step = parser.add_argument_group("step")
    step.add_argument("--rows", type=_positive, metavar="B", help="of a micro-batch")
    step.add_argument("--length", type=_positive, metavar="L", help="tokens of a row")
    for side in ("student", "teacher"):
        step.add_argument(f"--{side}", type=_width_and_layers, metavar="W,L",
                          help="its width and layers")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, where a whole number above 0 is expected")
    return int(text)


def _width_and_layers(text: str) -> tuple[int, int]:
    width, comma, layers = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r}, where WIDTH,LAYERS is expected: 1024,24")
    return _positive(width), _positive(layers)


def _bench(args: argparse.Namespace) -> None:
    from amid_ds.bench import checkpoint, data, load, loss, predict, step

    known = BENCH_OPTIONS[args.what]
    given = {name: getattr(args, name) for name in set().union(*BENCH_OPTIONS.values())
             if getattr(args, name) is not None}
    if foreign := sorted(given.keys() - known):
        raise InputError(f"bench {args.what} with {_options(foreign)}",
                         _options(known) or "no option but --json", "leave it out")
    device = given.pop("predict", None)
    if device is not None:
        predict.print_prediction(device, predict.PredictedShape(**given), args.json)
    elif args.what == "step":
        step.bench_step(args.json, **given)
    elif args.what == "load":
        load.bench_load(args.json, **given)
    elif given:
        raise InputError(f"bench loss with {_options(given)} and no --predict", "--predict DEVICE",
                         "add it, or leave them out: the shapes that are measured are fixed")
    else:
        {"loss": loss.bench_loss, "data": data.bench_data,
         "checkpoint": checkpoint.bench_checkpoint}[args.what](args.json)


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def add_completion(commands: Commands) -> None:
    parser = add_command(commands, _completion, "a shell's completion of these commands")
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def _completion(args: argparse.Namespace) -> None:
    from amid_ds.cli.completion import print_script

    print_script(args.shell)
