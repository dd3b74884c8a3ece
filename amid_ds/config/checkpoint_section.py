"""The recipe's `checkpoint` section: what is saved and kept, and which evaluation is the best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from amid_ds.config.data_section import EvalSet
from amid_ds.config.section import MAX_INT, PositiveInt, Section
from amid_ds.errors import suggest

# Keys of eval.jsonl by which evaluations can be compared.
TEACHER_KEYS = ("kl_to_teacher", "top1_agreement")
SAMPLE_KEY = "rouge_l"
METRIC_KEYS = ("loss", "perplexity", *TEACHER_KEYS, SAMPLE_KEY)


class Best(Section):
    """The best of a run's evaluations: its checkpoint stays, and is exported at the end."""

    metric: str
    """eval.NAME.KEY: a set's name in `data.eval`, and a key of its lines in eval.jsonl."""
    mode: Literal["min", "max"]
    """Which values of the metric are better: lower or higher ones."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a better one; None: never."""

    @field_validator("metric")
    @classmethod
    def _names_set_and_key(cls, metric: str) -> str:
        section, _, rest = metric.partition(".")
        name, _, key = rest.rpartition(".")
        if section != "eval" or not name:
            raise ValueError("a metric is eval.NAME.KEY, the name of a set of `data.eval` and "
                             f"one of {', '.join(METRIC_KEYS)}")
        if key not in METRIC_KEYS:
            raise ValueError(f"no such key of an evaluation: {key!r}; {suggest(key, METRIC_KEYS)}")
        return metric

    @property
    def set_name(self) -> str:
        """The evaluation set's name."""
        return self.metric.removeprefix("eval.").rpartition(".")[0]

    @property
    def key(self) -> str:
        """The metric's key in the set's lines of eval.jsonl."""
        return self.metric.rpartition(".")[2]

    def is_better(self, value: float | None, than: float | None) -> bool:
        """True for a value that is better than one before; None, an infinite one, never is."""
        if value is None or than is None:
            return value is not None
        return value < than if self.mode == "min" else value > than

    def problems(self, sets: list[EvalSet], has_teacher: bool, eval_every: int) -> Iterator[str]:
        """What keeps the metric from being measured, each with its remedy."""
        named = next((each for each in sets if each.name == self.set_name), None)
        if named is None:
            names = [each.name for each in sets]
            known = suggest(self.set_name, names) if names else "it names none"
            yield f"`data.eval` has no set called {self.set_name!r}; {known}"
        elif self.key == SAMPLE_KEY and named.generate is None:
            yield (f"the set {self.set_name!r} has no `generate`, so nothing is sampled that could "
                   "be compared; add `generate: {}` to it, or name another key")
        if self.key in TEACHER_KEYS and not has_teacher:
            yield (f"there is no `teacher` that could be asked, so no {self.key}; set "
                   "`teacher.model`, or name another key")
        if not eval_every:
            yield ("`train.eval_every` is 0, so only the last step is evaluated and nothing is "
                   "selected; set it, or leave `checkpoint.best` out")


class CheckpointPolicy(Section):
    """The checkpoints that are written and kept, and the changes that a resumed run may make."""

    every: PositiveInt = 100
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=2, le=MAX_INT)] = 2
    """The newest ones that stay; two at least, so that one is left if the newest is damaged."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this number divides stay too."""
    best: Best | None = None
    """The evaluation whose checkpoint stays too; None: none is selected."""
    allow_change: list[str] = Field(default=[])
    """Keys of the recipe in which a resumed run may differ from the attempts before."""
