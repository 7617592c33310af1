"""Tiny GGUF files, written as llama.cpp would, and strings that are hard to tokenise."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
CORPUS = [
    "the cat sat on the mat, 1234 times; don't stop!",
    "def f(x):\n    return x ** 2\n",
    "naïve café 日本語 ½",
] * 9
FIXED = [
    "", " ", "  ", "\n", "\t\t", "Hello world", " x", "def f(x):\n    return x**2  # 12\n", "a  2", "a   12 b",
    "x=\t\t3",
    "1234567 3.14", "\n\n\n 5", "naïve café Ωmega 東京 привет", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u200b", "I'm you'RE we'll",
    "½ ٣ Ⅷ",
    "<|im_start|>user\nhi<|im_end|>\n", "  <|endoftext|>  x", "<|im_start", "\r\n\r\n x", "a\u00a0\u00a03", "\x00",
]  # fmt: skip
PIECES = [*FIXED, "the", " cat", "Zebra", "'s", "42", "7", "()", "{}", "==", "...", "\u200d", "\r\n", "ß", "    return"]


def strings(count: int) -> list[str]:
    """Returns the fixed strings and `count` seeded random ones."""
    rng = random.Random(0)
    planes = [range(32, 127), range(160, 0x3000), range(0x1F300, 0x1FA00)]
    pick = [lambda: rng.choice(PIECES), lambda: chr(rng.choice(rng.choice(planes)))]
    return FIXED + ["".join(rng.choices(pick, (4, 1))[0]() for _ in range(rng.randrange(1, 24))) for _ in range(count)]


def byte_level(*cuts: pre_tokenizers.PreTokenizer, use_regex: bool = False) -> Tokenizer:
    """Returns a small byte-level BPE trained behind these cuts of the text."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def digits() -> Tokenizer:
    """Returns a tokenizer of SmolLM2's kind."""
    return byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)


def llama(tokenizer: Tokenizer | None = None, **changes) -> LlamaForCausalLM:
    """Returns a tiny random model."""
    torch.manual_seed(0)
    vocab = tokenizer.get_vocab_size() if tokenizer else 320
    config = LlamaConfig(**({"vocab_size": vocab, "tie_word_embeddings": True} | SMALL | changes))
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of q or k as llama.cpp keeps them: each head's halves dealt out in turn."""
    return np.concatenate([np.stack(np.split(head, 2), 1).reshape(head.shape) for head in np.split(rows, heads)])


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, kind: Type = Type.F32, **changes) -> Path:
    """Writes the model as llama.cpp would; `changes` are values of the header, None leaves one out."""
    config, writer = model.config, gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    values = {
        "llama.block_count": config.num_hidden_layers, "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads, "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count_kv": config.num_key_value_heads, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": [t for t, _ in vocab],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token, _ in vocab],
        "tokenizer.ggml.merges": [" ".join(m) for m in json.loads(tokenizer.to_str())["model"].get("merges", [])],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    types |= {float: gguf.GGUFValueType.FLOAT32, list: gguf.GGUFValueType.ARRAY}
    extra = changes.pop("tensors", {})
    for key, value in (values | changes).items():
        if value is not None:
            writer.add_key_value(key, value, types[type(value)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        array = tensor.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        type_ = kind if array.ndim == 2 else Type.F32
        stored = gguf.quants.quantize(array, type_)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=type_)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
