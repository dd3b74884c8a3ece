"""`amid-ds prune`: planted dead parts go and nothing else, from any number of ranks."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from support.data import split_documents, write_texts
from support.memory import memory_rise
from support.models import make_model
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import read_metrics, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.config.recipe import Data, Source
from amid_ds.data import prepare, read_batches
from amid_ds.eval.importance import Importance, kept_layers
from amid_ds.models import weight_writer
from amid_ds.models.pruning import even_layers

FAMILIES = ["llama", "llama-tied", "qwen2-tied", "qwen3", "mistral", "gemma", "gemma2", "gemma3",
            "gpt2"]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=4, head_dim=8)
GPT2_SIZES = dict(n_embd=32, n_inner=48, n_layer=4, n_head=8)
# By layer, of the teacher.
LAYERS, CHANNELS, NEURONS, GROUPS = [0, 3], [0, 5, 31, 12, 7, 20, 21, 22], [3, 47, 0], [1, 3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "rows.jsonl", rows=30)


def teacher(folder: Path, family: str, **changes) -> Path:
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    if family in ("gemma2", "gemma3"):
        changes["layer_types"] = ["sliding_attention", "full_attention", "full_attention",
                                  "sliding_attention"]
    values = {**sizes, **changes}
    model = make_model(folder, family, **{key: value for key, value in values.items()
                                          if value is not None})
    loaded = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in loaded.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    loaded.save_pretrained(model)
    return model


def plant(folder: Path, layers=(), channels=(), neurons=(), groups=()) -> None:
    """Kill parts of a model, in the middle of what stays alive. Neurons and groups of each layer
    differ: they are moved on by the layer's number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    gpt2 = model.config.model_type == "gpt2"
    weights = dict(model.named_parameters())
    channels = list(channels)
    for name, weight in weights.items():
        # Writers of the hidden states, as [what they read, hidden].
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            view = weight.data.T
        elif name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "c_proj.weight",
                            "c_proj.bias")):
            view = weight.data
        else:
            continue
        view[..., channels] = 0
        if gpt2:
            # What is 0 is the mean, which a LayerNorm takes away.
            alive = [c for c in range(model.config.hidden_size) if c not in channels]
            view[..., alive] -= view[..., alive].mean(-1, keepdim=True)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"transformer.h.{layer}." if gpt2 else f"model.layers.{layer}."
        out = weights[prefix + ("attn.c_proj.weight" if gpt2 else "self_attn.o_proj.weight")].data
        down = weights[prefix + ("mlp.c_proj.weight" if gpt2 else "mlp.down_proj.weight")].data
        out, down = (out, down) if gpt2 else (out.T, down.T)
        if layer in layers:
            out.zero_()
            down.zero_()
            if gpt2:
                weights[prefix + "attn.c_proj.bias"].data.zero_()
                weights[prefix + "mlp.c_proj.bias"].data.zero_()
        for neuron in dead_neurons(neurons, layer):
            if gpt2 or neuron % 2:
                down[neuron] = 0
            else:
                weights[prefix + "mlp.up_proj.weight"].data[neuron] = 0
        width = 4 if gpt2 else 16
        for group in dead_groups(groups, layer, model.config.model_type):
            out[group * width:(group + 1) * width] = 0
    if gpt2 and channels:
        for name, weight in weights.items():
            if ".ln_" in name and name.endswith("bias"):
                weight.data[channels] = 0
    model.save_pretrained(folder)


def dead_neurons(neurons, layer: int) -> list[int]:
    return sorted((neuron + layer) % 48 for neuron in neurons)


def dead_groups(groups, layer: int, family: str) -> list[int]:
    return sorted((group + layer) % (8 if family == "gpt2" else 4) for group in groups)


def prune(model: Path, out: Path, *options: object) -> Path:
    assert main(["prune", str(model), str(out), *map(str, options)]) == 0
    return out


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(20, (3, 24), generator=torch.Generator().manual_seed(5))
    return model(ids).logits


