"""Documents of a row kept apart by their boundaries: the numbers of a dense mask, without one.

torch's kernel for it runs on a GPU alone: a twin in plain torch stands in its place.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from support.attention import (
    boundaries_rank,
    calls,
    calls_of,
    faked_boundaries_rank,
    varlen_twin,
)
from support.models import WORDS
from support.ranks import Ranks
from support.runs import comparable_metrics, write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.config.parse import load_recipe
from amid_ds.data.batch import Documents, TokenRow, collate_rows
from amid_ds.distributed.world import World
from amid_ds.engine import build
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.errors import InputError
from amid_ds.models import attention
from amid_ds.models.attention import attends_by_boundaries, choose_attention
from amid_ds.models.heads import check_isolation, run_body
from amid_ds.training.determinism import deterministic

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen3", "qwen2-tied", "mistral", "gemma3", "gpt2")
# Documents of each row: windows of 8 end inside some of them, and the second row has padding.
LENGTHS = ((5, 13, 1, 9), (4, 3, 12))


@pytest.fixture
def twin(monkeypatch):
    """The twin in place of the kernel, on a CPU and in fp32."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen_twin)
    monkeypatch.setattr(attention, "_device_refusal", lambda device, dtype: None)


@pytest.fixture
def load(shared_model):
    """load(family, **changes): a model of its own for the test, in float64."""
    def load(family: str, **changes):
        return AutoModelForCausalLM.from_pretrained(shared_model(family, 3, **changes)).double()
    return load


