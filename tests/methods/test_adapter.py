"""LLaMA-Adapter against the paper's formula, written out on the weights of a transformers Llama."""

import pytest
import torch
from conftest import TINY, folded, in_float64, make_folder
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from litpeft.methods.adapter import Adapter, PromptAttention
from litpeft.methods.lora import LowRank
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context, KVCache
from litpeft.model.delta import attach, trainable
from litpeft.model.gpt import GPT

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


class PaperAttention(torch.nn.Module):
    """The paper's attention around a transformers layer; `one_softmax` is the mistake of sharing it with the text."""

    def __init__(self, attn: torch.nn.Module, prompt: torch.Tensor, gate: torch.Tensor):
        super().__init__()
        self.attn, self.one_softmax = attn, False
        self.prompt, self.gate = (torch.nn.Parameter(x.detach().clone()) for x in (prompt, gate))

    def forward(self, hidden_states, position_embeddings, **_):
        attn, size = self.attn, self.attn.head_dim
        q, k, v = (p(hidden_states).unflatten(-1, (-1, size)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)  # (B, T, heads, D)
        kp, vp = (p(self.prompt).unflatten(-1, (-1, size)) for p in (attn.k_proj, attn.v_proj))  # (n, heads, D)
        groups = q.size(2) // k.size(2)
        k, v, kp, vp = (x.repeat_interleave(groups, -2) for x in (k, v, kp, vp))
        future = torch.ones(q.size(1), q.size(1), dtype=torch.bool).triu(1)
        text = (torch.einsum("bthd,bshd->bhts", q, k) / size**0.5).masked_fill(future, float("-inf"))
        prompts = torch.einsum("bthd,nhd->bhtn", q, kp) / size**0.5
        if self.one_softmax:
            text, prompts = torch.cat((text, prompts), -1).softmax(-1).split((text.size(-1), len(kp)), -1)
        else:
            text, prompts = text.softmax(-1), prompts.softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", text, v)
        y = y + self.gate.tanh()[:, None] * torch.einsum("bhtn,nhd->bthd", prompts, vp)
        return attn.o_proj(y.flatten(2)), None


def open_gates(model: GPT) -> list[PromptAttention]:
    """Gives each gate a random opening, as if trained; returns the Deltas from the bottom up."""
    torch.manual_seed(4)
    cores = [m for m in model.modules() if isinstance(m, PromptAttention)]
    for core in cores:
        torch.nn.init.normal_(core.gate)
    return cores


def pair(folder, method: Adapter):
    """Returns our model and the formula's, in float64, with the same prompts and open gates, and both sides of each."""
    ours = build(folder, torch.float64, method).eval()
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    cores, pairs = open_gates(ours), []
    for core, layer in zip(cores, theirs.model.layers[-len(cores) :], strict=True):
        layer.self_attn = PaperAttention(layer.self_attn, core.prompt, core.gate)
        pairs.append((core, layer.self_attn))
    return ours, theirs, pairs


CASES = {
    "grouped queries": {},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_papers_formula(case: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "model", **CASES[case])
    tensors = load_file(folder / "model.safetensors")
    biases = {name: torch.randn_like(x) * 0.2 for name, x in tensors.items() if name.endswith(".bias")}
    save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs, pairs = pair(folder, Adapter(prompt_length=5))
    assert len(pairs) == 2
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    for logits in (want, got):
        (logits * weight).sum().backward()
    for core, paper in pairs:
        for own, other in ((core.prompt, paper.prompt), (core.gate, paper.gate)):
            assert (own.grad - other.grad).abs().max() <= 1e-10 * other.grad.abs().max()


def test_one_softmax_over_prompts_and_text_would_be_another_function(tiny_folder) -> None:
    ours, theirs, pairs = pair(tiny_folder, Adapter(prompt_length=5))
    for _, paper in pairs:
        paper.one_softmax = True
    want = theirs(IDS).logits
    assert (want - ours(IDS)).abs().max() > 1e-2 * want.abs().max()


def test_at_the_start_the_gates_have_a_gradient_and_the_prompts_none(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, Adapter())
    model(IDS).square().sum().backward()
    for block in model.blocks:
        assert block.attn.core.adapter.gate.grad.all()
        assert not block.attn.core.adapter.prompt.grad.any()


def test_a_validation_pass_between_steps_changes_nothing(tiny_folder) -> None:
    states = []
    for validated in (False, True):
        torch.manual_seed(0)
        model = build(tiny_folder, torch.float32, Adapter())
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        start = model.blocks[0].attn.core.adapter.prompt.detach().clone()
        for _ in range(3):
            if validated:
                with torch.no_grad():
                    model.eval()(IDS)
                model.train()
            optimizer.zero_grad()
            model(IDS, at=torch.arange(47), targets=IDS.flatten()[1:]).backward()
            optimizer.step()
        assert not torch.equal(model.blocks[0].attn.core.adapter.prompt, start)
        states.append([p.detach() for p in trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_every_document_and_position_sees_the_prompts(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, Adapter()).eval()
    ids, lengths = IDS[:1], (1, 9, 14)
    before = model(ids, Context.packed(lengths, ids.device, None))
    open_gates(model)
    after = model(ids, Context.packed(lengths, ids.device, None))
    assert ((after - before).abs().amax(-1) > 1e-3).all()


def test_an_adapted_k_gives_adapted_prompt_keys(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, Adapter()).eval()
    open_gates(model)
    for linear in (model.blocks[1].attn.k, model.blocks[1].attn.v):
        linear.slot.add("lora", LowRank(linear.in_features, linear.out_features, 4, 1.0, 0.0).double())
        torch.nn.init.normal_(linear.slot.lora.A)
        torch.nn.init.normal_(linear.slot.lora.B, std=0.1)
    want = model(IDS)
    for linear in (model.blocks[1].attn.k, model.blocks[1].attn.v):
        linear.weight.data = folded(linear)["weight"].detach()
        linear.slot.lora.B.data.zero_()
    assert (model(IDS) - want).abs().max() <= 1e-10 * want.abs().max()


def test_it_computes_under_mixed_precision(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, Adapter())
    open_gates(model)
    want = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(IDS)
    got.float().square().sum().backward()
    assert (want - got).abs().max() <= 2e-2 * want.abs().max()
    assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize("layers", [1, 2, 30])
def test_the_top_layers_get_prompts(tiny_folder, layers: int) -> None:
    model = build(tiny_folder, torch.float32, Adapter(layers=layers, prompt_length=7))
    has = ["adapter" in block.attn.core.deltas for block in model.blocks]
    assert has == [layers >= 2, True]
    assert model.blocks[1].attn.core.adapter.prompt.shape == (7, 64)


def test_prompts_start_standard_normal_and_gates_shut(tiny_folder) -> None:
    core = build(tiny_folder, torch.float32, Adapter(prompt_length=500)).blocks[0].attn.core.adapter
    assert abs(float(core.prompt.detach().mean())) < 0.02
    assert abs(float(core.prompt.detach().std()) - 1) < 0.02
    assert core.gate.shape == (4,)
    assert not core.gate.any()


FAMILIES = {
    "gpt_neox": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2},
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_positions": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_start_at_their_base_and_then_decode_with_the_prompts(family: str, tmp_path) -> None:
    heads = "n_head" if family == "gpt2" else "num_attention_heads"
    config = AutoConfig.for_model(family, **FAMILIES[family], **{heads: 4}, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, lengths = build(tmp_path, torch.float64, Adapter()), (5, 1, 18)
    base = build(tmp_path, torch.float64)(IDS)
    assert torch.equal(model(IDS), base)
    open_gates(model)
    want = model(IDS)
    assert ((want - base).abs().amax(-1) > 1e-3).all()
    want.square().sum().backward()
    assert all(p.grad.all() for p in trainable(model).values())
    with torch.no_grad():
        cache = [KVCache(2, 24, model.config, torch.float64, "cpu") for _ in model.blocks]
        pos = torch.arange(24).expand(2, -1)
        got = [model(IDS[:, a:b], Context(pos[:, a:b], cache=cache, end=b)) for a, b in ((0, 8), (8, 9), (9, 24))]
        assert torch.allclose(torch.cat(got, 1), want, atol=1e-10)
        packed = model(IDS[:1], Context.packed(lengths, IDS.device, None))
        alone = torch.cat([model(part) for part in IDS[:1].split(lengths, dim=1)], dim=1)
        assert torch.allclose(packed, alone, atol=1e-10)


PYTHIA_410M = {"vocab_size": 50304, "d_model": 1024, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "head_dim": 64}
LLAMA_3_8B = {"vocab_size": 128256, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("shapes", "layers", "count"),
    [(PYTHIA_410M, 22, 225_632), (LLAMA_3_8B, 30, 1_229_760)],  # layers * (10 * d + heads); LitGPT counts the same
)
def test_parameter_counts_of_other_shapes(shapes: dict, layers: int, count: int) -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(**shapes, d_ff=4 * shapes["d_model"], max_positions=2048))
        attach(model, Adapter(layers=layers))
    assert sum(p.numel() for p in trainable(model).values()) == count


@pytest.mark.parametrize("settings", [{"layers": 0}, {"prompt_length": 0}, {"prompt_length": 65537}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        Adapter(**settings)
