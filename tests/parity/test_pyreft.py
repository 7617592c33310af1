"""ReFT of its authors' package: the weights of its interventions in our edits give its outputs and gradients."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from litpeft.methods.reft import ReFT
from litpeft.model.build import build
from litpeft.model.context import Context

pyreft = pytest.importorskip("pyreft", reason="pyreft is installed by `bash scripts/test.sh --parity`")
KINDS = {
    "loreft": ("LoreftIntervention", "rotate_layer"),
    "noreft": ("NoreftIntervention", "proj_layer"),
    "direft": ("DireftIntervention", "rotate_layer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_an_intervention_at_the_edited_tokens(tiny_folder, kind: str) -> None:
    name, projection = KINDS[kind]
    torch.manual_seed(0)
    its = getattr(pyreft, name)(embed_dim=64, low_rank_dimension=3, dtype=torch.float64, add_bias=False).double().eval()
    nn.init.normal_(its.learned_source.bias, std=0.3)
    edit = build(tiny_folder, torch.float64, ReFT(kind=kind, rank=3, first=2, last=2)).eval().blocks[0].after_block.reft
    if kind == "loreft":  # its start is orthonormal to 1e-7 only
        its.rotate_layer.weight = torch.linalg.qr(its.rotate_layer.weight.detach())[0]
    weight = getattr(its, projection).weight.detach()  # (d, r), or (r, d) of a linear layer
    edit.M.data = (weight if len(weight) == 3 else weight.T).clone()
    edit.W.data, edit.b.data = its.learned_source.weight.detach().clone(), its.learned_source.bias.detach().clone()
    h = torch.randn(1, 12, 64, dtype=torch.float64)
    ctx = Context(torch.arange(12)[None], None, torch.tensor([[8]]))
    got = edit(h, ctx)
    at = [0, 1, 6, 7]
    want = h.clone()
    want[:, at] = its(h[:, at])
    assert torch.allclose(got, want, atol=1e-8)
    for y in (got, want):
        F.mse_loss(y, torch.zeros_like(y)).backward()
    assert torch.allclose(edit.W.grad, its.learned_source.weight.grad, atol=1e-8)
    assert torch.allclose(edit.b.grad, its.learned_source.bias.grad, atol=1e-8)
