"""The recipe: one typed, frozen, closed object, from defaults, a YAML file and `a.b=c` overrides.

An unknown key is an error, nothing is guessed, and all problems come in one message. Checks that
need the recipe alone are here; checks that need ranks, models or data are in training/job.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from amid_ds.config.checkpoint_section import Best, CheckpointPolicy
from amid_ds.config.data_section import Auxiliary, Data, EvalSet, Generation, Rows, Source
from amid_ds.config.loss_section import (
    BESIDE_THE_DIVERGENCE,
    Loss,
    OwnLoss,
    Temperatures,
    TokenWeight,
    overridden,
    without_divergence,
)
from amid_ds.config.model_sections import (
    AnyTeacher,
    CachedTeacher,
    Delta,
    Dtype,
    HubKwargs,
    Lora,
    MeanTeacher,
    PretrainedModel,
    Student,
    Teacher,
)
from amid_ds.config.optimizer_section import Muon, OptimizerKeys
from amid_ds.config.rate_section import RateKeys
from amid_ds.config.reporting_section import EvalTasks, ReportingKeys, Statistic
from amid_ds.config.rollout_section import Replay, Rollout
from amid_ds.config.scheduled_values import (
    PerTokenSpec,
    Piecewise,
    Schedule,
    TaidSchedule,
    bounding_values,
)
from amid_ds.config.section import (
    MAX_INT,
    Decay,
    NonNegative,
    NonNegativeInt,
    PathText,
    Positive,
    PositiveInt,
    Section,
)

# Every section under one roof: other folders import them from here.
__all__ = [
    "Auxiliary", "Best", "CachedTeacher", "CheckpointPolicy", "Data", "Delta", "Dtype", "EvalSet",
    "EvalTasks", "Generation", "HubKwargs", "Lora", "Loss", "MeanTeacher", "Muon", "OwnLoss",
    "PerTokenSpec", "Piecewise", "PretrainedModel", "ProfileSteps", "Recipe", "Replay", "Rollout",
    "Rows", "Schedule", "Section", "Slurm", "Source", "Statistic", "Student", "TaidSchedule",
    "Teacher", "Temperatures", "TokenWeight", "Train", "bounding_values", "overridden"]


class ProfileSteps(Section):
    """The optimizer steps that torch's profiler traces."""

    start: PositiveInt
    """The first one, counted from 1."""
    steps: PositiveInt = 3
    """Their number."""


class Train(OptimizerKeys, RateKeys, ReportingKeys):
    """The optimization: steps, batches, learning rate, intervals of logs and evaluations."""

    seq_length: Annotated[int, Field(ge=2, le=MAX_INT)] = 512
    """Tokens in a row."""
    micro_batch_size: PositiveInt = 1
    """Rows in one forward and backward pass of a rank."""
    global_batch_size: PositiveInt
    """Rows in an optimizer step, over all ranks."""
    ema: Decay | None = None
    """Keep a running mean of the student with this decay, which is then what is exported."""
    gradient_clipping: NonNegative = 1.0
    """The greatest norm of the gradient; 0: no clipping."""
    seed: NonNegativeInt = 0
    """Of the data's order, dropout and sampling."""
    deterministic: bool = False
    """On a GPU, take kernels that give the same digits each time; they are slower."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on data.eval; 0: only at the end."""
    max_hours: Positive | None = None
    """Stop in good order, to be started again, once one attempt has taken so long."""
    hang_timeout: Positive = 1800
    """Seconds that a step, or a rank before its first step, may take."""
    profile: ProfileSteps | None = None
    """Steps to trace with torch's profiler, on every rank."""

    def logs(self, step: int) -> bool:
        """True for a step (from 1) of which metrics.jsonl gets a line."""
        return step % self.log_every == 0 or step == self.total_steps

    @property
    def muon_ratio(self) -> float | None:
        """Muon's learning rate over AdamW's, the same at every step; None without Muon."""
        return None if self.muon is None else self.muon.learning_rate / self.learning_rate


