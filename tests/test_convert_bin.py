"""Folders of pickled weights become folders of safetensors; a pickle that is more than weights is never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_folder, write_tokenizer
from safetensors import safe_open
from test_model import CASES, reference
from transformers import AutoModelForCausalLM

from litpeft.core.errors import ModelError, UserError
from litpeft.core.folders import locked
from litpeft.core.safetensors import Weights
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.model.build import build


def bin_folder(folder: Path, shards: int = 1, **changes) -> tuple[Path, dict[str, torch.Tensor]]:
    """Returns a tiny model's folder with its weights as pickles, and its state; a tied head shares its memory."""
    make_folder(folder, **changes)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    names, placed = list(state), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({name: state[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder, state


def refusal(source: Path) -> str:
    """Returns the error that converting ends with; nothing may be left behind."""
    out = source.parent / "hf"
    with pytest.raises(ModelError) as caught:
        convert(Convert(str(source), str(out)))
    assert not list(out.parent.glob(".tmp-*"))
    assert not out.exists()
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_the_safetensors_hold_the_same_tensors_each_once(tmp_path, shards, tied):
    source, state = bin_folder(tmp_path / "bin", shards, tie_word_embeddings=tied)
    convert(Convert(str(source), str(tmp_path / "hf")))
    weights = Weights(tmp_path / "hf")
    assert set(weights.file_of) == set(state) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(weights.read(name), state[name]) for name in weights.file_of)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_another_dtype_is_rounded_to_and_told_in_the_config(tmp_path):
    source, state = bin_folder(tmp_path / "bin")
    convert(Convert(str(source), str(tmp_path / "hf"), dtype="bfloat16"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert read.dtype == torch.bfloat16
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in read.state_dict().items())


def test_memory_shared_by_two_names_of_an_untied_model_is_written_for_both(tmp_path):
    source, state = bin_folder(tmp_path / "bin", tie_word_embeddings=False)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, source / "pytorch_model.bin")
    convert(Convert(str(source), str(tmp_path / "hf")))
    assert torch.equal(Weights(tmp_path / "hf").read("lm_head.weight"), state["model.embed_tokens.weight"])


def gpt_folder(folder: Path, case: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Returns the folder of a tiny model of a family, without weights, and its tensors as its files spell them."""
    reference(CASES[case], torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    weights = Weights(folder)
    state = {name: weights.read(name).clone() for name in weights.file_of}
    (folder / "model.safetensors").unlink()
    return folder, state


def buffers(state: dict[str, torch.Tensor], attention: str) -> dict[str, torch.Tensor]:
    """Returns what old files hold for each layer beside its weights: the causal mask, and minus infinity or so."""
    layers = {name[: name.index(attention)] + attention for name in state if attention in name}
    mask, far = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), torch.tensor(-1e9)
    return {f"{layer}{name}": value for layer in layers for name, value in (("bias", mask), ("masked_bias", far))}


def same_logits(folder: Path, theirs: torch.nn.Module) -> bool:
    """Returns whether litpeft, and transformers, compute with the folder what `theirs` computes."""
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = theirs.eval()(ids).logits
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        ours = build(folder, torch.float32)(ids)
    return torch.equal(read, want) and bool((ours - want).abs().max() <= 5e-6 * want.abs().max())


GPTS = ["gpt_neox, parallel, a quarter rotates", "gpt_neox, tied, no attention bias", "gpt2", "gpt2, untied"]


@pytest.mark.parametrize("case", GPTS)
def test_other_families_compute_the_same_after_conversion_and_lose_only_their_buffers(case, tmp_path):
    source, state = gpt_folder(tmp_path / "bin", case)
    old = buffers(state, ".attn." if "gpt2" in case else ".attention.")
    assert len(old) == 4
    torch.save(old | state, source / "pytorch_model.bin")
    convert(Convert(str(source), str(tmp_path / "hf")))
    assert Weights(tmp_path / "hf").file_of.keys() == state.keys()
    assert same_logits(tmp_path / "hf", reference(CASES[case], torch.float32))


@pytest.mark.parametrize("shards", [1, 2])
def test_gpt2_as_the_hub_has_it_without_prefix_and_with_masks_is_converted(shards, tmp_path):
    source, state = gpt_folder(tmp_path / "bin", "gpt2")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    whole = {"lm_head.weight": state["wte.weight"]} | state | buffers(state, ".attn.")  # with a copy of the embedding
    files = [f"pytorch_model{number}.bin" for number in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    placed = {name: files[number % shards] for number, name in enumerate(whole)}
    for file in files:
        torch.save({name: whole[name] for name in whole if placed[name] == file}, source / file)
    if shards > 1:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    convert(Convert(str(source), str(tmp_path / "hf")))
    assert Weights(tmp_path / "hf").file_of.keys() == state.keys()
    assert same_logits(tmp_path / "hf", reference(CASES["gpt2"], torch.float32))
    other = whole | {"lm_head.weight": whole["wte.weight"] + 1}
    (source / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    torch.save(other, source / "pytorch_model.bin")
    (tmp_path / "hf").rename(tmp_path / "kept")
    assert "says that lm_head.weight is transformer.wte.weight, but they differ" in refusal(source)


def test_a_tensor_that_the_family_does_not_have_is_named_with_the_source(tmp_path):
    source, state = gpt_folder(tmp_path / "bin", "gpt2")
    torch.save(state | {"transformer.h.0.crossattention.bias": torch.ones(4)}, source / "pytorch_model.bin")
    message = refusal(source)
    assert f"{source}: the weights do not fit config.json" in message
    assert "transformer.h.0.crossattention.bias is not of this architecture" in message


def test_more_layers_than_the_files_can_hold_are_refused_before_they_are_made(tmp_path):
    source, _ = bin_folder(tmp_path / "bin")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1 << 30}
    (source / "config.json").write_text(json.dumps(config))
    assert f"config.json says {1 << 30} layers of width 64, the weights (pytorch_model.bin) have " in refusal(source)


def test_a_head_that_differs_from_the_embedding_it_should_be_is_refused(tmp_path):
    source, state = bin_folder(tmp_path / "bin", tie_word_embeddings=True)
    torch.save(state | {"lm_head.weight": state["lm_head.weight"] + 1}, source / "pytorch_model.bin")
    assert "config.json says that lm_head.weight is model.embed_tokens.weight, but they differ" in refusal(source)


class Attack:
    """What a hostile file asks the reader to run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, nested):
    source, state = bin_folder(tmp_path / "bin")
    attack = Attack(tmp_path / "executed")
    torch.save(state | {"more": attack} if nested else attack, source / "pytorch_model.bin")
    message = refusal(source)
    assert "holds more than weights, and was not loaded: it asks to run" in message
    assert message.count("\n") == 1  # the error and its hint
    assert not (tmp_path / "executed").exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)  # the attack is a real one
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "file", ["../secret.bin", "/etc/secret.bin", "a/../../secret.bin", "..\\secret.bin", "x\0.bin", ""]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, file):
    source, state = bin_folder(tmp_path / "bin")
    torch.save(state, tmp_path / "secret.bin")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, file)}))
    message = refusal(source)
    assert f"names {file!r}; only a *.bin file of the same folder is allowed" in message


