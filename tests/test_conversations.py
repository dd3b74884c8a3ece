"""Conversations, responses and long texts have the ids of the whole, and templates get their rows.

The truth is the tokenizer's own `apply_chat_template`, or its ids of the whole text.
"""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chats import (
    END,
    INST,
    PHI,
    PLAIN,
    ROLE_TOKENS,
    SENTENCES,
    THINKING,
    ZEPHYR,
    make_byte_level,
    make_spaced,
    stored_rows,
    stored_shards,
)
from support.data import write_jsonl

from amid_ds.config import recipe
from amid_ds.data import StreamLoader, encode_prompts, prepare, stream_summary
from amid_ds.data.tokenizer import load_tokenizer
from amid_ds.errors import InputError

TURNS = [{"role": "user", "content": "hello  world"},
         {"role": "assistant", "content": "the answer"},
         {"role": "user", "content": "\n数据 question"},
         {"role": "assistant", "content": " yes 😀 "}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"city": "red"}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "the stone"}}]
WITH_TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}" + ROLE_TOKENS


@pytest.fixture(scope="module")
def tokenizers():
    """By name, without templates; a test sets its own."""
    return {"normalizer": make_spaced("normalizer"), "metaspace": make_spaced("metaspace"),
            "byte level": make_byte_level()}


