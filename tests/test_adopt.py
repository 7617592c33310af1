"""Methods in torch modules that are no language models: peft's numbers, and each method's contract."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model

from litpeft.core.errors import UserError
from litpeft.methods import method_class
from litpeft.model.adopt import adopt
from litpeft.model.delta import delta_state, trainable
from litpeft.model.fold import folds

LINEAR = {  # methods that act in linear layers, norms and parameters only, with what they need here
    "lora": {"targets": ("*",)},
    "lora_fa": {"targets": ("*",)},
    "dora": {"targets": ("*",)},
    "multi_lora": {"targets": ("*",)},
    "pissa": {"targets": ("*",)},
    "vera": {"targets": ("*",)},
    "ia3": {"targets": ("*",)},
    "bitfit": {"targets": ("*",)},
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.LayerNorm(20), nn.Linear(20, 6)).double()


def learn(model: nn.Module, steps: int = 3) -> None:
    """Takes a few steps, so that no tensor is at its start."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 12, dtype=torch.float64), torch.randint(6, (8,))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", LINEAR)
def test_a_method_starts_at_the_module_learns_is_saved_and_folds(name: str) -> None:
    x, plain = torch.randn(5, 12, dtype=torch.float64), network()
    model = adopt(network(), method_class(name)(**LINEAR[name]))
    assert torch.allclose(model(x), plain(x), atol=1e-6 if name == "pissa" else 1e-12)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    learn(model)
    assert not torch.allclose(model(x), plain(x), atol=1e-4)
    assert all(torch.equal(model.get_parameter(key), value) for key, value in frozen.items())
    again = adopt(network(), method_class(name)(**LINEAR[name]), delta_state(model))
    assert torch.allclose(again(x), model(x), atol=1e-12)
    merged = network(seed=2)
    merged.load_state_dict({key: tensor for key, tensor, _ in folds(model)})
    assert torch.allclose(merged(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_logits_and_gradients_are_those_of_peft(name: str) -> None:
    targets = ["0", "3"]
    if name == "ia3":
        config = IA3Config(target_modules=targets, feedforward_modules=[])
    else:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=name == "dora")
    theirs = get_peft_model(network(), config).double()
    more = {} if name == "ia3" else {"rank": 4, "alpha": 8.0}
    ours = adopt(network(), method_class(name)(targets=("*",), **more))
    own = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "g": "ia3_l.default"}
    own["m"] = "lora_magnitude_vector.default.weight"
    torch.manual_seed(3)
    pairs = []
    for key, parameter in trainable(ours).items():
        layer, _, _, leaf = key.split(".")
        other = theirs.get_parameter(f"base_model.model.{layer}.{own[leaf]}")
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
            other.copy_(parameter.view(other.shape))
        pairs.append((parameter, other))
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-10)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for parameter, other in pairs:
        assert torch.allclose(parameter.grad, other.grad.view(parameter.shape), atol=1e-8)


def test_a_method_of_language_models_is_refused_by_what_it_looks_for() -> None:
    with pytest.raises(UserError, match="Prefix acts in the blocks of a language model, and this one has no blocks"):
        adopt(network(), method_class("prefix")())


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_the_image_classifier_of_the_page_learns_what_it_shows(capsys) -> None:
    script = Path(__file__).parent.parent / "scripts" / "image_classifier.py"
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out.splitlines()
    page = (Path(__file__).parent.parent / "tutorials" / "any_module.md").read_text()
    assert said[2] in page
    assert said[1].partition("; ")[2] in page
    shares = [float(share) for line in said for share in re.findall(r"([\d.]+)%", line)]
    assert shares[0] > 95 > 20 > shares[1]
    assert shares[2] == shares[3] > 90
