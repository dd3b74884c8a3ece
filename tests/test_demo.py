"""`amid-ds demo`, complete but short: a few steps instead of hundreds, all else as it is run."""

from __future__ import annotations

import json
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import support.ranks  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.errors import InputError
from amid_ds.experiments import demo
from amid_ds.experiments import progress as progress_module
from amid_ds.experiments.progress import PRIOR_PRODUCTS, PartsProgress


@pytest.fixture
def short_demo(monkeypatch) -> None:
    """The demo with a few steps, a smaller corpus and a smaller vocabulary."""
    for name, steps in (("TEACHER_TRAIN", 3), ("STUDENT_TRAIN", 2)):
        monkeypatch.setattr(demo, name, {**getattr(demo, name), "steps": steps, "warmup_steps": 1})
    monkeypatch.setattr(demo, "CORPUS_CHARACTERS", 400_000)
    monkeypatch.setattr(demo, "HELD_OUT_CHARACTERS", 8_000)
    monkeypatch.setattr(demo, "VOCABULARY", 600)
    # The demo sets it for its own process.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # The tests' own server, which `support.ranks` has told what to import.
    forkserver.ensure_running()


def test_the_demo_leaves_what_it_promises(short_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "KL to teacher" in printed and "tensorboard" in printed and "amid-ds" in printed
    assert "[6/6]" in printed and " left\n" in printed
    # The first of what it suggests.
    assert f"amid-ds chat {out}/models/distilled --beside {out}/models/teacher" in printed.split(
        "To go on:\n")[1].splitlines()[0]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"teacher", "distilled", "ce"}
    for scores in summary.values():
        assert {"perplexity", "kl_to_teacher", "top1_agreement"} <= set(scores)
    assert summary["teacher"]["kl_to_teacher"] < 1e-6 and summary["teacher"]["top1_agreement"] == 1
    assert summary["distilled"]["kl_to_teacher"] > 0 and summary["ce"] != summary["distilled"]
    took = json.loads((out / "time.json").read_text())
    assert list(took["parts"]) == list(demo.PART_PRODUCTS) and took["matrix_size"] == 2048
    for part in (took, *took["parts"].values()):
        assert part["matrix_products"] * took["product_seconds"] == pytest.approx(part["seconds"])
    assert 0 < sum(part["seconds"] for part in took["parts"].values()) < took["seconds"]
    assert f"took {took['parts']['ce']['seconds']:.1f} s" in printed
    for name in ("teacher", "distilled", "ce"):
        AutoModelForCausalLM.from_pretrained(out / "models" / name)
        assert list((out / "runs" / name / "tensorboard").iterdir())
    assert (out / "demo.png").is_file()
    for name in ("distilled", "ce"):
        samples = [json.loads(line)
                   for line in (out / "runs" / name / "samples.jsonl").read_text().splitlines()]
        assert samples and all(sample["teacher"] is not None for sample in samples)
    text = "def f(x):\n\treturn x  # naïve\n"
    tokenizer = AutoTokenizer.from_pretrained(out / "models" / "distilled")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert main(["demo", "--out", str(out)]) == 2 and "not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_and_makes_no_part_twice(short_demo, tmp_path, monkeypatch,
                                                             capsys):
    run, trained = demo.run_forked_ranks, []

    def interrupted_once(ranks: int, arguments: list[str], variables: dict[str, str]) -> int:
        trained.append(Path(arguments[1]).stem)
        if trained == ["teacher", "distilled"]:
            raise KeyboardInterrupt
        return run(ranks, arguments, variables)

    monkeypatch.setattr(demo, "run_forked_ranks", interrupted_once)
    out = str(tmp_path / "demo")
    assert main(["demo", "--out", out]) == 75
    assert main(["demo", "--out", out, "--seed", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["demo", "--out", out]) == 0
    assert trained == ["teacher", "distilled", "distilled", "ce"]
    took = json.loads((tmp_path / "demo" / "time.json").read_text())
    assert list(took["parts"]) == ["corpus", "tokenizer", "distilled", "ce", "evaluation"]
    assert "\ndone\n" in capsys.readouterr().out


def test_a_library_with_too_little_source_is_refused(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    with pytest.raises(InputError, match=r"holds 0.00 MB of Python source"):
        demo.make_corpus(tmp_path, 1_000)


def test_the_time_left_follows_the_product_and_then_the_parts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_module, "measure_product", lambda: 0.1)
    progress = PartsProgress({"one": 100, "two": 1000, "three": 500})
    progress.begin("one", "its title")
    assert progress.left_seconds == pytest.approx(160)
    progress.skip("is there")
    progress.begin("two", "its title")
    assert progress.left_seconds == pytest.approx(150)
    # Twice as slow as the product said, which weighs as much as PRIOR_PRODUCTS of the parts.
    now[0] += 200
    progress.begin("three", "its title")
    rate = (200 + PRIOR_PRODUCTS * 0.1) / (1000 + PRIOR_PRODUCTS)
    assert progress.left_seconds == pytest.approx(500 * rate) and progress.seconds == 200
    now[0] += 50
    took = progress.end()
    assert took["seconds"] == 250 and took["matrix_products"] == pytest.approx(2500)
    assert {part: each["seconds"] for part, each in took["parts"].items()} == {"two": 200,
                                                                               "three": 50}
