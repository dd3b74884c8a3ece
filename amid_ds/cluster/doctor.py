"""`amid-ds doctor`: is this environment, cluster and recipe fit to run? A verdict per line, the remedy with a failure.

Alone it looks at this machine; under srun at the whole allocation: every rank gathers facts, rank 0 compares and
prints. Each test is the smallest real act (a rename, a connection, a sum), because a setting that looks right proves
nothing. The ranks must meet before they can compare, so that they do not is a verdict of its own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.rendezvous import init_distributed, launched_rank
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.run.provenance import versions
from amid_ds.run.warm_start import resolve_student

MEET_S = 60.0            # how long ranks wait for each other
CONNECT_S = 5.0
CLOCKS_S = 2.0           # clocks may differ by so much
FREE_BYTES = 10 << 30    # less is worth a word
SUM_BYTES = 16 << 20     # of the all-reduce
SLOW = 0.3               # a node with less than this part of the median bandwidth is slow


@dataclass(frozen=True)
class Verdict:
    """One line: what was looked at, whether it is good, what was found, and what to do where it is not."""

    what: str
    good: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.good else 'FAIL'}  {self.what:<12} {self.found}"
        return line if self.good else f"{line}\n      remedy: {self.remedy}"


def doctor(recipe_path: str | None, overrides: Sequence[str]) -> None:
    """Print the verdicts, from rank 0. Raises TrainingError (exit status 1) where one of them is bad."""
    recipe = load_recipe(recipe_path, overrides) if recipe_path is not None else None
    with contextlib.ExitStack() as stack:
        try:
            world = stack.enter_context(init_distributed(MEET_S))
        except (RuntimeError, OSError) as error:
            print(_not_met(error), flush=True)
            raise TrainingError("") from None
        verdicts = [verdict for look in LOOKS for verdict in look(recipe, world)]
        if world.is_main:
            print("\n".join(map(str, verdicts)), flush=True)
        bad = world.gather(sum(not verdict.good for verdict in verdicts))[0]      # rank 0's have been printed
        if bad:
            raise TrainingError(f"{bad} of {len(verdicts)} looks found something to mend")


def _not_met(error: Exception) -> Verdict:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    words = str(error).splitlines()[0][:200]
    return Verdict("ranks meet", False, f"rank {launched_rank()} on {socket.gethostname()} did not meet the others at "
                   f"{address} within {MEET_S:g} s: {words}",
                   "the name must resolve on every node (`getent hosts NAME`), the port be open between nodes, and all "
                   "ranks be started; where a node has several networks, set MASTER_ADDR to the right one's name")


def _by_node(values: Sequence[tuple[str, Any]]) -> str:
    """'3.11 on n1, n3; 3.12 on n2', for values that differ."""
    nodes: dict[str, list[str]] = {}
    for node, value in dict.fromkeys((node, str(value)) for node, value in values):
        nodes.setdefault(value, []).append(node)
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in nodes.items())


def _here() -> str:
    return socket.gethostname()


def versions_agree(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    facts = {**versions(), "libc": " ".join(platform.libc_ver()), "cuda": torch.version.cuda,
             "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None}
    everyone = world.gather((_here(), facts))
    differing = [f"{name}: {_by_node([(node, found[name]) for node, found in everyone])}" for name in facts
                 if len({found[name] for _, found in everyone}) > 1]
    told = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "deepspeed", "transformers"))
    yield Verdict("versions", not differing, "; ".join(differing) or f"{told}, the same everywhere",
                  "use one environment on all nodes, on a shared file system or in a container")


def gpus(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    everyone = world.gather((_here(), f"{len(names)} × {names[0]}" if names else "no GPU"))
    alike = len({found for _, found in everyone}) == 1
    yield Verdict("GPUs", alike, _by_node(everyone),
                  "ask Slurm for the same GPUs on each node (--gpus-per-node, --constraint); see `nvidia-smi` there")
    shared = world.gather((_here(), world.device.index if world.device.type == "cuda" else None, world.local_rank))
    doubled = [f"{node}: GPU {index}" for node, index, _ in shared
               if index is not None and sum((node, index) == (n, i) for n, i, _ in shared) > 1]
    if doubled:
        yield Verdict("GPU per rank", False, f"several ranks on one: {', '.join(sorted(set(doubled)))}",
                      "start as many ranks per node as it has GPUs (--ntasks-per-node = --gpus-per-node)")


def output_folder(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Free space, and a file that every rank renames into place and the others see."""
    folder = Path(recipe.output_dir if recipe is not None else ".")
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    yield Verdict("free space", free >= FREE_BYTES, f"{free / 1e9:,.0f} GB on {existing}",
                  "make room, or set output_dir to another file system: a checkpoint takes about 16 bytes per "
                  "parameter of the student")
    wrong = None
    name = world.gather(f".doctor-{os.getpid()}-{_here()}")[0]
    mine = existing / f"{name}-{world.rank}"
    try:
        with tempfile.NamedTemporaryFile("w", dir=existing, prefix=".doctor-", delete=False) as file:
            file.write(str(world.rank))
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, mine)
    except OSError as error:
        wrong = str(error)
    world.barrier()
    unseen = [rank for rank in range(world.size) if wrong is None and not (existing / f"{name}-{rank}").exists()]
    everyone = world.gather((_here(), wrong or (f"does not see what rank {unseen[0]} wrote" if unseen else None)))
    mine.unlink(missing_ok=True)
    bad = [(node, found) for node, found in everyone if found is not None]
    yield Verdict("rename", not bad, _by_node(bad) or f"atomic in {existing}, and seen by every rank",
                  "output_dir must be on a file system that all nodes share and may write to")


