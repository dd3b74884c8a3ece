"""Conversations as the chat template writes them, and where the assistant speaks in the text.

The assistant's turns are located through the chat template, since a search for its marker strings
would also match a user who types them. A template that marks the turns (`{% generation %}`) says
itself where they are. With any other, the conversation is rendered up to each assistant turn, with
the generation prompt, which has to be a beginning of the whole: there the turn begins. It ends
where the conversation up to and with it does; or, if the template writes the last turn otherwise
(Qwen 3 puts an empty thought into it, Phi 3 the end of the text behind it), where what follows the
turn in both is found in the whole. A template that does neither is refused.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amid_ds.data.readers import json_type_name
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# {"role": ..., "content": ..., and further keys for the template}
ChatMessage = Mapping[str, object]
# [start, stop) in characters or tokens.
Stretch = tuple[int, int]

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANY_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# Columns beside the messages, for templates: each a list of objects, or the JSON text of one.
LIST_COLUMNS = ("tools", "documents", "functions")
# A column of further values for the template, by name.
KWARGS_COLUMN = "chat_template_kwargs"
# Of a template's variables, those that are not the row's to give.
OWN_VARIABLES = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
# Keys of a message, and marks in its content, between which is reasoning.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_BEGIN, REASONING_END = "<think>", "</think>"


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text. learnt: the stretches, in order, that the assistant says; notes:
    names of ROW_NOTES that apply to it."""

    text: str
    learnt: tuple[Stretch, ...]
    notes: tuple[str, ...]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    """The tokenizer's chat template, or its templates by name, of which one is `default`.

    Raises InputError if it has none that can be used.
    """
    template: str | dict[str, str] | None = tokenizer.chat_template
    problem = None
    if template is None:
        problem = "no chat template"
    elif isinstance(template, dict) and "default" not in template:
        problem = f"chat templates by name ({', '.join(template)}) and none of them is `default`"
    else:
        try:
            _variables(template)
        except Exception as error:
            # jinja2 raises whatever its parser meets.
            problem = f"a chat template that cannot be parsed: {error}"
    if template is None or problem is not None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has {problem}",
                         "a chat template, which turns `messages` into a text",
                         "set `chat_template` in its tokenizer_config.json, or use prompt and "
                         "response columns")
    return template