def packed_batch(lengths=LENGTHS):
    """A micro-batch whose rows hold documents of these lengths."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for own in lengths:
        tokens = torch.randint(len(WORDS), (sum(own) + 1,), generator=draw).numpy()
        starts = torch.tensor(own).cumsum(0)[:-1].int().numpy()
        spans = torch.tensor([1, len(tokens)]).int().numpy()
        rows.append(TokenRow(tokens, spans, starts, "here"))
    return collate_rows(rows, [])


def states_and_gradients(model, batch, documents):
    """Hidden states of the tokens that are no padding, and the gradients of a weighted sum."""
    model.zero_grad()
    hidden = run_body(model, batch.input_ids, batch.positions, documents)
    kept = torch.cat([row[:sum(own)] for row, own in zip(hidden, LENGTHS, strict=True)])
    kept.backward(torch.randn(kept.shape, generator=torch.Generator().manual_seed(2)).to(kept))
    return kept.detach(), {name: parameter.grad.clone() for name, parameter
                           in model.named_parameters() if parameter.grad is not None}


def assert_close(ours, theirs):
    assert ours[1].keys() == theirs[1].keys()
    for own, other in ((ours[0], theirs[0]), *((ours[1][name], theirs[1][name])
                                               for name in theirs[1])):
        assert (own - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_give_the_states_and_gradients_of_the_dense_mask(load, twin, family):
    model, batch = load(family).train(), packed_batch()
    dense = states_and_gradients(model, batch, batch.documents)
    choose_attention(model, "it", CPU, trains=True)
    before = calls["kernel"]
    assert_close(states_and_gradients(model, batch, batch.documents), dense)
    assert calls["kernel"] == before + model.config.num_hidden_layers
    # A caller that does not know the boundaries still gets a mask.
    assert_close(states_and_gradients(model, batch, None), dense)
    assert calls["kernel"] == before + model.config.num_hidden_layers


def test_layers_that_are_recomputed_are_recomputed_by_boundaries(load, twin):
    model, batch = load("mistral").train(), packed_batch()
    choose_attention(model, "it", CPU, trains=True)
    kept = states_and_gradients(model, batch, batch.documents)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = calls["kernel"]
    again = states_and_gradients(model, batch, batch.documents)
    assert calls["kernel"] == before + 2 * model.config.num_hidden_layers
    assert_close(again, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_attends_by_boundaries_isolates_and_one_that_leaks_is_refused(
        load, twin, family, monkeypatch):
    model = load(family)
    choose_attention(model, "it", CPU, trains=True)
    ids = torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(1))
    before = calls["kernel"]
    check_isolation(model, "the student", ids)
    assert calls["kernel"] == before + model.config.num_hidden_layers

    def leaking(query, key, value, starts, *_, scale, window_size):
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return varlen_twin(query, key, value, whole, whole, len(query), len(query), scale=scale,
                           window_size=window_size)

    monkeypatch.setattr(attention, "varlen_kernel", lambda: leaking)
    with pytest.raises(InputError, match="does not keep the documents of one row apart"):
        check_isolation(model, "the student", ids)


@pytest.mark.parametrize(("family", "changes", "trains", "reason"), [
    ("gemma2", {}, True, "its attention is eager|its layers ask for softcap"),
    ("gpt2", {"attn_pdrop": 0.1}, True, "it drops 0.1 of the attention in training"),
    ("gpt2", {"n_embd": 48}, True, "its heads are 12 wide"),
])
def test_a_model_that_asks_for_more_than_the_kernel_has_keeps_the_mask(
        load, twin, caplog, family, changes, trains, reason):
    model, batch = load(family, **changes), packed_batch()
    before = model.config._attn_implementation, run_body(model, batch.input_ids, batch.positions)
    caplog.set_level(logging.INFO, logger="amid_ds")
    choose_attention(model, "the student", CPU, trains)
    assert model.config._attn_implementation == before[0]
    assert not attends_by_boundaries(model)
    line, = caplog.messages
    assert "the student attends under a dense mask, because" in line
    assert any(each in line for each in reason.split("|"))
    assert torch.equal(run_body(model, batch.input_ids, batch.positions, batch.documents),
                       before[1])


def test_a_teacher_never_drops_so_its_dropout_is_no_reason(load, twin):
    model = load("gpt2", attn_pdrop=0.1)
    choose_attention(model, "the teacher", CPU, trains=False)
    assert attends_by_boundaries(model)


def test_sinks_chunks_and_layers_without_the_boundaries_are_reasons():
    small = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    configs = {
        "its attention is eager": t.GptOssConfig(**small, layer_types=["full_attention"] * 4),
        "its mask is of another kind than causal or a window": t.Llama4TextConfig(
            **small, intermediate_size_mlp=96, layer_types=["chunked_attention"] * 4),
        "its layers are not told the boundaries": t.StableLmConfig(**small)}
    for reason, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert reason in (attention._model_refusal(model, True) or "none")
        model.config._attn_implementation = "sdpa"
        assert attention._model_refusal(model, True) is not None


class OneLayerAttends(t.LlamaForCausalLM):
    """Its second layer has no attention."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)


