"""From the user's files to micro-batches: sources (rows) -> pack (shards of tokens) -> order and loader (steps)."""

from amid_ds.data.loader import Batch, Prepared, StepData, read_rows
from amid_ds.data.measure import DataRow, data_bench
from amid_ds.data.preparation import PreparedInfo, SourceInfo, prepare, prepare_all
from amid_ds.data.sources import check_sources, texts_of
from amid_ds.data.tokenizer import fingerprint, load_tokenizer, require_same_tokenizer, train_sentencepiece

__all__ = ["Batch", "DataRow", "Prepared", "PreparedInfo", "SourceInfo", "StepData", "check_sources", "data_bench",
           "fingerprint", "load_tokenizer", "prepare", "prepare_all", "read_rows", "require_same_tokenizer", "texts_of",
           "train_sentencepiece"]
