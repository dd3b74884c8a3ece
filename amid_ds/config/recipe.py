"""The recipe: one typed, frozen, closed object, from defaults, a YAML file and `a.b=c` overrides.

An unknown key is an error, nothing is guessed, and all problems come in one message. Checks that
need the recipe alone are here; checks that need ranks, models or data are in training/job.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from amid_ds.config.checkpoint_section import Best, CheckpointPolicy
from amid_ds.config.data_section import Auxiliary, Data, EvalSet, Generation, Rows, Source
from amid_ds.config.loss_section import AlphaBetaSpec, DivergenceSpec, Loss
from amid_ds.config.optimizer_section import Muon, OptimizerKeys
from amid_ds.config.rate_section import RateKeys
from amid_ds.config.scheduled_values import Piecewise, Schedule, TaidSchedule, bounding_values
from amid_ds.config.section import (
    MAX_INT,
    NonNegative,
    NonNegativeInt,
    PathText,
    Positive,
    PositiveInt,
    Section,
    Share,
)

# Every section under one roof: other folders import them from here.
__all__ = [
    "AlphaBetaSpec", "Auxiliary", "Best", "CheckpointPolicy", "Data", "DivergenceSpec", "Dtype",
    "EvalSet", "Generation", "HubKwargs", "Loss", "Muon", "Piecewise", "PretrainedModel",
    "ProfileSteps", "Recipe", "Replay", "Rollout", "Rows", "Schedule", "Section", "Slurm", "Source",
    "Student", "TaidSchedule", "Teacher", "Train", "bounding_values"]

Dtype = Literal["auto", "bf16", "fp32"]


class HubKwargs(TypedDict):
    """The arguments of transformers' `from_pretrained` that say which files of a model to open."""

    revision: str | None
    trust_remote_code: bool


class PretrainedModel(Section):
    """A causal language model: a folder, or an id on the hub."""

    model: PathText
    """The folder's path, or the id."""
    revision: str | None = None
    """The commit, branch or tag of a model on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the weights."""

    @property
    def hub_kwargs(self) -> HubKwargs:
        """Keyword arguments for transformers, to go with the model's name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class Student(PretrainedModel):
    """The model that is trained."""

    dtype: Dtype = "auto"
    """Of the weights; auto: the DeepSpeed config's."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""


class Teacher(PretrainedModel):
    """The model that is distilled from."""

    dtype: Dtype = "auto"
    """Of the weights; auto: the checkpoint's."""
    placement: Literal["auto", "zero3", "node", "replicated"] = "auto"
    """zero3: sharded over all ranks; node: over those of each node; replicated: whole on every
    rank, never gathered; auto: by the plan the fastest of those that fit."""
    shard_over: PositiveInt | None = None
    """Neighbouring data-parallel ranks over which `node` shards it; None: those of a node."""
    max_tokens_per_pass: PositiveInt | None = None
    """The most tokens of an optimizer step in one forward pass; None: by free memory."""

    @model_validator(mode="after")
    def _shards_over_neighbours(self) -> Teacher:
        if self.shard_over is not None and self.placement not in ("auto", "node"):
            raise ValueError(f"`shard_over` {self.shard_over} with `placement: {self.placement}`, "
                             "which has no ranks to choose; leave it out, or set `placement: node`")
        return self


class ProfileSteps(Section):
    """The optimizer steps that torch's profiler traces."""

    start: PositiveInt
    """The first one, counted from 1."""
    steps: PositiveInt = 3
    """Their number."""


class Train(OptimizerKeys, RateKeys):
    """The optimization: steps, batches, learning rate, intervals of logs and evaluations."""

    seq_length: Annotated[int, Field(ge=2, le=MAX_INT)] = 512
    """Tokens in a row."""
    micro_batch_size: PositiveInt = 1
    """Rows in one forward and backward pass of a rank."""
    global_batch_size: PositiveInt
    """Rows in an optimizer step, over all ranks."""
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

    @property
    def muon_ratio(self) -> float | None:
        """Muon's learning rate over AdamW's, the same at every step; None without Muon."""
        return None if self.muon is None else self.muon.learning_rate / self.learning_rate


