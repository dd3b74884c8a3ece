"""Tokenizers and model folders: real files as transformers saves them, small enough for a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("the a one two river stone bird tree house light runs sings falls grows holds over under "
         "near with and then slowly quickly green old small wide red").split()


def make_tokenizer(folder: Path, words: list[str] = WORDS):
    """Save and return a word-level tokenizer whose ids 0, 1 and 2 are <unk>, <eos> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "<pad>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>",
                                        pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_sentencepiece(folder: Path) -> Path:
    """Train a sentencepiece tokenizer of 310 tokens into `folder`, on words, numbers and an é."""
    from amid_ds.data import train_sentencepiece

    lines = (f"word{i} and number {i * 7}\n\tindented é {i}" for i in range(300))
    train_sentencepiece(lines, folder, vocab_size=310)
    return folder


def make_model(folder: Path, family: str, seed: int = 0, extra_rows: int = 0,
               words: list[str] = WORDS, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Save a causal model with random weights and its tokenizer; return the folder.

    `family`: "llama", "llama-tied", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "qwen2-tied"
    or "gpt2".
    `extra_rows` pads its vocabulary beyond the tokenizer's. `changes` are values of its config.
    """
    import transformers as t

    tokenizer = make_tokenizer(folder, words)
    common = dict(vocab_size=len(tokenizer) + extra_rows, eos_token_id=1, pad_token_id=2,
                  bos_token_id=1)
    rope = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128)
    window = dict(head_dim=8, sliding_window=8)
    gemma2 = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                  final_logit_softcapping=5.0)
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0)
    families = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**rope, "tie_word_embeddings": False}),
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig, {**rope, "tie_word_embeddings": True}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config,
                  {**rope, "head_dim": 16, "tie_word_embeddings": False}),
        "mistral": (t.MistralForCausalLM, t.MistralConfig,
                    {**rope, **window, "tie_word_embeddings": False}),
        # Every other layer has the window, and its scale is not that of its heads' width.
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, {
            **rope, **window, "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"]}),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig, {**rope, "head_dim": 8}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {**rope, **gemma2}),
        "qwen2-tied": (t.Qwen2ForCausalLM, t.Qwen2Config, {**rope, "tie_word_embeddings": True}),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, gpt2),
    }
    model_class, config_class, values = families[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**values, **common, **changes}))
    # Far from uniform predictions, so that losses tell runs apart.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder
