"""Every key of the tokenizer's files that changes ids: the same ids as transformers' AutoTokenizer, or a refusal."""

import json
from functools import cache
from pathlib import Path

import pytest
from chat_samples import bpe, sentencepiece_model
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Library
from tokenizers import normalizers
from transformers import AutoTokenizer

from litpeft.core.errors import UserError
from litpeft.data.pieces import read_pieces
from litpeft.data.tokenizer import Tokenizer

TEXTS = [
    *("", " ", "the cat", " lead", "  two lead", "trail \n\n", "日本語 🙂 e\u0301 \u00e9 Ünï", "a\u2028b\x07"),
    *("a<s>b</s> c<unk> d", "</s>\nthe <s>[the", "<s>the cat</s>", "<s> the cat </s>  x", "▁x ▁▁ y", "<0x0A>"),
    *("x<extra>y <extra> z", "xfoxy fox FOX Fox", "<|endoftext|>the <|endoftext|> \n", "the[PAD]cat 3.14 , ."),
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKS = ["<s>", "</s>", "<unk>", "<|endoftext|>"]
# What each folder has: vocabulary, tokenizer_class and model_type.
KINDS = {
    "tokenizer.model": ("model", "LlamaTokenizer", "llama"),
    "llama 2": ("prepend", "LlamaTokenizerFast", "llama"),
    "llama of transformers 5": ("metaspace", "LlamaTokenizer", "llama"),
    "mistral": ("prepend", "LlamaTokenizer", "mistral"),
    "gpt2": ("bytes", "GPT2Tokenizer", "gpt2"),
    "gpt_neox": ("nfc", "GPTNeoXTokenizerFast", "gpt_neox"),
    "no class of its own": ("bytes", "PreTrainedTokenizerFast", "llama"),
    "llama 3 that says llama 2": ("bytes", "LlamaTokenizer", "llama"),
}
VALUES = {
    "legacy": [True, False],
    "add_prefix_space": [True, False],
    "add_bos_token": [True, False],
    "add_eos_token": [True, False],
    "split_special_tokens": [True, False],
    "do_lower_case": [True],
    "sp_model_kwargs": [{"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}],
    "model_max_length": [3],
    "truncation_side": ["left"],
    "use_default_system_prompt": [True],
    "spaces_between_special_tokens": [False],
    "clean_up_tokenization_spaces": [True],
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": [True],
    "fix_mistral_regex": [True],
    "additional_special_tokens": [["<extra>"], ["fox"], ["<s>", "</s>"]],
    "extra_special_tokens": [["<extra>"], {"image_token": "<extra>"}],
    "image_token": ["<extra>"],
    "unk_token": ["<extra>"],
    "bos_token": ["fox"],
    "eos_token": ["<|endoftext|>"],
    "pad_token": ["[PAD]", "</s>"],
    "cls_token": ["fox"],
    "mask_token": ["<extra>"],
    "tokenizer_class": ["TokenizersBackend", "LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizer", "NoSuch"],
}
FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"single_word": True}, {"special": False}]


@cache
def vocabulary(kind: str) -> bytes:
    """Returns the content of a tokenizer.model or tokenizer.json."""
    if kind == "model":
        return sentencepiece_model()
    if kind in ("bytes", "nfc"):
        inner = bpe(MARKS)
        if kind == "nfc":
            inner.normalizer = normalizers.NFC()
        return inner.to_str().encode()
    state = json.loads(SPACES.read_text())
    if kind == "prepend":  # as transformers 4 wrote it
        prepend = [{"type": "Prepend", "prepend": "▁"}]
        prepend += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        state |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": prepend}}
    return json.dumps(state).encode()


@pytest.fixture(scope="module", autouse=True)
def spaces(tmp_path_factory):
    """The tokenizer.json that transformers makes of a tokenizer.model."""
    global SPACES
    folder = tmp_path_factory.mktemp("pieces")
    write(folder, "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"})
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "json")
    SPACES = folder / "json" / "tokenizer.json"


