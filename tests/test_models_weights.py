"""Each parameter's bytes are found in the files as transformers' own loader makes it of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import zlib
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from support.hub import publish, use_cache
from support.ranks import RankPool
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.models import weight_map, weights
from amid_ds.models.loading import load_causal_lm, meta_model, open_weights
from amid_ds.models.weight_files import StoredTensor, WeightFile, WeightTable
from amid_ds.models.weight_reader import WeightReader

COMMON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ROPE = dict(**COMMON, num_key_value_heads=2, intermediate_size=48)
MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8)
CONFIGS = {
    "gpt-neox": lambda: t.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "gpt-j": lambda: t.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "opt": lambda: t.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "olmo2": lambda: t.Olmo2Config(**ROPE),
    "phi3": lambda: t.Phi3Config(**ROPE, pad_token_id=0),
    "mixtral": lambda: t.MixtralConfig(**ROPE, num_local_experts=3),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**ROPE, num_experts=4, moe_intermediate_size=16),
    "deepseek-v3": lambda: t.DeepseekV3Config(**ROPE, **MLA, n_routed_experts=4, n_group=2,
                                              topk_group=1, moe_intermediate_size=16,
                                              num_experts_per_tok=2, first_k_dense_replace=1),
    "jamba": lambda: t.JambaConfig(**ROPE, num_experts=4)}
SUPPORTED = ("llama", "llama-tied", "qwen3", "mistral", "gemma3", "gemma2", "qwen2-tied", "gpt2")


@pytest.fixture(scope="module")
def family_folder(shared_folder, shared_model):
    """family_folder(name): a small model of that family, in several files as it is published."""
    def make(path: Path, name: str) -> None:
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(CONFIGS[name]())
        model.to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    return lambda name: (shared_model(name) if name in SUPPORTED else
                         shared_folder(f"{name}-in-parts", lambda path: make(path, name)))


def read_whole(reader: WeightReader, name: str) -> torch.Tensor:
    """A parameter in fp32, read in three ranges."""
    source = reader.sources[name]
    count = source.numel()
    out = torch.full((count,), math.nan)
    ends = [0, count // 3, count // 2, count]
    reader.fill((source, start, out[start:stop]) for start, stop in itertools.pairwise(ends))
    return out.view(source.shape)


def require_equal(folder: Path, truth: torch.nn.Module) -> None:
    """Assert that every parameter of `truth` is what its source says."""
    reader = open_weights(str(folder))
    assert isinstance(reader, WeightReader), reader
    with reader:
        names = dict(truth.named_parameters(remove_duplicate=False))
        assert names.keys() <= reader.sources.keys()
        for name, parameter in names.items():
            assert torch.equal(read_whole(reader, name), parameter.float()), name
        for name in reader.sources.keys() - names.keys():
            assert torch.equal(read_whole(reader, name), truth.get_buffer(name).float()), name


@pytest.mark.parametrize("family", [*SUPPORTED, *CONFIGS])
def test_every_parameter_is_what_from_pretrained_loads(family, family_folder):
    folder = family_folder(family)
    require_equal(folder, t.AutoModelForCausalLM.from_pretrained(folder))


def test_parts_of_fused_experts_are_read_without_the_rest(family_folder):
    folder = family_folder("mixtral")
    truth = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with open_weights(str(folder)) as reader:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        whole = truth.get_parameter(name)          # [3, 2 * 48, 32]
        assert len(reader.sources[name].boxes) == 6
        for dim, start, stop in ((0, 1, 3), (1, 40, 60), (2, 5, 9)):
            source = reader.sources[name].part(dim, start, stop)
            right = whole.narrow(dim, start, stop - start)
            out = torch.full((right.numel(),), math.nan, dtype=torch.bfloat16)
            reader.fill([(source, 0, out)])
            assert torch.equal(out.view(right.shape), right)
        before = reader.bytes_read
        reader.fill([(reader.sources[name], 11, torch.empty(5000, dtype=torch.bfloat16))])
        assert reader.bytes_read - before == 10_000


def renamed(folder: Path, source: Path, change) -> Path:
    """A copy of the model in `source`, its weights' names changed or left out (None)."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_names_are_followed_as_transformers_follows_them(shared_model, tmp_path):
    gpt2 = shared_model("gpt2")
    # The names that OpenAI's own files have, without a prefix.
    bare = renamed(tmp_path / "bare", gpt2, lambda name: name.removeprefix("transformer."))
    require_equal(bare, t.AutoModelForCausalLM.from_pretrained(gpt2))
    tied = shared_model("llama-tied")
    other = renamed(tmp_path / "tied", tied, lambda name: name.replace("model.embed_tokens",
                                                                       "lm_head"))
    require_equal(other, t.AutoModelForCausalLM.from_pretrained(tied))


