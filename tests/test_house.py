"""The rules of the house: layout, owners of dependencies, names, types, documents, linters."""

from __future__ import annotations

import ast
import contextlib
import graphlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.ranks import Ranks
from support.runs import BIN

from amid_ds.config.recipe import CheckpointPolicy, Loss, Rollout, Slurm, Student, Train
from amid_ds.training.compatibility import KEPT, MAY_CHANGE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "amid_ds"
# Bottom up: a module imports from its own folder and from those above it in this list.
ORDER = ["errors", "files", "config", "distributed", "losses", "data", "run", "monitor", "models",
         "engine", "checkpoint", "planning", "eval", "training", "cluster", "experiments", "bench",
         "cli", "__main__"]
MOST_ENTRIES = 22
MOST_LINES = 400
# `dict[str, Any]` per 1,000 lines of code.
MOST_UNTYPED_DICTS = 2.0
# Who may import a dependency, so that a change upstream has one place to land.
OWNERS = {
    "deepspeed": {"engine"},
    "datasets": {"data"},
    "sentencepiece": {"data"},
    "triton": {"losses"},
    "mpi4py": {"distributed"},
    "argparse": {"cli"},
    "rouge_score": {"eval"},
    "lm_eval": {"eval"},
    "nltk": {"eval"},
    "tensorboard": {"run"},
    "matplotlib": {"experiments"},
    "yaml": {"config"},
    "pydantic": {"config"},
    "pandas": {"run"},
    "peft": {"models"},
    "torch.distributed": {"distributed", "monitor"},
}
# DeepSpeed's private names; the keys of its files are known to checkpoint/zero_shards.py.
DEEPSPEED_INTERNALS = re.compile(r"ds_tensor|ds_numel|ds_shape|ds_id|_DeepSpeed|zero_optimization_"
                                 r"|fp32_partitioned|param_coordinator|single_partition_of_fp32")
# What models/shape.py alone asks of a model or a config.
SHAPE = re.compile(r"config\.vocab_size|base_model_prefix|\.base_model\b|get_(in|out)put_embeddings"
                   r"|get_text_config|get_decoder")
