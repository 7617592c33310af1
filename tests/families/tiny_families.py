"""Tiny random models of each family in a Hugging Face folder, with a tokenizer that has an end of text and no more."""

import json
from pathlib import Path

import torch
from test_model import CASES, FAMILY_CASES, reference

from litpeft.model.families import FAMILIES

MODELS = {
    "llama": CASES["grouped queries"],
    "mistral": CASES["mistral with a window"],
    "mixtral": CASES["mixtral"],
    "neox": CASES["gpt_neox, parallel, a quarter rotates"],
    "neox serial": CASES["gpt_neox, serial, all rotates"],
    **{name: changes for name, changes in FAMILY_CASES.items() if name in FAMILIES},
    "falcon new": CASES["falcon, new, two norms"],
    "gemma3_text": CASES["gemma3_text"] | {"tie_word_embeddings": False},  # tied, it repeats its prompt
    "gpt2": CASES["gpt2"],
    "gpt2 untied": CASES["gpt2, untied"],
}
LINEAR = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")  # have linear attention


def limit(name: str) -> float:
    """Returns how far float32 logits may be off, relative to the largest: transformers' own are by 5e-6 in LINEAR."""
    return 2e-5 if name in LINEAR else 5e-6


def make_family(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """Writes the folder; returns transformers' model, with biases and norms drawn at random."""
    model = reference(MODELS[name] | changes, dtype)
    model.save_pretrained(folder)
    write_plain_tokenizer(folder)
    return model


def write_plain_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer like that of GPT-2 and Pythia: one special token, no chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|endoftext|>"
    tokens = [letters[0], end, *letters[1:]]  # 1 is the id that config.json gives the end of text
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": end, "eos_token": end, "unk_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
