"""Which bytes of a multimodal folder are a language part's: read alone, and put back into place."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import save_tiny
from transformers import AutoModelForImageTextToText

from amid_ds.checkpoint.into import put_weights, require_same
from amid_ds.data import load_tokenizer
from amid_ds.errors import InputError
from amid_ds.models import weight_reader
from amid_ds.models.ends import generation_config
from amid_ds.models.loading import (
    load_causal_lm,
    meta_model,
    model_config,
    open_weights,
    require_supported,
    supported_model,
)
from amid_ds.models.weight_files import read_weight_table
from amid_ds.models.weight_map import stored_sources
from amid_ds.models.weight_patch import WeightPatcher

FAMILIES = ["gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "llama4", "mistral3", "qwen2_5_vl",
            "qwen3_vl", "glm4v"]
# A mixture with experts of its own, a twin, and an ordinary text; the others are slow.
ONE_OF_EACH = [family if family in ("qwen3_5_moe", "qwen2_5_vl", "gemma3") else pytest.param(
    family, marks=pytest.mark.slow) for family in FAMILIES]
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """A tiny multimodal model of a family, made once."""
    root = tmp_path_factory.mktemp("multimodal")

    def make(family: str) -> Path:
        return root / family if (root / family).is_dir() else save_tiny(family, root / family)

    return make


def renamed(original: Path, out: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy whose tensors have other names; None: it is left out."""
    shutil.copytree(original, out)
    tensors = {rename(name): tensor
               for name, tensor in load_file(original / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_both_layouts_of_a_familys_files_are_the_same_model(family, folder, tmp_path):
    # As it was before transformers 5, which still writes it; and with the names of its modules.
    old, new = folder(family), tmp_path / "new"
    shutil.copytree(old, new)
    whole = AutoModelForImageTextToText.from_pretrained(old)
    save_file({name: parameter.detach() for name, parameter in whole.named_parameters()},
              new / "model.safetensors", metadata={"format": "pt"})
    assert {*load_file(old / "model.safetensors")} != {*load_file(new / "model.safetensors")}
    ours, theirs = (dict(load_causal_lm(str(each), "fp32").named_parameters())
                    for each in (new, old))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_no_byte_of_a_tower_is_read(family, folder, monkeypatch):
    path = folder(family)
    table = read_weight_table(str(path))
    towers = [tensor for tensor in table.files[0].tensors if "vis" in tensor.name]
    read: list[tuple[int, int]] = []
    real = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = real(descriptor, buffers, offset)
        read.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", recorded)
    load_causal_lm(str(path), "bf16")
    reader = open_weights(str(path))
    with reader:
        reader.fill([(source, 0, torch.empty(source.numel())) for source in
                     set(reader.sources.values())])
    assert towers and read
    sizes = {tensor.name: 4 * torch.Size(tensor.shape).numel()
             for tensor in table.files[0].tensors}
    for tensor in towers:
        end = tensor.offset + sizes[tensor.name]
        assert not any(start < end and stop > tensor.offset for start, stop in read), tensor.name
    assert reader.bytes_read == sum(size for name, size in sizes.items() if "vis" not in name
                                    and "multi_modal" not in name)


def test_a_weight_of_the_language_part_must_be_there_and_one_of_a_tower_need_not(folder, tmp_path):
    whole = folder("gemma3")
    lacks = renamed(whole, tmp_path / "lacks", lambda name: None if "layers.1.mlp.up" in name
                    else name)
    with pytest.raises(InputError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        require_supported(str(lacks))
    blind = renamed(whole, tmp_path / "blind", lambda name: None if "vision_tower" in name
                    else name)
    require_supported(str(blind))
    more = tmp_path / "more"
    shutil.copytree(whole, more)
    tensors = load_file(whole / "model.safetensors")
    tensors["model.language_model.layers.0.mlp.extra.weight"] = torch.ones(2)
    save_file(tensors, more / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 unexpected: .*layers\.0\.mlp\.extra\.weight"):
        require_supported(str(more))


@pytest.mark.parametrize("family, reason", [
    ("mllama", "layers of cross-attention that text alone skips"),
    ("cohere2_vision", "leaves out the scale"), ("qwen2_5_omni_thinker", "has no causal LM")])
def test_a_language_part_that_is_no_model_by_itself_is_refused_by_name(family, reason, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        supported_model(str(tmp_path))
    assert f"model_type {family}" in str(caught.value)


def test_the_chat_template_and_the_end_of_a_turn_are_those_of_the_whole_folder(folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(folder("gemma3"), whole)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (whole / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (whole / "generation_config.json").unlink()
    config = json.loads((whole / "config.json").read_text())
    config["eos_token_id"] = [1, 106]
    (whole / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(whole)).chat_template == template
    assert generation_config(str(whole)).eos_token_id == [1, 106]


def test_a_model_type_that_this_transformers_does_not_know_is_named_with_both_versions(tmp_path):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "gemma99", "transformers_version": "7.1.0"}))
    with pytest.raises(InputError) as caught:
        model_config(str(tmp_path))
    assert f"transformers {transformers.__version__} does not know" in caught.value.found
    assert "'gemma99'" in caught.value.found and "transformers 7.1.0 wrote" in caught.value.found
    assert "newer transformers" in caught.value.remedy


class Trained:
    """Weights of a causal LM where a checkpoint's would be."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = model.state_dict()

    def open(self) -> Trained:
        return self

    def whole(self, name: str, shape: torch.Size) -> torch.Tensor:
        assert self.tensors[name].shape == shape
        return self.tensors[name]

    def buffer(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_whole_model_with_the_weights_put_into_its_files_has_their_logits(family, folder,
                                                                            tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder(family), out)
    part = load_causal_lm(str(out), "fp32").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = part(input_ids=IDS, use_cache=False).logits
    reader = open_weights(str(out))
    put_weights(Trained(part), meta_model(str(out)), reader, out)
    whole = AutoModelForImageTextToText.from_pretrained(out).eval()
    # Llama 4's wrapper asks for pictures' outputs that a text has none of (transformers 5.24).
    inner = whole.language_model if family == "llama4" else whole
    with torch.no_grad():
        found = inner(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    after, before = (load_file(each / "model.safetensors") for each in (out, folder(family)))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if "vis" in name} <= same != before.keys()


def test_a_head_that_the_files_hold_beside_its_embedding_is_written_twice(folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder("gemma3"), out)
    tensors = load_file(out / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    head = "language_model.lm_head.weight"
    save_file({**tensors, head: tensors[embedding].clone()}, out / "model.safetensors",
              metadata={"format": "pt"})
    part = load_causal_lm(str(out), "fp32")
    with torch.no_grad():
        part.lm_head.weight.add_(1)
    put_weights(Trained(part), meta_model(str(out)), open_weights(str(out)), out)
    found = load_file(out / "model.safetensors")
    assert torch.equal(found[head], found[embedding])
    assert torch.equal(found[head], tensors[embedding] + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_models_config_says_whether_the_head_is_tied(tied, tmp_path):
    whole = save_tiny("qwen2_5_vl", tmp_path / "whole", tie_word_embeddings=tied)
    config = json.loads((whole / "config.json").read_text())
    # transformers 5 no longer looks there.
    config["text_config"]["tie_word_embeddings"] = False
    assert config["tie_word_embeddings"] is tied
    (whole / "config.json").write_text(json.dumps(config))
    part = load_causal_lm(str(whole), "fp32").eval()
    assert (part.lm_head.weight is part.model.embed_tokens.weight) is tied
    truth = AutoModelForImageTextToText.from_pretrained(whole).eval()
    with torch.no_grad():
        assert torch.equal(part(input_ids=IDS).logits, truth(input_ids=IDS).logits)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_config_that_a_run_keeps_is_still_its_originals(family, folder, tmp_path):
    supported_model(str(folder(family))).config.save_pretrained(tmp_path)
    require_same(meta_model(str(tmp_path)), folder(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_is_put_where_a_part_of_a_weight_lies_and_nowhere_else(dtype, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(weight_reader, "READ_CHUNK_BYTES", 64)
    monkeypatch.setattr(weight_reader, "PAGE_BYTES", 16)
    generator = torch.Generator().manual_seed(1)
    truth = {f"t{number}": torch.randn(shape, generator=generator).to(dtype) for number, shape in
             enumerate([(), (7,), (13, 5), (6, 9), (3, 4, 5), (4, 1, 6, 3)])}
    save_file(truth, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table = read_weight_table(str(tmp_path))
    sources, chance = stored_sources(table), random.Random(0)
    for name in [*truth] * 8:
        source, tensor = sources[name], truth[name]
        for _ in range(chance.randrange(3) if tensor.dim() else 0):
            dim = chance.randrange(tensor.dim())
            start = chance.randrange(tensor.shape[dim])
            stop = chance.randint(start + 1, tensor.shape[dim])
            source, tensor = source.part(dim, start, stop), tensor.narrow(dim, start, stop - start)
        value = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(value)
        with WeightPatcher(tmp_path, table) as patcher:
            patcher.write(source, value)
        # Each time: a later value may cover what this one has spoilt.
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(found[other], tensor) for other, tensor in truth.items())
