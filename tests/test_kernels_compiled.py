"""What Triton makes of the loss's kernels for GPUs that are not here (support/compile_ahead.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from amid_ds.bench.predict import INSTRUCTIONS_PER_PAIR, MEASURES_PER_PAIR

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = Path(__file__).parent / "support" / "compile_ahead.py"
ARCHES = ["sm_80", "sm_90", "sm_100", "gfx942"]
OBJECTIVES = ["jsd", "skl", "fkl", "taid", "amid", "amid_rq", "amid_all_orders", "geometric",
              "near_geometric", "harmonic", "total_variation", "squared_hellinger", "alpha_beta",
              "alpha_beta_all_orders", "alpha_zero", "alpha_beta_of_sum_zero", "log_squares",
              "two_temperatures", "powered", "per_token", "per_token_alpha_beta",
              "per_token_orders", "csd", "csd_ts", "ce"]
# Of Llama 2, GPT-2, Llama 3, Qwen 3, Qwen 2.5, Gemma 3; a shard of two ranks of GPT-2's.
TOKENIZERS = [32000, 50257, 128256, 151669, 151936, 262144, 25129]
# The objective whose kernels the prediction takes for a kind of mixture.
PREDICTED = {"arithmetic": "skl", "geometric": "geometric", "near_geometric": "near_geometric",
             "power": "amid"}
# Of an NVIDIA multiprocessor, and of an AMD SIMD's lane.
REGISTERS = {"sm": 65536, "gfx": 512}


def compiled(*cases: str) -> dict[str, dict[str, dict]]:
    """By case and kernel what compile_ahead.py says."""
    result = subprocess.run([sys.executable, SCRIPT, *cases], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for line in result.stdout.splitlines():
        kernel = json.loads(line)
        found[kernel["case"]][kernel["kernel"]] = kernel
    assert set(found) == set(cases)
    return found


def check(kernel: dict) -> None:
    """No spills, two programs per multiprocessor, and 16 bytes at every load and store."""
    name = f"{kernel['case']} {kernel['kernel']}"
    assert kernel["spilled"] == 0, name
    if kernel["case"].startswith("gfx"):
        # A program of 256 threads has a wave on each of the four SIMDs.
        assert kernel["registers"] * 2 <= REGISTERS["gfx"], name
        # The tail's accesses are among these, of single elements.
        assert kernel["memory"].get("buffer_load_dwordx4", 0) >= 1, kernel
    else:
        assert kernel["registers"] * kernel["threads"] * 2 <= REGISTERS["sm"], name
        assert kernel["memory"] and set(kernel["memory"]) <= {"LDG.E.128", "STG.E.128"}, kernel


def per_pair(kernel: dict, key: str = "instructions") -> float:
    return kernel[key] / kernel["pairs"]


def check_prediction(kind: str, kernels: dict[str, dict]) -> None:
    """The prediction's costs of this kind of mixture are those of the compiled kernels."""
    names = {"kl_moments": "statistics", "sums": "statistics"}
    found = {names.get(name, name): (per_pair(kernel), per_pair(kernel, "special"))
             for name, kernel in kernels.items()}
    for name, known in INSTRUCTIONS_PER_PAIR[kind].items():
        assert found[name] == pytest.approx(known, rel=0.1), (kind, name)


@pytest.fixture(scope="module")
def on_sm_90() -> dict[str, dict[str, dict]]:
    """The Jensen-Shannon divergence and AMiD's own objective at the lengths of two tokenizers."""
    found = compiled("sm_90:jsd:bf16/bf16:50257:17", "sm_90:amid:bf16/bf16:50257:17",
                     "sm_90:per_token:bf16/bf16:50257:17:measures",
                     *[f"sm_90:jsd:bf16/bf16:50257:{tokens}" for tokens in (1, 32, 1024)])
    return {case.removeprefix("sm_90:"): kernels for case, kernels in found.items()}


@pytest.mark.parametrize(("objective", "budget"), [("jsd", 70), ("amid", 135)])
def test_instructions_per_pair_of_logits_are_within_the_budget(on_sm_90, objective, budget):
    kernels = on_sm_90[f"{objective}:bf16/bf16:50257:17"]
    for kernel in kernels.values():
        check(kernel)
    assert sum(map(per_pair, kernels.values())) <= budget
    if objective == PREDICTED["power"]:
        check_prediction("power", kernels)


def test_numbers_per_token_cost_the_series_and_measures_one_cheap_reading(on_sm_90):
    kernels = on_sm_90["per_token:bf16/bf16:50257:17:measures"]
    for kernel in kernels.values():
        check(kernel)
    near_geometric = INSTRUCTIONS_PER_PAIR["near_geometric"]
    for name, known in (("kl_moments", "statistics"), ("gradient", "gradient")):
        assert per_pair(kernels[name]) <= 1.15 * near_geometric[known][0]
    measures = per_pair(kernels["measures"]), per_pair(kernels["measures"], "special")
    assert measures == pytest.approx(MEASURES_PER_PAIR, rel=0.1)


def test_a_kernel_is_compiled_once_for_any_number_of_tokens(on_sm_90):
    """Divisible by 16 or not, 1 or more, rows of numbers aligned or not."""
    for name in ("normalisers", "sums", "gradient"):
        assert len({on_sm_90[f"jsd:bf16/bf16:50257:{tokens}"][name]["hash"]
                    for tokens in (17, 1, 32, 1024)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_every_objective_compiles_for_every_gpu(arch):
    cases = [f"{arch}:{objective}:bf16/bf16:50257:17" for objective in OBJECTIVES]
    cases += [f"{arch}:{objective}:bf16/bf16:128256:17:ce:cap" for objective in ("jsd", "harmonic")]
    cases += [f"{arch}:harmonic:bf16/bf16:50257:17{ce}:sampled" for ce in ("", ":ce")]
    found = compiled(*cases)
    for kernels in found.values():
        for kernel in kernels.values():
            check(kernel)
    if arch == "sm_90":
        for kind, objective in PREDICTED.items():
            check_prediction(kind, found[f"sm_90:{objective}:bf16/bf16:50257:17"])


@pytest.mark.slow
@pytest.mark.parametrize("dtypes",
                         ["bf16/bf16", "fp16/fp16", "fp32/fp32", "bf16/fp32", "fp32/bf16"])
def test_every_tokenizers_logits_are_read_16_bytes_at_once(dtypes):
    found = compiled(*[f"{arch}:{objective}:{dtypes}:{width}:17" for arch in ("sm_80", "sm_90")
                       for objective in ("jsd", "amid") for width in TOKENIZERS])
    for kernels in found.values():
        for kernel in kernels.values():
            check(kernel)
