"""Llamas with random weights, for the demo, the study and the benchmarks."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amid_ds.data import save_tokenizer, vocabulary_size

logger = logging.getLogger(__name__)

HEAD_WIDTH = 64
MAX_POSITIONS = 1024


@dataclass(frozen=True)
class LlamaSize:
    """The sizes of a Llama, by the names that its config has for them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int

    @classmethod
    def of_width(cls, width: int, layers: int) -> LlamaSize:
        """The usual proportions: an MLP of four times the width, heads of HEAD_WIDTH."""
        return cls(width, 4 * width, layers, max(1, width // HEAD_WIDTH))


def llama_config(size: LlamaSize, vocab_size: int, **config: Any) -> Any:
    """The LlamaConfig of these sizes, with tied embeddings. `config`: more of its values."""
    from transformers import LlamaConfig

    return LlamaConfig(**asdict(size), vocab_size=vocab_size, tie_word_embeddings=True, **config)


def new_llama(size: LlamaSize, vocab_size: int, seed: int = 0, **config: int) -> Any:
    """A LlamaForCausalLM with random fp32 weights and tied embeddings.

    `config`: more values of its LlamaConfig. Seeds torch's global generator.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(size, vocab_size, **config))


def save_new_llama(folder: Path, size: LlamaSize, tokenizer: Any, seed: int) -> None:
    """Save a Llama with random weights for `tokenizer`, and the tokenizer, in `folder`."""
    model = new_llama(size, vocabulary_size(tokenizer), seed, max_position_embeddings=MAX_POSITIONS,
                      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                      pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    logger.info(f"  {folder}: {model.num_parameters() / 1e6:.2f} M parameters, random")
