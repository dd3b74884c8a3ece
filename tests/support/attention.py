"""A twin of torch's kernel for sequences of many lengths, which needs a GPU: in plain torch."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.attention.varlen import varlen_attn

from amid_ds.models import attention
from support.ranks import Ranks

# In this process: calls of the twin ("kernel"), and of torch's attention with a mask ("masked").
calls: Counter[str] = Counter()


def varlen_twin(*arguments, **options):
    """Attention [T, H, D] of each sequence by itself, with a dense mask; what the arguments mean is
    in the documentation of `torch.nn.attention.varlen.varlen_attn`, whose signature they keep."""
    bound = inspect.signature(varlen_attn).bind(*arguments, **options)
    query, key, value, starts, starts_k, longest, longest_k = bound.args
    scale, window = bound.kwargs["scale"], bound.kwargs["window_size"]
    assert starts.dtype == torch.int32 and torch.equal(starts, starts_k)
    assert longest == longest_k == starts.diff().max() and type(longest) is int
    assert (starts[0], starts[-1]) == (0, len(query)) and (starts.diff() > 0).all()
    calls["kernel"] += 1
    out = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (states[start:stop].transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), 0) for states in (k, v))
        scores = (q @ k.transpose(1, 2)).double() * (q.shape[-1]**-0.5 if scale is None else scale)
        distance = torch.arange(stop - start, device=q.device)
        distance = distance[:, None] - distance
        left, right = (float("inf") if side < 0 else side for side in window)
        seen = (distance <= left) & (-distance <= right)
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v)
                   .transpose(0, 1))
    return torch.cat(out)


def boundaries_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that attends by boundaries on a CPU and in fp32, through the twin."""
    from support.ranks import rank_main

    attention._device_refusal = lambda device, dtype: None
    _count_calls(log)
    rank_main(argv, variables, log)


def faked_boundaries_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank on a faked GPU that has the kernel, which is the twin."""
    from support.fake_cuda import fake_cuda_rank

    torch.backends.cuda.is_flash_attention_available = lambda: True
    _count_calls(log)
    fake_cuda_rank(argv, variables, log, watched_step=1)


def _count_calls(log: str) -> None:
    """Take the twin for the kernel, and write each step's `calls` to `log`.calls, a line each."""
    from support.patches import patch_train_step

    attention.varlen_kernel = lambda: varlen_twin
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments, attn_mask=None, **options):
        calls["masked"] += attn_mask is not None
        return real(*arguments, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = attend

    def around(trainer, batch):
        calls.update(kernel=-calls["kernel"], masked=-calls["masked"])
        yield
        with open(f"{log}.calls", "a") as lines:
            lines.write(json.dumps(calls) + "\n")

    patch_train_step(around)


def calls_of(ranks: Ranks, rank: int = 0) -> list[dict[str, int]]:
    """What a rank of the two above counted in each step."""
    return [json.loads(line)
            for line in Path(f"{ranks.log(rank)}.calls").read_text().splitlines()]
