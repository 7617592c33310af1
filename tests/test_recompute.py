"""Activation checkpointing: none, cheap, block and offload learn the same bits, and keep ever less."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import make_folder, method_of, storage_of
from held import held
from short_runs import QUIET, assert_same, cut, resume, train
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from litpeft.core.kinds import Checkpointing
from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.methods.full import Full
from litpeft.methods.lora import LoRA
from litpeft.model import recompute
from litpeft.model.build import build
from litpeft.model.delta import Method, trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.model.quantize import Storage
from litpeft.model.recompute import Offloaded, Recomputed, again, dropout
from litpeft.train.settings import Train

MODES = get_args(Checkpointing)
LENGTHS = (40, 9, 31)


def batch(lengths: tuple[int, ...] = LENGTHS):
    torch.manual_seed(1)
    return collate([Row(torch.randint(2, 300, (n,)).tolist(), [i > 2 for i in range(n)], 3, "r", []) for n in lengths])


def made(folder: Path, dtype: torch.dtype, method: Method, storage: Storage | None = None) -> GPT:
    torch.manual_seed(3)
    model = build(folder, dtype, method, storage=storage)
    for parameter in trainable(model).values():  # what starts at zero would have no gradient behind it
        parameter.data += 0.05 * torch.randn(parameter.shape).to(parameter)
    return model.train()


def learned(model: GPT, mode: Checkpointing) -> dict[str, Tensor]:
    """Returns the loss, every gradient, and the state of the random numbers afterwards."""
    model.recompute = mode
    model.zero_grad()
    torch.manual_seed(5)
    loss = summed_loss(model, batch())
    loss.backward()
    found = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    assert found
    return found | {"loss": loss.detach(), "random": torch.get_rng_state()}


def assert_modes_agree(model: GPT) -> None:
    want = learned(model, "none")
    for mode in MODES[1:]:
        got = learned(model, mode)
        assert got.keys() == want.keys()
        assert [key for key in want if not torch.equal(got[key], want[key])] == [], mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA(rank=4, dropout=0.2), Full()], ids=["lora, dropout", "full"])
def test_all_modes_learn_the_same_bits(method: Method, dtype: torch.dtype, tiny_folder: Path) -> None:
    assert_modes_agree(made(tiny_folder, dtype, method))


@pytest.mark.parametrize(
    "name", ["dora", "ia3", "vera", "bottleneck", "reft", "prefix", "prompt", "glora", "adapter_v2"]
)
def test_with_methods_of_every_kind_in_bfloat16(name: str, tiny_folder: Path) -> None:
    method = method_of(name)
    if hasattr(method, "dropout"):
        method.dropout = 0.2
    assert_modes_agree(made(tiny_folder, torch.bfloat16, method, storage_of(name)))


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_over_a_base_that_is_held_in_codes(name: str, tiny_folder: Path) -> None:
    assert_modes_agree(made(tiny_folder, torch.bfloat16, LoRA(rank=4, dropout=0.2), Storage(name)))


def test_under_autocast(tiny_folder: Path) -> None:
    model = made(tiny_folder, torch.float32, LoRA(rank=4, dropout=0.2, unfreeze=("*norm*",)))
    with torch.autocast("cpu", torch.bfloat16):
        want = learned(model, "none")
    for mode in MODES[1:]:
        model.recompute = mode
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = summed_loss(model, batch())
        loss.backward()  # outside of it, as Fabric does
        assert all(torch.equal(p.grad, want[name]) for name, p in trainable(model).items()), mode


def test_what_is_marked_is_not_kept_and_is_computed_once_more() -> None:
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 7), (3, 7)))
    want = torch.autograd.grad(F.linear(x.exp().tanh(), weight).square().sum(), (x, weight))
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return x.exp().tanh()

    with Recomputed():
        y = again(f, x)
        storage = StorageWeakRef(y.untyped_storage())
        z = F.linear(y, weight) + 0 * F.linear(y.flatten(0, 1), weight).view(2, 5, 3)
    del y
    assert storage.expired()
    assert calls == [True]
    got = torch.autograd.grad(z.square().sum(), (x, weight))
    assert calls == [True, True]
    assert all(map(torch.equal, got, want))


def test_a_result_that_was_written_over_is_kept_itself() -> None:
    x, w = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with Recomputed():
        y = again(lambda x: x * 3, x)
        y.add_(1)
        z = (y * w).sum()
    z.backward()
    assert torch.equal(w.grad, 3 * x.detach() + 1)


def test_an_input_that_was_written_over_is_an_error() -> None:
    x, w = torch.randn(4), torch.randn(4, requires_grad=True)
    with Recomputed():
        z = (again(torch.exp, x) * w).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="written over"):
        z.backward()


def test_dropout_draws_the_same_numbers_again_and_leaves_the_others_alone() -> None:
    x = torch.ones(1000, requires_grad=True)
    torch.manual_seed(0)
    with Recomputed():
        y = dropout(x, 0.5)
        z = (y * y).sum()
    after = torch.rand(1)
    z.backward()
    assert torch.equal(x.grad, 2 * y.detach() * 2)
    torch.manual_seed(0)
    F.dropout(x, 0.5)
    assert torch.equal(torch.rand(1), after)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of two and of four layers, in which the tokens weigh more than the parameters."""
    folder = tmp_path_factory.mktemp("models")
    return [make_folder(folder / str(n), hidden_size=128, intermediate_size=384, num_hidden_layers=n) for n in (2, 4)]


