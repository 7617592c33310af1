"""Chats, chat templates in the styles of well-known models, and small tokenizers that go with them."""

import io
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litpeft.data.formats.turn import Turn

WORDS = [
    "the",
    "cat",
    "12",
    "naïve",
    "Größe",
    "日本",
    "語",
    "x=1;",
    "ok?",
    "Paris.",
    "yes,",
    "no!",
    "🙂",
    "e\u0301",
    "fox--dog",
]
WORDS += ["", "two\ttab", "(a)", "émigré", "3.14", "«q»"]
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(200)]

# ChatML with a system prompt of its own, like SmolLM2's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GENERATION = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Only the last answer keeps what it thought, so a chat is no longer the start of the chat that goes on.
THINKING = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# No special token ends a turn.
VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# name -> template, special tokens, bos, eos, what an answer becomes in it
STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", "{}<|im_end|>"),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "{}<|eot_id|>",
    ),
    "llama2": (LLAMA2, ["<s>", "</s>"], "<s>", "</s>", " {} </s>"),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "<s>", "</s>", "{}</s>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", "{}<end_of_turn>"),
    "generation": (GENERATION, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "{}<|im_end|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|endoftext|>", "{}<|im_end|>"),
}


def bpe(special: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of a few hundred merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_folder(folder: Path, style: str) -> Path:
    """Writes tokenizer.json, its config and the chat template of a style."""
    template, special, bos, eos, _ = STYLES[style]
    folder.mkdir(parents=True, exist_ok=True)
    bpe(special).save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def sentencepiece_model(kind: str = "bpe") -> bytes:
    """Returns a small tokenizer.model that treats text as Llama's does."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=350,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def chats(count: int, seed: int, system: bool = True) -> list[list[Turn]]:
    """Returns chats of one to four exchanges; every third starts with a system message, some user turns are empty."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "so"

    found = []
    for number in range(count):
        turns = [Turn("system", words())] if system and number % 3 == 0 else []
        for _ in range(rng.randint(1, 4)):
            turns += [Turn("user", words() if rng.random() < 0.9 else ""), Turn("assistant", words())]
        found.append(turns)
    return found
