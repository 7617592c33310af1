"""Tokenizers of real families in GGUF files: llama.cpp cuts a text into their tokens, and reading gives them back."""

import json
import re
import unicodedata
from pathlib import Path

import gguf
import pytest
from conftest import make_folder
from llama_cpp import ask, server
from tiny_gguf import FIXED, byte_level, llama, strings, write_gguf
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokenizer_

from litpeft.core.errors import ConfigError
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.convert import convert
from litpeft.exchange.gguf.tokenizer import WITH_CASE
from litpeft.exchange.settings import Convert

# Patterns of the tokenizer.json of a model on the hub, as JSON.
ENDS = r"| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", r"[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
BEFORE = r"[^\\r\\n\\p{L}\\p{N}]?"
CASED = (f"{BEFORE}{UPPER}*{LOWER}+", f"{BEFORE}{UPPER}+{LOWER}*")
O200K = f"{CASED[0]}{SHORT}?|{CASED[1]}{SHORT}?" + r"|\\p{N}{1,3}" + ENDS.replace("n]*", "n/]*", 1)
CL100K = SHORT + r"|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" + ENDS
PATTERNS = {
    "gpt-4o": [O200K],  # openai/gpt-oss-20b
    "tekken": ["|".join(CASED) + r"|\\p{N}" + ENDS.replace("n]*", "n/]*", 1)],  # mistralai/Ministral-3-3B-Instruct
    "dbrx": [CL100K],  # microsoft/phi-4, ibm-granite/granite-4.1-3b, zai-org/GLM-4
    "llama-bpe": [CL100K],  # meta-llama/Llama-3.2-1B
    "qwen2": [CL100K.replace("{1,3}", "")],  # Qwen/Qwen3-0.6B
    "seed-coder": [  # ByteDance-Seed/Seed-Coder-8B, as llama.cpp quotes it
        SHORT + r"|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ],
    "qwen35": [  # Qwen/Qwen3.5-9B
        SHORT + r"|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}" + ENDS.replace(r"\\p{L}\\p{N}", r"\\p{L}\\p{M}\\p{N}")
    ],
    "deepseek-v3": [  # deepseek-ai/DeepSeek-V3
        r"\\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
        r"[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "deepseek-llm": [  # deepseek-ai/DeepSeek-V2-Lite
        r"[\r\n]",
        r"\\s?" + WITH_CASE,
        r"\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\\s+$",
        r"[一-龥\u0800-一가-\ud7ff]+",
        r"\\p{N}",
    ],
}
IGNORE_MERGES = ("llama-bpe", "tekken")
AWKWARD = [
    *FIXED,
    "YOU'LL I'M WE'RE it'S",
    "fooBar XMLHttp HTTPServer",
    "12345678 3.14159 1,000",
    "日本語テキスト 中文字符 한국어",
    "👍🏽 🎉🎉  ok",
    "a    b\n\n\n   c\t\td   ",
    "ÀÉÎ naïve NAÏVE Äpfel",
    "http://x.y/z//\n/a",
    "(foo) [bar] $100 `x`",
    "²³ x² ①",
]


def write(folder: Path, name: str, **split: object) -> Path:
    """Writes a small model whose tokenizer.json cuts a text as this one does, and merges what it cuts."""
    patterns = [json.loads(f'"{pattern}"') for pattern in PATTERNS[name]]
    cuts = [pre_tokenizers.Split(Regex(pattern), **({"behavior": "isolated"} | split)) for pattern in patterns]
    made = json.loads(byte_level(*cuts).to_str())
    made["model"]["ignore_merges"] = name in IGNORE_MERGES
    make_folder(folder)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    named = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def written(folder: Path, out: Path) -> Path:
    convert(Convert(str(folder), str(out), to="gguf", type="f16"))
    return out / "model.gguf"


def has_mark(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


@pytest.mark.parametrize("name", PATTERNS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, capsys, monkeypatch, name: str) -> None:
    monkeypatch.setattr("tiny_gguf.CORPUS", AWKWARD * 3)
    folder = write(tmp_path / "base", name)
    file, tokenizer = written(folder, tmp_path / "out"), Tokenizer.load(folder)
    assert gguf.GGUFReader(file).get_field("tokenizer.ggml.pre").contents() == name
    no_marks = name in ("gpt-4o", "tekken")  # where llama.cpp's pattern has none
    assert ("llama.cpp cuts words at combining marks" in capsys.readouterr().out) == no_marks
    texts = [text for text in AWKWARD + strings(60) if not (no_marks and has_mark(text))]
    with server(file) as client:
        for text in texts:
            assert ask(client, "/tokenize", content=text, add_special=False)["tokens"] == tokenizer.encode(text), text
    convert(Convert(str(file), str(tmp_path / "back")))
    back = Tokenizer.load(tmp_path / "back")
    for text in AWKWARD + strings(60):
        assert back.encode(text) == tokenizer.encode(text), text


def pieces() -> Tokenizer_:
    """Returns a tokenizer of Gemma 4's kind: it merges letters and spaces, and falls back to bytes."""
    named = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    made = Tokenizer_(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=named, limit_alphabet=120, show_progress=False)
    parts = [part for text in AWKWARD for part in re.split(r"(\n+)", text) if "\0" not in part]
    made.train_from_iterator(parts * 3, trainer)  # no token of Gemma 4 holds line breaks and other letters
    inner = json.loads(made.to_str())
    inner["added_tokens"] = inner["added_tokens"][:4]
    return Tokenizer_.from_str(json.dumps(inner))


def test_gemma_4s_tokenizer_is_written_as_pieces_and_read_as_merges(tmp_path) -> None:
    inner = pieces()
    count = inner.get_vocab_size()
    folder = make_folder(tmp_path / "base", vocab_size=count)
    inner.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    texts = [text for text in AWKWARD + strings(60) if "<" not in text and "\0" not in text]
    want = {text: inner.encode(text, add_special_tokens=False).ids for text in texts}
    tokens = [inner.id_to_token(number) for number in range(count)]
    kinds = [3] * 4 + [6] * 256 + [1] * (count - 260)  # control, bytes, normal
    said = {"model": "gemma4", "pre": None, "tokens": tokens, "token_type": kinds, "add_space_prefix": False}
    said |= {"scores": [-1000.0] * count, "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0}
    theirs = write_gguf(tmp_path / "m.gguf", llama(inner), inner, **{f"tokenizer.ggml.{k}": v for k, v in said.items()})
    for file in (written(folder, tmp_path / "out"), theirs):
        with server(file) as client:
            assert {t: ask(client, "/tokenize", content=t, add_special=False)["tokens"] for t in texts} == want
    convert(Convert(str(theirs), str(tmp_path / "back")))
    back = Tokenizer.load(tmp_path / "back")
    assert {text: back.encode(text) for text in texts} == want


def test_matches_that_are_kept_are_those_that_are_cut_out(tmp_path) -> None:
    folder = write(tmp_path / "base", "dbrx", behavior="removed", invert=True)
    assert gguf.GGUFReader(written(folder, tmp_path / "out")).get_field("tokenizer.ggml.pre").contents() == "dbrx"


def test_a_cut_that_llama_cpp_does_not_know_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(PATTERNS, "own", [r"\\p{L}{1,4}"])
    with pytest.raises(ConfigError, match="none that is written to GGUF; those split text as gpt-2, .*, deepseek-v3"):
        written(write(tmp_path / "base", "own"), tmp_path / "out")
