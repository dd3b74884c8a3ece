"""Schedules of the loss: each step minimises and logs what the recipe says."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import yaml
from support.ranks import run_ranks
from support.runs import comparable_metrics, read_metrics, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Loss, Piecewise, Schedule
from amid_ds.config.schedule import loss_at, value_at
from amid_ds.errors import InputError
from amid_ds.training.objective import objective_at

TOTAL = 11


@pytest.mark.parametrize("spec, values", [
    ({"linear": [-5, -1]}, [-5 + 4 * n / 10 for n in range(11)]),
    ({"linear": [0.0, 1.0], "steps": [2, 6]}, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"cosine": [1.0, 0.0]}, [(1 + math.cos(math.pi * n / 10)) / 2 for n in range(11)]),
    ({"value": 3.0}, [3.0] * 11),
    ({"pieces": [{"steps": [1, 3], "value": 2.0}, {"steps": [5, 7], "linear": [4.0, 0.0]}]},
     [2, 2, 2, 2, 2, 4, 2, 0, 0, 0, 0]),
])
def test_a_schedule_takes_these_values(spec, values):
    scheduled = (Piecewise if "pieces" in spec else Schedule).model_validate(spec)
    assert [value_at(scheduled, step, TOTAL) for step in range(TOTAL)] == pytest.approx(values)


@pytest.mark.parametrize("spec", [{}, {"preset": "skl", "lam": 0.2}])
def test_the_squared_temperature_is_each_steps_own_factor_of_the_divergence(spec):
    loss = {"temperature": {"linear": [1.0, 3.0]}, "kd_weight": 0.5, "ce_weight": 0.25, **spec}
    plain, squared = (Loss.model_validate({**loss, **more})
                      for more in ({}, {"temperature_scaling": "squared"}))
    for step, temperature in ((0, 1.0), (5, 2.0), (10, 3.0)):
        one, other = (objective_at(each, step, TOTAL) for each in (plain, squared))
        assert (one.amid, one.ce_weight, one.kd_weight) == (other.amid, 0.25, 0.5)
        assert one.amid.temperature == pytest.approx(temperature)
        assert other.kd_weight == pytest.approx(0.5 * temperature**2)
        assert other.ce_weight == 0.25


def test_presets_own_keys_are_scheduled_too():
    loss = Loss.model_validate({"preset": "taid", "t": {"linear": [0.4, 1.0]}})
    assert [loss_at(loss, step, TOTAL).model_extra["t"]
            for step in (0, 5, 10)] == pytest.approx([0.4, 0.7, 1.0])


@pytest.mark.parametrize("spec, message", [
    ({"lam": {"linear": [0.5, 1.5]}}, "from 0 to 1"),
    ({"alpha": {"pieces": [{"steps": [0, 5], "value": 1}, {"steps": [4, 9], "value": 2}]}},
     "overlap"),
    ({"alpha": {"linear": [0, 1], "cosine": [0, 1]}}, "one of `value`, `linear` and `cosine`"),
    ({"alpha": {"linear": [0, 1], "steps": [5, 5]}}, "do not go forward"),
    ({"alpha": {"sawtooth": [0, 1]}}, "`loss.alpha.sawtooth` is unknown"),
    ({"alpha": "steep"}, "`loss.alpha`: found 'steep'"),
    ({"temperature": {"linear": [1, 0]}}, "above 0"),
    ({"alpha": {"adaptive": [0.4, 1.0]}}, "only `lam`"),
    ({"preset": "taid", "t": {"adaptive": [0.9, 0.4]}}, "only rises"),
    ({"preset": "taid", "t": {"adaptive": [0.4, 1.5]}}, "less than or equal to 1"),
])
def test_a_wrong_schedule_is_refused_by_name(spec, message, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({
        "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": [{"path": "x"}]},
        "output_dir": "out",
        "train": {"steps": 10, "global_batch_size": 1}, "loss": spec}))
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_each_step_of_a_scheduled_run_minimises_what_the_schedule_says(llama_pair, text_file,
                                                                       tmp_path):
    # At this learning rate the student does not move.
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          train__steps=4, train__learning_rate=1e-30)
    # So a constant objective gives each step's loss.
    scheduled = ["loss.alpha={linear: [-5, 1]}", "loss.lam={cosine: [0.1, 0.9]}",
                 "loss.kd_weight={pieces: [{steps: [0, 1], value: 0}, {steps: [1, 2], value: 2}]}"]
    run_ranks(2, "train", recipe, *scheduled)
    for index, line in enumerate(read_metrics(tmp_path / "run")):
        alpha, lam = -5 + 2 * index, 0.5 - 0.4 * math.cos(math.pi * index / 3)
        weight = 0 if index < 1 else 2
        assert line["kd_weight"] == weight
        assert (line["alpha"], line["lam"]) == ((None, None) if weight == 0
                                                else pytest.approx((alpha, lam)))
        if index % 2:
            continue
        constant = tmp_path / f"constant{index}"
        run_ranks(2, "train", recipe, f"loss.alpha={alpha}", f"loss.lam={lam}",
                  f"loss.kd_weight={weight}", f"output_dir={constant}")
        assert line["loss"] == pytest.approx(read_metrics(constant)[index]["loss"], rel=1e-6)
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.loss == load_recipe(recipe, scheduled).loss


def by_the_paper(divergences: list[float], start: float, end: float, rate: float, momentum: float,
                 total: int):
    """The t of each step by TAID's algorithm 1 as published, given each step's divergence."""
    t, m, before, used = torch.tensor(start, dtype=torch.float64), 0.0, None, []
    for n, divergence in enumerate(divergences):
        used.append(t.item())
        if before is not None:
            m = momentum * m + (1 - momentum) * (before - divergence) / before
            linear = torch.tensor(start + (end - start) * n / total, dtype=torch.float64)
            faster = t + rate * torch.sigmoid(torch.tensor(m, dtype=torch.float64)) * (1 - t)
            t = torch.maximum(linear, faster).clamp(max=end)
        before = divergence
    return used


def test_taids_interpolation_follows_the_divergence_and_goes_on_where_it_was(llama_pair, text_file,
                                                                             tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run", train__steps=8,
        loss={"preset": "taid", "t": {"adaptive": [0.3, 0.8], "rate": 0.5, "momentum": 0.4}},
        checkpoint__every=5)
    run_ranks(1, "train", recipe)
    whole = comparable_metrics(tmp_path / "run")
    truth = by_the_paper([line["kd_loss"] for line in whole], 0.3, 0.8, 0.5, 0.4, 8)
    assert [line["t"] for line in whole] == [line["lam"]
                                             for line in whole] == pytest.approx(truth, rel=1e-12)
    linear = [0.3 + 0.5 * max(0, n - 1) / 8 for n in range(8)]
    # Ahead of linear: the divergence has an effect.
    assert truth[:2] == [0.3, 0.3] and truth[4] > linear[4] + 0.05
    assert truth[-1] == 0.8  # and the end is kept
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    assert "resumed after step 5" in run_ranks(1, "train", recipe).output()
    assert comparable_metrics(tmp_path / "run") == whole
