"""Documents that share a row, in every family: what each by itself would be, forward and backward,
and nothing of one is seen by another."""

from __future__ import annotations

import importlib
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from support.attention import calls, varlen_twin
from support.data import split_documents
from support.families import COMMON, FAMILIES, save_tiny, tiny_model
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import read_metrics, write_gathering_config, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from amid_ds.data.batch import Documents, TokenRow, collate_rows
from amid_ds.errors import InputError
from amid_ds.models import attention, heads, recurrence
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import check_isolation, ids_to_check, run_body
from amid_ds.models.recurrence import recomputed_alike, recurrent_layers, run_documents_alone
from amid_ds.models.sampler import Sampler, SamplerPrompt

VOCABULARY = 300
# Documents of each row; the second row has padding. Windows and chunks of 8 end inside some.
LENGTHS = ((5, 13, 1, 9), (4, 3, 12, 2))
LENGTH = 28
# A few of each kind; the others are slow.
QUICK = ("opt", "bloom", "gpt_oss", "llama4_text", "qwen3_5_text", "falcon_h1", "recurrent_gemma")
TEXT = [name for name, family in FAMILIES.items() if family.kind != "multimodal"]


def families(names=TEXT):
    """The names as parameters; slow but for the quick ones."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def model_of(family: str):
    """The tiny model; Zamba2's in float64, as it rounds 1e-5 off in fp32 by itself."""
    model = tiny_model(family)
    return model.double() if family == "zamba2" else model


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, Documents]:
    """Ids [2, L], positions that restart, documents."""
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    starts = tuple((0, *itertools.accumulate(lengths)) for lengths in LENGTHS)
    positions = torch.zeros_like(ids)
    for row, own in enumerate(starts):
        for start in own:
            positions[row, start:] = torch.arange(LENGTH - start)
    return ids, positions, Documents(starts)


def gradients(model) -> list[torch.Tensor]:
    """The gradients of all parameters, which are then forgotten."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(found, expected) -> None:
    scale = max(each.abs().max() for each in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("family", families())
def test_packed_rows_have_the_losses_and_gradients_of_documents_one_by_one(family):
    model = model_of(family)
    ids, positions, documents = packed_rows()
    head = torch.randn(320, model.config.get_text_config().hidden_size,
                       generator=torch.Generator().manual_seed(1)) / 4
    targets = ids.roll(1)

    def losses(states, labels):
        # OPT's states may be narrower than its layers.
        logits = states @ head[:, :states.shape[-1]].T.to(states)
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(),
                                                 reduction="none")

    spans = [(row, *span) for row, starts in enumerate(documents.starts)
             for span in itertools.pairwise(starts)]
    alone = []
    for row, start, stop in spans:
        own = losses(run_body(model, ids[row:row + 1, start:stop], None), targets[row, start:stop])
        own.sum().backward()
        alone.append(own.detach())
    expected = gradients(model)
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
                "use_reentrant": False, "context_fn": recomputed_alike})
            model.train()
        own = losses(run_body(model, ids, positions, documents), targets).unflatten(0, ids.shape)
        packed = [own[row, start:stop] for row, start, stop in spans]
        assert_close(packed, alone)
        torch.cat(packed).sum().backward()
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("family", families())
def test_changing_a_document_changes_no_other_of_its_row(family):
    model = model_of(family)
    ids, positions, documents = packed_rows()
    check_isolation(model, "it", ids_to_check(model, VOCABULARY))
    other = ids.clone()
    other[0, 5:18] = (ids[0, 5:18] + 7) % VOCABULARY
    other[1, 21:] = 3
    with torch.no_grad():
        before, after = (run_body(model, each, positions, documents) for each in (ids, other))
    changed = (before - after).abs().amax(-1) > 1e-4 * before.abs().max()
    assert changed[0, 5] and not changed[0, :5].any() and not changed[0, 18:].any()
    assert not changed[1, :21].any()


@pytest.mark.parametrize("family", families([
    "opt", "olmo_hybrid", "granitemoehybrid", "bamba", "nemotron_h", "falcon_h1", "jamba",
    "recurrent_gemma", "lfm2", "lfm3", "qwen3_next", "qwen3_5_text"]))
def test_attention_by_boundaries_beside_recurrent_layers_gives_the_states_of_the_mask(monkeypatch,
                                                                                      family):
    model = model_of(family)
    rows = packed_rows()
    with torch.no_grad():
        masked = run_body(model, *rows)
        monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen_twin)
        monkeypatch.setattr(attention, "_device_refusal", lambda device, dtype: None)
        attention.choose_attention(model, "it", torch.device("cpu"), trains=True)
        before = calls["kernel"]
        assert_close([run_body(model, *rows)], [masked])
    assert calls["kernel"] > before


def other_model(model_type: str, **values):
    """A model of a family that is not among those of the table."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        model_type, **{**COMMON, **values}), dtype=torch.float32).eval()


