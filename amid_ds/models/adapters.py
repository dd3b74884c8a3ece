"""LoRA adapters on a causal LM, by peft: this module alone imports it.

peft replaces a linear layer by one that adds scaling · B A x to the frozen product W x, scaling =
alpha / rank. The model keeps its class and its other names:

    model.layers.0.mlp.up_proj.weight  ->  model.layers.0.mlp.up_proj.base_layer.weight
                                           model.layers.0.mlp.up_proj.lora_A.default.weight
                                           model.layers.0.mlp.up_proj.lora_B.default.weight

Two things are not peft's. The first values are a function of a seed and the parameter's name, so
that they are the same however a model is sharded. And a module of `modules_to_save` trains in
place, where peft makes a second copy and keeps the first: as a shared weight it stays shared.

In a mixture peft takes some names of linear layers (`gate_proj`, of a dense layer or of a shared
expert) for parts of what transformers 5 stacks in one parameter, and would adapt all routed experts
in their place. Here a name is the module of that name.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import Lora
from amid_ds.errors import InputError
from amid_ds.models.kernel_packages import kernel_packages
from amid_ds.models.shape import embedding_of, head_module
from amid_ds.models.weight_reads import outside_reads

if TYPE_CHECKING:
    from peft import LoraConfig

# By a parameter's name what makes its whole first value, of which no file holds any.
FirstValues: TypeAlias = Mapping[str, Callable[[], Tensor]]
# peft's name of a model's first adapter; of the file that describes an adapter's folder.
ADAPTER_NAME, CONFIG_FILE = "default", "adapter_config.json"
# What stands before the names of the model's parameters in an adapter's file.
FILE_PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
# What a model is called inside of the module that peft is given.
SHELL = "causal_lm"
# The most kinds of modules, and of other names, in a message.
MAX_KINDS = 12


def inject(model: nn.Module, lora: Lora) -> None:
    """Put adapters on the targets of a causal LM, in place; they and `modules_to_save` train alone.

    model: whole, on the meta device, or in ZeRO-3's shards. The adapters are on its device and in
    its dtype, and have no values yet (`initial_value`). Raises InputError, before anything is
    changed, for targets that the model does not have, or a rank that they do not.
    """
    targets = target_modules(model, lora)
    saved = _saved_modules(model, lora, targets)
    peft = import_peft()
    config = _config(model, lora, targets)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    # Inside of a module that is no model of transformers names mean what they say.
    shell = nn.ModuleDict({SHELL: model})
    config.target_modules = {f"{SHELL}.{name}" for name in targets}
    peft.inject_adapter_in_model(config, shell, ADAPTER_NAME, low_cpu_mem_usage=on_meta)
    for name, module in model.named_modules():
        if is_adapter(f"{name}."):
            module.to(dtype=model.dtype)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)


def first_values(model: nn.Module, seed: int) -> FirstValues:
    """By their names, makers of the first values of the adapters of a model, not yet split."""
    return {name: partial(initial_value, name, tuple(parameter.shape), seed)
            for name, parameter in model.named_parameters() if is_adapter(name)}


def initial_value(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """An adapter's whole first value [shape] in fp32, by its name and `seed` alone.

    As peft has them: A uniform within 1 / √(its columns), B zero.
    """
    value = torch.zeros(*shape)
    if ".lora_A." in name:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(value.shape[1])
        value.uniform_(-bound, bound, generator=generator)
    return value


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter, in a model with adapters."""
    return ".lora_A." in name or ".lora_B." in name


def stored_name(name: str) -> str:
    """The name that the files of the model without adapters have for the parameter `name`."""
    return name.replace(".base_layer.", ".")


def file_key(name: str) -> str:
    """The key in adapter_model.safetensors of the trained parameter `name`."""
    return FILE_PREFIX + name.replace(f".{ADAPTER_NAME}.", ".")


def is_adapted(module: nn.Module) -> bool:
    """True for a layer with an adapter: it has `base_layer`, `lora_A`, `lora_B` and `scaling`."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer with an adapter."""
    for name, module in model.named_modules():
        if is_adapted(module):
            yield name, module


