"""Chat templates by name, for models that have none of their own: `data.template chatml`.

Each writes the text that the models which made it known were trained on. BOS stands where a model's tokenizer begins a
text with it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litpeft.core.errors import some
from litpeft.data.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks that some programs do not know


@dataclass(frozen=True)
class BuiltIn:
    """A template, and the special tokens that it writes beside BOS and EOS."""

    source: str
    tokens: tuple[str, ...] = ()

    def fits(self, tokenizer: Tokenizer) -> bool:
        """Returns whether the tokenizer has the template's tokens."""
        return set(self.tokens) <= set(tokenizer.backend.specials)

    def source_for(self, tokenizer: Tokenizer) -> str:
        """Returns the template's text; raises ValueError where the tokenizer has not got its tokens."""
        if not self.fits(tokenizer):
            missing = [token for token in self.tokens if token not in tokenizer.backend.specials]
            raise ValueError(f"it writes {some(missing)}, which the tokenizer has not got as special tokens")
        return self.source if tokenizer.adds_bos else self.source.replace("{{ bos_token }}", "")


SPEECH = "{% generation %}{{ WORDS }}{% endgeneration %}"
IN_TURN = """\
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{ raise_exception('this template takes turns of user and assistant only') }}
{%- endif -%}"""
# the system message, if there is one, and the turns after it
SYSTEM_FIRST = """\
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}"""


def with_heads(head: str, end: str, trim: bool = False) -> str:
    """Returns a template that writes each turn, whoever speaks, as a head with the ROLE, the content and an end."""
    content = f"message.content{' | trim' if trim else ''}"
    head = head.replace("ROLE", "' + message.role + '")
    speech = SPEECH.replace("WORDS", f"{content} + {end}")
    return (
        "{%- for message in messages -%}"
        f"{{{{ '{head}' }}}}"
        f"{{%- if message.role == 'assistant' -%}}{speech}{{%- else -%}}{{{{ {content} + {end} }}}}{{%- endif -%}}"
    )


# The prompt of the Alpaca data set, as Lit-GPT writes it: with a line break after "### Response:", so that no token
# spans prompt and answer. A system message replaces the first sentences; further turns repeat the headings.
ALPACA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- set messages = messages[1:] -%}
{%- elif messages[0].input -%}
{{ 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- else -%}
{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{ raise_exception('the alpaca template takes turns of user and assistant only') }}
{%- elif message.role == 'user' -%}
{{ '\\n\\n### Instruction:\\n' + message.content }}
{{- '\\n\\n### Input:\\n' + message.input if message.input }}
{{- '\\n\\n### Response:\\n' }}
{%- else -%}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""
CHATML = (
    "{{ bos_token }}"
    + with_heads("<|im_start|>ROLE\\n", "'<|im_end|>'")
    + "{{ '\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    + with_heads("<|start_header_id|>ROLE<|end_header_id|>\\n\\n", "'<|eot_id|>'", trim=True)
    + "{%- endfor -%}{%- if add_generation_prompt -%}"
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)
PHI = (  # of Phi-3
    with_heads("<|ROLE|>\\n", "'<|end|>'")
    + "{{ '\\n' }}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"
)
ZEPHYR = (
    with_heads("<|ROLE|>\\n", "eos_token")
    + "{{ '\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
LLAMA_2 = (
    SYSTEM_FIRST
    + "{%- if system -%}{%- set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -%}{%- endif -%}"
    + "{%- for message in messages -%}"
    + IN_TURN
    + "{%- if message.role == 'user' -%}{{ bos_token }}"
    + "{{ '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}"
    + "{%- else -%}"
    + SPEECH.replace("WORDS", "' ' + message.content | trim + ' ' + eos_token")
    + "{%- endif -%}{%- endfor -%}"
)
SYSTEM_BEFORE_QUESTION = (  # as far as the words of the user
    "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{%- if system -%}{%- set system = system + '\\n\\n' -%}{%- endif -%}"
    + "{%- for message in messages -%}"
    + IN_TURN
    + "{%- if message.role == 'user' -%}"
)
MISTRAL = (  # of Mistral-7B-Instruct v0.2, to which this adds a system message: before the first question
    SYSTEM_BEFORE_QUESTION
    + "{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    + "{%- else -%}"
    + SPEECH.replace("WORDS", "message.content + eos_token")
    + "{%- endif -%}{%- endfor -%}"
)
GEMMA = (  # a system message as in Gemma 3: before the first question
    SYSTEM_BEFORE_QUESTION
    + "{{ '<start_of_turn>user\\n' + (system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}"
    + "{%- else -%}{{ '<start_of_turn>model\\n' }}"
    + SPEECH.replace("WORDS", "message.content | trim + '<end_of_turn>'")
    + "{{ '\\n' }}{%- endif -%}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
VICUNA = (  # of version 1.1 and later
    "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{{ (system or 'A chat between a curious user and an artificial intelligence assistant. "
    + "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') + ' ' }}"
    + "{%- for message in messages -%}"
    + IN_TURN
    + "{%- if message.role == 'user' -%}{{ 'USER: ' + message.content + ' ' }}"
    + "{%- else -%}{{ 'ASSISTANT:' }}"
    + SPEECH.replace("WORDS", "' ' + message.content + eos_token")
    + "{%- endif -%}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
BUILT_IN = {
    "alpaca": BuiltIn(ALPACA),
    "chatml": BuiltIn(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama-2": BuiltIn(LLAMA_2),
    "llama-3": BuiltIn(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": BuiltIn(MISTRAL),
    "gemma": BuiltIn(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "phi": BuiltIn(PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "vicuna": BuiltIn(VICUNA),
    "zephyr": BuiltIn(ZEPHYR),
}


def with_defaults(source: str, options: Mapping[str, Any]) -> str:
    """Returns a template that takes these options where it is not told others."""
    told = "".join(
        f"{{%- if {key} is not defined -%}}{{%- set {key} = {in_jinja(value)} -%}}{{%- endif %}}"
        for key, value in options.items()
    )
    if source.startswith(told):
        return source
    return told + ("\n" if source.startswith("\n") else "") + source  # a line break after a tag is cut


def in_jinja(value: Any) -> str:
    """Returns a value of JSON as a template spells it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {in_jinja(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_jinja, value))}]"
    return "none" if value is None else json.dumps(value)
