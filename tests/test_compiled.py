"""Blocks that torch has compiled learn what the same blocks learn step by step."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_methods import ALIKE, make, steps

from litpeft.core.errors import ConfigError
from litpeft.methods import METHODS
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import delta_state
from litpeft.model.gpt import GPT
from litpeft.train.compiled import compile_blocks

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss(model: GPT, lengths: tuple[int, ...]) -> torch.Tensor:
    ids = torch.randint(0, TINY["vocab_size"], (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    context = Context.packed(lengths, CPU, tuple(1 for _ in lengths))
    return model(ids, context, at=torch.arange(ids.numel() - 1), targets=ids[0, 1:])


# Tracing takes half of the time and the C++ compiler the other half. Of these methods' blocks C++ is made; those of the
# others but ALIKE are traced.
WHOLE = ("lora", "qlora", "dora", "adapter", "prefix", "reft", "full")
TRACED = partial(torch.compile, backend="aot_eager_decomp_partition")  # forward, backward and what is kept between
CASES = [
    *(pytest.param(n, TRACED, id=n, marks=pytest.mark.slow) for n in METHODS if n not in (*WHOLE, *ALIKE)),
    *(pytest.param(n, torch.compile, id=f"{n}, C++", marks=pytest.mark.slow) for n in WHOLE),
    # `-m full` makes C++ of all.
    *(pytest.param(n, torch.compile, id=f"{n}, C++", marks=pytest.mark.full) for n in METHODS if n not in WHOLE),
]


@needs_compiler
@pytest.mark.parametrize(("name", "compile"), CASES)
def test_every_method_learns_the_same(
    tiny_folder: Path, name: str, compile: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.utils.counters.clear()
    plain, compiled = make(tiny_folder, name), make(tiny_folder, name)
    compile_blocks(compiled, CPU)
    assert steps(compiled) == pytest.approx(steps(plain), abs=1e-9)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert ["Sdpa.forward" in why for why in breaks] == [True]  # nothing but the attention core is left out
    state = delta_state(compiled)
    assert all(torch.allclose(state[key], tensor, atol=1e-7) for key, tensor in delta_state(plain).items())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("recompute", ["none", "block"])  # `cheap` is none where blocks are compiled
def test_other_documents_need_no_other_program(tiny_folder: Path, recompute: str) -> None:
    model = build(tiny_folder, torch.float32, LoRA())
    model.recompute = recompute
    compile_blocks(model, CPU)
    layouts = ((9, 15, 8), (30, 7), (21,), (100, 40, 60, 3, 80), (55,), (2, 2))
    for lengths in layouts:  # one size, any size, and one document by itself are all that it compiles for
        with torch._dynamo.config.patch(error_on_recompile=lengths in layouts[3:]):
            loss(model, lengths).backward()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():  # measuring compiles nothing
        loss(model, (5, 6))


def test_without_a_compiler_it_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tiny_folder))
    model = build(tiny_folder, torch.float32, LoRA())
    with pytest.raises(ConfigError, match=r"(?s)train.compile: true needs a C\+\+ compiler.*set train.compile false"):
        compile_blocks(model, CPU)
    assert model.compiled is None
