"""On-policy distillation: choose the steps that train on student samples, and generate these.

Two published schemes. GKD's (arXiv 2306.13649): a fixed share of the steps. DistiLLM's (arXiv
2402.03898), as its published scripts have it: a share that grows when the validation loss rises,
and a buffer of completions that are learnt from more than once. The unit is a step of all ranks,
because under ZeRO-3 they generate together.

The samples of a step are a function of seed, step and position in the global batch. The buffer is
the same on every rank and counts completions over all of them (the scripts have one of that
capacity on each rank); it lies in the checkpoints beside the threshold, so a resumed run equals the
uninterrupted one. What such a step learns is the recipe's `sampled_loss`: without cross entropy,
unless the recipe asks for it, for student samples are no labels to learn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from amid_ds.checkpoint.manifest import checkpoint_name
from amid_ds.checkpoint.state import RolloutState, TrainState
from amid_ds.config.recipe import Recipe, Replay
from amid_ds.config.schedule import step_seed, value_at
from amid_ds.data import Batch
from amid_ds.data.batch import TokenRow, collate_rows
from amid_ds.data.pack import PackedRow, pack_best_fit
from amid_ds.data.prepared import PreparedDataset
from amid_ds.engine.engine import Engine
from amid_ds.engine.tensor_files import read_torch_file
from amid_ds.errors import InputError, TrainingError
from amid_ds.losses import IGNORE_INDEX
from amid_ds.models.sampler import SamplerPrompt
from amid_ds.run.folder import RunFolder
from amid_ds.training.sampling import EngineSampler
from amid_ds.training.validation import EvalMetrics, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The replay buffer's file in a checkpoint.
BUFFER_FILE = "rollout.pt"
THRESHOLD_STEP = 0.1
# What a step draws random numbers for; each has a seed of its own, apart from the ranks' from 0 on.
CHOICE_SEED, BUFFER_SEED, PROMPT_SEED = -1, -2, -3

logger = logging.getLogger(__name__)


class RolloutDocument(NamedTuple):
    """Ids of a prompt and its response, the index where the response begins, the row's source."""

    ids: list[int]
    start: int
    source: str


class StepBatch(NamedTuple):
    """The batch that a step learns from: this rank's micro-batches.

    tokens, sequences, padding: of the global batch, its valid tokens, the sequences that have one
    and the share of positions that hold nothing. sampled: the responses are student samples.
    metrics: what metrics.jsonl says of the choice.
    """

    window: list[Batch]
    tokens: float
    sequences: float
    padding: float
    sampled: bool = False
    metrics: Mapping[str, float] = {}