def prepared(tmp_path, tokenizer, rows, seq_length=400, **source):
    """(the stored rows, the source's result) of rows in a jsonl file, one document a row."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    return prepared_file(tmp_path, tokenizer, path, seq_length, **source)


def prepared_file(tmp_path, tokenizer, path, seq_length=400, on_bad_row="error", **source):
    data = recipe.Data(train=[{"path": str(path), **source}], isolate_documents=False, workers=0,
                       on_bad_row=on_bad_row)
    info = prepare(data, seq_length, tokenizer, tmp_path / "out")
    return list(stored_rows(tmp_path / "out")), info.sources[0]


def own_ids(tokenizer, messages, **fields):
    return tokenizer.apply_chat_template(messages, **fields)["input_ids"]


@pytest.mark.parametrize("template", [ZEPHYR, INST, PHI, PLAIN, ROLE_TOKENS, THINKING],
                         ids=["zephyr", "inst", "phi", "plain", "role tokens", "thinking"])
@pytest.mark.parametrize("name", ["normalizer", "metaspace", "byte level"])
def test_a_conversation_has_the_ids_of_the_whole_and_learns_what_the_assistant_says(
        tmp_path, tokenizers, name, template):
    tokenizer = tokenizers[name]
    tokenizer.chat_template = template
    if template is INST and name == "byte level":
        pytest.skip("it has no <s>")
    draw = random.Random(7)
    chats = [TURNS] + [[{"role": role, "content": draw.choice(SENTENCES)}
                        for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]
                       for _ in range(12)]
    rows, _ = prepared(tmp_path, tokenizer, [{"messages": chat} for chat in chats],
                       messages="messages")
    assert len(rows) == len(chats)
    for chat, (tokens, learnt) in zip(chats, rows, strict=True):
        assert tokens == own_ids(tokenizer, chat)
        for number, run in enumerate(learnt):
            prompt = tokenizer.apply_chat_template(chat[:2 * number + 1], tokenize=False,
                                                   add_generation_prompt=True)
            said, text = chat[2 * number + 1]["content"].strip(), tokenizer.decode(run)
            assert said in text and len(text) <= len(said) + 40, (prompt, text)
            other = chat[2 * number]["content"].strip()
            assert other not in text or other in said
        assert len(learnt) == len(chat) // 2


def test_the_prompt_of_a_conversation_is_the_one_that_generation_is_given(tmp_path, tokenizers):
    for number, tokenizer in enumerate(tokenizers.values()):
        tokenizer.chat_template = ZEPHYR
        (tmp_path / str(number)).mkdir()
        [(tokens, learnt)], _ = prepared(tmp_path / str(number), tokenizer,
                                         [{"messages": TURNS[:2]}], messages="messages")
        prompt = own_ids(tokenizer, TURNS[:1], add_generation_prompt=True)
        assert tokens[:len(prompt)] == prompt
        assert tokens[len(prompt):] == learnt[0]


def test_a_template_that_drops_earlier_answers_is_refused_and_skipped_if_asked(tmp_path,
                                                                               tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m.role + '|>' }}"
                               "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
                               "{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    with pytest.raises(InputError, match=r"(?s)line 2: .*changes the text before message 2 .*"
                                         r"\{% generation %\}"):
        prepared(tmp_path, tokenizer, [{"messages": TURNS[:2]}, {"messages": TURNS}],
                 messages="messages")
    rows, info = prepared(tmp_path, tokenizer, [{"messages": TURNS[:2]}, {"messages": TURNS}],
                          messages="messages", on_bad_row="skip")
    assert len(rows) == info.skipped == 1


def make_slow(merged):
    """A tokenizer in Python, so without offsets: characters, and the pairs `merged`."""
    import transformers

    class Slow(transformers.PreTrainedTokenizer):
        def __init__(self, **keys):
            characters = {c for text in (*SENTENCES, ZEPHYR) for c in text} - set("<>|")
            names = ["<eos>", *sorted(characters), *merged, "<", ">", "|"]
            self.ids = {name: number for number, name in enumerate(names)}
            super().__init__(eos_token="<eos>", unk_token="<eos>", pad_token="<eos>", **keys)

        @property
        def vocab_size(self):
            return len(self.ids)

        def get_vocab(self):
            return dict(self.ids)

        def _tokenize(self, text, **keys):
            tokens = []
            while text:
                pair = text[:2] if text[:2] in merged else text[0]
                tokens.append(pair)
                text = text[len(pair):]
            return tokens

        def _convert_token_to_id(self, token):
            return self.ids.get(token, 0)

        def _convert_id_to_token(self, index):
            return list(self.ids)[index]

    tokenizer = Slow()
    assert not tokenizer.is_fast
    return tokenizer


def test_a_tokenizer_without_offsets_finds_the_turns_by_prefixes_or_refuses(tmp_path):
    chat = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "runs"}]
    tokenizer = make_slow(["\n\n"])
    tokenizer.chat_template = ZEPHYR
    [(tokens, learnt)], _ = prepared(tmp_path, tokenizer, [{"messages": chat}],
                                     messages="messages")
    assert tokens == own_ids(tokenizer, chat)
    assert tokenizer.convert_ids_to_tokens(learnt[0]) == ["r", "u", "n", "s", "<eos>", "\n"]
    chat[1]["content"] = "\nruns"
    with pytest.raises(InputError, match=r"line 1: the tokenizer has no offsets and joins"):
        prepared(tmp_path, tokenizer, [{"messages": chat}], messages="messages")


@pytest.mark.parametrize(("prompt", "response"), [
    ("question:\n", "answer"), ("question:", " answer"), ("question: ", "answer"),
    ("the river ", "runs"), ("stone", "s"), ("数据 ", "😀 yes"), ("x\n", "\nreturn")])
@pytest.mark.parametrize("name", ["normalizer", "metaspace", "byte level"])
def test_a_response_continues_its_prompt_as_generation_is_given_it(tmp_path, tokenizers, name,
                                                                   prompt, response):
    tokenizer = tokenizers[name]
    [(tokens, [learnt])], _ = prepared(tmp_path, tokenizer, [{"p": prompt, "r": response}],
                                       prompt="p", response="r")
    [given] = encode_prompts(tokenizer, [prompt])
    assert tokens == given + learnt and learnt[-1] == tokenizer.eos_token_id
    whole = tokenizer(prompt + response)["input_ids"]
    assert tokens[:-1] == whole or whole[:len(given)] != given
    assert (tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False)
            == tokenizer.decode(whole, clean_up_tokenization_spaces=False))


def long_text(name, seed=3, pieces=700):
    draw = random.Random(seed)
    if name == "no white space":
        return "".join(draw.choice("abc数据ä") for _ in range(8000)) + "a" * 3000
    if name == "code":
        return "".join("    " * draw.randint(0, 3) + draw.choice(SENTENCES)
                       + "\n" * draw.randint(1, 3) for _ in range(pieces))
    return " ".join(draw.choice(SENTENCES) for _ in range(pieces))


@pytest.mark.parametrize("text", ["words", "code", "no white space"])
@pytest.mark.parametrize("name", ["normalizer", "metaspace", "byte level"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", "shards"])
def test_a_long_text_has_the_ids_of_the_whole(tmp_path, tokenizers, monkeypatch, name, text, kind):
    in_shards = kind == "shards"
    if in_shards:
        monkeypatch.setattr("amid_ds.data.shard.MIN_CHUNK", 3000)
        kind = ".txt"
    monkeypatch.setattr("amid_ds.data.readers.PIECE_BYTES", 1000)
    monkeypatch.setattr("amid_ds.data.encode.PIECE_BYTES", 1000)
    tokenizer, content = tokenizers[name], long_text(text)
    path = tmp_path / f"a{kind}"
    if kind == ".txt":
        path.write_text(content, encoding="utf-8")
        prepared_file(tmp_path, tokenizer, path)
    else:
        write_jsonl(path, [{"text": content}])
        prepared_file(tmp_path, tokenizer, path, text="text")
    tokens, shards = [], list(stored_shards(tmp_path / "out"))
    assert text == "no white space" or len(shards) > 2 or not in_shards
    for shard in shards:
        # Rows overlap by a token.
        tokens += [token for number, (row, _) in enumerate(shard) for token in row[number > 0:]]
    assert tokens == [*tokenizer(content)["input_ids"], tokenizer.eos_token_id]


def template_rows(tmp_path, tokenizer, rows, **source):
    return prepared(tmp_path, tokenizer, rows, messages="messages", **source)


def test_a_rows_tools_are_given_to_the_template_whatever_their_form(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = WITH_TOOLS
    rows, info = template_rows(tmp_path, tokenizer, [
        {"messages": TURNS, "tools": tools}
        for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], None, [])])
    with_tools, without = own_ids(tokenizer, TURNS, tools=TOOLS), own_ids(tokenizer, TURNS)
    assert [tokens for tokens, _ in rows] == [with_tools] * 3 + [without] * 2
    assert "warning" not in str(info)


@pytest.mark.parametrize(("tools", "message"), [
    ("x", "the field 'tools' holds text that is not JSON"),
    ([5], "the field 'tools' holds a list where a list of objects is expected"),
    ({"a": 1}, "the field 'tools' holds an object where a list of objects is expected")])
def test_tools_that_are_none_are_named_by_line(tmp_path, tokenizers, tools, message):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = WITH_TOOLS
    with pytest.raises(InputError, match=f"line 1: {message}"):
        template_rows(tmp_path, tokenizer, [{"messages": TURNS, "tools": tools}])


def test_the_column_of_the_tools_is_the_one_that_the_recipe_names(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = WITH_TOOLS
    row = {"messages": TURNS, "tools": [{"name": "other"}], "mine": TOOLS}
    [(tokens, _)], _ = template_rows(tmp_path, tokenizer, [row], tools="mine")
    assert tokens == own_ids(tokenizer, TURNS, tools=TOOLS)
    with pytest.raises(InputError, match="line 1: lacks the field 'yours'"):
        template_rows(tmp_path, tokenizer, [row], tools="yours")
    with pytest.raises(ValueError, match="`tools` is a column beside `messages`"):
        recipe.Source(path="x", text="text", tools="tools")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_and_a_templates_own_fields_are_given_to_it(tmp_path, tokenizers, kind):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = ("{% if documents %}{{ documents[0]['text'] }}{% endif %}"
                               "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
                               "{{ style }}" + ROLE_TOKENS)
    fields = {"documents": [{"text": "stone"}], "enable_thinking": False}
    rows = [{"messages": TURNS, **fields, "chat_template_kwargs": {"style": "old"}, "other": 5},
            {"messages": TURNS, "documents": None, "enable_thinking": None,
             "chat_template_kwargs": None, "other": 5}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    stored, info = prepared_file(tmp_path, tokenizer, path, messages="messages")
    assert [tokens for tokens, _ in stored] == [own_ids(tokenizer, TURNS, **fields, style="old"),
                                                own_ids(tokenizer, TURNS)]
    assert "warning" not in str(info)


def test_what_a_template_does_not_take_is_said_once_with_its_number(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = ROLE_TOKENS
    rows = [{"messages": TURNS, "tools": TOOLS}, {"messages": TURNS, "documents": [{"text": "a"}]},
            {"messages": TURNS, "functions": TOOLS}, {"messages": TURNS},
            {"messages": TURNS, "chat_template_kwargs": {"style": "old"}}]
    _, info = template_rows(tmp_path, tokenizer, rows)
    assert str(info).count("warning") == 1
    assert "warning: 4 rows have tools, documents or other fields that the chat template does" \
        in str(info)


@pytest.mark.parametrize("empty", ["", None])
def test_empty_content_is_taken_where_something_is_said_without_it(tmp_path, tokenizers, empty):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = ROLE_TOKENS
    chat = [{"role": "system", "content": empty}, TURNS[0],
            {"role": "assistant", "content": empty, "tool_calls": CALL},
            {"role": "tool", "content": empty}, TURNS[1]]
    [(tokens, learnt)], _ = template_rows(tmp_path, tokenizer, [{"messages": chat}])
    present = [{key: value for key, value in turn.items() if value is not None} for turn in chat]
    assert tokens == own_ids(tokenizer, present)
    assert tokenizer.decode(learnt[0]).startswith('CALL {"name": "f"')
    for role in ("user", "assistant"):
        with pytest.raises(InputError, match="message 1 whose content is empty"):
            template_rows(tmp_path, tokenizer, [{"messages": [{"role": role, "content": ""},
                                                              *TURNS]}])


def test_nulls_that_a_table_puts_into_arguments_are_said(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = ROLE_TOKENS
    other = [{"type": "function", "function": {"name": "f", "arguments": {"tree": "old"}}}]
    rows = [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": call}]}
            for call in (CALL, other)] + [{"messages": TURNS}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, info = prepared_file(tmp_path, tokenizer, tmp_path / "a.parquet", messages="messages")
    assert "warning: 2 rows have nulls in tools or tool calls" in str(info)


def test_of_several_templates_the_default_is_used_and_the_one_for_tools(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = {"default": ROLE_TOKENS, "tool_use": WITH_TOOLS, "rag": "x"}
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    assert isinstance(tokenizer.chat_template, dict)
    rows, info = template_rows(tmp_path, tokenizer, [{"messages": TURNS},
                                                     {"messages": TURNS, "tools": TOOLS}])
    assert [tokens for tokens, _ in rows] == [own_ids(tokenizer, TURNS),
                                              own_ids(tokenizer, TURNS, tools=TOOLS)]
    assert "TOOLS" in tokenizer.decode(rows[1][0]) and "warning" not in str(info)
    tokenizer.chat_template = {"a": ROLE_TOKENS, "b": ROLE_TOKENS}
    with pytest.raises(InputError, match=r"chat templates by name \(a, b\) and none of them"):
        template_rows(tmp_path, tokenizer, [{"messages": TURNS}])
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(InputError, match="a chat template that cannot be parsed"):
        template_rows(tmp_path, tokenizer, [{"messages": TURNS}])


def test_other_templates_mean_other_prepared_rows(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    for template in ({"default": ROLE_TOKENS, "b": "x"}, {"default": ZEPHYR, "b": "x"}):
        tokenizer.chat_template = template
        [(tokens, _)], _ = template_rows(tmp_path, tokenizer, [{"messages": TURNS}])
        assert tokens == own_ids(tokenizer, TURNS)


def test_a_text_that_has_the_beginning_already_is_said(tmp_path, tokenizers):
    tokenizer = tokenizers["metaspace"]
    rows, info = prepared(tmp_path, tokenizer, [{"text": "<s>the river"}, {"text": "the river"}],
                          text="text")
    assert rows[0][0][:2] == [1, 1]
    assert "warning: 1 rows begin with the token that the tokenizer puts before" in str(info)
    _, info = prepared(tmp_path, tokenizer, [{"p": "<s>the river", "r": "runs"}] * 2, prompt="p",
                       response="r")
    assert "warning: 2 rows begin with the token" in str(info)
    tokenizer.chat_template = "{{ bos_token }}" + INST
    _, info = template_rows(tmp_path, tokenizer, [{"messages": TURNS}])
    assert "warning: 1 rows begin with the token" in str(info)


def test_a_template_that_teaches_no_end_of_a_turn_is_said(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    marked = ROLE_TOKENS.replace("{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}",
                                 "{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] }}"
                                 "{% endgeneration %}")
    for template, count in ((marked, 1), (PLAIN, 1), (ROLE_TOKENS, 0), (ZEPHYR, 0)):
        tokenizer.chat_template = template
        _, info = template_rows(tmp_path, tokenizer, [{"messages": TURNS}])
        assert ("warning: 1 rows teach no end of a turn" in str(info)) == count, template
        assert END in tokenizer.get_vocab()


def test_a_streamed_conversation_is_given_its_tools_and_its_oddities_are_said(tmp_path,
                                                                               tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = WITH_TOOLS
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "a.jsonl", [
        {"messages": TURNS, "tools": TOOLS, "documents": [{"text": "a"}]},
        {"messages": TURNS, "tools": TOOLS, "documents": None}] * 4)
    data = recipe.Data(train=[{"path": str(tmp_path / "rows"), "messages": "messages",
                               "stream": True}], isolate_documents=False)
    loader = StreamLoader(data, 400, tokenizer, None, global_batch_size=8, micro_batch_size=8,
                          dp_rank=0, dp_size=1, workers=0)
    # The second step is of the second pass, so the first pass is counted.
    [first], _ = loader.windows(0, 2)
    assert (first.input_ids.tolist()
            == [own_ids(tokenizer, TURNS, tools=TOOLS)[:-1]] * 8)
    summary = stream_summary(data, loader.state(2))
    assert "warning: 4 rows have tools, documents or other fields" in summary


def test_reasoning_that_the_template_leaves_out_is_said(tmp_path, tokenizers):
    tokenizer = tokenizers["byte level"]
    tokenizer.chat_template = THINKING
    thought = {"role": "assistant", "content": "<think>\nold stone\n</think>\n\nyes"}
    keyed = {"role": "assistant", "content": "yes", "reasoning_content": "old stone"}
    chats = [[TURNS[0], thought], [TURNS[0], thought, *TURNS[2:]], [TURNS[0], keyed], TURNS,
             [TURNS[0], {"role": "assistant", "content": "", "tool_calls": CALL},
              {"role": "tool", "content": "small"}, TURNS[1]]]
    rows, info = template_rows(tmp_path, tokenizer, [{"messages": chat} for chat in chats])
    assert [tokens for tokens, _ in rows] == [own_ids(tokenizer, chat) for chat in chats]
    learnt = [[tokenizer.decode(run) for run in runs] for _, runs in rows]
    assert learnt[0] == [f"<think>\nold stone\n</think>\n\nyes{END}\n"]
    assert learnt[1] == [f"yes{END}\n", f"<think>\n\n</think>\n\n yes 😀 {END}\n"]
    assert learnt[4] == [f"CALL f{END}\n", f"<think>\n\n</think>\n\nthe answer{END}\n"]
    assert str(info).count("warning") == 1
    assert "warning: 2 rows hold reasoning that the chat template leaves out" in str(info)
