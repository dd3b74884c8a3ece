"""The prompt templates of the published instruction sets, by name.

A model answers in the format that it was tuned with, so results compare only under the same
template, to the last line end. A template is named in the recipe and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping

_OPENING = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = "Write a response that appropriately completes the request."

# minillm is also DistiLLM's, ABKD's and AMiD's; alpaca is Stanford Alpaca's, whose prompt ends
# without a line end.
_LAST_CHARACTER = {"minillm": "\n", "alpaca": ""}

# name -> (template with an input, template without one).
TEMPLATES: Mapping[str, tuple[str, str]] = {
    name: (f"{_OPENING}{_WITH_INPUT}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n"
           f"### Input:\n{{input}}\n\n### Response:{end}",
           f"{_OPENING}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:{end}")
    for name, end in _LAST_CHARACTER.items()
}


def fill_template(template: str, instruction: str, context: str) -> str:
    """The prompt for an instruction and its input, which may be empty."""
    with_input, without_input = TEMPLATES[template]
    if context:
        return with_input.format(instruction=instruction, input=context)
    return without_input.format(instruction=instruction)
