"""Passes that a GPU repeats, with the recording taken out: filled-up micro-batches give the loss and the gradients."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the twin on the processor; see test_cuda.py")

from litpeft.data.batches import Batch, collate  # noqa: E402
from litpeft.data.rows import Row  # noqa: E402
from litpeft.methods.lora import LoRA  # noqa: E402
from litpeft.model import attention  # noqa: E402
from litpeft.model.build import build  # noqa: E402
from litpeft.model.delta import trainable  # noqa: E402
from litpeft.model.gpt import GPT  # noqa: E402
from litpeft.model.kernels import triton as kernels  # noqa: E402
from litpeft.model.objective import summed_loss  # noqa: E402
from litpeft.train.recorded_pass import RecordedPasses, Size, rounded_up  # noqa: E402


def by_starts(q: Tensor, k: Tensor, v: Tensor, documents: attention.Documents, window: int | None) -> Tensor:
    """Attention of documents that are known by where they begin only, as the GPU's kernel knows them."""
    place = torch.arange(q.size(2))
    number = torch.bucketize(place, documents.starts(q.device)[1:].long(), right=True)
    mask = (number[:, None] == number) & (place[:, None] >= place)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.fixture
def passes(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> RecordedPasses:
    monkeypatch.setattr(attention, "_by_length", by_starts)
    monkeypatch.setattr("litpeft.model.loss.fused", lambda *tensors: kernels)
    monkeypatch.setattr(RecordedPasses, "record", lambda self, step: step)
    torch.manual_seed(0)
    model = build(tiny_folder, torch.float32, LoRA(rank=4))
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return RecordedPasses(model.train())


def batch(*lengths: int) -> Batch:
    torch.manual_seed(sum(lengths))
    return collate([Row(torch.randint(2, 300, (n,)).tolist(), [i > 1 for i in range(n)], 2, "r", []) for n in lengths])


def plainly(model: GPT, batches: list[Batch], factor: float) -> tuple[list[float], dict[str, Tensor]]:
    model.zero_grad()
    losses = []
    for one in batches:
        loss = summed_loss(model, one)
        (loss * factor).backward()
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in trainable(model).items()}


def test_a_step_of_several_passes_has_the_same_gradient(passes: RecordedPasses) -> None:
    model = passes.model
    steps = [
        [batch(60, 20, 3), batch(100)],
        [batch(129), batch(5, 5)],
        [batch(70, 13), batch(128)],
        [batch(60), batch(129)],
    ]
    for batches in steps:
        want_losses, want = plainly(model, batches, 0.25)
        model.zero_grad()
        losses = [float(passes(one, 0.25)) for one in batches]
        assert losses == pytest.approx(want_losses, rel=1e-5)
        for name, parameter in trainable(model).items():
            assert (parameter.grad - want[name]).norm() <= 1e-5 * want[name].norm(), name
    assert len(passes.sizes) == 2  # of 128 and 144 tokens
    assert all(run.replay is not None for run in passes.sizes.values())


def test_a_pass_among_others_adds_to_the_gradient(passes: RecordedPasses) -> None:
    model, batches = passes.model, [batch(60, 20, 3), batch(100)]
    _, want = plainly(model, batches, 0.5)
    model.zero_grad()
    (summed_loss(model, batches[0]) * 0.5).backward()
    passes(batches[1], 0.5)
    for name, parameter in trainable(model).items():
        assert (parameter.grad - want[name]).norm() <= 1e-5 * want[name].norm(), name


def test_a_pass_takes_weights(passes: RecordedPasses) -> None:
    plain = batch(20, 3)
    for _ in range(2):
        one = replace(plain, weights=3 * torch.rand(len(plain.at), dtype=torch.float64))
        want_losses, want = plainly(passes.model, [one], 0.25)
        passes.model.zero_grad()
        assert float(passes(one, 0.25)) == pytest.approx(want_losses[0], rel=1e-5)
        for name, parameter in trainable(passes.model).items():
            assert (parameter.grad - want[name]).norm() <= 1e-5 * want[name].norm(), name
    assert [size.weighted for size in passes.sizes] == [True]
    assert not Size.of(plain).weighted


def test_what_is_too_large_or_trains_nothing_is_left_alone(passes: RecordedPasses) -> None:
    empty = Batch(torch.ones(1, 4, dtype=torch.int64), (4,), *[torch.zeros(0, dtype=torch.int64)] * 2, (4,), ("r",))
    assert passes(empty, 1.0) is None
    passes.most_tokens = 10
    assert passes(batch(11), 1.0) is None


def sizes(of: Callable[[int], int]) -> list[int]:
    return sorted({of(n) for n in range(1, 5000)})


def test_few_sizes_hold_all_and_waste_little() -> None:
    tokens = sizes(lambda n: rounded_up(n, 128, 8))
    assert tokens[:4] == [128, 144, 160, 176]
    assert {256, 512, 1024, 2048, 4096} <= set(tokens)
    assert all(n <= rounded_up(n, 128, 8) <= max(128, n * 9 / 8 + 1) for n in range(1, 5000))
    assert sizes(lambda n: rounded_up(n, 8, 1))[:4] == [8, 16, 32, 64]
    assert Size.of(batch(100, 1)) == Size(128, 128, 8)
