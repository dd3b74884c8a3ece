import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))      # tests share small.py

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports triton: its kernels then run on the CPU

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # no test may reach for the network


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A sentencepiece tokenizer of 310 tokens. A test may set its chat template: each module has its own."""
    from amid_ds.data import load_tokenizer, train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece((f"word{i} and number {i * 7}\n\tindented é {i}" for i in range(300)), folder, vocab_size=310)
    return load_tokenizer(str(folder))