def connections(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Every rank listens; every rank connects to each of them by the name of its node."""
    with socket.create_server(("", 0), backlog=world.size, family=socket.AF_INET) as server:
        everyone = world.gather((_here(), int(server.getsockname()[1])))
        threading.Thread(target=_accept, args=(server, world.size), daemon=True).start()
        failed = [f"{_here()} -> {node}: {problem}" for node, port in everyone
                  if (problem := _connect(node, port)) is not None] if world.size > 1 else []
        found = [line for lines in world.gather(failed) for line in lines]
    yield Verdict("connections", not found, "; ".join(dict.fromkeys(found)) or
                  f"{len({node for node, _ in everyone})} node(s), all pairs by name",
                  "the nodes' names must resolve on every node, and no firewall may stand between their ports")


def _accept(server: socket.socket, count: int) -> None:
    with contextlib.suppress(OSError):      # closed when the look is over
        for _ in range(count):
            server.accept()[0].close()


def _connect(node: str, port: int) -> str | None:
    try:
        socket.create_connection((node, port), CONNECT_S).close()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def all_reduce(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """A sum over all ranks, checked; then between neighbouring nodes pair by pair, so that a slow node stands out."""
    if world.size == 1:
        return
    nodes = world.gather(_here())
    total, rate = world.measured_sum(range(world.size), SUM_BYTES)
    right = all(world.gather(total == world.size * (world.size + 1) / 2))
    yield Verdict("all-reduce", right, f"{world.size} ranks, {rate / 1e9:.2f} GB/s, the sum is "
                  f"{'right' if right else f'{total:g}, not {world.size * (world.size + 1) / 2:g}'}",
                  "a network that changes numbers: run NCCL's or the vendor's tests on these nodes")
    firsts = [nodes.index(node) for node in dict.fromkeys(nodes)]      # a rank of each node
    if len(firsts) < 3:
        return
    best = dict.fromkeys(firsts, 0.0)
    for one, other in zip(firsts, firsts[1:] + firsts[:1], strict=True):
        _, rate = world.measured_sum((one, other), SUM_BYTES)
        rate = max(world.gather(rate))
        best = {rank: max(best[rank], rate) if rank in (one, other) else best[rank] for rank in best}
    median = statistics.median(best.values())
    slow = [f"{nodes[rank]} {rate / 1e9:.3f} GB/s" for rank, rate in best.items() if rate < SLOW * median]
    yield Verdict("bandwidth", not slow, f"slow: {', '.join(slow)}, the median is {median / 1e9:.3f} GB/s" if slow else
                  ", ".join(f"{nodes[rank]} {rate / 1e9:.2f}" for rank, rate in best.items()) + " GB/s",
                  "leave these nodes out (sbatch --exclude) and have their network looked at")


def models(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    """Tokenizers and configs load, and every weight file can be opened, on every node."""
    if recipe is None:
        return
    from amid_ds.data import load_tokenizer
    from amid_ds.models.loading import model_config

    def read(model: str, opened_with: dict[str, Any]) -> None:
        model_config(model, **opened_with)
        load_tokenizer(model, **opened_with)
        for path in Path(model).glob("*.safetensors") if Path(model).is_dir() else ():
            with open(path, "rb") as file:
                file.read(1)

    for name, part in (("student", resolve_student(recipe)), ("teacher", recipe.teacher)):
        if part is not None:
            bad = _failures(world, lambda part=part: read(part.model, part.hub_kwargs))   # type: ignore[misc]
            yield Verdict(name, not bad, _by_node(bad) or f"{part.model} can be read on every node",
                          "put it where all nodes can read it; for a hub id, load it once and set HF_HUB_OFFLINE=1")


def _failures(world: World, work: Callable[[], None]) -> list[tuple[str, str]]:
    problem = None
    try:
        work()
    except (InputError, OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
    return [(node, found) for node, found in world.gather((_here(), problem)) if found is not None]


def clocks(recipe: Recipe | None, world: World) -> Iterator[Verdict]:
    world.barrier()      # from here on all read their clocks within milliseconds
    everyone = world.gather((_here(), time.time()))
    middle = statistics.median(seconds for _, seconds in everyone)
    off = [(node, f"{seconds - middle:+.1f} s") for node, seconds in everyone if abs(seconds - middle) > CLOCKS_S]
    spread = max(seconds for _, seconds in everyone) - min(seconds for _, seconds in everyone)
    yield Verdict("clocks", not off, _by_node(off) or f"within {spread:.2f} s",
                  "have the nodes' clocks set by NTP: logs and Slurm's credentials go by them")


LOOKS: tuple[Callable[[Recipe | None, World], Iterator[Verdict]], ...] = (
    versions_agree, gpus, output_folder, connections, all_reduce, models, clocks)
