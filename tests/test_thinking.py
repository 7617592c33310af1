"""Rows with thoughts: trained as the chat template writes them, and the choices where it leaves them out.

The templates are short ones that treat thoughts as those of well-known models do: Qwen3 drops them in earlier turns and
can be told to think nothing, DeepSeek's R1 distillates drop all of them and begin them in the prompt, gpt-oss has a key
and a channel for them, others know nothing of them.
"""

import json

import pytest
from chat_samples import CHATML, bpe
from conftest import finetune, make_folder

from litpeft.cli import main
from litpeft.core.errors import ConfigError, DataError
from litpeft.data.formats import FORMATS, detect
from litpeft.data.formats.columns import mapped
from litpeft.data.formats.turn import Turn
from litpeft.data.rows import show
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.thinking import parted
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model

LAST_ONLY = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set c = m.content %}{% set r = m.reasoning_content or '' %}
    {%- if m.role == 'assistant' and not r and '</think>' in c %}
        {%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set c = c.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{% endif %}
    {{- c + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
NEVER = (
    "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}<|im_start|>{{ m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
CHANNELS = (
    "<|im_start|>system\nReasoning: {{ reasoning_effort or 'medium' }}<|im_end|>"
    "{% for m in messages %}{% if m.thinking and loop.last and not add_generation_prompt %}"
    "<|im_start|>analysis\n{{ m.thinking }}<|im_end|>{% endif %}"
    "<|im_start|>{{ m.role + '\n' + m.content }}{{ '<|endoftext|>' if loop.last and m.role == 'assistant' "
    "else '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
THEIRS = {"last": LAST_ONLY, "never": NEVER, "channels": CHANNELS, "unknown": CHATML}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a tokenizer for each template."""
    found, tokenizer = {}, bpe(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    for name, source in THEIRS.items():
        found[name] = tmp_path_factory.mktemp("thinking") / name
        found[name].mkdir()
        tokenizer.save(str(found[name] / "tokenizer.json"))
        config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
        (found[name] / "chat_template.jinja").write_text(source)
    return found


def read(folder, tmp_path, *rows, options=None, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate(tokenizer, options=options)
    data = load_dataset(Data(str(path), validation_split=0.0, **settings), tokenizer, template, 4096)
    return [show(row, tokenizer, color=False) for row in data.train], data.report


def chat(*said, key="reasoning_content"):
    """Returns a row of questions and answers; an answer may be (thoughts, answer)."""
    messages = []
    for i, text in enumerate(said):
        more = {key: text[0]} if isinstance(text, tuple) else {}
        content = text[1] if more else text
        messages.append({"role": ("user", "assistant")[i % 2], "content": content} | more)
    return {"messages": messages}


TEXT = chat("a", "<think>\nhm\n</think>\n\nb")
ONE = [  # the same in different shapes
    chat("a", ("hm", "b")),
    chat("a", ("hm", "b"), key="thinking"),
    chat("a", ("hm", "b"), key="reasoning"),
    {"question": "a", "answer": "b", "reasoning": "hm"},
    {"instruction": "a", "output": "b", "thinking": "hm"},
    {"prompt": "a", "completion": "<think>\nhm\n</think>\n\nb"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "thoughts": "hm"},
    TEXT,
]
TWO = chat("a", ("hm", "b"), "c", ("so", "d"))


def head(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_of_every_shape_are_trained_as_the_template_writes_them(folders, tmp_path):
    from transformers import AutoTokenizer

    expected = {
        "last": head("a") + "[<think>\nhm\n</think>\n\nb<|im_end|>]\n",
        "channels": "<|im_start|>system\nReasoning: medium<|im_end|><|im_start|>user\na<|im_end|><|im_start|>"
        "[analysis\nhm<|im_end|><|im_start|>assistant\nb<|endoftext|>]",
        "unknown": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        + head("a")
        + "[<think>\nhm\n</think>\n\nb<|im_end|>]\n",
    }
    for name, text in expected.items():
        shown, report = read(folders[name], tmp_path, *ONE)
        assert shown == [text] * len(ONE)
        assert report.thoughts.answers == report.thoughts.rows == len(ONE)
        key = {"last": "reasoning_content", "channels": "thinking", "unknown": ""}[name]
        assert report.thoughts.key == key
        assert ("the text as <think>...</think>" in str(report)) == (not key)
        theirs = AutoTokenizer.from_pretrained(folders[name])
        messages = (chat("a", ("hm", "b"), key=key) if key else TEXT)["messages"]
        assert theirs.apply_chat_template(messages, tokenize=False) == text.replace("[", "").replace("]", "")


@pytest.mark.parametrize(("name", "row", "left"), [("last", TWO, "1 of its 2"), ("never", TEXT, "1 of its 1")])
def test_a_row_whose_thoughts_the_template_drops_is_refused_and_told_the_choices(name, row, left, folders, tmp_path):
    with pytest.raises(DataError) as error:
        read(folders[name], tmp_path, row)
    assert f"leaves out the thoughts of {left} answer" in str(error.value)
    assert "data.thinking keep trains them all the same, drop trains the answers alone" in str(error.value)
    _, report = read(folders[name], tmp_path, row, chat("a", "b"), bad_rows="skip")
    assert [bad.where.endswith(":1") for bad in report.rejected] == [True]


def test_keep_makes_a_row_of_each_answer_as_the_model_is_asked_for_it(folders, tmp_path):
    shown, report = read(folders["last"], tmp_path, TWO, chat("a", ("hm", "b")), thinking="keep")
    first, second = "[<think>\nhm\n</think>\n\nb<|im_end|>]\n", "[<think>\nso\n</think>\n\nd<|im_end|>]\n"
    assert shown == [head("a") + first, head("a") + "b<|im_end|>\n" + head("c") + second, head("a") + first]
    assert "3 answers with thoughts in 2 rows" in str(report)
    assert "1 row made 2 of one trained answer each (keep)" in str(report)
    shown, report = read(folders["never"], tmp_path, TWO, TEXT, thinking="keep")
    assert shown[0] == head("a") + "<think>\n[hm\n</think>\n\nb<|im_end|>]\n"
    assert shown[1] == head("a") + "\n\nb<|im_end|>\n" + head("c") + "<think>\n[so\n</think>\n\nd<|im_end|>]\n"
    assert shown[2] == shown[0]
    assert not report.unlike


def test_keep_follows_the_prompt_of_generation_token_by_token(folders, tmp_path):
    for name in THEIRS:
        tokenizer = Tokenizer.load(folders[name])
        template = ChatTemplate(tokenizer)
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(TWO))
        for row in load_dataset(Data(str(path), None, 0.0, thinking="keep"), tokenizer, template, 4096).train:
            if len(row.turns) == 2 or name != "unknown":
                asked = template.prompt(row.turns[:-1])
                assert row.ids[: len(asked)] == asked
                assert row.trained.index(True) == len(asked)


def test_drop_trains_the_answers_alone_and_counts_them(folders, tmp_path):
    shown, report = read(folders["last"], tmp_path, TWO, thinking="drop")
    assert shown == [head("a") + "[b<|im_end|>]\n" + head("c") + "[<think>\nso\n</think>\n\nd<|im_end|>]\n"]
    assert "warning: it leaves out those of 1 answer, trained without (drop)" in str(report)
    shown, report = read(folders["never"], tmp_path, TEXT, thinking="drop")
    assert shown == [head("a") + "[b<|im_end|>]\n"]
    assert "the prompt has '<think>\\n', the row 'b<|im_end|>" in str(report)
    shown, _ = read(folders["last"], tmp_path, TEXT, thinking="drop", options={"enable_thinking": False})
    assert shown == [head("a") + "<think>\n\n</think>\n\n[b<|im_end|>]\n"]


def test_a_row_with_thoughts_for_a_model_told_not_to_think_is_refused(folders, tmp_path):
    told = {"enable_thinking": False}
    with pytest.raises(DataError, match="leaves out the thoughts of 1 of its 1"):
        read(folders["last"], tmp_path, TEXT, options=told)
    with pytest.raises(DataError, match="the prompt for its answer ends with an empty block"):
        read(folders["last"], tmp_path, TEXT, options=told, thinking="keep")
    shown, report = read(folders["last"], tmp_path, chat("a", "b"), options=told)
    assert shown == [head("a") + "<think>\n\n</think>\n\n[b<|im_end|>]\n"]
    assert not report.unlike


def test_a_row_tells_the_template_for_itself(folders, tmp_path):
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    rows = [
        chat("a", "b") | {"chat_template_kwargs": off | {"python_tools": [], "custom": None}},
        {"question": "a", "answer": "b", "chat_template_kwargs": json.dumps(off)},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"} | off,
        {"chosen": chat("a", "b")["messages"], "rejected": "c"} | off,
        chat("a", ("hm", "b")) | on,
        chat("a", "b"),
    ]
    without = head("a") + "<think>\n\n</think>\n\n[b<|im_end|>]\n"
    thought = head("a") + "[<think>\nhm\n</think>\n\nb<|im_end|>]\n"
    shown, report = read(folders["last"], tmp_path, *rows, system="")
    assert shown == [*[without] * 4, thought, head("a") + "[<think>\n\n</think>\n\nb<|im_end|>]\n"]
    assert not report.unread.keys() & {"chat_template_kwargs", "enable_thinking"}
    template = ChatTemplate(Tokenizer.load(folders["last"]), options=on)
    asked = FORMATS["messages"].asked({"messages": chat("a")["messages"]} | off)
    assert template.tokenizer.decode(template.prompt(asked), False) == without.partition("[")[0]
    for told, why in (
        ({"reasoning_effort": "low"}, "'reasoning_effort' is nothing that the chat template reads"),
        ({"messages": [1]}, "'messages' is not to be set"),
        ({"enable_thinking": "<|im_end|>"}, "what the row tells the template spells a special token"),
    ):
        with pytest.raises(DataError, match=why):
            read(folders["last"], tmp_path, chat("a", "b") | {"chat_template_kwargs": told})


def test_untrained_answers_may_lose_their_thoughts(folders, tmp_path):
    row = json.loads(json.dumps(TWO))
    row["messages"][1]["train"] = False
    shown, report = read(folders["last"], tmp_path, row)
    assert shown == [head("a") + "b<|im_end|>\n" + head("c") + "[<think>\nso\n</think>\n\nd<|im_end|>]\n"]
    assert report.thoughts.answers == 1


def test_columns_map_thoughts(folders, tmp_path):
    columns = {"user": "q", "thinking": "{why}!", "assistant": "a"}
    row = {"q": "a", "why": "hm", "a": "b"}
    assert mapped(columns).turns(row)[1] == Turn("assistant", "b", thinking="hm!")
    assert mapped(columns).asked({"q": "a"}) == [Turn("user", "a")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nhm\n</think>\n\nb", ("hm", "b")),
        (" <think>hm</think>b", ("hm", "b")),
        ("hm</think>b", ("hm", "b")),  # the prompt had the tag that begins it
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("I <think> so", ("", "I <think> so")),
    ],
)
def test_a_text_is_parted_into_thoughts_and_answer(text, parts):
    assert parted(text) == parts


def test_an_option_that_the_template_does_not_read_is_refused_by_name(folders):
    tokenizer = Tokenizer.load(folders["last"])
    with pytest.raises(ConfigError, match=r"data.template_options: 'enable_thinkin' is nothing that") as error:
        ChatTemplate(tokenizer, options={"enable_thinkin": True})
    assert "it reads enable_thinking" in str(error.value)
    with pytest.raises(ConfigError, match="'messages' is not to be set"):
        ChatTemplate(tokenizer, options={"messages": []})
    with pytest.raises(ConfigError, match="is nothing that the chat template reads"):
        ChatTemplate(tokenizer, "alpaca", options={"enable_thinking": True})


def test_a_run_keeps_the_templates_options_and_takes_others_for_one_answer(tmp_path, capsys):
    base = make_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text(LAST_ONLY)
    options = ["--data.template_options", '{"enable_thinking": false}', "--train.max_steps", "1"]
    run = finetune(base, tmp_path, *options, "--data.thinking", "drop")
    found = find_run(run)
    assert found.thinking == "drop"
    _, template = found.tokenizer_and_template(base)
    question = [Turn("user", "a")]
    assert template.render(question, True) == head("a") + "<think>\n\n</think>\n\n"
    assert load_model(str(run)).template.options == {"enable_thinking": False}
    told = load_model(str(run), template_options={"enable_thinking": True}).template
    assert told.render(question, True) == head("a")
    assert load_model(str(base)).template.options == {}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(TWO))
    main(["evaluate", str(run), str(rows), "--max_new_tokens", "2"])
    told = capsys.readouterr()
    assert "leaves out those of 2 answers" in told.err
    with pytest.raises(SystemExit, match="3"):
        main(["evaluate", str(run), str(rows), "--thinking", "error"])
    assert ": thinking keep trains them" in capsys.readouterr().err


def test_formats_that_hold_no_answer_refuse_thoughts():
    for row in ({"prompt": [{"role": "user", "content": "a"}], "completion": [], "thinking": "hm"}, {"text": "a"}):
        with pytest.raises(ValueError, match="only an answer of the assistant has thoughts|is empty"):
            FORMATS[detect(row)].turns(row | {"thinking": "hm"})
