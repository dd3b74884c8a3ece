"""Tokenizers with the habits of published ones, and chat templates of the published shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

SENTENCES = ("the river runs over the old stone", "A red bird sings: yes!",
             "hello  world\n\nfrom me", "def f(x):\n    return x\n", "naïve 数据 😀", "12 345",
             "question? answer. [INST] [/INST] <|user|> assistant", "aaaaaaaa")
END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# As Zephyr, Llama 2, ChatML and Llama 3.1 (tool calls) write a conversation.
ZEPHYR = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")
# As Phi 3: the end of the text stands behind the last turn alone.
PHI = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
       "{% else %}{{ eos_token }}{% endif %}")
PLAIN = ("{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}")
ROLE_TOKENS = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}"
               "{% if m['tool_calls'] %}CALL {{ m['tool_calls'][0]['function'] | tojson }}"
               "{% endif %}{{ '<|end|>' }}{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# As Qwen 3: earlier thoughts are dropped, and the last turn always has one, if need be empty.
THINKING = ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
            "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
            "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
            "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
            "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
            " if '</think>' in m.content else '' %}"
            "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
            "{{ '<think>\n' + thought + '\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
            "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% endif %}"
            "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
            "{% endif %}")


def make_byte_level(template: str | dict[str, str] | None = None) -> Any:
    """A byte-level BPE as GPT-2's, with role tokens; it puts nothing before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(SENTENCES * 30, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<eos>", "<pad>", END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def make_spaced(kind: str, template: str | None = None) -> Any:
    """A BPE that puts <s> and a space before a text, as Llama 2's.

    kind: "normalizer" (the published tokenizer.json), which puts the space behind every special
    token too, or "metaspace" (what transformers makes of the sentencepiece model).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # No token spans a line end.
    lines = [line for text in SENTENCES for line in text.splitlines()]
    letters.train_from_iterator(lines * 30, trainers.BpeTrainer(
        vocab_size=480, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]))
    spec = json.loads(letters.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"]
                            if token["content"] in ("<unk>", "<s>", "</s>")]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    prepend = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    spec["pre_tokenizer"], spec["normalizer"] = ((None, prepend) if kind == "normalizer"
                                                 else (space, None))
    spec["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    spec["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def stored_shards(folder: Path) -> Iterator[list[tuple[list[int], list[list[int]]]]]:
    """[(tokens, the runs of them that are learnt) of each row] of each shard, in order."""
    for path in sorted((folder / "shards").glob("*.arrow")):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        rows = zip(table["tokens"].to_pylist(), table["learn"].to_pylist(), strict=True)
        yield [(tokens, [tokens[start:stop] for start, stop in zip(spans[::2], spans[1::2],
                                                                   strict=True)])
               for tokens, spans in rows]


def stored_rows(folder: Path) -> list[tuple[list[int], list[list[int]]]]:
    """(tokens, the runs of them that are learnt) of each row of a prepared folder."""
    return [row for shard in stored_shards(folder) for row in shard]
