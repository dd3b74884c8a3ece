"""`bench data`: the speed of preparing and reading data, beside the tokenizer's alone.

All on the same text and the same core: one process, `tokenizers`' own threads off, methods in
turn, medians over rounds. The ratios can be trusted where the numbers cannot. The text is Python's
standard library, and the tokenizer is trained on it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from amid_ds import preset
from amid_ds.config import recipe
from amid_ds.data import Batch, PreparedLoader, load_tokenizer, prepare, train_sentencepiece
from amid_ds.data.tokenizer import encode_texts
from amid_ds.experiments import demo
from amid_ds.experiments.small_models import new_llama
from amid_ds.models.distiller import Distiller, LossPart, StepObjective

ROW_LENGTH, ROWS_PER_STEP, MICRO_BATCH = 512, 64, 8
TOKENIZER_SIZE = 4000
# Texts that the tokenizer encodes in one call.
TEXTS_PER_CALL = 16
MIN_EPOCHS = 2


@dataclass(frozen=True)
class DataRow:
    """One line of the table: tokens per second, and as a multiple of the tokenizer's alone."""

    what: str
    tokens_per_second: float
    of_tokenizer: float


def bench_data(as_json: bool = False) -> None:
    """`amid-ds bench data`: print the rows as a table, or as JSON."""
    rows = measure_data()
    tokenizer_speed = next(row for row in rows if row.of_tokenizer == 1).tokens_per_second
    training_speed = demo_speed()
    rows.append(DataRow("the demo's distillation takes", training_speed,
                        training_speed / tokenizer_speed))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        _print_data(rows)


def measure_data(rounds: int = 3, megabytes: float = 4.0, threads: int = 4) -> list[DataRow]:
    """The tokenizer alone, `prepare` in one process, and the loader with and without threads."""
    with tempfile.TemporaryDirectory() as name, _one_core():
        root = Path(name)
        texts = list(_standard_library(int(megabytes * 1e6)))
        corpus = root / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_sentencepiece(texts, root / "tokenizer", TOKENIZER_SIZE)
        tokenizer = load_tokenizer(str(root / "tokenizer"))
        data = recipe.Data(train=[recipe.Source(path=str(corpus))], workers=1)

        def tokenize() -> int:
            batches = (texts[start:start + TEXTS_PER_CALL]
                       for start in range(0, len(texts), TEXTS_PER_CALL))
            return sum(len(ids) for batch in batches for ids in encode_texts(tokenizer, batch))

        def pack() -> int:
            shutil.rmtree(root / "prepared", ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):
                return prepare(data, ROW_LENGTH, tokenizer, root / "prepared").tokens

        methods = {"tokenizer alone": tokenize, "prepare, one process": pack,
                   "loader": _reader(root / "prepared", 0),
                   f"loader, {threads} threads ahead": _reader(root / "prepared", threads)}
        speeds = _tokens_per_second(methods, rounds)
    return [DataRow(what, speed, speed / speeds["tokenizer alone"])
            for what, speed in speeds.items()]


def _reader(folder: Path, threads: int) -> Callable[[], int]:
    """A method that reads MIN_EPOCHS epochs, step by step, as one rank of one."""
    def read() -> int:
        data = PreparedLoader(folder, seed=0, global_batch_size=ROWS_PER_STEP,
                        micro_batch_size=MICRO_BATCH, dp_rank=0, dp_size=1, workers=threads)
        steps = max(MIN_EPOCHS * len(data.prepared) // ROWS_PER_STEP, 1)
        return sum(batch.input_ids.numel() for window in data.windows(0, steps) for batch in window)
    return read


def _tokens_per_second(methods: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Each method's median over the rounds, after one to warm up. A method returns its tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for round_number in range(1 + rounds):
        for name, method in methods.items():
            began = time.perf_counter()
            tokens = method()
            if round_number > 0:
                speeds[name].append(tokens / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


def _standard_library(size: int) -> Iterator[str]:
    """Python source files of at least `size` characters in all, or as many as there are."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if size <= 0:
            return
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if text and "\0" not in text:
                yield text
                size -= len(text)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Turn the threads of `tokenizers` off."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def demo_speed(rounds: int = 5) -> float:
    """Tokens per second of the demo's distillation, on all cores of one process, no engine."""
    student, teacher = (new_llama(size, demo.VOCABULARY) for size in (demo.STUDENT, demo.TEACHER))
    distiller = Distiller(student, teacher, vocab_size=demo.VOCABULARY)
    parts = [LossPart(StepObjective(preset("skl"), kd_weight=1.0, ce_weight=0.0))]
    optimizer = torch.optim.AdamW(student.parameters())
    ids = torch.randint(demo.VOCABULARY, (demo.TRAIN["micro_batch_size"], demo.SEQ_LENGTH))
    weights = torch.full((ids.numel(),), 1 / ids.numel())
    batch = Batch(ids, ids, None, 0, [], [])
    seconds = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        teacher_hidden, = distiller.teacher_hidden_states([batch], 1)
        distiller(ids, batch.valid, batch.targets, weights, teacher_hidden,
                  parts=parts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return ids.numel() / statistics.median(seconds[1:])


def _print_data(rows: Sequence[DataRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "tokens/s", "of the tokenizer", title="data, one core")
    for row in rows:
        table.add_row(row.what, f"{row.tokens_per_second:,.0f}", f"{row.of_tokenizer:.2f}")
    Console().print(table)
