"""The losses of a mixture's routers: transformers' own over the whole global batch, whatever the
ranks and micro-batches; and the load of its experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import split_documents
from support.families import FAMILIES, save_tiny, tiny_meta, tiny_model
from support.ranks import run_ranks
from support.reference_loop import reference_adamw, skewed_losses
from support.runs import comparable_metrics, read_metrics, write_gathering_config, write_recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from amid_ds.data import PreparedLoader
from amid_ds.data.batch import Batch, TokenRow, collate_rows
from amid_ds.errors import InputError
from amid_ds.models.experts import expert_layers
from amid_ds.models.heads import run_body
from amid_ds.models.router_loss import (
    Routers,
    RouterWeights,
    log_router_weights,
    real_tokens,
    router_weights,
)

MIXTURES = {"mixtral", "deepseek_v3", "deepseek_v32", "gpt_oss", "gemma4", "llama4", "llama4_text",
            "jamba", "qwen3_next", "kimi_linear", "nemotron_h"}
WEIGHT, STEPS = 0.3, 3
TRAIN = {"steps": STEPS, "seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4,
         "learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0}


def balancing(model: nn.Module, logits: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """transformers' own load-balancing loss of a Mixtral, or of a model that is like it."""
    module = import_module(type(model).__module__)
    return module.load_balancing_loss_func(logits, model.num_experts, model.num_experts_per_tok,
                                           mask)


def reference_metrics(student: Path, teacher: Path, prepared: Path, steps: int) -> list[dict]:
    """Each step's metrics: one process, one document at a time, then the routers of all together,
    as they route what the document's next tokens are read from."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    optimizer = reference_adamw(model, {})
    rows = PreparedLoader(prepared, seed=0, global_batch_size=4, micro_batch_size=1, dp_rank=0,
                          dp_size=1, workers=0)
    lines = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        kd = ce = tokens = 0
        routed = []
        for ids, labels in documents_of(rows.window(step)):
            keep = labels != -100
            out = model(ids, output_router_logits=True)
            log_q = out.logits[0, keep, :vocabulary].double().log_softmax(-1)
            own = skewed_losses(log_q, ids, keep, labels[keep], lambda ids: guide(ids).logits, 0.3)
            kd, ce, tokens = kd + own[0], ce + own[1], tokens + int(keep.sum())
            routed.append(out.router_logits)
        layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
        aux = balancing(model, layers)
        total = (kd + 0.5 * ce) / tokens + WEIGHT * aux
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        line = {"loss": total.item(), "kd_loss": (kd / tokens).item(),
                "router_aux_loss": aux.item(), "grad_norm": norm.item()}
        for number, layer in enumerate(layers):
            load = torch.bincount(layer.topk(model.num_experts_per_tok).indices.flatten(),
                                  minlength=model.num_experts).double()
            line[f"expert_load/{number}"] = (load.max() / load.mean()).item()
        lines.append(line)
    return lines


def documents_of(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [1, n], labels [n]) of each document of batches of one row, without its last token: no
    token is read from it. A row's own last token is no input already."""
    for batch in batches:
        *before, last = split_documents(batch)
        yield from ((ids[:, :-1], labels[:-1]) for ids, labels in before)
        yield last


def assert_equal(run: Path, truth: list[dict]) -> None:
    lines = read_metrics(run)
    assert len(lines) == len(truth)
    for line, expected in zip(lines, truth, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5), (line["step"], name)


@pytest.fixture(scope="module")
def mixtral(shared_folder) -> Path:
    return shared_folder("tiny_mixtral", lambda folder: save_tiny("mixtral", folder))


@pytest.fixture
def recipe(mixtral, shared_model, instructions_file, tmp_path) -> Path:
    return write_recipe(
        tmp_path / "r.yaml", mixtral, shared_model("llama", 1), instructions_file,
        tmp_path / "run", data__prepared=str(tmp_path / "data"), train=TRAIN,
        student__router_aux_loss=WEIGHT, student__activation_checkpointing=True,
        deepspeed=str(write_gathering_config(tmp_path)))


