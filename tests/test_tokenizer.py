"""Tokenizers: lossless, equal to sentencepiece's own, compared by what they produce."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from amid_ds.cli import main
from amid_ds.config.recipe import Data
from amid_ds.data import (
    load_tokenizer,
    require_same_tokenizer,
    sample_texts,
    tokenizer_fingerprint,
    train_sentencepiece,
)
from amid_ds.data.tokenizer import PROBE_TEXTS, document_prefix_ids, encode_texts
from amid_ds.errors import InputError

STDLIB = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece((path.read_text(encoding="utf-8") for path in STDLIB[:60]), folder,
                        vocab_size=1200)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def awkward_texts(count):
    rng = random.Random(0)
    alphabet = " \n\taeself=\"'():_\r日é😀\x00\\0</s>"
    for _ in range(count):
        yield "".join(rng.choice(alphabet) if rng.random() < 0.6 else " " * rng.randint(1, 40)
                      for _ in range(rng.randint(1, 40)))


def test_trained_tokenizer_has_the_size_and_the_tokens_asked_for(tokenizer):
    assert len(tokenizer) == 1200
    assert (tokenizer.eos_token, tokenizer.pad_token,
            tokenizer.bos_token) == ("</s>", "<pad>", None)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.model_max_length > 1 << 40


def test_unseen_python_source_comes_back_to_the_last_character(tokenizer):
    texts = [path.read_text(encoding="utf-8") for path in STDLIB[60:]]
    texts = [text for text in texts if "\u2581" not in text] + list(awkward_texts(300))
    assert len(texts) > 300
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text


def test_encoding_equals_sentencepieces_own(folder, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [path.read_text(encoding="utf-8") for path in STDLIB[60:]] + list(awkward_texts(3000))
    assert tokenizer(texts)["input_ids"] == reference.encode(texts)


def test_special_tokens_spelt_in_a_text_stay_text(tokenizer):
    assert tokenizer.eos_token_id not in tokenizer("print('</s><pad>')")["input_ids"]


def test_training_is_deterministic(folder, tmp_path, tokenizer):
    train_sentencepiece((path.read_text(encoding="utf-8") for path in STDLIB[:60]), tmp_path,
                        vocab_size=1200)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="5000"):
        train_sentencepiece(["only a few words"], tmp_path, vocab_size=5000)


def test_a_vocabulary_beyond_32_bits_is_refused(tmp_path):
    with pytest.raises(InputError, match="could not train 4294967296"):
        train_sentencepiece(["only a few words"], tmp_path, vocab_size=2**32)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))


def swap_two_tokens(folder, tmp_path):
    """The same tokenizer but that two words have changed their ids: same size, same texts."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["def"], vocab["self"] = vocab["self"], vocab["def"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(tmp_path))


