"""Rebuilds tokenizer.json and the chat template from the header of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from litpeft.core.errors import ModelError, nearest
from litpeft.core.json import write_json
from litpeft.data.pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, merges_of

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"  # of the `tokenizers` library
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT_FORM = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = CASED.replace("|", SHORT_FORM + "|")
WITH_CASE = (  # letters of the alphabets that have capitals
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-"
    "ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
# tokenizer.ggml.pre -> patterns that split the text, one after the other; merges never cross a split.
SPLITS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "starcoder": (r"\p{N}", GPT2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,),
    "dbrx": (WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,),
    "qwen2": (WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,),
    "seed-coder": (WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,),
    "qwen35": (
        WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + r"\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,
    ),
    "falcon": (PUNCTUATION, GPT2, "[0-9][0-9][0-9]"),
    "tekken": (CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,),
    "gpt-4o": (O200K + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,),
    "deepseek-llm": (
        "[\r\n]",
        r"\s?" + WITH_CASE,
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        "[一-龥\u0800-一가-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r'''[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|'''
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}  # fmt: skip
SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2", "refact": "starcoder", "command-r": "starcoder", "olmo": "gpt-2", "phi-2": "gpt-2",
    "chatglm-bpe": "dbrx", "glm4": "dbrx", "smaug-bpe": "dbrx", "llama4": "gpt-4o", "exaone4": "gpt-2",
    "hunyuan-dense": "deepseek-v3", "lfm2": "llama-bpe",
}  # fmt: skip
ADDED = (CONTROL, UNKNOWN, USER_DEFINED)  # found in a text before it is split
WITHOUT_MARKS = ("tekken", "gpt-4o")  # llama.cpp cuts words at combining marks, as these tokenizers do not
IGNORE_MERGES = ("llama-bpe", "tekken")  # a piece that is a token is not merged, and a text starts with BOS


class GgufTokenizer:
    """The tokenizer that a header describes; `rows` is the number of embeddings."""

    def __init__(self, values: Mapping[str, Any], rows: int):
        self.values = values
        self.tokens = self._list("tokens", str)
        count = len(self.tokens)
        self.types = self._list("token_type", int) if "tokenizer.ggml.token_type" in values else [NORMAL] * count
        self.vocab = {token: idx for idx, token in enumerate(self.tokens)}
        if not len(self.vocab) == len(self.types) == count <= rows:
            what = f"{count} tokens ({len(self.vocab)} different) and {len(self.types)} types for {rows} embeddings"
            raise ModelError(what, hint="the header is damaged")
        self.kind = values.get("tokenizer.ggml.model")
        self.kind = "llama" if self.kind == "gemma4" else self.kind  # the same, with merges in place of scores
        self.pre = SAME.get(values.get("tokenizer.ggml.pre"), values.get("tokenizer.ggml.pre"))
        if self.kind not in ("gpt2", "llama"):
            raise ModelError(
                f"tokenizer.ggml.model {self.kind!r} is not supported; convert reads gpt2, llama and gemma4"
            )
        if self.kind == "gpt2" and self.pre not in SPLITS:
            known = [*SPLITS, *SAME]
            what = f"tokenizer.ggml.pre {self.pre!r} is not supported; convert reads {', '.join(known)}"
            raise ModelError(what + nearest(str(self.pre), known))
        default = (1, 2, 0) if self.kind == "llama" else (None, None, None)
        self.bos, self.eos, self.unknown = map(self._id, ("bos", "eos", "unknown"), default)
        self.pad = self._id("padding")
        self.ids = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        self.template = values.get("tokenizer.chat_template")
        if not isinstance(self.template, str | None):
            raise ModelError("tokenizer.chat_template is no text")
        self.tokenizer = self._build()

    def summary(self) -> str:
        name = f"byte-level BPE ({self.pre})" if self.kind == "gpt2" else "sentencepiece BPE"
        return f"{name}, {len(self.tokens)} tokens, {'a' if self.template else 'no'} chat template"

    def write(self, folder: Path, length: int) -> None:
        """Writes tokenizer.json, its config, the chat template and generation_config.json."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        named = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unknown, "pad_token": self.pad}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self._adds("bos"),
            "add_eos_token": self._adds("eos"),
        } | {name: self.tokens[idx] for name, idx in named.items() if idx is not None}
        ends = [idx for idx in dict.fromkeys((self.eos, self._id("eot"), self._id("eom"))) if idx is not None]
        generation = self.ids | ({"eos_token_id": ends} if len(ends) > 1 else {})
        generation = {key: value for key, value in generation.items() if value is not None}
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "generation_config.json", generation)
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8", newline="")

    def _build(self) -> Tokenizer:
        """Returns the tokenizer of the `tokenizers` library."""
        if self.kind == "gpt2":
            ignore_merges = self.pre in IGNORE_MERGES
            tokenizer = Tokenizer(BPE(vocab=self.vocab, merges=self._merges(), ignore_merges=ignore_merges))
            cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[self.pre]]
            prefix = self._flag("add_space_prefix", False)
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
            tokenizer.decoder = decoders.ByteLevel()
        else:
            merges = self._merges() if "tokenizer.ggml.merges" in self.values else self._merges_of_scores()
            unknown = None if self.unknown is None else self.tokens[self.unknown]
            fallback = BYTE in self.types
            tokenizer = Tokenizer(BPE(self.vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
            prefix = self._flag("add_space_prefix", True)
            start = [normalizers.Prepend(SPACE)] if prefix else []
            tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
            strip = [decoders.Strip(" ", 1, 0)] if prefix else []
            decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
            tokenizer.decoder = decoders.Sequence(decode)
        added = {token: kind for token, kind in zip(self.tokens, self.types, strict=True) if token and kind in ADDED}
        marks = {token: kind != USER_DEFINED for token, kind in added.items()}
        tokenizer.add_tokens([AddedToken(token, special=mark, normalized=False) for token, mark in marks.items()])
        self._frame(tokenizer)
        return tokenizer

    def _frame(self, tokenizer: Tokenizer) -> None:
        """Adds BOS and EOS to a text if the header asks for it."""
        bos = [self.tokens[self.bos]] if self._adds("bos") else []
        eos = [self.tokens[self.eos]] if self._adds("eos") else []
        if not bos + eos:
            return
        if any(":" in token or "$" in token for token in bos + eos):
            raise ModelError(f"{' '.join(bos + eos)} cannot be added to a text by a tokenizer.json")
        pair = [*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
        ids = [(token, self.vocab[token]) for token in dict.fromkeys(bos + eos)]
        tokenizer.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], pair=pair, special_tokens=ids)

    def _merges(self) -> list[tuple[str, str]]:
        """Returns the merges of the header, best first."""
        merges = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        for idx, merge in enumerate(merges):
            if len(merge) != 2 or not {*merge, "".join(merge)} <= self.vocab.keys():
                what = f"merge {idx}, {' '.join(merge)!r}, does not join two tokens to a third"
                raise ModelError(what, hint="the header is damaged")
        return merges

    def _merges_of_scores(self) -> list[tuple[str, str]]:
        """Returns the merges that the scores imply: those that make the token with the highest score come first."""
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise ModelError(f"{len(scores)} scores for {len(self.tokens)} tokens", hint="the header is damaged")
        pieces = {token: idx for token, idx in self.vocab.items() if self.types[idx] == NORMAL}
        return merges_of(sorted(pieces, key=lambda token: (-scores[pieces[token]], pieces[token])))

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self.values.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not value or not all(type(entry) is kind for entry in value):
            hint = "the header is damaged, or has no tokenizer"
            raise ModelError(f"tokenizer.ggml.{key} must be a list of {kind.__name__}", hint=hint)
        return value

    def _id(self, name: str, default: int | None = None) -> int | None:
        """Returns the id of a special token, None if there is none."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id", default)
        if value is None or (type(value) is int and 0 <= value < len(self.tokens)):
            return value
        what = f"tokenizer.ggml.{name}_token_id is {value}, but there are {len(self.tokens)} tokens"
        raise ModelError(what, hint="the header is damaged")

    def _flag(self, name: str, default: bool) -> bool:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not bool:
            raise ModelError(f"tokenizer.ggml.{name} must be a flag, got {value}")
        return value

    def _adds(self, name: str) -> bool:
        """Returns whether a text gets this token; without the key, as its kind of tokenizer usually does."""
        usual = name == "bos" and (self.kind == "llama" or self.pre in IGNORE_MERGES)
        return self._flag(f"add_{name}_token", usual) and {"bos": self.bos, "eos": self.eos}[name] is not None
