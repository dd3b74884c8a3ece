"""`bench step`: it measures what its table says, at a scale that says nothing of speed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from support.fake_cuda import FakeCuda

from amid_ds.bench import step
from amid_ds.bench.step_scale import (
    STEP_SCALES,
    STEP_VARIANTS,
    StepScale,
    fitting_scale,
    save_configs,
    save_models,
    step_needs,
)
from amid_ds.errors import InputError
from amid_ds.planning.devices import Device

SCALE = StepScale((64, 2), (128, 3), 512, 1, 32, 1, "fp32")
# Bytes of embedding, projections and norms of SCALE's teacher; a block of it.
LAYER = 4 * (4 * 128 * 128 + 3 * 128 * 512 + 2 * 128)
TEACHER = 4 * (512 * 128 + 128) + 3 * LAYER


def device(memory: float) -> Device:
    return Device("h100-80g", memory, 989e12, 50e9, 450e9)


def test_every_way_is_measured_and_the_teacher_is_gathered_once_a_window(tmp_path):
    before = set(os.environ)
    save_models(tmp_path, SCALE)
    times = step._on_ranks(2, tmp_path, STEP_VARIANTS, SCALE, 1)
    ours = step._on_ranks(2, tmp_path, ["distillation"], SCALE, 0)
    # The measuring process must not stay a rank.
    assert not (os.environ.keys() - before) & {"WORLD_SIZE", "RANK", "MASTER_ADDR"}
    assert times.sizes["teacher_shard_bytes"] == TEACHER / 2
    assert times.sizes["largest_layer_bytes"] == LAYER
    assert times.sizes["ga8"] <= 1.05 * times.sizes["ga1"]
    assert {way: len(seconds) for way, seconds in times.seconds.items()} == dict.fromkeys(
        STEP_VARIANTS, 1)
    assert times.peak_bytes is None and ours.peak_bytes > TEACHER and ours.sizes == {}


def test_what_does_not_fit_the_device_is_left_out_or_refused(tmp_path):
    """The usual way first, then all at once, then distillation itself."""
    scale = replace(SCALE, vocabulary=32000, rows=8, length=256, dtype="bf16")
    save_configs(tmp_path, scale)
    needs = step_needs(scale, tmp_path, 1, device(80e9))
    ours, usual = needs["distillation"].total, needs["usual"].total
    # Logits of both models in fp32, and more.
    assert usual - ours > 2 * 4 * 8 * 256 * 32000
    chosen = {memory: fitting_scale(scale, tmp_path, 1, device(memory / 0.92), may_shrink=False)
              for memory in (4 * usual, usual + 1, usual - 1)}
    assert [each[1:] for each in chosen.values()] == [
        (STEP_VARIANTS, True), (STEP_VARIANTS, False), (STEP_VARIANTS[:-1], True)]
    shrunk, variants, _ = fitting_scale(scale, tmp_path, 1, device((usual - 1) / 0.92), True)
    assert (shrunk.rows, variants) == (4, STEP_VARIANTS)
    with pytest.raises(InputError, match="fewer --rows"):
        fitting_scale(scale, tmp_path, 1, device((ours - 1) / 0.92), may_shrink=False)


def test_the_default_on_one_gpu_of_80_gb_fits_it_one_variant_at_a_time(tmp_path):
    scale = STEP_SCALES["cuda"]
    save_configs(tmp_path, scale)
    chosen, variants, at_once = fitting_scale(scale, tmp_path, 1, device(80e9), may_shrink=True)
    assert variants == STEP_VARIANTS and not at_once
    assert (chosen.rows, replace(chosen, rows=scale.rows)) == (2, scale)
    # Weights, gradients, masters and moments; the teacher; fp32 logits, their sums and gradients.
    models = (24 * 16 * 1024**2 + 128256 * 1024) * 18 + (32 * 16 * 4096**2 + 128256 * 4096) * 2
    logits = [rows * 2048 * 128256 * 4 * 15 for rows in (2, 4)]
    assert models + logits[0] < 0.92 * 80e9 < models + logits[1]


@pytest.mark.parametrize("wrong, words", [
    ({"rows": 0}, "--rows: 0"), ({"length": 1}, "--length: 1, at least 2"),
    ({"vocabulary": -3}, "--vocabulary: -3"), ({"student": (100, 2)}, "--student: 100, a multiple"),
    ({"teacher": (0, 2)}, "--teacher: 0"), ({"teacher": (64, 0)}, "layers of --teacher: 0"),
    ({"rows": 10**9}, "distillation at this shape")])
def test_a_shape_that_cannot_be_or_does_not_fit_is_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        step.bench_step(True, **wrong)


def test_a_shape_is_measured_as_it_is_given(monkeypatch, capsys):
    """On a faked GPU, whose memory decides: the usual way does not fit at these many rows."""
    asked = []

    def measure(size, folder, variants, scale, rounds):
        asked.append((size, list(variants), scale, rounds))
        sizes = dict.fromkeys(("teacher_shard_bytes", "largest_layer_bytes", "ga1", "ga8"), 1)
        return step.Measured({variant: [2.0] * rounds for variant in variants}, 7, sizes)

    monkeypatch.setattr(step, "_on_ranks", measure)
    shape = {"rows": 64, "length": 2048, "vocabulary": 32000, "student": (64, 1),
             "teacher": (128, 1)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        FakeCuda(1)._functions()["get_device_properties"])
    step.bench_step(True, **shape)
    result = json.loads(capsys.readouterr().out)
    assert {name: result["scale"][name] for name in shape} == json.loads(json.dumps(shape))
    assert result["usual_step_s"] is None and result["peak_bytes"]["usual"] is None
    assert result["student_step_s"] == 2 and result["peak_bytes"]["distillation"] == 7
    assert result["cached_step_s"] == {"topk_64": 2, "sample_50": 2}
    own = ["student", "distillation", "topk_64", "sample_50"]
    assert [each[1] for each in asked] == [["student", "teacher", *own[1:]],
                                           *([name] for name in own), []]
    assert {each[0] for each in asked} == {1} and [each[3] for each in asked] == [10] + [0] * 5
    step.bench_step(False, **shape)
    assert "no room" in capsys.readouterr().out


# CPU Adam is compiled for it.
@pytest.mark.slow
def test_an_optimizers_step_is_measured_on_the_same_state_for_each(tmp_path):
    save_models(tmp_path, SCALE)
    seconds = step._on_ranks(2, tmp_path, [], SCALE, 0).optimizer_s
    assert seconds.keys() == {"loop", "fused", "fused_host", "cpu_adam"}
    assert all(took > 0 for took in seconds.values())
