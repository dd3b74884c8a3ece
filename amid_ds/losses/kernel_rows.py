# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""What the Triton kernels read and sum of a row, as Triton functions.

A block of columns is [groups, VECTOR]: a group is what one thread reads at once. Sums and maxima
are kept per group, [groups, 1], and put together once a row. Peaks of logits are in nats, in which
the logits' difference from them is exact; all other logarithms within a kernel are in bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amid_ds.losses.kernel_math import LN_2, LOG2_E, UNBOUNDED, ZERO_LOG, reciprocal_of


@triton.jit
def block_columns(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """[BLOCK / VECTOR, VECTOR] a block's columns: a row is what one thread reads at once."""
    first = tl.arange(0, BLOCK // VECTOR) * VECTOR
    return first[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_logits(pointer, columns, width, scale, cap, CAPPED: tl.constexpr, TAIL: tl.constexpr,
                APPROXIMATE: tl.constexpr):
    """Logits in fp32, under CAPPED scaled and capped; 0 from `width` on, which only a TAIL has."""
    if TAIL:
        z = tl.load(pointer + columns, mask=columns < width, other=0.0).to(tl.float32)
    else:
        z = tl.load(pointer + columns).to(tl.float32)
    if CAPPED:
        z *= scale / cap
        e = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E))
        tanh = (1.0 - e) * reciprocal_of(1.0 + e, APPROXIMATE)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def present(log, columns, width, TAIL: tl.constexpr):
    """`log`, and in a TAIL ZERO_LOG from `width` on: a column that nobody says adds nothing."""
    return tl.where(columns < width, log, ZERO_LOG) if TAIL else log


@triton.jit
def log2_probability(z, unit, peak, rest, columns, width, TAIL: tl.constexpr):
    """log₂ of the probabilities of the logits z · unit, given their log-sum-exp in two parts, in
    nats and in bits; ZERO_LOG for -inf, NaN stays."""
    # The difference of two large numbers comes first: it is exact.
    log = tl.maximum((z * unit - peak) * LOG2_E - rest, ZERO_LOG,
                     propagate_nan=tl.PropagateNan.ALL)
    return present(log, columns, width, TAIL)


@triton.jit
def load_log_probs(pointer, columns, width, scale, unit, cap, peak, rest, CAPPED: tl.constexpr,
                   TAIL: tl.constexpr, APPROXIMATE: tl.constexpr):
    """`log2_probability` of the logits at `pointer`."""
    z = load_logits(pointer, columns, width, scale, cap, CAPPED, TAIL, APPROXIMATE)
    return log2_probability(z, unit, peak, rest, columns, width, TAIL)


@triton.jit
def load_pair(pointer, row, tokens):
    """A token's log-sum-exp of [2, n] in two parts: its peak in nats, the logarithm of the rest in
    bits."""
    return tl.load(pointer + row), tl.load(pointer + tokens + row) * LOG2_E


@triton.jit
def load_assistant(pointer, row, tokens, HAS_ASSISTANT: tl.constexpr):
    """log Σ r̃ in two parts, both in bits; 0 without HAS_ASSISTANT."""
    peak = 0.0
    rest = 0.0
    if HAS_ASSISTANT:
        peak, rest = load_pair(pointer, row, tokens)
        peak *= LOG2_E
    return peak, rest


@triton.jit
def load_mixture(numbers, row, tokens):
    """c, 1/c, λ, log λ and log(1-λ) of a token, from `kernel_math.token_numbers`."""
    numbers += row
    return (tl.load(numbers), tl.load(numbers + tokens), tl.load(numbers + 2 * tokens),
            tl.load(numbers + 3 * tokens), tl.load(numbers + 4 * tokens))


@triton.jit
def load_orders(numbers, row, tokens):
    """The weights pr, qr, rp and rq of a token, from the same."""
    numbers += row + 5 * tokens
    return (tl.load(numbers), tl.load(numbers + tokens), tl.load(numbers + 2 * tokens),
            tl.load(numbers + 3 * tokens))


@triton.jit
def load_directions(numbers, row, tokens):
    """only_p and only_q of a token, from the same."""
    numbers += row + 9 * tokens
    return tl.load(numbers), tl.load(numbers + tokens)


@triton.jit
def total(terms):
    """[groups, 1] the sum of each group's [groups, m]."""
    return tl.sum(terms, 1, keep_dims=True)


@triton.jit
def add_to_logsumexp(peak, sums, x):
    """Peak and Σ exp(… - peak) of each group [groups, 1] with x [groups, m], in nats, added."""
    new = tl.maximum(peak, tl.max(x, 1, keep_dims=True))
    added = tl.sum(tl.exp2((x - new) * LOG2_E), 1, keep_dims=True)
    return new, sums * tl.exp2((peak - new) * LOG2_E) + added


@triton.jit
def store_logsumexp(pointer, row, tokens, peak, sums):
    """Store the groups' log-sum-exp at [2, n]: its peak and the logarithm of the rest."""
    highest = tl.max(peak)
    tl.store(pointer + row, highest)
    tl.store(pointer + tokens + row, tl.log(tl.sum(sums * tl.exp2((peak - highest) * LOG2_E))))


@triton.jit
def to_peak(peak, log_r):
    """(the groups' new maxima, r̃ against them, what the sums against the old ones are to be
    multiplied by) for log₂ r̃ [groups, m]."""
    new = tl.maximum(peak, tl.max(log_r, 1, keep_dims=True))
    return new, tl.exp2(log_r - new), tl.exp2(peak - new)


@triton.jit
def store_mixture_sum(pointer, row, tokens, peak, sums):
    """Store log Σ r̃ at [2, n], from the groups' maxima in bits and sums [groups, 1] against them;
    gives the groups' factors that make means over r of their other sums."""
    highest = tl.max(peak)
    share = tl.exp2(peak - highest)
    sum_r = tl.sum(sums * share)
    tl.store(pointer + row, highest * LN_2)
    tl.store(pointer + tokens + row, tl.log(sum_r))
    # A shard without columns has no share in the means.
    return share / tl.where(sum_r == 0, 1.0, sum_r)


@triton.jit
def most_apart(apart, log_p, log_q, only_p, only_q, ONLY_P: tl.constexpr, ONLY_Q: tl.constexpr,
               PER_TOKEN: tl.constexpr):
    """The groups' largest log₂ p/q seen, under ONLY_Q of its inverse, under both its magnitude;
    PER_TOKEN by the token's own only_p and only_q, which are 0 or 1."""
    if ONLY_P or ONLY_Q:
        ratio = log_p - log_q
        if PER_TOKEN:
            ratio = tl.maximum(only_p * ratio, -only_q * ratio)
        elif ONLY_P and ONLY_Q:
            ratio = tl.abs(ratio)
        elif ONLY_Q:
            ratio = -ratio
        apart = tl.maximum(apart, tl.max(ratio, 1, keep_dims=True))
    return apart


@triton.jit
def infinite_if_apart(value, apart):
    """`value`, or infinity if somewhere one model says what the other never does; NaN stays."""
    return value + tl.where(tl.max(apart) > UNBOUNDED, float("inf"), 0.0)
