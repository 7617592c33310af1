"""`litpeft serve`: replies in OpenAI's shapes, the answers that `generate` gives, and senders of every kind."""

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from running import CHAT, GREEDY, Running, wanted
from saved_runs import base_reads, save_run

from litpeft.core.errors import UserError
from litpeft.generate.engine import answer
from litpeft.generate.load import Loaded, load_model
from litpeft.generate.protocol import NOTHING, Ask, Refused, parse
from litpeft.generate.serve import LARGEST_BODY, is_local, serve
from litpeft.generate.settings import Sampling, Serve

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = make_folder(folder / "base", seed=7, vocab_size=258, initializer_range=0.25)
    reads = base_reads(base)
    for name in ("lora", "ia3", "prefix"):
        save_run(folder / name, name, "float32", base, reads)
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Serve:
    others = (str(folder / "ia3"), str(folder / "prefix"))
    return Serve(str(folder / "lora"), also=others, precision="32-true", batch_size=4, max_waiting=300, max_length=200)


@pytest.fixture(scope="module")
def running(settings: Serve) -> Iterator[Running]:
    torch.set_num_threads(1)
    server = Running(settings)
    yield server
    server.end()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Loaded]:
    return {name: load_model(str(folder / name), precision="32-true") for name in ("lora", "ia3", "prefix", "base")}


def events(body: bytes) -> list[Any]:
    """Returns the events of a streamed reply, which ends as it should."""
    *parts, last, rest = body.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_chat_is_answered_as_generate_answers_it(running: Running, loaded: dict[str, Loaded]) -> None:
    for name, one in loaded.items():
        status, reply = running.ask("Hello?", name, **GREEDY)
        text, prompt, tokens = wanted(one, "Hello?")
        assert status == 200
        assert reply["model"] == name
        assert reply["object"] == "chat.completion"
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": text}
        assert choice["finish_reason"] == ("length" if tokens == 12 else "stop")
        assert reply["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        }


def test_a_stream_has_the_same_text_in_pieces_and_the_usage_if_it_is_wanted(
    running: Running, loaded: dict[str, Loaded]
) -> None:
    body = {"model": "ia3", "messages": [{"role": "user", "content": "Ü?"}], **GREEDY, "stream": True}
    for more in ({}, {"stream_options": {"include_usage": True}}):
        status, text = running.raw("POST", CHAT, json.dumps(body | more).encode())
        pieces = events(text)
        want, prompt, tokens = wanted(loaded["ia3"], "Ü?")
        assert status == 200
        if more:
            assert pieces.pop()["usage"]["total_tokens"] == prompt + tokens
        assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
        assert len({piece["id"] for piece in pieces}) == 1
        choices = [piece["choices"][0] for piece in pieces]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == want
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]


def test_texts_are_continued_as_they_stand_each_as_often_as_asked(running: Running, loaded: dict[str, Loaded]) -> None:
    prompts, sampling = ["One", "Two, three"], {"temperature": 1.2, "max_tokens": 9, "seed": 5}
    status, reply = running.post(TEXT, model="lora", prompt=prompts, n=2, **sampling)
    tokenizer = loaded["lora"].tokenizer
    ids = [[*tokenizer.encode(tokenizer.opening), *tokenizer.encode(text)] for text in prompts for _ in range(2)]
    same = Sampling(temperature=1.2, top_p=0.9, max_new_tokens=9)  # what a request does not say is as in a chat
    want = answer(loaded["lora"].model, ids, tokenizer, same, tokenizer.stop_ids, [5, 6, 7, 8])
    assert status == 200
    assert [choice["text"] for choice in reply["choices"]] == [one.text for one in want]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["object"] == "text_completion"


