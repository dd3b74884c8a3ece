"""Packages of fused kernels that a model's own code would use where they are installed.

transformers takes its linear attention and state-space layers from them on a GPU, and runs plain
PyTorch without. Which ones are named in the source of the modules that define the model's classes.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys

from torch import nn

# Distribution, the name under which it is imported, and how source names it.
KERNEL_PACKAGES = (
    ("flash-linear-attention", "fla", r"\bfla\b|\bflash[-_]linear[-_]attention\b"),
    ("causal-conv1d", "causal_conv1d", r"\bcausal[-_]conv1d\b"),
    ("mamba-ssm", "mamba_ssm", r"\bmamba[-_]ssm\b"))


def kernel_packages(model: nn.Module) -> dict[str, bool]:
    """The packages that `model`, on any device, would use: is it installed, by its name."""
    source = "\n".join(_source(name) for name in sorted(
        {type(module).__module__ for module in model.modules()}) if not name.startswith("torch."))
    return {package: is_installed(imported)
            for package, imported, pattern in KERNEL_PACKAGES if re.search(pattern, source)}


def is_installed(package: str) -> bool:
    """True where Python finds a package of that name; it is not imported."""
    return importlib.util.find_spec(package) is not None


def _source(module_name: str) -> str:
    try:
        return inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return ""
