"""Causal language models from a folder or the hub: config, meta model, weights, and which
models are supported.

`revision` and `trust_remote_code` are the recipe's (`HubKwargs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from amid_ds.config.recipe import Dtype
from amid_ds.errors import InputError
from amid_ds.models.heads import body_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The longest excerpt of an error of transformers in a message.
MAX_REASON = 200


def load_causal_lm(model: str, dtype: Dtype, zero3_config: Mapping[str, object] | None = None,
                   revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM with its weights; dtype "auto" is the checkpoint's.

    With a DeepSpeed config of ZeRO-3 it is loaded straight into shards (collective): rank 0 reads,
    each rank keeps its part. Without one every rank loads all of it.
    """
    from transformers import AutoModelForCausalLM
    from transformers import logging as transformers_logging
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    # Its advice on generation and padding does not apply here.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch_dtype = DTYPES.get(dtype) or checkpoint_dtype(model, revision, trust_remote_code)
    if zero3_config is not None:
        bf16 = {"enabled": torch_dtype == torch.bfloat16}
        config_holder = _Zero3Config({**zero3_config, "bf16": bf16})
        set_hf_deepspeed_config(config_holder)
    try:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=torch_dtype,
                                                    trust_remote_code=trust_remote_code)
    finally:
        if zero3_config is not None:
            unset_hf_deepspeed_config()


class _Zero3Config:
    """The part of transformers' HfDeepSpeedConfig that from_pretrained reads: it builds the model
    under zero.Init with this config.

    transformers holds it by a weak reference, so it must live as long as the loading.
    """

    def __init__(self, config: dict[str, object]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def model_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's transformers config, without its weights. Raises InputError if it has none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision,
                                          trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"the model {model!r} comes with Python code of its own",
                             "one that transformers knows",
                             "read its code; if you trust it, set trust_remote_code: true beside "
                             "the model in your own recipe (student.trust_remote_code also for a "
                             "run that the student is), or give the command --trust-remote-code"
                             ) from None
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"no model can be read from {model!r}: {first_line}",
                         "a folder with config.json and weights, or the id of a model on the hub",
                         "check the path; relative paths start where the command is run") from None


def meta_model(model: str, revision: str | None = None, trust_remote_code: bool = False
               ) -> nn.Module:
    """The model without its weights: every parameter on the meta device.

    Raises InputError if there is no such model, and what transformers raises for one of no causal
    architecture.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(model, revision, trust_remote_code),
                                                trust_remote_code=trust_remote_code)


def require_supported(model: str, revision: str | None = None, trust_remote_code: bool = False
                      ) -> None:
    """Raise InputError for a model that the engine or the fused head does not support.

    Judged by its config and its meta model, without its weights.
    """
    config = model_config(model, revision, trust_remote_code)
    reason = _unsupported_reason(config, model, revision, trust_remote_code)
    if reason is not None:
        raise InputError(f"the model {model} (model_type {config.model_type}) cannot be distilled "
                         f"here: {reason}",
                         "a causal language model of transformers: a body, a linear head, weights "
                         "in bf16 or fp32",
                         "choose such a model, or save this one's weights unquantized with "
                         "save_pretrained")


def _unsupported_reason(config: Any, model: str, revision: str | None, trust_remote_code: bool
                        ) -> str | None:
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    try:
        module: Any = meta_model(model, revision, trust_remote_code)
    except (ValueError, ImportError, KeyError) as error:
        return str(error).strip().splitlines()[0][:MAX_REASON]
    if not isinstance(module.get_output_embeddings(), nn.Linear) or body_of(module) is module:
        return f"{type(module).__name__} is not a body with one linear head"
    return None


def checkpoint_dtype(model: str, revision: str | None = None, trust_remote_code: bool = False
                     ) -> torch.dtype:
    """The dtype in the checkpoint's config; fp32 if it names none that models run in here."""
    named = model_config(model, revision, trust_remote_code).dtype
    return named if named in DTYPES.values() else torch.float32
