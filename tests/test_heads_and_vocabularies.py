"""Heads, vocabularies and ends of text as models are published: scaled and capped logits, ids with
holes, several ends; the same in train, eval and generate."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers as t
from support.data import write_instructions, write_texts
from support.models import WORDS, make_model, make_tokenizer
from support.ranks import Ranks
from support.runs import read_metrics, write_recipe
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.data import load_tokenizer, vocabulary_size
from amid_ds.errors import InputError
from amid_ds.eval.text_metrics import Sampling, sample_responses
from amid_ds.models import heads, loading
from amid_ds.models.ends import end_ids
from amid_ds.models.head_form import HeadForm, head_form
from amid_ds.models.heads import head_of, logits_of
from amid_ds.models.shape import body_of
from amid_ds.training.job import check_recipe

VOCABULARY = len(WORDS) + 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
             pad_token_id=2)
# The model's class, its config, and the form of its head.
SCALED = {
    "hyperclovax": (t.HyperCLOVAXForCausalLM,
                    lambda: t.HyperCLOVAXConfig(**SIZES, logits_scaling=0.25, head_dim=8),
                    HeadForm(0.25, None)),
    "granite": (t.GraniteForCausalLM, lambda: t.GraniteConfig(**SIZES, logits_scaling=4.0),
                HeadForm(0.25, None)),
    "cohere": (t.CohereForCausalLM, lambda: t.CohereConfig(**SIZES, logit_scale=0.25),
               HeadForm(0.25, None)),
    "gemma2": (t.Gemma2ForCausalLM,
               lambda: t.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8,
                                      final_logit_softcapping=3.0), HeadForm(1.0, 3.0)),
    "recurrent_gemma": (t.RecurrentGemmaForCausalLM,
                        lambda: t.RecurrentGemmaConfig(
                            **{**SIZES, "num_hidden_layers": 3}, lru_width=32, head_dim=8,
                            attention_window_size=64, logits_soft_cap=3.0), HeadForm(1.0, 3.0)),
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**SIZES), HeadForm(1.0, None)),
}


def save(folder: Path, family: str) -> Path:
    """A model of the family with random weights, and the word-level tokenizer."""
    model_class, config, _ = SCALED[family]
    torch.manual_seed(0)
    model = model_class(config())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    make_tokenizer(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SCALED)
def test_a_heads_form_is_the_models_own(family):
    model_class, config, form = SCALED[family]
    torch.manual_seed(0)
    model = model_class(config()).eval()
    with torch.device("meta"):
        bare = model_class(config())
    ids = torch.arange(12).reshape(2, 6)
    before = [module for _, module in model.named_modules()]
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits_of(head_of(model), hidden), own)
    assert head_form(model) == head_form(bare) == form
    assert [module for _, module in model.named_modules()] == before


def test_a_model_that_scales_before_its_head_is_understood():
    with torch.device("meta"):
        model = t.MiniCPM3ForCausalLM(t.MiniCPM3Config(num_hidden_layers=1))
    assert head_form(model) == HeadForm(model.config.dim_model_base / model.config.hidden_size,
                                        None)


@pytest.mark.parametrize("change", [lambda logits: logits.roll(1, -1), lambda logits: logits ** 3,
                                    lambda logits: -logits, lambda logits: logits + 1,
                                    lambda logits: logits[..., :5]])
def test_another_head_is_refused_and_the_model_left_whole(change):
    class Changed(t.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    with torch.device("meta"):
        model = Changed(t.LlamaConfig(**SIZES))
    with pytest.raises(InputError, match="head of Changed is not understood"):
        head_of(model)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert isinstance(model.model, t.LlamaModel)


def mean_nll(model: Path, texts: Path, length: int, size: int) -> float:
    """Mean cross entropy of the packed texts over the ids below `size`, by transformers alone."""
    own, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), load_tokenizer(str(model))
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    ids = [x for row in rows for x in [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]]
    nll = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            row = torch.tensor([ids[start:start + length + 1]])
            log_q = own(input_ids=row[:, :-1]).logits[0, :, :size].double().log_softmax(-1)
            nll -= log_q.gather(-1, row[0, 1:, None]).sum().item()
    return nll / (len(ids) - 1)


def test_deepspeed_knows_its_accelerator_before_a_model_is_opened(shared_model, monkeypatch):
    # With accelerate installed transformers imports it, and it warns of a guess on stdout, where
    # `eval --json` prints JSON alone.
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    loading.model_config(str(shared_model("llama")))
    assert os.environ["DS_ACCELERATOR"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("family", ["hyperclovax", "recurrent_gemma"])
def test_eval_of_a_scaled_head_is_transformers_own(family, tmp_path, capsys):
    model, texts = save(tmp_path / family, family), write_texts(tmp_path / "t.jsonl", rows=20)
    capsys.readouterr()
    assert main(["eval", str(model), "--data", str(texts), "--seq-length", "32", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert loss == pytest.approx(mean_nll(model, texts, 32, VOCABULARY), rel=1e-5)


def test_eval_and_generate_refuse_a_head_that_does_not_give_the_models_logits(
        shared_model, tmp_path, capsys, monkeypatch):
    model = str(shared_model("llama", 0))
    monkeypatch.setattr(heads, "head_form", lambda model: HeadForm(2.0, None))
    data = str(write_instructions(tmp_path / "rows.jsonl", rows=3))
    for command in (["eval", model, "--data", data, "--seeds", "0"],
                    ["generate", model, "--prompts", data, "--out", str(tmp_path / "o.jsonl"),
                     "--max-new-tokens", "4"]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"does not reproduce the logits of the model {model}" in message


def test_a_logit_of_minus_infinity_is_the_models_own(shared_model):
    model = AutoModelForCausalLM.from_pretrained(shared_model("llama", 0))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[3] = float("-inf")
    heads.check_head(model, "the teacher", heads.ids_to_check(model, 10),
                     lambda _: torch.no_grad())


def save_banning(folder: Path, banned: int, seed: int = 0) -> Path:
    """A model whose head gives the id `banned` a logit of -inf, and the word-level tokenizer."""
    torch.manual_seed(seed)
    model = t.PhiForCausalLM(t.PhiConfig(**SIZES))
    model.lm_head.bias.data[banned] = float("-inf")
    make_tokenizer(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_infinite_loss_is_said_by_token_and_id(shared_model, tmp_path, ranks):
    student = save_banning(tmp_path / "student", VOCABULARY - 2)
    texts = write_texts(tmp_path / "t.jsonl", rows=20)
    recipe = write_recipe(tmp_path / "r.yaml", student, shared_model("llama", 1), texts,
                          tmp_path / "run", loss={"preset": "fkl"}, tensor_parallel=ranks)
    job = Ranks(ranks, "train", recipe)
    assert job.wait(120) == [1] * ranks
    message = job.output(0)
    assert f"a logit of -inf, the student's for id {VOCABULARY - 2})" in message
    assert re.search(r"rank 0: \S+t.jsonl line \d+ \(the divergence at token 1 of the row, "
                     r"which id \d+ follows, is inf\)", message)
    assert "Traceback" not in message


def test_an_infinite_evaluation_is_null_and_said_and_ends_no_run(shared_model, tmp_path):
    """Reverse KL is finite where the student never says a token; the evaluation's KL is not."""
    student = save_banning(tmp_path / "student", VOCABULARY - 2)
    texts = write_texts(tmp_path / "t.jsonl", rows=20)
    recipe = write_recipe(tmp_path / "r.yaml", student, shared_model("llama", 1), texts,
                          tmp_path / "run", loss={"preset": "rkl"},
                          data__eval=[{"path": str(texts), "text": "text"}])
    job = Ranks(1, "train", recipe)
    assert job.wait(120) == [0], job.output(0)
    for what in ("loss", "KL to the teacher"):
        assert job.output(0).count(f"WARNING: on the evaluation set 't' the {what} is inf") == 1
    line, = map(json.loads, (tmp_path / "run" / "eval.jsonl").read_text().splitlines())
    assert (line["loss"], line["perplexity"], line["kl_to_teacher"]) == (None, None, None)
    assert None in [line["ce_loss"] for line in read_metrics(tmp_path / "run")]
    assert (tmp_path / "run" / "model").is_dir()


