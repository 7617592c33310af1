"""`litpeft serve --runs`: more runs than fit in memory, each loaded when a request names it."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from peft import LoraConfig, get_peft_model
from running import CHAT, GREEDY, Running, wanted
from saved_runs import base_reads, save_run
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.core.folders import replaced
from litpeft.generate.catalogue import Catalogue, RunFolder
from litpeft.generate.load import Loaded, load_model
from litpeft.generate.served import load_served
from litpeft.generate.settings import Serve
from litpeft.generate.worker import Worker

NAMES = ["lora", "ia3", "dora", "vera", "bitfit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = make_folder(folder / "base", seed=7, vocab_size=258, initializer_range=0.25)
    for name in (*NAMES, "prefix", "full"):
        save_run(folder / "out" / name, name, "float32", base, base_reads(base))
    return folder


def serving(folder: Path, **more: object) -> Serve:
    settings = {"precision": "32-true", "batch_size": 4, "max_length": 200, "runs": str(folder / "out")}
    return Serve(str(folder / "base"), **settings | {"runs_held": 2} | more)


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    torch.set_num_threads(1)
    server = Running(serving(folder))
    yield server
    server.end()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Loaded]:
    return {name: load_model(str(folder / "out" / name), precision="32-true") for name in NAMES}


def text(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


def test_every_run_of_the_folder_is_a_model(running: Running, folder: Path) -> None:
    _, body = running.raw("GET", "/v1/models")
    assert [one["id"] for one in json.loads(body)["data"]] == ["base", *sorted([*NAMES, "prefix", "full"])]
    assert running.raw("GET", "/v1/models/dora")[0] == 200
    assert running.raw("GET", "/v1/models/out")[0] == 404


def test_more_runs_than_have_a_place_answer_as_each_alone(running: Running, loaded: dict[str, Loaded]) -> None:
    for _ in range(2):
        for name in NAMES:
            for _ in range(2):  # the second finds what the first has read
                status, reply = running.ask("Hello?", name, **GREEDY)
                assert status == 200
                assert text(reply) == wanted(loaded[name], "Hello?")[0], name
    held = running.server.models.folder.held
    assert [name for name, _ in held] == NAMES[-2:]


def test_many_at_once_wait_for_a_place_and_get_the_answers_of_their_runs(
    running: Running, loaded: dict[str, Loaded]
) -> None:
    texts, replies = [f"Number {number}" for number in range(60)], {}

    def ask(number: int) -> None:
        replies[number] = running.ask(texts[number], NAMES[number * 7 % 5], **GREEDY)

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(ask, range(60)))
    for number, (status, reply) in replies.items():
        assert status == 200
        assert text(reply) == wanted(loaded[NAMES[number * 7 % 5]], texts[number])[0]
    folder = running.server.models.folder
    assert all(held.users == 0 for held in folder.held.values())
    assert len(folder.free) + len(folder.held) == 2


def test_a_run_that_is_trained_anew_answers_anew(folder: Path, loaded: dict[str, Loaded], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    running = Running(serving(folder, runs=str(out)))
    try:
        assert running.ask("Hello?", "mine", **GREEDY)[0] == 404
        for name in ("lora", "ia3"):
            shutil.rmtree(out / "mine", ignore_errors=True)
            shutil.copytree(folder / "out" / name, out / "mine")
            assert text(running.ask("Hello?", "mine", **GREEDY)[1]) == wanted(loaded[name], "Hello?")[0]
        with suppress(KeyError), replaced(out / "mine", overwrite=True):  # as it is in training
            assert text(running.ask("Hello?", "mine", **GREEDY)[1]) == wanted(loaded["ia3"], "Hello?")[0]
            assert running.server.models.names() == ["base", "mine"]
            raise KeyError
        assert text(running.ask("Hello?", "mine", **GREEDY)[1]) == wanted(loaded["ia3"], "Hello?")[0]
        shutil.rmtree(out / "mine")
        assert running.ask("Hello?", "mine", **GREEDY)[0] == 404
    finally:
        running.end()


def test_an_adapter_of_peft_is_a_run_like_any_other(folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    tuned = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "out" / "theirs")
    running = Running(serving(folder, runs=str(tmp_path / "out")))
    try:
        alone = load_model(str(tmp_path / "out" / "theirs"), base=str(folder / "base"), precision="32-true")
        assert text(running.ask("Hello?", "theirs", **GREEDY)[1]) == wanted(alone, "Hello?")[0]
        shutil.copytree(tmp_path / "out" / "theirs", tmp_path / "out" / "of another")
        shutil.copytree(folder / "base", tmp_path / "base")
        config = tmp_path / "out" / "of another" / "adapter_config.json"
        keys = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
        config.write_text(json.dumps(keys))
        status, reply = running.ask("Hello?", "of another", **GREEDY)
        assert status == 400
        assert f"its base is {tmp_path / 'base'}" in reply["error"]["message"]
        config.write_text(json.dumps(keys | {"base_model_name_or_path": "someone/base"}))  # as the hub calls it
        assert text(running.ask("Hello?", "of another", **GREEDY)[1]) == wanted(alone, "Hello?")[0]
        config.write_text(json.dumps(keys | {"base_model_name_or_path": "someone/else"}))
        status, reply = running.ask("Hello?", "of another", **GREEDY)
        assert status == 400
        assert "say where it is with --base FOLDER" in reply["error"]["message"]
    finally:
        running.end()


def test_a_run_that_cannot_be_beside_the_base_is_refused_and_takes_no_place(
    running: Running, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    other = make_folder(folder / "other", seed=8, vocab_size=258)
    save_run(out / "stranger", "lora", "float32", other, base_reads(other))
    shutil.copytree(out / "lora", out / "broken")
    with open(out / "broken" / "final" / "delta.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    try:
        for name, what in {
            "prefix": "its prefix is not computed beside a base; name it with --also",
            "full": "it is a model by itself",
            "stranger": "the run was trained on other weights",
            "broken": "sha256 mismatch",
        }.items():
            status, reply = running.ask("Hi", name, **GREEDY)
            assert status == 400
            assert reply["error"]["param"] == "model"
            assert what in reply["error"]["message"]
            assert f"{name} cannot be served: " in capsys.readouterr().err
        assert len(running.server.models.folder.free) == 2
        assert running.ask("Hi", "lora", **GREEDY)[0] == 200
    finally:
        shutil.rmtree(out / "stranger")
        shutil.rmtree(out / "broken")


@pytest.mark.parametrize("name", ["..", ".", "", "../out/lora", "lora/final", "/", "lora\0", "x" * 5000, "\udcff"])
def test_a_name_reaches_nothing_but_a_run_in_the_folder(running: Running, name: str) -> None:
    assert running.server.models.folder.version(name) is None
    if "\udcff" not in name:
        status, reply = running.ask("Hi", name, **GREEDY)
        assert status == 404
        assert reply["error"]["code"] == "model_not_found"


def test_a_client_that_goes_or_does_not_read_keeps_no_place(folder: Path, loaded: dict[str, Loaded]) -> None:
    running = Running(serving(folder, runs_held=1))
    lines = []
    try:
        for name in ("lora", "ia3"):  # the second waits for the place of the first
            messages = [{"role": "user", "content": "Hello?"}]
            body = json.dumps({"model": name, "messages": messages, "max_tokens": 180, "stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            line = socket.create_connection(("127.0.0.1", running.port))
            line.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            lines.append(line)
        runs = running.server.models.folder
        while not runs.waiting and not runs.held:
            time.sleep(0.001)
        lines[1].close()  # while it waits, or has just begun
        assert text(running.ask("Hello?", "dora", **GREEDY)[1]) == wanted(loaded["dora"], "Hello?")[0]
        assert [held.users for held in runs.held.values()] == [0]
    finally:
        for line in lines:
            line.close()
        running.end()


def test_more_than_may_wait_for_a_place_are_told_to_come_later(folder: Path) -> None:
    running, done = Running(serving(folder, runs_held=1, max_waiting=1)), []
    runs = running.server.models.folder

    def ask(name: str) -> None:
        done.append(running.ask("Hi", name, temperature=0, max_tokens=150)[0])

    try:
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("lora", "ia3")]
        threads[0].start()
        while not any(held.users for held in runs.held.values()):
            time.sleep(0.001)
        threads[1].start()
        while not runs.waiting and len(done) < 1:
            time.sleep(0.001)
        status, reply = running.ask("Hi", "dora", **GREEDY)
        if not done:  # the first was still being answered
            assert status == 429
            assert "later" in reply["error"]["message"]
        for thread in threads:
            thread.join()
        assert done == [200, 200]
    finally:
        running.end()


def test_a_folder_that_is_none_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(UserError, match="runs: there is no folder"):
        load_served(serving(folder, runs=str(folder / "nowhere")))
    for name in ("out/lora", "out/lora/final", "base"):
        with pytest.raises(UserError, match="is a run or a model itself"):
            load_served(serving(folder, runs=str(folder / name)))


def test_a_run_that_is_called_like_another_model_is_told(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "lora"):
        shutil.copytree(folder / "out" / "lora", tmp_path / name)
    served, base = load_served(serving(folder, runs=str(tmp_path)))
    said = Catalogue(served, RunFolder(tmp_path, base, Worker([], print))).said().splitlines()
    assert said[0] == "1 model: base"
    assert said[1].endswith(": 2 runs now, at most 2 in memory")
    assert said[2:] == ["warning: base is the model above, not the run in the folder"]
