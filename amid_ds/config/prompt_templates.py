"""How an instruction becomes a prompt: the templates that the published instruction sets are used with, by name.

A model answers in the words that it was tuned with, so results compare only under the same template, to the last line
end. These are facts of other projects; a template is named in the recipe and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping

BEGINS = "Below is an instruction that describes a task"
ASKS = "Write a response that appropriately completes the request."
FURTHER = ", paired with an input that provides further context"

# (with an input, without one). minillm: MiniLLM, DistiLLM, ABKD and AMiD; alpaca: Stanford Alpaca, whose prompt ends
# without a line end.
TEMPLATES: Mapping[str, tuple[str, str]] = {
    name: (f"{BEGINS}{FURTHER}. {ASKS}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n"
           f"### Response:{end}",
           f"{BEGINS}. {ASKS}\n\n### Instruction:\n{{instruction}}\n\n### Response:{end}")
    for name, end in (("minillm", "\n"), ("alpaca", ""))
}


def fill_template(template: str, instruction: str, context: str) -> str:
    """The prompt for an instruction with its input, which may be empty."""
    with_input, without = TEMPLATES[template]
    return with_input.format(instruction=instruction, input=context) if context else without.format(
        instruction=instruction)
