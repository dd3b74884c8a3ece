"""Compiles the loss's kernels for a GPU that is not here, and reads what came out.

    python tests/support/compile_ahead.py [--table] [CASE...]

The kernels are compiled through their own launchers, hence with the arguments and specialisations
of a real call; a stand-in for Triton's driver names the GPU. Prints one JSON object per kernel, or
with --table the table of amid_ds/losses/README.md. A case is
ARCH:OBJECTIVE:STUDENT/TEACHER:WIDTH:TOKENS[:ce][:cap][:measures][:sampled], e.g.
sm_90:jsd:bf16/bf16:50257:17:ce.

A script of its own, because the tests' process runs Triton's interpreter. The tools that assemble
and disassemble are those in Triton's wheel: ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from amid_ds import AlphaBeta, AMiD, PerToken, VocabShard, preset
from amid_ds.losses import kernel_measures, kernel_programs, kernel_residuals, kernels
from amid_ds.losses.block import Block, Logits, RowNormalisers

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROGRAMS = {"normalisers": kernel_programs, "measures": kernel_measures,
            "assistant": kernel_programs, "kl_moments": kernel_programs, "sums": kernel_programs,
            "gradient": kernel_programs, "residual_sums": kernel_residuals,
            "score": kernel_residuals}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALL_ORDERS = {"pr": 1.0, "qr": 0.5, "rp": 0.25, "rq": 0.125}
ENTROPY = PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0))
OBJECTIVES = {
    "jsd": preset("gkd", beta=0.3),
    "skl": preset("skl"),
    "fkl": preset("fkl"),
    "taid": preset("taid", t=0.4),
    "amid": AMiD(-5.0, 0.1),
    "amid_rq": AMiD(-5.0, 0.1, order="rq"),
    "amid_all_orders": AMiD(-5.0, 0.1, order=ALL_ORDERS),
    "geometric": AMiD(1.0, 0.1),
    "near_geometric": AMiD(0.5, 0.1),
    "harmonic": AMiD(3.0, 0.1, order="qr", temperature=2.0),
    "total_variation": AMiD(-5.0, 0.1, "total_variation"),
    "squared_hellinger": AMiD(-5.0, 0.1, "squared_hellinger"),
    "alpha_beta": AMiD(-5.0, 0.1, AlphaBeta(0.2, 0.7)),
    "alpha_beta_all_orders": AMiD(-5.0, 0.1, AlphaBeta(0.2, 0.7), ALL_ORDERS),
    "two_temperatures": AMiD(-5.0, 0.1, temperature={"student": 2.0, "teacher": 1.5}),
    "powered": AMiD(-5.0, 0.1, power=1.5),
    "per_token": AMiD(-5.0, ENTROPY),
    "per_token_alpha_beta": AMiD(-5.0, ENTROPY, AlphaBeta(0.2, 0.7)),
    "per_token_orders": AMiD(-1.0, 0.0, order={"pr": ENTROPY, "rp": 1.0}),
    "alpha_zero": AMiD(-5.0, 0.1, AlphaBeta(0.0, 0.7)),
    "alpha_beta_of_sum_zero": AMiD(-5.0, 0.1, AlphaBeta(0.4, -0.4)),
    "log_squares": AMiD(-5.0, 0.1, AlphaBeta(0.0, 0.0)),
    "csd": preset("csd"),
    "csd_ts": preset("csd", first="teacher"),
    "ce": None,
}
# The rows of the table.
SHOWN = ["jsd", "skl", "amid", "amid_all_orders", "near_geometric", "alpha_beta",
         "two_temperatures", "powered", "per_token", "per_token_orders"]
# Kernels that are the same for every objective.
OF_ANY = ["normalisers", "measures"]
ARCHES = ["sm_80", "sm_90", "sm_100", "gfx942"]


@dataclass
class Compiled:
    """A kernel and what its machine code says. Where the code is not NVIDIA's, the counts of
    instructions are 0."""

    case: str
    kernel: str
    hash: str
    threads: int
    registers: int
    # Bytes of local memory, of a thread.
    spilled: int
    # Of the loop over full blocks, by its number of columns per thread: pairs of logits.
    pairs: int
    instructions: int
    # exp2, log2 and reciprocals among them.
    special: int
    # Loads and stores of that loop and their number: {"LDG.E.128": 2}.
    memory: dict[str, int]

    @property
    def per_pair(self) -> float:
        """Instructions per pair of logits."""
        return self.instructions / self.pairs


class _Recorder:
    """Takes a kernel's place: compiles it at a launch and keeps it."""

    def __init__(self, name: str, found: list[tuple[str, Any, dict[str, Any]]]) -> None:
        self.name, self.found = name, found
        self.kernel = getattr(PROGRAMS[name], f"{name}_kernel")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.found.append((self.name, compiled, options))
        return launch


def target(arch: str) -> None:
    """Make `arch` (sm_90, gfx942) the GPU that Triton believes to be here."""
    gpu = (GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_")
           else GPUTarget("hip", arch, 64))
    # Triton keeps what it compiled by device.
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: gpu, get_current_device=lambda: ARCHES.index(arch),
        get_current_stream=lambda *_: 0, get_active_torch_device=lambda: torch.device("cpu"),
        get_device_interface=lambda: torch.cuda, map_python_to_cpp_type=lambda kind: kind))


