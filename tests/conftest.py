"""Models and data that are made once a session: read only. A test that changes one copies it."""

import atexit
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# For `from support...`, however pytest is started.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

# Before anything imports triton: its kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test may use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# trackio reads it once a process, whichever test's package has imported it.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """(size, time of the last change) of `folder`, or of every file under it."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in (folder, *folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def propagating_logger(monkeypatch) -> None:
    """Let caplog, a handler of the root, hear the package also after a test has called main()."""
    monkeypatch.setattr(logging.getLogger("amid_ds"), "propagate", True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Iterator[Callable[[str, Callable[[Path], object]], Path]]:
    """make(name, fill): the path `name`, filled once a session. At its end it must be unchanged."""
    root = tmp_path_factory.mktemp("shared")
    before: dict[Path, tuple[int, int]] = {}

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        path = root / name
        if not path.exists():
            fill(path)
            before.update(snapshot(path))
        return path

    yield make
    assert snapshot(root) == before, "a test has changed what the session shares"


@pytest.fixture(scope="session")
def shared_model(shared_folder) -> Callable[..., Path]:
    """model(family, seed, **changes): a folder as support.models.make_model makes it."""
    from support.models import make_model

    def model(family: str, seed: int = 0, **changes: object) -> Path:
        name = "-".join([family, str(seed), *(f"{key}={changes[key]}" for key in sorted(changes))])
        return shared_folder(name, lambda path: make_model(path, family, seed, **changes))
    return model


@pytest.fixture(scope="session")
def llama_pair(shared_model) -> tuple[Path, Path]:
    """(student, teacher): two Llamas, the teacher twice as wide."""
    return (shared_model("llama", 0),
            shared_model("llama", 1, hidden_size=64, intermediate_size=96))


@pytest.fixture(scope="session")
def text_file(shared_folder) -> Path:
    """60 rows of text."""
    from support.data import write_texts

    return shared_folder("text.jsonl", write_texts)


@pytest.fixture(scope="session")
def instructions_file(shared_folder) -> Path:
    """60 rows of a prompt and a response."""
    from support.data import write_instructions

    return shared_folder("rows.jsonl", write_instructions)


@pytest.fixture(scope="session")
def tokenizer_folder(shared_folder) -> Path:
    """A sentencepiece tokenizer of 310 tokens, of the words word0 to word299."""
    from support.models import make_sentencepiece

    return shared_folder("tokenizer", make_sentencepiece)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """The tokenizer of tokenizer_folder. Read only: a test that needs another loads its own."""
    from amid_ds.data import load_tokenizer

    return load_tokenizer(str(tokenizer_folder))
