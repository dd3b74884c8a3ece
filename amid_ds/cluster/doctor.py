"""`amid-ds doctor`: is this environment, cluster and recipe fit to run? One verdict per line.

Alone it checks this machine; under srun the whole allocation: every rank gathers facts, rank 0
compares and prints. Each check is the smallest real act (a rename, a connection, a sum), because a
setting that looks right proves nothing. The ranks must meet before they can compare, so a failure
to meet is a verdict of its own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.distributed.nodes import find_nodes
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.files.atomic import replace_text
from amid_ds.run.provenance import versions
from amid_ds.run.warm_start import frozen_models, resolve_student

# Seconds that ranks wait for each other.
MEET_TIMEOUT_S = 60.0
PEER_TIMEOUT_S = 5.0
# Clocks may differ by this much from the median.
CLOCK_TOLERANCE_S = 2.0
# Less free space in the output folder is a failure.
MIN_FREE_BYTES = 10 << 30
ALL_REDUCE_BYTES = 16 << 20
# A node with less than this part of the median bandwidth is slow.
SLOW_BANDWIDTH_SHARE = 0.3
# Fewer nodes have no median to compare one of them with.
MIN_NODES_TO_COMPARE = 3


@dataclass(frozen=True)
class Verdict:
    """One line: the check's name, its outcome, the facts, and the remedy for a failure."""

    check: str
    passed: bool
    facts: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.passed else 'FAIL'}  {self.check:<12} {self.facts}"
        return line if self.passed else f"{line}\n      remedy: {self.remedy}"


Check: TypeAlias = "Callable[[Recipe | None, World], Iterator[Verdict]]"


def doctor(recipe_path: str | None, overrides: Sequence[str]) -> None:
    """Print the verdicts, from rank 0. Raises TrainingError (exit status 1) if one is a failure."""
    recipe = load_recipe(recipe_path, overrides) if recipe_path is not None else None
    with contextlib.ExitStack() as stack:
        try:
            world = stack.enter_context(init_distributed(MEET_TIMEOUT_S))
        except TrainingError as error:
            met, _, remedy = str(error).partition("\n")
            print(Verdict("ranks meet", False, met, remedy.rpartition("remedy:")[2].strip()),
                  flush=True)
            raise TrainingError("") from None
        verdicts = [verdict for check in CHECKS for verdict in check(recipe, world)]
        if world.is_main:
            print("\n".join(map(str, verdicts)), flush=True)
        # Verdicts may differ between ranks; those of rank 0 have been printed.
        failed = world.broadcast(sum(not verdict.passed for verdict in verdicts))
        if failed:
            raise TrainingError(f"{failed} of {len(verdicts)} checks failed")


def _by_node(values: Sequence[tuple[str, str]]) -> str:
    """Values with the nodes that have them: '3.11 on n1, n3; 3.12 on n2'."""
    nodes: dict[str, list[str]] = {}
    for node, value in dict.fromkeys(values):
        nodes.setdefault(value, []).append(node)
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in nodes.items())


def _hostname() -> str:
    return socket.gethostname()


def _gather_problems(world: World, problem: str | None) -> list[tuple[str, str]]:
    """(node, problem) of every rank that has one. Collective."""
    everyone = world.gather((_hostname(), problem))
    return [(node, text) for node, text in everyone if text is not None]


def check_versions(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Python, the packages, libc, CUDA and NCCL are the same on every rank."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    facts = {**versions(), "libc": " ".join(platform.libc_ver()), "cuda": torch.version.cuda,
             "nccl": nccl}
    everyone = world.gather((_hostname(), facts))
    differing = []
    for name in facts:
        by_rank = [(node, str(others[name])) for node, others in everyone]
        if len({value for _, value in by_rank}) > 1:
            differing.append(f"{name}: {_by_node(by_rank)}")
    same = ", ".join(f"{name} {facts[name]}"
                     for name in ("python", "torch", "deepspeed", "transformers"))
    yield Verdict("versions", not differing,
                  "; ".join(differing) or f"{same}, the same everywhere",
                  "use one environment on all nodes, on a shared file system or in a container")


