"""The command line as a shell's user meets it: help, examples, mistyped words, completion."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import BIN

from amid_ds import __version__
from amid_ds.cli import main
from amid_ds.cli.arguments import CommandParser
from amid_ds.cli.completion import COMPLETERS
from amid_ds.cli.examples import EXAMPLES
from amid_ds.cli.main import COMMANDS, Overview, parse
from amid_ds.config.recipe_schema import recipe_keys
from amid_ds.eval.protocol import PROTOCOLS

# (what is typed, completions that come, words that do not).
TYPED = [
    ("amid-ds tr", ["train"], ["plan"]),
    ("amid-ds plan --ch", ["--check"], ["--cache"]),
    ("amid-ds bench ", ["loss", "step"], []),
    ("amid-ds recipes copy gk", ["gkd"], ["csd"]),
    ("amid-ds train ", ["distil.yaml"], ["notes.txt"]),
    ("amid-ds train distil.yaml train.learning_r", ["train.learning_rate="], ["train.lr="]),
    ("amid-ds train distil.yaml train.schedule=c", ["train.schedule=cosine"],
     ["train.schedule=linear"]),
    ("amid-ds plan distil.yaml --device h200", ["h200", "h200-nvl"], ["b200"]),
    ("amid-ds submit distil.yaml --template train_", ["train_mpi"], ["minillm"]),
    ("amid-ds status runs/", ["runs/one/"], ["runs/other/"])]


def parsers(parser: CommandParser) -> Iterator[CommandParser]:
    """A command's parser, and those of the commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from parsers(below)


def commands() -> dict[str, CommandParser]:
    return {parser.prog.removeprefix("amid-ds").strip(): parser for parser in parsers(Overview())}


def test_every_command_has_examples():
    assert EXAMPLES.keys() == commands().keys()
    assert all(f"  {line}\n" in f"{parser.format_help()}\n" for name, parser in commands().items()
               for line, _ in EXAMPLES[name])


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line, _ in lines])
def test_an_example_is_a_line_that_the_command_takes(line):
    words = shlex.split(line)
    at = next(number for number, word in enumerate(words) if word in ("amid-ds", "amid_ds"))
    arguments = parse(words[at + 1:])
    assert callable(arguments.run) and len(line) <= 78
    assert {key.partition("=")[0] for key in arguments.overrides} <= recipe_keys().keys()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name])
def test_an_example_is_of_the_command_whose_help_it_ends(name):
    assert all(re.search(rf"amid[-_]ds {name}\b", line) for line, _ in EXAMPLES[name])


def test_the_help_shows_each_command_once_in_its_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 80
    shown = re.findall(r"^  ([a-z]+)  +\S", text, re.M)
    assert sorted(shown) == sorted(Overview().commands.choices)
    assert [line.rstrip(":") for line in text.splitlines() if line.rstrip(":") in COMMANDS] == list(
        COMMANDS)


def test_no_command_at_all_is_answered_with_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == "" and "train a model:" in shown.err


@pytest.mark.parametrize("words, nearest", [
    (["trian", "r.yaml"], "`train`"), (["recipes", "cpoy"], "`copy`"), (["bench", "lss"], "`loss`"),
    (["--local_rank", "0", "pln"], "`plan`")])
def test_a_mistyped_word_is_answered_with_the_nearest_one(words, nearest, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"did you mean {nearest}?" in message and len(message) < 100


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"amid-ds {__version__}\n"


def test_the_commands_are_declared_without_heavy_imports():
    code = ("import sys; from amid_ds.cli.main import Overview; Overview(); print({'torch', "
            "'pydantic', 'yaml', 'rich', 'transformers', 'argcomplete'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe, another file and a run, where `amid-ds` is this one."""
    for name in ("distil.yaml", "notes.txt", "runs/one/recipe.yaml", "runs/other/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_shell(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")


def test_bash_completes(folder):
    # As readline does on TAB: the function that `complete -p` names, and its COMPREPLY.
    script = """source <(amid-ds completion bash)
        compopt() { return 0; }
        function=$(complete -p amid-ds | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        while IFS= read -r COMP_LINE; do
            COMP_POINT=${#COMP_LINE}; COMPREPLY=(); $function amid-ds
            printf '%s ' "${COMPREPLY[@]}"; echo
        done"""
    lines = "".join(f"{typed}\n" for typed, *_ in TYPED)
    done = subprocess.run(["bash", "--norc", "-c", script], input=lines, capture_output=True,
                          text=True, timeout=240)
    answers = done.stdout.splitlines()
    assert len(answers) == len(TYPED), done.stderr
    for answer, (typed, expected, others) in zip(answers, TYPED, strict=True):
        # bash itself splits words at `=`, and replaces what stands behind it.
        key = typed.rpartition(" ")[2].rpartition("=")
        offered = {f"{key[0]}{key[1]}{word}" for word in answer.split()}
        assert set(expected) <= offered and not set(others) & offered, (typed, answer)


def test_fish_completes(folder):
    require_shell("fish")
    script = """amid-ds completion fish | source
        for typed in $argv
            complete -C $typed
            echo
        end"""
    typed_lines = [typed for typed, *_ in TYPED]
    blocks = output("fish", "--no-config", "-c", script, *typed_lines).split("\n\n")[:-1]
    for block, (typed, expected, others) in zip(blocks, TYPED, strict=True):
        offered = {line.partition("\t")[0] for line in block.splitlines()}
        assert set(expected) <= offered and not set(others) & offered, (typed, offered)


def test_zsh_completes(folder):
    """In a terminal of its own, its line after TAB: there is no other way to zsh's completion."""
    require_shell("zsh")
    script = """zmodload zsh/zpty
        zpty shell 'zsh -f -i'
        zpty -w shell 'autoload -Uz compinit && compinit -u -d dump
            keep-line() { print -r -- $BUFFER > line; BUFFER= }
            zle -N keep-line && bindkey "^X" keep-line
            source <(amid-ds completion zsh); echo REA""DY'
        zpty -r shell text '*READY*'
        for typed; do
            zpty -w -n shell $typed$'\t\x18'
            until [[ -s line ]]; do sleep 0.1; done
            cat line && rm line
        done"""
    alone = {typed: expected[0] for typed, expected, _ in TYPED
             if expected[0] in ("train", "--check", "gkd", "train.learning_rate=", "runs/one/")}
    lines = output("zsh", "-f", "-c", script, "zsh", *alone).splitlines()
    assert [line.split()[-1] for line in lines] == list(alone.values())


def test_completion_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'amid-ds[completion]'" in capsys.readouterr().err


def test_a_completer_is_of_an_argument_that_is_there():
    there = {action.dest for parser in commands().values() for action in parser._actions}
    assert {name.rpartition(" ")[2] for name in COMPLETERS} <= there
    assert list(COMPLETERS["protocol"]()) == list(PROTOCOLS)
