"""Guessed tokens change how often a model is asked, and nothing of what it writes."""

from pathlib import Path

import pytest
import torch
from conftest import make_folder

from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.packed_weights import can_pack
from litpeft.generate.draft import Answer
from litpeft.generate.engine import answer
from litpeft.generate.load import load_model
from litpeft.generate.settings import Sampling
from litpeft.generate.speculate import Lookup
from litpeft.model.gpt import GPT

PROMPT = [5, 9, 200, 31, 7, 5, 9, 200, 31, 8, 5, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that soon repeats itself."""
    return make_folder(tmp_path_factory.mktemp("models") / "loops", vocab_size=258, max_position_embeddings=96)


def written(folder: Path, precision: str = "32-true", **sampling: object) -> tuple[Answer, int]:
    """Returns the answer to PROMPT, and how often the model was asked."""
    loaded, asked = load_model(str(folder), precision=precision), []
    hook = loaded.model.embed.register_forward_hook(lambda module, args, out: asked.append(args[0].size(1)))
    got = answer(loaded.model, [PROMPT], loaded.tokenizer, Sampling(**{"max_new_tokens": 60} | sampling), {3})[0]
    hook.remove()
    return got, len(asked)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"max_new_tokens": 17},
        {"max_new_tokens": 1000},  # to the last position of the model
        {"temperature": 0.05},
        {"temperature": 1.0, "top_k": 3, "seed": 5},
        {"repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("lookup", [1, 4, 64])
def test_the_answer_is_the_same_with_fewer_passes(folder: Path, sampling: dict, lookup: int) -> None:
    plain, passes = written(folder, lookup=0, **sampling)
    got, fewer = written(folder, lookup=lookup, **sampling)
    assert got == plain
    assert passes == len(plain.ids) + (plain.reason == "stop")
    assert fewer <= passes
    if not sampling:
        assert fewer <= {1: 0.8, 4: 0.65, 64: 0.65}[lookup] * passes


def test_an_answer_ends_at_the_string_or_token_that_ends_it_also_among_guessed_ones(folder: Path) -> None:
    free = written(folder, lookup=0)[0]
    stop = free.text[20:22]
    plain, got = (written(folder, lookup=most, stop=(stop,))[0] for most in (0, 8))
    assert got == plain
    assert got.reason == "string"
    loaded = load_model(str(folder), precision="32-true")
    plain, got = (
        answer(loaded.model, [PROMPT], loaded.tokenizer, Sampling(lookup=most), {free.ids[-1]})[0] for most in (0, 8)
    )
    assert got == plain
    assert got.reason == "stop"


def test_a_guess_is_what_followed_the_last_time_and_grows_with_what_was_right() -> None:
    lookup = Lookup(8)
    assert lookup.guess([1, 2, 3], 8) == []
    assert lookup.guess([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert lookup.guess([1, 2, 3, 4, 1, 2, 9, 1, 2], 3) == [9, 1, 2]
    assert lookup.guess([1, 2, 3, 4, 1, 2, 9, 1, 2], 8) == [9, 1, 2, 9, 1, 2, 9, 1]  # round in a circle
    lookup.learn(0)
    assert lookup.guess([1, 2, 3, 4, 1, 2, 9, 1, 2], 8) == [9]
    lookup.learn(1)
    assert lookup.guess([1, 2, 3, 4, 1, 2, 9, 1, 2], 8) == [9, 1]
    assert Lookup(0).guess([1, 1, 1, 1], 8) == []


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no products in bfloat16")
def test_in_bfloat16_a_token_gets_the_same_bits_whatever_comes_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 1536, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model: GPT = load_model(str(make_folder(tmp_path / "long", **sizes)), precision="bf16-true").model
    ids = torch.randint(0, 320, (300,)).tolist()
    alone, together = TokenCache(model), TokenCache(model)
    alone.logits([ids[:90]])
    together.logits([ids[:90]])
    for start in range(90, 290, 7):
        few = together.logits([ids[: start + 7]], last=7)
        for number in range(7):
            one = alone.logits([ids[: start + number + 1]])
            assert torch.equal(one[0], few[number])