def alive(count: int, dead) -> list[int]:
    return [i for i in range(count) if i not in dead]


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_dead_parts_go_and_nothing_else_and_the_logits_stay(family, texts, tmp_path):
    model = teacher(tmp_path / "teacher", family)
    plant(model, LAYERS, CHANNELS, NEURONS, GROUPS)
    before = logits(model)
    # GPT-2's heads are groups of one, and all together as wide as the hidden states.
    heads = 6 if family == "gpt2" else 4
    out = prune(model, tmp_path / "student", "--layers", 2, "--hidden", 24, "--intermediate", 45,
                "--heads", heads, "--data", texts)
    after = logits(out)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-5)
    config = AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 24,
                                                                                          heads)
    whole, cut = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    channels = alive(32, CHANNELS)
    for number, layer in enumerate(alive(4, LAYERS)):
        neurons = alive(48, dead_neurons(NEURONS, layer))
        groups = alive(8 if family == "gpt2" else 4, dead_groups(GROUPS, layer, family))
        if family == "gpt2":
            up = whole[f"transformer.h.{layer}.mlp.c_fc.weight"].T
            new_up = cut[f"transformer.h.{number}.mlp.c_fc.weight"].T
            fused = whole[f"transformer.h.{layer}.attn.c_attn.weight"].T
            keys = fused[32:64].view(8, 4, 32)
            new_keys = cut[f"transformer.h.{number}.attn.c_attn.weight"].T[24:48].view(6, 4, 24)
        else:
            up = whole[f"model.layers.{layer}.mlp.gate_proj.weight"]
            new_up = cut[f"model.layers.{number}.mlp.gate_proj.weight"]
            keys = whole[f"model.layers.{layer}.self_attn.k_proj.weight"].unflatten(0, (4, -1))
            new_keys = cut[f"model.layers.{number}.self_attn.k_proj.weight"].unflatten(0, (2, -1))
        assert torch.equal(new_up, up[neurons][:, channels])
        assert torch.equal(new_keys, keys[groups][..., channels])


@pytest.mark.parametrize("family, dtype", [
    *((family, torch.float32) for family in FAMILIES), ("llama", torch.bfloat16)])
