"""Every family against transformers: gradients and generation; of two of them also merging, and config.json."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import TINY, finetune, folded, in_float64
from test_model import GPT2
from tiny_families import MODELS, limit, make_family
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.generate.load import load_model
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.context import Context, KVCache, layer_cache
from litpeft.model.families import FAMILIES, gpt2, gpt_neox
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT

IDS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_tiny_model() -> None:
    assert {model.get("model_type", "llama") for model in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_equals_that_of_transformers(name: str, tmp_path) -> None:
    theirs = in_float64(make_family(tmp_path, name, torch.float64))
    ours = build(tmp_path, torch.float64).requires_grad_(True)
    torch.nn.functional.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    at = torch.arange(80)[torch.arange(80) % 40 != 39]
    (ours(IDS, at=at, targets=IDS[:, 1:].flatten()) / 78).backward()
    names = NameMap(*read_config(tmp_path))
    given = {ours_name: p.grad for ours_name, p in ours.named_parameters()} | dict(ours.named_buffers())
    grads = dict(names.written(given.items()))
    want = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    want = revert_weight_conversion(theirs, want)
    still = dict(theirs.named_buffers()) | {key: p for key, p in theirs.named_parameters() if not p.requires_grad}
    still = revert_weight_conversion(theirs, still)
    assert len(dict(ours.named_buffers())) == sum(key in still for key in grads)
    grads = {key: grad for key, grad in grads.items() if key not in still}
    assert grads.keys() == want.keys()
    largest = max(float(grad.abs().max()) for grad in want.values())
    assert all((grads[key] - want[key]).abs().max() <= 1e-10 * largest for key in want)


@pytest.mark.parametrize("name", MODELS)
def test_thirty_two_greedy_tokens_from_the_cache_are_those_of_transformers(name: str, tmp_path) -> None:
    theirs = make_family(tmp_path, name, initializer_range=0.3)  # wide weights: the answers differ and do not repeat
    ours = build(tmp_path, torch.float32)
    prompt = IDS.view(8, 10)[:, :9]
    want = theirs.generate(prompt, do_sample=False, min_new_tokens=32, max_new_tokens=32, pad_token_id=0)
    ids, cache = prompt, [layer_cache(8, 41, ours.config, torch.float32, "cpu", n) for n, _ in enumerate(ours.blocks)]
    start = 0
    with torch.no_grad():
        while ids.size(1) < 41:
            pos = torch.arange(start, ids.size(1)).expand(8, -1)
            logits = ours(ids[:, start:], Context(pos, cache=cache, end=ids.size(1)))[:, -1]
            logits[:, 1] = -torch.inf  # end of text, which min_new_tokens forbids
            start, ids = ids.size(1), torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, want)
    assert len(ids[:, 9:].unique()) > 8


@pytest.mark.parametrize("name", MODELS)
def test_cached_and_packed_logits_equal_the_full_forward(name: str, tmp_path) -> None:
    make_family(tmp_path, name, torch.float64)
    model = build(tmp_path, torch.float64)
    with torch.no_grad():
        want = model(IDS)
        cache = [layer_cache(2, 40, model.config, torch.float64, "cpu", n) for n, _ in enumerate(model.blocks)]
        steps = ((0, 9), (9, 10), (10, 25), (25, 40))
        contexts = (Context(torch.arange(a, b).expand(2, -1), cache=cache, end=b) for a, b in steps)
        got = torch.cat([model(IDS[:, a:b], ctx) for (a, b), ctx in zip(steps, contexts, strict=True)], 1)
        packed = model(IDS.view(1, -1), Context.packed((40, 40), IDS.device, None)).view_as(want)
    assert (got - want).abs().max() <= 1e-10
    assert (packed - want).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["neox", "gpt2"])
def test_lora_acts_on_every_part_of_a_fused_linear_and_folds_into_it(name: str, tmp_path) -> None:
    make_family(tmp_path, name)
    model = build(tmp_path, torch.float64, LoRA(rank=3, targets=("*.attn.*", "*.mlp.*"))).eval()
    slots = [key for key, _ in model.named_parameters() if key.endswith("slot.lora.B")]
    assert len(slots) == 2 * 6  # q, k, v, o, up, down
    with torch.no_grad():
        base = model(IDS)
        for key in slots:
            torch.nn.init.normal_(model.get_parameter(key), std=0.1)
        want = model(IDS)
        plain = build(tmp_path, torch.float64)
        plain.load_state_dict(folded(model))
        assert (plain(IDS) - want).abs().max() <= 1e-10
    assert (base - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["neox", "gpt2", "gemma3_text", "phi3", "mixtral", "gemma4_text", "deepseek_v3", "qwen3_5_text"]
)
def test_transformers_loads_the_folder_that_merge_writes_and_computes_the_same(name: str, tmp_path) -> None:
    make_family(tmp_path / "base", name)
    run = finetune(tmp_path / "base", tmp_path, "--train.epochs", "3", "--train.lr", "1e-2")
    main(["merge", str(run)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = AutoModelForCausalLM.from_pretrained(run / "merged", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        base = load_model(str(tmp_path / "base"), precision="32-true").model(IDS)
        assert (theirs.eval()(IDS).logits - want).abs().max() <= limit(name) * max(1, want.abs().max())
    assert (base - want).abs().max() > 1e-2
    main(["generate", str(run / "merged"), "--prompt", "Colour of sky?", "--sampling.max_new_tokens", "3"])


@pytest.mark.parametrize("config", [None, '{"model_max_length": 1024}'])
def test_a_tokenizer_that_names_nothing_but_an_end_of_text_is_understood(config: str | None, tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    if config is not None:  # all that the hub's gpt2 says: the end of text is in config.json only
        (tmp_path / "tokenizer_config.json").write_text(config)
    loaded = load_model(str(tmp_path), precision="32-true")
    tokenizer = loaded.tokenizer
    assert (tokenizer.eos, tokenizer.stop_ids, loaded.template.name) == ("<|endoftext|>", (1,), "alpaca")
    assert tokenizer.decode(tokenizer.encode("Grüße<|endoftext|>")) == "Grüße"
    assert tokenizer.encode("a<|endoftext|>")[-1] == 1


@pytest.mark.parametrize("name", ["neox", "gpt2"])
def test_a_forward_pass_compiles_into_one_graph(name: str, tmp_path) -> None:
    make_family(tmp_path, name)
    model = build(tmp_path, torch.float32, LoRA())
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="eager")(IDS)
        assert torch.allclose(got, model(IDS), atol=1e-5)


def test_norms_that_train_are_float32_in_a_bfloat16_model(tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    model = build(tmp_path, torch.bfloat16, LoRA(unfreeze=("*norm*", "positions.*")))
    norm = model.blocks[0].norm1
    assert norm.weight.dtype == norm.bias.dtype == model.positions.weight.dtype == torch.float32
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    assert norm(x).dtype == model(IDS).dtype == torch.bfloat16


def test_more_tokens_than_learned_positions_are_refused(tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    model = build(tmp_path, torch.float32)
    ids = torch.zeros(1, 513, dtype=torch.long)
    cache = [KVCache(1, 520, model.config, torch.float32, "cpu") for _ in model.blocks]
    for tokens, ctx in (
        (ids, None),
        (ids, Context.packed((513,), ids.device, None)),
        (ids[:, :1], Context(torch.tensor([[512]]), cache=cache, end=513)),
    ):
        with pytest.raises(ModelError, match=r"513 tokens are more than the 512 positions"):
            model(tokens, ctx)
    assert model(ids.view(1, -1)[:, :512]).shape == (1, 512, 320)


def test_the_numbers_of_parameters_are_those_published() -> None:
    sizes = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    neox = gpt_neox.config({**sizes, "vocab_size": 50304})
    small = gpt2.config({"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024})
    for config, want in ((neox, 405_334_016), (small, 124_439_808)):
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(config).parameters()) == want


def test_older_and_newer_spellings_of_partial_rotation_mean_the_same() -> None:
    hf = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    new = gpt_neox.config(hf | {"rope_parameters": rope})
    assert gpt_neox.config(hf | {"rotary_pct": 0.5, "rotary_emb_base": 500}) == new
    assert (new.rotary_size, new.rope_theta) == (8, 500.0)
    stretched = gpt_neox.config(hf | {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (stretched.rope_scaling.kind, stretched.rotary_size, stretched.rope_theta) == ("linear", 8, 10000.0)
    assert replace(gpt_neox.config(hf), rotary_dim=8) == replace(new, rope_theta=10000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx true is not supported; it must be false",
        ),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn true is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights false is not supported; it must be true"),
        ({"add_cross_attention": True}, "add_cross_attention true is not supported"),
        (
            {"activation_function": "tanh"},
            'activation_function "tanh" is not supported; it must be "silu" or "swish" or "relu"',
        ),
        ({"n_head": 5}, "n_embd 64 is no multiple of n_head 5"),
        ({"num_attention_heads": 5}, "n_embd 64 is no multiple of num_attention_heads 5"),
    ],
)
def test_what_would_change_the_results_of_gpt2_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt2.config(GPT2 | change)


def test_a_rotary_part_that_cannot_be_is_refused() -> None:
    hf = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    for share in (0.2, 1.5):  # of 16: 3, 24
        with pytest.raises(ValueError, match=r"rotary_pct of head_dim 16\) must be even and no larger"):
            gpt_neox.config(hf | {"rotary_pct": share})