class Replay(Section):
    """DistiLLM's adaptive off-policy scheme (arXiv 2402.03898).

    With the threshold's probability a step learns from samples of the student, new or kept ones.
    The threshold rises by 0.1 whenever the validation loss has risen.
    """

    init_threshold: Share = 0.0
    """The threshold at the first step."""
    loss_eps: NonNegative = 0.1
    """The least rise of the validation loss, in nats per token, since the threshold rose last."""
    # A replay draws as many completions as the batch has prompts. If these share rows and
    # outnumber the capacity, the step learns from all that are kept, which is less than a batch.
    capacity: PositiveInt = 1000
    """Completions that are kept, over all ranks."""
    replay_ratio: Literal["constant", "increasing", "decreasing"] = "decreasing"
    """The share of the threshold at which the student samples anew once the buffer is full.
    constant: a half; increasing: from 0 to 1 over the run; decreasing: from 1 to 0."""


class Rollout(Section):
    """Steps with responses that the student samples for the batch's prompts."""

    share: Share | None = None
    """The share of such steps, as in GKD; or else `adaptive`."""
    adaptive: Replay | None = None
    """DistiLLM's scheme; or else `share`."""
    temperature: NonNegative = 1.0
    """Of the sampling; 0: the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens that have this probability together."""
    max_new_tokens: PositiveInt = 256
    """The longest response."""
    batch_size: PositiveInt = 32
    """Prompts that a rank completes at once."""
    end_of_text: str | None = None
    """The token that ends a response; None: the ends that the student and its tokenizer name."""

    @model_validator(mode="after")
    def _one_scheme(self) -> Rollout:
        if (self.share is None) == (self.adaptive is None):
            raise ValueError("one of `share` and `adaptive` says when the student samples")
        return self


class Slurm(Section):
    """The requeueing of a Slurm job."""

    max_restarts: NonNegativeInt = 20
    """Restarts of one job after attempts that failed."""


class Recipe(Section):
    """Everything that a run is asked to do."""

    student: Student
    teacher: Teacher | None = None
    """None: plain training with cross entropy."""
    data: Data
    loss: Loss = Loss()
    rollout: Rollout | None = None
    """None: the responses are the data's."""
    train: Train
    tensor_parallel: PositiveInt = 1
    """Neighbouring ranks that share each copy of the models."""
    deepspeed: PathText = "ds_configs/zero3.json"
    """The path of a DeepSpeed config; its batch sizes come from the recipe."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    slurm: Slurm = Slurm()
    output_dir: PathText
    """The run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_teacher(cls, raw: object) -> object:
        """Without a teacher the loss is cross entropy, whatever `loss` says of a divergence."""
        if not isinstance(raw, dict) or raw.get("teacher") is not None:
            return raw
        loss = raw.get("loss") or {}
        if not isinstance(loss, dict):
            return raw
        ce_weight = loss.get("ce_weight") or 1.0
        return {**raw, "loss": {**loss, "kd_weight": 0.0, "ce_weight": ce_weight}}

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> Recipe:
        if self.train.eval_every and not self.data.eval:
            raise ValueError(f"`train.eval_every` is {self.train.eval_every}, and `data.eval` "
                             "names no set; name one")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        best = self.checkpoint.best
        problems = [] if best is None else list(best.problems(
            self.data.eval, self.teacher is not None, self.train.eval_every))
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
    def _rollout_fits(self) -> Recipe:
        if self.rollout is not None:
            self._require_prompts()
            self._require_rollout_sizes(self.rollout)
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

    def _require_rollout_sizes(self, rollout: Rollout) -> None:
        train, adaptive = self.train, rollout.adaptive
        if rollout.max_new_tokens > train.seq_length:
            raise ValueError(f"`rollout.max_new_tokens` {rollout.max_new_tokens} leaves a prompt "
                             f"no room in `train.seq_length` {train.seq_length}; lower the one or "
                             "raise the other")
        if adaptive is not None and not train.eval_every:
            raise ValueError("`rollout.adaptive` follows the validation loss; set `data.eval` and "
                             "`train.eval_every`")
        if adaptive is not None and adaptive.capacity < train.global_batch_size:
            raise ValueError(f"`rollout.adaptive.capacity` {adaptive.capacity} is less than a "
                             "batch; raise it to `train.global_batch_size` "
                             f"{train.global_batch_size} or more")

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
        return self.model_copy(update={
            "student": self.student.model_copy(update=untrusted),
            "teacher": self.teacher and self.teacher.model_copy(update=untrusted)})

    @property
    def prepared_dir(self) -> Path:
        """The folder of the prepared data."""
        return Path(self.data.prepared) if self.data.prepared else Path(self.output_dir) / "data"
