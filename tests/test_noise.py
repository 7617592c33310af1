"""NEFTune's noise on the embedded tokens: beside transformers', document by document, and in training only."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_runs import assert_same, cut, delta, resume, same_tensors, train
from transformers.integrations.neftune import neftune_post_forward_hook

from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.noise import with_noise

CPU = torch.device("cpu")


def test_one_document_gets_the_noise_of_transformers() -> None:
    x = torch.randn(1, 50, 64)
    torch.manual_seed(3)
    theirs = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, x)
    torch.manual_seed(3)
    ours = with_noise(x, 5.0, Context.packed((50,), CPU, None))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_each_document_gets_noise_by_its_own_length() -> None:
    lengths, width = (4, 400, 1), 256
    noise = with_noise(torch.zeros(1, sum(lengths), width), 3.0, Context.packed(lengths, CPU, None))[0]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        limit = 3.0 / (length * width) ** 0.5
        assert 0.97 * limit < float(part.abs().max()) <= limit
        assert abs(float(part.std()) / (limit / 3**0.5) - 1) < 0.15


def test_only_training_is_noisy(tiny_folder: Path) -> None:
    model = build(tiny_folder, torch.float32, LoRA())
    ids, ctx = torch.arange(2, 22)[None], lambda: Context.packed((8, 12), CPU, None)
    plain = model.eval()(ids, ctx())
    with torch.no_grad():
        ungraded = model(ids, ctx())
    model.noise = 5.0
    assert torch.equal(model(ids, ctx()), plain)
    assert not torch.allclose(model.train()(ids, ctx()), plain, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(model(ids, ctx()), ungraded)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_run_with_noise_learns_something_else_and_goes_on_with_the_same_bits(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    noisy = {"train.neftune": 5}
    plain, whole = train(tiny_folder, tmp_path / "plain", {}, method), train(tiny_folder, tmp_path / "x", noisy, method)
    assert not same_tensors(delta(plain), delta(whole))
    assert_same(resume(tiny_folder, cut(whole, 2, tmp_path / "run"), noisy, method), whole)
