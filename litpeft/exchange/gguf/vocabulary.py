"""A tokenizer and chat template as the header of a GGUF file describes them."""

import json
from collections.abc import Sequence
from typing import Any

from litpeft.core.errors import ConfigError
from litpeft.data.builtin import GENERATION
from litpeft.data.pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED
from litpeft.data.tokenizer import BYTE as BYTE_TOKEN
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.gguf.tokenizer import GPT2, IGNORE_MERGES, PUNCTUATION, SPLITS

UNUSED = 5  # type of a token: an embedding that no text becomes
FALCON = (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")  # llama.cpp has no third cut: no merge of Falcon crosses it
HINT = "write safetensors, and convert them with llama.cpp's own script"
PLAIN = ({"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE})


def vocabulary(
    tokenizer: Tokenizer, template: str | None, rows: int, stop_ids: Sequence[int], adds_bos: bool
) -> dict[str, Any]:
    """Returns the tokenizer's part of the header; `rows` are the embeddings, `template` is the chat template."""
    inner, backend = json.loads(tokenizer.backend.inner.to_str()), tokenizer.backend
    tokens = [backend.names.get(number, f"[PAD{number}]") for number in range(rows)]
    unknown = tokenizer.special_tokens.get("unk_token") or inner["model"].get("unk_token")
    sentences = inner["model"].get("byte_fallback")
    values = _pieces(tokenizer, inner, tokens) if sentences else _byte_level(tokenizer, inner)

    def kind(number: int, token: str) -> int:
        if number not in backend.names:
            return UNUSED
        added = backend.added.get(token)
        if values["model"] == "llama" and (token == unknown or BYTE_TOKEN.fullmatch(token)):
            return UNKNOWN if token == unknown else BYTE
        return NORMAL if added is None else CONTROL if added.special else USER_DEFINED

    values |= {
        "tokens": tokens, "token_type": [kind(*pair) for pair in enumerate(tokens)],
        "add_bos_token": adds_bos, "add_eos_token": False,
    }  # fmt: skip
    eos = tokenizer.token_id(tokenizer.eos)
    turns = [number for number in stop_ids if number != eos]
    named = dict(zip(("eos", "eot", "eom"), ([] if eos is None else [eos]) + turns, strict=False))
    named |= {"bos": tokenizer.bos_id, "unknown": tokenizer.token_id(unknown)}
    named["padding"] = tokenizer.token_id(tokenizer.special_tokens.get("pad_token"))
    values |= {f"{name}_token_id": number for name, number in named.items() if number is not None}
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return found if template is None else found | {"tokenizer.chat_template": GENERATION.sub("", template)}


def splits_of(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Returns the patterns that a tokenizer.json splits a text by, an empty one for what is not such a pattern."""
    found: list[str] = []
    for part in _steps(pre_tokenizer, "pretokenizers"):
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
                found.append(pattern if pattern.endswith(r"|\s+") else "")  # which leaves nothing between its matches
            case {"type": "Digits", "individual_digits": alone}:
                found.append(r"\p{N}" if alone else r"\p{N}+")
            case {"type": "Punctuation", "behavior": "Contiguous"}:
                found.append(PUNCTUATION)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                found += [GPT2] if regex else []
            case _:
                found.append("")
    return tuple(found)


def spelt(splits: Sequence[str]) -> list[str]:
    """Returns patterns with the ends of lines in one spelling: a file may hold the character or its escape."""
    return [pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in splits]


def _byte_level(tokenizer: Tokenizer, inner: dict[str, Any]) -> dict[str, Any]:
    """Returns what is particular to a byte-level BPE. llama.cpp does not normalise a text, as NFC would."""
    model, splits = inner["model"], splits_of(inner["pre_tokenizer"])
    splits = SPLITS["falcon"] if splits == FALCON else splits
    ignores = bool(model.get("ignore_merges"))
    named = (name for name, known in SPLITS.items() if spelt(known) == spelt(splits))
    pre = next((name for name in named if (name in IGNORE_MERGES) == ignores), None)
    normal = all(step["type"] == "NFC" for step in _steps(inner["normalizer"], "normalizers"))
    if model["type"] != "BPE" or not model["merges"] or not normal or pre is None:
        what = f"this tokenizer is none that is written to GGUF; those split text as {', '.join(SPLITS)}"
        raise ConfigError(what, where=tokenizer.where, hint=HINT)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": pre, "merges": merges}


def _pieces(tokenizer: Tokenizer, inner: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Returns what is particular to a sentencepiece BPE: a score for each token, higher for what is merged earlier."""
    cuts, changes = _steps(inner["pre_tokenizer"], "pretokenizers"), _steps(inner["normalizer"], "normalizers")
    spaces = [step for step in cuts if step["type"] == "Metaspace" and step["replacement"] == SPACE]
    words = [step for step in cuts if step["type"] == "Split" and step["pattern"] == {"String": " "}]  # cuts nothing
    if [step for step in changes if step not in PLAIN] or [step for step in cuts if step not in spaces + words]:
        what = f"this sentencepiece tokenizer does more than turn spaces into {SPACE}"
        raise ConfigError(what, where=tokenizer.where, hint=HINT)
    rank: dict[str, int] = {}
    for number, pair in enumerate(inner["model"]["merges"]):
        rank.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), number)
    scores = [-float(rank[token]) if token in rank else -1e9 for token in tokens]
    prefix = PLAIN[0] in changes or any(step["prepend_scheme"] != "never" for step in spaces)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer."""
    return [] if component is None else component.get(key, [component])
