"""LongLoRA against the masks of its paper, transformers' interpolated positions, and probes for later tokens."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, finetune, in_float64, make_folder
from families.tiny_families import make_family
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.methods.long_lora import LongLoRA, Shifted
from litpeft.model.attention import Documents
from litpeft.model.build import build
from litpeft.model.context import Context, KVCache
from litpeft.model.delta import trainable, without_delta
from litpeft.model.rope import interpolated

GROUP = 8
LENGTHS = (32, 5, 21)


def shifted_mask(length: int, heads: int, group: int) -> torch.Tensor:
    """Returns (heads, T, T), True where a token sees another, as the paper says it."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    same = [(i + shift) // group == (j + shift) // group for shift in (0, group // 2)]
    return torch.stack([(i >= j) & same[head >= heads // 2] for head in range(heads)])


class Layer:
    """What the attention of a layer says of itself."""

    sinks = None

    def kind(self) -> dict[str, None]:
        return {"window": None, "cap": None, "sinks": None}


def attention(q, k, v, lengths: tuple[int, ...] | None, group: int = GROUP) -> torch.Tensor:
    ctx = Context(torch.zeros(1, 1), None if lengths is None else Documents(lengths))
    return Shifted(group)(q, k, v, ctx, Layer())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 2)])
def test_attention_and_its_gradients_are_those_of_the_papers_mask_in_each_document(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, heads, sum(LENGTHS), 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, sum(LENGTHS), 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    twins = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    got, parts = attention(q, k, v, LENGTHS), []
    for one in zip(*(x.split(LENGTHS, 2) for x in twins), strict=True):
        mask = shifted_mask(one[0].size(2), heads, GROUP)
        parts.append(F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True))
    want = torch.cat(parts, 2)
    assert torch.allclose(got, want, atol=1e-12)
    grad = torch.randn_like(want)
    got.backward(grad), want.backward(grad)
    for own, other in zip((q, k, v), twins, strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-12)


def test_rows_without_packing_get_what_they_get_packed() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 20, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    packed = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v)]
    want = attention(*packed, (20, 20, 20))[0].unflatten(1, (3, 20)).transpose(0, 1)
    assert torch.allclose(attention(q, k, v, None), want, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 32, 16, requires_grad=True) for _ in range(3))
    want = attention(q, k, v, (32,))
    for t in range(31):
        others = [x.detach().clone().requires_grad_() for x in (k, v)]
        for x in others:
            x.data[:, :, t + 1 :] += 3.0
        got = attention(q, *others, (32,))
        assert torch.equal(got[:, :, : t + 1], want[:, :, : t + 1]), t
        assert not torch.equal(got[:, :, t + 1 :], want[:, :, t + 1 :])


def test_no_logit_depends_on_a_later_token_in_training(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, LongLoRA(group_size=GROUP)).train()
    ids = torch.randint(0, TINY["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(0))
    want = model(ids)
    for t in (0, 3, 4, 7, 8, 12, 27, 30):
        other = ids.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 7) % TINY["vocab_size"]
        assert (model(other)[:, : t + 1] - want[:, : t + 1]).abs().max() <= 1e-12


def test_a_group_as_long_as_the_text_leaves_the_first_heads_whole() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 32, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got, full = attention(q, k, v, (32,), 32), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(got[:, :2], full[:, :2], atol=1e-12)
    assert torch.allclose(got[:, 2:, :16], full[:, 2:, :16], atol=1e-12)
    assert not torch.allclose(got[:, 2:, 16:], full[:, 2:, 16:], atol=1e-2)


def test_a_quarter_of_the_text_attends_to_a_quarter_of_the_pairs() -> None:
    pairs = [sum(n * (n + 1) / 2 for n in Documents((8192,)).cut(first, 2048).lengths) for first in (2048, 1024)]
    assert sum(pairs) / 2 / (8192 * 8193 / 2) == pytest.approx(0.2345, abs=5e-5)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13, 16])
def test_pieces_of_a_document_follow_each_other(length: int) -> None:
    for first in (4, 8):
        pieces = Documents((length, 2)).cut(first, 8).lengths
        assert sum(pieces[:-1]) == length
        assert pieces[0] == min(first, length)
        assert max(pieces) <= 8
        assert min(pieces) >= 1


