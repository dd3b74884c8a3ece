"""`bench step`: its numbers are of what it says, at a scale that says nothing of speed."""

from __future__ import annotations

from amid_ds.bench_step import Scale, measure


def test_the_four_ways_are_measured_and_the_teacher_is_gathered_once_a_window():
    result = measure(Scale((64, 2), (128, 3), 512, 1, 32, 1, "fp32"), 2)
    # of a Llama whose every weight is above ZeRO-3's threshold for gathering or not: embedding, projections, norms
    layer = 4 * 128 * 128 + 3 * 128 * 512
    teacher = 4 * (512 * 128 + 3 * (layer + 2 * 128) + 128)
    assert result.teacher_shard_bytes == teacher / 2
    assert result.largest_layer_bytes == 4 * (layer + 2 * 128)
    assert result.teacher_gather_bytes["ga8"] <= 1.05 * result.teacher_gather_bytes["ga1"]
    assert min(result.student_step_s, result.teacher_forward_s, result.distillation_step_s, result.usual_step_s) > 0
    assert set(result.peak_bytes) == {"student", "distillation", "usual"}
