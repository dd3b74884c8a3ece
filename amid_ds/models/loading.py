"""Causal language models from a folder or the hub: config, meta model, weights, and which
models are supported.

`revision` and `trust_remote_code` are the recipe's (`HubKwargs`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from amid_ds.config.recipe import Dtype, Teacher
from amid_ds.distributed.devices import name_accelerator
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.models.adapters import is_adapter_folder
from amid_ds.models.head_form import head_form
from amid_ds.models.hollow import hollow_causal_lm
from amid_ds.models.language_part import (
    is_multimodal,
    language_config,
    multimodal_model,
    places_in_whole,
    why_not_apart,
)
from amid_ds.models.quantized import refuse_quantized
from amid_ds.models.shape import body_of, head_module, text_config
from amid_ds.models.weight_files import WeightTable
from amid_ds.models.weight_map import WeightMap
from amid_ds.models.weight_reader import WeightReader
from amid_ds.models.weights import (
    named_weights,
    readable_weights,
    reason_of,
    refuse_other_keys,
    require_weights,
    share_weight_table,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# More than any model has: the meta model is built layer by layer.
MAX_LAYERS = 10_000


def load_causal_lm(model: str, dtype: Dtype, zero3_config: Mapping[str, object] | None = None,
                   revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM with its weights; dtype "auto" is the checkpoint's.

    With a DeepSpeed config of ZeRO-3 it is loaded straight into shards (collective): rank 0 reads,
    each rank keeps its part. Without one every rank loads all of it. Raises InputError, before the
    first collective, where its weights are not exactly those of its config.
    """
    from transformers import AutoModelForCausalLM

    torch_dtype = DTYPES.get(dtype) or checkpoint_dtype(model, revision, trust_remote_code)
    meta, whole = _part_and_whole(model, revision, trust_remote_code)
    found = require_weights(meta, model, revision, whole=whole)
    if whole is not None:
        assert found is not None
        return _load_language_part(model, torch_dtype, _reader(model, *found), revision)
    bf16 = {"enabled": torch_dtype == torch.bfloat16}
    with (contextlib.nullcontext() if zero3_config is None
          else from_pretrained_into_shards({**zero3_config, "bf16": bf16}),
          readable_weights(model)):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=torch_dtype, output_loading_info=True,
            trust_remote_code=trust_remote_code)
    # Sharded by transformers, tied weights are not compared.
    untied = meta.all_tied_weights_keys.keys() - loaded.all_tied_weights_keys.keys()
    refuse_other_keys(model, {**report, "untied": untied})
    return loaded


def _load_language_part(model: str, dtype: torch.dtype, reader: WeightReader | str,
                        revision: str | None) -> nn.Module:
    """All of the language part of a multimodal model, in memory of this process."""
    if isinstance(reader, str):
        raise InputError(f"the language part of {model} cannot be read by itself: {reader}",
                         "safetensors files whose tensors become its weights as they are",
                         "save its language model by itself with save_pretrained")
    part = hollow_causal_lm(model, dtype, revision)
    # By what they are: a tied one is there under each of its names.
    made: dict[int, torch.Tensor] = {}
    tensors = {name: made.setdefault(id(tensor), torch.empty_like(tensor, device="cpu"))
               for name, tensor in part.state_dict(keep_vars=True).items()}
    sources = {id(tensors[name]): reader.sources[name] for name in tensors}
    with reader, readable_weights(model):
        refuse_other_keys(model, {"untied": reader.unequal_twins(0, 1)})
        reader.fill((sources[id(tensor)], 0, tensor.view(-1)) for tensor in made.values())
    part.load_state_dict(tensors, assign=True)
    part.tie_weights()   # type: ignore[operator]
    return part


@contextlib.contextmanager
def from_pretrained_into_shards(config: Mapping[str, object]) -> Iterator[None]:
    """A context in which from_pretrained loads under ZeRO-3 with this DeepSpeed config."""
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    # transformers holds it by a weak reference.
    held = _Zero3Config(config)
    set_hf_deepspeed_config(held)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class _Zero3Config:
    """The part of transformers' HfDeepSpeedConfig, which needs a package more, that it reads."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def model_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a causal LM, without its weights: of a multimodal model that of
    its language part. Raises InputError if it has none."""
    return language_config(stored_config(model, revision, trust_remote_code))


