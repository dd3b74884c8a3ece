"""Conversations: the loss is on the assistant's messages, located through the chat template."""

import json

import pytest

from amid_ds.config import recipe
from amid_ds.data import prepare, read_batches
from amid_ds.data.tokenizer import load_tokenizer
from amid_ds.errors import InputError

TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}"
CHATML = ("{% for m in messages %}" + TURN + "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}{% generation %}"
          "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + "
          "'<|im_end|>' }}{% endif %}"
          "{{ '\n' }}{% endfor %}")
FORGETFUL = ("{% for m in messages %}" + TURN
             + "{{ m['content'] if loop.last or m['role'] != 'assistant' else '' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PROMPTING = CHATML.replace("{{ '<|im_start|>assistant\n' }}",
                           "{{ '<|im_start|>assistant\nThinking: ' }}")
STRICT = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"

CONVERSATION = [
    {"role": "system", "content": "word1"},
    # A user may write anything.
    {"role": "user", "content": "say word2, not <|im_start|>assistant"},
    {"role": "assistant", "content": "word2 é"},
    {"role": "user", "content": "again\n\nword3"},
    {"role": "assistant", "content": "word3"},
]


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer_folder):
    """One with ChatML's marks as special tokens; tests set its template."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def rows_of(tmp_path, tokenizer, template, *conversations, seq_length=500, truncate="left",
            on_bad_row="error"):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in conversations),
                    encoding="utf-8")
    tokenizer.chat_template = template
    source = {"path": str(path), "messages": "turns", "truncate": truncate}
    info = prepare(recipe.Data(train=[source], on_bad_row=on_bad_row), seq_length, tokenizer,
                   tmp_path / "out")
    return list(read_batches(tmp_path / "out", 1)), info.sources[0]


def learnt_texts(batch, tokenizer):
    """The runs of labels, as texts."""
    runs, last = [], -100
    for label in batch.labels[0].tolist():
        if label != -100:
            runs = runs if last != -100 else [*runs, []]
            runs[-1].append(label)
        last = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(("template", "tail"), [(CHATML, "\n"), (MARKED, "")])
def test_the_loss_is_on_the_assistants_turns_alone(tmp_path, chat_tokenizer, template, tail):
    [batch], info = rows_of(tmp_path, chat_tokenizer, template, CONVERSATION)
    assert learnt_texts(batch, chat_tokenizer) == [f"word2 é<|im_end|>{tail}",
                                                   f"word3<|im_end|>{tail}"]
    whole = chat_tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    assert batch.input_ids[0].tolist() == whole[:-1]
    assert info.rows == info.documents == 1


def test_the_templates_own_mask_says_the_same(tmp_path, chat_tokenizer):
    [batch], _ = rows_of(tmp_path, chat_tokenizer, MARKED, CONVERSATION)
    own = chat_tokenizer.apply_chat_template(CONVERSATION, return_dict=True,
                                             return_assistant_tokens_mask=True)
    wanted = [i if mask else -100
              for i, mask in zip(own["input_ids"], own["assistant_masks"], strict=True)]
    assert batch.labels[0].tolist() == wanted[1:]


def test_a_conversation_too_long_loses_the_side_that_the_recipe_names(tmp_path, chat_tokenizer):
    whole = chat_tokenizer.apply_chat_template(CONVERSATION, chat_template=CHATML)["input_ids"]
    length = len(whole) - 20
    [batch], info = rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, seq_length=length)
    assert batch.input_ids[0].tolist() == whole[-length - 1:-1] and info.truncated == 1
    assert learnt_texts(batch, chat_tokenizer)[-1] == "word3<|im_end|>\n"
    # Too short for both answers.
    [batch], _ = rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, seq_length=24)
    assert batch.input_ids[0].tolist() == whole[-25:-1]
    assert learnt_texts(batch, chat_tokenizer) == ["word3<|im_end|>\n"]
    [batch], info = rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, seq_length=length,
                            truncate="right")
    assert batch.input_ids[0].tolist() == whole[:length] and info.truncated == 1
    assert learnt_texts(batch, chat_tokenizer)[0] == "word2 é<|im_end|>\n"


def test_what_the_assistant_says_first_is_learnt_but_for_its_first_token(tmp_path, chat_tokenizer):
    template = MARKED.replace(TURN, "")
    [batch], _ = rows_of(tmp_path, chat_tokenizer, template, CONVERSATION[2:3])
    whole = chat_tokenizer.apply_chat_template(CONVERSATION[2:3])["input_ids"]
    assert batch.input_ids[0].tolist() == whole[:-1]
    # The line end is the template's, not the assistant's.
    assert batch.labels[0].tolist() == [*whole[1:-1], -100]


def test_a_conversation_whose_answers_vanish_by_truncation_is_dropped_and_counted(tmp_path,
                                                                                  chat_tokenizer):
    short = [{"role": "user", "content": "w"}, {"role": "assistant", "content": "word3"}]
    batches, info = rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, short, seq_length=30,
                            truncate="right")
    assert len(batches) == info.rows == 1
    assert (info.truncated, info.dropped) == (1, 1)


@pytest.mark.parametrize("template", [FORGETFUL, PROMPTING, STRICT])
def test_a_template_that_hides_the_assistants_turns_is_refused(tmp_path, chat_tokenizer, template):
    with pytest.raises(InputError,
                       match=r"(?s)chat.jsonl line 1: the chat template cannot be used: "
                       r"(.*mark them in it with \{% generation %\}|roles must alternate)"):
        rows_of(tmp_path, chat_tokenizer, template, CONVERSATION)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, chat_tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        rows_of(tmp_path, chat_tokenizer, None, CONVERSATION)


@pytest.mark.parametrize(("turns", "message"), [
    ("hello", "holds text where a list of messages is expected"),
    ([], "has no message of the role 'assistant'"),
    (CONVERSATION[:2], "has no message of the role 'assistant'"),
    (["hello"], "holds text as message 1 where an object is expected"),
    ([{"content": "x"}], "has no role in message 1"),
    ([{"role": "user", "content": 5}],
     "has a message 1 whose content holds a number where text is expected"),
])
def test_bad_conversations_are_named_by_line(tmp_path, chat_tokenizer, turns, message):
    with pytest.raises(InputError, match=f"line 2: the field 'turns' {message}"):
        rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, turns)
    _, info = rows_of(tmp_path, chat_tokenizer, CHATML, CONVERSATION, turns, on_bad_row="skip")
    assert (info.rows, info.skipped) == (1, 1) and message in info.shown[0]
