"""`amid-ds eval`: every score against an independent truth, on one and two ranks; refusals."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from rouge_score import rouge_scorer
from support.data import split_documents, write_instructions, write_texts
from support.models import WORDS, make_model
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from amid_ds.cli import main
from amid_ds.config.recipe import Data, Source
from amid_ds.data import prepare, read_batches
from amid_ds.eval import evaluate, text_metrics
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import RunLog
from amid_ds.training import validation


@pytest.fixture(scope="module")
def pair(shared_model) -> tuple[Path, Path]:
    """A student and a teacher with a wider, padded vocabulary."""
    return shared_model("llama-tied", 0, extra_rows=5), shared_model("llama", 1, extra_rows=9)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    """Rows as instruction sets are published: some without an input, some with several outputs."""
    path = tmp_path_factory.mktemp("set") / "valid.jsonl"
    rows = [{"instruction": "the river sings", "input": "over the stone",
             "output": "a bird runs then falls"},
            {"instruction": "one house", "input": "",
             "output": ["light grows slowly", " ".join(WORDS)]},
            {"instruction": "two {red} stone", "output": "under near with"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 13))
    return path


def scores(capsys, *arguments: object) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def plain(pair: tuple[Path, Path], source: Source, folder: Path,
          seq_length: int) -> dict[str, float]:
    """The scores from full distributions in float64; the calibration error from its definition."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in pair)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    prepare(Data(train=[source]), seq_length, tokenizer, folder)
    kl, reverse, sure, right = [], [], [], []
    for ids, labels in itertools.chain.from_iterable(map(split_documents, read_batches(folder, 1))):
        keep = labels != -100
        log_q, log_p = (model(ids).logits[0, keep, :len(tokenizer)].double().log_softmax(-1)
                        for model in (student, teacher))
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        reverse += (log_q.exp() * (log_q - log_p)).sum(-1).tolist()
        sure += log_q.exp().max(-1).values.tolist()
        right += (log_q.argmax(-1) == labels[keep]).tolist()
    gap = 0.0
    for k in range(15):
        inside = [i for i, value in enumerate(sure) if k / 15 <= value < (k + 1) / 15
                  or (k == 14 and value == 1)]
        if inside:
            gap += len(inside) / len(sure) * abs(statistics.fmean(sure[i] for i in inside)
                                                 - statistics.fmean(right[i] for i in inside))
    return {"kl_to_teacher": statistics.fmean(kl), "reverse_kl": statistics.fmean(reverse),
            "calibration_error": gap}


def test_both_divergences_and_the_calibration_error_are_those_of_the_plain_models(pair, tmp_path,
                                                                                  capsys):
    data = write_texts(tmp_path / "rows.jsonl", rows=9)
    actual = scores(capsys, pair[0], "--teacher", pair[1], "--data", data, "--seq-length", 24)
    truth = plain(pair, Source(path=str(data)), tmp_path / "data", 24)
    assert {key: actual[key] for key in truth} == pytest.approx(truth, rel=1e-4)
    assert actual["rouge_l"] is None
    assert actual["kl_to_teacher"] != pytest.approx(actual["reverse_kl"], rel=0.01)


def test_two_ranks_score_and_write_what_one_does(pair, instructions, tmp_path, capsys):
    asked = (pair[0], "--teacher", pair[1], "--data", instructions, "--seq-length", 64,
             "--new-tokens", 6, "--seeds", 3)
    alone = scores(capsys, *asked)
    printed = run_ranks(2, "eval", *asked, "--json").output().splitlines()
    assert json.loads(next(line for line in printed
                           if line.startswith("{"))) == pytest.approx(alone, rel=1e-6)
    truth = plain(pair, Source(path=str(instructions), template="minillm"), tmp_path / "data", 64)
    assert {key: alone[key] for key in truth} == pytest.approx(truth, rel=1e-4)


