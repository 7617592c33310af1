"""Falcon's tokenizer in a GGUF file, and names of tokenizers that split alike."""

from conftest import make_folder
from llama_cpp import ask, server, write_bpe
from test_gguf_out import ROWS, made, written
from tiny_gguf import CORPUS, SPECIAL, strings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from litpeft.data.tokenizer import Tokenizer as OurTokenizer
from litpeft.exchange.gguf.tokenizer import GgufTokenizer
from litpeft.exchange.gguf.weights import GgufFile


def falcon() -> Tokenizer:
    """Returns a small byte-level BPE that cuts a text as Falcon's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=317, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    falcon().save(str(base / "tokenizer.json"))
    file, tokenizer = written(base, tmp_path / "out", type="f16", no_verify=True), OurTokenizer.load(base)
    values = GgufFile(file).values
    assert values["tokenizer.ggml.pre"] == "falcon"
    again = GgufTokenizer(values, ROWS).tokenizer
    with server(file) as client:
        for text in (text for text in strings(150) if text[:1].strip()):
            want = tokenizer.encode(text)
            assert ask(client, "/tokenize", content=text, add_special=False)["tokens"] == want, text
            assert again.encode(text, add_special_tokens=False).ids == want, text


def test_names_of_tokenizers_that_split_alike_are_read(tmp_path_factory) -> None:
    values = GgufFile(made(tmp_path_factory, "glm4")[1]).values
    alike = {"command-r": "starcoder", "phi-2": "gpt-2", "olmo": "gpt-2", "stablelm2": "qwen2", "glm4": "dbrx"}
    alike |= {"exaone4": "gpt-2", "hunyuan-dense": "deepseek-v3"}
    for name, known in alike.items():
        one, other = (GgufTokenizer(values | {"tokenizer.ggml.pre": pre}, ROWS).tokenizer for pre in (name, known))
        assert one.to_str() == other.to_str()