def compile_case(case: str) -> list[Compiled]:
    """The kernels of a call: statistics, gradient and what they need."""
    arch, name, dtypes, width, tokens, *extras = case.split(":")
    target(arch)
    block = _block(name, [DTYPES[each] for each in dtypes.split("/")], int(width), int(tokens),
                   extras)
    found: list[tuple[str, Any, dict[str, Any]]] = []
    originals = {name: getattr(programs, f"{name}_kernel") for name, programs in PROGRAMS.items()}
    try:
        for kernel, programs in PROGRAMS.items():
            setattr(programs, f"{kernel}_kernel", _Recorder(kernel, found))
        rows = dict(zip(block.normaliser_names, kernels.log_normalisers(block), strict=True))
        norms = RowNormalisers(rows.get("q"), rows.get("p"), rows.get("z", rows.get("q")))
        objective, stats = None if "sampled" in extras else OBJECTIVES[name], None
        if objective is not None:
            asked = kernels.SUMMED_MEASURES if "measures" in extras else objective.measures
            if asked:
                kernels.measures(block, norms, asked)
            stats = kernels.statistics(block, norms, VocabShard(0, int(width)))
        kernels.write_gradient(block, norms, stats)
    finally:
        for kernel, original in originals.items():
            setattr(PROGRAMS[kernel], f"{kernel}_kernel", original)
    return [_read(case, *each) for each in found]


def _block(name: str, dtypes: list[torch.dtype], width: int, tokens: int,
           extras: list[str]) -> Block:
    """`tokens` tokens with rows of logits as the linear loss makes them: 64 divides the stride."""
    stride = -(-width // 64) * 64
    cap = 30.0 if "cap" in extras else None
    objective = OBJECTIVES[name]
    temperatures = ((1.0, 1.0) if objective is None
                    else (objective.student_temperature, objective.teacher_temperature))
    student, teacher = (Logits(torch.empty(tokens, stride, dtype=dtype)[:, :width], 1.0, cap, tau)
                        for dtype, tau in zip(dtypes, temperatures, strict=True))
    has_ce = objective is None or "ce" in extras
    ones = torch.ones(tokens)
    sampled = "sampled" in extras
    labels = torch.zeros(tokens, dtype=torch.int64) if has_ce or sampled else None
    if sampled:
        return Block(student, teacher, None, torch.float32, labels, None, ones if has_ce else None,
                     student.raw, label_scale=ones)
    if objective is None:
        return Block(student, None, None, torch.float32, labels, None, ones, student.raw)
    resolved = objective.resolved(dict.fromkeys(objective.per_token, ones))
    return Block(student, teacher, resolved, torch.float32, labels, ones, ones if has_ce else None,
                 student.raw)


def _read(case: str, name: str, kernel: Any, options: dict[str, Any]) -> Compiled:
    threads = options["num_warps"] * kernel.metadata.target.warp_size
    code = _machine_code(kernel)
    return Compiled(case, name, kernel.hash, threads, code.registers, code.spilled,
                    max(1, options["BLOCK"] // threads), code.instructions, code.special,
                    code.memory)


class _Code(NamedTuple):
    """The fields of `Compiled` that only the machine code knows."""

    registers: int
    spilled: int
    instructions: int
    special: int
    memory: dict[str, int]


# By the kernel's hash.
_CODES: dict[str, _Code] = {}


def _machine_code(kernel: Any) -> _Code:
    if kernel.hash not in _CODES:
        _CODES[kernel.hash] = (_amd_code(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm
                               else _nvidia_code(kernel.asm["cubin"]))
    return _CODES[kernel.hash]


def _amd_code(assembly: str) -> _Code:
    registers, spilled = (int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])  # type: ignore[index]
                          for key in ("vgpr_count", "vgpr_spill_count"))
    memory = Counter(re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", assembly))
    return _Code(registers, spilled, 0, 0, dict(memory))


def _nvidia_code(cubin: bytes) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        loop = _main_loop(_tool("nvdisasm", "-c", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    memory = Counter(each for each in loop if each.startswith(("LDG", "STG", "LDL", "STL")))
    special = sum(each.startswith("MUFU") for each in loop)
    return _Code(registers, stack + local, len(loop), special, dict(memory))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True,
                          check=True).stdout


def _main_loop(assembly: str) -> list[str]:
    """The operations of a program's first loop, over full blocks; the second is the tail's."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*);", line)
        if label:
            labels[label[1]] = len(operations)
        elif instruction:
            operations.append(instruction[1])
            jump = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1].startswith("BRA") and jump and jump[1] in labels:
                return operations[labels[jump[1]]:]
    raise AssertionError("no loop in the code")


def table() -> None:
    """Print each kernel's instructions per pair of logits and, in brackets, its registers."""
    print("| objective | kernel | " + " | ".join(ARCHES) + " | of these exp2, log2, 1/x |")
    print("|---|---|" + "---:|" * (len(ARCHES) + 1))
    for name in SHOWN:
        extra = ":measures" if name == SHOWN[0] else ""
        by_arch = [compile_case(f"{arch}:{name}:bf16/bf16:50257:17{extra}") for arch in ARCHES]
        for kernels_of in zip(*by_arch, strict=True):
            first = kernels_of[0]
            if first.kernel == "normalisers" and name != SHOWN[0]:
                continue
            cells = [f"{each.per_pair:.1f} ({each.registers})" if each.instructions
                     else f"({each.registers})" for each in kernels_of]
            whose = "any" if first.kernel in OF_ANY and name == SHOWN[0] else name
            print(f"| {whose} | {first.kernel} | {' | '.join(cells)} | "
                  f"{first.special / first.pairs:.1f} |", flush=True)


def main() -> None:
    """Print what was asked for."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        if sys.argv[1:] == ["--table"]:
            table()
        for case in [] if sys.argv[1:] == ["--table"] else sys.argv[1:]:
            for compiled in compile_case(case):
                print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
