"""QA-LoRA against its formulas: pooling, a merge that leaves codes and scales, and GGUF files that others read."""

import gguf
import pytest
import torch
from conftest import finetune, make_folder
from packed_layers import make
from test_methods import LLAMA_7B
from tiny_gguf import SMALL, digits, llama, write_gguf
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.exchange.convert import convert
from litpeft.exchange.gguf.layout import rows_dealt_out, rows_in_halves
from litpeft.exchange.run import build_run, find_run
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.methods.lora import LoRA
from litpeft.methods.qa_lora import Pooled, QALoRA
from litpeft.model.build import build
from litpeft.model.delta import attach, trainable
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.quantize.bits import unpack_bits
from litpeft.model.quantize.grouped import Grouped
from litpeft.model.quantize.quantized import Quantized, store


def trained(bits: int, dtype: torch.dtype, mean: bool, inputs: int = 512) -> tuple[Grouped, Pooled, torch.Tensor]:
    """Returns a layer of the size of the reference figures, its delta, and an x."""
    torch.manual_seed(0)
    layer = make(f"int{bits}", False, torch.randn(256, inputs) / inputs**0.5, dtype)
    delta = Pooled(inputs, 256, rank=8, scale=2.0, dropout=0.0, divisor=32 if mean else 1)
    delta.reset_parameters()
    torch.nn.init.normal_(delta.B, std=0.02 * (32 if mean else 1))
    layer.slot.add("qa_lora", delta.to(dtype))
    return layer, delta, torch.randn(64, inputs, dtype=dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach() - want.detach()).abs().max() / want.detach().abs().max())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("inputs", [64, 100])
def test_values_and_gradients_are_those_of_the_pooled_input(inputs: int, mean: bool) -> None:
    layer, delta, x = trained(4, torch.float64, mean, inputs)
    a, b = (tensor.detach().clone().requires_grad_() for tensor in (delta.A, delta.B))
    x.requires_grad_()
    twin = x.detach().clone().requires_grad_()
    padded = torch.nn.functional.pad(twin, (0, -inputs % 32)).unflatten(1, (-1, 32))
    pooled = padded.sum(2) / (32 if mean else 1)
    want = twin @ layer.dense().T + 2 * pooled @ a.T @ b.T
    got = layer(x)
    assert relative(got, want) <= 1e-13
    want.square().sum().backward()
    got.square().sum().backward()
    for own, other in ((delta.A, a), (delta.B, b), (x, twin)):
        assert relative(own.grad, other.grad) <= 1e-12


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_merge_leaves_codes_and_scales_and_gives_the_same_outputs(
    dtype: torch.dtype, limit: float, bits: int, mean: bool
) -> None:
    layer, delta, x = trained(bits, dtype, mean)
    codes, scale, shift = (layer.packed()[key].clone() for key in ("weight", "scale", "shift"))
    want, packed = layer(x), layer.folded(layer.slot.frozen(layer))
    assert torch.equal(packed["weight"], codes)
    assert torch.equal(packed["scale"], scale)
    assert int(unpack_bits(codes, bits).max()) == 2**bits - 1
    assert relative(x @ layer.unpacked(packed).T, want) <= limit
    update = delta.scale * delta.B @ delta.A  # (out, groups): what the zero points move by, times the scale
    assert relative(packed["shift"], shift.to(dtype) + update) <= limit
    for wrong in (update * 32 if mean else update / 32, update / 2, 2 * update):  # other divisors; s twice
        shifted = layer.unpacked(packed | {"shift": shift.to(dtype) + wrong})
        assert relative(x @ shifted.T, want) > 0.3
    rounded = packed["scale"].to(dtype) * (packed["shift"] / packed["scale"].to(dtype)).round()
    assert relative(x @ layer.unpacked(packed | {"shift": rounded}).T, want) > 0.03  # whole zero points destroy it
    assert relative(x @ layer.unpacked(packed | {"shift": packed["shift"].half()}).T, want) < 1e-3


@pytest.mark.parametrize(("bits", "error"), [(4, 0.078), (3, 0.16), (2, 0.23)])
def test_plain_lora_that_is_quantised_again_loses_what_the_groups_keep(bits: int, error: float) -> None:
    torch.manual_seed(0)
    layer = make(f"int{bits}", False, torch.randn(256, 512) / 512**0.5, torch.float64)
    weight = layer.dense()
    update = torch.randn(256, 8, dtype=torch.float64) @ torch.randn(8, 512, dtype=torch.float64)
    update *= 0.2 * weight.norm() / update.norm()
    x = torch.randn(512, 512, dtype=torch.float64)
    again = layer.unpacked(layer.pack(weight + update))
    want = x @ (weight + update).T
    lost = (x @ again.T - want).norm()
    assert float(lost / want.norm()) == pytest.approx(error, rel=0.12)
    assert lost > 0.35 * (x @ update.T).norm()