class Rollouts:
    """The rollouts of one attempt.

    Made, and asked, by all ranks. `state` is the run's, of which `rollout` is kept up to date here.
    """

    def __init__(self, recipe: Recipe, engine: Engine, tokenizer: PreTrainedTokenizerBase,
                 state: TrainState) -> None:
        assert recipe.rollout is not None
        self.recipe, self.rollout, self.engine, self.state = recipe, recipe.rollout, engine, state
        self.world = engine.world
        self.sampler = EngineSampler(engine, engine.distiller.student, tokenizer, self.rollout,
                                     self.rollout.end_of_text)
        self.buffer: list[RolloutDocument] = []
        if state.rollout is not None:
            folder = RunFolder(Path(recipe.output_dir)).checkpoints / checkpoint_name(state.step)
            self.buffer = [RolloutDocument(*document)
                           for document in read_torch_file(folder / BUFFER_FILE)]
        elif self.rollout.adaptive is not None:
            self.update_threshold(validate(recipe, engine))

    def update_threshold(self, metrics: Mapping[str, EvalMetrics]) -> None:
        """Raise the threshold where the mean loss over the evaluation sets has risen.

        Called before the first step and after each evaluation. Raises TrainingError for a loss that
        is infinite.
        """
        if self.rollout.adaptive is None:
            return
        total = tokens = 0.0
        for name, each in metrics.items():
            if each["loss"] is None or each["tokens"] is None:
                raise TrainingError(f"the loss on the evaluation set {name!r} is infinite, and "
                                    "rollout.adaptive follows it\n  leave rows out that have "
                                    "tokens which the student never says, or set rollout.share")
            total, tokens = total + each["loss"] * each["tokens"], tokens + each["tokens"]
        loss = total / tokens
        self.state.rollout = updated_threshold(self.rollout.adaptive, self.state.rollout, loss)

    @property
    def checkpoint_files(self) -> dict[str, object]:
        """The contents that this rank adds to a checkpoint, by file name."""
        kept = self.rollout.adaptive is not None and self.world.is_main
        return {BUFFER_FILE: [tuple(document) for document in self.buffer]} if kept else {}

    def batch_for_step(self, data: StepBatch) -> StepBatch:
        """The data's batch, sampled responses to its prompts, or responses from the buffer."""
        step, total = self.state.step, self.recipe.train.total_steps
        chance = float(torch.rand((), generator=_generator(self.recipe, step, CHOICE_SEED)))
        source, metrics = self._choose(chance)
        if not value_at(self.recipe.sampled_loss.kd_weight, step, total):
            # A step without the teacher would learn nothing from student samples.
            source = "data"
        metrics = {"rollout": float(source != "data"), **metrics}
        if "replay" in metrics:
            metrics["replay"] = float(source == "replay")
        if source == "data":
            return data._replace(metrics=metrics)
        documents = self._sample(data.window) if source == "fresh" else self._replay(data.window)
        return self._to_batch(documents, metrics)

    def _choose(self, chance: float) -> tuple[str, dict[str, float]]:
        """(`data`, `fresh` or `replay`; the scheme's own metrics) of the step.

        chance: the step's random number in [0, 1).
        """
        adaptive = self.rollout.adaptive
        if adaptive is None:
            assert self.rollout.share is not None
            return ("fresh" if chance < self.rollout.share else "data"), {}
        assert self.state.rollout is not None
        threshold = self.state.rollout["threshold"]
        source = choose_source(adaptive, threshold, chance, len(self.buffer), self.state.step + 1,
                               self.recipe.train.total_steps)
        return source, {"replay": 0.0, "rollout_threshold": threshold}

    def _sample(self, window: list[Batch]) -> list[RolloutDocument]:
        """Sampled responses to the prompts of this rank's window; they go into the buffer."""
        prompts, keys = [], []
        for row, number, document in self._prompts(window):
            room = min(self.rollout.max_new_tokens,
                       self.recipe.train.seq_length + 1 - document.start)
            step = step_seed(self.recipe.train.seed, self.state.step, PROMPT_SEED)
            prompts.append(SamplerPrompt(document.ids[:document.start], room,
                                         step_seed(step, row, number)))
            keys.append((row, number, document.source))
        responses = self.sampler.complete(prompts)
        documents = [RolloutDocument(prompt.ids + ids, len(prompt.ids), source)
                     for prompt, ids, (*_, source) in zip(prompts, responses, keys, strict=True)]
        if self.rollout.adaptive is not None:
            own = [(row, number, document)
                   for (row, number, _), document in zip(keys, documents, strict=True)]
            # Tensor-parallel peers have the same documents: one of them contributes.
            parts = self.world.gather(own if self.world.tp_rank == 0 else [])
            everyone = sorted(entry for part in parts for entry in part)
            self.buffer = [*self.buffer, *(d for *_, d in everyone)][
                -self.rollout.adaptive.capacity:]
        return documents

    def _replay(self, window: list[Batch]) -> list[RolloutDocument]:
        """This rank's part of as many documents as the global batch has, drawn from the buffer.

        Without replacement.
        """
        count = sum(1 for _ in self._prompts(window))
        total = int(self.world.sum([count])[0])
        generator = _generator(self.recipe, self.state.step, BUFFER_SEED)
        order = torch.randperm(len(self.buffer), generator=generator).tolist()
        return [self.buffer[i] for i in order[:total][self.world.dp_rank::self.world.dp_size]]

    def _prompts(self, window: list[Batch]) -> Iterator[tuple[int, int, RolloutDocument]]:
        """(row in the global batch, document in the row, document) of a window's documents."""
        size = self.recipe.train.micro_batch_size
        for micro, batch in enumerate(window):
            for row in range(len(batch.input_ids)):
                global_row = (micro * self.world.dp_size + self.world.dp_rank) * size + row
                for number, document in enumerate(split_documents(batch, row)):
                    yield global_row, number, document

    def _to_batch(self, documents: Sequence[RolloutDocument],
                  metrics: Mapping[str, float]) -> StepBatch:
        """The documents as micro-batches, as many on every rank: some may hold no valid token."""
        train = self.recipe.train
        rows = pack_rows(documents, train.seq_length,
                         self.recipe.data.isolate_documents is not False)
        window = [collate_rows(rows[i:i + train.micro_batch_size], [])
                  for i in range(0, len(rows), train.micro_batch_size)]
        for _ in range(self.world.most(len(window)) - len(window)):
            empty = collate_rows([TokenRow(np.zeros(3, np.int64), np.empty(0, np.int32),
                                           np.empty(0, np.int32), "")], [])
            window.append(replace(empty, padding=empty.input_ids.numel(), sources=[]))
        counts = [[len(b.valid), b.sequence_count, b.padding, b.input_ids.numel()] for b in window]
        tokens, sequences, padding, total = self.world.sum(
            [sum(column) for column in zip(*counts, strict=True)])
        return StepBatch(window, tokens, sequences, padding / total, True, metrics)


