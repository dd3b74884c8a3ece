"""The published protocol of `amid-ds eval`: what it gives the model, bans, counts and reports."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.chats import make_byte_level, make_spaced, stored_rows
from support.data import write_jsonl
from support.models import WORDS, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.config.recipe import Data, Source
from amid_ds.data import prepare
from amid_ds.eval import protocol as protocols
from amid_ds.eval import text_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Positions as GPT-2 has them, or more."""
    return make_model(tmp_path_factory.mktemp("model") / "gpt2", "gpt2", n_positions=640)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Five rows; the third has a prompt of more than 256 tokens."""
    lengths = (3, 7, 400, 20, 5)
    return write_jsonl(tmp_path_factory.mktemp("rows") / "valid.jsonl", [
        {"instruction": " ".join(WORDS[(i * number) % len(WORDS)] for i in range(length)),
         "input": "", "output": ["a bird runs", "two red houses"]}
        for number, length in enumerate(lengths, 1)])


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[list[int]], text_metrics.Sampling]]:
    """What the model is asked: (prompts, settings) of every batch."""
    calls = []

    def watched(model, tokenizer, prompts, sampling, seed, own=text_metrics.sample_responses):
        calls.append((prompts, sampling))
        return own(model, tokenizer, prompts, sampling, seed)

    monkeypatch.setattr(text_metrics, "sample_responses", watched)
    return calls


def report(capsys, model: Path, data: Path, *more: str) -> dict:
    assert main(["eval", str(model), "--data", str(data), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_of_tokens_of_prompt_or_sample_does_not_come_again(model):
    causal = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in ("the river sings the river runs", "one",
                                                         "a bird a tree a house")] * 8

    def repeated(size: int, banned: int) -> int:
        sampling = text_metrics.Sampling((10,), 60, no_repeat_ngram=banned)
        answers = text_metrics.sample_responses(causal, tokenizer, prompts, sampling, 0)
        grams = [[tuple(ids[i:i + size]) for i in range(len(ids) - size + 1)]
                 for ids in ([*p, *a] for p, a in zip(prompts, answers, strict=True))]
        # A repetition within the prompt is not the sample's.
        before = [len(p) - size + 1 for p in prompts]
        return sum(gram in row[:i] for row, start in zip(grams, before, strict=True)
                   for i, gram in enumerate(row) if i >= max(start, 0))

    assert repeated(2, banned=2) == 0 and repeated(2, banned=0) > 0
    # Of 3 tokens none, though of 2 some.
    assert repeated(3, banned=3) == 0 and repeated(2, banned=3) > 0


def test_minillms_protocol_asks_as_its_scripts_do_and_says_so(model, rows, asked, capsys):
    scores = report(capsys, model, rows, "--protocol", "minillm", "--seeds", "2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"Below is an instruction that describes a task. Write a response that appropriately "
             f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
             for row in map(json.loads, rows.read_text().splitlines())]
    first = [tokenizer(text)["input_ids"][:256] for text in texts]
    assert [prompts for prompts, _ in asked] == [first] * 2 and max(map(len, first)) == 256
    assert asked[0][1] == text_metrics.Sampling((10, 20), 256, 1.0, 1.0, no_repeat_ngram=6)
    assert scores["protocol"] == (
        "minillm (changed): seq_length=512 seeds=10,20 new_tokens=256 prompt_tokens=256 keep=first "
        "no_repeat_ngram=6 prompts=10000 temperature=1.0 top_p=1.0 dtype=fp32")
    published = protocols.eval_protocol("minillm")
    assert published.seeds == (10, 20, 30, 40, 50) and published.name == "minillm"


def test_the_protocol_computes_a_bf16_checkpoint_in_fp32(model, rows, monkeypatch, tmp_path,
                                                         capsys):
    """Theirs is evaluated in fp16, never in bf16, in which a run of ours is exported."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(text_metrics, "sample_responses", lambda model, tokenizer, prompts, *rest: (
        asked.append(model.dtype) or [[5]] * len(prompts)))
    report(capsys, tmp_path, rows, "--protocol", "minillm", "--seeds", "1")
    report(capsys, tmp_path, rows, "--seeds", "1")
    assert asked == [torch.float32, torch.bfloat16]


