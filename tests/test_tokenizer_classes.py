"""Which class reads a tokenizer.json, by tokenizer_class and model_type: the ids of transformers' AutoTokenizer."""

import json
from pathlib import Path

import pytest
from chat_samples import CORPUS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS as WRONG_CLASS
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5_REGEX

from litpeft.core.errors import ModelError
from litpeft.data.tokenizer import Tokenizer as Ours
from litpeft.data.tokenizer_classes import AS_IT_IS, REGISTERED, SURE
from litpeft.model.families import FAMILIES

MARKS = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_end|>"]
TEXTS = [
    "the cat",
    " the  cat",
    "a\n\n\nb\t c",
    "12345 3.14 1,000",
    "e\u0301 it's WE'LL",
    "<s>the</s> cat<|im_end|>\nfox",
]
DIGITS = pre_tokenizers.Digits(individual_digits=True)
# What a tokenizer.json has, and the classes that are named beside such a file.
KINDS = {
    "gpt2": ("", "", ["GPT2TokenizerFast", "CodeGenTokenizer", "PreTrainedTokenizerFast"]),
    "digits": ("", "digits", ["GPT2Tokenizer"]),
    "neox": ("nfc", "", ["GPTNeoXTokenizerFast"]),
    "cohere": ("nfc", "digits", ["CohereTokenizerFast"]),
    "qwen": ("nfc", PRETOKENIZE_REGEX, ["Qwen2Tokenizer", "LlamaTokenizerFast"]),
    "qwen 3.5": ("nfc", QWEN3_5_REGEX, ["Qwen3_5Tokenizer", "Qwen2Tokenizer"]),
    "llama 3": ("", PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|"), ["LlamaTokenizer", "GPT2Tokenizer"]),
    "gemma": ("spaces", "", ["GemmaTokenizerFast"]),
    "llama 2": ("prepend", "", ["LlamaTokenizerFast"]),
}


def byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def written(kind: str) -> str:
    """Returns the tokenizer.json of a kind, with some merges."""
    change, cut, _ = KINDS[kind]
    spaces = change in ("spaces", "prepend")
    inner = Tokenizer(models.BPE(unk_token="<unk>" if spaces else None, byte_fallback=spaces, fuse_unk=spaces))
    replace = normalizers.Replace(" ", "▁")
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    found = {"nfc": normalizers.NFC(), "spaces": replace, "prepend": prepend}
    if change:
        inner.normalizer = found[change]
    split = DIGITS if cut == "digits" else pre_tokenizers.Split(Regex(cut), "isolated")
    whole = pre_tokenizers.Sequence([split, byte_level(cut == "digits")]) if cut else byte_level(True)
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next") if spaces else whole
    letters = ["▁", *sorted({c for text in TEXTS for c in text})] if spaces else pre_tokenizers.ByteLevel.alphabet()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if spaces else []
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=[*MARKS, *bytes_], initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator([*CORPUS, *TEXTS], trainer)
    inner.decoder = decoders.ByteLevel()
    if spaces:
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        strip = [decoders.Strip(" ", 1, 0)] if change == "prepend" else []
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    state = json.loads(inner.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in MARKS]
    state["pre_tokenizer"] = None if change == "prepend" else state["pre_tokenizer"]
    return json.dumps(state)


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    return {kind: written(kind) for kind in KINDS}


def folder_of(folder: Path, content: str, model_type: str, **keys: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 700}))
    return folder


def test_the_class_of_each_family_is_that_of_transformers() -> None:
    theirs = {name: TOKENIZER_MAPPING_NAMES.get(name) for name in FAMILIES}
    plain = {"TokenizersBackend": "", "MistralCommonBackend": ""}
    assert {name: plain.get(cls, cls) for name, cls in theirs.items() if cls} == REGISTERED
    assert {name for name in FAMILIES if name in WRONG_CLASS and REGISTERED[name]} == set(SURE)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_is_read_by_the_class_that_transformers_takes_for_its_model_type(model_type, kinds, tmp_path) -> None:
    equal, refused = 0, 0
    for kind, (*_, classes) in KINDS.items():
        for named in (*classes, None):
            keys = {"tokenizer_class": named} if named else {}
            folder = folder_of(tmp_path / f"{kind} {named}", kinds[kind], model_type, **keys)
            if named == "PreTrainedTokenizerFast" and model_type in SURE:
                continue  # honoured here, see below
            try:
                ours = Ours.load(folder)
            except ModelError as error:
                assert "tokenizer_class" in str(error)
                refused += 1
                continue
            theirs = AutoTokenizer.from_pretrained(folder)
            for text in TEXTS:
                ids = theirs.encode(text, add_special_tokens=False)
                assert ours.encode(text) == ids, (kind, named, text)
                assert ours.decode(ids, skip_special=False) == theirs.decode(ids), (kind, named, text)
            equal += 1
    if REGISTERED.get(model_type) == "":  # no class stands in the way of a file
        assert refused == 0
    assert equal >= 2
    assert equal + refused >= 17


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_file_is_used_as_it_is_where_tokenizer_class_asks_for_it(named, kinds, tmp_path) -> None:
    assert named.removesuffix("Fast") in AS_IT_IS
    library = Tokenizer.from_str(kinds["llama 3"])
    ours = Ours.load(folder_of(tmp_path / "m", kinds["llama 3"], "qwen2", tokenizer_class=named))
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_a_prefix_space_comes_once_where_digits_are_cut(kinds, tmp_path) -> None:
    keys = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    folder = folder_of(tmp_path / "m", kinds["digits"], "starcoder2", **keys)
    ours, theirs = Ours.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