# The two backends of the loss implement one protocol under the same names.
LOSS_BACKENDS = {"losses/elementwise.py", "losses/kernels.py"}
# Beside them the commands as functions, and the part of each that others call.
SAME_NAMES = [LOSS_BACKENDS, {"cli/functions.py", "eval/evaluate.py"},
              {"cli/functions.py", "training/train.py"}]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def folder_of(path: Path) -> str:
    """The folder under amid_ds/ that a module lies in; a module directly under it is its own."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module that the file imports, inside functions too, but not those for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (isinstance(node, ast.If)
                and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_a_module_imports_from_its_own_folder_or_those_below(path):
    folder = folder_of(path)
    assert folder in ORDER, f"{folder} is not in ORDER"
    for name in imports(path):
        match = re.match(r"amid_ds\.(\w+)", name)
        if match and match[1] in ORDER:
            assert ORDER.index(match[1]) <= ORDER.index(folder), (
                f"{folder} imports {match[1]}, which is above it")


def test_no_two_modules_import_each_other():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    graph = {name: {other for other in imports(path) if other in names and other != name}
             for name, path in names.items()}
    # Raises CycleError, naming the modules.
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", OWNERS)
def test_a_dependency_is_imported_by_its_owners_alone(package):
    users = {folder_of(path) for path in modules() for name in imports(path)
             if f"{name}.".startswith(f"{package}.")}
    assert users <= OWNERS[package]


def test_the_package_has_few_entries():
    listed = subprocess.run(["git", "ls-files", "amid_ds"], cwd=ROOT, capture_output=True,
                            text=True, check=True)
    entries = {line.split("/")[1] for line in listed.stdout.split()}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_no_module_is_long():
    assert [relative(path) for path in modules()
            if len(path.read_text().splitlines()) > MOST_LINES] == []


def test_a_public_name_is_defined_once():
    """So that a search for a name ends at one definition."""
    where: dict[str, list[str]] = {}
    for path in modules():
        defined = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
        # `logger` is each module's own, T any module's type variable.
        for name in defined - {"logger", "T", "__all__"}:
            if not name.startswith("_"):
                where.setdefault(name, []).append(relative(path))
    assert {name: paths for name, paths in where.items()
            if len(paths) > 1 and set(paths) not in SAME_NAMES} == {}


def test_state_is_typed():
    lines = sum(len(path.read_text().splitlines()) for path in modules())
    uses = Counter({relative(path): path.read_text().count("dict[str, Any]") for path in modules()})
    assert sum(uses.values()) <= MOST_UNTYPED_DICTS * lines / 1000, uses.most_common(8)


@pytest.mark.parametrize("path", [path for path in modules() if folder_of(path) != "engine"
                                  and relative(path) != "checkpoint/zero_shards.py"], ids=relative)
def test_deepspeeds_internals_are_named_in_the_engine_alone(path):
    text = path.read_text()
    assert DEEPSPEED_INTERNALS.findall(text) == []
    for node in ast.walk(ast.parse(text)):
        if (isinstance(node, ast.arg) and node.arg in ("ds", "engine")
                and node.annotation is not None):
            assert not re.search(r"\b(Any|object)\b", ast.unparse(node.annotation)), (
                f"{node.arg} in line {node.lineno}")


def test_a_models_shape_is_known_in_one_room_alone():
    rooms = [relative(path) for path in modules() if SHAPE.search(path.read_text())]
    assert rooms == ["models/shape.py"]


def test_importing_the_package_needs_torch_alone():
    code = ("import sys, amid_ds; "
            "print({'deepspeed', 'transformers', 'datasets', 'pydantic', 'yaml'} "
            "& sys.modules.keys() or None); "
            # The commands as functions import what they need when they are called.
            "[getattr(amid_ds, name) for name in amid_ds.__all__]; "
            "print({'deepspeed', 'transformers', 'datasets', 'pandas'} & sys.modules.keys() "
            "or None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "None"]


def write_imported_modules(argv, variables, log):
    Path(log).write_text(" ".join(sys.modules))


def test_a_tests_ranks_share_the_fork_servers_imports():
    ranks = Ranks(1, target=write_imported_modules)
    assert ranks.wait() == [0]
    assert ({"support.rank_imports", "deepspeed", "amid_ds.training.trainer"}
            <= set(ranks.output().split()))


def test_a_test_module_imports_no_other_test_module():
    shared = {f"support.{path.stem}" for path in (ROOT / "tests" / "support").glob("*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        names = imports(path)
        assert not [name for name in names
                    if re.match(r"(tests|conftest)(\.|$)|test_", name)], path.name
        own = {".".join(name.split(".")[:2]) for name in names if name.startswith("support.")}
        assert own <= shared, path.name


def documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    return [ROOT / line for line in listed.stdout.split()]


def test_the_map_names_every_folder_and_module():
    text = (PACKAGE / "README.md").read_text()
    missing = [relative(path) for path in modules()
               if path.name != "__init__.py" and f"`{relative(path)}`" not in text]
    assert missing == []
    folders = {folder_of(path) for path in modules() if path.parent != PACKAGE}
    assert sorted(folder for folder in folders if f"`{folder}/`" not in text) == []
    named = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*\.py)`", text))
    assert sorted(name for name in named
                  if not (PACKAGE / name).exists() and not (ROOT / name).exists()) == []


def test_the_tests_document_names_every_test_and_helper_once():
    text = (ROOT / "tests" / "README.md").read_text()
    rows = " ".join(re.findall(r"^\| ((?:`\w+\.py`(?:, )?)+) \|", text, re.M))
    tests = ROOT / "tests"
    there = [path.name for path in [*tests.glob("test_*.py"), *tests.glob("support/*.py")]
             if path.name != "__init__.py"]
    assert sorted(re.findall(r"`(\w+\.py)`", rows)) == sorted(there)


@pytest.mark.parametrize("section", [Student, Loss, Rollout, Train, CheckpointPolicy, Slurm])
def test_the_recipes_document_has_every_key_with_its_default(section):
    prefix = {CheckpointPolicy: "checkpoint"}.get(section, section.__name__.lower())
    documented = {}
    for keys, values in re.findall(r"^\| (`.*?`) \| (.*?) \|",
                                   (PACKAGE / "config" / "README.md").read_text(), re.M):
        first, *others = re.findall(r"`(.*?)`", keys)
        names = [first, *(re.sub(r"^(?=\.)", first.partition(".")[0], name) for name in others)]
        documented |= dict(zip(names, re.findall(r"`(.*?)`", values) or [values] * len(names),
                               strict=False))
    for name, field in section.model_fields.items():
        text = documented[f"{prefix}.{name}"]
        with contextlib.suppress(json.JSONDecodeError):
            text = json.loads(text)
        assert text == ("–" if field.is_required() else field.default), name


def test_the_checkpoints_document_has_every_key_that_a_resumed_run_may_or_may_not_change():
    text = (PACKAGE / "checkpoint" / "README.md").read_text()
    lines = [re.search(rf"^\| `{first}`.*?\|", text, re.M)[0]
             for first in ("checkpoint", "teacher.cached", "train.optimizer")]
    may, at_another_place, may_not = (set(re.findall(r"`([a-z_.]+)`", line)) for line in lines)
    assert may | at_another_place == set(MAY_CHANGE) and may_not == set(KEPT)


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000 and len(text.splitlines()) <= 150


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_document_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                       for heading in headings}
            assert anchor in anchors, link


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_linters_are_clean(command):
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_line_that_the_readme_shows():
    line = re.search(r"^python3 -m venv .*&& \.venv/bin/pytest$",
                     (ROOT / "README.md").read_text(), re.M)
    assert line and ".venv/bin/pytest$" in (ROOT / ".ci" / "run").read_text()
