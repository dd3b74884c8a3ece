"""Run by a Python with vLLM: MODEL IDS ADAPTER_OR_EMPTY; prints the 12 ids after IDS, greedily."""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, ids, adapter = sys.argv[1:]
    engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=128,
                 max_num_seqs=1, enable_lora=bool(adapter))
    answers = engine.generate(
        [{"prompt_token_ids": json.loads(ids)}],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None)
    print(json.dumps(list(answers[0].outputs[0].token_ids)))