class Slurm(Section):
    """The requeueing of a Slurm job."""

    max_restarts: NonNegativeInt = 20
    """Restarts of one job after attempts that failed."""


# What `rollout.estimator: sampled` puts in the place of the divergence: nothing else may name it,
# for other words are no samples of the student. Its own key may stand in `rollout.loss`.
SAMPLED_REVERSE_KL, SAMPLED_DIVERGENCE, BASELINE = "sampled_rkl", "sampled_reverse_kl", "baseline"


def _without_divergences(raw: dict[str, object]) -> dict[str, object]:
    """A recipe before its check, in the losses of its sources no divergence."""
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("train"), list):
        return raw

    def without(source: object) -> object:
        if not isinstance(source, dict) or not isinstance(source.get("loss"), dict):
            return source
        return {**source, "loss": without_divergence(source["loss"], None)}
    return {**raw, "data": {**data, "train": [without(source) for source in data["train"]]}}


class Recipe(Section):
    """Everything that a run is asked to do."""

    student: Student
    teacher: AnyTeacher | None = None
    """A model, what `amid-ds cache` wrote of one, or the student's running mean; None: plain
    training with cross entropy."""
    data: Data
    loss: Loss = Loss()
    rollout: Rollout | None = None
    """None: the responses are the data's."""
    train: Train
    tensor_parallel: PositiveInt = 1
    """Neighbouring ranks that share each copy of the models."""
    expert_parallel: PositiveInt = 1
    """Neighbouring ranks over which the experts of each layer are distributed."""
    deepspeed: PathText = "ds_configs/zero3.json"
    """The path of a DeepSpeed config; its batch sizes come from the recipe."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    slurm: Slurm = Slurm()
    eval_tasks: EvalTasks | None = None
    """None: no benchmarks of lm-evaluation-harness."""
    output_dir: PathText
    """The run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_teacher(cls, raw: object) -> object:
        """Without a teacher the loss is cross entropy, whatever `loss` says of a divergence."""
        if not isinstance(raw, dict) or raw.get("teacher") is not None:
            return raw
        loss = raw.get("loss", {})
        if not isinstance(loss, dict):
            return raw
        return {**_without_divergences(raw), "loss": without_divergence(loss, 1.0)}

    @model_validator(mode="after")
    def _own_losses_fit(self) -> Recipe:
        """Each `loss` of a source, or of the rollouts, makes a whole with the recipe's."""
        for place, own in {"loss": OwnLoss(), **self.own_losses}.items():
            try:
                whole = overridden(self.loss, own)
            except ValidationError as error:
                problems = "; ".join(each["msg"].removeprefix("Value error, ")
                                     for each in error.errors())
                raise ValueError(f"`{place}` over `loss`: {problems}") from None
            if whole.preset == SAMPLED_REVERSE_KL or SAMPLED_DIVERGENCE in whole.divergence:
                raise ValueError(f"`{place}` names the sampled reverse KL, which is for the "
                                 "student's own words alone; set `rollout.estimator: sampled`")
            if self.teacher is None and whole.token_weight is not None:
                raise ValueError(f"`{place}` has a `token_weight` and there is no `teacher` to "
                                 "measure the tokens with; name one, or leave it out")
        return self

    @model_validator(mode="after")
    def _optimizer_fits_the_student(self) -> Recipe:
        if self.student.lora is not None and self.train.optimizer == "muon":
            raise ValueError("`student.lora` with `train.optimizer: muon`, which would "
                             "orthogonalize the two factors of an adapter one by one; set `adamw`")
        return self

    @model_validator(mode="after")
    def _mean_is_of_whole_students(self) -> Recipe:
        if isinstance(self.teacher, MeanTeacher) and (self.student.lora or self.student.freeze):
            raise ValueError("`teacher.ema` with `student.lora` or `student.freeze`: the teacher "
                             "is the mean of a student that trains whole; leave one of them out")
        return self

    @model_validator(mode="after")
    def _vocabulary_may_grow(self) -> Recipe:
        teacher = self.live_teacher
        if teacher is None or teacher.vocabulary == "same":
            return self
        found = ("`rollout`: a sample has new tokens" if self.rollout is not None else
                 f"`tensor_parallel` {self.tensor_parallel}: heads are cut alike"
                 if self.tensor_parallel > 1 else
                 "`teacher.delta`" if teacher.delta is not None else "")
        if found:
            raise ValueError(f"`teacher.vocabulary: grown` with {found}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> Recipe:
        if self.train.eval_every and not self.data.eval:
            raise ValueError(f"`train.eval_every` is {self.train.eval_every}, and `data.eval` "
                             "names no set; name one")
        return self

    @model_validator(mode="after")
    def _tasks_judge_checkpoints(self) -> Recipe:
        tasks, saved = self.eval_tasks, self.checkpoint.every
        if tasks is not None and tasks.every % saved:
            raise ValueError(f"`eval_tasks.every` {tasks.every} is no multiple of "
                             f"`checkpoint.every` {saved}, and checkpoints are what is judged; "
                             f"set it to {-(-tasks.every // saved) * saved}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        best = self.checkpoint.best
        has_teacher = self.teacher is not None and self.cached_teacher is None
        problems = [] if best is None else list(best.problems(
            self.data.eval, has_teacher, self.train.eval_every))
        if best is not None and problems:
            raise ValueError(f"`checkpoint.best.metric` {best.metric!r} is not measured: "
                             + "; ".join(problems))
        return self

    @model_validator(mode="after")
    def _generations_fit(self) -> Recipe:
        for each in self.data.eval:
            if each.generate and each.generate.max_new_tokens >= self.train.seq_length:
                raise ValueError(f"`generate.max_new_tokens` {each.generate.max_new_tokens} of the "
                                 f"set {each.name!r} leaves a prompt no room in `train.seq_length` "
                                 f"{self.train.seq_length}; lower the one or raise the other")
        return self

    @model_validator(mode="after")
    def _cache_has_every_row(self) -> Recipe:
        if self.cached_teacher is None:
            return self
        if self.rollout is not None:
            raise ValueError("`rollout` with `teacher.cached`: no cache has the student's own "
                             "words; name a `teacher.model`, or leave `rollout` out")
        if self.data.streams:
            raise ValueError("`stream: true` with `teacher.cached`, which has the prepared rows by "
                             "their numbers; prepare the data")
        return self

    @model_validator(mode="after")
    def _rollout_fits(self) -> Recipe:
        if self.rollout is not None:
            self._require_prompts()
            self.rollout.require_room(self.train.seq_length, self.train.global_batch_size,
                                      self.train.eval_every)
            self._require_own_words(self.rollout)
        return self

    def _require_prompts(self) -> None:
        if text := [source.path for source in self.data.train if source.is_text]:
            raise ValueError(f"`rollout`, and {text[0]} has plain text rows: nothing in them is a "
                             "prompt; name its columns `prompt` and `response`, or `messages`, or "
                             "leave `rollout` out")
        if self.data.streams:
            raise ValueError("`rollout` with `stream: true`: prompts are looked at before the run; "
                             "prepare the data")
        if self.teacher is None:
            raise ValueError("`rollout` without a `teacher`: nothing is learnt from the student's "
                             "own samples; name one")
        if not any(bounding_values(self.sampled_loss.kd_weight)):
            raise ValueError("`rollout` with a `kd_weight` of 0: nothing is learnt from the "
                             "student's own samples; set `rollout.loss.kd_weight`, or leave "
                             "`rollout` out")

    def _require_own_words(self, rollout: Rollout) -> None:
        """What is learnt from the student's samples is learnt from them alone."""
        own, is_sampled = rollout.loss, rollout.estimator == "sampled"
        if self.loss.adaptive is not None and (own is not None or is_sampled):
            raise ValueError("`loss` has an adaptive value, which follows one divergence, and "
                             "rollouts have another: leave `rollout.loss` and "
                             "`rollout.estimator` out, or take another schedule")
        if not is_sampled:
            return
        if wrong := sorted(own.model_fields_set - {*BESIDE_THE_DIVERGENCE, BASELINE} if own
                           else ()):
            raise ValueError(f"`rollout.loss.{wrong[0]}` with `rollout.estimator: sampled`, which "
                             "is the reverse KL; leave one of them out")
        temperature = self.sampled_loss.temperature
        if isinstance(temperature, Temperatures):
            temperature = temperature.student
        found = (("`rollout.adaptive`" if rollout.adaptive is not None else "")
                 or (f"`rollout.top_p` {rollout.top_p:g}" if rollout.top_p < 1 else "")
                 or (f"`rollout.temperature` {rollout.temperature:g} and another of the loss's "
                     "student" if rollout.temperature != temperature else ""))
        if found:
            raise ValueError(f"`rollout.estimator: sampled` with {found}: it is right for samples "
                             "of today's student as the loss has it; set `share`, `top_p` 1 and "
                             "the same temperature, or `estimator: exact`")

    @field_validator("output_dir", "deepspeed")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the path is empty; name a folder or file")
        return value

    def trusting(self, allowed: bool) -> Recipe:
        """This recipe; unless `allowed`, without leave to run the code that comes with its models.

        For a recipe that another run left: what it allowed, its own user had read. The user of this
        command allows it, or nobody does.
        """
        if allowed:
            return self
        untrusted = {"trust_remote_code": False}
        teacher = self.live_teacher
        return self.model_copy(update={
            "student": self.student.model_copy(update=untrusted),
            "teacher": self.teacher if teacher is None else teacher.model_copy(update={
                **untrusted, "delta": teacher.delta and teacher.delta.trusting_none()})})

    @property
    def live_teacher(self) -> Teacher | None:
        """The teacher that is a model of its own, loaded and run beside the student."""
        return self.teacher if isinstance(self.teacher, Teacher) else None

    @property
    def cached_teacher(self) -> CachedTeacher | None:
        """The teacher of which there is what `amid-ds cache` wrote, and no model."""
        return self.teacher if isinstance(self.teacher, CachedTeacher) else None

    @property
    def own_losses(self) -> dict[str, OwnLoss]:
        """Every `loss` beside the recipe's own, by its place."""
        own = {f"data.train.{number}.loss": source.loss
               for number, source in enumerate(self.data.train)}
        if self.rollout is not None:
            own["rollout.loss"] = self.rollout.loss
        return {place: loss for place, loss in own.items() if loss is not None}

    @property
    def source_losses(self) -> dict[int, Loss]:
        """What is learnt from sources with a `loss` of their own, by their index in data.train."""
        return {number: overridden(self.loss, source.loss)
                for number, source in enumerate(self.data.train) if source.loss is not None}

    @property
    def sampled_loss(self) -> Loss:
        """What is learnt from the student's own words: no cross entropy, unless it is named."""
        own = self.rollout.loss if self.rollout is not None else None
        loss = self.loss if own is None else overridden(self.loss, own)
        if self.rollout is not None and self.rollout.estimator == "sampled":
            baseline = {BASELINE: getattr(own, BASELINE)} if hasattr(own, BASELINE) else {}
            loss = overridden(loss, OwnLoss.model_validate(
                {"preset": SAMPLED_REVERSE_KL, **baseline}))
        if own is None or "ce_weight" not in own.model_fields_set:
            loss = loss.model_copy(update={"ce_weight": 0.0})
        return loss

    @property
    def losses(self) -> list[Loss]:
        """Every loss that a step may have: the data's, its sources', the student's own words'."""
        return [self.loss, *self.source_losses.values(), self.sampled_loss]

    @property
    def prepared_dir(self) -> Path:
        """The folder of the prepared data."""
        return Path(self.data.prepared) if self.data.prepared else Path(self.output_dir) / "data"