def chat_columns(tokenizer: PreTrainedTokenizerBase, tools: str | None) -> tuple[str, ...]:
    """The columns of a row that its conversation's template may take, if the row has them.

    tools: the column that the recipe names for the tools.
    """
    taken = _variables(require_chat_template(tokenizer))
    names = (tools or "tools", *LIST_COLUMNS[1:], KWARGS_COLUMN, *sorted(taken - {*LIST_COLUMNS}))
    return tuple(dict.fromkeys(names))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage],
                columns: Mapping[str, object]) -> RenderedChat:
    """The conversation through the tokenizer's template, as `apply_chat_template` writes it.

    columns: the row's values for the template, None for those that it lacks. Raises ValueError if
    one of them is not usable, or if the template refuses the conversation or does not tell the
    assistant's turns apart.
    """
    # Many templates write a null as "None", where a missing key is nothing.
    messages = [{key: value for key, value in message.items() if value is not None}
                for message in messages]
    fields = _template_fields(columns)
    template = tokenizer.get_chat_template(None, fields.get("tools"))
    unused = fields.keys() - _variables(template) - {*tokenizer.special_tokens_map}

    def render(some: Sequence[ChatMessage], prompted: bool = False) -> str:
        return _render(tokenizer, template, some, fields, prompted)[0]

    try:
        if GENERATION_TAG.search(template):
            text, learnt = _render(tokenizer, template, messages, fields, marked=True)
        else:
            text = render(messages)
            learnt = _turns(render, messages, text, tokenizer.eos_token or "")
    except Exception as error:
        # A template is its author's program, and raises anything.
        raise ValueError(f"the chat template cannot be used: {error}") from None
    calls = [message.get(key) for message in messages for key in ("tool_calls", "function_call")]
    found = {"unused": bool(unused), "nulls": _holds_null([fields.get("tools"),
                                                           *filter(None, calls)]),
             "reasoning": any(thought not in text for thought in _reasoning(messages))}
    return RenderedChat(text, tuple(learnt), tuple(name for name, holds in found.items() if holds))


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[ChatMessage],
            fields: Mapping[str, object], prompted: bool = False,
            marked: bool = False) -> tuple[str, list[Stretch]]:
    """(text, the marked stretches) of a conversation, as `apply_chat_template` renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompted,
        return_assistant_tokens_mask=marked, **{**tokenizer.special_tokens_map, **fields})
    return texts[0], marks[0] if marked else []


def _turns(render: Callable[..., str], messages: Sequence[ChatMessage], whole: str,
           eos_token: str) -> list[Stretch]:
    """The stretches of the assistant's turns in the whole conversation's text."""
    turns: list[Stretch] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], prompted=True)
        stop = _turn_end(render, messages, number, whole, eos_token)
        if not (whole.startswith(before) and done <= len(before) <= stop):
            raise ValueError(f"it changes the text before message {number + 1} as the conversation "
                             "grows, so the assistant's turns cannot be told; mark them in it with "
                             "{% generation %}")
        turns.append((len(before), stop))
        done = stop
    return turns


def _turn_end(render: Callable[..., str], messages: Sequence[ChatMessage], number: int, whole: str,
              eos_token: str) -> int:
    """Where the turn ends that is message `number`; 0 if that cannot be told."""
    after = render(messages[:number + 1])
    if whole.startswith(after):
        return len(after)
    # What another answer in its place leaves the same behind it: to the end of the turn, and to
    # the end of the whole.
    spoken = str(messages[number].get("content") or "").rstrip()
    other = [*messages[:number], {"role": "assistant", "content": "b" if spoken.endswith("a")
                                  else "a"}]
    end = _common_ending(after, render(other))
    rest = _common_ending(whole, render([*other, *messages[number + 1:]]))
    if not rest.startswith(end):
        # The end of the text may stand behind the last turn alone.
        end = end.removesuffix(eos_token)
    return len(whole) - len(rest) + len(end) if rest.startswith(end) else 0


def _common_ending(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - same:]


def _template_fields(columns: Mapping[str, object]) -> dict[str, object]:
    """The values for the template by its names for them, without those that say nothing."""
    fields = {name: _objects(name, value) if name in LIST_COLUMNS else value
              for name, value in columns.items() if name != KWARGS_COLUMN}
    more = columns.get(KWARGS_COLUMN)
    if isinstance(more, str):
        more = _parsed(KWARGS_COLUMN, more)
    if more is not None and not isinstance(more, dict):
        raise ValueError(f"the field {KWARGS_COLUMN!r} holds {json_type_name(more)} where an "
                         "object is expected")
    return {name: value for name, value in {**fields, **(more or {})}.items() if value is not None}


def _objects(name: str, value: object) -> list[object] | None:
    """A list of objects, given as such or as JSON text; None for an empty one."""
    listed = _parsed(name, value) if isinstance(value, str) and value.strip() else value
    if not listed:
        return None
    if isinstance(listed, list):
        listed = [_parsed(name, item) if isinstance(item, str) else item for item in listed]
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise ValueError(f"the field {name!r} holds {json_type_name(value)} where a list of "
                         "objects is expected")
    return listed


def _parsed(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the field {name!r} holds text that is not JSON: {error}") from None


def _reasoning(messages: Sequence[ChatMessage]) -> list[str]:
    """The thoughts of the assistant's messages, without white space around them."""
    thoughts = []
    for message in messages:
        if message["role"] == "assistant":
            keyed = [message.get(key) for key in REASONING_KEYS]
            thoughts += [thought for thought in keyed if isinstance(thought, str)]
            parts = str(message.get("content") or "").split(REASONING_END)
            # The mark before may be the template's.
            thoughts += [part.rpartition(REASONING_BEGIN)[2] for part in parts[:-1]]
    return [thought.strip() for thought in thoughts]


def _holds_null(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))


def _variables(template: str | dict[str, str]) -> frozenset[str]:
    """The names that a template, or any of several, reads from its caller."""
    several = template.values() if isinstance(template, dict) else [template]
    return frozenset().union(*map(_variables_of, several))


@functools.lru_cache
def _variables_of(template: str) -> frozenset[str]:
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    parsed = environment.parse(ANY_GENERATION_TAG.sub("", template))
    names = jinja2.meta.find_undeclared_variables(parsed)
    return frozenset(name for name in names - environment.globals.keys() - OWN_VARIABLES
                     if not name.endswith("_token"))
