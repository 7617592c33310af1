"""The tokenizer.model of Meta's folders: sentencepiece's, or with Llama 3 a list of bytes in the order of merging."""

import base64
import binascii
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from litpeft.core.errors import ModelError
from litpeft.core.json import write_json
from litpeft.data.pieces import merges_of
from litpeft.exchange.gguf.tokenizer import SPLITS

NAME = "tokenizer.model"
START, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
NAMED = {  # after the merged tokens; the others up to 256 are reserved
    0: START,
    1: END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: TURN,
    10: "<|python_tag|>",
}
SPECIAL = 256


def write_tokenizer(source: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Writes the tokenizer for `rows` embeddings; returns the ids that config.json names."""
    path = source / NAME
    if not path.is_file():
        raise ModelError(
            f"there is no {NAME}", where=source, hint="Meta puts it beside the weights, or one folder above"
        )
    config: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    ranks = read_ranks(path)
    if ranks is None:
        shutil.copyfile(path, folder / NAME)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(folder / "tokenizer_config.json", config | names | {"tokenizer_class": "LlamaTokenizer"})
        write_json(folder / "generation_config.json", ids := {"bos_token_id": 1, "eos_token_id": 2})
        return ids
    if len(ranks) + SPECIAL != rows:
        what = f"{len(ranks)} tokens and {SPECIAL} special ones, and the weights have {rows} embeddings"
        raise ModelError(what, where=path)
    tokenizer = of_ranks(ranks)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": START, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", config | names)
    ids = {"bos_token_id": len(ranks), "eos_token_id": len(ranks) + 1}
    ends = [tokenizer.token_to_id(name) for name in (END, NAMED[8], TURN)]
    write_json(folder / "generation_config.json", ids | {"eos_token_id": ends})
    return ids


def read_ranks(path: Path) -> list[bytes] | None:
    """Returns the tokens of a file with a line `base64 rank` for each; None for another kind of file."""
    data = path.read_bytes()
    try:
        lines = [line.split() for line in data.splitlines() if line.strip()]
        found = [base64.b64decode(token, validate=True) for token, _ in lines]
        in_order = [int(rank) for _, rank in lines] == list(range(len(lines)))
    except (ValueError, binascii.Error):
        return None
    if not found or not in_order or len(set(found)) != len(found):
        raise ModelError("the tokens are not numbered from 0 on, each once", where=path)
    return found


def of_ranks(ranks: list[bytes]) -> Tokenizer:
    """Returns the tokenizer of the `tokenizers` library: byte-level, and a piece that is a token is not merged."""
    letters = letters_of_bytes()
    tokens = ["".join(letters[byte] for byte in token) for token in ranks]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges_of(tokens), ignore_merges=True))
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS["llama-bpe"]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    reserved = iter(range(SPECIAL))
    names = [NAMED.get(at) or f"<|reserved_special_token_{next(reserved)}|>" for at in range(SPECIAL)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    start = [(START, len(tokens))]
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", pair=f"{START} $A $B:1", special_tokens=start)
    return tokenizer


def letters_of_bytes() -> list[str]:
    """Returns the letter for each byte in a byte-level vocabulary: itself if it can be seen, or one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    above = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(above)) for byte in range(256)]
