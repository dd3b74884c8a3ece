"""Machine instructions of the loss's kernels per pair of logits, one of each model, on sm_90.

By objective of compile_ahead.py and by kernel; bf16. tests/test_kernels_compiled.py compares them
with what is compiled.
"""

INSTRUCTIONS_PER_PAIR: dict[str, dict[str, float]] = {
    "jsd": {"normalisers": 18.1, "sums": 24.6, "gradient": 23.1},
    "skl": {"normalisers": 18.1, "sums": 30.1, "gradient": 24.6},
    "fkl": {"normalisers": 18.1, "sums": 23.6, "gradient": 18.6},
    "amid": {"normalisers": 18.1, "kl_moments": 34.4, "gradient": 34.6},
    "amid_all_orders": {"normalisers": 18.1, "kl_moments": 48.9, "gradient": 51.1},
    "near_geometric": {"normalisers": 18.1, "kl_moments": 44.4, "gradient": 45.1},
    "total_variation": {"normalisers": 18.1, "assistant": 24.1, "sums": 41.5, "gradient": 38.6},
    "alpha_beta": {"normalisers": 18.1, "assistant": 24.1, "sums": 49.4, "gradient": 43.6},
}

# exp2, log2 and reciprocals among them. A multiprocessor of sm_80 to sm_100 has 128 lanes for most
# fp32 instructions and 16 for these (CUDA C++ programming guide, arithmetic throughput): eight
# instructions are issued in the time of one of these.
SPECIAL_PER_PAIR: dict[str, dict[str, float]] = {
    "jsd": {"normalisers": 2.25, "sums": 3.0, "gradient": 3.0},
    "amid": {"normalisers": 2.25, "kl_moments": 5.125, "gradient": 6.0},
}
