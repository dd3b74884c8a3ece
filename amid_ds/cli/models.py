"""The commands about models and their data: tokenizer, eval, generate, chat, cache, prune,
dequantize."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from amid_ds.cli.arguments import Commands, add_command, add_recipe, add_targets, add_trust
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from amid_ds.eval.rows import RowOptions


def add_tokenizer(commands: Commands) -> None:
    parser = add_command(commands, _tokenizer, "train a tokenizer on a recipe's data")
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


def add_eval(commands: Commands) -> None:
    parser = add_command(commands, _eval, "perplexity, divergence from a teacher, ROUGE-L")
    parser.add_argument("model")
    parser.add_argument("--teacher", metavar="MODEL")
    parser.add_argument("--cached", metavar="DIR", help="instead of --teacher: what `amid-ds cache`"
                        " wrote of it over the rows of --data")
    parser.add_argument("--data", metavar="FILE", help="with --cached also the prepared folder "
                        "that it is of; may be left out with --tasks")
    parser.add_argument("--tasks", metavar="A,B,...", help="benchmarks by lm-evaluation-harness: "
                        "names of its tasks, or paths of YAML files that define one")
    parser.add_argument("--limit", type=int, metavar="N", help="of each task the first N documents")
    parser.add_argument("--apply-chat-template", action="store_true",
                        help="tasks as conversations in the model's own template")
    _add_columns(parser)
    parser.add_argument("--protocol", metavar="NAME", help="a published one, minillm: sets what "
                        "the options below leave out")
    parser.add_argument("--seq-length", type=int, metavar="L", help="default 512")
    parser.add_argument("--seeds", metavar="N", help="samples per prompt, or A,B,...: the seeds; "
                        "default 5")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="per sample; default half of L")
    parser.add_argument("--no-repeat-ngram", type=int, metavar="N", help="N tokens in a row that "
                        "were in prompt or sample do not come again")
    parser.add_argument("--json", action="store_true")
    add_trust(parser)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    for name in ("text", "prompt", "response", "messages"):
        parser.add_argument(f"--{name}", metavar="COL", help="default: by the columns of the rows")
    _add_row_options(parser, "error")


def _row_options(args: argparse.Namespace) -> RowOptions:
    from amid_ds.eval.rows import RowOptions

    return RowOptions(args.text, args.prompt, args.response, args.messages, args.template,
                      args.split, args.on_bad_row)


def _add_row_options(parser: argparse.ArgumentParser, on_bad_row: str | None) -> None:
    parser.add_argument("--template", metavar="NAME", help="of the prompts: minillm or alpaca")
    parser.add_argument("--split", metavar="NAME", help="of a data set; default train")
    parser.add_argument("--on-bad-row", choices=["error", "skip"], default=on_bad_row)


def _eval(args: argparse.Namespace) -> None:
    from amid_ds.eval.evaluate import evaluate_command
    from amid_ds.eval.protocol import EvalArgs, eval_protocol

    rows = None
    if args.data is not None:
        protocol = eval_protocol(args.protocol, args.seq_length, args.seeds, args.new_tokens,
                                 args.no_repeat_ngram)
        rows = EvalArgs(args.model, args.teacher, args.data, protocol, _row_options(args),
                        trust_remote_code=args.trust_remote_code, cached=args.cached)
    _refuse_without(args.data, "--data", args, "teacher", "cached", "protocol")
    _refuse_without(args.tasks, "--tasks", args, "limit", "apply_chat_template")
    if args.tasks is not None:
        from amid_ds.eval.tasks import TaskArgs, tasks_command

        tasks = TaskArgs(tuple(args.tasks.split(",")), args.limit, args.apply_chat_template)
        tasks_command(args.model, tasks, rows, args.trust_remote_code, args.json)
    elif rows is not None:
        evaluate_command(rows, args.json)
    else:
        raise InputError("amid-ds eval with neither --data nor --tasks", "one of them, or both",
                         "name the file to score on, or benchmarks")


def _refuse_without(needed: str | None, option: str, args: argparse.Namespace, *names: str) -> None:
    """Raise InputError where an option is given that does something for `option` alone."""
    given = [f"--{name.replace('_', '-')}" for name in names
             if getattr(args, name) not in (None, False)]
    if needed is None and given:
        raise InputError(f"{' and '.join(given)} without {option}", f"{option} beside it",
                         "add it, or leave the others out")


def add_generate(commands: Commands) -> None:
    parser = add_command(commands, _generate, "a model's responses to prompts, to train on")
    parser.add_argument("source", metavar="RECIPE_OR_MODEL")
    parser.add_argument("--prompts", metavar="FILE", help="default: the recipe's data.train")
    parser.add_argument("--prompt", metavar="COL", help="of the file of --prompts; default prompt")
    _add_row_options(parser, None)
    parser.add_argument("--out", required=True, metavar="FILE", help="jsonl: prompt and response")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="0: the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts of a rank")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="default: all the model's ends")
    add_trust(parser)


def _generate(args: argparse.Namespace) -> None:
    from amid_ds.eval.generate import GenerateArgs, generate

    generate(GenerateArgs(**{name: value for name, value in vars(args).items()
                             if name in GenerateArgs.__dataclass_fields__}))


def add_chat(commands: Commands) -> None:
    parser = add_command(commands, _chat, "talk to a model, or to two side by side")
    parser.add_argument("model", help="a model, or a finished run")
    parser.add_argument("--beside", metavar="MODEL", help="another, such as the teacher, that "
                        "answers the same messages")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N",
                        help="of an answer; default 256")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="0: the most probable token; default 1")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    add_trust(parser)


def _chat(args: argparse.Namespace) -> None:
    from amid_ds.eval.chat import ChatArgs, chat

    chat(ChatArgs(args.model, args.beside, args.max_new_tokens, args.temperature, args.top_p,
                  args.seed, args.trust_remote_code))


def add_cache(commands: Commands) -> None:
    parser = add_command(commands, _cache, "a teacher's distributions over the rows, written down")
    add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", help="default: beside the prepared data")
    add_targets(parser)


def _cache(args: argparse.Namespace) -> None:
    from amid_ds.training.cache import cache
    from amid_ds.training.cache_plan import CacheArgs

    cache(CacheArgs(args.recipe, args.overrides, args.out, args.topk, args.sample, args.exponent))


def add_prune(commands: Commands) -> None:
    parser = add_command(commands, _prune, "a student cut from its teacher, as a folder")
    parser.add_argument("teacher")
    parser.add_argument("out", metavar="OUT")
    for name, parts in (("layers", "layers"), ("hidden", "channels of the hidden states"),
                        ("intermediate", "neurons of an MLP"), ("heads", "query heads")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{parts} that stay")
    parser.add_argument("--by", choices=["activations", "depth"], default="activations",
                        help="what goes: what does least on --data, or layers at even distances")
    parser.add_argument("--data", metavar="FILE", help="text to judge by")
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="of it; default 256")
    parser.add_argument("--seq-length", type=int, default=512, metavar="L", help="default 512")
    _add_columns(parser)
    add_trust(parser)


def _prune(args: argparse.Namespace) -> None:
    from amid_ds.eval.prune import PruneArgs, prune

    prune(PruneArgs(args.teacher, args.out, args.data, _row_options(args), args.layers, args.hidden,
                    args.intermediate, args.heads, args.by, args.rows, args.seq_length,
                    args.trust_remote_code))


def add_dequantize(commands: Commands) -> None:
    parser = add_command(commands, _dequantize, "a quantized model as an ordinary folder")
    parser.add_argument("model")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16",
                        help="of the weights that are quantized now; default bf16")
    add_trust(parser)


def _dequantize(args: argparse.Namespace) -> None:
    from amid_ds.models.dequantize import DequantizeArgs, dequantize

    dequantize(DequantizeArgs(args.model, args.out, args.dtype, args.trust_remote_code))
    print(args.out)
