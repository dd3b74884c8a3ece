"""The command line: the only place that parses arguments and turns an outcome into an exit status.

Each command has two functions, side by side in one of this folder's modules: `add_X` declares its
arguments, `_X` imports what it needs and runs it. `errors.ExitStatus` has the exit statuses.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from amid_ds import __version__
from amid_ds.cli.arguments import CommandParser, Commands
from amid_ds.cli.completion import complete, wanted_by_shell
from amid_ds.cli.jobs import (
    add_chain,
    add_doctor,
    add_reproduce,
    add_requeue,
    add_submit,
    add_sweep,
)
from amid_ds.cli.library import add_bench, add_completion, add_demo, add_recipes, add_study
from amid_ds.cli.models import (
    add_cache,
    add_chat,
    add_dequantize,
    add_eval,
    add_generate,
    add_prune,
    add_tokenizer,
)
from amid_ds.cli.runs import (
    add_checkpoints,
    add_export,
    add_plan,
    add_prepare,
    add_push,
    add_report,
    add_status,
    add_tasks,
    add_train,
)
from amid_ds.distributed.launch import launched_rank
from amid_ds.distributed.leash import follow_leash
from amid_ds.distributed.rank_logging import leave_stdout_to_results, set_up_logging
from amid_ds.distributed.streams import guarded_streams
from amid_ds.errors import (
    ExitStatus,
    RankError,
    RankInputError,
    Stopped,
    exit_status,
    expected_error,
    print_error,
    report_error,
)

# The commands by what they are for, as `amid-ds --help` shows them.
COMMANDS = {
    "train a model": (add_recipes, add_plan, add_prepare, add_train, add_export, add_push),
    "look at it": (add_status, add_checkpoints, add_report, add_eval, add_tasks, add_chat,
                   add_generate),
    "make what a run needs": (add_tokenizer, add_prune, add_dequantize, add_cache),
    "many runs, and a cluster": (add_submit, add_sweep, add_chain, add_doctor, add_requeue),
    "try it out, and measure": (add_demo, add_study, add_reproduce, add_bench, add_completion),
}


def run() -> NoReturn:
    """Run this process's command, and end the process with its exit status.

    Without the interpreter's own end: a thread of gloo that drops the tensors of the last
    collective meanwhile waits for the interpreter, and the process would abort with status 134.
    """
    try:
        status = main()
    except SystemExit as end:
        # argparse's; a library may have one with a message.
        if isinstance(end.code, str):
            print_error(end.code)
        status = ExitStatus.FAILED if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = ExitStatus.FAILED
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # None: closed when the process began.
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parse(argv)
    set_up_logging()
    leave_stdout_to_results(getattr(args, "json", False))
    follow_leash()
    with guarded_streams():
        try:
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return ExitStatus.FAILED
        except Exception as error:
            message = expected_error(error)
            if message is None and not isinstance(error, Stopped):
                raise
            # Ranks agree on errors of ours before they get here, so one of them reports it.
            is_own = message is not error or isinstance(error, (RankError, RankInputError))
            if message is not None and (is_own or launched_rank() == 0):
                report_error(message)
            return exit_status(error)
    return ExitStatus.DONE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments. Overrides `key=value` may follow options, which argparse rejects."""
    parser = Overview()
    if wanted_by_shell():
        complete(parser)
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        raise SystemExit(ExitStatus.BAD_INPUT)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = [*getattr(args, "overrides", []), *rest]
    return args


class Overview(CommandParser):
    """The parser of all commands, whose help shows them by what they are for."""

    def __init__(self) -> None:
        super().__init__("amid-ds", "Distil language models with the AMiD objective.")
        self.add_argument("--version", action="version", version=f"amid-ds {__version__}")
        # The deepspeed launcher passes it to every rank.
        self.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
        self.commands: Commands = self.add_subparsers(metavar="COMMAND",
                                                      parser_class=CommandParser)
        for adds in COMMANDS.values():
            for add in adds:
                add(self.commands)

    def format_help(self) -> str:
        lines = ["usage: amid-ds COMMAND ...", "", str(self.description)]
        for group, adds in COMMANDS.items():
            lines += ["", f"{group}:"]
            for name in (add.__name__.removeprefix("add_") for add in adds):
                lines.append(f"  {name:<12} {self.commands.choices[name].description}")
        return "\n".join([*lines, "", "amid-ds COMMAND --help: its options and examples; "
                          "amid-ds --version", "", f"{self.epilog}\n"])
