"""Texts to ids where a place inside the text matters, without encoding two sides apart and joining.

A tokenizer may encode a text otherwise by itself than as the continuation of another: Llama 2's
puts a space before it, GPT-2's joins a space and the word after it. So a conversation is encoded
whole, and its turns are found in the ids by their characters; a response is what the whole's ids
have after the prompt's; and a long text is cut where both sides have the whole's ids.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from amid_ds.data.chat import RenderedChat, Stretch
from amid_ds.data.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters on each side of a cut that decide about it.
CONTEXT = 256
# Tokens before a cut that have to be the same with less text before them.
SAME_TOKENS = 8
MAX_CUTS_TRIED = 24
# A text after one of these is encoded as it continues, if its true beginning does not tell.
NEUTRAL_BEGINNINGS = ("", "\n", ".", "a")


def encode_continuations(tokenizer: PreTrainedTokenizerBase, befores: Sequence[str],
                         texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """(ids of `before`, ids of the text as it continues them) for each pair.

    Together they are the ids of the whole, unless the tokenizer joins the last characters of
    `before` with the first of the text into one token. Then the ids of `before` stay as they are,
    and the text's are such that the two decode to the whole.
    """
    wholes = [before + text for before, text in zip(befores, texts, strict=True)]
    encoded = encode_texts(tokenizer, [*befores, *wholes])
    pairs = zip(encoded[:len(befores)], encoded[len(befores):], texts, strict=True)
    return [(before, whole[len(before):] if whole[:len(before)] == before
             else _after_a_joined_token(tokenizer, before, whole, text))
            for before, whole, text in pairs]


def _after_a_joined_token(tokenizer: PreTrainedTokenizerBase, before: list[int], whole: list[int],
                          text: str) -> list[int]:
    wanted = tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    tried = []
    for beginning in NEUTRAL_BEGINNINGS:
        first, both = encode_texts(tokenizer, [beginning, beginning + text])
        if both[:len(first)] == first:
            tried.append(both[len(first):])
            decoded = tokenizer.decode(before + tried[-1], clean_up_tokenization_spaces=False)
            if decoded == wanted:
                return tried[-1]
    # A tokenizer that does not give back what it is given: the text by itself.
    return tried[0]


def encode_chats(tokenizer: PreTrainedTokenizerBase,
                 chats: Sequence[RenderedChat]) -> list[tuple[list[int], list[Stretch]]]:
    """(ids of the whole conversation, the stretches of them that the assistant says) of each.

    A token is the assistant's if one of its characters is. Raises ValueError if a tokenizer
    without offsets does not tell.
    """
    if not tokenizer.is_fast:
        return [_encode_by_prefix(tokenizer, chat) for chat in chats]
    # The settings that encode_texts makes.
    encode_texts(tokenizer, [])
    encodings = tokenizer.backend_tokenizer.encode_batch([chat.text for chat in chats],
                                                         add_special_tokens=False)
    encoded = []
    for chat, encoding in zip(chats, encodings, strict=True):
        starts, stops = zip(*encoding.offsets, strict=True) if encoding.offsets else ((), ())
        stretches = [(bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop))
                     for start, stop in chat.learnt]
        encoded.append((encoding.ids, stretches))
    return encoded


def _encode_by_prefix(tokenizer: PreTrainedTokenizerBase,
                      chat: RenderedChat) -> tuple[list[int], list[Stretch]]:
    places = [place for stretch in chat.learnt for place in stretch]
    whole, *beginnings = encode_texts(tokenizer, [chat.text, *(chat.text[:i] for i in places)])
    if any(whole[:len(beginning)] != beginning for beginning in beginnings):
        raise ValueError("the tokenizer has no offsets and joins characters of a turn with those "
                         "around it, so the assistant's tokens cannot be told; use a tokenizer "
                         "with a tokenizer.json")
    lengths = list(map(len, beginnings))
    return whole, list(zip(lengths[::2], lengths[1::2], strict=True))


def encode_up_to_a_cut(tokenizer: PreTrainedTokenizerBase, before: str, text: str,
                       place: int) -> tuple[int, list[int]]:
    """(where to cut `text`, at `place` or little before it, ids of it up to there).

    before: the end of the text before it. Between the cut's sides no token is joined: the
    beginning of the right side leaves the ids of the left side's end as they are, and these are
    those that the whole left side ends with. With merges that go by rank (BPE) it follows that the
    whole text's ids are those of both sides.
    """
    tried = []
    for cut in _cuts(tokenizer, text, place):
        [(_, ids)] = encode_continuations(tokenizer, [before], [text[:cut]])
        tried.append((cut, ids))
        [end] = encode_texts(tokenizer, [text[max(cut - CONTEXT, 0):cut]])
        same = min(SAME_TOKENS, len(end) // 2)
        if end[len(end) - same:] == ids[len(ids) - same:]:
            return tried[-1]
        if len(tried) == MAX_CUTS_TRIED:
            break
    if tried:
        return tried[0]
    [(_, ids)] = encode_continuations(tokenizer, [before], [text[:place]])
    return place, ids


def _cuts(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> Iterator[int]:
    """Places to cut the text, the best first: lines, then words, then anywhere; `place` is best."""
    near = range(place, max(place - 4 * CONTEXT, 0), -1)
    lines = [cut for cut in near if text[cut - 1] == "\n"]
    words = [cut for cut in near if not text[cut - 1].isspace() and text[cut:cut + 1] == " "]
    for cut in dict.fromkeys([*lines[:MAX_CUTS_TRIED], *words[:MAX_CUTS_TRIED],
                              *near[:MAX_CUTS_TRIED]]):
        left = text[max(cut - CONTEXT, 0):cut]
        end, both = encode_texts(tokenizer, [left, left + text[cut:cut + CONTEXT]])
        if both[:len(end)] == end:
            yield cut
