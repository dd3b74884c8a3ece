"""Causal language models from a folder or the hub: config, meta model, weights, and which
models are supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from amid_ds.config.recipe import Dtype
from amid_ds.errors import InputError
from amid_ds.models.heads import body_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_causal_lm(model: str, dtype: Dtype, zero3_config: Mapping[str, Any] | None = None,
                   revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM. With a DeepSpeed config of ZeRO-3 it is loaded straight into shards: rank 0 reads, each rank keeps
    its part. Without one every rank loads it whole."""
    from transformers import AutoModelForCausalLM
    from transformers import logging as transformers_logging
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    transformers_logging.set_verbosity_error()      # its advice on generating and padding is not for us
    transformers_logging.disable_progress_bar()
    torch_dtype = DTYPES.get(dtype) or checkpoint_dtype(model, revision, trust_remote_code)
    if zero3_config is None:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch_dtype,
                                                    trust_remote_code=trust_remote_code)
    holder = _ShardedLoading({**zero3_config, "bf16": {"enabled": torch_dtype == torch.bfloat16}})
    set_hf_deepspeed_config(holder)
    try:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch_dtype,
                                                    trust_remote_code=trust_remote_code)
    finally:
        unset_hf_deepspeed_config()


class _ShardedLoading:
    """What from_pretrained asks to know whether, and with which config, to build a model under zero.Init."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def model_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's transformers config, without its weights. Raises InputError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"the model {model!r} comes with Python code of its own", "one that transformers knows",
                             "read its code; if you trust it, set trust_remote_code: true beside the model") from None
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"no model can be read from {model!r}: {first_line}",
                         "a folder with config.json and weights, or the id of a model on the hub",
                         "check the path; relative paths start where the command is run") from None


def meta_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model without its weights: every parameter on the meta device. Raises what transformers raises."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(model, revision, trust_remote_code),
                                                trust_remote_code=trust_remote_code)


def require_supported(model: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise InputError for a model that the one engine or the fused head cannot take. Judged without its weights."""
    config = model_config(model, revision, trust_remote_code)
    problem = None
    if getattr(config, "quantization_config", None) is not None:
        problem = "its weights are quantized"
    else:
        try:
            shell: Any = meta_model(model, revision, trust_remote_code)
        except (ValueError, ImportError, KeyError) as error:
            problem = str(error).strip().splitlines()[0][:200]
        else:
            head = shell.get_output_embeddings()
            if not isinstance(head, nn.Linear) or body_of(shell) is shell:
                problem = f"{type(shell).__name__} is not a body with one linear head"
    if problem is not None:
        raise InputError(f"the model {model} (model_type {config.model_type}) cannot be distilled here: {problem}",
                         "a causal language model of transformers: a body, a linear head, weights in bf16 or fp32",
                         "choose such a model, or save this one's weights unquantized with save_pretrained")


def checkpoint_dtype(model: str, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that the checkpoint's config names; fp32 where it names none that we run in."""
    named = model_config(model, revision, trust_remote_code).dtype
    return named if named in DTYPES.values() else torch.float32