@pytest.mark.parametrize("family, operation", [("mixtral", "stack"), ("mixtral", "cat")])
def test_what_cannot_be_followed_is_said_and_loaded_whole(family, operation, family_folder,
                                                          monkeypatch):
    monkeypatch.delitem(weight_map._FOLLOWED, operation)
    monkeypatch.setattr(weight_map, "_MAPS", {})
    assert open_weights(str(family_folder(family))) == f"one of them is made by {operation}"


def test_pickled_weights_are_left_to_transformers(shared_model, tmp_path):
    pickled = Path(shutil.copytree(shared_model("llama"), tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert open_weights(str(pickled)) == "pytorch_model.bin is a pickled file"


def test_a_tied_weight_that_files_hold_twice_is_read_once_and_its_second_copy_compared(
        shared_model, tmp_path):
    source = shared_model("llama-tied")
    folder = Path(shutil.copytree(source, tmp_path / "twice"))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[0, 0] = math.nan
    tensors["lm_head.weight"] = embedding.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_weights(str(folder)) as reader:
        assert reader.sources["lm_head.weight"] == reader.sources["model.embed_tokens.weight"]
        assert [reader.unequal_twins(share, 3) for share in range(3)] == [[], [], []]
        assert reader.bytes_read == 2 * embedding.numel() * 4
    # One number, in the third of the last rank.
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_weights(str(folder)) as reader:
        assert [reader.unequal_twins(share, 3) for share in range(3)] == [
            [], [], ["lm_head.weight"]]
    # Whole, transformers would make two weights of them.
    with pytest.raises(InputError, match="tied by its config, with values of their own"):
        load_causal_lm(str(folder), "fp32")


def test_opening_leaves_the_meta_model_as_it_is_and_runs_the_loader_once(family_folder,
                                                                         monkeypatch):
    folder = str(family_folder("qwen3-moe"))
    calls = []
    run = weight_map._run_loader
    monkeypatch.setattr(weight_map, "_MAPS", {})
    monkeypatch.setattr(weight_map, "_run_loader",
                        lambda *arguments: calls.append(1) or run(*arguments))
    meta = meta_model(folder)
    before = dict(meta.named_parameters())
    weights.require_weights(meta, folder)
    assert all(parameter is before[name] for name, parameter in meta.named_parameters())
    with open_weights(folder):
        assert len(calls) == 1


COMMIT = "1" * 40


def open_on_rank(rank: int, group: object, model: str, cache: str, count_file: str
                 ) -> tuple[float, str]:
    """(sum of a weight, error) on a rank of two to a host; each download adds a line to a file."""
    use_cache(Path(cache))
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    paths, table = weights.weight_paths, weights.read_weight_table

    def note(what: str) -> None:
        with open(count_file, "a") as file:
            file.write(f"{what} {rank}\n")

    weights.weight_paths = lambda *arguments: note("download") or paths(*arguments)
    weights.read_weight_table = lambda *arguments, **named: (note("headers")
                                                             or table(*arguments, **named))
    try:
        world = World(rank, 4, torch.device("cpu"), agreement=group, on_host=2,
                      is_first_on_host=rank % 2 == 0)
        with open_weights(model, COMMIT, world=world) as reader:
            cut = Path(f"{count_file}.cut")
            if rank == 3 and cut.exists():
                os.truncate(cut.read_text(), 1000)
            world.barrier()
            return world.run_checked(
                lambda: read_whole(reader, "model.norm.weight").sum().item()), ""
    except InputError as error:
        return 0.0, str(error)
    finally:
        weights.weight_paths, weights.read_weight_table = paths, table


def test_a_rank_of_each_host_downloads_one_reads_the_headers_and_errors_are_of_all(shared_model,
                                                                                   tmp_path):
    cache = tmp_path / "hub"
    cache.mkdir()
    publish(cache, "org/model", shared_model("llama"), COMMIT)
    right = load_file(shared_model("llama") / "model.safetensors")["model.norm.weight"]
    pool = RankPool()
    try:
        arguments = ("org/model", str(cache), str(tmp_path / "count"))
        assert pool.run(4, open_on_rank, *arguments) == [(right.sum().item(), "")] * 4
        assert sorted((tmp_path / "count").read_text().splitlines()) == [
            "download 0", "download 2", "headers 0"]
        # Cut after its header was read: every rank has the same message.
        file = cache / "models--org--model" / "snapshots" / COMMIT / "model.safetensors"
        (tmp_path / "count.cut").write_text(str(file))
        errors = {error for _, error in pool.run(4, open_on_rank, *arguments)}
        assert len(errors) == 1 and f"{file} has 1000 bytes, not" in errors.pop()
        # Absent on the hub and in the cache.
        (tmp_path / "count.cut").unlink()
        file.unlink()
        errors = {error for _, error in pool.run(4, open_on_rank, *arguments)}
        assert len(errors) == 1 and "the weights of org/model cannot be read" in errors.pop()
    finally:
        pool.close()


def test_the_table_that_ranks_exchange_is_small():
    """The header of a model of 405B: 1,137 tensors in 191 files."""
    tensors = [StoredTensor(f"model.layers.{layer}.mlp.some_projection.weight", "BF16",
                            (53248, 16384), layer << 30) for layer in range(1137)]
    files = [WeightFile(f"model-{number:05d}-of-00191.safetensors", 4 << 30, number,
                        hashlib.sha256(bytes([number])).hexdigest(), tuple(tensors[number::191]))
             for number in range(191)]
    table = WeightTable("org/model", COMMIT, "host", tuple(files))
    assert len(zlib.compress(pickle.dumps(table))) < 100_000


def test_a_table_of_a_run_that_names_its_weight_file(shared_model, tmp_path):
    folder = Path(shutil.copytree(shared_model("llama"), tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights":
                                                    "other.safetensors"}))
    require_equal(folder, t.AutoModelForCausalLM.from_pretrained(shared_model("llama")))


def published_table(meta, name: str) -> WeightTable:
    """The table of a file in which `meta` would be published, with its tied weights once."""
    kept = {key: tensor for key, tensor in meta.state_dict().items()
            if key not in meta.all_tied_weights_keys}
    tensors, end = [], 8
    for key, tensor in revert_weight_conversion(meta, kept).items():
        tensors.append(StoredTensor(key, "BF16", tuple(tensor.shape), end))
        end += 2 * tensor.numel()
    return WeightTable(name, None, "host", (WeightFile("f", end, 0, "", tuple(tensors)),))


@pytest.mark.slow
def test_nearly_every_language_model_of_transformers_is_read_by_range():
    """Of those that their default configs build here; each element comes from one place."""
    read, whole = [], []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = t.AutoConfig.for_model(name)
            fewer = {key: 4 for key in ("num_hidden_layers", "n_layer", "num_layers",
                                        "num_local_experts", "num_experts", "n_routed_experts")
                     if isinstance(getattr(config, key, None), int)}
            with torch.device("meta"):
                meta = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(name, **fewer))
        # A class that has no defaults, or not for so few layers.
        except Exception:
            continue
        if meta.config.get_text_config() is not meta.config:
            continue
        found = weight_map.map_weights(meta, published_table(meta, name))
        assert not any(found.report.values()), (name, found.report)
        for key, source in found.sources.items():
            assert sum(math.prod(box.sizes) for box in source.boxes) == source.numel(), (name, key)
        (whole if found.reason else read).append(name)
    assert len(read) > 100 and len(whole) <= len(read) // 20, whole