def test_a_mask_of_ones_that_a_body_makes_itself_hides_no_documents():
    model = other_model("biogpt")
    check_isolation(model, "it", ids_to_check(model, VOCABULARY))


def test_a_model_with_a_cache_of_its_own_samples_from_rows_that_run_whole():
    model = other_model("minimax", num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                        layer_types=["linear_attention", "full_attention"])
    assert_samples_are_most_probable(model)


def test_plain_rows_beyond_a_window_hand_no_boundaries_to_recurrent_layers(monkeypatch):
    """Their kernels take them of one row alone, and transformers refuses them without a kernel."""
    model = model_of("qwen3_5_text")
    model.config.sliding_window = LENGTH
    ids = packed_rows()[0]
    plain = Documents(((0, LENGTH),) * 2)
    with torch.no_grad():
        expected = run_body(model, ids, None)
        monkeypatch.setattr(attention, "varlen_kernel", lambda: varlen_twin)
        monkeypatch.setattr(attention, "_device_refusal", lambda device, dtype: None)
        attention.choose_attention(model, "it", torch.device("cpu"), trains=True)
        before = calls["kernel"]
        assert_close([run_body(model, ids, None, plain)], [expected])
    assert calls["kernel"] > before


@pytest.mark.parametrize("family", ["qwen3_5_text", "gpt_oss"])
def test_a_teachers_pass_over_micro_batches_of_any_length_gives_the_states_of_each(family):
    teacher = model_of(family)
    distiller = Distiller(tiny_model("llama"), teacher, vocab_size=VOCABULARY)
    draw = torch.Generator().manual_seed(0)

    def micro_batch(lengths, starts):
        return collate_rows([TokenRow(
            torch.randint(VOCABULARY, (length + 1,), generator=draw).numpy(),
            np.array([1, length + 1], np.int32), np.array(own, np.int32), "")
            for length, own in zip(lengths, starts, strict=True)], [])

    batches = [micro_batch((9, 14), ((4,), (2, 11))), micro_batch((30, 17), ((), ()))]
    together = distiller.teacher_hidden_states(batches, 2)
    for batch, found in zip(batches, together, strict=True):
        assert_close([found], distiller.teacher_hidden_states([batch], 1))
        rows = [run_body(teacher, ids, None)[0, labels != -100]
                for ids, labels in split_documents(batch)]
        assert_close([found], [torch.cat(rows)])


def by_document(function, axis: int, starts=((0, 3, 4, 11, 14, 16), (0, 6, 13, 16)) * 3):
    """The function, called for each document of the rows that check_isolation makes."""
    def call(*arguments, **options):
        rows, length = arguments[0].shape[0], arguments[0].shape[axis]
        if (rows, length) != (len(starts), 16):
            return function(*arguments, **options)

        def part(value, row, start, stop):
            if not isinstance(value, torch.Tensor) or value.shape[0] != len(starts):
                return value
            return value[row:row + 1].narrow(axis, start, stop - start)

        outputs = [[function(*(part(each, row, *span) for each in arguments),
                             **{key: part(each, row, *span) for key, each in options.items()})
                    for span in itertools.pairwise(own)] for row, own in enumerate(starts)]
        if isinstance(outputs[0][0], tuple):
            return torch.cat([torch.cat([each[0] for each in row], axis) for row in outputs]), None
        return torch.cat([torch.cat(row, axis) for row in outputs])
    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_or_a_recurrence_that_leaks_is_refused_and_its_layer_named(monkeypatch,
                                                                                 dtype):
    model = tiny_model("qwen3_next").to(dtype)
    ids = ids_to_check(model, VOCABULARY)
    monkeypatch.setattr(heads, "running_on", lambda *_: nullcontext())
    family = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    apart = {"causal_conv1d_fn": by_document(family.causal_conv1d_fn, 2),
             "torch_chunk_gated_delta_rule": by_document(family.torch_chunk_gated_delta_rule, 1)}
    for mended in ([], ["causal_conv1d_fn"], ["torch_chunk_gated_delta_rule"]):
        with monkeypatch.context() as patch:
            for name in mended:
                patch.setattr(family, name, apart[name])
            with pytest.raises(InputError, match=r"in its layer 0 \(Qwen3NextDecoderLayer\)"):
                check_isolation(model, "the student", ids)
    for name, function in apart.items():
        monkeypatch.setattr(family, name, function)
    check_isolation(model, "the student", ids)


