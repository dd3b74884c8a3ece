"""What a rank exchanges with the others in a step and at the start, by the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

from support.exchanges import exchanging_rank
from support.ranks import run_ranks
from support.runs import write_recipe

STEPS = 4


def exchanges(size: int, student: Path, text: Path, folder: Path) -> dict[int, list[list]]:
    """Rank -> [phase, owner, operation, bytes] of each of its exchanges in a run of STEPS steps."""
    recipe = write_recipe(folder / f"{size}.yaml", student, student, text, folder / f"run{size}",
                          train__steps=STEPS, train__global_batch_size=16,
                          data__prepared=str(folder / "data"))
    ranks = run_ranks(size, "train", recipe, target=exchanging_rank, timeout=280)
    return {rank: json.loads(Path(f"{ranks.log(rank)}.exchanges").read_text())
            for rank in range(size)}
