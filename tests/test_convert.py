"""GGUF files become Hugging Face folders that hold the same model; damaged and foreign ones are refused."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tiny_gguf import CORPUS, byte_level, digits, llama, strings, write_gguf
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from litpeft.core.errors import ConfigError, ModelError, UserError
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert


def converted(source: Path, dtype: str | None = None) -> Path:
    convert(Convert(str(source), str(source.parent / "hf"), dtype=dtype, overwrite=True))
    return source.parent / "hf"


def refusal(source: Path, out: Path, kind: type[UserError] = ModelError, **settings) -> str:
    """Returns the error that converting ends with; nothing may be left behind."""
    with pytest.raises(kind) as caught:
        convert(Convert(str(source), str(out), **settings))
    assert not list(out.parent.glob(f".tmp-{out.name}*"))
    return str(caught.value)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 32}, {"attention_bias": True}])
def test_a_float32_gguf_gives_back_the_model_it_was_written_from(tmp_path, changes):
    model = llama(**changes)
    header = {"llama.attention.key_length": model.config.head_dim}
    folder = converted(write_gguf(tmp_path / "m.gguf", model, digits(), **header))
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert read.dtype == torch.float32
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_every_stored_number_is_dequantised_in_float32_and_rounded_once(tmp_path, kind):
    model = llama()
    folder = converted(write_gguf(tmp_path / "m.gguf", model, digits(), kind))
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert read.dtype == (torch.float16 if kind == Type.F16 else torch.bfloat16)
    for name, tensor in model.named_parameters():
        type_ = kind if tensor.ndim == 2 else Type.F32
        stored = gguf.quants.quantize(tensor.detach().numpy(), type_)
        expected = torch.tensor(gguf.quants.dequantize(stored, type_)).to(read.dtype)
        assert torch.equal(read.state_dict()[name], expected), name


def test_config_says_what_old_and_new_readers_look_for(tmp_path):
    folder = converted(write_gguf(tmp_path / "m.gguf", llama(), digits(), **{"llama.rope.freq_base": 5e5}))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6
    assert config["vocab_size"] == 320
    assert config["head_dim"] == 16
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_scaling_is_recovered(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = llama(rope_parameters=rope)
    header = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    if kind == "llama3":
        plain, scaled = llama().model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
        header = {"tensors": {"rope_freqs.weight": (plain / scaled).numpy()}}
    folder = converted(write_gguf(tmp_path / "m.gguf", model, digits(), **header))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == rope | {"type": kind}
    assert config["rope_scaling"]["factor"] == 8.0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_the_byte_level_tokenizer_gives_the_ids_of_the_one_it_came_from(tmp_path, pre):
    one = LLAMA3.replace("{1,3}", "") if pre == "qwen2" else LLAMA3
    made = {"smollm": digits(), "gpt-2": byte_level(use_regex=True)}
    source = made.get(pre) or byte_level(pre_tokenizers.Split(Regex(one), "isolated"))
    folder = converted(write_gguf(tmp_path / "m.gguf", llama(), source, **{"tokenizer.ggml.pre": pre}))
    raw, read = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in strings(200):
        ids = source.encode(text).ids
        assert raw.encode(text).ids == ids == read(text).input_ids, repr(text)
        assert raw.decode(ids, skip_special_tokens=False) == text
    assert len(read) == source.get_vocab_size()
    assert read.eos_token_id == 2
    assert read.decode([0, 1, 2], skip_special_tokens=True) == ""


def test_user_defined_tokens_stay_whole_and_bos_is_added_where_the_header_asks(tmp_path):
    source = digits()
    types = [3 if idx < 3 else 4 if source.id_to_token(idx) == "the" else 1 for idx in range(source.get_vocab_size())]
    header = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.add_bos_token": True}
    folder = converted(write_gguf(tmp_path / "m.gguf", llama(), source, **header))
    read = AutoTokenizer.from_pretrained(folder)
    assert read("other").tokens() == ["<|im_start|>", "o", "the", "r"]
    assert read("other", add_special_tokens=False).tokens() == ["o", "the", "r"]
    assert "the" not in read.all_special_tokens
    chat = [{"role": "user", "content": "hi"}]
    assert read.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("prefix", [True, False])
def test_the_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, prefix):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 9))
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": prefix}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=340,
        byte_fallback=True, minloglevel=2, **settings,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in range(340)]
    header = {"model": "llama", "pre": None, "merges": None, "add_bos_token": None, "add_space_prefix": prefix}
    header |= {"tokens": [spm.id_to_piece(i) for i in range(340)], "scores": [spm.get_score(i) for i in range(340)]}
    header = {f"tokenizer.ggml.{key}": value for key, value in (header | {"token_type": kinds}).items()}
    folder = converted(write_gguf(tmp_path / "m.gguf", llama(vocab_size=340), digits(), **header))
    read = AutoTokenizer.from_pretrained(folder)
    for text in strings(200):
        if (
            "\x00" not in text and "\u2581" not in text
        ):  # sentencepiece ends a text at the first, and reads the second as " "
            assert read(text).input_ids == [1, *spm.encode(text)], repr(text)
            assert read.decode(spm.encode(text)) == text
    assert read("</s>").input_ids == [1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "gemma3n"}, "architecture 'gemma3n' is not supported; convert reads llama, qwen2, "),
        ({"architecture": "gemma"}, "gemma.block_count must be an integer from 1 to "),
        ({"tokenizer.ggml.pre": "smolm"}, 'did you mean "smollm"'),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; convert reads gpt2"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope scaling 'dynamic' is not supported; convert reads none, linear"),
        ({"llama.rope.scaling.yarn_log_mul": 0.5}, "cannot express llama.rope.scaling.yarn_log_mul = 0.5"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.factor must be a positive number, got None"),
        ({"tensors": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}}, "is no llama3 scaling (low_freq"),
        ({"llama.expert_count": 8}, "8 tensors missing (blk.0.ffn_down_exps.weight"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count = 8: LlamaForCausalLM needs it to be 16"),
        ({"llama.feed_forward_length": 64}, "blk.0.ffn_gate.weight is (96, 64), expected (64, 64)"),
        ({"llama.block_count": 3}, "tensors missing (blk.2."),
        ({"llama.block_count": 1}, "0 tensors missing (), 9 unknown (blk.1."),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be an integer from 1 to "),
        ({"tokenizer.ggml.eos_token_id": 9999}, "tokenizer.ggml.eos_token_id is 9999, but there are "),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merge 0, 'a b c', does not join two tokens to a third"),
    ],
)
def test_what_a_llama_folder_cannot_hold_is_named(tmp_path, changes, says):
    source = write_gguf(tmp_path / "m.gguf", llama(), digits(), **changes)
    assert says in refusal(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_number_that_is_not_finite_is_found(tmp_path):
    model = llama()
    model.model.norm.weight.data[3] = 1e6
    source = write_gguf(tmp_path / "m.gguf", model, digits())
    assert "model.norm.weight" in refusal(source, tmp_path / "hf", dtype="float16")
    assert converted(source, "bfloat16")


def test_a_damaged_gguf_is_one_clear_error_or_a_whole_model(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", llama(), digits(), Type.Q8_0).read_bytes()
    header = gguf.GGUFReader(tmp_path / "whole.gguf").data_offset
    rng, refused = random.Random(0), []
    for trial in range(100):
        data = bytearray(whole)
        if trial % 4 == 0:
            data = data[: rng.randrange(len(data) if trial % 8 else header)]
        for _ in range(trial % 4):
            # half of the damage goes to the numbers before the vocabulary
            data[rng.randrange(rng.choice((1100, header)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            AutoModelForCausalLM.from_pretrained(converted(tmp_path / "m.gguf"))
            assert trial % 4, "a truncated file was taken for whole"
        except UserError as error:
            refused.append(error)
    assert all(isinstance(error, ModelError) and error.where and "\n" not in error.what for error in refused)
    assert 60 < len(refused) < 100
    assert not list(tmp_path.glob(".tmp*"))


def test_sources_and_targets_that_cannot_be_meant_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    source = write_gguf(tmp_path / "a" / "m.gguf", llama(), digits())
    assert "the source lies in it" in refusal(source, tmp_path / "a", ConfigError, overwrite=True)
    assert source.exists()
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere", tmp_path / "hf", ConfigError)
    folder = converted(source)
    assert "needs no conversion: use it where it lies" in refusal(folder, tmp_path / "hf", ConfigError)
    assert f"{folder}: the output exists" in refusal(source, folder, ConfigError)
    (tmp_path / "a" / "n.gguf").write_bytes(b"")
    assert "2 GGUF files: m.gguf, n.gguf" in refusal(tmp_path / "a", tmp_path / "hf", ConfigError)
    assert "not a whole GGUF file: " in refusal(tmp_path / "a" / "n.gguf", tmp_path / "hf")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "consolidated.00.pth").write_bytes(b"")
    assert "there is no params.json beside consolidated.00.pth" in refusal(tmp_path / "b", tmp_path / "hf")
    (tmp_path / "b" / "consolidated.00.pth").rename(tmp_path / "b" / "lit_model.pth")
    assert "of .pth files those of Meta's layout are read" in refusal(tmp_path / "b", tmp_path / "hf", ConfigError)
    single = tmp_path / "b" / "lit_model.pth"
    assert "a single .pth file is not a model folder" in refusal(single, tmp_path / "hf", ConfigError)
