"""The recipe: one typed, frozen, closed object, made from defaults, a YAML file and `a.b=c` overrides, in that order.

Nothing is guessed and nothing is ignored: an unknown key is an error, and all that is wrong with a recipe is said in
one message. What can be judged from the recipe alone is judged here; what needs ranks, models or data is judged where
those are known (train.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.errors import (
    suggest,
)

Dtype = Literal["auto", "bf16", "fp32"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """A causal language model: a folder, or an id on the hub."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False          # run the Python that lies beside the weights

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """What transformers is told beside the name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class Student(Model):
    dtype: Dtype = "auto"                    # auto: the DeepSpeed config's
    activation_checkpointing: bool = False


class Teacher(Model):
    dtype: Dtype = "auto"                    # auto: the checkpoint's
    placement: Literal["zero3", "replicated"] = "zero3"   # replicated: whole on every rank, never gathered
    max_tokens_per_pass: PositiveInt | None = None        # of the window, in one forward call; None: by free memory


class Rows(Section):
    """Where rows come from, and the columns that are read: `text`, or `prompt` with `response`, or `messages`, or, with
    the `template` that makes prompts of them, `instruction`, `input` and `output`."""

    path: str                                # a file, folder or glob, or a data set on the hub
    config: str | None = None                # of a data set on the hub: its configuration,
    split: str = "train"                     # split
    revision: str | None = None              # and commit, branch or tag
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None              # a list of {role, content}, for the tokenizer's chat template
    template: str | None = None              # of templates.py, by name
    truncate: Literal["left", "right"] = "left"   # the side that a prompt or conversation too long for a row loses

    @model_validator(mode="after")
    def _one_kind_of_row(self) -> Rows:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("`prompt` and `response` belong together: name both columns")
        kinds = [kind for kind in ("text", "prompt", "messages", "template") if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"found {' beside '.join(f'`{kind}`' for kind in kinds)}: a source has one kind of row, "
                             "name one of them")
        return self

    @field_validator("template")
    @classmethod
    def _known_template(cls, name: str | None) -> str | None:
        if name is not None and name not in TEMPLATES:
            raise ValueError(f"no such template; {suggest(name, TEMPLATES)}")
        return name

    @property
    def is_text(self) -> bool:
        """Documents to be joined and packed, rather than one row each."""
        return self.prompt is None and self.messages is None and self.template is None

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that a row is made of; `text` where the recipe names none."""
        if self.prompt is not None and self.response is not None:
            return self.prompt, self.response
        if self.template is not None:
            return "instruction", "input", "output"
        return (self.messages or self.text or "text",)


class Source(Rows):
    """A source of rows to train on."""

    weight: Positive = 1.0                   # the source's share of the rows that are read
    stream: bool = False                     # read and tokenised while training, by `datasets`: nothing is prepared


class Auxiliary(Rows):
    """A second corpus, whose language-model loss is added to the objective."""

    weight: Positive = 1.0                   # the coefficient of that loss


class EvalSet(Rows):
    """Rows to evaluate on, under a name of their own: by default the file's, without its ending."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_file(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("name") is None and isinstance(raw.get("path"), str):
            name = Path(raw["path"]).name
            return {**raw, "name": name.lstrip(".").split(".")[0]}
        return raw


class Data(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[EvalSet] = []
    auxiliary: Auxiliary | None = None
    prepared: str | None = None              # None: inside output_dir
    workers: Annotated[int, Field(ge=0)] = 4 # processes that prepare, threads that read ahead
    on_bad_row: Literal["error", "skip"] = "error"
    isolate_documents: bool | None = None    # documents in a row do not see one another; None: prompts and turns alone

    @field_validator("train")
    @classmethod
    def _all_streamed_or_none(cls, sources: list[Source]) -> list[Source]:
        if len({source.stream for source in sources}) > 1:
            raise ValueError("some sources have `stream: true` and some have not; stream all of them, or prepare all")
        return sources

    @property
    def streams(self) -> bool:
        return self.train[0].stream

    @field_validator("eval")
    @classmethod
    def _names_differ(cls, sets: list[EvalSet]) -> list[EvalSet]:
        names = [held.name for held in sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sets are called {twice[0]!r}; give each a `name` of its own")
        return sets

    def isolates(self, source: Rows) -> bool:
        """Whether the documents that share a row are kept from one another. Text flows on by default."""
        return not source.is_text if self.isolate_documents is None else self.isolate_documents

    @property
    def isolates_any(self) -> bool:
        return any(self.isolates(source) for part in self.parts().values() for source in part.train)

    def parts(self) -> dict[str, Data]:
        """What is prepared, each by itself: the folder under the prepared data's, and the sources as data to read."""
        named: dict[str, Rows] = {f"eval/{held.name}": held for held in self.eval}
        if self.auxiliary is not None:
            named["auxiliary"] = self.auxiliary
        apart = {place: [Source(**rows.model_dump(exclude={"name", "weight"}))] for place, rows in named.items()}
        return {place: self.model_copy(update={"train": sources, "eval": [], "auxiliary": None})
                for place, sources in {"": self.train, **apart}.items()}


