"""Answers in channels: what is shown, what is put into the history, what an evaluation compares.

The template is a short one that treats messages as gpt-oss's does: thoughts of earlier answers are dropped, the last
answer's stand in a channel of their own, and a prompt ends with the header's beginning.
"""

import json

import pytest
from chat_samples import bpe
from conftest import make_folder

from litpeft.data.formats.turn import Turn
from litpeft.data.templates import ChatTemplate
from litpeft.data.thinking import closed, parted
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.draft import Draft
from litpeft.generate.load import load_model
from litpeft.generate.session import Session
from litpeft.generate.settings import Sampling

SPECIAL = [
    "<|start|>",
    "<|return|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
]  # 1 ends a text, as config.json has it
HARMONY = (
    "<|start|>system<|message|>Reasoning: low<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set ends = loop.last and not add_generation_prompt %}"
    "{% if ends and m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if ends else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QUESTION = Turn("user", "the cat?")
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = make_folder(tmp_path_factory.mktemp("channels") / "base", vocab_size=512)
    tokenizer = bpe(SPECIAL)
    tokenizer.save(str(base / "tokenizer.json"))
    config = {"eos_token": "<|return|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text(HARMONY)
    return base


@pytest.fixture(scope="module")
def template(folder):
    return ChatTemplate(Tokenizer.load(folder))


def written(template, text, limit=999, prompt=None, stop=()):
    """Returns the answer that a model gives by these tokens, and the pieces that are shown."""
    tokenizer = template.tokenizer
    prompt = template.prompt([QUESTION]) if prompt is None else tokenizer.encode(prompt)
    draft = Draft(prompt, tokenizer, Sampling(stop=stop), template.stop_ids, limit)
    pieces = [draft.add(token) for token in tokenizer.encode(text)[:limit] if not draft.ended]
    assert "".join(pieces) == draft.answer.text
    return draft.answer.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"<|channel|>analysis<|message|>Größe<|end|>{FINAL}日本 🙂<|return|>", "<think>\nGröße\n</think>\n\n日本 🙂"),
        ("<|channel|>final<|message|>yes,<|return|>", "yes,"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
         f"{FINAL}c<|return|>", "<think>\na\n\nb\n</think>\n\nc"),
        (f"<|channel|>analysis<|message|>a<|end|>{FINAL}<|return|>", "<think>\na\n</think>\n\n"),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>c<|return|>", "<think>\na\n</think>\n\nc"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.fox<|channel|>commentary json"
         '<|message|>{"x": 1}<|return|>', '<think>\na\n</think>\n\nto=functions.fox {"x": 1}'),
        (' to=functions.fox<|channel|>commentary json<|message|>{"x": 1}<|return|>', 'to=functions.fox {"x": 1}'),
        ("the cat says no!<|return|>", "the cat says no!"),
        (f"<|channel|>final<|message|>a<|end|>{FINAL}b<|return|>", "a\n\nb"),
        ("<|return|>", ""),
    ],
)  # fmt: skip
def test_thoughts_are_shown_apart_and_headers_are_not_shown(template, text, shown):
    assert written(template, text) == shown


def test_an_answer_in_a_message_that_the_prompt_began_is_shown_as_it_comes(template):
    head = "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>"
    assert written(template, "yes,<|return|>", prompt=f"{head}final<|message|>") == "yes,"
    begun = written(template, f"hm<|end|>{FINAL}yes,<|return|>", prompt=f"{head}analysis<|message|>")
    assert parted(begun) == ("hm", "yes,")


def test_cut_answers_and_stop_strings_end_where_they_should(template):
    text = f"<|channel|>analysis<|message|>hm hm<|end|>{FINAL}yes, no!<|return|>"
    whole, count = written(template, text), len(template.tokenizer.encode(text))
    for limit in range(1, count):
        assert whole.startswith(written(template, text, limit))
    assert written(template, text, stop=("no",)) == "<think>\nhm hm\n</think>\n\nyes, "


def test_the_history_is_what_the_template_makes_of_thoughts_and_answer(folder, template):
    from transformers import AutoTokenizer

    talk = Session({"model": load_model(str(folder), precision="32-true")}, None, Sampling())
    said = written(template, f"<|channel|>analysis<|message|>hm<|end|>{FINAL}yes,<|return|>")
    talk.turns = [QUESTION, Turn("assistant", said), Turn("user", "ok?")]
    messages = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "yes,", "thinking": "hm"}]
    messages.append({"role": "user", "content": "ok?"})
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert talk.loaded.template.prompt(talk.turns) == list(ids)
    assert "hm" not in theirs.decode(ids)


def test_a_text_without_such_headers_is_decoded_whole(template):
    raw = written(template, "the cat<|message|>yes,", prompt="the cat")
    assert raw == "the catyes,"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("<think>\nhm", ("hm", "")), ("<think>\nhm\n</think>\n\nb", ("hm", "b")), ("a <think> b", ("", "a <think> b"))],
)
def test_thoughts_that_were_cut_are_closed_before_the_history_has_them(text, parts):
    assert parted(closed(text)) == parts