def test_pruning_nothing_gives_the_teacher_bit_by_bit(family, dtype, tmp_path):
    model = teacher(tmp_path / "teacher", family, dtype=dtype)
    options = [] if family == "llama" else ["--layers", 4, "--hidden", 32, "--intermediate", 48,
                                            "--heads", 8]
    out = prune(model, tmp_path / "student", *options)
    whole, copy = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert whole.keys() == copy.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == copy[name].dtype == dtype and torch.equal(tensor, copy[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((model / name).read_text())
    assert torch.equal(logits(model), logits(out))


def prune_gathering(argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank whose teacher is gathered weight by weight, however small they are."""
    from amid_ds.eval import prune

    prune.SHARDED["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    rank_main(argv, variables, log)


def test_a_student_is_the_same_from_any_number_of_ranks(texts, tmp_path):
    # Rows for three and a half batches: the last is short, and one rank of two has none.
    model = teacher(tmp_path / "teacher", "qwen3")
    options = ("--layers", 2, "--hidden", 24, "--intermediate", 40, "--heads", 4, "--data", texts,
               "--seq-length", 32, "--rows", 9)
    alone = load_file(prune(model, tmp_path / "alone", *options) / "model.safetensors")
    run_ranks(2, "prune", model, tmp_path / "both", *options, target=prune_gathering)
    both = load_file(tmp_path / "both" / "model.safetensors")
    assert alone.keys() == both.keys()
    assert all(torch.equal(alone[name], both[name]) for name in alone)


@torch.no_grad()
def test_layers_channels_and_neurons_go_by_what_the_plain_model_says(texts, tmp_path):
    """Against the model's own hidden states, in float64 and row by row."""
    model_folder = teacher(tmp_path / "teacher", "llama", num_hidden_layers=6)
    out = prune(model_folder, tmp_path / "student", "--layers", 4, "--hidden", 24,
                "--intermediate", 40, "--data", texts, "--seq-length", 32)
    model = AutoModelForCausalLM.from_pretrained(model_folder).double()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prepare(Data(train=[Source(path=str(texts))]), 32, tokenizer, tmp_path / "data")
    cosines, outputs = torch.zeros(7, 7).double(), torch.zeros(6, 2, 32).double()
    last, sizes = torch.zeros(32).double(), torch.zeros(6, 48).double()
    inputs: dict[int, torch.Tensor] = {}
    # What the hidden states of transformers' own output lack.
    for number, norm in enumerate([*(layer.post_attention_layernorm
                                     for layer in model.model.layers), model.model.norm]):
        norm.register_forward_pre_hook(
            lambda _, args, number=number: inputs.__setitem__(number, args[0][0]))
    for ids, labels in itertools.chain.from_iterable(
            map(split_documents, read_batches(tmp_path / "data", 1))):
        keep = labels != -100
        states = model(ids, output_hidden_states=True).hidden_states
        last += states[-1][0, keep].abs().sum(0)
        states = torch.stack([*(state[0] for state in states[:-1]), inputs[6]])[:, keep]
        cosines += torch.nn.functional.cosine_similarity(states[:, None], states[None], -1).sum(-1)
        for number, layer in enumerate(model.model.layers):
            x = inputs[number][keep]
            outputs[number, 0] += layer.input_layernorm(states[number]).abs().sum(0)
            normed = layer.post_attention_layernorm(x)
            outputs[number, 1] += normed.abs().sum(0)
            gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
            sizes[number] += (torch.nn.functional.silu(gate) * up).abs().sum(0)
    first = max(range(5), key=lambda first: cosines[first, first + 2])
    layers = alive(6, (first, first + 1))
    channels = (outputs[layers].sum((0, 1)) + last).argsort()[-24:].sort().values
    cut = load_file(out / "model.safetensors")
    for number, layer in enumerate(layers):
        down = model.model.layers[layer].mlp.down_proj.weight
        neurons = (sizes[layer] * down.norm(dim=0)).argsort()[-40:].sort().values
        assert torch.equal(cut[f"model.layers.{number}.mlp.down_proj.weight"].double(),
                           down[channels][:, neurons])


def test_idle_layers_go_first_and_then_the_block_that_turns_the_hidden_states_least():
    cosines = torch.eye(6).double()
    # Layers 1 and 2 undo each other: alone each does much, together nothing.
    cosines[1, 3], cosines[0, 1], cosines[4, 5] = 0.99, 0.9, 0.95
    changes = torch.ones(5).double()
    def kept(count: int) -> list[int]:
        return kept_layers(Importance(cosines, changes, changes, changes, {}), count)

    assert kept(5) == [0, 1, 2, 3, 4] and kept(4) == [0, 1, 2, 3] and kept(3) == [0, 3, 4]
    changes[3] = 0
    assert kept(4) == [0, 1, 2, 4] and kept(2) == [0, 4]
    changes[:] = 0
    assert kept(2) == [3, 4]


@pytest.mark.parametrize("layers, kept, expected", [
    (6, 3, [0, 2, 5]), (12, 4, [0, 4, 7, 11]), (4, 1, [0]), (5, 5, [0, 1, 2, 3, 4]),
    (32, 16, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31])])
def test_by_depth_layers_stay_at_even_distances(layers, kept, expected):
    assert even_layers(layers, kept) == expected


def test_by_depth_needs_no_text_and_keeps_what_the_config_says_of_each_layer(tmp_path):
    model = teacher(tmp_path / "teacher", "qwen2-tied", use_sliding_window=True, sliding_window=8,
                    num_hidden_layers=6, max_window_layers=3, head_dim=None)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    out = prune(model, tmp_path / "student", "--by", "depth", "--layers", 3)
    config = AutoConfig.from_pretrained(out)
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert config.max_window_layers == 2 and config.tie_word_embeddings and config.head_dim == 4
    whole, cut = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert "lm_head.weight" not in cut
    for number, layer in enumerate([0, 2, 5]):
        names = [name for name in whole if name.startswith(f"model.layers.{layer}.")]
        assert len(names) == 12
        for name in names:
            assert torch.equal(cut[name.replace(f".{layer}.", f".{number}.")], whole[name])
    card = (out / "README.md").read_text()
    assert "Layers of the teacher that are left: 0, 2, 5." in card
    assert "Cut from `…/teacher`" in card and str(tmp_path) not in card
    assert metadata_load(out / "README.md") == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["pruning", "amid-ds"], "license": "mit"}


def test_a_pruned_student_trains(texts, tmp_path):
    model = teacher(tmp_path / "teacher", "llama-tied")
    student = prune(model, tmp_path / "student", "--layers", 2, "--hidden", 16,
                    "--intermediate", 24, "--heads", 4, "--data", texts)
    # It has positions for no more.
    assert "256 rows of 128 tokens" in (student / "README.md").read_text()
    recipe = write_recipe(tmp_path / "r.yaml", student, model, texts, tmp_path / "run",
                          train__steps=20, loss__ce_weight=0.0)
    run_ranks(1, "train", recipe)
    losses = [line["kd_loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4])


def measured_prune(model: str, out: str, notes: str, argv: list[str], variables: dict[str, str],
                   log: str) -> None:
    """Prune in files of 8 MB, and record the peak rise of this process's anonymous memory."""
    weight_writer.FILE_BYTES = 8 * 10**6
    cut = ["--by", "depth", "--layers", "4"]
    # Once before, for what an import or a first call leaves.
    main(["prune", model, f"{out}.first", *cut])
    with memory_rise("RssAnon") as rise:
        status = main(["prune", model, out, *cut])
    Path(notes).write_text(str(rise[0]))
    os._exit(status)


def test_pruning_takes_the_memory_of_a_file_and_a_tensor(tmp_path):
    model = make_model(tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048,
                       num_hidden_layers=6)
    out, notes = tmp_path / "out", tmp_path / "notes"
    process = Ranks(1, target=functools.partial(measured_prune, str(model), str(out), str(notes)))
    assert process.wait() == [0], process.output()
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5 and sum(path.stat().st_size for path in files) > 60e6
    assert int(notes.read_text()) < 24e6
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4