class Schedule(Section):
    """A value that changes with the step: `linear` or `cosine` between two values, or one `value`.

    steps: [first, last], counted from 0; None: all of the run's. Before it the first value holds, after it the last.
    """

    steps: tuple[Annotated[int, Field(ge=0)], PositiveInt] | None = None
    value: Finite | None = None
    linear: tuple[Finite, Finite] | None = None
    cosine: tuple[Finite, Finite] | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> Schedule:
        if sum(shape is not None for shape in (self.value, self.linear, self.cosine)) != 1:
            raise ValueError("one of `value`, `linear` and `cosine` says how the value goes")
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            raise ValueError(f"steps {list(self.steps)} do not go forward")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        return self.linear or self.cosine or (self.value or 0.0, self.value or 0.0)


class Piecewise(Section):
    """Courses one after the other, each with its own steps; between two of them the earlier one's last value holds."""

    pieces: Annotated[list[Schedule], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_after_the_other(self) -> Piecewise:
        if any(piece.steps is None for piece in self.pieces):
            raise ValueError("each piece names its `steps`")
        spans = [piece.steps for piece in self.pieces if piece.steps is not None]
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                raise ValueError(f"the pieces of steps {list(before)} and {list(after)} overlap or are out of order")
        return self


class TaidSchedule(Section):
    """TAID's update of its interpolation (arXiv 2501.16937): from the first value to the second, never slower than
    linearly over the run, and faster while the divergence falls."""

    adaptive: tuple[Share, Share] = (0.4, 1.0)
    rate: Share = 5e-4                       # α: how far a step goes at most, as a share of what is left to 1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99     # β: of the divergence's relative change

    @model_validator(mode="after")
    def _rises(self) -> TaidSchedule:
        if self.adaptive[0] > self.adaptive[1]:
            raise ValueError(f"adaptive {list(self.adaptive)} falls, and the interpolation only rises")
        return self


def bounding_values(scheduled: float | Schedule | Piecewise | TaidSchedule) -> list[float]:
    """The values that bound all those it takes."""
    if isinstance(scheduled, Piecewise):
        return [end for piece in scheduled.pieces for end in piece.ends]
    if isinstance(scheduled, TaidSchedule):
        return list(scheduled.adaptive)
    return list(scheduled.ends) if isinstance(scheduled, Schedule) else [scheduled]


def _within(low: float, high: float, open_low: bool = False) -> AfterValidator:
    def check(scheduled: float | Schedule | Piecewise | TaidSchedule) -> float | Schedule | Piecewise | TaidSchedule:
        if not all(low < value <= high if open_low else low <= value <= high for value in bounding_values(scheduled)):
            raise ValueError(f"values {'above' if open_low else 'from'} {low:g}"
                             + ("" if high == math.inf else f" to {high:g}"))
        return scheduled
    return AfterValidator(check)


def _value_kind(value: Any) -> str:
    for kind, name, key in ((Piecewise, VALUE_KINDS[2], "pieces"), (TaidSchedule, VALUE_KINDS[3], "adaptive")):
        if key in value if isinstance(value, Mapping) else isinstance(value, kind):
            return name
    return VALUE_KINDS[1] if isinstance(value, (Mapping, Schedule)) else VALUE_KINDS[0]


VALUE_KINDS = ("a number", "a course", "pieces of it", "an adaptive one")      # by which a wrong value is judged
Scheduled = Annotated[Annotated[Finite, Tag(VALUE_KINDS[0])] | Annotated[Schedule, Tag(VALUE_KINDS[1])]
                      | Annotated[Piecewise, Tag(VALUE_KINDS[2])] | Annotated[TaidSchedule, Tag(VALUE_KINDS[3])], Discriminator(_value_kind)]


class AlphaBetaSpec(Section):
    alpha: Finite
    beta: Finite


class DivergenceSpec(Section):
    alpha_beta: AlphaBetaSpec


class Loss(Section):
    """The AMiD objective spelt out, or a `preset` with its own keys (see `amid_ds.losses.preset`)."""

    model_config = ConfigDict(frozen=True, extra="allow")   # a preset's own keys; closed below for the objective itself
    preset: str | None = None
    __pydantic_extra__: dict[str, Scheduled] = Field(init=False)
    alpha: Scheduled = -1.0
    lam: Annotated[Scheduled, _within(0, 1)] = 0.1
    divergence: str | DivergenceSpec = "kl"
    order: str | dict[str, NonNegative] = "pr"
    temperature: Annotated[Scheduled, _within(0, math.inf, open_low=True)] = 1.0
    detach_assistant: bool = False
    kd_weight: Annotated[Scheduled, _within(0, math.inf)] = 1.0
    ce_weight: Annotated[Scheduled, _within(0, math.inf)] = 0.0

    @property
    def scheduled(self) -> dict[str, Schedule | Piecewise | TaidSchedule]:
        """The keys that change with the step."""
        return {name: value for name, value in self if isinstance(value, (Schedule, Piecewise, TaidSchedule))}

    @property
    def adaptive(self) -> TaidSchedule | None:
        """The interpolation that the divergence drives, if any."""
        return next((value for value in self.scheduled.values() if isinstance(value, TaidSchedule)), None)

    @model_validator(mode="after")
    def _only_the_interpolation_adapts(self) -> Loss:
        interpolation = "t" if self.preset == "taid" else "lam"
        for name, value in self.scheduled.items():
            if isinstance(value, TaidSchedule) and name != interpolation:
                raise ValueError(f"`{name}` is adaptive: only `{interpolation}`, the teacher's share, can be")
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> Loss:
        if not any(bounding_values(self.kd_weight) + bounding_values(self.ce_weight)):
            raise ValueError("kd_weight and ce_weight are both 0: nothing would be learnt; give one of them a weight")
        return self


class ProfileSteps(Section):
    """The optimizer steps, counted from 1, that torch's profiler traces."""

    start: PositiveInt
    steps: PositiveInt = 3


class Train(Section):
    steps: PositiveInt
    seq_length: Annotated[int, Field(ge=2)] = 512
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    learning_rate: Positive = 1.0e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.01
    gradient_clipping: NonNegative = 1.0     # 0: none
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: PositiveInt = 1
    eval_every: Annotated[int, Field(ge=0)] = 0   # steps between evaluations on data.eval; 0: at the end alone
    max_hours: Positive | None = None        # stop in order after so many hours of this life
    hang_timeout: Positive = 1800            # seconds that a step, or a rank before the first one, may take
    profile: ProfileSteps | None = None           # a trace of torch's profiler per rank


class Replay(Section):
    """DistiLLM's adaptive off-policy scheme (arXiv 2402.03898): with the threshold's probability a step learns from
    what the student has sampled, now or before. The threshold rises by 0.1 whenever the validation loss has risen."""

    init_threshold: Share = 0.0
    loss_eps: NonNegative = 0.1              # by how much, in nats per token, since the threshold rose last
    # Completions that are kept, over all ranks. A replay draws as many as the batch has prompts; where these
    # share rows and outnumber the capacity, all that are kept: such a step learns from less than a batch.
    capacity: PositiveInt = 1000
    # The share of the threshold at which the student samples afresh once the buffer is full: a half; growing from 0 to
    # 1 over the run; falling from 1 to 0.
    replay_ratio: Literal["constant", "increasing", "decreasing"] = "decreasing"


class Rollout(Section):
    """Steps whose responses the student samples for the batch's prompts."""

    share: Share | None = None               # of the steps, as GKD has it
    adaptive: Replay | None = None           # or DistiLLM's scheme
    temperature: NonNegative = 1.0           # 0: the most probable token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 32             # prompts that a rank completes at once
    end_of_text: str | None = None           # the token that ends a response; None: the tokenizer's own

    @model_validator(mode="after")
    def _one_scheme(self) -> Rollout:
        if (self.share is None) == (self.adaptive is None):
            raise ValueError("one of `share` and `adaptive` says when the student samples")
        return self


class CheckpointPolicy(Section):
    every: PositiveInt = 100
    keep: Annotated[int, Field(ge=2)] = 2    # two, so that a good one is left when the newest is damaged
    keep_every: PositiveInt | None = None    # milestones that stay: the steps that it divides
    allow_change: list[str] = []             # keys in which a resumed run may differ from the life before


class Slurm(Section):
    max_restarts: Annotated[int, Field(ge=0)] = 20      # of one job, after lives that failed


class Recipe(Section):
    student: Student
    teacher: Teacher | None = None           # None: plain training with cross entropy
    data: Data
    loss: Loss = Loss()
    rollout: Rollout | None = None           # None: the responses are the data's
    train: Train
    tensor_parallel: PositiveInt = 1         # neighbouring ranks that share each copy of the models
    deepspeed: str = "ds_configs/zero3.json"
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    slurm: Slurm = Slurm()
    output_dir: str

    @model_validator(mode="before")
    @classmethod
    def _without_a_teacher(cls, raw: Any) -> Any:
        """No teacher: the loss is cross entropy, whatever else `loss` says of a divergence from one."""
        if isinstance(raw, dict) and raw.get("teacher") is None and isinstance(raw.get("loss") or {}, dict):
            loss = raw.get("loss") or {}
            return {**raw, "loss": {**loss, "kd_weight": 0.0, "ce_weight": loss.get("ce_weight") or 1.0}}
        return raw

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> Recipe:
        if self.train.eval_every and not self.data.eval:
            raise ValueError(f"`train.eval_every` is {self.train.eval_every}, and `data.eval` names no set; name one")
        return self

    @model_validator(mode="after")
    def _something_to_roll_out(self) -> Recipe:
        rollout = self.rollout
        if rollout is None:
            return self
        if text := [source.path for source in self.data.train if source.is_text]:
            raise ValueError(f"`rollout`, and {text[0]} has plain text rows: nothing in them is a prompt; name its "
                             "columns `prompt` and `response`, or `messages`, or leave `rollout` out")
        if self.data.streams:
            raise ValueError("`rollout` with `stream: true`: prompts are looked at before the run; prepare the data")
        if self.teacher is None:
            raise ValueError("`rollout` without a `teacher`: nothing is learnt from the student's own words; name one")
        if rollout.max_new_tokens > self.train.seq_length:
            raise ValueError(f"`rollout.max_new_tokens` {rollout.max_new_tokens} leaves a prompt no room in "
                             f"`train.seq_length` {self.train.seq_length}; lower the one or raise the other")
        if rollout.adaptive is not None and not self.train.eval_every:
            raise ValueError("`rollout.adaptive` follows the validation loss; set `data.eval` and `train.eval_every`")
        if rollout.adaptive is not None and rollout.adaptive.capacity < self.train.global_batch_size:
            raise ValueError(f"`rollout.adaptive.capacity` {rollout.adaptive.capacity} is less than a batch; raise it "
                             f"to `train.global_batch_size` {self.train.global_batch_size} or more")
        return self

    @field_validator("output_dir", "deepspeed")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the path is empty; name a folder or file")
        return value

    @property
    def prepared_dir(self) -> Path:
        return Path(self.data.prepared) if self.data.prepared else Path(self.output_dir) / "data"
