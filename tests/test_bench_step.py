"""`bench step`: it measures what its table says, at a scale that says nothing of speed."""

from __future__ import annotations

import os

import pytest

from amid_ds.bench.step import STEP_VARIANTS, StepScale, _make_models, _on_ranks

SCALE = StepScale((64, 2), (128, 3), 512, 1, 32, 1, "fp32")


def test_the_four_ways_are_measured_and_the_teacher_is_gathered_once_a_window(tmp_path):
    before = set(os.environ)
    _make_models(tmp_path, SCALE)
    times = _on_ranks(2, tmp_path, "times", SCALE)
    peak = _on_ranks(2, tmp_path, "distillation", SCALE)["peak_bytes"]
    # The measuring process must not stay a rank.
    assert not (os.environ.keys() - before) & {"WORLD_SIZE", "RANK", "MASTER_ADDR"}
    # Bytes of embedding, projections and norms, with every parameter gathered.
    layer = 4 * 128 * 128 + 3 * 128 * 512
    teacher = 4 * (512 * 128 + 3 * (layer + 2 * 128) + 128)
    assert times["teacher_shard_bytes"] == teacher / 2
    assert times["largest_layer_bytes"] == 4 * (layer + 2 * 128)
    assert times["teacher_gather_bytes"]["ga8"] <= 1.05 * times["teacher_gather_bytes"]["ga1"]
    assert ({way: len(seconds) for way, seconds in times["seconds"].items()}
            == dict.fromkeys(STEP_VARIANTS, SCALE.rounds))
    assert peak > teacher


# CPU Adam is compiled for it.
@pytest.mark.slow
def test_an_optimizers_step_is_measured_on_the_same_state_for_each(tmp_path):
    _make_models(tmp_path, SCALE)
    seconds = _on_ranks(2, tmp_path, "optimizer", SCALE)
    assert seconds.keys() == {"loop", "fused", "fused_host", "cpu_adam"}
    assert all(took > 0 for took in seconds.values())
