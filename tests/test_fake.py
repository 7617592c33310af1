"""A step at the size of Llama 3.2 1B on fake tensors, which have shapes and types but no memory.

Fake tensors refuse whatever needs a number of theirs, so that these tests also show that no micro-batch waits for one.
A torch without CUDA cannot index fake tensors of a GPU: they are the CPU's, with attention's GPU path in its place.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import method_of, storage_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from litpeft.data.batches import Batch
from litpeft.methods import METHODS, PRESETS
from litpeft.model import attention
from litpeft.model.config import ModelConfig
from litpeft.model.delta import attach, trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.model.quantize.quantized import store
from litpeft.model.slots import Delta
from litpeft.train.optim import make_optimizer
from litpeft.train.settings import Train

SHAPES = {"vocab_size": 128256, "d_model": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64}
LLAMA = ModelConfig(**SHAPES, d_ff=8192, max_positions=131072, tie_embeddings=True)
PARAMETERS = 1_235_814_400  # as the model's card has it
LENGTHS = (700, 300, 20, 5)
# rank * (in + out) of q, k, v, o, gate, up, down in each block
LOW_RANK = 16 * 8 * (4096 + 2560 + 2560 + 4096 + 3 * 10240)
TRAINED = {"lora": LOW_RANK, "qlora": LOW_RANK, "adapter": 16 * (10 * 2048 + 32), "full": PARAMETERS}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_by_length", attention._varlen)
    with FakeTensorMode():
        yield


def fake_model(name: str, layers: int = 2) -> GPT:
    """Returns the model as `build` makes it in bf16-true, without a value."""
    with torch.device("meta"):
        model = GPT(replace(LLAMA, n_layers=layers))
    model.dtype = torch.bfloat16
    if "base.quantize" in PRESETS[name]:
        store(model, storage_of(name).name, True, torch.bfloat16)
    attach(model, method_of(name))
    for module in model.modules():
        for key, own in list(module._parameters.items()):
            if own is not None:
                kept = own.requires_grad or isinstance(module, Delta) or key in getattr(module, "packed_names", ())
                dtype = own.dtype if kept else torch.bfloat16
                module._parameters[key] = torch.nn.Parameter(torch.empty(own.shape, dtype=dtype), own.requires_grad)
    return model


def fake_batch() -> Batch:
    trained = sum(length // 2 for length in LENGTHS)
    ids, at, targets = (torch.empty(shape, dtype=torch.int64) for shape in ((1, sum(LENGTHS)), trained, trained))
    return Batch(ids, LENGTHS, at, targets, tuple(n // 2 for n in LENGTHS), ("rows.jsonl:1",) * len(LENGTHS))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_a_real_size_needs_no_number_back_from_the_device(name: str) -> None:
    model = fake_model(name)
    optimizer = make_optimizer(Train(weight_decay=0.1), trainable(model))
    model.recompute = "block" if name == "full" else "cheap"
    for _ in range(2):
        loss = summed_loss(model, fake_batch())
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
    optimizer.step()
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert all(p.grad.dtype == p.dtype and p.grad.shape == p.shape for p in trainable(model).values())
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    if name in TRAINED:
        whole = fake_model(name, LLAMA.n_layers)
        assert sum(p.numel() for p in trainable(whole).values()) == TRAINED[name]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("window", [None, 64])
def test_the_ragged_kernel_of_a_gpu_takes_what_it_is_given(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, given = varlen.varlen_attn, []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **kw: given.append((args, kw)) or kernel(*args, **kw))
    tokens = sum(LENGTHS)
    q, k, v = (torch.empty(1, heads, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8))
    y = attention._varlen(q, k, v, attention.Documents(LENGTHS), window)
    y.sum().backward()
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    (rows, *others, starts, ends, longest, most), options = [*given[0][0]], given[0][1]
    assert (rows.shape, [x.shape for x in others]) == ((tokens, 32, 64), [(tokens, 8, 64)] * 2)
    assert starts is ends
    assert (starts.shape, starts.dtype, longest, most) == ((len(LENGTHS) + 1,), torch.int32, 700, 700)
    assert options == {"window_size": (-1 if window is None else 63, 0), "enable_gqa": True}
