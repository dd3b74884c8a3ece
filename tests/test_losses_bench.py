"""`bench loss` measures what its table says; its times are not tested."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from amid_ds.bench import loss as bench


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> bench.LossShape:
    shape = bench.LossShape(16, 500, 8, 12)
    monkeypatch.setattr(bench, "LOSS_SHAPES", {"cpu": [shape], "cuda": [shape]})
    # A process for each method costs seconds.
    if not torch.cuda.is_available():
        monkeypatch.setattr(bench, "_peak_bytes", lambda *_: 1000)
    return shape


def test_the_methods_differ_in_nothing_but_how_they_compute(small):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gradients, further = {}, bench._further_methods(device)
    for name, method in bench._loss_methods(device, "amid").items():
        inputs = bench._Inputs(small, device)
        method(inputs)
        gradients[name] = inputs.student_head.grad
    assert set(further) < set(gradients)
    for name, gradient in gradients.items():
        same = name not in further or name.endswith(bench.WITH_STATISTICS)
        # The products alone compute no loss.
        if name != "products":
            assert torch.allclose(gradient, gradients["naive"], atol=1e-5) == same, name


def test_json_has_a_row_for_every_method_with_its_ratios(small, capsys):
    bench.bench_loss(True)
    result, = json.loads(capsys.readouterr().out)["results"]
    rows = {row["method"]: row for row in result["rows"]}
    assert {"products", "naive", "amid_ds torch"} <= set(rows)
    assert rows["naive"]["of_naive_time"] == rows["products"]["of_products_time"] == 1
    ratio = rows["amid_ds torch"]["seconds"] / rows["naive"]["seconds"]
    assert rows["amid_ds torch"]["of_naive_time"] == pytest.approx(ratio)


def test_torch_compiles_the_naive_twin_for_the_sizes_of_every_shape(small, monkeypatch):
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda function, **options: real(function, backend=counter, **options))
    monkeypatch.setattr(bench, "_loss_methods", lambda *_: {"compiled": bench._compiled})
    # torch gives up after eight, and from the second on it would compile for any number of tokens.
    for count, tokens in enumerate(range(2, 12), 1):
        bench._median_seconds(replace(small, tokens=tokens), "cpu", rounds=2)
        assert counter.frame_count == count


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_process_is_that_of_its_largest_moment():
    shape = bench.LossShape(512, 20_000, 8, 8)
    logits = shape.tokens * shape.vocabulary * 4
    threads = torch.get_num_threads()
    naive, ours = (bench._resident_peak(name, shape, threads)
                   for name in ("naive", "amid_ds torch"))
    assert naive > 4 * logits
    # The workspace of 96 MB, and memory that libraries keep.
    assert ours < 150e6 < naive


@pytest.mark.slow
def test_the_table_names_every_method(small, capsys):
    bench.bench_loss(False)
    assert "amid_ds torch" in capsys.readouterr().out


def test_a_row_is_printed_before_the_next_one_is_measured(small, monkeypatch, capsys):
    printed = []

    def peak(name: str, *_: object) -> int:
        printed.append((name, capsys.readouterr().out))
        return 1000

    monkeypatch.setattr(bench, "_peak_bytes", peak)
    bench.bench_loss(False)
    for (before, _), (_, out) in itertools.pairwise(printed):
        assert before in out
    assert printed[-1][0] in capsys.readouterr().out


def test_a_method_that_does_not_fit_has_no_row_and_the_others_have_theirs(small, monkeypatch,
                                                                         capsys):
    def too_large(inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "_naive", too_large)
    bench.bench_loss(True)
    rows = json.loads(capsys.readouterr().out)["results"][0]["rows"]
    assert "naive" not in [row["method"] for row in rows] and len(rows) >= 2
    for row in rows:
        assert row["of_naive_time"] is None and row["of_naive_memory"] is None
        assert row["of_products_time"] > 0
    bench.bench_loss(False)
    assert "products" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["_trl_chunked"])
def test_other_peoples_losses_are_the_same_divergence(small, method):
    pytest.importorskip("trl")
    gradients = []
    for compute in (bench._naive, getattr(bench, method)):
        inputs = bench._Inputs(replace(small, objective="jsd"), "cpu")
        compute(inputs)
        gradients.append((inputs.student.grad, inputs.student_head.grad))
    for actual, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, expected)
