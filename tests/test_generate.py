"""Writing with a model: against transformers, against the full forward pass, and one row against a batch."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from transformers import LlamaForCausalLM
from transformers.generation import logits_process as theirs

from litpeft.cli import dispatch
from litpeft.core.errors import UserError
from litpeft.data.prompts import read_prompts
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Batch
from litpeft.generate.cache import TokenCache
from litpeft.generate.engine import answer, generate, stream
from litpeft.generate.sampling import distribution, next_tokens, penalised
from litpeft.generate.settings import Generate, Sampling
from litpeft.model.build import build
from litpeft.model.gpt import GPT

PROMPTS = [[5, 9, 200, 31], [7], [80, 3, 3, 90, 41, 8, 120], [66, 12]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide weights, so that greedy answers differ from prompt to prompt and do not repeat; every token is a byte."""
    return make_folder(tmp_path_factory.mktemp("models") / "wide", seed=7, vocab_size=258, initializer_range=0.25)


@pytest.fixture(scope="module")
def llama(model_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(model_folder: Path) -> GPT:
    return build(model_folder, torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def answers(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], **sampling: object) -> list[list[int]]:
    return [a.ids for a in answer(model, prompts, tokenizer, Sampling(**sampling), stop_ids=())]


def test_greedy_batch_of_ragged_prompts_equals_transformers_generate(model, llama, tokenizer):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    out = llama.generate(
        ids, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answers(model, tokenizer, PROMPTS, max_new_tokens=32) == out[:, width:].tolist()


def test_cached_decoding_equals_the_full_forward_pass(model):
    cache, rows = TokenCache(model), [list(p) for p in PROMPTS]
    with torch.inference_mode():
        for step in range(300):  # beyond the cache's first length, so it grows
            logits = cache.logits(rows)
            if step % 37 == 0 or step > 290:
                full = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
                torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(token)


def test_a_cache_computes_only_what_follows_the_common_prefix(model):
    cache, widths = TokenCache(model), []
    hook = model.embed.register_forward_hook(lambda module, args, out: widths.append(args[0].size(1)))
    first, second = [1, 2, 3, 4, 5], [1, 2, 3, 9, 9, 9, 9]
    cache.logits([first])
    changed = cache.logits([second])
    again = cache.logits([second])
    hook.remove()
    fresh = TokenCache(model).logits([second])
    assert widths == [5, 4, 1]
    torch.testing.assert_close(changed, fresh)
    torch.testing.assert_close(again, fresh)


def assert_recorded_steps_agree(model: GPT, limit: float) -> None:
    """Steps that are recorded give the logits of those that are not, over all that may happen to a cache."""
    caches = TokenCache(model), TokenCache(model)
    caches[0].records, caches[1].records = True, False
    rows = [list(range(5, 5 + n)) for n in (9, 30, 220)]
    for step in range(60):  # beyond the cache's first length
        last = 4 if step % 3 else 1
        logits, want = (cache.logits(rows, last) for cache in caches)
        assert (logits - want).norm() <= limit * want.norm()
        tokens = want[last - 1 :: last].argmax(-1).tolist()
        rows = [row + [token] * (1 + step % 4) for row, token in zip(rows, tokens, strict=True)]
        if step == 40:
            rows = [rows[0], rows[2]]
            for cache in caches:
                cache.swap(1, 2)
    assert all(step is not None for step in caches[0].recorded.values())
    assert {width for _, width in caches[0].recorded} == {1, 16}
    assert not caches[1].recorded


def test_steps_as_a_gpu_records_them_give_the_same_logits(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("litpeft.generate.cuda_graph.record", lambda step: step)
    assert_recorded_steps_agree(model, 1e-5)


def test_no_step_is_recorded_beyond_the_model_s_reach(model):
    cache = TokenCache(model)
    cache.records = True
    reach = model.config.max_positions
    assert [cache.width(n, 0) for n in (1, 2, 16, 17)] == [1, 16, 16, 17]
    assert [cache.width(n, reach - 8) for n in (1, 2, 8)] == [1, 2, 8]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_in_a_batch_equal_answers_one_by_one(model, tokenizer, temperature):
    batch = answers(model, tokenizer, PROMPTS, max_new_tokens=40, temperature=temperature, seed=11)
    alone = [
        answers(model, tokenizer, [p], max_new_tokens=40, temperature=temperature, seed=11 + row)[0]
        for row, p in enumerate(PROMPTS)
    ]
    assert batch == alone


def test_rows_that_stop_leave_the_batch_and_the_others_go_on_alike(model, tokenizer):
    free = answers(model, tokenizer, PROMPTS, max_new_tokens=30, temperature=1.0)
    stop = free[1][4]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    sizes = []
    hook = model.embed.register_forward_hook(lambda module, args, out: sizes.append(args[0].numel()))
    rows = answer(model, PROMPTS, tokenizer, Sampling(temperature=1.0, max_new_tokens=30), {stop})
    hook.remove()
    assert [a.ids for a in rows] == expected
    assert [a.reason for a in rows] == ["stop" if stop in ids else "length" for ids in free]
    steps = [min(len(ids) + 1, 30) for ids in expected]  # each row costs its prompt once, then a token a step
    assert sum(sizes[1:]) == sum(steps) - len(PROMPTS)


PROCESSORS = {
    "temperature": lambda v: theirs.TemperatureLogitsWarper(v),
    "top_k": lambda v: theirs.TopKLogitsWarper(v),
    "top_p": lambda v: theirs.TopPLogitsWarper(v),
    "min_p": lambda v: theirs.MinPLogitsWarper(v),
}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.4, "repetition_penalty": 1.4, "top_k": 50, "top_p": 0.95},
    ],
)
def test_the_distribution_equals_that_of_transformers_processors(sampling):
    torch.manual_seed(0)
    logits, history = 4 * torch.randn(6, 100), torch.randint(100, (6, 30))
    expected, ours = logits.clone(), logits
    if penalty := sampling.get("repetition_penalty"):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(history, expected)
        ours = penalised(logits, history.tolist(), penalty)
    for name, processor in PROCESSORS.items():  # in this order, as in transformers' generate
        if name in sampling:
            expected = processor(sampling[name])(history, expected)
    torch.testing.assert_close(distribution(ours, Sampling(**sampling)), expected.softmax(-1))