def check_gpus(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Every node has the same GPUs. That no two ranks share one is a condition of meeting."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    everyone = world.gather((_hostname(), f"{len(names)} × {names[0]}" if names else "no GPU"))
    alike = len({description for _, description in everyone}) == 1
    yield Verdict("GPUs", alike, _by_node(everyone),
                  "ask Slurm for the same GPUs on each node (--gpus-per-node, --constraint); see "
                  "`nvidia-smi` there")


def check_compiler(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """On GPUs: C that includes Python's headers compiles, as Triton needs at its first launch."""
    if world.device.type == "cpu":
        return
    problems = _gather_problems(world, _compiler_problem())
    yield Verdict("C compiler", not problems,
                  _by_node(problems) or "it finds Python's headers on every node",
                  "install gcc and Python's headers (on Debian and Ubuntu gcc and python3-dev), or "
                  "set CC to a compiler: Triton compiles its launchers on the node")


def _compiler_problem() -> str | None:
    # As Triton looks for them.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no CC, gcc or clang"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme)["include"]
    try:
        done = subprocess.run([compiler, "-I", headers, "-fsyntax-only", "-x", "c", "-"],
                              input="#include <Python.h>\n", capture_output=True, text=True)
    except OSError as error:
        return str(error)
    errors = done.stderr.splitlines() or [f"{compiler} ends with {done.returncode}"]
    return errors[0] if done.returncode else None


def check_output_folder(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """The output folder has free space, and a file that a rank renames there is seen by all."""
    folder = Path(recipe.output_dir if recipe is not None else ".").resolve()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    yield Verdict("free space", free >= MIN_FREE_BYTES, f"{free / 1e9:,.0f} GB on {existing}",
                  "make room, or set output_dir to another file system: a checkpoint takes about "
                  "16 bytes per parameter of the student")
    problem = None
    name = world.broadcast(f".doctor-{os.getpid()}-{_hostname()}")
    own_file = existing / f"{name}-{world.rank}"
    try:
        replace_text(own_file, str(world.rank))
    except OSError as error:
        problem = str(error)
    world.barrier()
    unseen = [rank for rank in range(world.size) if not (existing / f"{name}-{rank}").exists()]
    if problem is None and unseen:
        problem = f"does not see what rank {unseen[0]} wrote"
    problems = _gather_problems(world, problem)
    own_file.unlink(missing_ok=True)
    yield Verdict("rename", not problems,
                  _by_node(problems) or f"atomic in {existing}, and seen by every rank",
                  "output_dir must be on a file system that all nodes share and may write to")


def check_connections(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Every rank listens; every rank connects to each of them by the name of its node."""
    with socket.create_server(("", 0), backlog=world.size, family=socket.AF_INET) as server:
        everyone = world.gather((_hostname(), int(server.getsockname()[1])))
        threading.Thread(target=_accept, args=(server, world.size), daemon=True).start()
        failed = []
        for node, port in everyone if world.size > 1 else ():
            error = _connection_error(node, port)
            if error is not None:
                failed.append(f"{_hostname()} -> {node}: {error}")
        failures = [line for lines in world.gather(failed) for line in lines]
    nodes = len({node for node, _ in everyone})
    yield Verdict("connections", not failures,
                  "; ".join(dict.fromkeys(failures)) or f"{nodes} node(s), all pairs by name",
                  "the nodes' names must resolve on every node, and no firewall may block their "
                  "ports")


def _accept(server: socket.socket, count: int) -> None:
    # OSError: the check has ended and closed the server.
    with contextlib.suppress(OSError):
        for _ in range(count):
            server.accept()[0].close()


def _connection_error(node: str, port: int) -> str | None:
    try:
        socket.create_connection((node, port), PEER_TIMEOUT_S).close()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def check_all_reduce(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """A sum over all ranks is right; measured pair by pair, no node is much slower than others."""
    if world.size == 1:
        return
    nodes = world.gather(_hostname())
    expected = world.size * (world.size + 1) / 2
    total, rate = world.measured_sum(range(world.size), ALL_REDUCE_BYTES)
    right = not world.any(total != expected)
    outcome = "right" if right else f"{total:g}, not {expected:g}"
    yield Verdict("all-reduce", right,
                  f"{world.size} ranks, {rate / 1e9:.2f} GB/s, the sum is {outcome}",
                  "a network that changes numbers: run NCCL's or the vendor's tests on these nodes")
    # One rank of each node.
    first_ranks = [nodes.index(node) for node in dict.fromkeys(nodes)]
    if len(first_ranks) >= MIN_NODES_TO_COMPARE:
        rates = _rates_between_neighbours(world, first_ranks)
        yield _bandwidth_verdict({nodes[rank]: rate for rank, rate in rates.items()})


def _rates_between_neighbours(world: World, ranks: Sequence[int]) -> dict[int, float]:
    """By rank, the better of its bandwidths to its two neighbours, in bytes per second.

    A slow link slows both of its ends, but only a slow node has no fast one. Collective.
    """
    best = dict.fromkeys(ranks, 0.0)
    for one, other in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
        _, own_rate = world.measured_sum((one, other), ALL_REDUCE_BYTES)
        rate = world.most(own_rate)
        for rank in (one, other):
            best[rank] = max(best[rank], rate)
    return best


def _bandwidth_verdict(rates: Mapping[str, float]) -> Verdict:
    median = statistics.median(rates.values())
    slow = [f"{node} {rate / 1e9:.3f} GB/s" for node, rate in rates.items()
            if rate < SLOW_BANDWIDTH_SHARE * median]
    if slow:
        facts = f"slow: {', '.join(slow)}, the median is {median / 1e9:.3f} GB/s"
    else:
        facts = ", ".join(f"{node} {rate / 1e9:.2f}" for node, rate in rates.items()) + " GB/s"
    return Verdict("bandwidth", not slow, facts,
                   "leave these nodes out (sbatch --exclude) and have their network checked")


def check_model_files(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Tokenizers and configs load, and the weights are those of the config, on every node."""
    if recipe is None:
        return
    models: dict[str, Student | Teacher] = {"student": resolve_student(recipe),
                                            **frozen_models(recipe)}
    for name, model in models.items():
        problems = _gather_problems(world, _model_problem(model))
        yield Verdict(name, not problems,
                      _by_node(problems) or f"{model.model} can be read on every node",
                      "what it says; if some nodes alone say it, put the model where all can read "
                      "it, or of a hub id load it once and set HF_HUB_OFFLINE=1")


def check_kernels(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Which packages of fused kernels each model would use, and where they are installed.

    None is needed: transformers has plain PyTorch in their place.
    """
    if recipe is None:
        return
    models: dict[str, Student | Teacher] = {"student": resolve_student(recipe),
                                            **frozen_models(recipe)}
    for name, model in models.items():
        everyone = world.gather((_hostname(), _kernels_of(model)))
        if any(found for _, found in everyone):
            yield Verdict("kernels", True,
                          f"the {name} would use {_by_node(everyone)}; where one is not, and "
                          "without a GPU, it runs transformers' own PyTorch code: slower")


def _kernels_of(model: Student | Teacher) -> str:
    from amid_ds.models.kernel_packages import kernel_packages
    from amid_ds.models.loading import require_supported

    try:
        packages = kernel_packages(require_supported(model.model, **model.hub_kwargs))
    # That it cannot be read is the check before this one's to say.
    except (InputError, OSError, ValueError):
        return ""
    return ", ".join(f"{package} ({'installed' if there else 'not installed'})"
                     for package, there in packages.items())


def check_cache_files(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """A cached teacher's folder is complete on every node."""
    if recipe is None or recipe.cached_teacher is None:
        return
    path = recipe.cached_teacher.cached
    problems = _gather_problems(world, _cache_problem(path))
    yield Verdict("teacher's cache", not problems,
                  _by_node(problems) or f"{path} can be read on every node",
                  "write it with `amid-ds cache`, where all nodes can read it")


def _cache_problem(path: str) -> str | None:
    from amid_ds.data import TargetFolder

    try:
        TargetFolder.open(path).require_sizes()
    except InputError as error:
        return error.found
    except OSError as error:
        return str(error)
    return None


def _model_problem(model: Student | Teacher) -> str | None:
    from amid_ds.data import load_tokenizer
    from amid_ds.models.loading import require_supported
    from amid_ds.models.trained import choose_trained

    try:
        meta = require_supported(model.model, **model.hub_kwargs)
        if isinstance(model, Student):
            # With adapters this needs peft.
            choose_trained(meta, model)
        load_tokenizer(model.model, **model.hub_kwargs)
    except InputError as error:
        return f"{error.found}; {error.remedy}"
    except (OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def check_cpu_adam(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Where the recipe offloads the optimizer's state, DeepSpeed's CPU Adam can be compiled."""
    from amid_ds.engine import cpu_adam, ds_config

    if recipe is None or not world.run_checked(lambda: ds_config.offloads_optimizer(recipe)):
        return
    problems = cpu_adam.cpu_adam_problems(world)
    yield Verdict("CPU Adam", not problems,
                  _by_node(problems) or "DeepSpeed's is compiled on every node",
                  f"{cpu_adam.REMEDY}, or the offloaded state is stepped by torch's AdamW")


def check_placement(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Where the recipe wants the teacher over a node's ranks, the ranks lie so that it can be."""
    teacher = None if recipe is None else recipe.live_teacher
    if (recipe is None or teacher is None or teacher.placement != "node"
            or teacher.shard_over is not None):
        return

    def over_ranks() -> int | InputError:
        try:
            return find_nodes(world).copies_per_node(recipe.tensor_parallel)
        except InputError as error:
            return error

    over = world.run_on_main(over_ranks)
    if isinstance(over, InputError):
        yield Verdict("placement", False, over.found, over.remedy)
    else:
        yield Verdict("placement", True, f"a teacher over {over} data-parallel rank(s) a node")


def check_clocks(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """All ranks' clocks are within CLOCK_TOLERANCE_S of the median."""
    # After the barrier all read their clocks within milliseconds.
    world.barrier()
    everyone = world.gather((_hostname(), time.time()))
    times = [seconds for _, seconds in everyone]
    median = statistics.median(times)
    off = [(node, f"{seconds - median:+.1f} s") for node, seconds in everyone
           if abs(seconds - median) > CLOCK_TOLERANCE_S]
    yield Verdict("clocks", not off, _by_node(off) or f"within {max(times) - min(times):.2f} s",
                  "have the nodes' clocks set by NTP: logs and Slurm's credentials go by them")


CHECKS: tuple[Check, ...] = (check_versions, check_gpus, check_compiler, check_output_folder,
                             check_connections, check_all_reduce, check_model_files,
                             check_kernels, check_cache_files, check_cpu_adam, check_placement,
                             check_clocks)
