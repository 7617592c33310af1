"""`logprobs` of `litpeft serve`: those of transformers' log_softmax, of answers and prompts, streamed and not."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from running import CHAT, GREEDY, Running
from saved_runs import base_reads, save_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Batch, Request
from litpeft.generate.draft import Draft
from litpeft.generate.load import load_model
from litpeft.generate.logprobs import Spelling
from litpeft.generate.settings import Sampling, Serve
from litpeft.model.gpt import GPT

TEXT = "/v1/completions"
NAMES = ("lora", "prefix", "base")
HOT = {"temperature": 1.7, "top_p": 0.9, "repetition_penalty": 1.3, "max_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = make_folder(folder / "base", seed=7, vocab_size=258, initializer_range=0.25)
    reads = base_reads(base)
    for name in NAMES[:2]:
        save_run(folder / name, name, "float32", base, reads)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    torch.set_num_threads(1)
    also = (str(folder / "prefix"),)
    server = Running(Serve(str(folder / "lora"), also=also, precision="32-true", batch_size=4, max_length=200))
    yield server
    server.end()


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Callable[[list[int]], Tensor]]:
    """Returns what gives log p of the token after each of a text's, (T, V): of the base by transformers' model."""
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base").double()
    own = {name: load_model(str(folder / name), precision="64-true").model for name in NAMES if name != "base"}

    @torch.no_grad()
    def log_p(ids: list[int], model: GPT | None) -> Tensor:
        before = 0 if model is None else model.frame[0]
        text = torch.tensor([[*[0] * before, *ids]])
        return (theirs(text).logits if model is None else model(text))[0, before:].log_softmax(-1)

    return {name: partial(log_p, model=own.get(name)) for name in NAMES}


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    """Has a token for each byte, and two special ones."""
    return Tokenizer.load(folder / "base")


def numbers(tokenizer: Tokenizer, entries: list[dict[str, Any]]) -> list[int]:
    """Returns the tokens of entries of a reply, by their bytes."""
    spelling = Spelling(tokenizer, chat=True)
    by_bytes = {spelling.bytes_of(token): token for token in range(258)}
    assert len(by_bytes) == 258
    return [by_bytes[bytes(entry["bytes"])] for entry in entries]


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def check(choice: dict[str, Any], tokenizer: Tokenizer, prompt: list[int], log_p: Any, top: int) -> None:
    """Compares the log-probabilities of an answer in a chat with log_p(ids), (T, V)."""
    content = choice["logprobs"]["content"]
    answer = numbers(tokenizer, content)
    assert tokenizer.decode(answer) == choice["message"]["content"]
    for token, one, right in zip(answer, content, log_p([*prompt, *answer])[len(prompt) - 1 :], strict=False):
        assert one["logprob"] == pytest.approx(right[token].item(), abs=1e-4)
        values, ids = right.topk(top)
        assert [entry["logprob"] for entry in one["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
        assert numbers(tokenizer, one["top_logprobs"]) == ids.tolist()


@pytest.mark.parametrize("how", [GREEDY, HOT], ids=["greedy", "drawn"])
def test_of_a_chat_they_are_the_models_own_whatever_the_sampling(running, models, tokenizer, how: dict) -> None:
    status, reply = running.ask("Hello?", "base", logprobs=True, top_logprobs=4, **how)
    assert status == 200
    (choice,) = reply["choices"]
    assert len(choice["logprobs"]["content"]) == reply["usage"]["completion_tokens"] > 3
    check(choice, tokenizer, chat_ids(tokenizer, "Hello?"), models["base"], 4)
    assert running.ask("Hello?", "base", **how)[1]["choices"][0]["logprobs"] is None


def test_several_runs_in_one_batch_get_their_own(running, models, tokenizer) -> None:
    replies = {}

    def ask(name: str, number: int) -> None:
        replies[name, number] = running.ask(f"Number {number}", name, logprobs=True, top_logprobs=2, **GREEDY)[1]

    threads = [threading.Thread(target=ask, args=(name, number)) for number in range(2) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 2 * len(NAMES)
    for (name, number), reply in replies.items():
        check(reply["choices"][0], tokenizer, chat_ids(tokenizer, f"Number {number}"), models[name], 2)


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_has_the_same(running: Running, chat: bool) -> None:
    prompt = {"messages": [{"role": "user", "content": "Ü?"}]} if chat else {"prompt": "Ü?", "echo": True}
    wanted = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    body = {"model": "lora", "stream": True, **prompt, **wanted, **GREEDY}
    _, text = running.raw("POST", CHAT if chat else TEXT, json.dumps(body).encode())
    pieces = [json.loads(part.removeprefix("data: ")) for part in text.decode().split("\n\n")[:-2]]
    parts = [one["choices"][0]["logprobs"] for one in pieces if one["choices"][0]["logprobs"]]
    (choice,) = running.post(CHAT if chat else TEXT, **body | {"stream": False})[1]["choices"]
    if chat:
        whole, both = choice["logprobs"]["content"], [entry for part in parts for entry in part["content"]]
        assert [one["bytes"] for one in both] == [one["bytes"] for one in whole]
    else:
        whole, both = (
            {key: sum((part[key] for part in of), []) for key in parts[0]} for of in ([choice["logprobs"]], parts)
        )
        assert [both[key] for key in ("tokens", "text_offset")] == [whole[key] for key in ("tokens", "text_offset")]
        both, whole = ([{"logprob": one or 0.0} for one in of["token_logprobs"]] for of in (both, whole))
    # the second request finds its prompt in the cache: then the sums are others
    assert [one["logprob"] for one in both] == pytest.approx([one["logprob"] for one in whole], abs=1e-4)
    assert len(parts) > 3


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_alone_gets_those_of_its_tokens_as_text_or_as_numbers(running, models, tokenizer, name: str) -> None:
    texts = ["It is Ü, so.", "Two", "A"]
    for prompts in (texts, [tokenizer.encode(text) for text in texts]):
        status, reply = running.post(TEXT, model=name, prompt=prompts, echo=True, max_tokens=0, logprobs=1)
        assert (status, reply["usage"]["completion_tokens"]) == (200, 0)
        for text, choice in zip(texts, reply["choices"], strict=True):
            ids, found = tokenizer.encode(text), choice["logprobs"]
            assert (choice["text"], choice["finish_reason"]) == (text, "length")
            log_p = models[name](ids)
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            want = [log_p[at, token].item() for at, token in enumerate(ids[1:])]
            assert found["token_logprobs"][1:] == pytest.approx(want, abs=1e-4)
            best = [max(top.values()) for top in found["top_logprobs"][1:]]
            assert best == pytest.approx(log_p[:-1].amax(-1).tolist(), abs=1e-4)
            assert all(token in top for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True))
            places = zip(found["text_offset"], found["tokens"], strict=True)
            assert all(text[at] == token for at, token in places if token.isascii())


def test_what_measures_over_http_gets_prompt_and_answer_at_once(running, models, tokenizer) -> None:
    ids = tokenizer.encode("What is it? It is")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    (choice,) = running.post(TEXT, model="base", **body)[1]["choices"]
    log_p, found = models["base"](ids), choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][-1] == pytest.approx(log_p[-1].max().item(), abs=1e-4)
    scored = sum(found["token_logprobs"][12:-1])  # as lm_eval's local-completions reads a continuation
    assert scored == pytest.approx(sum(log_p[at - 1, ids[at]].item() for at in range(12, len(ids))), abs=1e-4)
    texts = torch.randint(2, 250, (40, 150), generator=torch.Generator().manual_seed(0)).tolist()
    ended = ((text, models["base"](text).argmax(-1).tolist()) for text in texts)
    ends = next(
        text[: next_ids.index(1) + 1] for text, next_ids in ended if 1 in next_ids
    )  # the token that ends a text
    (choice,) = running.post(TEXT, model="base", **body | {"prompt": ends, "max_tokens": 5})[1]["choices"]
    assert choice["logprobs"]["tokens"][len(ends) :] == ["<|im_end|>"]
    assert (choice["text"], choice["finish_reason"]) == (tokenizer.decode(ends), "stop")
    alone = {"prompt": "A", "echo": True, "max_tokens": 0, "logprobs": 0}
    (choice,) = running.post(TEXT, model="base", **alone)[1]["choices"]
    assert choice["logprobs"] == {"tokens": ["A"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    _, streamed = running.raw("POST", TEXT, json.dumps({"model": "base", "stream": True, **alone}).encode())
    (event,) = streamed.decode().split("\n\n")[:-2]
    assert json.loads(event.removeprefix("data: "))["choices"] == [choice]
    for wrong in ([[300]], [[-1]], [[]], [1, "a"]):
        assert running.post(TEXT, model="base", prompt=wrong)[0] == 400


def test_guessed_tokens_get_the_scores_that_they_get_one_by_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "loops", vocab_size=258, max_position_embeddings=96)  # it soon repeats itself
    loaded, found = load_model(str(folder), precision="64-true"), []
    prompt = [5, 9, 200, 31, 7, 5, 9, 200, 31, 8, 5, 9]
    for lookup in (0, 8):
        sampling = Sampling(max_new_tokens=40, lookup=lookup)
        request = Request(Draft(prompt, loaded.tokenizer, sampling, (), 40), sampling, top=3)
        batch, steps = Batch(loaded.model, 1), 0
        batch.waiting.append(request)
        while batch.count:
            batch.step()
            steps += 1
        found.append((request.scores, steps))
    (alone, many), (guessed, few) = found
    assert few < 0.8 * many
    assert [one.token for one in guessed] == [one.token for one in alone] == request.draft.answer.ids
    assert [one.log_p for one in guessed] == pytest.approx([one.log_p for one in alone], abs=1e-9)