def test_the_judgement_of_generations_follows_from_the_samples(pair, instructions, tmp_path, capsys,
                                                               monkeypatch):
    drawn: dict[int, list[list[int]]] = {}

    def watched(model, tokenizer, prompts, sampling, seed, own=text_metrics.sample_responses):
        drawn.setdefault(seed, []).extend(own(model, tokenizer, prompts, sampling, seed))
        assert all(len(answer) <= 6 and max(answer, default=0) < len(tokenizer)
                   for answer in drawn[seed])
        return drawn[seed]

    monkeypatch.setattr(text_metrics, "sample_responses", watched)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(instructions.read_text().splitlines(keepends=True)[:9]))
    actual = scores(capsys, pair[0], "--teacher", pair[1], "--data", few, "--seq-length", 64,
                    "--new-tokens", 6, "--seeds", 2)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    outputs = [json.loads(line)["output"] for line in few.read_text().splitlines()]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    means, grams = [], []
    for answers in drawn.values():
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        means.append(statistics.fmean(max(scorer.score(target, text)["rougeL"].fmeasure
                                          for target in ([output] if isinstance(output, str)
                                                         else output))
                                      for output, text in zip(outputs, texts, strict=True)))
        seen = Counter(tuple(a[i:i + 4]) for a in answers for i in range(len(a) - 3))
        grams.append(len(seen) / seen.total())
    assert actual["rouge_l"] == pytest.approx(statistics.fmean(means)) and len(means) == 2
    assert actual["rouge_l_sem"] == pytest.approx(abs(means[0] - means[1]) / 2)
    assert actual["distinct_4"] == pytest.approx(statistics.fmean(grams))
    assert 0 <= actual["self_bleu"] < 1
    teacher = AutoModelForCausalLM.from_pretrained(pair[1])
    nll = []
    for answers in drawn.values():
        for line, answer in zip(few.read_text().splitlines(), answers, strict=True):
            row = json.loads(line)
            asked = tokenizer(_published(row), add_special_tokens=False)["input_ids"]
            logits = teacher(torch.tensor([asked + answer])).logits[0, :, :len(tokenizer)]
            log_p = logits.double().log_softmax(-1)
            nll += [-log_p[len(asked) - 1 + i, token].item() for i, token in enumerate(answer)]
    assert actual["teacher_nll"] == pytest.approx(statistics.fmean(nll), rel=1e-4)


def test_a_models_own_settings_of_generation_do_not_touch_its_samples(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    asked = [tokenizer("the river sings")["input_ids"]] * 8, text_metrics.Sampling((10,), 12), 0
    plain = text_metrics.sample_responses(model, tokenizer, *asked)
    own = GenerationConfig(repetition_penalty=3.0, min_new_tokens=12, no_repeat_ngram_size=1,
                           min_p=0.2)
    model.generation_config = own
    assert (text_metrics.sample_responses(model, tokenizer, *asked) == plain
            and model.generation_config is own)
    assert min(map(len, plain)) < 12 and any(len(set(answer)) < len(answer) for answer in plain)


def _published(row: dict) -> str:
    """MiniLLM's prompt, as its scripts write it."""
    if row.get("input"):
        return ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\n"
                + row["instruction"]
                + "\n\n### Input:\n" + row["input"] + "\n\n### Response:\n")
    return ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request."
            "\n\n### Instruction:\n" + row["instruction"] + "\n\n### Response:\n")


def test_instructions_become_the_published_prompts_and_the_first_output_is_learnt(
        tokenizer, instructions, tmp_path):
    rows = [json.loads(line) for line in instructions.read_text().splitlines()]
    for template, end in (("minillm", "\n"), ("alpaca", "")):
        source = Source(path=str(instructions), template=template)
        prepare(Data(train=[source], isolate_documents=False), 256, tokenizer, tmp_path / template)
        for row, batch in zip(rows, read_batches(tmp_path / template, 1), strict=True):
            prompt = _published(row)[:None if end else -1]
            output = row["output"] if isinstance(row["output"], str) else row["output"][0]
            learnt = batch.labels[0] != -100
            assert tokenizer.decode(batch.input_ids[0, :1 + int(learnt.nonzero()[0])]) == prompt
            assert tokenizer.decode(batch.labels[0, learnt]) == output + tokenizer.eos_token