def test_it_is_of_the_whole_global_batch_on_2_ranks_of_2_micro_batches(
        recipe, mixtral, shared_model, tmp_path):
    """Packed rows of unequal lengths; the forward pass is computed anew in the backward pass."""
    run_ranks(2, "train", recipe)
    truth = reference_metrics(mixtral, shared_model("llama", 1), tmp_path / "data", STEPS)
    assert_equal(tmp_path / "run", truth)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, micro_batch", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_it_is_the_same_number_on_any_ranks_and_micro_batches(
        recipe, mixtral, shared_model, tmp_path, ranks, micro_batch):
    """With one micro-batch a rank the routers' choices are summed in its forward pass."""
    run_ranks(ranks, "train", recipe, f"train.micro_batch_size={micro_batch}")
    truth = reference_metrics(mixtral, shared_model("llama", 1), tmp_path / "data", STEPS)
    assert_equal(tmp_path / "run", truth)


@pytest.mark.slow
def test_tensor_parallel_peers_count_once(recipe, mixtral, shared_model, tmp_path):
    run_ranks(2, "train", recipe, "tensor_parallel=2")
    truth = reference_metrics(mixtral, shared_model("llama", 1), tmp_path / "data", STEPS)
    assert_equal(tmp_path / "run", truth)


@pytest.mark.slow
@pytest.mark.parametrize("family, options", [
    ("mixtral", ["student.lora.rank=4", "data.auxiliary={path: TEXT, weight: 0.5}"]),
    ("gpt_oss", ["student.freeze=[router]"]),
    # Each rank packs its own samples.
    ("mixtral", ["rollout={share: 1.0, max_new_tokens: 6}"]),
    ("deepseek_v3", ["student.router_aux_loss=auto"]),
    ("nemotron_h", [])])