def test_tokens_are_drawn_as_often_as_the_distribution_says():
    torch.manual_seed(1)
    sampling, n = Sampling(temperature=0.8, top_k=6), 20000
    logits = torch.randn(1, 12)
    generator = torch.Generator().manual_seed(3)
    drawn = next_tokens(logits.expand(n, -1), [[]] * n, sampling, [generator] * n)
    p = distribution(logits, sampling)[0]
    share = torch.bincount(drawn, minlength=12) / n
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_greedy_with_repetition_penalty_equals_transformers(model, llama, tokenizer):
    out = llama.generate(
        torch.tensor([PROMPTS[2]]), max_new_tokens=32, do_sample=False, repetition_penalty=1.7, eos_token_id=None
    )
    ours = answers(model, tokenizer, [PROMPTS[2]], max_new_tokens=32, repetition_penalty=1.7)
    assert ours == [out[0, len(PROMPTS[2]) :].tolist()]


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        next_tokens(torch.tensor([[0.0, torch.nan]]), [[]], Sampling(), [])


def test_a_text_is_never_shown_beyond_a_stop_string_that_comes_split(model, tokenizer):
    free = answer(model, PROMPTS[:1], tokenizer, Sampling(temperature=1.2, max_new_tokens=60), ())[0]
    printable = max(re.findall(r"[ -~]{4,}", free.text), key=len)
    stops = (printable[1:4], "never")  # every byte is a token, so this one comes in three
    sampling = Sampling(temperature=1.2, max_new_tokens=60, stop=stops)
    stopped, pieces = stream(Batch(model, 1), PROMPTS[0], tokenizer, sampling, ())
    shown = list(pieces)
    assert stopped.reason == "string"
    assert stopped.text == free.text[: free.text.index(stops[0])] == "".join(shown)