@pytest.mark.parametrize("arguments, named", [
    (["--seeds", "3"], ["no reference", "--seeds 3", "rows.jsonl"]),
    (["--new-tokens", "128"], ["--new-tokens 128", "from 1 to 127"]),
    (["--template", "minilm"], ["'minilm'", "did you mean `minillm`?"]),
    (["--template", "alpaca"], ["lacks the field 'instruction'", "fix the row or remove it"]),
    (["--data", "a" * 300], ["`path`", "at most 255 bytes in a name"]),
], ids=["references", "room", "template", "columns", "path"])
def test_what_cannot_be_scored_is_refused(pair, tmp_path, capsys, arguments, named):
    data = write_texts(tmp_path / "rows.jsonl", rows=2)
    assert main(["eval", str(pair[0]), "--data", str(data), *arguments]) == 2
    message = capsys.readouterr().err
    assert "remedy:" in message and [word for word in named if word not in message] == [], message


def test_a_missing_rouge_is_named_with_the_line_that_installs_it(pair, instructions, capsys,
                                                                 monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert main(["eval", str(pair[0]), "--data", str(instructions)]) == 2
    assert "pip install 'rouge-score" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_whose_logits_are_nan_is_named(pair, tmp_path, capsys, role):
    data, damaged = write_texts(tmp_path / "rows.jsonl", rows=2), tmp_path / "damaged"
    make_model(damaged, "llama-tied", 0)
    model = AutoModelForCausalLM.from_pretrained(damaged)
    model.model.embed_tokens.weight.data[5] = math.nan
    model.save_pretrained(damaged)
    models = [damaged, pair[1]] if role == "model" else [pair[0], damaged]
    assert main(["eval", str(models[0]), "--teacher", str(models[1]), "--data", str(data)]) == 1
    message = capsys.readouterr().err
    assert f"logits of {damaged} hold NaN" in message and "Traceback" not in message


def test_a_perplexity_beyond_a_float_is_left_out_and_json_is_json(tmp_path):
    for loss in (709.0, 710.0, 1e300):
        sums = [2 * loss, 0, 0, 0, 2, *[0] * 2 * evaluate.CALIBRATION_BINS]
        scores = evaluate.score_model(sums, has_teacher=False)
        metrics = validation._metrics("held", [2 * loss, 0, 0, 2], has_teacher=False)
        assert scores.perplexity == metrics["perplexity"] == (math.exp(709) if loss == 709
                                                              else None)
        json.dumps(metrics, allow_nan=False)
        evaluate.print_table({"model": scores})
    log = RunLog(RunFolder(tmp_path), 0, 1)
    log.evaluation(1, {"held": metrics})
    log.close()
    assert json.loads((tmp_path / "eval.jsonl").read_text())["perplexity"] is None


def test_more_samples_of_one_kind_are_less_diverse():
    assert text_metrics.distinct([[1, 2, 3, 4, 5]], 4) == 1
    assert text_metrics.distinct([[7] * 9], 4) == pytest.approx(1 / 6)
    same = text_metrics.self_bleu([[1, 2, 3, 4, 5]] * 2)
    other = text_metrics.self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert same == pytest.approx(1) and other < 0.3 and math.isfinite(other)


def test_prompt_and_answer_stay_within_the_positions_that_a_model_has(tmp_path, capsys):
    model = make_model(tmp_path / "gpt2", "gpt2", n_positions=32)
    data = write_instructions(tmp_path / "rows.jsonl", rows=3)
    assert scores(capsys, model, "--data", data, "--seeds", 1)["rouge_l"] is not None
