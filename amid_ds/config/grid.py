"""A sweep's settings: `loss.alpha=-5,-1,1 loss.lam=0.1,0.9` is six runs, each with its own folder.

A value is YAML, as in any override, so a comma inside brackets belongs to the value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amid_ds.errors import InputError


@dataclass(frozen=True)
class Combination:
    """One value of each swept key, as overrides `key=value`."""

    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """A folder's name; characters that a shell or file system might interpret become `_`."""
        return re.sub(r"[^\w.=+,-]+", "_", ",".join(self.settings)).strip("_")

    def overrides(self, parent: str | Path) -> list[str]:
        """Arguments to add to the command line; they put the run's folder under `parent`."""
        return [*self.settings, f"output_dir={Path(parent) / self.name}"]


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
    values, depth = [""], 0
    for character in rest:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    if not key or not all(values):
        raise InputError(f"the sweep {argument!r}", "KEY=VALUE,VALUE,...",
                         "e.g. loss.lam=0.1,0.3,0.5")
    return key, values
