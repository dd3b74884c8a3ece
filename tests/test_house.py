"""The house rules: floors, one owner per dependency, the linters, and what `import amid_ds` needs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "config": 0, "schedule": 0, "host_memory": 0, "templates": 0,
    "distributed": 1, "vocab_parallel": 1,
    "origin": 1, "combinations": 1, "packaged": 1,
    "losses": 2, "data": 2, "metrics": 2, "provenance": 2, "stopping": 2, "lives": 2,
    "watchdog": 2, "scheduler": 2, "meter": 2, "watch": 2, "profile": 3, "measured": 3,
    "distiller": 3, "engine": 3, "checkpoint": 3, "shards": 3, "reshard": 3, "export": 3, "tensor_parallel": 3,
    "writing": 3, "figures": 3, "launch": 3, "generation": 3,
    "rollout": 4, "generate": 4,
    "train": 4, "evaluate": 4, "validation": 4, "demo": 4, "bench": 4,
    "plan": 4, "requeue": 4, "submit": 4, "sweep": 4, "status": 4, "doctor": 4, "report": 4,
    "study": 5,
    "cli": 6, "__main__": 7,
}
OWNERS = {      # who may import what costs, so that a change upstream has one place to land
    "deepspeed": {"engine", "checkpoint", "reshard"},
    "datasets": {"data"},
    "sentencepiece": {"data"},
    "triton": {"losses"},
    "mpi4py": {"distributed"},
    "argparse": {"cli"},
    "rouge_score": {"writing"},
    "nltk": {"writing"},
    "tensorboard": set(),
    "matplotlib": {"figures"},
    "yaml": {"config", "train", "demo", "plan"},
    "pydantic": {"config"},
    "torch.distributed": {"distributed", "vocab_parallel", "measured"},
}


def rooms() -> list[Path]:
    return sorted(path for path in (ROOT / "amid_ds").rglob("*.py") if path != ROOT / "amid_ds" / "__init__.py")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "amid_ds").parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module that the file imports, inside functions too, but not those for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_its_floor_or_below(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: give it one here and in the README's map"
    for name in imports(path):
        match = re.match(r"amid_ds\.(\w+)", name)
        if match and match[1] in FLOORS and match[1] != room:
            assert FLOORS[match[1]] <= FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {match[1]} from above"


def test_no_two_rooms_import_each_other():
    arrows = {(room_of(path), match[1]) for path in rooms() for name in imports(path)
              if (match := re.match(r"amid_ds\.(\w+)", name)) and match[1] in FLOORS and match[1] != room_of(path)}
    graph = {room: {b for a, b in arrows if a == room} for room in FLOORS}
    list(graphlib.TopologicalSorter(graph).static_order())      # raises CycleError, naming the rooms


@pytest.mark.parametrize("package", OWNERS)
def test_a_dependency_is_imported_by_its_owners_alone(package):
    users = {room_of(path) for path in rooms() for name in imports(path) if f"{name}.".startswith(f"{package}.")}
    assert users <= OWNERS[package]


def test_importing_the_package_needs_torch_alone():
    code = ("import sys, amid_ds; "
            "print({'deepspeed', 'transformers', 'datasets', 'pydantic', 'yaml'} & sys.modules.keys() or None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def see_what_is_imported(argv, variables, log):
    Path(log).write_text(" ".join(sys.modules))


def test_a_tests_ranks_share_the_fork_servers_imports():
    ranks = small.Ranks(1, be=see_what_is_imported)
    assert ranks.wait() == [0] and {"warm", "deepspeed", "amid_ds.train"} <= set(ranks.text().split())


def test_the_map_in_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [name for path in rooms() if (name := str(path.relative_to(ROOT / "amid_ds"))) != "__main__.py"
               and path.name != "__init__.py" and f"`{name}`" not in readme]
    assert missing == []


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_linters_are_clean(command):
    done = subprocess.run([str(small.BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_line_that_the_readme_shows():
    line = re.search(r"^python3 -m venv .*&& \.venv/bin/pytest$", (ROOT / "README.md").read_text(), re.M)
    assert line and ".venv/bin/pytest$" in (ROOT / ".ci" / "run").read_text()
