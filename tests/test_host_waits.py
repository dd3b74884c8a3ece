"""The host hardly ever waits for its GPU, so that a GPU always has work: on a faked CUDA."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_cuda import fake_cuda_rank
from support.host_waits import HostWaits, Watched, mark_host_tensor
from support.losses import PER_TOKEN, LossProblem
from support.ranks import Ranks
from support.runs import write_gathering_config, write_recipe
from support.sparse import SparseProblem
from transformers import AutoModelForCausalLM

from amid_ds import AMiD, SparseTargets, preset
from amid_ds.data.batch import Batch, TokenRow, collate_rows, require_ids_below
from amid_ds.errors import InputError
from amid_ds.losses import FirstPieces, fused, grown_amid_loss
from amid_ds.losses.measures import STATISTICS
from amid_ds.models.distiller import Distiller
from amid_ds.training.fetch import fetch_steps

# Our own, in a whole step with its log: what the ranks agree on before it, its sums, its norm.
OURS = {"amid_ds/distributed/world.py:sum tolist": 1,
        "amid_ds/distributed/world.py:sum_with_peaks tolist": 1,
        "amid_ds/engine/engine.py:optimizer_step __float__": 1}
WATCHED = 2


def waits_of_a_step(recipe: Path) -> Counter[str]:
    """Where rank 0 of 2 waits in one step, by place."""
    ranks = Ranks(2, "train", recipe, target=functools.partial(fake_cuda_rank,
                                                               watched_step=WATCHED))
    assert ranks.wait() == [0, 0], ranks.output()
    return Counter(json.loads(Path(f"{ranks.log(0)}.waits").read_text()))


def ours(waits: Counter[str]) -> dict[str, int]:
    return {place: number for place, number in waits.items() if place.startswith("amid_ds/")}


# Threads read the data: rows on the host are not counted.
def test_a_step_waits_three_times_however_many_micro_batches_it_has(llama_pair, text_file,
                                                                    tmp_path):
    waits = waits_of_a_step(write_recipe(
        tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
        train__steps=WATCHED + 2, train__global_batch_size=8, data__workers=1))
    assert ours(waits) == OURS
    # DeepSpeed and transformers wait once in each of the four, transformers also for the teacher.
    assert {place: number for place, number in waits.items() if number > 2} == {
        "deepspeed/runtime/zero/stage3.py:independent_gradient_partition_epilogue synchronize": 4,
        "transformers/masking_utils.py:find_packed_sequence_indices __bool__": 5}


def test_masked_tokens_corpora_learnt_otherwise_and_shared_rows_add_no_wait(
        llama_pair, text_file, instructions_file, tmp_path):
    asked = {"path": str(instructions_file), "prompt": "prompt", "response": "response"}
    text = {"path": str(text_file), "text": "text"}
    assert ours(waits_of_a_step(write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        train__steps=WATCHED + 2, train__micro_batch_size=2, data__workers=1,
        data__isolate_documents=True, data__auxiliary={**text, "weight": 0.5},
        data__train=[asked, {**text, "loss": {"order": "qr"}}],
        loss={"lam": 0.3, "normalise": "sequence"}))) == OURS


@pytest.mark.slow
def test_secondary_partitions_of_neighbours_add_a_wait_for_each_weight_of_the_student(
        llama_pair, text_file, tmp_path):
    waits = waits_of_a_step(write_recipe(
        tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run", data__workers=1,
        train__steps=WATCHED + 2, train__global_batch_size=8,
        deepspeed=str(write_gathering_config(tmp_path, zero_hpz_partition_size=2))))
    weights = len(list(AutoModelForCausalLM.from_pretrained(llama_pair[0]).parameters()))
    # Once in a step, whatever its micro-batches.
    assert waits["deepspeed/runtime/zero/partition_parameters.py:_partition_param_sec "
                 "synchronize"] == weights
    assert ours(waits) == OURS


ROW = torch.zeros(3)
PINNED, PAGEABLE = torch.zeros(3), torch.zeros(3)
mark_host_tensor(PINNED, True, {})
mark_host_tensor(PAGEABLE, False, {"device": "cpu"})
QUEUED = {"non_blocking": True}


@pytest.mark.parametrize("name, args, kwargs, waits", [
    ("item", (ROW,), {}, True), ("tolist", (ROW,), {}, True), ("sum", (ROW,), {}, False),
    ("__getitem__", (ROW, ROW > 0), {}, True), ("__getitem__", (ROW, (0, ROW > 0)), {}, True),
    ("__getitem__", (ROW, torch.tensor([1])), {}, False), ("__getitem__", (ROW, 1), {}, False),
    ("__setitem__", (ROW, ROW > 0, ROW), {}, True), ("__setitem__", (ROW, ROW > 0, 1.0), {}, False),
    ("where", (ROW > 0,), {}, True), ("where", (ROW > 0, ROW, ROW), {}, False),
    ("repeat_interleave", (ROW, torch.tensor([1, 2, 0])), {}, True),
    ("repeat_interleave", (ROW, torch.tensor([1, 2, 0])), {"output_size": 3}, False),
    ("tensor", ([1.0],), {"device": "cuda:0"}, True), ("tensor", ([1.0],), {}, False),
    ("zeros", (3,), {"device": torch.device("cuda", 0)}, False),
    ("to", (PAGEABLE, "cuda"), {}, True), ("to", (PAGEABLE, "cuda"), QUEUED, True),
    ("to", (PINNED, "cuda"), {}, True), ("to", (PINNED, torch.device("cuda", 0)), QUEUED, False),
    ("to", (ROW,), {"device": "cpu"}, True), ("to", (ROW, "cpu"), QUEUED, False),
    ("to", (ROW, torch.float64), {}, False), ("cpu", (ROW,), {}, True),
    ("copy_", (PINNED, ROW), QUEUED, False), ("copy_", (PINNED, ROW), {}, True),
    ("copy_", (PAGEABLE, ROW), QUEUED, True), ("copy_", (ROW, ROW.clone()), {}, False)])
def test_what_counts_as_a_wait_is_what_makes_a_host_wait(name, args, kwargs, waits):
    seen = HostWaits()
    seen.see(name, args, kwargs)
    assert not seen.places
    seen.watching = True
    seen.see(name, args, kwargs)
    assert seen.places.total() == waits


@pytest.mark.parametrize("objective", [AMiD(-5.0, 0.1), PER_TOKEN[2], PER_TOKEN[4]], ids=str)
def test_a_loss_whose_values_are_known_to_be_sound_is_the_same_and_waits_for_nothing(monkeypatch,
                                                                                     objective):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 4)
    results, places = [], []
    for checked in (True, False):
        problem = LossProblem()
        problem.weights += 0.1
        with Watched() as watched:
            out = problem.fused(objective, checked=checked, statistics=STATISTICS)
            gradients = problem.gradients(out.loss)
        results.append([out.loss, out.kd, out.ce, *gradients])
        places.append({place for place in watched.waits.places if "/losses/" in place})
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert places == [set(), {"amid_ds/losses/checks.py:check_values tolist",
                              "amid_ds/losses/fused.py:_loss_and_gradients nonzero"}]


# `drop` is `ghost` but for what is looked at on the host: one token of two ids.
@pytest.mark.parametrize("rest", ["ghost", "spread", "sample"])
def test_a_loss_on_sparse_targets_waits_for_nothing(rest, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 4)
    problem = SparseProblem(5, "drop" if rest == "sample" else rest)
    problem.weights += 0.1
    objective, names = AMiD(-5.0, 0.1), STATISTICS
    if rest == "sample":
        kept = problem.targets
        problem.targets = SparseTargets(kept.ids, kept.log_probabilities, None,
                                        kept.log_probabilities.exp())
        objective, names = preset("fkl"), ("divergence", "teacher_entropy")
    with Watched() as watched:
        out = problem.sparse(objective, 3.0, 0.7, checked=True, statistics=names)
        problem.gradients(out.loss)
    assert not watched.waits.places


def test_a_loss_over_a_grown_vocabulary_waits_for_nothing():
    problem = LossProblem(padding=-5)
    problem.labels.clamp_(max=40)
    pieces = FirstPieces.of(torch.tensor([3, 17, 3, 35, 3]))
    with Watched() as watched:
        out = grown_amid_loss(
            problem.student, problem.weight, problem.teacher, problem.teacher_weight,
            AMiD(-5.0, 0.1), pieces, token_weights=problem.weights + 0.1, labels=problem.labels,
            vocab_size=41, ce_weight=0.5, checked=True, statistics=STATISTICS)
        torch.autograd.grad(out.loss, problem.leaves()[:2])
    assert not watched.waits.places


def test_a_batch_of_an_evaluation_is_scored_without_a_wait(llama_pair):
    student, teacher = map(AutoModelForCausalLM.from_pretrained, llama_pair)
    distiller = Distiller(student, teacher, vocab_size=30)
    batch = collate_rows([row_of(5, 6, 7, 8, spans=(1, 2, 3, 4)), row_of(1, 2, spans=(1, 2))], [])
    # The form of a model's head is measured once.
    distiller.head.heads()
    with Watched() as watched:
        sums = distiller.score(*distiller.hidden_states(batch), batch.targets)
    assert ours(watched.waits.places) == {} and sums[3].item() == 3
    log_q = student(input_ids=batch.input_ids).logits[..., :30].log_softmax(-1)
    nll = -(log_q[0, 0, 6] + log_q[0, 2, 8] + log_q[1, 0, 2])
    torch.testing.assert_close(sums[0].float(), nll.detach())


def row_of(*tokens: int, spans: tuple[int, ...], source: str = "rows.jsonl line 7") -> TokenRow:
    return TokenRow(np.array(tokens), np.array(spans, np.int32), np.empty(0, np.int32), source)


def test_a_batch_knows_on_the_host_which_tokens_have_labels():
    batch = collate_rows([row_of(5, 6, 7, 8, spans=(1, 2, 3, 4)), row_of(1, 2, spans=(1, 2))], [])
    assert batch.labels.tolist() == [[6, -100, 8], [2, -100, -100]]
    assert batch.valid.tolist() == [0, 2, 3] and batch.targets.tolist() == [6, 8, 2]
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (moved.valid, moved.labels, moved.targets)} == {"meta"}
    assert batch.valid.device.type == "cpu"


class OneWindow:
    """A loader of one step."""

    waited = 0.0

    def __init__(self, window: list[Batch]) -> None:
        self.window = window

    def windows(self, start, stop):
        return iter([self.window])


def test_a_label_beyond_the_vocabulary_is_refused_by_its_row_before_a_step():
    batch = collate_rows([row_of(1, 2, spans=(1, 2), source="a line 1"),
                          row_of(9, 1, 9, spans=(2, 3), source="a line 2")], [])
    require_ids_below(10, [batch])
    fetched, = fetch_steps(OneWindow([batch]), None, 9, 0, 1)
    assert isinstance(fetched.error, InputError) and not fetched.window
    assert "a line 2: a token of id 9" in str(fetched.error)
    assert "ids below 9" in str(fetched.error)
