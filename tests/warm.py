"""What the fork server imports once, so that a test's ranks start in a tenth of a second instead of seconds.

The ranks are real processes with real engines; only the imports are shared. The launchers are tested apart.
"""

import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"     # read once, when torch is imported: what every launcher sets for a rank

from amid_ds.engine.backend import import_deepspeed

import_deepspeed()
for name in ("amid_ds.bench", "amid_ds.cli", "amid_ds.experiments.demo", "amid_ds.eval.evaluate", "amid_ds.training.trainer", "datasets", "pandas",
             "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx", "torch.utils.tensorboard",
             "transformers.integrations.deepspeed", "transformers.models.llama.modeling_llama",
             "transformers.models.gpt2.modeling_gpt2", "transformers.models.qwen2.modeling_qwen2"):
    importlib.import_module(name)