def test_the_same_seed_gives_the_same_answer_and_none_another_each_time(running: Running) -> None:
    hot = {"temperature": 2.0, "max_tokens": 30}
    seeded = [running.ask("Go", seed=3, **hot)[1]["choices"][0] for _ in range(2)]
    free = [running.ask("Go", **hot)[1]["choices"][0] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(running: Running, loaded: dict[str, Loaded]) -> None:
    whole, _, _ = wanted(loaded["base"], "Hello?")
    stop = whole[4:6]
    _, reply = running.ask("Hello?", "base", stop=stop, **GREEDY)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_the_models_are_listed_with_their_base(running: Running) -> None:
    status, body = running.raw("GET", "/v1/models")
    names = [one["id"] for one in json.loads(body)["data"]]
    assert (status, names) == (200, ["lora", "ia3", "prefix", "base"])
    assert json.loads(running.raw("GET", "/v1/models/ia3")[1])["id"] == "ia3"
    assert running.raw("GET", "/v1/models/other")[0] == 404
    assert json.loads(running.raw("GET", "/health")[1]) == {"status": "ok"}


MESSAGES = [{"role": "user", "content": "Hi"}]
WRONG = [  # keys of a request, its status, the key that is named, and a word of the message
    ({"model": "none"}, 404, "model", "lora, ia3, prefix, base"),
    ({"model": 7}, 400, "model", "a string"),
    ({"messages": None}, 400, "messages", "missing"),
    ({"messages": []}, 400, "messages", "empty"),
    ({"messages": "Hi"}, 400, "messages", ""),
    ({"messages": [{"role": "user"}]}, 400, "messages", "content is missing"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "messages[0].role"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, 400, "messages", "nothing to answer"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "type text"),
    ({"messages": [{"role": "user", "content": "long " * 100}]}, 400, "messages", "200 are read here"),
    ({"temperature": "hot"}, 400, "temperature", "a number"),
    ({"temperature": -1}, 400, "temperature", "at least 0.001"),
    ({"top_p": 0}, 400, "top_p", "(0, 1]"),
    ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"max_tokens": True}, 400, "max_tokens", "a whole number"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differ"),
    ({"seed": -1}, 400, "seed", "2^62"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"stop": [["x"]]}, 400, "stop", "list of strings"),
    ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ({"n": 0}, 400, "n", "at most 16"),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "true or false"),
    ({"max_token": 5}, 400, "max_token", 'did you mean "max_tokens"'),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "no key"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ({"logprobs": 3}, 400, "logprobs", "true or false"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "goes with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "at most 20"),
    ({"echo": True}, 400, "echo", "/v1/completions"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "give 0"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", '{"type": "text"}'),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "no JSON"),
]


@pytest.mark.parametrize(("wrong", "status", "key", "word"), WRONG)
def test_a_wrong_request_is_refused_with_its_key(
    running: Running, wrong: dict, status: int, key: str | None, word: str
) -> None:
    got, reply = running.post(CHAT, **{"model": "lora", "messages": MESSAGES} | wrong)
    assert (got, reply["error"]["param"]) == (status, key)
    assert word in reply["error"]["message"]


def test_a_text_that_is_too_long_is_refused_as_the_prompt(running: Running) -> None:
    status, reply = running.post(TEXT, model="lora", prompt="long " * 100)
    assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, "prompt", "context_length_exceeded")


def test_keys_that_ask_for_nothing_are_no_fault(running: Running) -> None:
    nothing = {key: values[0] for key, values in NOTHING.items()}
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": None, "max_tokens": 1}
    assert running.ask("Hi", **nothing | more)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", CHAT, {"Content_Type": "text/plain"}, 415),
        ("POST", CHAT, {"Host": "evil.example"}, 403),
        ("POST", CHAT, {"Host": "127.0.0.1.evil.example:80"}, 403),
        ("POST", CHAT, {"Host": "[::1"}, 403),
        ("GET", CHAT, {}, 405),
        ("OPTIONS", CHAT, {"Origin": "http://evil.example"}, 405),
        ("GET", "/", {}, 404),
        ("GET", "/v1/../../etc/passwd", {}, 404),
    ],
)
def test_a_request_of_another_page_or_to_another_path_is_refused(
    running: Running, method: str, path: str, headers: dict, status: int
) -> None:
    got, body = running.raw(method, path, b"{}", **headers)
    assert got == status
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"nul", b'"x"', b'{"a": NaN}', b"[" * 100_000, b"9" * 5000, b"\xff\xfe"]
)
def test_a_body_that_is_no_json_object_is_refused(running: Running, body: bytes) -> None:
    status, reply = running.raw("POST", CHAT, body)
    assert status == 400
    assert "JSON" in json.loads(reply)["error"]["message"]


