"""Recipes of a few steps, `amid-ds train` under its launchers, and the metrics of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from amid_ds.distributed.launch import free_port

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def write_recipe(path: Path, student: Path, teacher: Path | None, data: Path, out: Path,
                 **changes) -> Path:
    """Write a recipe of 6 steps on a global batch of 4; return the path.

    `changes` are dotted keys with `__` for the dot, such as train__steps=3.
    """
    is_instructions = "prompt" in data.read_text().splitlines()[0]
    columns = {"prompt": "prompt", "response": "response"} if is_instructions else {"text": "text"}
    recipe: dict = {
        "student": {"model": str(student)},
        "data": {"train": [{"path": str(data), **columns}], "workers": 0},
        "train": {"steps": 6, "seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4,
                  "learning_rate": 3e-3, "warmup_steps": 2},
        "deepspeed": "ds_configs/zero3_fp32.json",
        "checkpoint": {"every": 100},
        "output_dir": str(out),
    }
    if teacher is not None:
        recipe["teacher"] = {"model": str(teacher)}
        recipe["loss"] = {"alpha": -1.0, "lam": 0.3, "order": "pr", "ce_weight": 0.5}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            recipe.setdefault(section, {})[leaf] = value
        else:
            recipe[section] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_gathering_config(folder: Path, name: str = "zero3_fp32.json", **changes) -> Path:
    """Write a packaged ZeRO-3 config that gathers every parameter at each use; return the path.

    By default parameters of fewer than 100,000 elements stay whole on every rank, and a test's
    models have no larger ones. (A larger one stays from one pass to the next if its next use is
    within stage3_max_reuse_distance, or within the prefetched elements.)
    """
    config = json.loads((ROOT / "ds_configs" / name).read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **changes}
    path = folder / f"gathering_{name}"
    path.write_text(json.dumps(config))
    return path


def rank_environment() -> dict[str, str]:
    """This process's environment with one thread a rank and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1"}


def launch_train(ranks: int, recipe: Path, *overrides: str,
                 timeout: float = 240) -> subprocess.CompletedProcess:
    """Run `train` under the deepspeed launcher on `ranks` ranks; 0: as `amid-ds train` alone.

    Slow, because each rank imports everything: for tests of the launcher. Others use run_ranks.
    """
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()),
                "--module", "amid_ds"]
    command = [*(launcher if ranks else [str(BIN / "amid-ds")]), "train", str(recipe), *overrides]
    return subprocess.run(command, env=rank_environment(), capture_output=True, text=True,
                          timeout=timeout)


def read_metrics(run: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable_metrics(run: Path) -> list[dict]:
    """The run's metrics without times: equal to the last digit for equal runs."""
    timed = ("tokens_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in timed and "/" not in key}
            for line in read_metrics(run)]


def comparable_results(run: Path) -> list[dict]:
    """`comparable_metrics` of a run, and what it has logged of its evaluations: some."""
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert evaluations
    return [*comparable_metrics(run), *evaluations]


def count_steps(run: Path) -> int:
    """The number of steps that the run has logged; 0 before its first."""
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
