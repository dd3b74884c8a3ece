"""Quantized checkpoints: which stored tensors make each weight, by transformers' own arithmetic.

transformers has for each kind of quantization the names under which a weight is stored (values,
scales, zero points) and an operation that makes the weight of them while it loads a model. Here
that operation runs on one weight at a time, and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.models.shape import text_config

# Of the dtypes in files these are numbers; values in any other are codes.
PLAIN_DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "BOOL")
# Of quantized activations and caches, which a weight in full does not need.
OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale",
                  ".output_zero_point", ".activation_scale", ".q_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in full, and what is stored of it.

    name: as in a folder that is not quantized. parts: the stored names by the quantization's own
    (`weight`, `weight_scale_inv`, …); empty: it is stored in full, as `name`.
    """

    name: str
    parts: Mapping[str, str]

    @property
    def stored(self) -> list[str]:
        """The names in the files of all that is read for it."""
        return list(self.parts.values()) or [self.name]


class Quantization:
    """The arithmetic of one quantized checkpoint.

    config: the model's, with its `quantization_config`. dtype: of the weights that are made.
    Raises InputError where transformers does not undo this quantization as it loads.
    """

    def __init__(self, model: str, config: Any, dtype: torch.dtype) -> None:
        self.model = model
        self._quantizer = quantizer_of(model, config)
        self._operation = self._quantizer.get_load_operations()["dequantize"](self._quantizer)
        self._destination = _Destination(torch.empty(0, dtype=dtype))

    def weights(self, dtypes: Mapping[str, str], meta: Any) -> list[QuantizedWeight]:
        """The weights that are made of the stored tensors, given by name with their files' dtypes.

        meta: the model without weights. What belongs to quantized activations is left out. Raises
        InputError for codes that this quantization does not know.
        """
        found: dict[str, dict[str, str]] = {}
        for stored, name in self._renamed(dtypes, meta).items():
            if not name.endswith(OF_ACTIVATIONS):
                weight, part = self._split(name)
                found.setdefault(weight, {})[part] = stored
        weights = []
        for weight, parts in found.items():
            # Alone, and under its own name: stored in full.
            is_plain = list(parts) == [weight.rpartition(".")[2]]
            if is_plain and (dtype := dtypes[next(iter(parts.values()))]) not in PLAIN_DTYPES:
                raise InputError(f"{weight} of {self.model} is stored as {dtype} without a scale",
                                 "values of its quantization with their scales, or numbers",
                                 "copy or download the model again")
            weights.append(QuantizedWeight(weight, {} if is_plain else parts))
        return weights

    def _renamed(self, stored: Iterable[str], meta: Any) -> dict[str, str]:
        """By each stored name the one that the quantizer's operations know."""
        from transformers.core_model_loading import WeightRenaming

        renamings = [each for each in self._quantizer.update_weight_conversions([], meta)
                     if isinstance(each, WeightRenaming)]
        renamed = {}
        for name in stored:
            new = name
            for renaming in renamings:
                new, _ = renaming.rename_source_key(new)
            renamed[name] = new
        return renamed

    def _split(self, name: str) -> tuple[str, str]:
        """(weight, part) of a name: `a.weight_scale` is the part `weight_scale` of `a.weight`."""
        module, _, last = name.rpartition(".")
        for parameter, parts in self._quantizer.serialized_names.items():
            if last in parts:
                return f"{module}.{parameter}", last
        return name, last

    def make(self, weight: QuantizedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """A weight in full; parts: its stored tensors, by the quantization's names.

        On the meta device it has the shape alone.
        """
        if "weight_scale_inv" in parts:
            return self._make_of_blocks(weight, parts)
        return self._convert(weight, parts)

    def _make_of_blocks(self, weight: QuantizedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """`make` of values with a scale for each block, the last of which may be partly outside.

        As in DeepSeek-V3's 576 rows in blocks of 128, which transformers' operation does not take.
        """
        values, scales = parts["weight"], parts["weight_scale_inv"]
        block = self._quantizer.quantization_config.weight_block_size or (1, 1)
        rows, columns = values.shape[-2:]
        missing = (0, -columns % block[1], 0, -rows % block[0])
        # Scales of other blocks than the config's (packed codes of 4 bits) say themselves of which.
        if not any(missing) or tuple(scales.shape[-2:]) != (-(-rows // block[0]),
                                                            -(-columns // block[1])):
            return self._convert(weight, parts)
        padded = torch.nn.functional.pad(values.view(torch.uint8), missing).view(values.dtype)
        return self._convert(weight, {**parts, "weight": padded})[..., :rows, :columns].contiguous()

    def _convert(self, weight: QuantizedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """`make` by transformers' operation."""
        operation, each = self._operation, ""
        if weight.name.endswith(".weight") and ".experts." in weight.name:
            if _left_out_of_experts(parts):
                operation = self._dense_operation_for_experts()
            else:
                # It tells experts, which it stacks as it loads, by the names of their parts.
                each = "experts."
        made = operation.convert(
            {f"{each}{part}": [tensor] if each else tensor for part, tensor in parts.items()},
            full_layer_name=weight.name, model=self._destination, source_patterns=[],
            target_patterns=[])
        tensor: Tensor = next(iter(made.values()))
        if each:
            tensor = tensor[0]
        return tensor.to(self._destination.tensor.dtype)

    def _dense_operation_for_experts(self) -> Any:
        """compressed-tensors' operation for dense layers, with the section of the experts."""
        from transformers.integrations.compressed_tensors import get_experts_scheme

        scheme = get_experts_scheme(self._quantizer.compressor.quantization_config)
        return type(self._operation)(self._quantizer, scheme=scheme)


def _left_out_of_experts(parts: Mapping[str, Tensor]) -> bool:
    """True for parts of an expert's weight that transformers' operation for experts leaves out.

    In 5.24 these are compressed-tensors' zero points, second scales (of NVFP4: without them it is
    wrong by their factor, and does not say so) and scales of blocks.
    """
    if {"weight_zero_point", "weight_global_scale"} & parts.keys():
        return True
    values, scales = parts.get("weight"), parts.get("weight_scale")
    return (values is not None and scales is not None
            and scales.numel() not in (1, values.shape[0]))


@dataclass(frozen=True)
class _Destination:
    """Stands for the model that a weight is loaded into, which is asked for the weight's dtype."""

    tensor: Tensor

    def get_submodule(self, _: str) -> _Destination:
        return self

    def get_parameter(self, _: str) -> Tensor:
        return self.tensor

    def __getattr__(self, _: str) -> Tensor:
        return self.tensor


def quantization_config(config: Any) -> Any:
    """The `quantization_config` of a model's config, or of its language model's; None: none."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(text_config(config), "quantization_config", None)


def refuse_quantized(model: str, config: Any) -> None:
    """Raise InputError for a config of quantized weights, which nothing here trains or runs."""
    if quantization_config(config) is not None:
        raise InputError(f"the weights of {model} are quantized", "weights in bf16 or fp32",
                         f"make an ordinary folder of it: amid-ds dequantize {model} OUT")


def quantizer_of(model: str, config: Any) -> Any:
    """transformers' quantizer of a checkpoint, set to undo the quantization.

    Raises InputError where it cannot.
    """
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings = quantization_config(config)
    if settings is None:
        raise InputError(f"{model} is not quantized: its config.json has no quantization_config",
                         "a quantized model", "use it as it is")
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    try:
        own = AutoQuantizationConfig.from_dict(settings)
        own.dequantize = True
        quantizer = AutoHfQuantizer.from_config(own, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
        operations = quantizer.get_load_operations()
    except ImportError as error:
        raise InputError(f"the weights of {model} are quantized by {method}, and its package is "
                         f"missing: {str(error).strip().splitlines()[0]}", "that package",
                         "pip install 'amid-ds[quantized]'") from None
    # AttributeError: transformers before 5.22.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        from transformers import __version__

        raise InputError(f"transformers {__version__} cannot undo the quantization of {model} "
                         f"({method}): {str(error).strip().splitlines()[0]}",
                         "fp8, mxfp4 or compressed-tensors, and transformers 5.22 or newer",
                         "pip install -U transformers, or take another copy of the model"
                         ) from None
    if "dequantize" not in operations:
        raise InputError(f"the weights of {model} are quantized by {method}, which transformers "
                         "does not undo as it loads", "fp8, mxfp4 or compressed-tensors",
                         "take a copy of the model in bf16; or where the method's package has a "
                         "`dequantize` of its own, load the model, call it, and save_pretrained")
    return quantizer