def test_text_that_only_looks_like_a_stop_string_is_shown_in_full(model, tokenizer):
    sampling = Sampling(temperature=1.2, max_new_tokens=60)
    free = answer(model, PROMPTS, tokenizer, sampling, ())
    almost = tuple({a.text[n] + "\N{BLACK CHESS KING}" for a in free for n in range(len(a.text))})
    stop = Sampling(temperature=1.2, max_new_tokens=60, stop=almost)
    assert [a.text for a in answer(model, PROMPTS, tokenizer, stop, ())] == [a.text for a in free]


def test_a_stream_gives_the_same_text_as_a_batch(model, tokenizer):
    sampling = Sampling(temperature=0.9, max_new_tokens=50, seed=4)
    streamed, pieces = stream(Batch(model, 1), PROMPTS[0], tokenizer, sampling, (40, 41))
    assert "".join(pieces) == answer(model, PROMPTS, tokenizer, sampling, (40, 41))[0].text == streamed.text


def test_an_answer_ends_where_the_model_ends_and_a_longer_prompt_is_an_error(model, tokenizer):
    reach = model.config.max_positions
    last = answer(model, [[7] * (reach - 3)], tokenizer, Sampling(), ())[0]
    assert (len(last.ids), last.reason) == (3, "length")
    with pytest.raises(UserError, match=f"the prompt has {reach} tokens; the model reaches {reach}"):
        answer(model, [[7] * reach], tokenizer, Sampling(), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("min_p", 2.0),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("stop", ("",)),
        ("temperature", float("nan")),
    ],
)
def test_a_sampling_value_out_of_range_is_named_as_typed(key, value):
    with pytest.raises(ValueError, match=rf"^sampling\.{key} must be .*, got "):
        Sampling(**{key: value})


def run(capsys, folder: Path, **settings: object) -> str:
    """Returns what the command prints to stdout."""
    generate(Generate(str(folder), precision="32-true", **settings))
    return capsys.readouterr().out


def test_the_command_prints_the_answer_to_the_templated_prompt_alone(model_folder, model, tokenizer, capsys):
    ids = tokenizer.encode("<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n")
    expected = answer(model, [ids], tokenizer, Sampling(max_new_tokens=20), tokenizer.stop_ids)[0].text
    assert run(capsys, model_folder, prompt="hi there", sampling=Sampling(max_new_tokens=20)) == expected + "\n"