D, QUERIES, KEYS, WIDTH, RANKS = 128, 128, 64, 384, 7 * 8  # numbers a token, of the models above and of LoRA
BETWEEN = 2 * D + 2 * QUERIES + 2 * KEYS + 2 * WIDTH


@pytest.mark.parametrize(
    ("dropout", "mode", "numbers"),
    [
        (0.0, "none", BETWEEN + 2 * D + RANKS),
        (0.0, "cheap", BETWEEN + RANKS),
        (0.2, "none", BETWEEN - QUERIES + 2 * (5 * D + QUERIES + WIDTH) + RANKS),
        (0.2, "cheap", BETWEEN + RANKS),
        (0.0, "block", D),
        (0.0, "offload", D),
    ],
)
def test_what_a_layer_keeps_of_a_token(dropout: float, mode: Checkpointing, numbers: int, wide: list[Path]) -> None:
    bytes_ = []
    for folder in wide:
        model = made(folder, torch.bfloat16, LoRA(dropout=dropout))
        model.recompute = mode
        bytes_.append([held(model, batch((128,) * count)) for count in (4, 8)])
    few, many = (deep - flat for flat, deep in zip(*bytes_, strict=True))  # of two layers
    assert (many - few) / (2 * 512 * 2) == pytest.approx(numbers, rel=0.03)


def test_true_and_false_of_older_files_are_block_and_none() -> None:
    given = {given: Train(activation_checkpointing=given).activation_checkpointing for given in (True, False)}
    assert given == {True: "block", False: "none"}
    with pytest.raises(ValueError, match="must be one of none, cheap, block, offload, got 'on'"):
        Train(activation_checkpointing="on")


def test_a_run_goes_on_in_another_mode_as_if_nothing_had_changed(tiny_folder: Path, tmp_path: Path) -> None:
    settings = QUIET | {"method.dropout": 0.2, "train.activation_checkpointing": True}  # as older files have it
    settings |= {"validation.interval": 4, "ending.rows": 0, "ending.neutral": "none"}
    whole = train(tiny_folder, tmp_path / "whole", settings)
    part = cut(whole, 1, tmp_path / "part")
    resume(tiny_folder, part, settings | {"train.activation_checkpointing": "cheap"})
    assert_same(part, whole)


class Streams:
    """Notes in which order streams of a GPU are told to copy and to wait for each other; there need not be one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.said: list[str] = []
        now, side = (Stream(self.said, name) for name in ("compute", "copy"))
        monkeypatch.setattr(recompute, "copying", lambda device: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self.said))
        monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x, **_: self.said.append(f"{len(x)} to {to.device.type}"))


@dataclass
class Stream:
    said: list[str]
    name: str

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Event") -> None:
        self.said.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, said: list[str]):
        self.said = said

    def record(self) -> None:
        self.name = self.said[-1]


def test_on_a_gpu_blocks_are_copied_beside_the_computation_and_fetched_one_ahead(monkeypatch) -> None:
    said = Streams(monkeypatch).said
    with FakeTensorMode():
        inputs = [torch.empty(rows, 60 // rows, device="cuda") for rows in (1, 2, 3)]
        hooks = Offloaded(inputs[0])
        small, here = torch.empty(5, device="cuda"), torch.empty(60)
        assert hooks.packed(small) is small
        assert hooks.packed(here) is here
        kept = [hooks.packed(x) for x in inputs]
        assert [one.host.device.type for one in kept] == ["cpu"] * 3
        assert [one.x is None for one in kept] == [True, True, False]  # the GPU holds the last one only
        there = [("copy waits for compute", f"{n} to cpu", f"compute waits for {n} to cpu") for n in (1, 2, 3)]
        assert said == [line for lines in there for line in lines][:-1]
        said.clear()
        assert [kept[n].tensor().shape for n in (2, 1, 0)] == [(3, 20), (2, 30), (1, 60)]
        assert all(one.x is None for one in kept)
    assert said == [
        *("copy waits for compute", "2 to cuda", "compute waits for 3 to cpu"),  # which was still there
        *("copy waits for compute", "1 to cuda", "compute waits for 2 to cuda"),
        "compute waits for 1 to cuda",
    ]
