"""The rows of a file that `eval` is given, which has no recipe to say what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amid_ds.config.parse import source_of
from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.config.recipe import Data, Source
from amid_ds.data import source_columns
from amid_ds.errors import InputError

KINDS_OF_ROW = ("--text COL, or --prompt COL and --response COL, or --messages COL, or "
                "--template NAME for instruction, input and output")


@dataclass(frozen=True)
class RowOptions:
    """The options that say what the rows are; of those that name columns None or one kind's.

    None: by the columns that are there.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    template: str | None = None
    split: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def data(self, path: str) -> Data:
        """The rows of a file, folder, glob or data set, as a source to read. Raises InputError."""
        columns = {name: value for name in ("text", "prompt", "response", "messages", "template")
                   if (value := getattr(self, name)) is not None}
        if columns and columns.keys() not in ({"text"}, {"prompt", "response"}, {"messages"},
                                              {"template"}):
            options = " ".join(f"--{name} {value}" for name, value in columns.items())
            raise InputError(options, f"one kind of row: {KINDS_OF_ROW}", "name one kind alone")
        where = {"path": path} if self.split is None else {"path": path, "split": self.split}
        columns = columns or _detect(source_of(where))
        return Data(train=[source_of({**where, **columns})],
                    on_bad_row=self.on_bad_row)


def _detect(source: Source) -> dict[str, str]:
    """The kind of a source's rows by their columns, as keys of Source. {}: text."""
    columns = source_columns(source)
    # A text file has none, and a file without one whole row is reported with its lines.
    if not columns or "text" in columns:
        return {}
    if {"instruction", "output"} <= set(columns):
        return {"template": next(iter(TEMPLATES))}
    if {"prompt", "response"} <= set(columns):
        return {"prompt": "prompt", "response": "response"}
    if "messages" in columns:
        return {"messages": "messages"}
    raise InputError(f"the rows of {source.path} have the columns {', '.join(map(repr, columns))}",
                     "text, prompt and response, messages, or instruction and output",
                     f"say what they are: {KINDS_OF_ROW}")
