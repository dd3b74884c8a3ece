"""What a rank exchanges with the others in a step, at a start and in a save, by number of ranks.

A run of a model of one layer, whose every collective, message and store request is counted. `-m
slow -s` prints the table of amid_ds/distributed/README.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.exchanges import exchanging_rank
from support.ranks import run_ranks
from support.runs import write_recipe

STEPS, WATCHED = 4, "3"
SIZES = (2, 4, 8, 16)
AFAR = (1024, 16_384)
# Of each rank, [phase, owner, operation, bytes] of each exchange.
Exchanges = list[list[tuple[str, str, str, int]]]


@pytest.fixture(scope="module")
def measure(shared_model, text_file, tmp_path_factory) -> Callable[[int], Exchanges]:
    """The exchanges of a run on so many ranks, made once."""
    folder, made = tmp_path_factory.mktemp("scaling"), {}
    model = shared_model("llama-tied", 0, num_hidden_layers=1)

    def measured(size: int) -> Exchanges:
        if size not in made:
            # Names of one length, whatever the number.
            recipe = write_recipe(
                folder / f"{size:02}.yaml", model, model, text_file, folder / f"run{size:02}",
                train__steps=STEPS, train__global_batch_size=max(SIZES),
                data__prepared=str(folder / "data"))
            ranks = run_ranks(size, "train", recipe, target=exchanging_rank, timeout=280)
            made[size] = [json.loads(Path(f"{ranks.log(rank)}.exchanges").read_text())
                          for rank in range(size)]
        return made[size]
    return measured


def sizes(exchanges: Sequence[Sequence], phase: str, owner: str, *operations: str) -> list[int]:
    """The bytes of each of a rank's exchanges; those that look for failures go by the clock."""
    return [size for at, whose, operation, size in exchanges
            if (at, whose) == (phase, owner) and operation != "check"
            and (not operations or operation in operations)]


def test_a_step_exchanges_as_many_bytes_on_four_ranks_as_on_two(measure):
    steps = [Counter((owner, operation, size) for at, owner, operation, size in rank
                     if at == WATCHED and owner != "deepspeed" and operation != "check")
             for ranks in (2, 4) for rank in measure(ranks)]
    assert steps.count(steps[0]) == len(steps)
    # Before the step, its sums, its peaks; and no request of a store.
    assert steps[0].total() == 3 and {operation for _, operation, _ in steps[0]} == {"allreduce"}
    assert sum(size for _, _, size in steps[0]) < 4096


def test_a_start_gathers_nothing_of_all_ranks(measure):
    two, four = measure(2), measure(4)
    for rank in (*two, *four):
        # Errors, extremes, barriers; what rank 0 has goes down in broadcasts.
        assert set(sizes(rank, "start", "ours", "send", "recv")) == {8}
        assert not sizes(rank, "start", "ours", "allgather", "gather", "allreduce")
        assert len(sizes(rank, "start", "store")) == 4
        # gloo's address, with a place for every rank where it connects all of them at once.
        assert sizes(rank, "start", "torch's store", "set") == sizes(
            two[0], "start", "torch's store", "set")
    assert len({tuple(sizes(rank, "start", "ours", "broadcast")) for rank in (*two, *four)}) == 1


def rows(measured: Sequence[Exchanges]) -> dict[str, list[int]]:
    """Name -> figure for each number of ranks; of the rank that has most."""
    def most(phase: str, owner: str, figure: Callable[[list[int]], int]) -> list[int]:
        return [max(figure(sizes(rank, phase, owner)) for rank in ranks) for ranks in measured]

    def of_store(figure: Callable[[list[int]], int]) -> list[int]:
        return [max(figure(sizes(rank, "start", "store") + sizes(rank, "start", "torch's store"))
                    for rank in ranks) for ranks in measured]

    return {
        "step: collectives": most(WATCHED, "ours", len),
        "step: bytes": most(WATCHED, "ours", sum),
        "step: store requests": most(WATCHED, "store", len),
        "start: collectives and messages": most("start", "ours", len),
        "start: bytes": most("start", "ours", sum),
        "start: bytes of the largest": most("start", "ours", max),
        "start: store requests": of_store(len),
        "start: bytes from the store": of_store(sum),
        "save: bytes, rank 0": [sum(sizes(ranks[0], "end", "ours")) for ranks in measured],
        "save: bytes, the last rank": [sum(sizes(ranks[-1], "end", "ours")) for ranks in measured]}


def fitted(figures: Sequence[int]) -> tuple[str, list[float]]:
    """(a + b log2 ranks + c ranks with the fewest terms that hold to 2 %, its values AFAR)."""
    terms = {"1": lambda n: 1.0, "log2": math.log2, "ranks": float}
    for count in (1, 2, 3):
        used = list(terms)[:count]
        matrix = np.array([[terms[term](n) for term in used] for n in SIZES])
        weights, *_ = np.linalg.lstsq(matrix, np.array(figures, float), rcond=None)
        if np.allclose(matrix @ weights, figures, rtol=0.02, atol=1e-6):
            break
    formula = " + ".join(f"{round(weight)}" + ("" if term == "1" else f" {term}")
                         for term, weight in zip(used, weights, strict=True))
    return formula, [sum(weight * terms[term](n) for term, weight in zip(used, weights,
                                                                         strict=True))
                     for n in AFAR]


@pytest.mark.slow
def test_what_a_rank_exchanges_grows_no_faster_than_the_logarithm_of_the_ranks(measure):
    afar = {}
    print(f"\n| of the rank that has most | {' | '.join(map(str, SIZES))} | fitted | "
          f"{' | '.join(f'{n:,}' for n in AFAR)} |\n|{'---|' * (len(SIZES) + 4)}")
    for name, figures in rows([measure(size) for size in SIZES]).items():
        formula, afar[name] = fitted(figures)
        print(f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} | {formula} | "
              f"{' | '.join(f'{figure:,.0f}' for figure in afar[name])} |")
    at_most = {"step: collectives": 3, "step: bytes": 65_536, "step: store requests": 0,
               "start: bytes": 1e6, "start: bytes of the largest": 1e6,
               "start: bytes from the store": 1e6, "start: store requests": 200,
               "save: bytes, the last rank": 1e5}
    assert {name for name, most in at_most.items() if afar[name][-1] > most} == set()
