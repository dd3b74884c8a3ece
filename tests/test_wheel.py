"""What the wheel installs works by itself: nothing of a checkout is beside it (slow)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import write_texts
from support.models import make_model

from amid_ds.config.strict import dump_yaml

ROOT = Path(__file__).parent.parent
PARTS = ("amid_ds", "slurm", "ds_configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """`amid-ds` of a fresh environment with the wheel; all other packages are this one's."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "source").mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, root / "source" / part)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", root / "made",
                    root / "source"], check=True)
    shutil.rmtree(root / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    subprocess.run([*pip, "--python", root / "venv", "install", "-q", "--no-deps",
                    *(root / "made").glob("*.whl")], check=True)
    packages = next((root / "venv" / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    return root / "venv" / "bin" / "amid-ds"


def run_installed(program: Path, folder: Path, *arguments: object) -> str:
    """stdout of `amid-ds ARGUMENTS` in `folder`; its status must be 0."""
    done = subprocess.run([program, *map(str, arguments)], cwd=folder, text=True,
                          capture_output=True, env=without_checkout())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_recipes_configs_templates_and_training_come_with_the_wheel(installed, tmp_path):
    """In a folder whose name has a space."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    make_model(folder / "model", "llama")
    write_texts(folder / "text.jsonl")
    (folder / "recipe.yaml").write_text(dump_yaml({
        "student": {"model": "model"}, "teacher": {"model": "model"},
        "data": {"train": [{"path": "text.jsonl", "text": "text"}], "workers": 0},
        "loss": {"preset": "fkl"}, "train": {
            "steps": 2, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 2,
            "learning_rate": 1e-3, "warmup_steps": 1},
        "deepspeed": "ds_configs/zero3_fp32.json", "output_dir": "run"}))
    source = run_installed(installed.with_name("python"), folder, "-c",
                           "import amid_ds; print(amid_ds.__file__)")
    assert Path(source.strip()).is_relative_to(installed.parent.parent)
    assert "amid_gpt2_dolly" in run_installed(installed, folder, "recipes", "list")
    assert json.loads(run_installed(installed, folder, "plan", "recipe.yaml", "--json"))["fits"]
    run_installed(installed, folder, "submit", "recipe.yaml", "--dry-run",
                  "--ranks-per-node", 1)
    run_installed(installed, folder, "train", "recipe.yaml")
    assert (folder / "run" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_the_demo_starts_from_the_wheel_and_stops_in_good_order_at_ctrl_c(installed, tmp_path):
    demo = tmp_path / "runs" / "demo"
    metrics = demo / "runs" / "teacher" / "metrics.jsonl"
    # While its ranks' imports have just begun, then amid a training.
    said = interrupt(installed, tmp_path, (demo / "corpus").is_dir)
    assert "[1/6] corpus" in said and "the same command goes on" in said
    said = interrupt(installed, tmp_path, lambda: metrics.exists() and metrics.read_text())
    assert "[3/6] teacher" in said and " left" in said and "the same command goes on" in said
    assert (metrics.parent / "checkpoints" / "latest").exists()


def interrupt(program: Path, folder: Path, is_time: Callable[[], object]) -> str:
    """What `amid-ds demo` says until Ctrl-C, once it is time; it ends in good order."""
    process = subprocess.Popen([program, "demo"], cwd=folder, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=without_checkout(),
                               start_new_session=True)
    deadline = time.monotonic() + 600
    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    # As a terminal does: to all processes in it.
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "Traceback" not in said, said
    return said