def test_the_same_size_is_not_the_same_tokenizer(folder, tokenizer, tmp_path):
    other = swap_two_tokens(folder, tmp_path)
    assert len(other) == len(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    with pytest.raises(InputError,
                       match=r"(?s)the text .*def f.* becomes.*student: \[.*teacher: \["):
        require_same_tokenizer(tokenizer, other, "student", "teacher")


def test_a_difference_that_no_probe_shows_is_found_in_the_vocabulary(folder, tokenizer):
    other = load_tokenizer(str(folder))
    other.add_tokens(["zzqqxx"])
    with pytest.raises(InputError, match=r"(?s)the id 1200 is.*'\(no token\)'.*'zzqqxx'"):
        require_same_tokenizer(tokenizer, other, "student", "teacher")


def test_a_tokenizer_is_the_same_as_itself(folder, tokenizer):
    require_same_tokenizer(tokenizer, load_tokenizer(str(folder)), "student", "teacher")


def test_asking_the_backend_gives_the_wrappers_ids(folder, tmp_path):
    """Also if tokenizer.json truncates, pads or frames the text, and it has a special token."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing("</s> $0", special_tokens=[("</s>", 1)])
    for split in (False, True):
        framing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>",
                                          pad_token="<pad>", split_special_tokens=split)
        framing.save_pretrained(tmp_path)
        asked = load_tokenizer(str(tmp_path))
        texts = ["def f(x):</s>\n    return x", "é", *PROBE_TEXTS]
        assert encode_texts(asked, texts) == [asked(text, add_special_tokens=False)["input_ids"]
                                        for text in texts]
        asked.split_special_tokens = not split
        assert encode_texts(asked, texts) == [asked(text, add_special_tokens=False)["input_ids"]
                                        for text in texts]
        assert document_prefix_ids(asked) == [1]
    assert document_prefix_ids(load_tokenizer(str(folder))) == []


def test_a_tokenizer_is_trained_on_a_recipes_data(tmp_path, capsys):
    """By the command, on the beginning of each source, in proportion to its weight."""
    texts = [path.read_text(encoding="utf-8") for path in STDLIB[:60]]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n"
                                                 for text in texts))
    turns = [{"role": "user", "content": "x = 1"}, {"role": "assistant", "content": "zq" * 5000}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    recipe = {"student": {"model": "none"}, "output_dir": "none",
              "train": {"steps": 1, "global_batch_size": 1},
              "data": {"train": [{"path": str(tmp_path / "code.jsonl"), "weight": 3.0},
                                 {"path": str(tmp_path / "chat.jsonl"), "messages": "turns"}]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = str(tmp_path / "tokenizer")
    assert main(["tokenizer", "train", str(tmp_path / "recipe.yaml"), out, "--vocab-size",
                 "900"]) == 0
    assert capsys.readouterr().out.strip() == out
    tokenizer = load_tokenizer(out)
    assert len(tokenizer) == 900 and len(tokenizer("zqzqzqzqzqzqzqzq")["input_ids"]) == 1
    data = Data(**recipe["data"])
    some = list(sample_texts(data, 400_000))
    assert some[-2:] == ["x = 1", "zq" * 5000] and some[:-2] == texts[:len(some) - 2]
    assert sum(map(len, some[:-3])) < 300_000 <= sum(map(len, some[:-2]))


@pytest.mark.parametrize("settings", [
    # As Llama 2 has it.
    {"normalization_rule_name": "identity", "add_dummy_prefix": True,
     "remove_extra_whitespaces": False,
     "byte_fallback": True},
    # Sentencepiece's own defaults.
    {},
    {"normalization_rule_name": "identity", "add_dummy_prefix": False, "byte_fallback": True,
     "user_defined_symbols": ["<sep>", "\n"], "split_by_whitespace": False,
     "remove_extra_whitespaces": False},
], ids=["llama", "default", "symbols"])
def test_a_raw_model_file_works_as_a_tokenizer(tmp_path, settings):
    lines = [line for path in STDLIB[:40] for line in path.read_text(encoding="utf-8").splitlines()
             if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "raw"), model_type="bpe",
        vocab_size=1000, minloglevel=2, num_threads=1, max_sentence_length=10_000, **settings)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "raw.model"))
    tokenizer = load_tokenizer(str(tmp_path / "raw.model"))
    assert (tokenizer.bos_token, tokenizer.eos_token,
            tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    texts = [*lines[::7], "a <sep> b<sep>c", "two  spaces   here ", " one before",
             "line\nline\n\n  end\n", "日本 é ﬁ", "<unk></s><0x0A>"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == own.encode(text), text
    assert tokenizer.decode(tokenizer("def f(x): return x")["input_ids"]) == "def f(x): return x"


def test_a_model_whose_rules_cannot_be_reproduced_is_refused(tmp_path):
    """sentencepiece cuts out symbols of several letters before it adds the prefix; we do after."""
    lines = [line for path in STDLIB[:10] for line in path.read_text(encoding="utf-8").splitlines()
             if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "raw"), model_type="bpe",
        vocab_size=500, minloglevel=2, user_defined_symbols=["def f"])
    with pytest.raises(InputError, match="cannot be reproduced"):
        load_tokenizer(str(tmp_path / "raw.model"))


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"something else")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))


@pytest.mark.parametrize("kind", ["unigram", "word"])
def test_a_sentencepiece_model_of_another_type_is_refused(tmp_path, kind):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"]), model_prefix=str(tmp_path / "other"),
        model_type=kind, vocab_size=11, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(InputError, match="another type than BPE"):
        load_tokenizer(str(tmp_path / "other.model"))
