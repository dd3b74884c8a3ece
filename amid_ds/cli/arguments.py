"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands, run: Callable[[argparse.Namespace], None],
                description: str) -> argparse.ArgumentParser:
    """A parser for the command that `run` is named after: `_train` runs `amid-ds train`."""
    parser = commands.add_parser(run.__name__.removeprefix("_"), help=description)
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
