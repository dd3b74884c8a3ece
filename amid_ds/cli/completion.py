"""Completion of the commands in bash, zsh and fish, by argcomplete.

It asks the parsers themselves, so that they are described once. The shell starts `amid-ds` at each
TAB: what is imported for an answer is imported in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from amid_ds.errors import ExitStatus, InputError

Words = Iterable[str] | Mapping[str, str]


def wanted_by_shell() -> bool:
    """True if a shell has started this process for its completion, and not for a command."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and end the process."""
    try:
        import argcomplete
    except ImportError:
        # A message would stand in the middle of the line that is typed.
        raise SystemExit(ExitStatus.FAILED) from None
    _name_completers(parser)
    argcomplete.autocomplete(parser, always_complete_options=False)


def print_script(shell: str) -> None:
    """Print what the shell has to read. Raises InputError where argcomplete is missing."""
    try:
        import argcomplete
    except ImportError:
        raise InputError("argcomplete is not installed", "the package that completes commands",
                         "pip install 'amid-ds[completion]'") from None
    print(argcomplete.shellcode(["amid-ds"], shell=shell))


def _name_completers(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _name_completers(command)
        elif words := (COMPLETERS.get(f"{parser.prog.partition(' ')[2]} {action.dest}")
                       or COMPLETERS.get(action.dest)):
            action.completer = words   # type: ignore[attr-defined]


def _override(prefix: str, **_: object) -> Words:
    """Keys of the recipe; after their `=` the values that are known."""
    from amid_ds.config.recipe_schema import recipe_keys

    key, equals, _value = prefix.partition("=")
    if equals:
        return [f"{key}={value}" for value in recipe_keys().get(key, ())]
    return [f"{each}=" for each in recipe_keys()]


def _recipe_file(prefix: str, **_: object) -> Words:
    from argcomplete.completers import FilesCompleter

    return FilesCompleter(("yaml", "yml"))(prefix)


def _folder(prefix: str, **_: object) -> Words:
    from argcomplete.completers import DirectoriesCompleter

    return DirectoriesCompleter()(prefix)


def _run(prefix: str, **_: object) -> Words:
    """The runs among the folders; all of them where none is one."""
    from amid_ds.run.folder import RunFolder

    folders = list(_folder(prefix))
    return [each for each in folders if RunFolder(Path(each)).exists] or folders


def _packaged_recipe(**_: object) -> Words:
    from amid_ds.config.library import packaged_recipes

    return packaged_recipes()


def _prompt_template(**_: object) -> Words:
    from amid_ds.config.prompt_templates import TEMPLATES

    return list(TEMPLATES)


def _batch_template(**_: object) -> Words:
    from amid_ds.config.library import packaged_folder

    return [path.stem for path in packaged_folder("slurm").glob("*.sbatch")]


def _published_row(**_: object) -> Words:
    from amid_ds.config.published import published

    return {name: row.method for name, row in published().rows.items()}


def _device(**_: object) -> Words:
    from amid_ds.planning.devices import DEVICES

    return [*DEVICES, "cpu"]


def _protocol(**_: object) -> Words:
    # eval/protocol.py has them, and imports torch.
    return ["minillm"]


# By an argument's name, or by its command and name.
COMPLETERS: Mapping[str, Callable[..., Words]] = {
    "overrides": _override,
    "recipe": _recipe_file,
    "chain chain": _recipe_file,
    "run_folder": _run, "run_folders": _run, "check": _run, "export source": _run,
    "recipes copy name": _packaged_recipe,
    "reproduce name": _published_row,
    "submit template": _batch_template,
    "template": _prompt_template,
    "device": _device, "predict": _device,
    "protocol": _protocol,
    "models": _folder, "into": _folder,
}