def _generator(recipe: Recipe, step: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(recipe.train.seed, step, purpose))


def updated_threshold(adaptive: Replay, state: RolloutState | None, loss: float) -> RolloutState:
    """The threshold, and the loss to compare the next one with, after an evaluation.

    state: the one before; None at the first evaluation. loss: the evaluation's mean loss.
    """
    if state is None:
        return {"threshold": adaptive.init_threshold, "loss": loss}
    if loss >= state["loss"] + adaptive.loss_eps:
        return {"threshold": min(1.0, state["threshold"] + THRESHOLD_STEP), "loss": loss}
    return {"threshold": state["threshold"], "loss": state["loss"]}


def choose_source(adaptive: Replay, threshold: float, chance: float, kept: int, number: int,
                  total: int) -> str:
    """The source of optimizer step `number` (from 1) of `total`: `data`, `fresh` or `replay`.

    chance: the step's random number in [0, 1). kept: completions in the buffer.
    """
    share_of_fresh = {"constant": 0.5, "increasing": number / total,
                      "decreasing": 1 - number / total}[adaptive.replay_ratio]
    if chance < threshold * share_of_fresh or (chance < threshold and kept < adaptive.capacity):
        return "fresh"
    return "replay" if chance < threshold else "data"


def split_documents(batch: Batch, row: int) -> Iterator[RolloutDocument]:
    """The documents of one row, each up to its last response.

    That response is left out: `start` is where it began.
    """
    ids, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
    positions = range(len(ids)) if batch.positions is None else batch.positions[row].tolist()
    starts = [i for i, position in enumerate(positions) if position == 0]
    for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        labelled = [i for i in range(first, end) if labels[i] != IGNORE_INDEX]
        if labelled:
            last = next(i for i in reversed(labelled)
                        if i == first or labels[i - 1] == IGNORE_INDEX)
            yield RolloutDocument(ids[first:last + 1], last + 1 - first, batch.sources[row])


def pack_rows(documents: Sequence[RolloutDocument], seq_length: int,
              isolated: bool) -> list[TokenRow]:
    """The documents as rows of at most seq_length + 1 tokens.

    Several to a row where they are isolated, else each in its own.
    """
    packed = [PackedRow(d.ids, [d.start, len(d.ids)], 0, number)
              for number, d in enumerate(documents)]
    rows = pack_best_fit(packed, seq_length) if isolated else packed
    return [TokenRow.from_packed(row, documents[row.line].source) for row in rows]


def check_prompt_lengths(recipe: Recipe) -> None:
    """Check that every prompt of the prepared data leaves room for `max_new_tokens` in its row.

    Raises InputError where one does not; with data.on_bad_row: skip such prompts get what room
    there is, and their number is logged.
    """
    if recipe.rollout is None:
        return
    longest_allowed = recipe.train.seq_length + 1 - recipe.rollout.max_new_tokens
    prepared = PreparedDataset(recipe.prepared_dir)
    too_long = [document for number in range(len(prepared))
                for document in split_documents(prepared.batch([number]), 0)
                if document.start > longest_allowed]
    if too_long and recipe.data.on_bad_row == "error":
        longest = max(document.start for document in too_long)
        raise InputError(
            f"{len(too_long)} prompt(s) leave no room to generate {recipe.rollout.max_new_tokens} "
            f"tokens in a row of {recipe.train.seq_length}; the first is that of "
            f"{too_long[0].source}: {too_long[0].start} tokens",
            f"prompts of at most {longest_allowed} tokens",
            f"set train.seq_length to {longest - 1 + recipe.rollout.max_new_tokens} or more, lower "
            "rollout.max_new_tokens, or set data.on_bad_row=skip: these prompts then get what "
            "room there is")
    if too_long:
        logger.info("%d prompts leave less room than rollout.max_new_tokens; they get what there "
                    "is", len(too_long))