def test_too_large_a_body_is_refused(running: Running) -> None:
    status, reply = running.raw("POST", CHAT, b" " * (LARGEST_BODY + 1))
    assert status == 413
    assert json.loads(reply)["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_where_there_is_one(settings: Serve) -> None:
    running = Running(settings, key="s3cret")
    body = json.dumps({"model": "lora", "messages": MESSAGES, "max_tokens": 1}).encode()
    try:
        assert running.raw("POST", CHAT, body)[0] == 401
        assert running.raw("POST", CHAT, body, Authorization="Bearer s3cre")[0] == 401
        assert running.raw("POST", CHAT, body, Authorization="Bearer s3cr\xe9t")[0] == 401
        assert running.raw("GET", "/v1/models")[0] == 401
        assert running.raw("POST", CHAT, body, Authorization="Bearer s3cret")[0] == 200
        assert running.raw("GET", "/health")[0] == 200
    finally:
        running.end()


def test_where_other_machines_reach_it_a_key_is_a_must(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LITPEFT_API_KEY", raising=False)
    assert [
        host for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "::", "10.0.0.1", "x.org") if is_local(host)
    ] == [
        "localhost",
        "127.0.0.9",
        "::1",
    ]
    with pytest.raises(UserError, match=r"host: other machines may reach 0\.0\.0\.0"):
        serve(Serve(str(folder / "lora"), host="0.0.0.0"))


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(running: Running) -> None:
    with pytest.raises(UserError, match=f"port: cannot listen at '127.0.0.1', port {running.port}"):
        serve(Serve("no such folder", port=running.port))


def test_many_at_once_get_the_answers_that_each_gets_alone(running: Running, loaded: dict[str, Loaded]) -> None:
    texts, replies = [f"Number {number}" for number in range(100)], {}
    names = ["lora", "ia3", "base", "prefix"]

    def ask(number: int) -> None:
        replies[number] = running.ask(texts[number], names[number % 4], **GREEDY)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (status, reply) in replies.items():
        assert status == 200
        assert reply["choices"][0]["message"]["content"] == wanted(loaded[names[number % 4]], texts[number])[0]


def test_more_than_may_wait_are_told_to_come_later(settings: Serve, folder: Path) -> None:
    running = Running(Serve(str(folder / "lora"), precision="32-true", batch_size=1, max_waiting=2))
    try:
        assert running.ask("Hi", n=3, **GREEDY)[0] == 200
        status, reply = running.ask("Hi", n=4, **GREEDY)
        assert status == 429
        assert "later" in reply["error"]["message"]
    finally:
        running.end()


def head(length: int) -> bytes:
    """Returns what comes before the body of a request of this length."""
    lines = f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"
    return "\r\n".join((*lines, "", "")).encode()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_waits_for_is_not_written_to_its_end(running: Running, stream: bool) -> None:
    batch = running.server.models.served["lora"].batch
    body = {"model": "lora", "messages": MESSAGES, "temperature": 0, "max_tokens": 180, "stream": stream, "n": 4}
    text = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(head(len(text)) + text)
        while not batch.writing:
            time.sleep(0.001)
        requests = list(batch.writing)
    while batch.count:
        time.sleep(0.001)
    assert all(request.cancelled for request in requests)
    assert min(len(request.draft.answer.ids) for request in requests) < 180


def test_senders_that_say_nothing_or_nonsense_keep_no_one_waiting(running: Running) -> None:
    lines = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(60)]
    try:
        for number, line in enumerate(lines):
            line.sendall(
                (b"", b"POST /v1/chat", b"\x16\x03\x01nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 9000)[
                    number % 4
                ]
            )
        assert running.ask("Hi", **GREEDY)[0] == 200
    finally:
        for line in lines:
            line.close()


def test_a_body_that_lies_about_its_length_leaves_the_server_answering(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(head(50) + b"{")
    assert running.ask("Hi", **GREEDY)[0] == 200


VALUES = [None, True, 0, -1, 1e400, 3.5, 10**30, "", "x", "\x00", [], [[]], [None], {}, {"a": []}, "long" * 500]


def test_whatever_a_request_says_it_is_understood_or_refused_by_its_key() -> None:
    draws, refused = random.Random(0), 0
    keys = ["model", "messages", "prompt", "n", "stop", "stream", "stream_options", "seed", "temperature", "top_k"]
    keys += ["top_p", "max_tokens", "logprobs", "top_logprobs", "echo", "role", "content", *NOTHING]
    for _ in range(2000):
        good = {"model": "lora", "messages": MESSAGES, "prompt": "x", "n": 1, "seed": 3}
        record = good | {draws.choice(keys): draws.choice(VALUES) for _ in range(draws.randrange(3))}
        if draws.random() < 0.3:
            record["messages"] = [{draws.choice(keys): draws.choice(VALUES) for _ in range(3)}]
        chat = draws.random() < 0.5
        record.pop("prompt" if chat else "messages")
        body = json.dumps(record).encode()
        if draws.random() < 0.1:
            body = body[: draws.randrange(len(body))]
        try:
            assert isinstance(parse(body, chat, Sampling()), Ask)
        except Refused as error:
            refused += 1
            assert error.status == 400
            assert error.body()["error"]["message"]
    assert 500 < refused < 1900


def test_the_command_answers_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "litpeft", "serve", str(folder / "lora"), "--port", "0", "--precision", "32-true"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "answers; Ctrl-C" in line:
            break
    port = int(line.split("/v1")[0].rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"model": "lora", "messages": MESSAGES, **GREEDY})
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    assert len(json.load(connection.getresponse())["choices"]) == 1
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 0
    assert "Traceback" not in said
    assert "lora: " in said