def test_eval_names_the_token_and_the_id_that_make_a_score_infinite(shared_model, tmp_path, capsys):
    texts = write_texts(tmp_path / "t.jsonl", rows=20)
    tokenizer = load_tokenizer(str(shared_model("llama", 1)))
    second = tokenizer(json.loads(texts.read_text().splitlines()[0])["text"])["input_ids"][1]
    for banned, more, cause in (
            (second, [], "it is the next of the data"),
            (2, ["--teacher", str(shared_model("llama", 1))], "it has 0.* of the teacher")):
        model = save_banning(tmp_path / str(banned), banned)
        assert main(["eval", str(model), "--data", str(texts), *more]) == 1
        message = capsys.readouterr().err
        assert re.search(rf"after token 1 of the row from \S+t.jsonl line 1 the model gives id "
                         rf"{banned} no probability .*, and {cause}", message), message


@pytest.fixture(scope="module")
def holes(tmp_path_factory) -> Path:
    """A model whose tokenizer's ids have holes: <eos> and <pad> are beyond the number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("holes")
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    vocabulary |= {"<eos>": len(vocabulary) + 6, "<pad>": len(vocabulary) + 9}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    size = vocabulary["<pad>"] + 1
    make_model(folder, "llama", vocab_size=size, eos_token_id=vocabulary["<eos>"])
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**SIZES, "vocab_size": size + 3,
                                               "eos_token_id": vocabulary["<eos>"]}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>",
                            pad_token="<pad>").save_pretrained(folder)
    return folder


def test_a_vocabulary_ends_at_its_largest_id(holes, tmp_path, capsys):
    tokenizer = load_tokenizer(str(holes))
    size = max(tokenizer.get_vocab().values()) + 1
    assert vocabulary_size(tokenizer) == size > len(tokenizer)
    texts = write_texts(tmp_path / "t.jsonl", rows=20)
    recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml", holes, holes, texts,
                                          tmp_path / "run")))
    assert check_recipe(recipe, 1).vocab_size == size
    assert main(["eval", str(holes), "--teacher", str(holes), "--data", str(texts),
                 "--seq-length", "32", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(mean_nll(holes, texts, 32, size), rel=1e-5)
    assert scores["kl_to_teacher"] == pytest.approx(0, abs=1e-6)


def test_a_text_can_end_at_an_end_beyond_the_number_of_tokens(holes, tmp_path):
    certain = tmp_path / "certain"
    model = AutoModelForCausalLM.from_pretrained(holes)
    tokenizer = load_tokenizer(str(holes))
    # Says nothing but the end.
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 1.0
    model.model.norm.weight.data.abs_()
    hidden = model.model(torch.tensor([[3]])).last_hidden_state.sum()
    model.lm_head.weight.data *= torch.sign(hidden.detach())
    model.save_pretrained(certain)
    tokenizer.save_pretrained(certain)
    (tmp_path / "p.jsonl").write_text('{"prompt": "the"}\n')
    assert main(["generate", str(certain), "--prompts", str(tmp_path / "p.jsonl"), "--out",
                 str(tmp_path / "o.jsonl"), "--temperature", "0", "--max-new-tokens", "5"]) == 0
    row = json.loads((tmp_path / "o.jsonl").read_text())
    assert (row["ended"], row["response"]) == (True, "")


def test_ids_beyond_a_models_rows_are_refused_before_weights_are_read(shared_model, tmp_path,
                                                                      capsys, monkeypatch):
    small = tmp_path / "small"
    make_model(small, "llama", words=WORDS[:4])
    make_tokenizer(small)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    data = str(write_instructions(tmp_path / "rows.jsonl", rows=3))
    large = shared_model("llama", 0)
    recipe = write_recipe(tmp_path / "r.yaml", large, small, Path(data), tmp_path / "run")
    for command in (["train", str(recipe)], ["eval", str(small), "--data", data],
                    ["eval", str(large), "--teacher", str(small), "--data", data],
                    ["generate", str(small), "--prompts", data, "--out", str(tmp_path / "o")]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert (f"{small} has 7 rows in its vocabulary, and its tokenizer's ids end at "
                f"{VOCABULARY - 1}") in message


def test_all_ends_of_the_model_and_the_tokenizer_count(shared_model):
    tokenizer = load_tokenizer(str(shared_model("llama", 0)))
    assert end_ids(None, tokenizer) == (1,)
    assert end_ids(GenerationConfig(), tokenizer) == (1,)
    assert end_ids(GenerationConfig(eos_token_id=5), tokenizer) == (1, 5)
    assert end_ids(GenerationConfig(eos_token_id=[7, 1, 5]), tokenizer) == (1, 7, 5)
    assert end_ids(GenerationConfig(eos_token_id=[7, 1, 5]), tokenizer, "tree") == (
        tokenizer.convert_tokens_to_ids("tree"),)
    tokenizer.eos_token = None
    assert end_ids(GenerationConfig(eos_token_id=[7]), tokenizer) == (7,)
    with pytest.raises(InputError, match="no end-of-text token"):
        end_ids(GenerationConfig(), tokenizer)
    with pytest.raises(InputError, match="name -1 as an end of text"):
        end_ids(GenerationConfig(eos_token_id=[-1]), tokenizer)


def test_generate_and_eval_stop_at_any_end_that_the_model_names(tmp_path, capsys):
    model = make_model(tmp_path / "m", "llama")
    data = write_instructions(tmp_path / "rows.jsonl", rows=12)
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    own, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(str(model))

    def greedy(prompt: str, ends: list[int]) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = own.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=ends,
                              pad_token_id=2)
        return answer[0, ids.shape[1]:].tolist()

    # A token that some answers hold.
    turn = greedy(prompts[0], [1])[2]
    GenerationConfig(eos_token_id=[1, turn]).save_pretrained(model)
    out = tmp_path / "o.jsonl"
    assert main(["generate", str(model), "--prompts", str(data), "--out", str(out),
                 "--temperature", "0", "--max-new-tokens", "6"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        answer = greedy(row["prompt"], [1, turn])
        assert row["ended"] == (answer[-1] in (1, turn))
        shown = answer[:-1] if row["ended"] else answer
        assert row["response"] == tokenizer.decode(shown, skip_special_tokens=True)
    assert rows[0]["ended"]
    own = AutoModelForCausalLM.from_pretrained(model)
    answers = sample_responses(own, tokenizer, [[3, 4]] * 32, Sampling((10,), 20), seed=0)
    assert all(turn not in answer for answer in answers)
    assert min(map(len, answers)) < 20
    (model / "generation_config.json").write_text("{")
    assert main(["generate", str(model), "--prompts", str(data), "--out",
                 str(tmp_path / "other.jsonl")]) == 2
    assert "generation_config.json cannot be read" in capsys.readouterr().err
