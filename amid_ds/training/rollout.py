"""Steps whose responses are the student's own: which ones, what is sampled for them, what is kept to learn from again.

Two published schemes. GKD's (arXiv 2306.13649): a fixed share of the steps. DistiLLM's (arXiv 2402.03898), as its
published scripts have it: a share that grows when the validation loss rises, and a buffer of completions that are
learnt from more than once. A step is the unit, for all ranks together, because under ZeRO-3 they generate together.

What a step samples is a function of seed, step and place in the global batch. The buffer is the same on every rank and
counts completions over all of them (the scripts have one of that capacity on each rank); it lies in the checkpoints
beside the threshold, and so a resumed run is the uninterrupted one. Cross entropy is left out of such a step: a
student's own words say nothing about the words to be learnt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from amid_ds.checkpoint.manifest import checkpoint_name
from amid_ds.config.recipe import Recipe, Replay
from amid_ds.config.schedule import step_seed, value_at
from amid_ds.data import Batch, end_of_text
from amid_ds.data.loader import IGNORED, Prepared, Row, batch_of
from amid_ds.data.pack import Packed, pack_together
from amid_ds.distributed.world import World
from amid_ds.engine import engine, gather
from amid_ds.errors import InputError
from amid_ds.models.sampler import Sampler, SamplerPrompt
from amid_ds.training.validation import validate

BUFFER_FILE = "rollout.pt"                  # in a checkpoint: the buffer
THRESHOLD_STEP = 0.1
CHOICE_SEED, BUFFER_SEED, PROMPT_SEED = -1, -2, -3    # what a step draws random numbers for, apart from one another


class RolloutDocument(NamedTuple):
    """A prompt and what follows it: its ids, and where the response begins."""

    ids: list[int]
    start: int
    source: str


class StepBatch(NamedTuple):
    """What a step learns from: its micro-batches here, the valid tokens and the padding of the global batch, whether
    they are the student's own words, and what the metrics say of it."""

    window: list[Batch]
    tokens: float
    padding: float
    sampled: bool = False
    told: Mapping[str, float] = {}