def test_what_is_missing_damaged_or_no_weights_is_named(tmp_path):
    source, state = bin_folder(tmp_path / "bin", 2)
    first = source / "pytorch_model-00001-of-00002.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert "is cut short, or was written by torch before 1.6" in refusal(source)
    at = whole.index(state["model.norm.weight"].numpy().tobytes())
    first.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])  # one bit of one number
    assert f"{first}: is damaged at " in refusal(source)
    first.unlink()
    assert "pytorch_model-00001-of-00002.bin not in the folder" in refusal(source)
    torch.save({"model.norm.weight": state["model.norm.weight"]}, first)
    assert "the index and the file disagree on" in refusal(source)
    (source / "pytorch_model.bin.index.json").unlink()
    assert "has shards, but their index pytorch_model.bin.index.json is missing" in refusal(source)
    torch.save({"step": 1, "model": state}, source / "pytorch_model.bin")
    assert "'step' is not a plain tensor" in refusal(source)
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, source / "pytorch_model.bin")
    assert "'w' is not a plain tensor" in refusal(source)
    torch.save({name: tensor for name, tensor in state.items() if "q_proj" not in name}, source / "pytorch_model.bin")
    assert "layers.0.self_attn.q_proj.weight is missing" in refusal(source)
    torch.save(state | {"model.norm.weight": torch.full((64,), torch.nan)}, source / "pytorch_model.bin")
    assert "model.norm.weight holds numbers that are not finite" in refusal(source)


@pytest.mark.parametrize("kind", ["int8", "int64", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_numbers_of_a_type_that_no_model_is_read_in_are_named(tmp_path, kind, dtype):
    source, state = bin_folder(tmp_path / "bin", 2)
    name = "model.layers.0.mlp.up_proj.weight"
    file = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"][name]
    part = torch.load(source / file)
    torch.save(part | {name: torch.ones(part[name].shape).to(getattr(torch, kind))}, source / file)
    with pytest.raises(UserError, match=f"{file}: {name} holds {kind}, expected float64, float32, float16, bfloat16"):
        convert(Convert(str(source), str(tmp_path / "hf"), dtype=dtype))


@pytest.mark.parametrize(
    "what", [[], {}, 7, torch.ones(2), [torch.ones(2)], "text", None, {"a": 1}, {1: torch.ones(2)}]
)
def test_pickles_of_other_things_are_named(tmp_path, what):
    source, _ = bin_folder(tmp_path / "bin")
    torch.save(what, source / "pytorch_model.bin")
    message = refusal(source)
    assert "only a dict of plain tensors is read" in message


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK", b"PK\x05\x06" + bytes(18), b"{}"])
def test_files_that_hold_nothing_are_named(tmp_path, content):
    source, _ = bin_folder(tmp_path / "bin")
    (source / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refusal(source)


def test_a_number_that_is_not_finite_is_named_by_shard_and_tensor(tmp_path):
    source, state = bin_folder(tmp_path / "bin", 2)
    name = "model.layers.0.mlp.up_proj.weight"
    file = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"][name]
    part = torch.load(source / file)
    part[name][2, 3] = torch.inf
    torch.save(part, source / file)
    assert f"{source / file}: {name} holds numbers that are not finite" in refusal(source)


def test_one_process_at_a_time_converts_into_a_folder(tmp_path):
    source, _ = bin_folder(tmp_path / "bin")
    out = tmp_path / "hf"
    with locked(out):
        command = [sys.executable, "-m", "litpeft", "convert", str(source), str(out), "--overwrite", "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 6
        assert f"{out}: process {os.getpid()} on " in done.stderr
        assert not out.exists()
    convert(Convert(str(source), str(out)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "hf"]
