"""Weights that files hold in eight bits or less: each kind beside its definition, number by number."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.exchange.inspect import facts
from litpeft.model.build import build

E4M3 = torch.float8_e4m3fn
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
Made = tuple[dict[str, Tensor], Tensor]  # the tensors in place of a weight, and the weight that they stand for


def whole_words(codes: Tensor, bits: int) -> Tensor:
    """Returns whole numbers (rows, n) packed along their rows, the first in the lowest bits of an int32."""
    each = 32 // bits
    words = torch.zeros(codes.size(0), -(-codes.size(1) // each), dtype=torch.int64)
    for column in range(codes.size(1)):
        words[:, column // each] |= codes[:, column].long() << bits * (column % each)
    return words.to(torch.int32)  # which keeps the bits


def codes_of(shape: tuple[int, int], bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape)


def fp8(block: int | None) -> Callable[[tuple[int, int]], Made]:
    def made(shape: tuple[int, int]) -> Made:
        codes = torch.randn(shape).to(E4M3)
        count = [] if block is None else [-(-size // block) for size in shape]
        scale = torch.rand(count) * 0.02
        size = None if block is None else [block, block]
        dense = _dequantize_fp8_weight(codes, scale, size, torch.float32)
        return {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.rand(())}, dense

    return made


def by_output(shape: tuple[int, int]) -> Made:
    codes, scale = torch.randn(shape).to(E4M3), torch.rand(shape[0], 1) * 0.02
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int8(shape: tuple[int, int]) -> Made:
    codes, scale = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0], 1) * 0.001
    zero = torch.randint(-9, 9, (shape[0], 1), dtype=torch.int8)
    dense = (codes.float() - zero) * scale
    return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}, dense


def packed(bits: int, zeros: bool) -> Callable[[tuple[int, int]], Made]:
    def made(shape: tuple[int, int]) -> Made:
        (rows, columns), group = shape, 16
        codes, scale = codes_of(shape, bits), torch.rand(rows, columns // group) * 0.02
        held = {"weight_packed": whole_words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(shape)}
        zero = codes_of((rows, columns // group), bits) if zeros else torch.full(scale.shape, 1 << bits - 1)
        if zeros:
            held["weight_zero_point"] = whole_words(zero.t(), bits).t().contiguous()
        groups = torch.arange(columns) // group
        return held, (codes - zero[:, groups]) * scale[:, groups]

    return made


def nvfp4(modelopt: bool) -> Callable[[tuple[int, int]], Made]:
    def made(shape: tuple[int, int]) -> Made:
        codes = codes_of(shape, 4)
        held = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        scale, whole = torch.rand(shape[0], shape[1] // 16).mul(100).to(E4M3), torch.tensor([0.0003])
        dense = torch.tensor(FP4)[codes] * (scale.float() * whole).repeat_interleave(16, 1)
        if modelopt:
            return {"weight": held, "weight_scale": scale, "weight_scale_2": whole, "input_scale": whole.clone()}, dense
        return {"weight_packed": held, "weight_scale": scale, "weight_global_scale": 1 / whole}, dense

    return made


def gptq(bits: int, less: int, order: bool = False) -> Callable[[tuple[int, int]], Made]:
    def made(shape: tuple[int, int]) -> Made:
        (outputs, inputs), group = shape, 16
        codes, zero = codes_of((inputs, outputs), bits), codes_of((inputs // group, outputs), bits)
        scale = (torch.rand(inputs // group, outputs) * 0.02).half()
        groups = torch.arange(inputs, dtype=torch.int32) // group
        groups = groups[torch.randperm(inputs)] if order else groups
        held = {"qweight": whole_words(codes.t(), bits).t().contiguous(), "scales": scale}
        held |= {"qzeros": whole_words((zero - less) % (1 << bits), bits)} | ({"g_idx": groups} if order else {})
        return held, ((codes - zero[groups.long()]) * scale[groups.long()].float()).t()

    return made


def awq(shape: tuple[int, int]) -> Made:
    (outputs, inputs), group = shape, 16
    codes, zero = codes_of((inputs, outputs), 4), codes_of((inputs // group, outputs), 4)
    scale, groups = (torch.rand(inputs // group, outputs) * 0.02).half(), torch.arange(inputs) // group
    mixed = [8 * word + one for word in range(outputs // 8) for one in (0, 2, 4, 6, 1, 3, 5, 7)]
    held = {"qweight": whole_words(codes[:, mixed], 4), "qzeros": whole_words(zero[:, mixed], 4), "scales": scale}
    return held, ((codes - zero[groups]) * scale[groups].float()).t()


KINDS = {
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [24, 24]}, fp8(24)),
    "fp8, blocks of 128": ({"quant_method": "fp8"}, fp8(128)),
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, by_output),
    "compressed, fp8": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, by_output),
    "compressed, int8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, int8),
    "compressed, 4 bits": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed(4, zeros=True)),
    "compressed, 8 bits": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed(8, zeros=False)),
    "compressed, nvfp4": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, nvfp4(False)),
    "modelopt, nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4(True)),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq(4, less=1)),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"}, gptq(8, less=1)),
    "gptq, 2 bits": ({"quant_method": "gptq", "bits": 2}, gptq(2, less=1)),
    "gptq_v2, in an order of its own": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        gptq(4, 0, order=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
}


def quantise(folder: Path, kind: str, layers: str = "_proj.weight") -> dict[str, Tensor]:
    """Puts quantised layers into a folder of plain weights; returns the weights that they stand for."""
    config, make = KINDS[kind]
    torch.manual_seed(0)
    path, dense = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(layers)]:
        module = name.removesuffix("weight")
        held, dense[name] = make(tuple(tensors.pop(name).shape))
        tensors |= {f"{module}{leaf}": tensor for leaf, tensor in held.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return dense


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_what_its_codes_and_scales_say(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base")
    plain = build(folder, torch.float32)
    dense = quantise(folder, kind)
    held = build(folder, torch.float32)
    assert len(dense) == 14
    names = {"q": "self_attn.q_proj", "o": "self_attn.o_proj"}
    for ours, theirs in names.items():
        got = held.get_submodule(f"blocks.1.attn.{ours}").weight
        torch.testing.assert_close(got, dense[f"model.layers.1.{theirs}.weight"].float(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(held.blocks[0].mlp.down.weight, dense["model.layers.0.mlp.down_proj.weight"].float())
    assert torch.equal(held.embed.weight, plain.embed.weight)
    assert facts(folder)["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


def test_a_run_on_such_weights_merges_into_plain_ones(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    quantise(base, "gptq")
    run = finetune(base, tmp_path)
    main(["merge", str(run), "--dtype", "float32"])
    assert "quantization_config" not in json.loads((run / "merged/config.json").read_text())
    assert not any(name.endswith("qweight") for name in load_file(run / "merged/model.safetensors"))


def test_fused_layers_are_taken_apart(tmp_path: Path) -> None:
    make_family(tmp_path, "phi3")
    dense = quantise(tmp_path, "compressed, 4 bits", "qkv_proj.weight")
    (qkv,) = (tensor for name, tensor in dense.items() if ".0." in name)
    model = build(tmp_path, torch.float32)
    parts = torch.cat([getattr(model.blocks[0].attn, one).weight for one in "qkv"])
    torch.testing.assert_close(parts, qkv.float())


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("awq", {"quant_method": "awq", "version": "gemv"}, "those of 4 bits in the version gemm are read"),
        ("fp8, blocks", {"quant_method": "fp8", "weight_block_size": [16, 24]}, "has scales .* blocks of 16 x 24"),
        ("gptq", {"quant_method": "hqq"}, "the weights are already quantised .hqq."),
    ],
)
def test_what_is_not_read_is_refused(kind: str, change: dict, says: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base")
    quantise(folder, kind)
    whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": change}
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match=says):
        build(folder, torch.float32)
