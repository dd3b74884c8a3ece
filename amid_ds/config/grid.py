"""A sweep's settings: `loss.alpha=-5,-1,1 loss.lam=0.1,0.9` is six runs, each with its own folder.

A value is YAML, as in any override, so a comma in brackets or quotes belongs to the value.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amid_ds.errors import InputError

# Bytes of a folder's name: file systems allow 255, and files beside it may have longer names.
MAX_NAME_BYTES = 200
# A path that YAML, and a sweep, take as it is without quotes.
PLAIN_PATH = re.compile(r"[A-Za-z_./][\w./=+-]*/[\w./=+-]*", re.ASCII)
QUOTED = re.compile(r"""'(?:''|[^'])*'|"(?:\\.|[^"\\])*\"""", re.S)


@dataclass(frozen=True)
class Combination:
    """One value of each swept key, as overrides `key=value`."""

    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """A folder's name; characters that a shell or file system might interpret become `_`.

        One that is too long is cut and ends with a hash of the settings.
        """
        settings = ",".join(self.settings)
        name = re.sub(r"[^\w.=+,-]+", "_", settings).strip("_")
        if len(name.encode()) <= MAX_NAME_BYTES:
            return name
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"

    def overrides(self, parent: str | Path) -> list[str]:
        """Arguments to add to the command line; they put the run's folder under `parent`."""
        return [*self.settings, path_override("output_dir", Path(parent) / self.name)]


def path_override(key: str, path: str | Path) -> str:
    """`key=path` as an override, in quotes where YAML would take a part of it for something else.
    """
    text = str(path)
    return f"{key}={text if PLAIN_PATH.fullmatch(text) else json.dumps(text, ensure_ascii=False)}"


def sweep_combinations(swept: Sequence[str]) -> tuple[Combination, ...]:
    """Every combination of `KEY=VALUE,VALUE,...` arguments; the last key changes fastest.

    Raises InputError if an argument cannot be read or two runs would share a folder.
    """
    options = []
    for argument in swept:
        key, values = parse_swept_key(argument)
        options.append([f"{key}={value}" for value in values])
    combinations = tuple(Combination(settings) for settings in itertools.product(*options))
    names = [combination.name for combination in combinations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two runs of the sweep would be called {twice}",
                         "every key once, and every value once", "leave one of the two out")
    return combinations


def parse_swept_key(argument: str) -> tuple[str, list[str]]:
    """The key and the values of `KEY=VALUE,VALUE,...`. Raises InputError."""
    key, _, rest = argument.partition("=")
    values, depth, position = [""], 0, 0
    while position < len(rest):
        before = values[-1].rstrip()
        # Elsewhere a quote is an apostrophe.
        may_open = not before or (depth > 0 and before[-1] in "[{,:")
        quoted = QUOTED.match(rest, position) if may_open else None
        part = quoted[0] if quoted else rest[position]
        position += len(part)
        depth += (part in "[{") - (part in "]}")
        if part == "," and depth == 0:
            values.append("")
        else:
            values[-1] += part
    values = [value.strip() for value in values]
    if not key or not all(values):
        raise InputError(f"the sweep {argument!r}", "KEY=VALUE,VALUE,...",
                         "e.g. loss.lam=0.1,0.3,0.5")
    return key, values
