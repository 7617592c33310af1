"""Teaches an image classifier rotated digits with LoRA: a method of litpeft in a model that is no language model.

    python scripts/image_classifier.py

Needs scikit-learn, which ships the images: 1,797 handwritten digits of 8 x 8 pixels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from litpeft.methods.lora import LoRA
from litpeft.model.adopt import adopt
from litpeft.model.delta import delta_state, trainable
from litpeft.model.fold import folds


def images(rotated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images (n, 64) and digits (n,) to train on, and held-out ones."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    x = (x.rot90(1, (1, 2)) if rotated else x).flatten(1)
    y, order = torch.tensor(digits.target), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1400], order[1400:]
    return x[train], y[train], x[held_out], y[held_out]


def classifier() -> nn.Module:
    """Returns a network of three linear layers."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int = 20) -> None:
    """Trains what is not frozen, in batches of 50."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of images whose digit is the likeliest."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    x, y, *upright = images(rotated=False)
    model = classifier()
    train(model, x, y, lr=1e-3)
    x, y, *rotated = images(rotated=True)
    total = sum(p.numel() for p in model.parameters())
    print(f"base: {accuracy(model, *upright):.1%} of upright digits, {accuracy(model, *rotated):.1%} of rotated ones")
    adopt(model, LoRA(rank=8, targets=("*",)))
    train(model, x, y, lr=5e-3)
    count = sum(p.numel() for p in trainable(model).values())
    print(f"LoRA: {accuracy(model, *rotated):.1%} of rotated ones; {count:,} of {total:,} parameters trained")
    print(f"saved: {sum(t.nbytes for t in delta_state(model).values()):,} bytes")
    merged = classifier()
    merged.load_state_dict({name: tensor for name, tensor, _ in folds(model)})
    print(f"merged: {accuracy(merged, *rotated):.1%} of rotated ones, in an ordinary torch module")


if __name__ == "__main__":
    main()
