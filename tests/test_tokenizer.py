"""Tokenizers against transformers and sentencepiece themselves; streams against the text as a whole."""

import json
import random
import re

import pytest
from chat_samples import CORPUS, STYLES, bpe, sentencepiece_model, write_folder
from tokenizers import processors
from transformers import AutoTokenizer

from litpeft.core.errors import ModelError, UserError
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import StreamDecoder, Tokenizer

TEXTS = [*CORPUS[:30], "", " ", "  lead", "trail \n\n", "日本語 🙂🙂 e\u0301\u0301", "a\u2028b\x07"]


@pytest.fixture
def chatml(tmp_path):
    return Tokenizer.load(write_folder(tmp_path / "chatml", "chatml"))


@pytest.fixture
def pieces(tmp_path):
    folder = tmp_path / "pieces"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"})
    )
    return Tokenizer.load(folder)


def test_ids_equal_transformers_without_automatic_special_tokens(tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, "llama3")
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "a<|eot_id|> b<|begin_of_text|>"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_sentencepiece_ids_equal_transformers_and_sentencepiece(pieces):
    import sentencepiece
    from transformers import AutoTokenizer

    folder = pieces.where.removesuffix("/tokenizer.model")
    theirs, plain = AutoTokenizer.from_pretrained(folder), sentencepiece.SentencePieceProcessor(model_file=pieces.where)
    for text in CORPUS[:60]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert pieces.encode(text) == ids
        if not text.startswith(" "):  # there transformers leaves out the space that sentencepiece puts before a text
            assert ids == plain.encode(text)
            assert pieces.decode(ids) == plain.decode(ids)
    assert pieces.encode("<s>the cat</s>") == theirs.encode("<s>the cat</s>", add_special_tokens=False)
    assert (pieces.bos_id, pieces.stop_ids, pieces.adds_bos) == (1, (2,), True)


def test_offsets_cut_the_text_into_what_the_tokens_stand_for(chatml, pieces):
    for tokenizer in (chatml, pieces):
        for text in (*CORPUS[:40], "a<|im_end|> b</s>c", "日本 🙂"):
            ids, offsets = tokenizer.encode_batch([text], [[]])[0]
            assert len(ids) == len(offsets)
            assert offsets == sorted(offsets)
            covered = {i for a, b in offsets for i in range(a, b)}
            assert all(text[i] == " " for i in set(range(len(text))) - covered)


@pytest.mark.parametrize("special", ["<|im_end|>", "x<|im_start|>y<|im_end|><|im_end|>z", "<|im_end|>" * 3])
def test_special_tokens_within_plain_spans_are_text_and_those_outside_are_tokens(chatml, special):
    text = f"<|im_start|>user\n{special} q<|im_end|>\n"
    start = len("<|im_start|>user\n")
    ids, offsets = chatml.encode_batch([text], [[(start, start + len(special))]])[0]
    marks = [(chatml.backend.names[i], text[a:b]) for i, (a, b) in zip(ids, offsets, strict=True) if i in (0, 1)]
    assert marks == [("<|im_start|>", "<|im_start|>"), ("<|im_end|>", "<|im_end|>")]
    assert chatml.decode(ids, skip_special=False) == text
    assert offsets == sorted(offsets)
    without = chatml.encode("<|im_start|>user\nab q<|im_end|>\n", [(start, start + 2)])
    assert without == chatml.encode("<|im_start|>user\nab q<|im_end|>\n")


def test_sentencepiece_keeps_special_tokens_in_plain_spans_as_text(pieces):
    ids, offsets = pieces.encode_batch(["<s>the</s> cat</s>"], [[(6, 10)]])[0]
    assert [i for i in ids if i in (1, 2)] == [1, 2]
    assert offsets[0] == (0, 3)
    assert offsets[-1] == (14, 18)
    assert pieces.encode("</s>", [(0, 4)]) != [2]