def stored_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config in a model's config.json, of several parts where it is multimodal.

    Raises InputError if there is none that transformers knows.
    """
    name_accelerator()
    from transformers import AutoConfig

    if is_adapter_folder(model):
        refuse_adapters(model)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision,
                                            trust_remote_code=trust_remote_code)
        _require_possible_sizes(config)
        return config
    # Its class divides by its values and looks them up before anybody has judged them.
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"the model {model!r} comes with Python code of its own",
                             "one that transformers knows",
                             "read its code; if you trust it, set trust_remote_code: true beside "
                             "the model in your own recipe (student.trust_remote_code also for a "
                             "run that the student is), or give the command --trust-remote-code"
                             ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "does not recognize this architecture" in reason:
            raise _unknown_type(model, revision) from None
        raise InputError(f"no model can be read from {model!r}: {reason}",
                         "a folder with config.json and weights, or the id of a model on the hub",
                         "check the path; relative paths start where the command is run") from None


def _unknown_type(model: str, revision: str | None) -> InputError:
    """The error of a model_type that the installed transformers has no class for."""
    import transformers

    stored = transformers.PreTrainedConfig.get_config_dict(model, revision=revision)[0]
    written = stored.get("transformers_version")
    by = "" if written is None else f", and transformers {written} wrote its config.json"
    return InputError(f"the model {model} has the model_type {stored.get('model_type')!r}, which "
                      f"the installed transformers {transformers.__version__} does not know{by}",
                      "a model_type that the installed transformers has a class for",
                      "install a newer transformers, which may know it (pip install --upgrade "
                      "transformers), or choose another model")


def refuse_adapters(folder: str) -> NoReturn:
    """Raise the InputError of a folder of adapters where a model must be."""
    raise InputError(f"{folder} holds adapters, and is no model by itself", "a whole model",
                     "merge them into one: amid-ds export RUN OUT --merge, of the run that trained "
                     "them; as student.model that run itself will do")


def _require_possible_sizes(config: Any) -> None:
    """Raise ValueError for a number of layers that a class would build without an end."""
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers} in its config.json, "
                         f"more than {MAX_LAYERS}")


def resolved_commit(model: str, revision: str | None = None) -> str | None:
    """The commit that `revision` of a model on the hub is now; None for a folder.

    Without a network that of the local cache, and None where it has none.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    if Path(model).exists():
        return None
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except (OSError, ValueError):
        return None


def meta_model(model: str, revision: str | None = None, trust_remote_code: bool = False
               ) -> nn.Module:
    """The model without its weights: every parameter on the meta device.

    Raises InputError if there is no such model, none of a causal architecture, or a quantized one.
    """
    return _language_model(model, stored_config(model, revision, trust_remote_code),
                           trust_remote_code)


def _language_model(model: str, stored: Any, trust_remote_code: bool) -> Any:
    """The causal LM of a config, which a multimodal one is changed for, on the meta device."""
    from transformers import AutoModelForCausalLM

    refuse_quantized(model, stored)
    config = language_config(stored)
    if is_multimodal(stored) and (reason := why_not_apart(stored, config)) is not None:
        raise _unsupported(model, stored, reason)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # What transformers makes of an encoder, or of values that its class does not take.
    except Exception as error:
        raise _unsupported(model, config, reason_of(error)) from None


def _part_and_whole(model: str, revision: str | None, trust_remote_code: bool
                    ) -> tuple[Any, nn.Module | None]:
    """(the meta model, the multimodal one that it is a part of); its config is read once."""
    stored = stored_config(model, revision, trust_remote_code)
    part = _language_model(model, copy.deepcopy(stored), trust_remote_code)
    return part, _whole_of(part, model, stored)