class AsksForSinks(t.LlamaForCausalLM):
    """Its layers hand sinks to their attention."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, arguments, options: (arguments, {**options, "s_aux": torch.ones(4)}),
                with_kwargs=True)


@pytest.mark.parametrize(("model_class", "reason"), [
    (OneLayerAttends, "1 of its 2 layers attend"),
    (AsksForSinks, "its layers ask for s_aux"),
    (t.LlamaForCausalLM, None)])
def test_every_layer_has_to_attend_and_may_ask_for_nothing_else(load, model_class, reason):
    model = model_class(load("llama").config)
    assert attention._model_refusal(model, True) == reason


@pytest.mark.parametrize(("device", "dtype", "reason"), [
    ("cpu", torch.bfloat16, "it runs on a CPU"),
    ("cuda", torch.float32, "its weights are float32"),
    ("cuda", torch.bfloat16, "no such kernel"),
])
def test_a_cpu_fp32_and_a_torch_without_the_kernel_keep_the_mask(load, monkeypatch, device, dtype,
                                                                 reason):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    model = load("llama").to(dtype)
    assert reason in attention._device_refusal(torch.device(device), model.dtype)


def test_boundaries_are_those_of_the_rows_laid_end_to_end_padding_by_itself():
    documents = packed_batch().documents
    ends = [0, 5, 18, 19, 28, 32, 35, 47, 56]
    assert documents.boundaries(28) == ends
    # Padded by two more, for a longer row beside them.
    assert documents.boundaries(30) == [0, 5, 18, 19, 28, 30, 34, 37, 49, 60]
    assert Documents(((0, 3),)).boundaries(3) == [0, 3]


def test_plain_rows_longer_than_a_window_have_the_kernel_and_others_the_way_they_went(load, twin):
    batch = packed_batch()
    batch = replace(batch, positions=None, documents=Documents(((0, 28), (0, 19))))
    for family, changes, kernel in (("mistral", {"sliding_window": 8}, 2), ("qwen3", {}, 0),
                                    ("mistral", {"sliding_window": 29}, 0)):
        model = load(family, **changes).train()
        dense = states_and_gradients(model, batch, batch.documents)
        choose_attention(model, "it", CPU, trains=True)
        before = calls["kernel"]
        assert_close(states_and_gradients(model, batch, batch.documents), dense)
        assert calls["kernel"] == before + kernel


@pytest.mark.parametrize(("length", "chosen"), [(7, []), (8, ["the student"])])
def test_plain_rows_for_which_transformers_makes_a_windows_mask_are_rid_of_it(
        shared_model, text_file, tmp_path, monkeypatch, length, chosen):
    windowed, plain = shared_model("mistral"), shared_model("qwen3", 1)
    recipe = load_recipe(write_recipe(
        tmp_path / "r.yaml", windowed, plain, text_file, tmp_path / "run",
        train__seq_length=length, deepspeed="zero1_fp32.json"))
    given, masks = [], []
    monkeypatch.setattr(build, "choose_attention",
                        lambda model, title, *_, **__: given.append(title))
    model = build._build_distiller(recipe, read_deepspeed_config(recipe, 1), 30,
                                   World(0, 1, CPU), resumes=False)[0].student
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda query, *_, attn_mask=None, **__: masks.append(attn_mask is not None) or query)
    run_body(model, torch.zeros(1, length, dtype=torch.long), None)
    assert given == chosen and masks == [bool(chosen)] * 2


def test_keys_from_a_cache_go_the_way_they_went(load, twin):
    model, batch = load("mistral").eval(), packed_batch()
    ids, mask = batch.input_ids, torch.ones_like(batch.input_ids)
    mask[1, :3] = 0

    def outputs():
        with torch.no_grad():
            return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    before, kernel = outputs(), calls["kernel"]
    choose_attention(model, "it", CPU, trains=True)
    assert torch.equal(outputs(), before) and calls["kernel"] == kernel


def test_plain_rows_have_no_dense_mask_in_training(load, monkeypatch):
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments, attn_mask=None, is_causal=False, **options):
        masks.append((attn_mask, is_causal))
        return real(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for family in ("llama", "qwen3", "gpt2"):
        model = load(family).train()
        run_body(model, packed_batch().input_ids, None)
    assert masks == [(None, True)] * 6


def recipe_of_prompts(path, student, teacher, data, out, **changes):
    """A recipe whose rows are packed prompts: two to a micro-batch, two micro-batches to a step."""
    return write_recipe(path, student, teacher, data, out, train__steps=3, train__seq_length=48,
                        train__micro_batch_size=2, train__global_batch_size=8,
                        data__prepared=str(path.parent / "data"), **changes)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_by_boundaries_has_the_losses_of_one_under_masks(shared_model, instructions_file,
                                                               tmp_path, size):
    config = str(write_gathering_config(tmp_path))
    models = shared_model("mistral", 0), shared_model("qwen3", 1), instructions_file

    def run(name, target, **changes):
        out = tmp_path / name
        ranks = Ranks(size, "train", recipe_of_prompts(out.with_suffix(".yaml"), *models, out,
                                                       deepspeed=config, **changes), target=target)
        assert ranks.wait() == [0] * size, ranks.output()
        assert ("the teacher attends by boundaries" in ranks.output()) == (target is not None)
        return ranks, comparable_metrics(out)

    _, dense = run("dense", None)
    ranks, ours = run("boundaries", boundaries_rank, student__activation_checkpointing=True)
    assert ours == [pytest.approx(line, rel=1e-5) for line in dense]
    micro_batches = 8 // 2 // size
    # The student's two layers in each micro-batch and again in backward, the teacher's once.
    assert calls_of(ranks) == [{"kernel": micro_batches * 4 + 2, "masked": 0}] * 3


@pytest.mark.parametrize(("dtype", "family", "kernel"), [
    ("bf16", "llama", True), ("fp32", "llama", False),
    pytest.param("bf16", "gemma2", False, marks=pytest.mark.slow)])
def test_on_a_gpu_bf16_takes_the_kernel_and_builds_no_mask(shared_model, instructions_file,
                                                           tmp_path, dtype, family, kernel):
    models = shared_model(family, 0), shared_model(family, 1), instructions_file
    recipe = recipe_of_prompts(
        tmp_path / "r.yaml", *models, tmp_path / "run", teacher__dtype=dtype,
        deepspeed="ds_configs/zero3.json" if dtype == "bf16" else "ds_configs/zero3_fp32.json")
    ranks = Ranks(1, "train", recipe, target=faked_boundaries_rank)
    assert ranks.wait() == [0], ranks.output()
    way = "by boundaries, in flash attention" if kernel else "under a dense mask, because"
    for model in ("student", "teacher"):
        assert ranks.output().count(f"the {model} attends {way}") == 1
    for counts in calls_of(ranks):
        # Two micro-batches of the student, one pass of the teacher, two layers each.
        assert counts["kernel"] == (4 * 2 + 2 if kernel else 0)
        assert (counts["masked"] == 0) == (kernel or family == "gemma2")
    if kernel:
        waits = Path(f"{ranks.log(0)}.waits").read_text()
        for module in ("transformers/", "amid_ds/models/attention.py", "amid_ds/models/heads.py"):
            assert module not in waits


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel needs a GPU")


def gradients_of(attend, states, given, window):
    """Output and gradients of one attention over documents of 300, 1 and 211 tokens, in fp64."""
    leaves = [each.detach().requires_grad_() for each in states]
    ends = torch.tensor([0, 300, 301, 512], dtype=torch.int32, device=given.device)
    out = attend(*leaves, ends, ends, 300, 300, scale=0.1, window_size=(window, 0))
    return [each.double() for each in (out, *torch.autograd.grad(out, leaves, given))]


def attention_problem(device):
    """bf16 query [512, 8, 64], key and value [512, 2, 64], and a gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(512, heads, 64) for heads in (8, 2, 2, 8)]
    *states, given = (torch.randn(shape, generator=draw).to(device, torch.bfloat16)
                      for shape in shapes)
    return states, given


