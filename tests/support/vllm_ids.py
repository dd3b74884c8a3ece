"""Run by a Python with vLLM: MODEL IDS; prints the 12 ids after IDS, greedily."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, ids = sys.argv[1:]
    engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=128,
                 max_num_seqs=1)
    answers = engine.generate(
        [{"prompt_token_ids": json.loads(ids)}],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    print(json.dumps(list(answers[0].outputs[0].token_ids)))
