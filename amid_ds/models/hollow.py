"""Models without their weights: transformers' own loading, all of it but the reading.

from_pretrained does more than read: it chooses the attention, ties weights, computes buffers that
no file holds, reads the generation config. Here it runs with its reader taken out, so that weights
can be read in another way, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from amid_ds.models.language_part import language_config


def hollow_causal_lm(model: str, dtype: torch.dtype, revision: str | None = None,
                     trust_remote_code: bool = False) -> nn.Module:
    """The causal LM that from_pretrained would return, its weights on the meta device; of a
    multimodal model its language part.

    What files hold is there: parameters, tied as the model ties them, and the buffers of its state
    dict. Other buffers are computed, on the CPU. No file of weights is opened or looked for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = language_config(AutoConfig.from_pretrained(
        model, revision=revision, trust_remote_code=trust_remote_code))
    with _nothing_read():
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            model, config=config, revision=revision, dtype=dtype,
            trust_remote_code=trust_remote_code)
    return loaded


@contextmanager
def _nothing_read() -> Iterator[None]:
    """A context in which from_pretrained finds no files and reads none."""
    from transformers import PreTrainedModel, modeling_utils
    from transformers.utils.loading_report import LoadStateDictInfo

    def load(model: Any, *_: Any) -> tuple[LoadStateDictInfo, None]:
        # Both of a tied pair count as found, so that transformers leaves them as they are.
        model.tie_weights(recompute_mapping=False)
        for tensor in model.state_dict(keep_vars=True).values():
            # Else it would be given random numbers.
            tensor._is_hf_initialized = True
        empty: Any = {name: set() for name in LoadStateDictInfo.__dataclass_fields__}
        return LoadStateDictInfo(**{**empty, "conversion_errors": {}}), None

    def find(*_: Any, **__: Any) -> tuple[None, None]:
        return None, None

    kept = PreTrainedModel.__dict__["_load_pretrained_model"]
    kept_find = modeling_utils._get_resolved_checkpoint_files
    PreTrainedModel._load_pretrained_model = staticmethod(load)
    modeling_utils._get_resolved_checkpoint_files = find
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = kept
        modeling_utils._get_resolved_checkpoint_files = kept_find