def test_a_layer_is_called_as_often_whatever_the_documents_and_never_computes_more_than_it_must():
    model = tiny_model("lfm2")
    run_documents_alone(model)
    layer, = recurrent_layers(model)
    tokens = []
    layer.in_proj.register_forward_hook(lambda _, args, out: tokens.append(out.shape[:2].numel()))
    for starts in ((0, 64), (0, 60, 61, 62, 63, 64), (0, 32, 48, 56, 60, 62, 63, 64)):
        tokens.clear()
        run_body(model, torch.zeros(1, 64, dtype=torch.long), None)
        positions = torch.cat([torch.arange(stop - start)
                               for start, stop in itertools.pairwise(starts)])[None]
        run_body(model, torch.zeros(1, 64, dtype=torch.long), positions, Documents((starts,)))
        assert len(tokens) == 2 * recurrence.CALLS
        assert sum(tokens[recurrence.CALLS:]) <= 64 * 1.2 + recurrence.CALLS


def test_documents_share_calls_with_the_least_padding():
    def cost(lengths, cuts):
        return sum((stop - start) * lengths[start]
                   for start, stop in itertools.pairwise((0, *cuts, len(lengths))))

    draw = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 9):
        for _ in range(10):
            lengths = sorted(torch.randint(1, 20, (count,), generator=draw).tolist(), reverse=True)
            shares = recurrence._shares(lengths)
            least = min(cost(lengths, cuts) for calls in range(recurrence.CALLS)
                        for cuts in itertools.combinations(range(1, count), calls))
            assert len(shares) <= recurrence.CALLS and sum(shares) == count
            assert cost(lengths, list(itertools.accumulate(shares))[:-1]) == least


@pytest.mark.parametrize("family", families())
def test_samples_are_the_most_probable_tokens_of_rows_that_run_whole(family):
    assert_samples_are_most_probable(model_of(family))


def assert_samples_are_most_probable(model) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
               for length in (3, 11, 1)]
    sampler = Sampler(0.0, 1.0, (1,), 320)
    found = sampler.complete(model, [SamplerPrompt(ids, room, 0)
                                     for ids, room in zip(prompts, (6, 10, 8), strict=True)],
                             lambda work: work, torch.device("cpu"))
    with torch.no_grad():
        for prompt, own in zip(prompts, found, strict=True):
            ids = torch.tensor([[*prompt, *own]])
            best = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1].argmax(-1)
            assert best.tolist() == own


@pytest.mark.parametrize("pair", [("qwen3_5_text", "falcon_h1"), *(
    pytest.param(pair, marks=pytest.mark.slow)
    for pair in (("mamba", "nemotron_h"), ("lfm2", "gpt_oss"), ("opt", "bloom")))])
def test_two_ranks_with_other_documents_train_as_a_plain_loop_over_single_documents(
        tmp_path, pair, instructions_file):
    """Every weight is gathered at every use: as often on either rank, or they would wait.

    Two steps: of biases of keys, whose gradients are 0 but for rounding, AdamW makes steps.
    """
    models = [save_tiny(family, tmp_path / family, seed=seed) for seed, family in enumerate(pair)]
    recipe = write_recipe(
        tmp_path / "r.yaml", *models, instructions_file, tmp_path / "run", train__steps=2,
        train__learning_rate=1e-3, train__seq_length=40, data__prepared=str(tmp_path / "data"),
        student__activation_checkpointing=True,
        deepspeed=str(write_gathering_config(tmp_path, stage3_max_reuse_distance=0,
                                             stage3_prefetch_bucket_size=0)))
    run_ranks(2, "train", recipe)
    lines, _ = reference_loop(*models, yaml.safe_load(recipe.read_text()), tmp_path / "data")
    for expected, line in zip(lines, read_metrics(tmp_path / "run"), strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-4), (line["step"], key)
