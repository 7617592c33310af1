"""The fused block of training for GPUs against the block of gpt.py: losses and gradients, and what it refuses.

Where there is no GPU, Triton's interpreter computes its kernels on the processor.
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from conftest import make_folder  # noqa: E402
from model_switches import AWAY, CONFIG  # noqa: E402

from litpeft.data.batches import Batch, collate  # noqa: E402
from litpeft.data.rows import Row  # noqa: E402
from litpeft.methods.lora import LoRA  # noqa: E402
from litpeft.model.build import build  # noqa: E402
from litpeft.model.delta import attach, trainable  # noqa: E402
from litpeft.model.gpt import GPT, Block, Context  # noqa: E402
from litpeft.model.known_block import at_defaults  # noqa: E402
from litpeft.model.objective import summed_loss  # noqa: E402
from litpeft.model.quantize import STORAGES, Storage  # noqa: E402
from litpeft.model.slots import Delta  # noqa: E402
from litpeft.train.fused_block import SWITCHES, FusedStep, groups_of, handles, lay_together, run  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter takes the bits of a bfloat16 in tl.dot for a whole number
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
# tokens of documents: more than a tile of 32 rows; the interpreter computes row after row
LENGTHS = (40, 1, 90) if DEVICE.type == "cuda" else (12, 1, 24)
SIZES = {"hidden_size": 72, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No size is a multiple of a tile."""
    return make_folder(tmp_path_factory.mktemp("models") / "odd-llama", **SIZES)


def batch() -> Batch:
    torch.manual_seed(1)
    return collate([Row(torch.randint(2, 300, (n,)).tolist(), [i > 2 for i in range(n)], 3, "r", []) for n in LENGTHS])


def made(folder: Path, dtype: torch.dtype, fused: bool, method: LoRA, storage: Storage | None = None) -> GPT:
    torch.manual_seed(3)
    model = build(folder, dtype, method, DEVICE, storage)
    for parameter in trainable(model).values():  # what starts at zero would have no gradient behind it
        parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter)
    model.fused = Anywhere(model) if fused else None
    if fused:
        lay_together(model)
    return model.train()


class Anywhere(FusedStep):
    """A fused step on any device and in any type."""

    def __call__(self, block: Block, x: Tensor, ctx: Context) -> Tensor:
        groups = self.groups(block, x.dtype, ctx.shared)
        assert groups is not None
        assert handles(block, x, ctx)
        return run(block, x, ctx, groups)


def learned(model: GPT) -> dict[str, Tensor]:
    """Returns the summed loss and every gradient."""
    loss = summed_loss(model, batch().to(DEVICE))
    loss.backward()
    return {"loss": loss.detach().double()} | {name: p.grad.double() for name, p in trainable(model).items()}


METHODS = {
    "all layers": LoRA(rank=4),
    "some layers, ranks that differ": LoRA(rank=3, targets=("*.attn.q", "*.attn.v", "*.mlp.up"), ranks={"*.up": 20}),
    "one layer": LoRA(rank=8, targets=("*.mlp.down",)),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_what_the_block_learns(folder: Path, name: str) -> None:
    want = learned(made(folder, torch.float64, False, METHODS[name]))
    model = made(folder, torch.float32, True, METHODS[name])
    got = learned(model)
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key] - want[key]).norm() <= 2e-5 * want[key].norm(), key
    for mode in ("block", "offload") if name == "one layer" else ("block",):  # it does under `none` what `cheap` does
        model.recompute = mode
        model.zero_grad()
        again = learned(model)
        assert all(torch.equal(again[key], got[key]) for key in got), mode


@pytest.mark.parametrize("storage", [None, "nf4", "nf3", "int8"])
def test_in_half_precision_too(folder: Path, storage: str | None) -> None:
    held = storage and Storage(storage)
    want = learned(made(folder, torch.float64, False, METHODS["all layers"], held))
    plain, fused = (learned(made(folder, HALF, fused, METHODS["all layers"], held)) for fused in (False, True))
    for key in want:
        error, allowed = ((x[key] - want[key]).norm() for x in (fused, plain))
        assert error <= 1.5 * allowed + 0.01 * want[key].norm(), key


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_weights_that_lie_together_are_the_layers_own(folder: Path, storage: str | None) -> None:
    apart, model = (build(folder, HALF, None, DEVICE, storage and Storage(storage)) for _ in range(2))
    want = {name: tensor.clone() for name, tensor in apart.state_dict().items()}
    before = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    lay_together(model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before
    for there, block in zip(apart.blocks, model.blocks, strict=True):
        for group, alone in zip(groups_of(block), groups_of(there), strict=True):
            assert bool(group.stacked) == (storage in (None, "fp8"))
            assert len(group.layers) == 1 or not alone.stacked
            assert torch.equal(group.weight(HALF), torch.cat([layer.dense().to(HALF) for layer in alone.layers]))
            assert torch.equal(group.weight(HALF), alone.weight(HALF))
    block = model.blocks[0]  # a weight that is replaced is seen, and what others hold is not read in its place
    block.attn.k.weight = torch.nn.Parameter(block.attn.k.weight.detach().clone(), requires_grad=False)
    assert groups_of(block)[0].stacked == ()


def test_a_second_backward_pass_is_refused(folder: Path) -> None:
    model = made(folder, torch.float32, True, LoRA(rank=2))
    loss = summed_loss(model, batch().to(DEVICE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", [None, *AWAY])
def test_another_model_is_computed_alike_or_left_alone(name: str | None) -> None:
    config = CONFIG if name is None else replace(CONFIG, **{name: AWAY[name]})
    torch.manual_seed(0)
    plain = GPT(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        torch.manual_seed(1)
        attach(model, LoRA(rank=4))
        for module in model.modules():
            if isinstance(module, Delta):
                module.reset_parameters()
                module.B.data.normal_()
    used = []

    def tried(block: Block, x: Tensor, ctx: Context) -> Tensor | None:
        groups = groups_of(block) if handles(block, x, ctx) else None
        used.append(groups is not None)
        return None if groups is None else run(block, x, ctx, groups)

    fused.fused = tried if at_defaults(config, SWITCHES) else None
    plain, fused = plain.to(DEVICE), fused.to(DEVICE)
    want, got = learned(plain.double()), learned(fused)
    assert (used == [True]) == (name is None or name in SWITCHES - {"rotary_dim"})  # all of a head rotates here
    for key in want:
        assert (got[key] - want[key]).norm() <= 2e-4 * want[key].norm(), key


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, dropout=0.1),
        LoRA(rank=4, unfreeze=("*norm*",)),
        LoRA(rank=4, unfreeze=("*.q.weight",)),
        LoRA(rank=100),
    ],
)
def test_what_else_trains_is_refused(folder: Path, method: LoRA) -> None:
    with pytest.raises(AssertionError):
        learned(made(folder, torch.float32, True, method))