def test_answers_are_written_with_attention_to_all_tokens(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, LongLoRA(group_size=GROUP))
    plain = build(tiny_folder, torch.float64, LongLoRA(group_size=4096))
    ids = torch.randint(0, TINY["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(0))
    seen = model.train()(ids)
    with torch.no_grad():
        want = plain(ids)
        assert (seen - want).abs().max() > 1e-2
        assert torch.equal(model(ids), want)
        cache = [KVCache(1, 32, model.config, torch.float64, "cpu") for _ in model.blocks]
        assert (model(ids, Context(torch.arange(32)[None], cache=cache, end=32)) - want).abs().max() <= 1e-12
        assert torch.equal(model.eval()(ids), want)


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 3.0}])
def test_interpolated_positions_are_those_of_transformers(tmp_path, rope: dict | None) -> None:
    changes = {} if rope is None else {"rope_scaling": rope}
    folder = make_folder(tmp_path / "base", **changes)
    ids = torch.randint(0, TINY["vocab_size"], (1, 300), generator=torch.Generator().manual_seed(0))
    ours = build(folder, torch.float64, LongLoRA(factor=2.0)).eval()
    assert ours.reach == 1024
    base = build(folder, torch.float64).eval()
    with torch.no_grad():
        got = ours(ids)
        with without_delta(ours):
            assert ours.reach == 512
            assert torch.equal(ours(ids), base(ids))
    config = json.loads((folder / "config.json").read_text())
    interpolated(config, 2.0)
    (folder / "config.json").write_text(json.dumps(config))
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    assert theirs.config.max_position_embeddings == 1024
    assert theirs.model.rotary_emb.inv_freq[0] == 1 / (2 * (1 if rope is None else rope["factor"]))
    with torch.no_grad():
        assert (theirs(ids).logits - got).abs().max() <= 1e-4 * got.abs().max()  # their angles are float32
        assert torch.equal(build(folder, torch.float64)(ids), got)
        assert (base(ids) - got).abs().max() > 1e-2 * got.abs().max()


@pytest.mark.parametrize("family", ["llama, older file", "neox", "hunyuan_v1_dense"])
def test_other_spellings_of_positions_are_kept(tmp_path, family: str) -> None:
    folder = tmp_path / "base"
    make_folder(folder) if family == "llama, older file" else make_family(folder, family)
    config = json.loads((folder / "config.json").read_text())
    if family == "llama, older file":
        config["rope_theta"] = 5000.0
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(2, 50)[None]
    model = build(folder, torch.float64, LongLoRA(factor=2.0)).eval()
    with torch.no_grad():
        got, base = model(ids), build(folder, torch.float64)(ids)
        interpolated(config, 2.0)
        (folder / "config.json").write_text(json.dumps(config))
        theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()(ids).logits
        assert torch.equal(build(folder, torch.float64)(ids), got)
    assert (theirs - got).abs().max() <= 1e-4 * got.abs().max()
    assert (base - got).abs().max() > 1e-2 * got.abs().max()


def test_every_second_position_is_a_position_of_the_base(tiny_folder) -> None:
    model, base = build(tiny_folder, torch.float64, LongLoRA(factor=2.0)).eval(), build(tiny_folder, torch.float64)
    ids, pos = torch.arange(20)[None], torch.arange(20)[None]
    assert torch.equal(model(ids, Context(2 * pos)), base(ids, Context(pos)))
    one = build(tiny_folder, torch.float64, LongLoRA(factor=1.0)).eval()
    assert torch.equal(one(ids), base(ids))


def test_norms_and_the_embedding_train(tiny_folder) -> None:
    names = set(trainable(build(tiny_folder, torch.float32, LongLoRA())))
    norms = {f"blocks.{n}.norm{i}.weight" for n in (0, 1) for i in (1, 2)} | {"norm.weight", "embed.weight"}
    assert norms == {name for name in names if ".slot." not in name}


def test_a_run_answers_and_merges_with_its_positions(tiny_folder, tmp_path) -> None:
    argv = ("--method.group_size", "8", "--method.factor", "4", "--train.epochs", "3", "--train.lr", "1e-3")
    run = finetune(tiny_folder, tmp_path, *argv, method="long_lora")
    assert find_run(run).facts["settings"]["factor"] == 4.0
    main(["merge", str(run)])
    config = json.loads((run / "merged" / "config.json").read_text())
    assert (config["rope_scaling"]["factor"], config["max_position_embeddings"]) == (4.0, 2048)
    ids = torch.randint(0, 250, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = load_model(str(run), precision="32-true").model
        assert loaded.reach == 2048
        want = loaded(ids)
        theirs = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
        assert (theirs(ids).logits - want).abs().max() <= 1e-4 * want.abs().max()


def test_models_without_plain_rotary_positions_are_refused(tmp_path) -> None:
    make_family(tmp_path / "gpt2", "gpt2")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    make_folder(tmp_path / "llama", rope_scaling=rope | {"original_max_position_embeddings": 64})
    for name in ("gpt2", "llama"):
        with pytest.raises(ConfigError, match="interpolates rotary positions"):
            build(tmp_path / name, torch.float32, LongLoRA())


@pytest.mark.parametrize("settings", [{"factor": 0.5}, {"factor": 2000.0}, {"group_size": 1}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))} must be at least"):
        LongLoRA(**settings)