def write(folder: Path, kind: str, config: dict, **files: dict) -> Path:
    source, _, model_type = KINDS[kind]
    folder.mkdir(exist_ok=True)
    (folder / ("tokenizer.model" if source == "model" else "tokenizer.json")).write_bytes(vocabulary(source))
    files |= {"tokenizer_config": config, "config": {"model_type": model_type, "vocab_size": 600}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def same_or_refused(folder: Path, key: str) -> str:
    """Returns what was found: equal ids, a refusal by the key's name, or that transformers fails."""
    try:
        ours = Tokenizer.load(folder)
    except UserError as error:
        assert key in str(error)
        assert error.exit_code == 4
        return "refused"
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except (TypeError, ValueError):
        return "transformers fails"
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, (key, text)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), (key, text)
    if (folder / "tokenizer.json").exists():
        begun, opening = theirs.encode("the"), ours.encode(ours.opening)
        assert ours.adds_bos == (begun[:1] == [theirs.bos_token_id])
        assert begun[: len(opening)] == opening
        assert opening or begun[:1] == ours.encode("the")[:1]
    return "equal"


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_changes_ids_as_in_transformers_or_is_refused(tmp_path, kind):
    base, found = NAMES | {"tokenizer_class": KINDS[kind][1]}, []
    for key, values in VALUES.items():
        configs = [{k: v for k, v in base.items() if k != key}, *(base | {key: value} for value in (None, *values))]
        for number, config in enumerate(configs):
            found.append(same_or_refused(write(tmp_path / f"{key}{number}", kind, config), key))
    assert found.count("equal") > 0.7 * len(found)
    assert found.count("transformers fails") <= 3  # on null, where it wants a flag or a word


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_read_with_all_their_flags_from_the_files_that_list_them(tmp_path, kind):
    base, marks = NAMES | {"tokenizer_class": KINDS[kind][1]}, {}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    end, top = 2, 350
    if KINDS[kind][0] != "model":
        inner = Library.from_str(vocabulary(KINDS[kind][0]).decode())
        marks = {str(i): plain | {"content": token.content} for i, token in inner.get_added_tokens_decoder().items()}
        end, top = inner.token_to_id("</s>"), inner.get_vocab_size()
    for number, flags in enumerate(FLAGS):
        for place, (text, row) in enumerate({"<extra>": top, "</s>": end}.items()):
            token, folder = plain | flags | {"content": text}, tmp_path / f"{number}-{place}"
            config = base | {"added_tokens_decoder": marks | {str(row): token}}
            assert same_or_refused(write(folder, kind, config), "added_tokens_decoder") == "equal"
            special = {"eos_token": plain | flags | {"content": "</s>"}, "additional_special_tokens": [text]}
            del special["eos_token"]["special"]  # as special_tokens_map.json has it
            files = {"special_tokens_map": special, "added_tokens": {text: row}}
            assert same_or_refused(write(folder, kind, base, **files), "added_tokens") == "equal"


def test_a_space_follows_no_special_token_of_a_tokenizer_model_unless_legacy_says_so(tmp_path):
    config = NAMES | {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    new = Tokenizer.load(write(tmp_path / "new", "tokenizer.model", config))
    old = Tokenizer.load(write(tmp_path / "old", "tokenizer.model", config | {"legacy": True}))
    names = [[one.backend.names[i] for i in one.encode("<s>the</s>\n")] for one in (new, old)]
    assert names == [["<s>", "t", "h", "e", "</s>", "<0x0A>"], ["<s>", "▁t", "h", "e", "</s>", "▁", "<0x0A>"]]


def test_added_tokens_that_the_class_would_forget_are_named(tmp_path):
    end = {"content": "</s>", "special": True, "normalized": False}
    config = NAMES | {"tokenizer_class": "GPT2Tokenizer", "pad_token": "fox", "added_tokens_decoder": {"1": end}}
    config |= {"eos_token": "</s>", "bos_token": None, "unk_token": None}
    with pytest.raises(UserError, match="added_tokens_decoder lacks <s>, <unk>, <|endoftext|> of tokenizer.json"):
        Tokenizer.load(write(tmp_path / "m", "gpt2", config))


def test_special_tokens_that_depend_on_their_neighbours_are_found_beside_plain_text(tmp_path):
    alone = {"content": "</s>", "special": True, "normalized": False, "single_word": True}
    config = NAMES | {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"2": alone}}
    tokenizer = Tokenizer.load(write(tmp_path / "m", "tokenizer.model", config))
    for text in ("a</s>b </s> c</s>", "</s>", "x </s>"):
        assert tokenizer.encode(f"{text} q", [(len(text), len(text) + 2)]) == tokenizer.encode(f"{text} q")


def test_the_pieces_of_a_model_file_are_those_that_sentencepiece_reads(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    pieces, kind = read_pieces(path)
    assert pieces == [(piece.piece, piece.type) for piece in proto.pieces]
    assert kind == proto.trainer_spec.model_type
    for cut in (1, 10, 1000, -1):
        path.write_bytes(sentencepiece_model()[:cut])
        with pytest.raises(ValueError, match="cut short|no sentencepiece model"):
            read_pieces(path)


def test_a_tokenizer_model_of_another_kind_is_refused(tmp_path):
    folder = write(tmp_path / "m", "tokenizer.model", NAMES | {"tokenizer_class": "LlamaTokenizer"})
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    proto.trainer_spec.model_type = 1  # unigram
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="sentencepiece model of kind 1; a LlamaTokenizer is of kind 2"):
        Tokenizer.load(folder)