def test_spaces_belong_to_their_token_even_if_the_file_trims_offsets(tmp_path):
    folder = write_folder(tmp_path, "chatml")
    inner = bpe(STYLES["chatml"][1])
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))
    ids, offsets = Tokenizer.load(folder).encode_batch(["the cat fox  dog the cat"], [[]])[0]
    assert [a for a, _ in offsets[1:]] == [b for _, b in offsets[:-1]]
    assert offsets[-1][1] == 24


def test_text_without_a_template_begins_with_all_tokens_that_the_file_puts_first(tmp_path):
    folder, begin = write_folder(tmp_path, "chatml"), ["<|im_start|>", "<|im_end|>"]  # as GLM's [gMASK]<sop>
    inner = bpe(STYLES["chatml"][1])
    known = [(token, inner.token_to_id(token)) for token in begin]
    inner.post_processor = processors.TemplateProcessing(single=f"{begin[0]} {begin[1]} $A", special_tokens=known)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer, text = Tokenizer.load(folder), "the cat fox"
    theirs = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert (tokenizer.opening, tokenizer.adds_bos, theirs[:2]) == ("".join(begin), False, [i for _, i in known])
    document = ChatTemplate(tokenizer, "chatml").spans([Turn(PLAIN, text)])
    assert tokenizer.encode(document.text)[: len(theirs)] == theirs
    assert document.text[slice(*document.trained[0])].startswith(text)


def test_a_stream_gives_the_same_text_and_never_half_a_character(chatml, pieces):
    rng = random.Random(0)
    for tokenizer in (chatml, pieces):
        for number in range(150):
            text = " ".join(rng.choices(CORPUS, k=2))
            broken = [rng.randrange(len(tokenizer.backend.ids)) for _ in range(40)]  # also bytes that are no character
            ids = tokenizer.encode(text) if number % 2 else broken
            stream = StreamDecoder(tokenizer)
            parts = [stream.feed(i) for i in ids]
            assert "".join([*parts, stream.flush()]) == tokenizer.decode(ids)
            if number % 2:
                assert "\ufffd" not in "".join(parts)


def test_names_and_stop_ids_come_from_the_files_of_the_model(tmp_path):
    folder = write_folder(tmp_path, "llama3")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}}')
    (folder / "config.json").write_text('{"bos_token_id": 2, "eos_token_id": 4}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.eos) == ("<|begin_of_text|>", 0, "<|end_of_text|>")
    assert tokenizer.stop_ids == (3, 4)
    assert not tokenizer.adds_bos


def test_the_named_end_token_is_special_even_if_the_file_forgot_to_say_so(tmp_path):
    folder = write_folder(tmp_path, "chatml")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token | {"special": token["id"] == 0} for token in content["added_tokens"]]
    for tokens in (content["added_tokens"], content["added_tokens"][:1]):
        (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": tokens}))
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode("<|im_end|>") == [1]
        assert 1 not in tokenizer.encode("<|im_end|>", [(0, 10)])


def test_a_named_list_of_chat_templates_gives_the_default_one(tmp_path):
    folder = write_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template == "d"
    assert tokenizer.template_hash == "18ac3e7343f016890c510e93f935261169d9e3f565436429830faf0934f4f8e4"  # sha256sum


def test_a_token_without_an_embedding_is_named(chatml):
    top = max(chatml.backend.names)
    chatml.check_vocabulary(top + 1)
    with pytest.raises(UserError, match=f"has id {top}, but .* has {top} rows"):
        chatml.check_vocabulary(top)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read: "),
        ("tokenizer.json", "\xff", "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must be a JSON object, got list"),
        ("tokenizer_config.json", '{"eos_token": "nope"}', "eos_token 'nope' is not in the vocabulary"),
        ("chat_template.jinja", "\xff", "the chat template cannot be read: "),
        ("tokenizer.json", None, "there is no tokenizer in the folder"),
    ],
)
def test_broken_files_are_errors_of_the_model(tmp_path, name, content, what):
    folder = write_folder(tmp_path, "chatml")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=re.escape(what)):
        Tokenizer.load(folder)


def test_a_lone_surrogate_is_refused(chatml, pieces):
    for tokenizer in (chatml, pieces):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode("a\ud800b")
