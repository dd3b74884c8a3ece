"""Imports made once by the fork server, so that a test's ranks start in a tenth of a second.

Importing torch, DeepSpeed and transformers takes each process seconds. The ranks are real processes
with real engines; they share only the imports. Never imported by a test's own process.
"""

import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch reads it once, at its import. One thread is what every launcher gives a rank.
os.environ["OMP_NUM_THREADS"] = "1"

from amid_ds.engine.backend import import_deepspeed

import_deepspeed()
for name in (
        "amid_ds.bench", "amid_ds.cli", "amid_ds.eval.evaluate", "amid_ds.experiments.demo",
        "amid_ds.training.train",
        "datasets", "pandas",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._inductor.compile_fx", "torch.utils.tensorboard",
        "transformers.integrations.deepspeed",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
):
    importlib.import_module(name)
