"""What is held in which type, and the scaled gradients of 16-mixed, on the CPU's twin of it."""

import pytest
import torch
from conftest import method_of, storage_of
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from litpeft.core.precision import PRECISIONS
from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.methods import METHODS
from litpeft.methods.full import Full
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.train.optim import make_optimizer
from litpeft.train.optimizer_state import optimizer_tensors
from litpeft.train.settings import Train
from litpeft.train.step import Stepper


def rows(count: int) -> list[Row]:
    torch.manual_seed(0)
    return [
        Row(torch.randint(0, 300, (12,)).tolist(), [i >= 3 for i in range(12)], 3, f"r:{n}", []) for n in range(count)
    ]


def stepped(folder, method, dtype: torch.dtype, fabric: Fabric, optimizer: str = "AdamW", steps: int = 1, storage=None):
    """Returns model and optimiser after some steps on four rows, and the loss of each step."""
    torch.manual_seed(1)
    model = build(folder, dtype, method, storage=storage)
    wrapped = fabric.setup_module(model)
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    train = Train(optimizer=optimizer, lr=1e-3)
    made = fabric.setup_optimizers(make_optimizer(train, trainable(model), scaled=scaled))
    batch = collate(rows(4))
    stepper = Stepper(fabric, wrapped, made)
    return model, made, [stepper.step([batch], len(batch.targets), 1e-3, s + 1).loss for s in range(steps)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bf16-true", "bf16-mixed", "32-true", "64-true"])
def test_what_trains_and_its_moments_are_float32_or_better(tiny_folder, name: str, method: str) -> None:
    precision = PRECISIONS[name]
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision.fabric)
    storage = storage_of(method)
    model, optimizer, _ = stepped(tiny_folder, method_of(method), precision.weights, fabric, storage=storage)
    wide = torch.promote_types(precision.weights, torch.float32)
    assert {p.dtype for p in trainable(model).values()} == {wide}
    held = {p.dtype for p in build(tiny_folder, precision.weights, storage=storage).parameters()}
    frozen = {key: p.dtype for key, p in model.named_parameters() if not p.requires_grad}
    assert {dtype for key, dtype in frozen.items() if key in model.base_keys} <= held
    assert {dtype for key, dtype in frozen.items() if key not in model.base_keys} <= {wide}
    moments, _ = optimizer_tensors(optimizer, list(trainable(model)))
    assert {tensor.dtype for key, tensor in moments.items() if not key.endswith("/step")} == {wide}


def test_without_master_weights_all_of_full_is_bfloat16(tiny_folder) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer, _ = stepped(tiny_folder, Full(master_weights=False), torch.bfloat16, fabric)
    moments, _ = optimizer_tensors(optimizer, list(trainable(model)))
    tensors = [*model.parameters(), *(t for key, t in moments.items() if not key.endswith("/step"))]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def scaled(start: float) -> Fabric:
    """Returns Fabric with 16-mixed on the CPU, whose gradients are scaled by `start` at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))


def test_scaled_gradients_in_float16_train_as_float32_does(tiny_folder) -> None:
    plain, _, want = stepped(tiny_folder, LoRA(), torch.float32, Fabric(accelerator="cpu", devices=1), "SGD", 5)
    half, _, got = stepped(tiny_folder, LoRA(), torch.float32, scaled(2.0**10), "SGD", 5)
    assert got == pytest.approx(want, rel=2e-3)
    moved = [(p, q) for (k, p), q in zip(trainable(plain).items(), trainable(half).values(), strict=True) if ".B" in k]
    assert all((p - q).norm() <= 0.02 * p.norm() for p, q in moved)
    assert all(p.any() for p, _ in moved)


def test_a_gradient_that_overflows_in_float16_skips_its_step_and_lowers_the_scale(tiny_folder) -> None:
    fabric = scaled(2.0**40)
    model, _, _ = stepped(tiny_folder, LoRA(), torch.float32, fabric)
    assert not any(p.any() for key, p in trainable(model).items() if key.endswith(".B"))  # as at the start
    assert fabric.strategy.precision.scaler.get_scale() == 2.0**39