def is_adapter_folder(path: str | Path) -> bool:
    """True for a folder that holds an adapter, as peft saves it, instead of a model."""
    return (Path(path) / CONFIG_FILE).is_file()


def write_adapter_config(folder: Path, model: nn.Module, lora: Lora, base: str,
                         revision: str | None = None) -> None:
    """Write adapter_config.json of a LoRA run: what PeftModel.from_pretrained opens it by.

    model: the student without adapters, on the meta device. base: where its weights are.
    """
    targets = target_modules(model, lora)
    config = _config(model, lora, targets)
    taken = _taken_for_experts(model, targets)
    if taken:
        # A layer's weight by its name, which gives the same adapter, and without dropout.
        config.target_modules = set(targets) - taken
        config.target_parameters = sorted(f"{name}.weight" for name in taken)
        config.lora_dropout = 0.0
    # By their whole names: peft takes any end of a name, `norm` for `q_norm` too.
    config.modules_to_save = _saved_modules(model, lora, targets) or None
    config.base_model_name_or_path, config.revision = base, revision
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.save_pretrained(str(folder))


def apply_adapters(model: nn.Module, folder: str) -> nn.Module:
    """`model` with the adapters in `folder` added to its weights, in place and by peft.

    The sum is made in fp32, a layer at a time, and rounded once. Raises InputError where they are
    damaged, or of another model.
    """
    peft, dtype = import_peft(), next(model.parameters()).dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel(model, peft.PeftConfig.from_pretrained(folder))
            report = adapted.load_adapter(folder, ADAPTER_NAME, autocast_adapter_dtype=False)
            wrong = [*report.missing_keys, *report.unexpected_keys]
            if not wrong:
                for _, layer in adapted_layers(adapted):
                    layer.float().merge(safe_merge=True)
                    layer.to(dtype)
                # What is merged already it leaves out, with a warning.
                merged: nn.Module = adapted.merge_and_unload()
                return merged.eval()
        problem = f"{len(wrong)} missing or unexpected tensors: {', '.join(wrong[:MAX_KINDS])}"
    # A changed file can make peft raise anything.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        problem = " ".join(lines[:2]) or type(error).__name__
    raise InputError(f"the adapters in {folder} do not fit the model "
                     f"{model.config.name_or_path}: {problem}",   # type: ignore[union-attr]
                     "adapters of this very model that can be added to its weights",
                     "correct base_model_name_or_path in its adapter_config.json, or export the "
                     "run again")


def _config(model: nn.Module, lora: Lora, targets: list[str]) -> LoraConfig:
    return import_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        # The weights of GPT-2's own kind of linear layer lie the other way.
        fan_in_fan_out=not isinstance(model.get_submodule(targets[0]), nn.Linear))