def test_raw_text_from_standard_input_is_continued_without_template(
    model_folder, model, tokenizer, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi there\n"))
    sampling = Sampling(max_new_tokens=20)
    expected = answer(model, [tokenizer.encode("hi there")], tokenizer, sampling, tokenizer.stop_ids)[0].text
    assert run(capsys, model_folder, raw=True, sampling=sampling) == expected + "\n"


def test_a_file_of_prompts_is_answered_in_its_own_order_whatever_the_batches(model_folder, tmp_path, capsys):
    rows = [
        {"prompt": "a rather long prompt " * 3, "id": 1},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hm"}]},
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        {"prompt": "hi"},
    ]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    sampling = Sampling(max_new_tokens=12, temperature=0.8, seed=2)
    run(capsys, model_folder, input=str(path), output=str(out), batch_size=3, sampling=sampling)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    printed = run(capsys, model_folder, input=str(path), batch_size=1, sampling=sampling)
    assert [json.loads(line) for line in printed.splitlines()] == written
    alone = replace(sampling, seed=sampling.seed + 3)
    assert run(capsys, model_folder, prompt="hi", sampling=alone) == written[3]["answer"] + "\n"
    assert [{k: v for k, v in row.items() if k != "answer"} for row in written] == rows
    with pytest.raises(UserError, match="the output exists"):
        run(capsys, model_folder, input=str(path), output=str(out))
    assert sorted(tmp_path.iterdir()) == [path, out]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": 3}', "prompt must be a string"),
        (b'{"prompt": " "}', "prompt is empty"),
        (b'{"text": "x"}', "one of messages, conversations, instruction, prompt"),
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
        (b'{"prompt": "' + b"x" * 600 + b'"}', "the model reaches 512"),
        (b"[1]", "must be an object"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line(model_folder, tmp_path, line, problem):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=problem) as error:
        generate(Generate(str(model_folder), input=str(path)))
    assert error.value.where == f"{path}:3"


def test_lines_of_a_text_file_are_prompts(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}one\r\n\n two\N{LINE SEPARATOR}still two".encode())
    prompts = read_prompts(str(path), raw=True)
    assert [(p.content, p.where) for p in prompts] == [("one", f"{path}:1"), (" two\u2028still two", f"{path}:3")]


@pytest.mark.parametrize("command", ["generate", "evaluate", "data check"])
def test_rows_are_not_written_to_a_file_that_would_be_read_as_something_else(command, tiny_folder, tmp_path) -> None:
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    table = str(tmp_path / "answers.csv")
    argv = {
        "generate": [str(tiny_folder), "--input", str(rows), "--output", table],
        "evaluate": [str(tiny_folder), str(rows), "--output", table],
        "data check": [str(rows), "--model", "there is none, and it is not looked for", "--fix", table],
    }[command]
    with pytest.raises(UserError, match=r"to a file that ends in \.jsonl") as error:
        dispatch([*command.split(), *argv], [], 0.0)
    assert (error.value.where, error.value.hint) == (table, "call it answers.jsonl")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_answers_given_before_the_command_is_stopped_are_kept(
    command, fault, tiny_folder, tmp_path, capsys, monkeypatch
) -> None:
    texts = ["a long question", "b", "c c"]
    (rows := tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in texts)
    )
    drawn = ["--sampling.max_new_tokens", "4", "--sampling.temperature", "1"]  # as each row's number seeds it
    words = [str(rows)] if command == "evaluate" else ["--input", str(rows), *drawn]
    words = [command, str(tiny_folder), *words, "--batch_size", "1"]
    out, left, place = tmp_path / "out.jsonl", iter([None, None]), Batch.place  # the third one is stopped

    def stopped(*given: object) -> None:
        try:
            next(left)
        except StopIteration:
            raise fault from None
        place(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "place", stopped)
        with pytest.raises(fault):
            dispatch([*words, "--output", str(out)], [], 0.0)
    part = tmp_path / "out.part"
    assert f"2 answers kept in {part}" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds answers of a run that was stopped"):
        dispatch([*words, "--output", str(out)], [], 0.0)
    early = [json.loads(row) for row in part.read_text().splitlines()]
    with part.open("a") as file:
        file.write('{"half a li')  # of a kill
    changed = ["--max_new_tokens", "5"] if command == "evaluate" else ["--sampling.seed", "7"]
    with pytest.raises(UserError, match="none of its answers is what this command would write"):
        dispatch([*words, "--output", str(out), "--resume", *changed], [], 0.0)
    assert [json.loads(row) for row in part.read_text().splitlines()] == early
    assert "goes on with them" not in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        dispatch([*words, "--output", str(tmp_path / "new.jsonl"), "--also", str(tmp_path / "typo")], [], 0.0)
    assert not (tmp_path / "new.part").exists()
    placed: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "place", lambda batch, request: [placed.append(request.prompt), place(batch, request)])
        dispatch([*words, "--output", str(out), "--resume"], [], 0.0)
    assert len(placed) == 1  # the one that was stopped
    assert f"2 answers of 3 from {part}" in capsys.readouterr().err
    resumed = out.read_text()
    out.unlink()
    assert sorted(tmp_path.iterdir()) == [rows]
    dispatch([*words, "--output", str(out)], [], 0.0)
    assert out.read_text() == resumed
    out.unlink()
    whole = [json.loads(row) for row in resumed.splitlines()]

    def text(row: dict) -> str:
        return row["answer"] if command == "generate" else row["model"]["answer"]

    assert [text(row) for row in early] == [text(whole[i]) for i in (0, 2)]
    mine, other = early[0], early[1] | {"kept": early[1]["kept"] | {"mark": "of another prompt"}}
    part.write_text("".join(json.dumps(row) + "\n" for row in (mine, other)))
    dispatch([*words, "--output", str(out), "--resume"], [], 0.0)
    assert out.read_text() == resumed
    assert f"warning: {part} stays: 1 line of it" in capsys.readouterr().err
    out.unlink()
    part.write_text("{}\n")
    with pytest.raises(UserError, match="the line is none that") as error:
        dispatch([*words, "--output", str(tmp_path / "out.jsonl"), "--resume"], [], 0.0)
    assert error.value.where == f"{part}:1"
