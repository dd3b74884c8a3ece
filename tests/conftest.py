import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))      # tests share small.py

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports triton: its kernels then run on the CPU

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # no test may reach for the network
