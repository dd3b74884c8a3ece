"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from amid_ds.cli.examples import EXAMPLES
from amid_ds.errors import suggest

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
WIDEST_HELP = 100


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and others from running over a wide terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, WIDEST_HELP) - 2)


class CommandParser(argparse.ArgumentParser):
    """A parser of the commands, or of one of them, whose examples its help ends with."""

    def __init__(self, prog: str, description: str) -> None:
        lines = [f"  # {word}\n  {line}" for line, word in EXAMPLES.get(
            prog.removeprefix("amid-ds").strip(), ())]
        super().__init__(prog, description=description, formatter_class=_HelpFormatter,
                         epilog="\n".join(["examples:", *lines]) if lines else None)

    def error(self, message: str) -> NoReturn:
        """As argparse, but of many choices the nearest one alone."""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            nearest = suggest(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
            message = f"{message[:wrong.start()]}there is no {wrong[1]!r}; {nearest}"
        super().error(message)


def add_command(commands: Commands, run: Callable[[argparse.Namespace], None],
                description: str) -> CommandParser:
    """A parser for the command that `run` is named after: `_train` runs `amid-ds train`, and
    `_recipes_copy` among the commands of `recipes` runs `amid-ds recipes copy`."""
    name = run.__name__.rpartition("_")[2]
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run the Python code that comes with the models")


def add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("recipe", nargs="?" if optional else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def add_targets(parser: argparse.ArgumentParser) -> None:
    """What `amid-ds cache` keeps of each position."""
    parser.add_argument("--topk", type=int, metavar="K", help="the K most probable ids; default 64")
    parser.add_argument("--sample", type=int, metavar="N", help="N draws instead")
    parser.add_argument("--exponent", type=float, metavar="S",
                        help="draw with a probability ∝ p^S; default 1")