@needs_gpu
@pytest.mark.parametrize("window", [-1, 100])
def test_on_a_gpu_the_kernel_gives_the_twins_numbers(window):
    states, given = attention_problem("cuda")
    ours = gradients_of(attention.varlen_kernel(), states, given, window)
    exact = gradients_of(varlen_twin, [each.double() for each in states], given.double(), window)
    for own, other in zip(ours, exact, strict=True):
        assert (own - other).abs().max() <= 2e-2 * other.abs().max()


@needs_gpu
def test_on_a_gpu_a_deterministic_kernel_gives_the_same_bits_each_time():
    states, given = attention_problem("cuda")
    with deterministic(True):
        first, *others = (gradients_of(attention.varlen_kernel(), states, given, -1)
                          for _ in range(5))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_a_model_by_boundaries_has_the_states_of_one_under_masks(load, family):
    model = load(family).to("cuda", torch.bfloat16)
    batch = packed_batch().to("cuda")
    dense = states_and_gradients(model, batch, None)[0].float()
    choose_attention(model, "it", torch.device("cuda"), trains=True)
    assert attends_by_boundaries(model)
    ours = states_and_gradients(model, batch, batch.documents)[0].float()
    assert (ours - dense).abs().max() <= 3e-2 * dense.abs().max()
    check_isolation(model, "it", batch.input_ids[:, :16])
