"""Folders that hold adapters instead of a model: which base they are of, and both as one model.

Such a folder is what `amid-ds export` leaves of a run with `student.lora`, and what peft saves. Its
adapter_config.json names the model that the adapters change: a folder, or an id on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from typing_extensions import NotRequired, TypedDict

from amid_ds.config.recipe import Dtype, HubKwargs
from amid_ds.config.typed_json import parse_as
from amid_ds.errors import InputError
from amid_ds.models.adapters import (
    CONFIG_FILE,
    apply_adapters,
    import_peft,
    is_adapter_folder,
)
from amid_ds.models.loading import load_causal_lm

ADAPTER_FILE = "adapter_model.safetensors"


class _AdapterConfig(TypedDict):
    """What is read of adapter_config.json here."""

    base_model_name_or_path: str
    revision: NotRequired[str | None]


@dataclass(frozen=True)
class ModelSource:
    """A model to be judged: `model` has its config, `adapters` is a folder of what changes it.

    adapters: None for a model by itself.
    """

    model: str
    revision: str | None
    trust_remote_code: bool
    adapters: str | None

    @property
    def hub_kwargs(self) -> HubKwargs:
        """Keyword arguments for transformers, to go with `model`."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load(self, dtype: Dtype) -> nn.Module:
        """The model with its weights, adapters merged.

        dtype auto: that of its own files, of adapters that of their tensors. Raises InputError
        where a part is missing, or the adapters are of another model.
        """
        if self.adapters is None:
            return load_causal_lm(self.model, dtype, **self.hub_kwargs)
        own = _dtype_of(Path(self.adapters)) if dtype == "auto" else dtype
        return apply_adapters(load_causal_lm(self.model, own, **self.hub_kwargs), self.adapters)


def model_source(model: str, revision: str | None = None,
                 trust_remote_code: bool = False) -> ModelSource:
    """The places of the parts of `model`: a model's folder or id, or a folder of adapters.

    Raises InputError for adapters whose base is not there, or not named, or without peft.
    """
    if not is_adapter_folder(model):
        return ModelSource(model, revision, trust_remote_code, None)
    import_peft(f"{model} holds adapters")
    file = Path(model) / CONFIG_FILE
    try:
        config = parse_as(_AdapterConfig, file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", "what peft saves beside adapters",
                         "export the run again") from None
    base = config["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"{model} holds adapters of the model {base}, which is not there",
                         "the model that the adapters were trained on",
                         f"bring it back, or correct base_model_name_or_path in {file}")
    return ModelSource(base, config.get("revision"), trust_remote_code, model)


def _dtype_of(folder: Path) -> Dtype:
    """The dtype of the adapters in a folder; auto: none that models are loaded in."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, "pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}   # noqa: SIM118
    except (OSError, SafetensorError):
        # peft reads other files too, and says what is wrong.
        return "auto"
    return "fp32" if "F32" in dtypes else "bf16" if dtypes == {"BF16"} else "auto"
