"""Data files of the word-level tokenizer's words, and documents read back out of batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from support.models import WORDS


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write each row as a line of JSON; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """Write jsonl of `text`, sentences of 5 to 39 words; return the path."""
    draw = torch.Generator().manual_seed(seed)
    return write_jsonl(path, [{"text": _sentence(draw, 5, 40)} for _ in range(rows)])


def write_instructions(path: Path, rows: int = 60, seed: int = 1) -> Path:
    """Write jsonl of `prompt` and `response`, of unequal lengths so that masks differ by row."""
    draw = torch.Generator().manual_seed(seed)
    return write_jsonl(path, [{"prompt": _sentence(draw, 2, 9) + " ",
                               "response": _sentence(draw, 1, 20)} for _ in range(rows)])


def _sentence(draw: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high, (), generator=draw))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw))


def split_documents(batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids [1, n], labels [n]) of each document, split where positions return to 0."""
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        isolated = batch.positions is not None
        positions = batch.positions[row].tolist() if isolated else range(len(ids))
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[None, start:stop], labels[start:stop]
