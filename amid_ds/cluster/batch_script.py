"""Batch scripts: a template with values in its lines marked EDIT, quoted, and checked for faults.

Every value passes through `quote`, so none can become a line, an option or a command of its own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from amid_ds.config.library import packaged_folder
from amid_ds.errors import InputError, printable

# sbatch's own options that `submit` passes on.
SBATCH_OPTIONS = ("time", "partition", "account", "qos", "signal")

_REMEDY = "change output_dir, or the option or the sweep's value that it comes from"


def read_template(name: str) -> str:
    """The packaged template of that name, or the file of that path. Raises InputError."""
    folder = packaged_folder("slurm")
    for path in (folder / f"{name}.sbatch", Path(name)):
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise InputError(f"the template {path} cannot be read: {error}", "a batch script",
                             "check --template") from None
    packaged = ", ".join(sorted(path.stem for path in folder.glob("*.sbatch")))
    raise InputError(f"the template {name} is not there",
                     f"one of {packaged}; or the path of a script of your own", "check --template")


def log_pattern(folder: Path, name: str) -> str:
    """The log `name`, which may have Slurm's %j, in a folder, which is meant as it is written."""
    return f"{str(folder).replace('%', '%%')}/{name}"


def render(template: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """The template with `values` in its lines marked EDIT; a sequence becomes an array of bash.

    sbatch's options without such a line get one after the template's own. The key `requeue` turns
    `--requeue` into `--no-requeue`. Raises InputError for a value that cannot be quoted.
    """
    lines: list[str] = []
    used = set()
    options_end = 0
    for line in template.split("\n"):
        match = re.match(r"(#SBATCH --|(?:export )?)([\w-]+)=.*# EDIT", line)
        if match and match[2] in values:
            line = _assignment(match[1], match[2], values[match[2]])
            used.add(match[2])
        elif line.strip() == "#SBATCH --requeue" and "requeue" in values:
            line = "#SBATCH --no-requeue"
        lines.append(line)
        if line.startswith("#SBATCH"):
            options_end = len(lines)
    added = [name for name in values if name in SBATCH_OPTIONS and name not in used]
    lines[options_end:options_end] = [_assignment("#SBATCH --", name, values[name])
                                      for name in added]
    return "\n".join(lines)


def _assignment(prefix: str, name: str, value: str | Sequence[str]) -> str:
    """A line of the script: an option of sbatch, or a variable of bash."""
    if not isinstance(value, str):
        return f"{prefix}{name}=({' '.join(map(quote, value))})"
    if prefix.startswith("#SBATCH") and "\\" in value:
        raise InputError(f"{value!r} for --{name} in the batch script",
                         "text without backslashes: sbatch drops them", _REMEDY)
    return f"{prefix}{name}={quote(value)}"


def quote(value: str) -> str:
    """`value` as one word, both of bash and of sbatch, which take it as it is.

    Raises InputError for line breaks and other control characters.
    """
    if printable(value, keep="") != value:
        raise InputError(f"{value!r} in the batch script",
                         "text without line breaks and other control characters", _REMEDY)
    return shlex.quote(value)


def refuse_faults(script: str, new_folder: Path) -> None:
    """Raise InputError for faults that `sbatch --test-only` does not report.

    `new_folder` counts as there: it is made before the job is submitted.
    """
    faults = list(_faults(script, new_folder))
    if faults:
        lines = "\n".join(f"    - {fault}" for fault in faults)
        raise InputError(f"the batch script has {len(faults)} fault(s):\n{lines}",
                         "a script that bash and sbatch understand as it was meant",
                         "fix the template; amid-ds submit --dry-run shows the script")


def _faults(script: str, new_folder: Path) -> Iterator[str]:
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if syntax.returncode:
        yield f"bash: {syntax.stderr.strip()}"
    if not script.startswith("#!"):
        yield "line 1: sbatch wants an interpreter there, such as #!/bin/bash"
    first_command = None
    for number, line in enumerate(script.split("\n"), 1):
        if line.startswith("#SBATCH"):
            if first_command is not None:
                yield (f"line {number}: {line.strip()} comes after the first command (line "
                       f"{first_command}): sbatch ignores it")
            yield from (f"line {number}: {fault}" for fault in _missing_folders(line, new_folder))
        elif first_command is None and line.strip() and not line.lstrip().startswith("#"):
            first_command = number


def _missing_folders(line: str, new_folder: Path) -> Iterator[str]:
    """Missing folders of a log, or to work in: such a job would end without a trace."""
    try:
        words = shlex.split(line, comments=False)[1:]
    except ValueError as error:
        yield f"{line.strip()}: {error}"
        return
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--output", "--error", "--chdir") or not value:
            continue
        folder = Path(value) if name == "--chdir" else Path(value.replace("%%", "%")).parent
        if not folder.is_dir() and folder != new_folder:
            yield f"the folder {folder} of {name} is not there"
