"""`amid-ds chat` says what plain transformers generates, keeps a history for each model, and obeys.

The answers are compared with `generate` of transformers on ids from `apply_chat_template`.
"""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.chats import PLAIN, ROLE_TOKENS, make_byte_level, make_spaced
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from amid_ds.cli import main
from amid_ds.errors import printable
from amid_ds.eval import chat as chat_module
from amid_ds.eval.chat import Answer, ChatArgs, open_speaker
from amid_ds.run.console import PlainConsole

NEW = 12


def make_chat_model(folder: Path, template: str | None, seed: int, positions: int = 512) -> None:
    """A Llama with random weights whose tokenizer is of bytes: answers in halves of characters."""
    tokenizer = make_byte_level(template)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    # Ids of no token, which plain `generate` would choose too.
    model.lm_head.weight.data[len(tokenizer):] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def chat_models(shared_folder) -> tuple[Path, Path, Path]:
    """(with a template, with another, without one)."""
    made = []
    for seed, template in enumerate((PLAIN, ROLE_TOKENS, None)):
        made.append(shared_folder(f"chat-{seed}",
                                  lambda path, t=template, s=seed: make_chat_model(path, t, s)))
    return tuple(made)


def talk(monkeypatch, capsys, said: str, *arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a chat in which `said` comes through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    status = main(["chat", *map(str, arguments)])
    return status, *capsys.readouterr()


def plain_answers(folder: Path, messages: list[str]) -> list[str]:
    """What transformers' own greedy `generate` answers to each message, with the history before."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns, answers = [], []
    for message in messages:
        turns.append({"role": "user", "content": message})
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True,
                                                return_dict=True)["input_ids"]
        else:
            ids = tokenizer("\n".join(
                turns[place]["content"] + (turns[place + 1]["content"] if place + 1 < len(turns)
                                           else "") for place in range(0, len(turns), 2))).input_ids
        made = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0]
        answers.append(tokenizer.decode(made[len(ids):], skip_special_tokens=True))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_greedy_answers_are_those_of_plain_transformers_each_model_with_its_own_history(
        chat_models, monkeypatch, capsys):
    one, other, _ = chat_models
    messages = ["hello river", "what? 数据"]
    status, out, err = talk(monkeypatch, capsys, "\n".join(messages), one, "--beside", other,
                            "--temperature", 0, "--max-new-tokens", NEW)
    expected = "".join(f"[{folder}]\n{printable(answer)}\n"
                       for turn in zip(plain_answers(one, messages), plain_answers(other, messages),
                                       strict=True)
                       for folder, answer in zip((one, other), turn, strict=True))
    assert (status, out) == (0, expected), err


def test_a_model_without_a_template_continues_the_text_and_that_is_said_once(
        chat_models, monkeypatch, capsys):
    messages = ["the old", "stone 12"]
    status, out, err = talk(monkeypatch, capsys, "\n".join(messages), chat_models[2],
                            "--temperature", 0, "--max-new-tokens", NEW)
    assert status == 0 and err.count("no chat template") == 1
    assert out == "".join(f"{printable(text)}\n" for text in plain_answers(chat_models[2],
                                                                           messages))


def test_reset_forgets_and_quit_ends_and_the_seed_repeats(chat_models, monkeypatch, capsys):
    options = (chat_models[0], "--max-new-tokens", NEW)
    _, first, _ = talk(monkeypatch, capsys, "hello", *options)
    status, again, _ = talk(monkeypatch, capsys, "hello\n\n/help\n/reset\n/quit\nhello", *options)
    assert status == 0 and again.startswith(first) and again.count("\n") == first.count("\n") + 3
    assert "/reset" in again
    _, other, _ = talk(monkeypatch, capsys, "hello", *options, "--seed", 1)
    assert other != first
    _, greedy, _ = talk(monkeypatch, capsys, "hello\n/reset\nhello", *options, "--temperature", 0)
    assert greedy[:len(greedy) // 2] * 2 == greedy


def test_the_oldest_turns_are_forgotten_where_the_conversation_is_too_long(
        tmp_path, monkeypatch, capsys):
    make_chat_model(tmp_path / "short", PLAIN, 0, positions=100)
    speaker = open_speaker(str(tmp_path / "short"), ChatArgs(""), torch.device("cpu"))
    speaker.turns = [(f"message {number}", "the answer " * 4) for number in range(4)]
    ids = speaker.prompt_ids("now", 30)
    assert 0 < len(speaker.turns) < 4 and speaker.turns[-1][0] == "message 3"
    assert len(ids) <= 70 and "message 0" not in speaker.tokenizer.decode(ids)
    status, _, err = talk(monkeypatch, capsys, "x " * 200, tmp_path / "short")
    assert status == 2 and "takes 100 with its answer" in err
    # A short message leaves some room, if less than asked for.
    status, out, _ = talk(monkeypatch, capsys, "x " * 40, tmp_path / "short", "--max-new-tokens",
                          400)
    assert status == 0 and out


@pytest.mark.parametrize("make", [make_byte_level, partial(make_spaced, "metaspace")],
                         ids=["as GPT-2", "as Llama 2"])
def test_a_growing_answer_ends_in_whole_characters_and_only_grows(make):
    tokenizer, text = make(), "naïve 数据 😀漢字 end"
    # Of a published model it may be a token that is not special.
    end = tokenizer.convert_tokens_to_ids("!")
    answer = Answer(tokenizer, [end], [], continues=False)
    answer.put(torch.tensor([[7, 7]]))
    seen = [answer.text]
    for number in [*tokenizer(text, add_special_tokens=False)["input_ids"], end]:
        answer.put(torch.tensor([number]))
        assert answer.text.startswith(seen[-1]) and "\ufffd" not in answer.text
        seen.append(answer.text)
    assert seen[0] == "" and seen[-1] == text and len(set(seen)) > 6


def test_a_continued_text_keeps_the_space_before_its_first_word():
    tokenizer = make_spaced("metaspace")
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("the river", "the river runs"))
    answer = Answer(tokenizer, [], prompt, continues=True)
    answer.put(torch.tensor(prompt))
    answer.put(torch.tensor(whole[len(prompt):]))
    assert whole[:len(prompt)] == prompt and answer.text == " runs"


def test_two_columns_show_the_end_of_long_answers_and_no_escape_of_a_model(chat_models):
    tokenizer = AutoTokenizer.from_pretrained(chat_models[0])
    answers = []
    for text in ("\n".join(f"line{number}" for number in range(50)), "👩\u200d🚀 \x1b[31mred"):
        answers.append(Answer(tokenizer, [], [], continues=False))
        answers[-1]._has_prompt = True
        answers[-1].put(torch.tensor(tokenizer(text)["input_ids"]))
    page = io.StringIO()
    console = PlainConsole(file=page, width=80, height=20)
    console.print(chat_module._columns(console, ["[one]", "two"], answers, 10))
    shown = page.getvalue()
    assert "line49" in shown and "line39" not in shown and "[one]" in shown
    console.print(chat_module._columns(console, ["[one]", "two"], answers))
    whole = page.getvalue()[len(shown):].splitlines()
    assert any("line0 " in line and "👩\u200d🚀 \\x1b[31mred" in line for line in whole)
    assert "\x1b" not in page.getvalue()


def test_bytes_that_are_no_text_are_answered_as_such(chat_models, monkeypatch, capsys):
    said = io.TextIOWrapper(io.BytesIO(b"hello \xff\xfe\n"), "utf-8", "strict")
    monkeypatch.setattr(sys, "stdin", said)
    assert main(["chat", str(chat_models[0]), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"reading {chat_models[0]}"]


@pytest.mark.parametrize(("option", "value"), [("--temperature", "-1"), ("--temperature", "nan"),
                                               ("--top-p", "0"), ("--max-new-tokens", "0")])
def test_options_out_of_range_are_refused_before_a_model_is_read(option, value, monkeypatch,
                                                                 capsys):
    status, _, err = talk(monkeypatch, capsys, "", "nowhere", option, value)
    assert status == 2 and option in err


def test_an_unfinished_run_is_named_with_the_way_to_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("")
    status, _, err = talk(monkeypatch, capsys, "", tmp_path)
    assert status == 2 and "has left no model yet" in err and "export" in err


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_program(chat_models):
    one, other, _ = chat_models
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "amid_ds", "chat", str(one), "--beside", str(other),
         "--max-new-tokens", "400"], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm"}, close_fds=True,
        start_new_session=True)
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, count: int = 1) -> None:
        nonlocal seen
        deadline = time.monotonic() + 240
        while seen.count(text) < count:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 4096)

    wait_for(b"> ")
    os.write(ours, b"hello\n")
    # Both names stand over columns: an answer is under way.
    wait_for(str(other).encode()[-6:], 3)
    process.send_signal(signal.SIGINT)
    wait_for(b"(stopped)")
    wait_for(b"> ", 2)
    os.write(ours, b"/reset\n")
    wait_for(b"> ", 3)
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)
