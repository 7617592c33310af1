"""The contract of every method as generate, chat and evaluate use it: what `load` makes of a run answers as the plain
model does. A new method is covered without a line here."""

from pathlib import Path

import pytest
import torch
from conftest import ON_CODES_ONLY
from saved_runs import HELD, TYPES, base_reads, make_base, save_run

from litpeft.exchange.run import find_run
from litpeft.generate.cache import TokenCache
from litpeft.generate.engine import answer
from litpeft.generate.likelihood import likelihoods
from litpeft.generate.load import Loaded, load_model
from litpeft.generate.settings import Sampling
from litpeft.methods import METHODS
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import load_delta, without_delta
from litpeft.model.gpt import GPT

IDS = torch.randint(0, 250, (2, 21), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 14], [7, 8, 7, 8, 7], [40, 41, 42, 43, 44, 45, 46]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def reads(base: Path) -> tuple[dict, tuple]:
    return base_reads(base)


@pytest.fixture(scope="module", params=[(name, kind) for name in METHODS for kind in HELD], ids="-".join)
def run(request, base: Path, reads: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Loaded, float]:
    """A run whose delta is far from its start: as the plain model, as `load` makes it, and how far they may differ."""
    name, kind = request.param
    precision, quantize, limit = HELD[kind]
    folder, dtype = tmp_path_factory.mktemp("run"), TYPES[precision]
    storage = save_run(folder, name, kind, base, reads)
    found = find_run(folder)
    if found.is_model:
        plain = build(folder / "final", dtype)
    else:
        delta = found.delta()
        plain = build(base, dtype, found.method(), storage=storage, delta=delta)
        load_delta(plain, delta, "test")
    plain.eval().requires_grad_(False)
    if quantize and name in ON_CODES_ONLY:  # products with codes do not round what modules unpack to bfloat16
        truth = build(base, torch.float64, found.method(), storage=storage, delta=delta)
        load_delta(truth, delta, "test")
        with torch.inference_mode():
            want, got = (logits_of(one.eval(), IDS, 12).double() for one in (truth, plain))
        limit = max(limit, 2 * float((got - want).norm() / want.norm()))  # both round, each in its own way
    return plain, load_model(str(folder), precision=precision), limit


def logits_of(model: GPT, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Returns the logits of rows (B, T) whose first tokens are a prompt, in one pass over all of them."""
    before, after = model.frame
    fill = torch.zeros(len(ids), max(before, after), dtype=ids.dtype)
    ids = torch.cat((fill[:, :before], ids[:, :prompt], fill[:, :after], ids[:, prompt:]), 1)
    ctx = Context.rows(ids)
    ctx.prompt_lengths = torch.full((len(ids), 1), before + prompt + after)
    logits = model(ids, ctx)[:, before:]
    # what follows the prompt is said after the positions that stand behind it
    return torch.cat((logits[:, : prompt - 1], logits[:, prompt - 1 + after :]), 1)


def assert_near(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert (got - want).double().norm() <= limit * want.double().norm()


@torch.inference_mode()
def test_logits_with_the_delta_and_without_it_are_those_of_the_plain_model(run) -> None:
    plain, loaded, limit = run
    want = logits_of(plain, IDS, 12)
    assert_near(logits_of(loaded.model, IDS, 12), want, limit)
    if loaded.has_delta:
        with without_delta(plain), without_delta(loaded.model):
            base = logits_of(plain, IDS, 12)
            assert_near(logits_of(loaded.model, IDS, 12), base, limit)
        assert (base - want).double().norm() > 1.5 * limit * want.double().norm()  # the delta does something
        assert_near(logits_of(loaded.model, IDS, 12), want, limit)


@torch.inference_mode()
def test_a_batch_read_in_steps_and_guessed_tokens_get_the_logits_of_the_plain_model(run) -> None:
    plain, loaded, limit = run
    rows, caches = [list(prompt) for prompt in PROMPTS], (TokenCache(plain), TokenCache(loaded.model))
    for last in (1, 1, 3):
        want, got = (cache.logits(rows, last, [len(prompt) for prompt in PROMPTS]) for cache in caches)
        assert_near(got, want, limit)
        rows = [[*row, 3 + number, 9, 4] for number, row in enumerate(rows)]


@torch.inference_mode()
def test_greedy_answers_alone_in_a_batch_and_with_guesses_are_those_of_the_plain_model(run) -> None:
    plain, loaded, limit = run
    sampling = [Sampling(max_new_tokens=8, lookup=lookup) for lookup in (0, 8)]
    alone, guessed = (
        [answer(loaded.model, [prompt], loaded.tokenizer, one, ())[0].ids for prompt in PROMPTS] for one in sampling
    )
    batch = [one.ids for one in answer(loaded.model, PROMPTS, loaded.tokenizer, sampling[0], ())]
    for answers in (alone, guessed, batch):
        for prompt, ids in zip(PROMPTS, answers, strict=True):
            logits = logits_of(plain, torch.tensor([[*prompt, *ids]]), len(prompt))[0, len(prompt) - 1 : -1].double()
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (logits.amax(1) - chosen <= 2 * limit * logits.norm(dim=1)).all()  # it may round a tie otherwise


@torch.inference_mode()
def test_texts_scored_in_one_pass_are_as_likely_as_alone_in_the_plain_model(run) -> None:
    plain, loaded, limit = run
    pairs = [(PROMPTS[0], [3, 9, 4]), (PROMPTS[0], [3, 9, 5]), (PROMPTS[2], [77])]
    for (prompt, scored), got in zip(pairs, likelihoods(loaded.model, pairs), strict=True):
        logits = logits_of(plain, torch.tensor([[*prompt, *scored]]), len(prompt))[0, len(prompt) - 1 : -1].double()
        want = logits.log_softmax(1).gather(1, torch.tensor(scored)[:, None]).sum()
        assert abs(got.log_p - want) <= 2 * limit * logits.norm(dim=1).sum()
