"""Folders in Meta's own layout become Hugging Face folders: what one process had of each tensor is put together."""

import base64
import json
from pathlib import Path

import pytest
import regex
import torch
from chat_samples import sentencepiece_model
from tiny_gguf import SPECIAL, byte_level, strings
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from litpeft.core.errors import ModelError
from litpeft.exchange.convert import convert
from litpeft.exchange.imports.meta_tokenizer import letters_of_bytes
from litpeft.exchange.settings import Convert

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64, "norm_eps": 1e-5}
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama(vocab: int, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=0.1, **SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def write_meta(folder: Path, model: LlamaForCausalLM, files: int, by_rows: bool, **params: object) -> Path:
    """Writes a model as so many of Meta's processes would, with rows that rotate as neighbours."""
    folder.mkdir()
    state, parts = model.state_dict(), [{"rope.freqs": torch.ones(8)} for _ in range(files)]

    def put(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        pieces = [tensor] * files if axis is None else tensor.chunk(files, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[f"{name}.weight"] = piece.clone()

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        heads = [torch.stack(head.chunk(2), 1).flatten(0, 1) for head in rows.split(16)]
        return torch.cat(heads)

    put("tok_embeddings", state["model.embed_tokens.weight"], 0 if by_rows else 1)
    put("norm", state["model.norm.weight"], None)
    if not model.config.tie_word_embeddings:
        put("output", state["lm_head.weight"], 0)
    for layer in range(2):
        theirs, ours = f"layers.{layer}.", f"model.layers.{layer}."
        put(f"{theirs}attention.wq", neighbours(state[f"{ours}self_attn.q_proj.weight"]), 0)
        put(f"{theirs}attention.wk", neighbours(state[f"{ours}self_attn.k_proj.weight"]), 0)
        put(f"{theirs}attention.wv", state[f"{ours}self_attn.v_proj.weight"], 0)
        put(f"{theirs}attention.wo", state[f"{ours}self_attn.o_proj.weight"], 1)
        for name, (own, axis) in {"w1": ("gate", 0), "w2": ("down", 1), "w3": ("up", 0)}.items():
            put(f"{theirs}feed_forward.{name}", state[f"{ours}mlp.{own}_proj.weight"], axis)
        put(f"{theirs}attention_norm", state[f"{ours}input_layernorm.weight"], None)
        put(f"{theirs}ffn_norm", state[f"{ours}post_attention_layernorm.weight"], None)
    for number, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder


def ranks_of(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the byte sequences of a byte-level BPE in the order of its merges, without its special tokens."""
    bytes_of = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return [bytes(bytes_of[letter] for letter in name) for name in names if name not in SPECIAL]


def encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """Returns the ids of a text: in each piece the neighbours with the lowest rank are joined until none are left."""
    ids = []
    for piece in regex.findall(CUT, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1 and piece.encode() not in ranks:
            pairs = [ranks.get(parts[at] + parts[at + 1], 1 << 30) for at in range(len(parts) - 1)]
            if (best := min(pairs)) == 1 << 30:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[piece.encode()]] if piece.encode() in ranks else [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("files", [1, 2])
def test_llama_2_gives_the_logits_of_transformers(tmp_path, files: int) -> None:
    model = llama(350, max_position_embeddings=4096)
    source = write_meta(tmp_path / "meta", model, files, by_rows=False, vocab_size=-1)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    if files == 2:
        (source / "params.json").write_text(json.dumps({"model": json.loads((source / "params.json").read_text())}))
    convert(Convert(str(source), str(tmp_path / "hf")))
    read, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto"), torch.arange(60)[None]
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    assert read.config.max_position_embeddings == 4096
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"


@pytest.mark.parametrize("tied", [True, False])
def test_llama_3_gives_the_logits_of_transformers_and_the_ids_of_its_tokenizer(tmp_path, tied: bool) -> None:
    ranks = ranks_of(byte_level(pre_tokenizers.Split(Regex(CUT), "isolated")))[:-1]  # an even number of rows
    rope = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
    changes = {"rope_parameters": rope, "tie_word_embeddings": tied, "max_position_embeddings": 131072}
    model = llama(len(ranks) + 256, **changes)
    params = {"vocab_size": len(ranks) + 256, "rope_theta": 5e5, "use_scaled_rope": True}
    source = write_meta(tmp_path / "meta", model, 2, by_rows=True, **params)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (source / "tokenizer.model").write_text("".join(lines))
    convert(Convert(str(source), str(tmp_path / "hf")))
    read, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto"), torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    assert read.config.tie_word_embeddings == tied
    tokenizer, numbers = AutoTokenizer.from_pretrained(tmp_path / "hf"), {token: at for at, token in enumerate(ranks)}
    for text in strings(200):
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(numbers, text), text
    assert tokenizer("<|eot_id|>x").input_ids[:2] == [len(ranks), len(ranks) + 9]
    assert tokenizer.convert_ids_to_tokens([len(ranks) + 5, len(ranks) + 255]) == [
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_247|>",
    ]


def test_the_inner_size_is_that_of_the_models_that_meta_published() -> None:
    from litpeft.exchange.imports.meta import Params

    made = [
        Params(4096, 32, 32).d_ff(),  # Llama 2 7B
        Params(8192, 80, 64, 8, multiple_of=4096, ffn_dim_multiplier=1.3).d_ff(),  # 70B
        Params(4096, 32, 32, 8, multiple_of=1024, ffn_dim_multiplier=1.3).d_ff(),  # Llama 3 8B
        Params(2048, 16, 32, 8, multiple_of=256, ffn_dim_multiplier=1.5).d_ff(),  # Llama 3.2 1B
    ]
    assert made == [11008, 28672, 14336, 8192]  # intermediate_size of their config.json


def test_the_context_is_that_of_the_models_that_meta_published() -> None:
    from litpeft.exchange.imports.meta import Params

    made = [
        Params(4096, 32, 32, norm_eps=1e-6),  # Llama 1 7B
        Params(8192, 80, 64),  # 65B
        Params(8192, 80, 64, 8),  # Llama 2 70B
        Params(4096, 32, 32, 8, rope_theta=5e5),  # Llama 3 8B
        Params(2048, 16, 32, 8, rope_theta=5e5, use_scaled_rope=True),  # Llama 3.2 1B
    ]
    assert [params.context() for params in made] == [2048, 2048, 4096, 8192, 131072]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"moe_args": {}}, "moe_args is no key of a Llama 1 to 3.2"),
        ({"dim": "wide"}, 'dim "wide" is not supported; it must be a whole number'),
        ({"vocab_size": 32000}, "vocab_size 32000, and tok_embeddings.weight has 350 rows"),
        ({"n_layers": 3}, "9 tensors missing (layers.2."),
        ({"multiple_of": 256}, "feed_forward.w1.weight of 2 files is (192, 64), expected (256, 64)"),
        ({"n_kv_heads": 4}, "attention.wk.weight of 2 files is (32, 64), expected (64, 64)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, params: dict, said: str) -> None:
    source = write_meta(tmp_path / "meta", llama(350), 2, by_rows=False, **params)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(ModelError) as caught:
        convert(Convert(str(source), str(tmp_path / "hf")))
    assert said in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_a_missing_file_and_a_pickle_that_runs_code_are_refused(tmp_path) -> None:
    source = write_meta(tmp_path / "meta", llama(350), 3, by_rows=False)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    torch.save({"norm.weight": print}, source / "consolidated.02.pth")
    with pytest.raises(ModelError, match="holds more than weights, and was not loaded"):
        convert(Convert(str(source), str(tmp_path / "hf")))
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(ModelError, match="one between them is missing"):
        convert(Convert(str(source), str(tmp_path / "hf")))
