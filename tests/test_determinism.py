"""`train.deterministic` on a CPU: the switches that it sets, and that it changes no number there.

What it is for, the order of a GPU's sums, cannot be seen here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import comparable_metrics, write_recipe

from amid_ds.errors import TrainingError
from amid_ds.training.determinism import CUBLAS_VARIABLE, deterministic


def switches() -> list[object]:
    """The state of torch and of the environment that the key sets."""
    return [torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory, os.environ.get(CUBLAS_VARIABLE)]


@pytest.fixture
def other_switches(monkeypatch):
    """A program that has set its own: they have to be found again."""
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield switches()
    torch.use_deterministic_algorithms(False)


def test_the_switches_are_set_and_those_of_before_come_back(other_switches, monkeypatch):
    with deterministic(False):
        assert switches() == other_switches
    with deterministic(True):
        assert switches() == [True, False, False, ":4096:8"]
    assert switches() == other_switches
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError("anything")
    assert switches() == other_switches
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    with deterministic(True):
        assert switches() == [True, False, False, ":16:8"]
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"


def test_an_operation_without_a_deterministic_kernel_ends_the_run_with_its_name(other_switches):
    with pytest.raises(TrainingError, match="put_ does not have a deterministic") as ended, \
            deterministic(True):
        torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert "set train.deterministic=false" in str(ended.value)
    assert switches() == other_switches
    with pytest.raises(RuntimeError, match="shape") as error, deterministic(True):
        torch.zeros(2).view(3)
    assert not isinstance(error.value, TrainingError)


def recording_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that leaves its switches of each step in `log`.switches; a deterministic run
    stops after two steps."""
    def around(trainer, batch):
        yield
        with open(f"{log}.switches", "a") as lines:
            lines.write(json.dumps(switches()) + "\n")
        if trainer.state.step == 2 and trainer.recipe.train.deterministic:
            (Path(trainer.recipe.output_dir) / "STOP").touch()

    patch_train_step(around)
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_a_run_with_the_key_equals_one_without_and_a_resumed_run_may_change_it(
        llama_pair, instructions_file, tmp_path):
    def run(out: Path, status: int, deterministic: bool) -> list[list[object]]:
        recipe = write_recipe(
            tmp_path / "r.yaml", *llama_pair, instructions_file, out, train__steps=4,
            train__deterministic=deterministic, data__prepared=str(tmp_path / "data"),
            rollout={"share": 0.5, "max_new_tokens": 4, "top_p": 0.9})
        ranks = Ranks(1, "train", recipe, target=recording_rank)
        assert ranks.wait() == [status], ranks.output()
        return [json.loads(line)
                for line in Path(f"{ranks.log(0)}.switches").read_text().splitlines()]

    on, off = [True, False, False, ":4096:8"], [False, False, True, None]
    assert run(tmp_path / "off", 0, False) == [off] * 4
    assert run(tmp_path / "on", 75, True) == [on] * 2
    assert run(tmp_path / "on", 0, False) == [off] * 2
    metrics = comparable_metrics(tmp_path / "on")
    assert any(line["rollout"] for line in metrics)
    assert metrics == comparable_metrics(tmp_path / "off")
