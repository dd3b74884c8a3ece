"""Conversations as segments of text, those of the assistant marked as predicted.

The assistant's turns are located through the chat template, since a search for its marker strings
would also match a user who types them. A template that marks the turns (`{% generation %}`) gives
them by the tokenizer's own mask. With any other, the conversation is rendered up to each assistant
turn, with the generation prompt, and up to its end: the difference is the turn. That needs a
template that does not change earlier turns as the conversation grows; others are refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (a text to encode or token ids, True if it is predicted)
Segment = tuple["str | list[int]", bool]
# {"role": ..., "content": ..., and further keys for the template}
ChatMessage = Mapping[str, object]
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template. Raises InputError if it has none, or several."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        problem = "no chat template" if template is None else \
            "several chat templates and no default"
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has {problem}",
                         "one chat template, which turns `messages` into a text",
                         "set `chat_template` in its tokenizer_config.json, or use prompt and "
                         "response columns")
    return template


def conversation_segments(tokenizer: PreTrainedTokenizerBase,
                          messages: Sequence[ChatMessage]) -> list[Segment]:
    """The segments of a conversation, in order.

    Raises ValueError if the template refuses it or does not tell the assistant's turns apart.
    """
    marked = GENERATION_TAG.search(require_chat_template(tokenizer))
    try:
        return _by_mask(tokenizer, messages) if marked else _by_difference(tokenizer, messages)
    except Exception as error:
        # A template is its author's program, and raises anything.
        raise ValueError(f"the chat template cannot be used: {error}") from None


def _by_mask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage]) -> list[Segment]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True,
                                            return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [([token for token, _ in run], bool(mask)) for mask, run in runs]


def _by_difference(tokenizer: PreTrainedTokenizerBase,
                   messages: Sequence[ChatMessage]) -> list[Segment]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    out: list[Segment] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False,
                                               add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[:number + 1], tokenize=False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(f"it changes the text before message {number + 1} as the conversation "
                             "grows, so the assistant's turns cannot be told; mark them in it with "
                             "{% generation %}")
        out += [(whole[done:len(before)], False), (whole[len(before):len(after)], True)]
        done = len(after)
    return [segment for segment in (*out, (whole[done:], False)) if segment[0]]
