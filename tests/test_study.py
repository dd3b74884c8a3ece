"""`amid-ds study`, complete but short: few steps, three objectives, all else as it is run."""

from __future__ import annotations

import json

import pytest
from support.ranks import Ranks

from amid_ds.cli import main
from amid_ds.experiments import cached_study, demo, pruning_study, study, sweep


def test_a_study_without_a_seed_is_refused_before_anything_is_made(tmp_path, capsys):
    assert main(["study", "--out", str(tmp_path / "study"), "--seeds", "0"]) == 2
    assert "--seeds 0" in capsys.readouterr().err and not (tmp_path / "study").exists()


@pytest.fixture
def small_study(monkeypatch) -> list[str]:
    """A study of few steps, its commands on ranks of the tests; the runs that it starts, in order.
    """
    for name, value in (("TEACHER_STEPS", 3), ("START_STEPS", 2), ("STEPS", 2), ("PROMPTS", 4),
                        ("NEW_TOKENS", 5), ("STUDY_VOCABULARY", 600)):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(demo, "CORPUS_CHARACTERS", 300_000)
    monkeypatch.setattr(study, "STUDY_HELD_OUT_CHARACTERS", 8_000)
    started = []

    def wait(arguments, log, run, resumes=True) -> int:
        command = next(each for each in arguments if each in ("train", "cache"))
        started.append(run.name)
        ranks = Ranks(1, *arguments[arguments.index(command):])
        return ranks.wait()[0] or log.write(ranks.output().encode()) * 0

    monkeypatch.setattr(sweep, "_wait", wait)
    return started


@pytest.mark.slow
def test_the_study_of_caches_has_a_line_for_each_student(small_study, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_study, "CACHED_CHARACTERS", 20_000)
    monkeypatch.setattr(cached_study, "STUDENTS", cached_study.STUDENTS[6:8])
    out = tmp_path / "study"
    for _ in range(2):
        assert main(["study", "cached", "--out", str(out), "--seeds", "2"]) == 0
    # Finished runs are not made again; a cache says itself that it is complete.
    runs = ["fkl-topk128-ghost-0", "fkl-topk128-ghost-1", "fkl-sample12-0", "fkl-sample12-1"]
    assert small_study == ["teacher", "start", "cached", "cached", *runs, "cached", "cached"]
    _, _, topk, drawn = (line.split("|") for line in (out / "cached.md").read_text().splitlines())
    assert topk[2].strip() == "K = 128, the rest as one class" and topk.count("±") == 0
    assert float(topk[5]) == pytest.approx(128 * 4 + 4, rel=0.05) and float(drawn[5]) < 70


@pytest.mark.slow
def test_the_study_leaves_its_table_and_figure_and_goes_on_where_it_was_cut(tmp_path, monkeypatch,
                                                                            small_study, capsys):
    started = small_study
    kept = ("cross entropy", "skew KL", "AMiD α=3")
    monkeypatch.setattr(study, "OBJECTIVES", {name: study.OBJECTIVES[name] for name in kept})
    out = tmp_path / "study"
    assert main(["study", "--out", str(out), "--seeds", "2"]) == 0
    assert started[:2] == ["teacher", "start"] and len(started) == 8
    lines = (out / "study.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teacher", "start", *kept]
    assert [line.count("±") for line in lines[2:]] == [0, 0, 9, 9, 9]
    for figure in ("study.png", "losses.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    scores = json.loads((out / "runs" / "teacher" / "scores.json").read_text())
    assert scores["kl_to_teacher"] < 1e-6 and scores["reverse_kl"] < 1e-6
    assert scores["top1_agreement"] == 1
    assert main(["study", "--out", str(out), "--seeds", "2"]) == 0 and len(started) == 8
    assert capsys.readouterr().out.count("finished already") == 8


@pytest.mark.slow
def test_the_study_of_pruned_students_leaves_its_table_and_does_nothing_twice(
        tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CORPUS_CHARACTERS", 300_000)
    monkeypatch.setattr(pruning_study, "STUDY_HELD_OUT_CHARACTERS", 8_000)
    for name in ("TEACHER_TRAIN", "STUDENT_TRAIN"):
        monkeypatch.setattr(demo, name, {**getattr(demo, name), "steps": 3, "warmup_steps": 1})
    started = []

    def wait(arguments, log, run, resumes=True) -> int:
        started.append(arguments[3])
        ranks = Ranks(1, *arguments[3:])
        return ranks.wait()[0] or log.write(ranks.output().encode()) * 0

    monkeypatch.setattr(sweep, "_wait", wait)
    out = tmp_path / "study"
    asked = ["study", "pruning", "--out", str(out), "--seeds", "1"]
    assert main(asked) == 0 and started == ["train", "prune", "train", "train"]
    table = (out / "pruning.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [line[0] for line in lines] == ["student", "---", "pruned", "random"]
    assert lines[0][1:] == ["KL to the teacher before", "loss before", "KL to the teacher after",
                            "loss after"]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line[1:])
    assert main(asked) == 0 and (out / "pruning.md").read_text() == table and len(started) == 4
