"""`bench loss --predict`: the goals at the shape that they are set for, and how times depend on
sizes. No prediction has been held against a GPU."""

from __future__ import annotations

import dataclasses
import json

import pytest

from amid_ds.bench import predict, step
from amid_ds.bench.predict import DEVICES, PredictedShape, predict_loss
from amid_ds.cli import main

SHAPE = PredictedShape(8192, 128256, 4096, 4096)


@pytest.mark.parametrize(("device", "alpha", "most"), [
    ("h200", -1.0, 1.15), ("h200", -5.0, 1.2), ("h200", 0.5, 1.2),
    # Of less bandwidth: the kernels' 14 bytes a pair of logits take 5.4 ms of the 43.
    ("h100-80g", -1.0, 1.2), ("h100-80g", -5.0, 1.2)])
def test_the_loss_takes_little_more_than_its_four_products(device, alpha, most):
    found = predict_loss(DEVICES[device], dataclasses.replace(SHAPE, alpha=alpha))
    assert 1 < found.ratio <= most


@pytest.mark.parametrize("device", DEVICES)
def test_the_parts_are_the_whole_and_the_products_are_bounded_by_the_peak(device):
    found = predict_loss(DEVICES[device], SHAPE)
    parts = found.block_products_ms + found.kernels_ms + found.sums_ms + found.rest_ms
    assert found.total_ms == pytest.approx(parts)
    assert found.ratio == pytest.approx(found.total_ms / found.products_ms)
    ideal_ms = 1e3 * 8 * 8192 * 128256 * 4096 / DEVICES[device].flops
    assert found.block_products_ms * 1.01 > found.products_ms > ideal_ms
    # Each of the three kernels reads both models' logits, and the last writes a gradient.
    assert found.kernels_ms > 1e3 * 14 * 8192 * 128256 / DEVICES[device].chip.bandwidth
    assert found.blocks == -(-8192 // found.block_tokens)


@pytest.mark.parametrize("name", ["tokens", "vocabulary", "student_width", "teacher_width"])
def test_more_of_anything_takes_longer(name):
    times = []
    for size in (1024, 2048, 4096, 16384, 65536):
        found = predict_loss(DEVICES["h100-80g"], dataclasses.replace(SHAPE, **{name: size}))
        times.append((found.products_ms, found.total_ms))
    assert times == sorted(times) and len({total for _, total in times}) == len(times)


def test_more_tokens_than_there_is_memory_for_are_predicted_at_once():
    most, few = (predict_loss(DEVICES["h100-80g"], dataclasses.replace(SHAPE, tokens=tokens))
                 for tokens in (2**62, 2**20))
    assert most.blocks == -(-2**62 // most.block_tokens)
    assert most.total_ms == pytest.approx(few.total_ms * 2**42, rel=0.01)


def test_any_other_mixture_costs_more_instructions_than_the_arithmetic_one():
    costs = [[predict.issue_slots(*cost)
              for cost in predict.INSTRUCTIONS_PER_PAIR[kind].values()]
             for kind in ("arithmetic", "power")]
    assert all(cheap <= dear for cheap, dear in zip(*costs, strict=True))
    # exp2 and its kin have a unit of their own, an eighth as wide.
    assert predict.issue_slots(34.6, 6.0) == 48 and predict.issue_slots(30.0, 2.0) == 30
    cheap, dear = (predict_loss(DEVICES["h200"], dataclasses.replace(SHAPE, alpha=alpha))
                   for alpha in (-1.0, 3.0))
    assert cheap.kernels_ms < dear.kernels_ms
    assert dear.products_ms == cheap.products_ms


def test_several_blocks_pay_for_adding_up_the_weights_gradient():
    one, several = (predict_loss(DEVICES[device], SHAPE) for device in ("h200", "a100-40g"))
    assert (one.blocks, several.blocks) == (1, 5)
    elements = 128256 * 4096
    # Written once in bf16; in fp32 written by the first block, read and written by the others.
    for found, device, size in ((one, "h200", 2), (several, "a100-40g", 4 + 4 * 8)):
        bandwidth = DEVICES[device].chip.bandwidth * 0.9
        assert found.sums_ms == pytest.approx(1e3 * elements * size / bandwidth / 3)


def test_the_command_prints_the_parts_or_json_with_the_promised_keys(capsys):
    options = ["--tokens", "2048", "--vocabulary", "151936", "--student-width", "2048",
               "--teacher-width", "5120", "--alpha", "-5"]
    assert main(["bench", "loss", "--predict", "h100-80g", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = predict_loss(DEVICES["h100-80g"], PredictedShape(2048, 151936, 2048, 5120, -5.0))
    for key in ("products_ms", "kernels_ms", "total_ms", "ratio"):
        assert found[key] == getattr(expected, key)
    assert main(["bench", "loss", "--predict", "h100-80g", *options]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed and f"{expected.total_ms:.2f} ms" in printed


@pytest.mark.parametrize(("arguments", "message"), [
    (["loss", "--predict", "cpu"], "h100-80g"),
    (["loss", "--predict", "abacus"], "h100-80g"),
    (["loss", "--predict", "{memory: 1e9, flops: 1e12, bandwidth: 1e9}"], "h100-80g"),
    (["loss", "--tokens", "5"], "--predict"),
    (["loss", "--predict", "h200", "--alpha", "nan"], "finite"),
    (["loss", "--predict", "h200", "--tokens", f"{2**63}"], "2^63"),
    (["loss", "--predict", "h200", "--rows", "2"], "--rows"),
    (["data", "--tokens", "5"], "no option but --json"),
    (["step", "--predict", "h200"], "--predict"),
    (["step", "--student", "64"], "WIDTH,LAYERS"),
    (["step", "--rows", "0"], "above 0")])
def test_options_that_a_benchmark_does_not_have_exit_with_2(arguments, message, capsys):
    try:
        status = main(["bench", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_bench_step_takes_its_shape_from_the_options(monkeypatch):
    given = []
    monkeypatch.setattr(step, "bench_step",
                        lambda as_json, **options: given.append((as_json, options)))
    assert main(["bench", "step", "--json", "--rows", "4", "--length", "512", "--vocabulary",
                 "32000", "--student", "256,4", "--teacher", "512,8"]) == 0
    assert main(["bench", "step"]) == 0
    assert given == [(True, {"rows": 4, "length": 512, "vocabulary": 32000, "student": (256, 4),
                             "teacher": (512, 8)}), (False, {})]
