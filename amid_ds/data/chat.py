"""Conversations as text in segments, those of the assistant marked: what a model learns is what it would have to say.

The assistant's turns are found through the chat template, not by searching for strings that a user may write too.
Where the template marks them (`{% generation %}`), the tokenizer's own mask is used. Elsewhere the conversation is
rendered up to each assistant turn, with the generation prompt, and up to its end: the difference is the turn. That
needs a template that leaves earlier turns as they were; one that does not is refused.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment = tuple["str | list[int]", bool]      # a text to encode or ids, and whether it is predicted
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template. Raises InputError where it has none."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has "
                         + ("no chat template" if template is None else "several chat templates and no default"),
                         "one chat template, which turns `messages` into a text",
                         "set `chat_template` in its tokenizer_config.json, or use prompt and response columns")
    return template


def segments(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[Segment]:
    """The conversation in order. Raises ValueError where the template refuses it or does not tell the turns apart."""
    find = _marked if MARKED.search(require_chat_template(tokenizer)) else _rendered
    try:
        return find(tokenizer, messages)
    except Exception as error:     # a template is a program of its author's, and raises what it likes
        raise ValueError(f"the chat template cannot be used: {error}") from None


def _marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[Segment]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [([i for i, _ in run], bool(mask)) for mask, run in itertools.groupby(pairs, key=lambda pair: pair[1])]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[Segment]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    out: list[Segment] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[:number + 1], tokenize=False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(f"it changes what comes before message {number + 1} as the conversation grows, so the "
                             "assistant's turns cannot be told; mark them in it with {% generation %}")
        out += [(whole[done:len(before)], False), (whole[len(before):len(after)], True)]
        done = len(after)
    return [segment for segment in (*out, (whole[done:], False)) if segment[0]]
