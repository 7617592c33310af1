"""A model as lm-evaluation-harness asks it, beside transformers'; tests/parity has the harness itself."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_folder

from litpeft.core.errors import ConfigError, DataError
from litpeft.generate.evaluate import evaluate
from litpeft.generate.likelihood import likelihoods, windows
from litpeft.generate.load import load_model
from litpeft.generate.settings import Evaluate
from litpeft.generate.tasks import TaskModel, sampling_of

TEXTS = [  # contexts and continuations; some share all but their last token, one is longer than the model reads
    *(("What is the colour of the sky?\nAnswer:", f" {letter}") for letter in "ABC"),
    ("Snow is ", "white, and so on"),
    ("", "It begins with nothing"),
    ("<|im_start|>user\nHi<|im_end|>\n", "no"),
    ("too long " * 80, "cut on the left"),
    ("long ", "answer " * 60),
]


def asked(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def reference(folder, texts: list[tuple[str, str]], reach: int) -> list[tuple[float, bool]]:
    """Returns the sum of transformers' log_softmax over each continuation, one text at a time, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for context, rest in texts:
        kept = context.rstrip()
        given = tokenizer(kept).input_ids if kept else [tokenizer.bos_token_id]
        ids = tokenizer(context + rest).input_ids if kept else given + tokenizer(rest).input_ids
        scored, ids = ids[len(given) :], ids[-(reach + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, -len(scored) :]
        own = logits.log_softmax(-1)[torch.arange(len(scored)), scored].sum().item()
        found.append((own, logits.argmax(-1).tolist() == scored))
    return found


def test_likelihoods_are_those_of_transformers_one_text_at_a_time(tiny_folder) -> None:
    loaded = load_model(str(tiny_folder), precision="64-true")
    asking = TaskModel(loaded, 4)
    want = reference(tiny_folder, TEXTS, loaded.model.reach)
    (greedy,) = asking.generate_until([asked(TEXTS[3][0].rstrip(), {"max_gen_toks": 3})])
    texts = [*TEXTS, (TEXTS[3][0].rstrip(), greedy)]
    got = asking.loglikelihood([asked(*pair) for pair in texts])
    assert [log_p for log_p, _ in got[:-1]] == pytest.approx([log_p for log_p, _ in want], abs=1e-4)
    assert [greedy for _, greedy in got] == [*(greedy for _, greedy in want), True]


def test_each_token_of_a_text_is_scored_in_one_piece(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "short", max_position_embeddings=64)
    loaded = load_model(str(folder), precision="64-true")
    text = "All of this is longer than what the model reads at once. " * 4
    ids = loaded.tokenizer.encode(text)
    pieces = [(list(given), list(scored)) for given, scored in windows(ids, 0, 64)]
    assert [token for _, scored in pieces for token in scored] == ids
    assert [len(given) for given, _ in pieces] == [1, 1, 1, 65 - len(ids) % 64]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    want = 0.0
    for given, scored in pieces:
        with torch.no_grad():
            log_p = model(torch.tensor([[*given, *scored[:-1]]])).logits[0, len(given) - 1 :].log_softmax(-1)
        want += log_p[torch.arange(len(scored)), scored].sum().item()
    assert TaskModel(loaded, 4).loglikelihood_rolling([asked(text)]) == pytest.approx([want], abs=1e-4)


def test_answers_end_where_the_task_says_and_long_prompts_lose_their_beginning(tiny_folder) -> None:
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(tiny_folder), precision="32-true")
    prompts = ["Colour of snow?", "x" * 600, ""]
    got = TaskModel(loaded, 2).generate_until([asked(prompt, {"max_gen_toks": 20}) for prompt in prompts])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for prompt, text in zip(prompts, got, strict=True):
        ids = torch.tensor([(loaded.tokenizer.encode(prompt) or [0])[-(loaded.model.reach - 20) :]])
        out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.size(1) :]
        assert text == loaded.tokenizer.decode(out.tolist())
    stop = next(char for char in got[0][3:] if char.isascii())
    (cut,) = TaskModel(loaded, 2).generate_until([asked(prompts[0], {"max_gen_toks": 20, "until": [stop]})])
    assert cut == got[0].split(stop)[0]


def test_a_chat_is_that_of_the_template_and_an_answer_may_be_begun(tiny_folder) -> None:
    asking = TaskModel(load_model(str(tiny_folder)), 4)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is "}]
    assert asking.apply_chat_template(turns[:1]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = asking.apply_chat_template(turns, add_generation_prompt=False)
    assert begun == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nIt is "


def test_generation_kwargs_are_read_or_refused() -> None:
    sampling = sampling_of(
        {"until": ["\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 5, "num_beams": 1}
    )
    assert (sampling.stop, sampling.temperature, sampling.max_new_tokens) == (("\n",), 0.0, 5)
    sampling = sampling_of({"until": "a", "do_sample": True, "top_p": 0.5})
    assert (sampling.stop, sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (("a",), 1.0, 0.5, 256)
    with pytest.raises(ConfigError, match="generates answers with 'num_beams'"):
        sampling_of({"num_beams": 4})


def test_what_cannot_be_scored_is_an_error(tmp_path) -> None:
    loaded = load_model(str(make_folder(tmp_path / "short", max_position_embeddings=32)))
    with pytest.raises(DataError, match="an answer to score has 33 tokens; the model reads 32"):
        likelihoods(loaded.model, [([0], [2] * 33)])
    with pytest.raises(DataError, match="the task scores no token after 'Hi'"):
        TaskModel(loaded, 4).loglikelihood([asked("Hi", "")])
    with pytest.raises(ConfigError, match="the task wants answers of 256 tokens; the model reaches 32"):
        TaskModel(loaded, 4).generate_until([asked("Hi", {})])


def test_tasks_need_the_extra_and_exclude_rows(tiny_folder, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(DataError, match="a task needs the package lm_eval") as error:
        evaluate(Evaluate(str(tiny_folder), tasks=("arc_easy",)))
    assert error.value.hint == "pip install 'litpeft[tasks]'"
    for data, tasks in ((None, ()), ("rows.jsonl", ("arc_easy",))):
        with pytest.raises(ValueError, match="data and tasks (are both missing|exclude each other)"):
            Evaluate("model", data, tasks=tasks)
    with pytest.raises(ValueError, match="neutral is used only with data"):
        Evaluate("model", tasks=("arc_easy",), neutral="auto")
    with pytest.raises(ValueError, match="as_chat is used only with tasks"):
        Evaluate("model", "rows.jsonl", as_chat=True)
