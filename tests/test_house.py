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
# Bottom up: a module imports from its own folder and from those above it in this list.
ORDER = ["errors", "files", "config", "distributed", "losses", "data", "run", "monitor", "models", "engine", "checkpoint",
         "plan", "eval", "training", "cluster", "experiments", "bench", "cli", "__main__"]
ENTRIES = 22        # directly under amid_ds/
# Who may import what costs, so that a change upstream has one place to land.
OWNERS = {
    "deepspeed": {"engine", "checkpoint"},
    "datasets": {"data"},
    "sentencepiece": {"data"},
    "triton": {"losses"},
    "mpi4py": {"distributed"},
    "argparse": {"cli"},
    "rouge_score": {"eval"},
    "nltk": {"eval"},
    "tensorboard": set(),
    "matplotlib": {"experiments"},
    "yaml": {"config", "training", "experiments", "plan"},
    "pydantic": {"config"},
    "torch.distributed": {"distributed", "monitor"},
}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "amid_ds").rglob("*.py") if path != ROOT / "amid_ds" / "__init__.py")


def folder_of(path: Path) -> str:
    """The folder under amid_ds/ that a module lies in; a module directly under it is its own."""
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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_its_own_folder_or_those_below(path):
    folder = folder_of(path)
    assert folder in ORDER, f"{folder} has no place in ORDER"
    for name in imports(path):
        match = re.match(r"amid_ds\.(\w+)", name)
        if match and match[1] in ORDER:
            assert ORDER.index(match[1]) <= ORDER.index(folder), f"{folder} imports {match[1]}, which stands above it"


def test_no_two_modules_import_each_other():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    graph = {name: {other for other in imports(path) if other in names and other != name}
             for name, path in names.items()}
    # Raises CycleError, naming the modules.
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", OWNERS)
def test_a_dependency_is_imported_by_its_owners_alone(package):
    users = {folder_of(path) for path in modules() for name in imports(path) if f"{name}.".startswith(f"{package}.")}
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
    assert ranks.wait() == [0] and {"warm", "deepspeed", "amid_ds.training.trainer"} <= set(ranks.text().split())


def test_the_package_has_few_entries():
    listed = subprocess.run(["git", "ls-files", "amid_ds"], cwd=ROOT, capture_output=True, text=True, check=True)
    entries = {line.split("/")[1] for line in listed.stdout.split()}
    assert len(entries) <= ENTRIES, sorted(entries)


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_linters_are_clean(command):
    done = subprocess.run([str(small.BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_line_that_the_readme_shows():
    line = re.search(r"^python3 -m venv .*&& \.venv/bin/pytest$", (ROOT / "README.md").read_text(), re.M)
    assert line and ".venv/bin/pytest$" in (ROOT / ".ci" / "run").read_text()
