"""Run by a Python with llama-cpp-py-sync: MODEL.gguf TEXT [TEXT ...], what llama.cpp makes of it.

Prints one line of JSON: the ids of each text, and the 12 tokens after the first one, greedily.
"""

import json
import sys

from llama_cpp_py_sync import Llama

model = Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False, type_k="f32", type_v="f32")
texts = sys.argv[2:]
text = model.generate(texts[0], max_tokens=12, temperature=0.0, repeat_penalty=1.0)
print(json.dumps({"ids": [model.tokenize(text) for text in texts], "text": text}))