def test_parameter_counts_on_llama_7b_are_those_of_the_paper() -> None:
    for method, storage, count in (
        (QALoRA(rank=64), "int4", 89_309_184),
        (LoRA(rank=64), "nf4", 159_907_840),
    ):
        with torch.device("meta"):
            model = GPT(LLAMA_7B)
            store(model, storage, True, torch.bfloat16)
            attach(model, method)
        assert sum(p.numel() for p in trainable(model).values()) == count


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
def test_it_wants_a_base_in_groups(tiny_folder, storage: str | None) -> None:
    with pytest.raises(ConfigError, match="groups of inputs") as error:
        build(tiny_folder, torch.float32, QALoRA(), storage=storage and Storage(storage))
    assert error.value.where == "base.quantize"


def test_rows_are_dealt_out_as_they_are_read() -> None:
    rows = torch.arange(48).view(24, 2)
    assert torch.equal(rows_in_halves(rows_dealt_out(rows, 8), 8), rows)


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory):
    """A small Llama whose tokenizer GGUF knows, all widths multiples of 32."""
    folder = tmp_path_factory.mktemp("models")
    source = write_gguf(folder / "m.gguf", llama(digits()), digits())
    convert(Convert(str(source), str(folder / "base")))
    return folder / "base"


@pytest.mark.parametrize("storage", ["int4", "int3", "int2"])
def test_a_run_becomes_a_gguf_file_with_its_codes_that_transformers_reads(gguf_base, tmp_path, storage, capsys) -> None:
    argv = ("--base.quantize", storage, "--train.epochs", "3", "--train.lr", "1e-2")
    run = finetune(gguf_base, tmp_path, *argv, method="qa_lora")
    main(["merge", str(run), "--to", "gguf", "--dtype", "float32", "--out", str(tmp_path / "out")])
    assert "14 linear layers keep their codes and scales (Q4_1)" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(ids)
        base = build(gguf_base, torch.float32, storage=Storage(storage))(ids)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
        got = theirs(ids).logits
    assert (base - want).abs().max() > 1e-2 * want.abs().max()
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()  # zero points are rounded to float16
    found = find_run(run)
    model = build_run(found, gguf_base, torch.float32, storage=found.storage)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for theirs, ours in (("blk.0.ffn_down", "blocks.0.mlp.down"), ("blk.1.attn_k", "blocks.1.attn.k")):
        layer, stored = model.get_submodule(ours), tensors[f"{theirs}.weight"]
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_1
        data = torch.from_numpy(stored.data.copy()).view(layer.out_features, -1, 20)
        if "attn_k" in theirs:
            data = rows_in_halves(data, SMALL["hidden_size"] // SMALL["num_attention_heads"])
        codes = torch.cat((data[..., 4:] & 15, data[..., 4:] >> 4), -1)
        assert torch.equal(codes.flatten(1), unpack_bits(layer.weight, layer.bits))
        scale, shift = data[..., :4].contiguous().view(torch.float16).unbind(-1)
        assert torch.equal(scale, layer.scale)
        delta = layer.slot.deltas["qa_lora"]
        want = layer.shift + delta.scale * delta.B @ delta.A
        assert torch.allclose(shift.float(), want, rtol=2**-11, atol=1e-6)


def test_what_does_not_fold_into_groups_is_written_as_numbers(gguf_base, tmp_path, capsys) -> None:
    argv = ("--base.quantize", "int4", "--method.targets", '["*.mlp.*"]', "--train.epochs", "3", "--train.lr", "1e-2")
    run = finetune(gguf_base, tmp_path, *argv)
    main(["merge", str(run), "--to", "gguf", "--dtype", "float16", "--out", str(tmp_path / "out")])
    assert "8 linear layers keep" in capsys.readouterr().out
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    }
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_up.weight"]) == ("Q4_1", "F16")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_tokenizer_that_gguf_does_not_know_is_refused(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "base", vocab_size=320, tie_word_embeddings=True)
    run = finetune(folder, tmp_path, "--base.quantize", "int4", "--train.lr", "1e-2", method="qa_lora")
    with pytest.raises(SystemExit):
        main(["merge", str(run), "--to", "gguf", "--out", str(tmp_path / "out")])
    assert "none that is written to GGUF" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_merged_run_is_the_unpacked_base_and_the_update(tiny_folder, tmp_path) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.epochs", "3", "--train.lr", "1e-2", method="qa_lora")
    main(["merge", str(run), "--dtype", "float32"])
    found = find_run(run)
    model = build_run(found, tiny_folder, torch.float32, storage=found.storage)
    merged = build(run / "merged", torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Quantized):
            delta = layer.slot.deltas["qa_lora"]
            each = (delta.scale * delta.B @ delta.A).repeat_interleave(32, 1)[:, : layer.in_features]
            assert relative(merged.get_submodule(name).weight, layer.dense() + each) <= 1e-6