def _whole_of(part: nn.Module, model: str, stored: Any) -> nn.Module | None:
    """All of the multimodal model that `part` is the language part of, every parameter on the meta
    device; None of any other. Raises InputError where it has no such part."""
    if not is_multimodal(stored):
        return None
    try:
        whole = multimodal_model(stored)
        places_in_whole(part, whole)
    # Towers may need packages that are not there.
    except Exception as error:
        raise _unsupported(model, stored, reason_of(error)) from None
    return whole


def supported_model(model: str, revision: str | None = None, trust_remote_code: bool = False
                    ) -> nn.Module:
    """The meta model of one that the engine and the fused head support.

    Raises InputError for any other, judged without its weights.
    """
    return _supported(model, revision, trust_remote_code)[0]


def _supported(model: str, revision: str | None, trust_remote_code: bool
               ) -> tuple[nn.Module, nn.Module | None]:
    """(meta model, the multimodal one that it is a part of) of one that is supported."""
    stored = stored_config(model, revision, trust_remote_code)
    module = _language_model(model, copy.deepcopy(stored), trust_remote_code)
    config, name = module.config, type(module).__name__
    if text_config(module) is not module.config:
        raise _unsupported(model, config, f"{name} is multimodal: the language model's numbers are "
                                          "nested in its config")
    if not isinstance(head_module(module), nn.Linear) or body_of(module) is module:
        raise _unsupported(model, config, f"{name} is not a body with one linear head")
    try:
        head_form(module)
    except InputError as error:
        raise _unsupported(model, config, error.found) from None
    return module, _whole_of(module, model, stored)


def require_supported(model: str, revision: str | None = None, trust_remote_code: bool = False
                      ) -> nn.Module:
    """The meta model of one that is supported and whose weight files are those of its config.

    The files are judged by their headers, where they are on this machine. Raises InputError.
    """
    meta, whole = _supported(model, revision, trust_remote_code)
    require_weights(meta, model, revision, fetch=False, whole=whole)
    return meta


def open_weights(model: str, revision: str | None = None, trust_remote_code: bool = False,
                 world: World | None = None) -> WeightReader | str:
    """A reader of ranges of the weights of `model`, or why they can only be loaded whole.

    Its `sources` have the names of the model's parameters. With a world every rank opens the files
    that rank 0 has read the headers of: collective, and an error of one is an error of all. Raises
    InputError where the weights are not exactly those of the model's config.
    """
    def shapes() -> tuple[Any, nn.Module | None]:
        return _part_and_whole(model, revision, trust_remote_code)

    meta, whole = shapes() if world is None else world.run_checked(shapes)
    table = None
    if world is not None:
        named = named_weights(meta if whole is None else whole)
        table = share_weight_table(world, model, revision, named)

    def read() -> WeightReader | str:
        found = require_weights(meta, model, revision, table=table, whole=whole)
        assert found is not None
        return _reader(model, *found)

    return read() if world is None else world.run_checked(read)


def _reader(model: str, table: WeightTable, mapped: WeightMap) -> WeightReader | str:
    with readable_weights(model):
        return mapped.reason or WeightReader(table, mapped.sources, twins=mapped.twins)


def _unsupported(model: str, config: Any, reason: str) -> InputError:
    return InputError(f"the model {model} (model_type {config.model_type}) cannot be distilled "
                      f"here: {reason}",
                      "a causal language model of transformers: a body, a linear head, weights "
                      "in bf16 or fp32",
                      "choose such a model, or save this one's weights unquantized, its language "
                      "model by itself, with save_pretrained")


def checkpoint_dtype(model: str, revision: str | None = None, trust_remote_code: bool = False
                     ) -> torch.dtype:
    """The dtype in the checkpoint's config; fp32 if it names none that models run in here."""
    named = model_config(model, revision, trust_remote_code).dtype
    return named if named in DTYPES.values() else torch.float32


def in_one_dtype(models: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """`frozen_models` with the teacher's dtype in place of several `auto`: one head sums them."""
    if len(models) < 2 or models["teacher"].dtype != "auto":
        return dict(models)
    teacher = models["teacher"]
    stored = checkpoint_dtype(teacher.model, **teacher.hub_kwargs)
    dtype = "bf16" if stored.itemsize == 2 else "fp32"
    return {key: model.model_copy(update={"dtype": dtype}) for key, model in models.items()}