def _taken_for_experts(model: nn.Module, targets: list[str]) -> set[str]:
    """Those of the targets that peft would take for parts of stacked experts."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    ends = set()
    for end in {name.rpartition(".")[2] for name in targets}:
        config = import_peft().LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            # It wants the other parts of the stack too.
            ends.add(end)
        else:
            ends |= {end} - set(config.target_modules)
    return {name for name in targets if name.rpartition(".")[2] in ends}


def target_modules(model: nn.Module, lora: Lora) -> list[str]:
    """The names of the linear layers that get an adapter, in the model's order.

    all-linear: every one but the head, those whose weight a fused kernel takes, and those narrower
    than the rank (a shared expert's gate has one output). Else those that a target names, by their
    whole name or its last parts. Raises InputError for a target that is no linear layer or that a
    kernel passes by, and for a rank above the rank of a layer that is named, or of all.
    """
    head = head_module(model)
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    passed_by = _passed_by(model)
    if lora.targets == ALL_LINEAR:
        chosen = {name for name, module in linear.items()
                  if module is not head and name not in passed_by}
        # Where all are, the first is what the error names.
        chosen = {name for name in chosen if min(_shape(linear[name])) >= lora.rank} or chosen
    else:
        chosen = _named(model, "targets", lora.targets, linear)
        for name in sorted(chosen & passed_by.keys()):
            raise InputError(f"student.lora.targets names {name}, whose weight {passed_by[name]} "
                             "hands to a function or a fused kernel: without the adapter",
                             "linear layers that the model calls",
                             "leave it out, or take all-linear")
    targets = [name for name in linear if name in chosen]
    if not targets:
        raise InputError(f"student.lora.targets {lora.targets}, and the model "
                         f"{type(model).__name__} has no linear layer in its body",
                         "linear layers", "train this model without student.lora")
    for name in targets:
        shape = _shape(linear[name])
        if lora.rank > min(shape):
            raise InputError(f"student.lora.rank {lora.rank}, and {name} is {shape[0]} × "
                             f"{shape[1]}", "a rank of at most the smaller side of each target",
                             "lower the rank, or name other targets")
    embedding = embedding_of(model)
    if head.weight is embedding.weight and any(linear[name] is head for name in targets):
        raise InputError("student.lora.targets names the head "
                         f"{next(n for n in targets if linear[n] is head)}, whose weight is the "
                         "embedding's too: merged, they would be two", "linear layers of the body",
                         "leave it out; student.lora.modules_to_save trains both as one")
    if len({isinstance(linear[name], nn.Linear) for name in targets}) > 1:
        raise InputError("student.lora.targets are linear layers of two kinds, torch's and "
                         "GPT-2's, whose weights lie the other way", "targets of one kind",
                         "name those of one kind")
    return targets


def _passed_by(model: nn.Module) -> dict[str, str]:
    """Modules of which another one reads the weight, in a model that has fused kernels: the name of
    that one, by theirs."""
    if not kernel_packages(model):
        return {}
    return {name.rpartition(".")[0]: read.name
            for read in outside_reads(model) for name in read.parameters}


def _saved_modules(model: nn.Module, lora: Lora, targets: list[str]) -> list[str]:
    """The names of the modules that train whole beside the adapters."""
    owners = {name: module for name, module in model.named_modules()
              if name and next(module.parameters(recurse=False), None) is not None}
    saved = _named(model, "modules_to_save", lora.modules_to_save, owners)
    if both := sorted(saved.intersection(targets)):
        raise InputError(f"student.lora.modules_to_save and student.lora.targets both name "
                         f"{both[0]}", "a module that trains whole, or gets an adapter",
                         "leave it out of one of them")
    return sorted(saved)


def _named(model: nn.Module, key: str, wanted: Iterable[str], modules: dict[str, Any]) -> set[str]:
    """The names in `modules` that one of `wanted` is, or ends. Raises InputError for one of
    `wanted` that has none."""
    found = set()
    for each in wanted:
        matches = {name for name in modules if f".{name}".endswith(f".{each}")}
        if not matches:
            other = next((module for name, module in model.named_modules()
                          if f".{name}".endswith(f".{each}")), None)
            kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            shown = ", ".join([*kinds[:MAX_KINDS], *(["…"] if len(kinds) > MAX_KINDS else [])])
            raise InputError(
                f"student.lora.{key} names {each!r}, which is "
                + (f"a {type(other).__name__}" if other is not None else "nothing")
                + f" in the model {type(model).__name__}",
                f"names, or ends of names, of its modules: {shown}",
                f"correct student.lora.{key}")
        found |= matches
    return found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _shape(layer: Any) -> tuple[int, int]:
    """The layer's outputs and inputs, also where ZeRO-3 holds pieces of its weight."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.nf, layer.nx


def import_peft(why: str = "student.lora") -> Any:
    """The module peft. Raises InputError where it is not installed; why: what needs it."""
    try:
        import peft
    except ImportError:
        raise InputError(f"{why}, and peft is not installed", "peft 0.21.2 or newer",
                         "pip install 'amid-ds[lora]'") from None
    return peft
