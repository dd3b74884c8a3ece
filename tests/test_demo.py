"""`amid-ds demo`, complete but short: a few steps instead of hundreds, all else as it is run."""

from __future__ import annotations

import json
from multiprocessing import forkserver

from support import ranks  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.experiments import demo


def test_the_demo_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    for name, steps in (("TEACHER_TRAIN", 3), ("STUDENT_TRAIN", 2)):
        monkeypatch.setattr(demo, name, {**getattr(demo, name), "steps": steps, "warmup_steps": 1})
    monkeypatch.setattr(demo, "CORPUS_BYTES", 400_000)
    monkeypatch.setattr(demo, "HELD_OUT_BYTES", 8_000)
    monkeypatch.setattr(demo, "VOCABULARY", 600)
    # The tests' own server, which `support.ranks` has told what to import.
    forkserver.ensure_running()
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "KL to teacher" in printed and "tensorboard" in printed and "amid-ds" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"teacher", "distilled", "ce", "seconds", "matrix_products"}
    assert summary.pop("matrix_products") > 0 and summary.pop("seconds") > 0
    for scores in summary.values():
        assert {"perplexity", "kl_to_teacher", "top1_agreement"} <= set(scores)
    assert summary["teacher"]["kl_to_teacher"] < 1e-6 and summary["teacher"]["top1_agreement"] == 1
    assert summary["distilled"]["kl_to_teacher"] > 0 and summary["ce"] != summary["distilled"]
    for name in ("teacher", "distilled", "ce"):
        AutoModelForCausalLM.from_pretrained(out / "models" / name)
        assert list((out / "runs" / name / "tensorboard").iterdir())
    text = "def f(x):\n\treturn x  # naïve\n"
    tokenizer = AutoTokenizer.from_pretrained(out / "models" / "distilled")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert main(["demo", "--out", str(out)]) == 2 and "not empty" in capsys.readouterr().err