def test_1_and_2_ranks_agree_with_adapters_rollouts_and_without_a_loss(
        recipe, shared_model, instructions_file, text_file, tmp_path, family, options):
    student = save_tiny(family, tmp_path / "student",
                        AutoTokenizer.from_pretrained(shared_model("llama", 1)))
    options = [option.replace("TEXT", str(text_file)) for option in options]
    runs = []
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        run_ranks(ranks, "train", recipe, f"student.model={student}", f"output_dir={run}",
                  "student.activation_checkpointing=false", *options)
        runs.append(read_metrics(run))
    for one, two in zip(*runs, strict=True):
        assert one.keys() == two.keys()
        loads = [name for name in one if name.startswith("expert_load/")]
        assert loads and all(one[name] >= 1 for name in loads)
        assert (one["router_aux_loss"] is None) == (family == "deepseek_v3")
        for name in ("loss", "grad_norm", *loads):
            assert one[name] == pytest.approx(two[name], rel=1e-5), name
        if family != "deepseek_v3":
            assert one["router_aux_loss"] == pytest.approx(two["router_aux_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_goes_on_to_the_last_digit(recipe, tmp_path):
    options = ("train.steps=4", "checkpoint.every=2")
    run_ranks(2, "train", recipe, *options)
    whole = comparable_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert "resumed after step 2" in run_ranks(2, "train", recipe, *options).output()
    assert comparable_metrics(tmp_path / "run") == whole


def uneven_rows(vocabulary: int) -> list[TokenRow]:
    """Four rows of 9, 4, 12 and 7 inputs."""
    draw = torch.Generator().manual_seed(3)
    none = torch.empty(0, dtype=torch.int32).numpy()
    return [TokenRow(torch.randint(vocabulary, (length + 1,), generator=draw).numpy(), none, none,
                     "a row") for length in (9, 4, 12, 7)]


def parts_of_losses(model: nn.Module, weights: RouterWeights, size: int, ahead: bool,
                    rows: list[TokenRow] | None = None) -> tuple[Tensor, Tensor]:
    """(the weighted losses, the two by themselves) of uneven_rows, or others, in micro-batches of
    `size`."""
    routers = Routers(expert_layers(model), weights, lambda own: own)
    routers.start_step(False)
    rows = rows or uneven_rows(model.config.vocab_size)
    batches = [collate_rows(rows[i:i + size], []) for i in range(0, len(rows), size)]
    if ahead:
        routers.count_ahead(model, batches)
    losses = []
    for batch in batches:
        with routers.watched(model, real_tokens(batch)) as own:
            run_body(model, batch.input_ids, batch.positions, batch.documents)
        losses.append(own)
    return sum(own[0] for own in losses), sum(own[1] for own in losses)


def test_a_micro_batch_of_padding_alone_counts_for_nothing():
    """As a rank has one whose rollouts fill fewer rows than another's."""
    batch = collate_rows(uneven_rows(9)[:1], [])
    assert real_tokens(batch).tolist() == [1.0] * 9
    assert real_tokens(replace(batch, padding=9)).tolist() == [0.0] * 9


def test_the_last_token_of_a_document_that_shares_a_row_is_no_input():
    first, second = (row._replace(doc_starts=np.array(starts, np.int32)) for row, starts in
                     zip(uneven_rows(9), ([3, 4], []), strict=False))
    assert real_tokens(collate_rows([first, second], [])).tolist() == [
        1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_how_documents_share_rows_changes_nothing():
    model, weights = tiny_model("mixtral"), RouterWeights(WEIGHT, 0.5)
    first, second, third, fourth = rows = uneven_rows(model.config.vocab_size)
    packed = [third, first._replace(
        tokens=np.concatenate([each.tokens for each in (first, second, fourth)]),
        doc_starts=np.array([10, 15], np.int32))]
    apart, together = (parts_of_losses(model, weights, 2, True, own) for own in (rows, packed))
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0.0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "qwen3_5_moe_text",
                                    "qwen3_next", "granitemoehybrid"])
def test_micro_batches_add_up_to_what_transformers_says_of_the_padded_batch(family):
    model = tiny_model(family)
    whole = collate_rows(uneven_rows(model.config.vocab_size), [])
    mask = real_tokens(whole).view(4, -1)
    assert mask.sum(1).tolist() == [9, 4, 12, 7]
    logits = model(whole.input_ids, attention_mask=mask.long(),
                   output_router_logits=True).router_logits
    expected = balancing(model, logits, mask)
    of_expected = gradients(model, WEIGHT * expected)
    for size, ahead in ((4, False), (2, True)):
        weighted, (balance, _) = parts_of_losses(model, RouterWeights(WEIGHT, 0.0), size, ahead)
        assert balance.item() == pytest.approx(expected.item(), rel=1e-6)
        got = gradients(model, weighted)
        assert got.keys() == of_expected.keys()
        for name, gradient in of_expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_with_one_micro_batch_a_rank_adds_up_the_choices_of_all():
    """Two ranks one after the other: each adds up both's, of two uneven rows each."""
    model = tiny_model("mixtral")
    rows = uneven_rows(model.config.vocab_size)
    whole = collate_rows(rows, [])
    mask = real_tokens(whole).view(4, -1)
    logits = model(whole.input_ids, attention_mask=mask.long(),
                   output_router_logits=True).router_logits
    told: list[Tensor] = []

    def losses(add_up: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = []
        for batch in (collate_rows(rows[:2], []), collate_rows(rows[2:], [])):
            routers = Routers(expert_layers(model), RouterWeights(WEIGHT, 0.0), add_up)
            routers.start_step(False)
            with routers.watched(model, real_tokens(batch)) as own:
                run_body(model, batch.input_ids, batch.positions, batch.documents)
            found.append(own[1][0])
        return found

    losses(lambda own: told.append(own) or own)
    balance = sum(losses(lambda own: sum(told)))
    assert balance.item() == pytest.approx(balancing(model, logits, mask).item(), rel=1e-6)


def test_routers_whose_recorded_logits_are_probabilities_are_taken_at_their_word():
    """Gemma 4's."""
    model = tiny_model("gemma4_text", enable_moe_block=True, num_experts=4, top_k_experts=2,
                       moe_intermediate_size=16)
    layers, heard = expert_layers(model), []
    for layer in layers:
        model.get_submodule(layer.router).proj.register_forward_hook(
            lambda _, args, output: heard.append(output.flatten(0, -2)))
    _, (balance, _) = parts_of_losses(model, RouterWeights(WEIGHT, 0.0), 1, ahead=False)
    assert len(layers) == 4 and len(heard) == 16
    # Each micro-batch by itself, as they were.
    expected = sum(load_balancing_loss_func(tuple(heard[start:start + 4]), 4, 2)
                   for start in range(0, 16, 4))
    assert balance.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    model = tiny_model("mixtral")
    expected = []
    for row in uneven_rows(model.config.vocab_size):
        ids = torch.from_numpy(row.tokens)[None, :-1]
        expected += model(ids, output_router_logits=True).router_logits
    expected = torch.cat(expected).double().exp().sum(-1).log().square().mean()
    for size, ahead in ((4, False), (2, True)):
        weighted, (_, z) = parts_of_losses(model, RouterWeights(0.0, 0.5), size, ahead)
        assert z.item() == pytest.approx(expected.item(), rel=1e-6)
        assert weighted.item() == pytest.approx(0.5 * expected.item(), rel=1e-6)


def test_choices_are_counted_ahead_with_the_dropout_of_the_passes_that_follow():
    model = tiny_model("mixtral", attention_dropout=0.5).train()
    heard: list[Tensor] = []
    for layer in expert_layers(model):
        model.get_submodule(layer.router).register_forward_hook(
            lambda _, args, output: heard.append(output[0]))
    torch.manual_seed(0)
    _, (balance, _) = parts_of_losses(model, RouterWeights(WEIGHT, 0.0), 1, ahead=True)
    # Two layers, four micro-batches: first counted, then learnt from.
    assert len(heard) == 16
    for counted, learnt in zip(heard[:8], heard[8:], strict=True):
        assert torch.equal(counted, learnt)
    layers = tuple(torch.cat(heard[8 + number::2]) for number in range(2))
    assert balance.item() == pytest.approx(balancing(model, layers).item(), rel=1e-6)
    assert not torch.equal(heard[0], tiny_heard_without_dropout(model))


def tiny_heard_without_dropout(model: nn.Module) -> Tensor:
    """The first row's logits of the first router."""
    row = uneven_rows(model.config.vocab_size)[0]
    return model.eval()(torch.from_numpy(row.tokens)[None, :-1],
                        output_router_logits=True).router_logits[0]


def test_auto_is_the_configs_weight_and_a_number_the_recipes(caplog):
    def weights(family: str, balance: object, **changes) -> RouterWeights:
        model = tiny_model(family, **changes)
        layers = expert_layers(model)
        found = router_weights(model, layers, balance)
        log_router_weights(model, layers, found, balance)
        return found

    with caplog.at_level("INFO", logger="amid_ds"):
        assert weights("mixtral", "auto", router_aux_loss_coef=0.02) == (0.02, 0.0)
        assert weights("mixtral", 0.5, router_z_loss_coef=0.01) == (0.5, 0.01)
        assert weights("mixtral", 0) == (0.0, 0.0)
        assert "weight 0 (the recipe's)" in caplog.messages[-1]
        # Its routers are balanced by a bias.
        assert weights("deepseek_v3", "auto") == (0.0, 0.0)
        assert "weight 0 (its config has none)" in caplog.messages[-1]
        assert weights("deepseek_v3", 0.1) == (0.1, 0.0)
    llama = tiny_model("llama")
    assert router_weights(llama, expert_layers(llama), 0.5) == (0.0, 0.0)


def test_a_mixture_whose_layers_are_not_known_is_refused_unless_it_has_no_such_loss():
    from transformers import DogeConfig, DogeForCausalLM

    model = DogeForCausalLM(DogeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, is_moe=True,
        num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=2))
    assert expert_layers(model) == []
    with pytest.raises(InputError, match=r"(?s)DogeForCausalLM.*router_aux_loss=0"):
        router_weights(model, [], "auto")
    assert router_weights(model, [], 0) == (0.0, 0.0)


def test_a_mixture_that_does_not_say_how_many_experts_a_token_passes_is_refused():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(num_hidden_layers=1))
    with pytest.raises(InputError, match=r"(?s)how many experts.*num_experts_per_tok"):
        expert_layers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_experts_are_those_that_transformers_calls_so(family):
    """By the names of its classes, which the package does not read."""
    model = tiny_meta(family)
    truth = {name: module for name, module in model.named_modules()
             if type(module).__name__.endswith("Experts")}
    found = expert_layers(model)
    assert {layer.name for layer in found} == truth.keys()
    assert bool(found) == ("moe" in family or family in MIXTURES), family
    config = model.config.get_text_config()
    counts, chosen = ([getattr(config, name) for name in names if hasattr(config, name)]
                      for names in (("num_local_experts", "num_experts", "n_routed_experts"),
                                    ("num_experts_per_tok", "num_experts_per_token",
                                     "top_k_experts")))
    for layer in found:
        assert layer.experts in counts and layer.chosen in chosen
        assert "Router" in type(model.get_submodule(layer.router)).__name__