class Rollouts:
    """The rollouts of one life of a run. `state` is the checkpoint's. Made, and asked, by all ranks."""

    def __init__(self, recipe: Recipe, ds: Any, tokenizer: Any, state: dict[str, Any], world: World) -> None:
        assert recipe.rollout is not None
        self.recipe, self.rollout, self.ds, self.world, self.state = recipe, recipe.rollout, ds, world, state
        self.sampler = Sampler(self.rollout.temperature, self.rollout.top_p,
                               end_of_text(tokenizer, self.rollout.end_of_text), len(tokenizer), ds.module.head.shard,
                               self._head)
        self.whole = engine.fits_whole(ds, ds.module.student, world)
        self.buffer: list[RolloutDocument] = []
        if "rollout" in state:
            kept = torch.load(Path(recipe.output_dir) / "checkpoints" / checkpoint_name(state["step"]) / BUFFER_FILE)
            self.buffer = [RolloutDocument(*document) for document in kept]
        elif self.rollout.adaptive is not None:
            self.judge(validate(recipe, ds, world))

    def judge(self, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """After an evaluation, and before the first step: the threshold rises where the mean loss has risen."""
        if self.rollout.adaptive is None:
            return
        tokens = sum(each["tokens"] for each in figures.values())
        loss = sum(each["loss"] * each["tokens"] for each in figures.values()) / tokens
        self.state["rollout"] = updated_threshold(self.rollout.adaptive, self.state.get("rollout"), loss)

    @property
    def files(self) -> dict[str, Any]:
        """What this rank adds to a checkpoint, by file name."""
        kept = self.rollout.adaptive is not None and self.world.is_main
        return {BUFFER_FILE: [tuple(document) for document in self.buffer]} if kept else {}

    def turn(self, data: StepBatch) -> StepBatch:
        """The step's turn: the data's as it is, sampled responses to its prompts, or ones from the buffer."""
        step, adaptive = self.state["step"], self.rollout.adaptive
        chance = float(torch.rand((), generator=_random(self.recipe, step, CHOICE_SEED)))
        if adaptive is None:
            assert self.rollout.share is not None
            what = "fresh" if chance < self.rollout.share else "data"
        else:
            what = choose_source(adaptive, self.state["rollout"]["threshold"], chance, len(self.buffer), step + 1,
                          self.recipe.train.steps)
        if not value_at(self.recipe.loss.kd_weight, step, self.recipe.train.steps):
            what = "data"      # a step without the teacher would learn nothing from the student's words
        told = {"rollout": float(what != "data")}
        if adaptive is not None:
            told |= {"replay": float(what == "replay"), "rollout_threshold": self.state["rollout"]["threshold"]}
        if what == "data":
            return data._replace(told=told)
        return self._of(self._fresh(data.window) if what == "fresh" else self._replayed(data.window), told)

    def _fresh(self, window: list[Batch]) -> list[RolloutDocument]:
        """Sampled responses to the prompts of this rank's window; they go into the buffer."""
        prompts, sources = [], []
        for place, number, document in self._prompts(window):
            room = min(self.rollout.max_new_tokens, self.recipe.train.seq_length + 1 - document.start)
            seed = step_seed(step_seed(self.recipe.train.seed, self.state["step"], PROMPT_SEED), place, number)
            prompts.append(SamplerPrompt(document.ids[:document.start], room, seed))
            sources.append((place, number, document.source))
        completed = self._complete(prompts)
        documents = [RolloutDocument(prompt.ids + ids, len(prompt.ids), source)
                     for prompt, ids, (*_, source) in zip(prompts, completed, sources, strict=True)]
        if self.rollout.adaptive is not None:
            mine = [(place, number, document) for (place, number, _), document
                    in zip(sources, documents, strict=True)] if self.world.tp_rank == 0 else []
            everyone = sorted(found for part in self.world.gather(mine) for found in part)
            self.buffer = [*self.buffer, *(d for *_, d in everyone)][-self.rollout.adaptive.capacity:]
        return documents

    def _replayed(self, window: list[Batch]) -> list[RolloutDocument]:
        """As many documents as the global batch has, drawn from the buffer without putting back; this rank's part."""
        count = sum(1 for _ in self._prompts(window))
        total = sum(self.world.gather(count)) // self.world.tp_size
        order = torch.randperm(len(self.buffer), generator=_random(self.recipe, self.state["step"], BUFFER_SEED)).tolist()
        return [self.buffer[i] for i in order[:total][self.world.dp_rank::self.world.dp_size]]

    def _prompts(self, window: list[Batch]) -> Iterator[tuple[int, int, RolloutDocument]]:
        """(row in the global batch, document in the row, document) of a window's documents."""
        size = self.recipe.train.micro_batch_size
        for micro, batch in enumerate(window):
            for row in range(len(batch.input_ids)):
                place = (micro * self.world.dp_size + self.world.dp_rank) * size + row
                for number, document in enumerate(split_documents(batch, row)):
                    yield place, number, document

    def _complete(self, prompts: Sequence[SamplerPrompt]) -> list[list[int]]:
        """The student's responses, `batch_size` at once; every rank takes as many passes, and steps in each."""
        size, found = self.rollout.batch_size, []
        passes = -(-max(self.world.gather(len(prompts))) // size)
        student = self.ds.module.student
        self.ds.eval()
        with gather.gathered(self.ds, student) if self.whole else contextlib.nullcontext():
            for number in range(passes):
                found += self.world.run_checked(partial(
                    self.sampler.complete, student, prompts[number * size:(number + 1) * size], self._somebody,
                    self.world.device))
        self.ds.train()
        return found

    def _somebody(self, mine: bool) -> bool:
        if not self.whole:
            engine.start_step(self.ds)      # a token's gathers are ZeRO-3's trace
        return self.world.sum([mine])[0] > 0

    def _head(self, student: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.whole else gather.gathered_head(student)

    def _of(self, documents: Sequence[RolloutDocument], told: Mapping[str, float]) -> StepBatch:
        """The documents as micro-batches, as many on every rank: some may hold nothing to be learnt."""
        train = self.recipe.train
        rows = pack_rows(documents, train.seq_length, self.recipe.data.isolate_documents is not False)
        window = [batch_of(rows[i:i + train.micro_batch_size], []) for i in range(0, len(rows), train.micro_batch_size)]
        for _ in range(max(self.world.gather(len(window))) - len(window)):
            idle = batch_of([Row(np.zeros(3, np.int64), np.empty(0, np.int32), np.empty(0, np.int32), "")], [])
            window.append(replace(idle, padding=idle.input_ids.numel(), sources=[]))
        counts = [[int((b.labels != IGNORED).sum()), b.padding, b.input_ids.numel()] for b in window]
        tokens, padding, places = self.world.sum([sum(column) for column in zip(*counts, strict=True)])
        return StepBatch(window, tokens, padding / places, True, told)


def _random(recipe: Recipe, step: int, what: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(recipe.train.seed, step, what))


def updated_threshold(adaptive: Replay, before: Mapping[str, float] | None, loss: float) -> dict[str, float]:
    """Threshold and loss to compare with after an evaluation that came to `loss`; None before: there was none yet."""
    if before is None:
        return {"threshold": adaptive.init_threshold, "loss": loss}
    if loss >= before["loss"] + adaptive.loss_eps:
        return {"threshold": min(1.0, before["threshold"] + THRESHOLD_STEP), "loss": loss}
    return dict(before)


def choose_source(adaptive: Replay, threshold: float, chance: float, kept: int, number: int, total: int) -> str:
    """What optimizer step `number` (from 1) of `total` learns from: `data`, or `fresh` responses, or a `replay`.

    `chance` is the step's number in [0, 1); `kept` completions are in the buffer.
    """
    part = {"constant": 0.5, "increasing": number / total, "decreasing": 1 - number / total}[adaptive.replay_ratio]
    if chance < threshold * part or (chance < threshold and kept < adaptive.capacity):
        return "fresh"
    return "replay" if chance < threshold else "data"


def split_documents(batch: Batch, row: int) -> Iterator[RolloutDocument]:
    """The documents of one row, up to the last response of each, which is left out: `start` is where it began."""
    ids, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
    places = range(len(ids)) if batch.positions is None else batch.positions[row].tolist()
    begins = [i for i, place in enumerate(places) if place == 0]
    for first, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        learnt = [i for i in range(first, end) if labels[i] != IGNORED]
        if learnt:
            last = next(i for i in reversed(learnt) if i == first or labels[i - 1] == IGNORED)
            yield RolloutDocument(ids[first:last + 1], last + 1 - first, batch.sources[row])


def pack_rows(documents: Sequence[RolloutDocument], seq_length: int, together: bool) -> list[Row]:
    """The documents as rows of at most seq_length + 1 tokens, isolated from one another, or each in its own."""
    packed = [Packed(d.ids, [d.start, len(d.ids)], 0, number) for number, d in enumerate(documents)]
    return [Row(np.array(row.tokens), np.array(row.learn, np.int32), np.array(row.begins, np.int32),
                documents[row.line].source) for row in (pack_together(packed, seq_length) if together else packed)]


def check_prompt_lengths(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Look at every prompt of the prepared data: is there room for `max_new_tokens` after it in `seq_length`?

    Raises InputError where there is not, but with data.on_bad_row skip: such prompts get what room there is, and `say`
    hears how many there are.
    """
    if recipe.rollout is None:
        return
    most = recipe.train.seq_length + 1 - recipe.rollout.max_new_tokens
    prepared, tight = Prepared(recipe.prepared_dir), []
    for number in range(len(prepared)):
        batch = prepared.batch([number])
        tight += [document for document in split_documents(batch, 0) if document.start > most]
    if tight and recipe.data.on_bad_row == "error":
        longest = max(document.start for document in tight)
        raise InputError(
            f"{len(tight)} prompt(s) leave no room to generate {recipe.rollout.max_new_tokens} tokens in a row of "
            f"{recipe.train.seq_length}; the first is that of {tight[0].source}: {tight[0].start} tokens",
            f"prompts of at most {most} tokens", f"set train.seq_length to "
            f"{longest - 1 + recipe.rollout.max_new_tokens} or more, lower rollout.max_new_tokens, or set "
            "data.on_bad_row=skip: these prompts then get what room there is")
    if tight:
        say(f"{len(tight)} prompts leave less room than rollout.max_new_tokens; they get what there is")
