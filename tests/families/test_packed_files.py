"""Weights that files hold in four bits: gpt-oss's MXFP4 against transformers, NF4 and FP4 against bitsandbytes."""

import json

import pytest
import torch
from conftest import finetune, make_folder
from safetensors.torch import load_file, save_file
from tiny_families import make_family, write_plain_tokenizer
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.exchange.inspect import facts
from litpeft.model.build import build
from litpeft.model.quantize import Storage
from litpeft.model.quantize.codes import CODES, bitsandbytes, dequantize_4bit, quantize_4bit
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.slots import Linear

IDS = torch.arange(2, 42)[None]
EXPERTS = ("gate_up_proj", "down_proj")


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = GptOssConfig(vocab_size=320, **sizes, **more, sliding_window=8, eos_token_id=1)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if not name.endswith(EXPERTS):
            tensors[name] = tensor.clone()
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensor.copy_(_convert_moe_packed_tensors(blocks, scales))
    theirs.save_pretrained(tmp_path / "plain")
    theirs.config.save_pretrained(tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    assert facts(tmp_path / "packed")["parameters"] == theirs.num_parameters()
    packed, plain = (build(tmp_path / name, torch.float32) for name in ("packed", "plain"))
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        want = theirs.float()(IDS).logits
        assert (packed(IDS) - want).abs().max() <= 5e-6 * max(1, want.abs().max())


def write_four_bit(folder, kind: str, nested: bool) -> dict[str, torch.Tensor]:
    """Writes a base as transformers saves one that bitsandbytes holds; returns each layer's weight."""
    functional = bitsandbytes().functional
    make_folder(folder)
    path = folder / "model.safetensors"
    tensors, dense = load_file(path), {}
    for name in [name for name in tensors if "_proj" in name]:
        codes, state = functional.quantize_4bit(tensors[name], quant_type=kind, compress_statistics=nested)
        flat, shape = state, tensors[name].shape
        flat.shape = torch.Size((1, shape.numel()))  # its kernel for CPUs errs where rows are no whole blocks
        dense[name] = functional.dequantize_4bit(codes, flat).view(shape)
        state.shape = shape
        tensors[name] = codes
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": four}))
    return dense


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_folder_of_bitsandbytes_is_a_base_with_the_same_codes(kind: str, nested: bool, tmp_path) -> None:
    dense = write_four_bit(tmp_path, kind, nested)
    plain = build(tmp_path, torch.float32)
    assert facts(tmp_path)["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
    assert torch.equal(plain.blocks[1].attn.q.weight, dense["model.layers.1.self_attn.q_proj.weight"])
    held = build(tmp_path, torch.float32, storage=Storage(kind, double_quantize=False))
    layers = [name for name, module in held.named_modules() if isinstance(module, Linear) and name != "head"]
    assert len(layers) == len(dense) == 14
    for name in layers:
        assert isinstance(held.get_submodule(name), Quantized)
        assert torch.allclose(held.get_submodule(name).dense(), plain.get_submodule(name).weight, rtol=1e-6, atol=0)


def test_a_run_on_a_folder_of_bitsandbytes_merges_into_plain_weights(tmp_path) -> None:
    write_four_bit(tmp_path / "base", "nf4", nested=True)
    run = finetune(tmp_path / "base", tmp_path, "--base.quantize", "nf4")
    main(["merge", str(run), "--dtype", "float32"])
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(run / "merged")
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, build(run / "merged", torch.float32)(IDS), atol=2e-5)


@pytest.mark.parametrize("change", ["blocks", "missing", "eight bits"])
def test_four_bits_of_another_kind_are_refused(change: str, tmp_path) -> None:
    write_four_bit(tmp_path, "nf4", nested=False)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if change == "blocks":
        facts = json.loads(bytes(tensors[state].tolist())) | {"blocksize": 128}
        tensors[state] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    elif change == "missing":
        del tensors[state]
    else:
        config = tmp_path / "config.json"
        eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": eight}))
    save_file(tensors, path, metadata={"format": "pt"})
    told = {"blocks": "has blocks of 128", "missing": "up_proj.weight is ", "eight bits": "already quantised"}
    with pytest.raises(ModelError, match=told[change]):
        build(tmp_path, torch.float32)


def test_an_expert_stacked_in_the_file_trains_and_merges(tmp_path) -> None:
    make_family(tmp_path / "base", "gpt_oss")
    write_plain_tokenizer(tmp_path / "base")
    run = finetune(tmp_path / "base", tmp_path, "--method.targets", '["*.experts.*"]', "--train.lr", "1e-2")
    main(["merge", str(run)])
    theirs = AutoModelForCausalLM.from_pretrained(run / "merged")
    with torch.no_grad():
        want = theirs(IDS).logits
        assert (build(run / "merged", torch.float32)(IDS) - want).abs().max() <= 5e-6 * max(1, want.abs().max())


@pytest.mark.parametrize("shape", [(64, 112), (3, 100), (5, 7)])
def test_rows_that_are_no_whole_blocks_come_back_by_the_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes, absmax = quantize_4bit(torch.randn(shape), "nf4")
    n = shape[0] * shape[1]
    numbers = torch.stack((codes >> 4, codes & 15), -1).flatten()[:n].long()
    want = torch.tensor(CODES["nf4"])[numbers] * absmax.repeat_interleave(64)[:n]
    assert torch.equal(dequantize_4bit(codes, absmax, None, None, shape, "nf4", torch.float32), want.view(shape))