def test_options_beside_the_protocol_take_its_values_place_and_prompts_end_at_its_number(
        model, rows, asked, capsys, monkeypatch):
    few = dataclasses.replace(protocols.PROTOCOLS["minillm"], prompts=3)
    monkeypatch.setattr(protocols, "PROTOCOLS", {"minillm": few})
    scores = report(capsys, model, rows, "--protocol", "minillm", "--seeds", "7,5", "--new-tokens",
                    "4", "--no-repeat-ngram", "3", "--seq-length", "100")
    assert [list(map(len, prompts))[2:] for prompts, _ in asked] == [[96]] * 2
    assert asked[0][1] == text_metrics.Sampling((7, 5), 4, no_repeat_ngram=3)
    assert "seq_length=100 seeds=7,5 new_tokens=4 prompt_tokens=96" in scores["protocol"]
    # Without a protocol the end of a long prompt stays.
    asked.clear()
    plain = report(capsys, model, rows, "--seeds", "1", "--new-tokens", "4", "--seq-length", "100",
                   "--no-repeat-ngram", "2")
    [(prompts, sampling)] = asked
    assert len(prompts) == 5 and len(prompts[2]) == 96
    assert sampling == text_metrics.Sampling((10,), 4, no_repeat_ngram=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert prompts[2][-3:] == tokenizer("### Response:\n")["input_ids"][-3:]
    assert "protocol" not in plain


def test_both_uncertainties_are_named_and_printed(model, rows, capsys, monkeypatch):
    """Over five seeds: the papers' standard deviation, divisor n, and the mean's standard error."""
    means = [0.1, 0.4, 0.1, 0.2, 0.7]
    scored = iter([mean for mean in means for _ in range(5)])
    score = SimpleNamespace(score_multi=lambda references, text: {
        "rougeL": SimpleNamespace(fmeasure=next(scored))})
    monkeypatch.setattr(text_metrics, "require_rouge", lambda: score)
    scores = report(capsys, model, rows, "--new-tokens", "2")
    assert scores["rouge_l"] == pytest.approx(0.3)
    assert scores["rouge_l_std"] == pytest.approx(
        math.sqrt(statistics.fmean((mean - 0.3) ** 2 for mean in means)))
    assert scores["rouge_l_sem"] == pytest.approx(
        math.sqrt(sum((mean - 0.3) ** 2 for mean in means) / 4 / 5))
    monkeypatch.undo()
    assert main(["eval", str(model), "--data", str(rows), "--protocol", "minillm", "--seeds", "2",
                 "--new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert [word for word in ("± standard deviation", "± standard error", "no_repeat_ngram=6",
                              "minillm (changed)") if word not in printed] == []


@pytest.mark.parametrize("arguments, named", [
    (["--protocol", "minilm"], ["'minilm'", "did you mean `minillm`?"]),
    (["--no-repeat-ngram", "1"], ["--no-repeat-ngram 1", "2 tokens or more"]),
    (["--protocol", "minillm", "--seq-length", "200"], ["by the protocol minillm", "200 tokens"]),
    (["--seeds", "10,10"], ["--seeds 10,10", "different seeds"]),
    (["--seeds", "ten"], ["--seeds ten"]),
    (["--seeds", "-3"], ["--seeds -3"]),
])
def test_a_protocol_that_cannot_be_followed_is_refused(model, rows, capsys, arguments, named):
    assert main(["eval", str(model), "--data", str(rows), *arguments]) == 2
    message = capsys.readouterr().err
    assert "remedy:" in message and [word for word in named if word not in message] == [], message


@pytest.mark.parametrize("name", ["normalizer", "metaspace", "byte level"])
def test_training_and_evaluation_give_the_model_the_same_prompt(tmp_path, asked, name):
    """The tokenizer's own <s> stands before both; the prompt's ids are those of the prompt alone,
    and the response goes on from them, though the whole text has a token across the border."""
    tokenizer = make_byte_level() if name == "byte level" else make_spaced(name)
    prompt, response = "the river runs over the old ston", "e: yes!"
    whole = tokenizer(prompt + response)["input_ids"]
    assert whole[:len(tokenizer(prompt)["input_ids"])] != tokenizer(prompt)["input_ids"]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "response": response}])
    prepare(Data(train=[Source(path=str(data), prompt="prompt", response="response")]), 64,
            tokenizer, tmp_path / "prepared")
    [(tokens, [learnt])] = stored_rows(tmp_path / "prepared")
    make_model(tmp_path / "model", "gpt2", n_positions=512, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--data", str(data), "--protocol", "minillm",
                 "--seeds", "1", "--new-tokens", "1"]) == 0
    [([given], _)] = asked
    assert tokens == given + learnt and given == tokenizer(prompt)["input_ids"]
    assert (given[0] == tokenizer.bos_token_id) == (name != "byte level")
    assert (tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False)
            == tokenizer.decode(whole, clean_up_tokenization_spaces=False))
