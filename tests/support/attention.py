"""A twin of torch's kernel for sequences of many lengths, which needs a GPU: in plain torch."""

from __future__ import annotations

import inspect
from collections import Counter

import torch
from torch.nn.attention.varlen import varlen_attn

from amid_ds.models import attention

# Calls of the twin, and the longest document of each call, in this process.
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
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (states[start:stop].transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), 0) for states in (k, v))
        scores = (q @ k.transpose(1, 2)).double() * (q.shape[-1]**-0.5 if scale is None else scale)
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        left, right = (float("inf") if side < 0 else side for side in window)
        seen = (distance <= left) & (-distance <= right)
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v)
                   .transpose(0, 1))
    return torch.cat(out)


def install_twin(any_dtype: bool = True) -> None:
    """Let this process take the twin for the kernel, for good; any_dtype: on a CPU and in fp32."""
    attention.varlen_kernel = lambda: varlen_twin
    if any_dtype:
        attention._device_refusal = lambda device, dtype: None
