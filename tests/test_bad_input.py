"""Bad input ends with exit status 2 and one message: found, expected, remedy.

On all ranks, without a traceback, and before a model is loaded.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from support.data import write_instructions, write_texts
from support.models import WORDS, make_model, make_tokenizer
from support.ranks import Ranks, run_ranks
from support.runs import launch_train, read_metrics, write_recipe
from transformers import T5Config

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.models.heads import check_head
from amid_ds.training.job import check_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    make_model(root / "narrow", "llama", 1, extra_rows=-3)
    # As many words, but two of them have changed places: same size, other tokenizer.
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    make_model(root / "stranger", "llama", 1, words=swapped)
    write_texts(root / "text.jsonl")
    write_instructions(root / "rows.jsonl")
    (root / "empty.jsonl").write_text("")
    (root / "broken.jsonl").write_text(
        '{"text": "the river"}\n{"text": "a stone"}\n{"text": the tree}\n')
    (root / "field.jsonl").write_text('{"text": "the river"}\n{"body": "a stone"}\n')
    conflict = json.loads(
        (Path(__file__).parent.parent / "ds_configs" / "zero3_fp32.json").read_text())
    (root / "conflict.json").write_text(
        json.dumps({**conflict, "train_micro_batch_size_per_gpu": 7}))
    (root / "stage7.json").write_text(json.dumps({"zero_optimization": {"stage": 7}}))
    for stage in (0, 2):
        (root / f"bf16_{stage}.json").write_text(json.dumps({"bf16": {"enabled": True},
                                                             "zero_optimization": {
                                                                 "stage": stage}}))
    make_model(root / "quantized", "llama", 1)
    config = json.loads((root / "quantized" / "config.json").read_text())
    (root / "quantized" / "config.json").write_text(
        json.dumps({**config,
                    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    make_tokenizer(root / "encoder")
    T5Config(vocab_size=40, d_model=16, num_layers=1, num_heads=2).save_pretrained(root / "encoder")
    (root / "not.json").write_text("{stage: 3")
    return root


PROMPTS = "data.train=[{path: ROOT/rows.jsonl, prompt: prompt, response: response}]"
# Overrides -> what the message must name.
CASES = {
    "unknown keys, all at once": (["train.stepz=3", "loss.lambda=0.1", "studnt.model=x"],
                                  ["`train.stepz`", "did you mean `steps`", "`loss.lambda`",
                                   "did you mean `lam`",
                                   "`studnt`", "did you mean `student`", "3 problem(s)"]),
    "lambda outside [0, 1]": (["loss.lam=1.5"], ["loss.lam", "1.5", "from 0 to 1"]),
    "a NaN alpha": (["loss.alpha=.nan"], ["loss.alpha", "nan", "finite"]),
    "neither a word nor a number": (["student.router_aux_loss=-1"], [
        "`student.router_aux_loss`: found -1; Input should be 'auto'; or: Input should be greater",
        "1 problem(s)"]),
    "an unknown order": (["loss.order=pq"], ["pq", "pr"]),
    "an unknown divergence": (["loss.divergence=jsd"], ["jsd", "kl"]),
    "an unknown preset": (["loss={preset: sklx, lam: 0.1}"], ["sklx", "skl"]),
    "a model that is not there": (["student.model=ROOT/nowhere"], ["nowhere", "config.json"]),
    "a teacher that is not there": (["teacher.model=ROOT/nowhere"], ["nowhere"]),
    "another tokenizer of the same size": (["teacher.model=ROOT/stranger"],
                                           ["stranger", "tokenizer"]),
    "a vocabulary narrower than the tokenizer": (["teacher.model=ROOT/narrow"],
                                                 ["narrow", "vocabulary"]),
    "a data file that is missing": (["data.train.0.path=ROOT/none.jsonl"], ["none.jsonl"]),
    "a data file that is empty": (["data.train.0.path=ROOT/empty.jsonl"], ["empty.jsonl"]),
    "a data file that is not JSON": (["data.train.0.path=ROOT/broken.jsonl"],
                                     ["broken.jsonl", "line 3"]),
    "a data file without the field": (["data.train.0.path=ROOT/field.jsonl"],
                                      ["field.jsonl", "line 2", "text"]),
    "a global batch that does not divide": (["train.global_batch_size=7",
                                             "train.micro_batch_size=2"],
                                            ["global_batch_size", "7", "micro_batch_size", "2"]),
    "a conflict with the DeepSpeed config": (["deepspeed=ROOT/conflict.json"],
                                             ["train_micro_batch_size_per_gpu", "7",
                                              "1 by the recipe"]),
    "dtype against the DeepSpeed config": (["student.dtype=bf16"],
                                           ["bf16.enabled: false", "student.dtype: bf16"]),
    "a ZeRO stage that there is not": (["deepspeed=ROOT/stage7.json"], ["stage: 7", "0 to 3"]),
    "tensor_parallel that does not divide the ranks": (["tensor_parallel=2"],
                                                       ["tensor_parallel 2 on 1 rank(s)"]),
    "quantized weights": (["teacher.model=ROOT/quantized"], ["quantized", "dequantize"]),
    "a model that is not a causal one": (["student.model=ROOT/encoder"],
                                         ["encoder", "t5", "causal"]),
    "a DeepSpeed config that is not JSON": (["deepspeed=ROOT/not.json"], ["not.json", "JSON"]),
    "a DeepSpeed config that is not there": (["deepspeed=zero9.json"],
                                             ["zero9.json", "zero3.json"]),
    "rollouts asked for on plain text": (["rollout={share: 0.5}"],
                                         ["text.jsonl", "plain text", "`prompt`"]),
    "an end of text that the tokenizer lacks": (
        [PROMPTS, "rollout={share: 1, max_new_tokens: 9, end_of_text: zebra}"],
        ["token 'zebra'", "such as '<eos>'"]),
    "more to generate than a row holds": ([PROMPTS, "rollout={share: 1, max_new_tokens: 25}"],
                                          ["max_new_tokens` 25", "seq_length` 24"]),
    "prompts without room to generate": ([PROMPTS, "rollout={share: 1, max_new_tokens: 20}",
                                          "train.seq_length=24"],
                                         ["leave no room to generate 20 tokens", "rows.jsonl line",
                                          "seq_length to"]),
    "rollouts by two schemes": ([PROMPTS, "rollout={share: 1, adaptive: {}}"],
                                ["one of `share` and `adaptive`"]),
    "an adaptive scheme without a validation loss": ([PROMPTS,
                                                      "rollout={adaptive: {}, max_new_tokens: 9}"],
                                                     ["`train.eval_every`"]),
    "rollouts without a teacher": ([PROMPTS, "rollout={share: 1, max_new_tokens: 9}",
                                    "teacher=null"], ["`teacher`"]),
    "an unknown template": (["data.train.0.text=null", "data.train.0.template=minilm"],
                            ["data.train.0.template", "'minilm'", "did you mean `minillm`?"]),
    "a negative warm-up": (["train.warmup_steps=-1"], ["train.warmup_steps", "-1"]),
    "nothing to learn": (["loss.kd_weight=0", "loss.ce_weight=0"], ["both 0"]),
    "an override without a value": (["train.steps"], ["train.steps", "a.b=value"]),
    "an output folder that is a file": (["output_dir=ROOT/text.jsonl"], ["text.jsonl"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_message_with_found_expected_remedy(case, llama_pair, folder, tmp_path,
                                                             capsys, monkeypatch):
    overrides, named = CASES[case]
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, folder / "text.jsonl",
                          tmp_path / "run")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained",
                        lambda *a, **k: pytest.fail(
                            "a model was loaded before the input was judged"))
    status = main(["train", str(recipe), *(o.replace("ROOT", str(folder)) for o in overrides)])
    message = capsys.readouterr().err
    assert status == 2, message
    assert message.count("amid-ds: ") == 1 and "expected:" in message and "remedy:" in message
    assert "Traceback" not in message
    assert [word for word in named if word not in message] == [], message


def test_a_stage_that_a_tensor_parallel_layout_cannot_have_is_refused(llama_pair, folder, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", *llama_pair, folder / "text.jsonl",
                        tmp_path / "run", tensor_parallel=2, deepspeed=str(folder / "bf16_0.json"))
    with pytest.raises(InputError, match="tensor_parallel: 2 needs stage 1"):
        check_recipe(load_recipe(path), 2)
    shared = ["deepspeed=" + str(folder / "bf16_2.json")]
    with pytest.raises(InputError,
                       match="a teacher in fp32 on tensor-parallel ranks needs stage 3"):
        check_recipe(load_recipe(path, shared), 2)
    check_recipe(load_recipe(path, [*shared, "teacher.placement=replicated"]), 2)


def test_another_recipes_run_in_the_output_folder_is_refused_and_left_alone(llama_pair, folder,
                                                                            tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, folder / "text.jsonl",
                          tmp_path / "run", train__steps=1)
    assert launch_train(0, recipe).returncode == 0
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    assert main(["train", str(recipe), "loss.lam=0.9", "train.seed=5"]) == 2
    message = capsys.readouterr().err
    assert "loss.lam: 0.3 before, 0.9 now" in message and "train.seed: 0 before, 5 now" in message
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    # Keys that change nothing learnt may differ.
    assert main(["train", str(recipe), "train.log_every=2", "checkpoint.keep=3"]) == 0


@pytest.mark.parametrize("overrides, named", [
    pytest.param(["train.stepz=3"], "`train.stepz`", marks=pytest.mark.slow),
    (["data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
], ids=["recipe", "data"])
def test_under_the_launcher_all_ranks_end_at_once_with_one_message(llama_pair, folder, tmp_path,
                                                                   overrides, named):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, folder / "text.jsonl",
                          tmp_path / "run")
    done = launch_train(2, recipe, *overrides, timeout=90)
    assert done.returncode == 2
    assert done.stderr.count("amid-ds: ") == 1 and named in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_model_whose_logits_the_head_does_not_reproduce_is_refused_by_name(llama_pair):
    from transformers import LlamaForCausalLM

    class Warped(LlamaForCausalLM):
        # Adds to its logits where no config says so; a scale would be understood.
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + out.logits.roll(1, -1)
            return out

    ids = torch.arange(16).reshape(2, 8)
    check_head(LlamaForCausalLM.from_pretrained(llama_pair[0]), "the student",
               ids, lambda _: nullcontext())
    warped = Warped.from_pretrained(llama_pair[0])
    with pytest.raises(InputError, match="head of Warped is not understood"):
        check_head(warped, "the student", ids, lambda _: nullcontext())


def test_a_recipe_that_cannot_be_read_is_refused_by_name(tmp_path, capsys):
    for name, text in {"list.yaml": "- a\n- b\n", "broken.yaml": "a: [1,\n",
                       "missing.yaml": None}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        assert main(["train", str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert name in message and "expected:" in message and "Traceback" not in message


def test_export_refuses_what_is_no_run_and_a_folder_in_use(llama_pair, folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    recipe = write_recipe(tmp_path / "r.yaml", llama_pair[0], None, folder / "text.jsonl",
                          tmp_path / "run", train__steps=1)
    assert launch_train(0, recipe).returncode == 0
    assert main(["export", str(tmp_path / "run"), str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["steps"] == 1


def test_a_models_own_code_is_run_only_when_asked_for(shared_model, text_file, tmp_path,
                                                      monkeypatch):
    """A Llama under another name, with Python code in its folder as hub models have it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    student = make_model(tmp_path / "student", "llama", 0)
    (student / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    config = json.loads((student / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"],
               "auto_map": {"AutoConfig": "own.OwnConfig",
                            "AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (student / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path / "r.yaml", student, shared_model("gpt2", 1), text_file,
                          tmp_path / "run", train__steps=1)
    refused = Ranks(2, "train", recipe)
    assert refused.wait() == [2, 2]
    assert "Python code of its own" in refused.output()
    assert "trust_remote_code: true" in refused.output()
    run_ranks(2, "train", recipe, "student.trust_remote_code=true")
    assert len(read_metrics(tmp_path / "run")) == 1
