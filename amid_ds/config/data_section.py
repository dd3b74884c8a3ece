"""The recipe's `data` section: the sources of rows, and their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from amid_ds.config.loss_section import OwnLoss
from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.config.section import (
    NonNegative,
    NonNegativeInt,
    PathText,
    Positive,
    PositiveInt,
    Section,
)
from amid_ds.errors import suggest


class Rows(Section):
    """The path of rows, and the columns that are read.

    A row is `text`, or `prompt` with `response`, or `messages`, or, with the `template` that makes
    prompts of them, the columns `instruction`, `input` and `output`.
    """

    path: PathText
    """A file, folder or glob, or a data set on the hub."""
    config: str | None = None
    """The configuration of a data set on the hub."""
    split: str = "train"
    """The split of a data set on the hub or of `save_to_disk`, or a slice: `train[:10%]+test`."""
    revision: str | None = None
    """The commit, branch or tag of a data set on the hub."""
    text: str | None = None
    """The column of plain text."""
    prompt: str | None = None
    """The column of prompts, which are not trained on."""
    response: str | None = None
    """The column of the responses to `prompt`."""
    messages: str | None = None
    """The column with a list of {role, content}, for the tokenizer's chat template."""
    tools: str | None = None
    """The column of the tools beside `messages`. None: `tools`, in rows that have it."""
    template: str | None = Field(default=None, examples=[*TEMPLATES])
    """The name of a template in prompt_templates.py."""
    truncate: Literal["left", "right"] = "left"
    """The side that a prompt or conversation too long for a row loses."""

    @model_validator(mode="after")
    def _one_kind_of_row(self) -> Rows:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("`prompt` and `response` belong together: name both columns")
        kinds = [kind for kind in ("text", "prompt", "messages", "template")
                 if getattr(self, kind) is not None]
        if len(kinds) > 1:
            named = " beside ".join(f"`{kind}`" for kind in kinds)
            raise ValueError(f"found {named}: a source has one kind of row, name one of them")
        if self.tools is not None and self.messages is None:
            raise ValueError("`tools` is a column beside `messages`: name both, or none")
        return self

    @field_validator("template")
    @classmethod
    def _known_template(cls, name: str | None) -> str | None:
        if name is not None and name not in TEMPLATES:
            raise ValueError(f"no such template; {suggest(name, TEMPLATES)}")
        return name

    @property
    def names_split(self) -> bool:
        """The recipe itself says which split."""
        return "split" in self.model_fields_set

    @property
    def is_text(self) -> bool:
        """Plain text: documents to be joined and packed, rather than one row each."""
        return self.prompt is None and self.messages is None and self.template is None

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are read; `text` if the recipe names none."""
        if self.prompt is not None and self.response is not None:
            return self.prompt, self.response
        if self.template is not None:
            return "instruction", "input", "output"
        if self.messages is not None and self.tools is not None:
            return self.messages, self.tools
        return (self.messages or self.text or "text",)


class Source(Rows):
    """A source of rows to train on."""

    weight: Positive = 1.0
    """The source's share of the rows that are read, relative to the other sources' weights."""
    stream: bool = False
    """Read and tokenised while training, by `datasets`; nothing is prepared."""
    loss: OwnLoss | None = None
    """Keys in place of those of the recipe's `loss`, for this source's tokens."""


class Auxiliary(Rows):
    """A second corpus, whose language-model loss is added to the objective."""

    weight: Positive = 1.0
    """The coefficient of that loss."""


class Generation(Section):
    """Responses that the student samples for a set's prompts in each evaluation, for ROUGE-L."""

    max_new_tokens: PositiveInt = 256
    """The longest response."""
    temperature: NonNegative = 1.0
    """Of the sampling; 0: the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens that have this probability together."""
    seed: NonNegativeInt = 10
    """Of the sampling; the same one in every evaluation."""
    batch_size: PositiveInt = 32
    """Prompts that a rank completes at once."""
    rows: PositiveInt | None = None
    """The set's first rows alone are sampled for; None: all."""


def _may_have_no_name(schema: dict[str, Any]) -> None:
    """In the JSON schema, take a set that is named by its file."""
    schema["required"].remove("name")
    # The pattern's \w is more to us than to an editor.
    schema["properties"]["name"] = {"type": ["string", "null"], "default": None, "description":
                                    schema["properties"]["name"]["description"]}


class EvalSet(Rows):
    """A named set of rows to evaluate on."""

    model_config = ConfigDict(json_schema_extra=_may_have_no_name)
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    """By default the file's name up to its first dot."""
    generate: Generation | None = None
    """Sample responses in each evaluation, for `rouge_l`; None: none are."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_file(cls, raw: object) -> object:
        if isinstance(raw, dict) and raw.get("name") is None and isinstance(raw.get("path"), str):
            name = Path(raw["path"]).name
            return {**raw, "name": name.lstrip(".").split(".")[0]}
        return raw

    @model_validator(mode="after")
    def _has_what_to_compare(self) -> EvalSet:
        if self.generate is not None and self.prompt is None and self.template is None:
            raise ValueError("`generate`, and its rows have no prompt and no reference, with which "
                             "ROUGE-L compares; name the columns `prompt` and `response`, or a "
                             "`template`, or leave `generate` out")
        return self


class Data(Section):
    """The rows to train and evaluate on, and their preparation."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources of the training rows, mixed by their weights."""
    eval: list[EvalSet] = Field(default=[])
    """Sets that `train.eval_every` evaluates on."""
    auxiliary: Auxiliary | None = None
    """A second corpus in addition to `train`; None: none."""
    prepared: PathText | None = None
    """The folder of the prepared rows; None: `data` inside output_dir."""
    workers: NonNegativeInt = 4
    """Processes that prepare, and threads that read ahead."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out."""
    isolate_documents: bool | None = None
    """Documents that share a row do not attend to one another. None: prompts and conversations
    are isolated, plain text is not."""

    @field_validator("train")
    @classmethod
    def _all_streamed_or_none(cls, sources: list[Source]) -> list[Source]:
        if len({source.stream for source in sources}) > 1:
            raise ValueError("some sources have `stream: true` and some have not; stream all of "
                             "them, or prepare all")
        return sources

    @field_validator("eval")
    @classmethod
    def _names_differ(cls, sets: list[EvalSet]) -> list[EvalSet]:
        names = [eval_set.name for eval_set in sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sets are called {twice[0]!r}; give each a `name` of its own")
        return sets

    @property
    def streams(self) -> bool:
        """The training rows are streamed; no prepared rows exist."""
        return self.train[0].stream

    def isolates(self, source: Rows) -> bool:
        """True if documents of `source` that share a row do not attend to one another."""
        return not source.is_text if self.isolate_documents is None else self.isolate_documents

    @property
    def isolates_any(self) -> bool:
        """`isolates` of any source that is trained or evaluated on."""
        return any(self.isolates(source) for part in self.parts().values() for source in part.train)

    def parts(self) -> dict[str, Data]:
        """The parts that are prepared separately, as data to train on, by their subfolder.

        "" is the training data itself; then "eval/NAME" for each set, and "auxiliary".
        """
        others: dict[str, Rows] = {f"eval/{eval_set.name}": eval_set for eval_set in self.eval}
        if self.auxiliary is not None:
            others["auxiliary"] = self.auxiliary
        sources = {"": self.train}
        for subfolder, rows in others.items():
            sources[subfolder] = [Source(**rows.model_dump(exclude={"name", "weight", "generate"},
                                                           exclude_unset=True))]
        return {subfolder: self.model_copy(update={"train": train, "eval": [], "auxiliary": None})
                for subfolder, train in sources.items()}
