"""Answers that come and go in one batch: each is the one that its request gets alone."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import make_folder

from litpeft.data.tokenizer import Tokenizer
from litpeft.generate import batch as module
from litpeft.generate.batch import Batch, Request
from litpeft.generate.draft import Answer, Draft
from litpeft.generate.engine import answer
from litpeft.generate.settings import Sampling
from litpeft.generate.worker import Worker
from litpeft.model.build import build
from litpeft.model.gpt import GPT

PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 11, 1, 7, 25, 2, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama", initializer_range=0.2)


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT:
    return build(folder, torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


class Wanted(Request):
    """A request that keeps what it is told."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling):
        draft = Draft(prompt, tokenizer, sampling, (), sampling.max_new_tokens)
        self.texts, self.ends = [], []
        super().__init__(draft, sampling, 0, self.texts.append, self.ends.append)

    @property
    def answer(self) -> Answer:
        return self.draft.answer


def alone(model: GPT, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling) -> Answer:
    return answer(model, [prompt], tokenizer, sampling, (), [sampling.seed])[0]


def samplings(count: int) -> list[Sampling]:
    """Returns greedy and random ones of several lengths."""
    kinds = {}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.3}
    return [Sampling(max_new_tokens=5 + 7 * (i % 4), seed=i, lookup=0, **kinds[i % 3]) for i in range(count)]


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("part", [4, 40, None])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_requests_that_come_and_go_get_the_answers_that_they_get_alone(
    model: GPT, tokenizer: Tokenizer, rows: int, part: int | None, records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litpeft.generate.cuda_graph.record", lambda step: step)
    requests = [Wanted(tokenizer, *pair) for pair in zip(PROMPTS, samplings(len(PROMPTS)), strict=True)]
    batch, coming = Batch(model, rows, part), list(requests)
    batch.cache.records = records  # as on a GPU
    while coming or batch.count:
        if coming:
            batch.waiting.append(coming.pop(0))
        batch.step()
        assert len(batch.writing) <= rows
    assert bool(batch.cache.recorded) == records
    for request in requests:
        want = alone(model, tokenizer, PROMPTS[requests.index(request)], request.sampling)
        assert request.answer == want
        assert "".join(request.texts) == want.text
        assert request.ends == [None]


def test_the_next_turn_of_a_chat_reads_only_what_is_new(model: GPT, tokenizer: Tokenizer) -> None:
    batch, read = Batch(model, 3, 512), []
    greedy = Sampling(max_new_tokens=4, lookup=0)

    def asked(prompt: list[int]) -> Wanted:
        request = Wanted(tokenizer, prompt, greedy)
        batch.waiting.append(request)
        hook = model.embed.register_forward_hook(lambda embed, args, out: read.append(args[0].numel()))
        while batch.count:
            batch.step()
        hook.remove()
        return request

    chats = [[number, *range(40, 80)] for number in (3, 4)]
    for turn in range(3):
        for number, chat in enumerate(chats):
            read.clear()
            request = asked(chat)
            assert read[0] == (41 if turn == 0 else 6)  # the last token of the answer, which was not read, and five
            assert request.answer == alone(model, tokenizer, chat, greedy)
            chats[number] = [*chat, *request.answer.ids, 90, 91, 92, 93, 94]


def test_prompts_of_one_beginning_are_each_read_whole_where_answers_must_not_depend_on_it(
    model: GPT, tokenizer: Tokenizer
) -> None:
    read, prompts = [], [[*range(40, 80), last] for last in range(5)]
    hook = model.embed.register_forward_hook(lambda embed, args, out: read.append(args[0].numel()))
    answer(model, prompts, tokenizer, Sampling(max_new_tokens=1), (), rows=2)
    hook.remove()
    assert sum(read) == sum(map(len, prompts))


def test_what_is_cancelled_leaves_at_the_next_step_and_the_others_go_on(model: GPT, tokenizer: Tokenizer) -> None:
    long = Sampling(max_new_tokens=60, lookup=0)
    stays, goes, waits, reads = (Wanted(tokenizer, prompt, long) for prompt in PROMPTS[:4])
    batch = Batch(model, 2, 512)
    batch.waiting.extend([goes, stays, waits, reads])
    for _ in range(5):
        batch.step()
    assert batch.writing == [goes, stays]
    goes.cancelled = reads.cancelled = True
    batch.step()
    assert batch.writing == [stays, waits]
    while batch.count:
        batch.step()
    assert len(goes.answer.ids) == 5
    assert not reads.answer.ids
    for number, request in ((0, stays), (2, waits)):
        assert request.answer == alone(model, tokenizer, PROMPTS[number], long)


def test_a_prompt_whose_reading_was_interrupted_is_not_read_on(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, read = Batch(model, 1), []
    long, short = (Wanted(tokenizer, list(range(5, 5 + n)), Sampling(max_new_tokens=3)) for n in (60, 4))
    logits = batch.cache.logits

    def interrupted(rows: list[list[int]], *rest: object) -> torch.Tensor:
        read.append(len(rows[0]))
        if len(read) == 1:
            raise KeyboardInterrupt
        return logits(rows, *rest)

    monkeypatch.setattr(batch.cache, "logits", interrupted)
    batch.waiting.append(long)
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    long.cancelled = True
    batch.waiting.append(short)
    while batch.count:
        batch.step()
    assert read == [60, 4, 5, 6]
    assert short.answer == alone(model, tokenizer, short.draft.ids[:4], Sampling(max_new_tokens=3))


def test_an_answer_that_fails_ends_alone(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = Sampling(max_new_tokens=9, lookup=0)
    requests = [Wanted(tokenizer, prompt, greedy) for prompt in PROMPTS[:3]]
    batch, logits = Batch(model, 3, 512), module.TokenCache.logits

    def spoilt(cache: module.TokenCache, rows: list, *rest) -> torch.Tensor:
        got = logits(cache, rows, *rest).clone()
        got[[number for number, row in enumerate(rows) if row[:1] == [5] and len(row) == 44]] = torch.nan
        return got

    monkeypatch.setattr(module.TokenCache, "logits", spoilt)
    batch.waiting.extend(requests)
    while batch.count:
        batch.step()
    monkeypatch.undo()
    assert "not finite" in str(requests[1].ends[0])
    assert len(requests[1].answer.ids) == 4
    for number in (0, 2):
        assert requests[number].ends == [None]
        assert requests[number].answer == alone(model, tokenizer, PROMPTS[number], greedy)


def test_the_thread_answers_all_batches_and_outlives_a_failure(model: GPT, tokenizer: Tokenizer) -> None:
    greedy, failures, ended = Sampling(max_new_tokens=6, lookup=0), [], threading.Semaphore(0)
    batches = Batch(model, 2, 512), Batch(model, 2, 512)
    worker = Worker(batches, failures.append)
    worker.start()

    def asked(prompt: list[int]) -> Wanted:
        request = Wanted(tokenizer, prompt, greedy)
        request.ended = lambda error: (request.ends.append(error), ended.release())
        return request

    broken = asked([10**6])  # no such token
    worker.add(batches[0], [broken])
    assert ended.acquire()
    assert isinstance(broken.ends[0], IndexError)
    assert failures == broken.ends
    requests = [asked(prompt) for prompt in PROMPTS]
    worker.add(batches[0], requests[:4])
    worker.add(batches[1], requests[4:])
    for _ in requests:
        assert ended.acquire()
    worker.stop()
    assert not worker.is_alive()
    assert [one.answer for one in requests] == [alone(model, tokenizer, prompt, greedy) for prompt in PROMPTS]
