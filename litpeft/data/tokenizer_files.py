"""The files of a tokenizer, read as transformers 5 reads them: `tokenizer_class` decides what the other keys mean.

A tokenizer.json is used with the changes that keys of tokenizer_config.json ask for; a tokenizer.model becomes the same
kind of tokenizer. A key that would change ids in another way is refused by its name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from litpeft.core.errors import ModelError, some
from litpeft.core.json import read_optional
from litpeft.data.pieces import BPE_MODEL, BYTE, CONTROL, SPACE, UNKNOWN, USER_DEFINED, merges_of, read_pieces
from litpeft.data.tokenizer_classes import (
    AS_IT_IS,
    AS_IT_IS_HINT,
    BYTE_LEVEL,
    FOREIGN,
    LLAMA,
    NAMES,
    ORDER,
    PARTS,
    REGISTERED,
    SURE,
    WHOLE,
)


@dataclass
class TokenizerFiles:
    """A folder's tokenizer and the settings beside it."""

    inner: tokenizers.Tokenizer
    path: Path  # tokenizer.json or tokenizer.model
    names: dict[str, str]  # bos_token, eos_token, ... -> the token
    special: list[str]  # the named tokens, and the others that tokenizer_config.json calls special
    adds_bos: bool | None  # a text starts with BOS; None: tokenizer.json decides
    config: dict[str, Any]  # tokenizer_config.json


def read_files(folder: Path, model: dict[str, Any]) -> TokenizerFiles:
    """Returns the tokenizer of a folder; `model` is its config.json. Errors that name no file are of its config."""
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    config, special_map, added = (read_optional(folder / name) for name in files)
    path, inner = _read(folder)
    name = _class_name(config, model, inner)
    if inner is None:
        inner = _from_pieces(path, name, config)
    _refuse_keys(config, folder, name, inner)
    if name in LLAMA:
        _set_llama(inner, config, name)
    elif name in PARTS:
        _check_parts(inner, name)
        if name in BYTE_LEVEL:
            _set_byte_level(inner, config, name)
    # older folders have in three files what newer ones have in one
    said = special_map | config if "added_tokens_decoder" in config else config | special_map
    usual = NAMES.get(name, {})
    try:
        named = {key: value for key, value in (usual | said).items() if key.endswith("_token")}
        extra = said.get("extra_special_tokens") or said.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            named, extra = named | extra, []
        # null names no token, and a flag such as add_bos_token is none
        keys = [key for key, value in named.items() if value and not isinstance(value, bool)]
        named = {key: _token(named[key]) for key in sorted(keys, key=(*ORDER, *keys).index)}
        special = [*named.values(), *map(_token, extra)]
        # tokens of added_tokens.json that stand in this one list alone are not special to transformers
        overlooked = extra is special_map.get("additional_special_tokens")
        tokens = _declared(inner, config, added, list(named.values()) if overlooked else special)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"a token of the tokenizer must be text, or an object with its content and flags: {error}"
        raise ModelError(what) from None
    if name in NAMES and "added_tokens_decoder" in config:
        _refuse_forgotten(inner, {token.content for token in (*tokens.values(), *special)}, name)
    _add_declared(inner, tokens)
    known = {key: token.content for key, token in named.items() if inner.token_to_id(token.content) is not None}
    for key in ("bos_token", "eos_token"):
        if key in named and key in said and key not in known:
            raise ModelError(f"{key} {named[key].content!r} is not in the vocabulary")
    _add_special(inner, special, model.get("vocab_size"))
    adds_bos = False if name == "GPTNeoXTokenizer" else None
    if path.suffix == ".model" or name == "CodeLlamaTokenizer":
        adds_bos = config.get("add_bos_token") is not False
    return TokenizerFiles(inner, path, known, [token.content for token in special], adds_bos, config)


def _read(folder: Path) -> tuple[Path, tokenizers.Tokenizer | None]:
    """Returns the file of the vocabulary, and the tokenizer if it is a tokenizer.json."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return path, tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path.name} cannot be read: {error}", where=path) from None
    path = folder / "tokenizer.model"
    if path.is_file():
        return path, None
    hint = "a model folder holds tokenizer.json or tokenizer.model beside config.json"
    raise ModelError("there is no tokenizer in the folder", where=folder, hint=hint)


def _class_name(config: dict[str, Any], model: dict[str, Any], inner: tokenizers.Tokenizer | None) -> str:
    """Returns the class that transformers would use, without `Fast`; "" if tokenizer.json is used unchanged.

    Of a tokenizer.model alone it is the named one: that is how sentencepiece reads the file.
    """
    kind = str(model.get("model_type"))
    registered = REGISTERED.get(kind)
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or registered or "").removesuffix("Fast")
    if inner is None:
        return name
    if registered == "" or (kind in SURE and name not in AS_IT_IS):
        return registered
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(inner.pre_tokenizer))
    return "" if name == "LlamaTokenizer" and byte_level else name


def _steps(component: Any) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, as their JSON."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("pretokenizers", state.get("normalizers", [state]))


def _from_pieces(path: Path, name: str, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.model; it puts a space before a text."""
    if name not in LLAMA:
        said = config.get("tokenizer_class")
        what = f"tokenizer_class is {said!r}, for which litpeft does not know how a tokenizer.model is read"
        raise ModelError(what, hint='if the model is of Llama\'s kind, write "tokenizer_class": "LlamaTokenizer" there')
    try:
        pieces, model_kind = read_pieces(path)
    except (OSError, LookupError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=path) from None
    if model_kind != BPE_MODEL:
        what = f"{path.name} is a sentencepiece model of kind {model_kind}; a {name} is of kind {BPE_MODEL}, BPE"
        raise ModelError(what, where=path, hint="take the model's tokenizer.json")
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = merges_of([piece for piece, kind in pieces if kind not in (UNKNOWN, CONTROL, BYTE)])
    unknown = next((piece for piece, kind in pieces if kind == UNKNOWN), None)
    inner = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    for piece, kind in pieces:
        if kind in (CONTROL, USER_DEFINED):
            inner.add_tokens([AddedToken(piece, special=kind == CONTROL, normalized=False)])
    return inner


def _refuse_keys(config: dict[str, Any], folder: Path, name: str, inner: tokenizers.Tokenizer) -> None:
    """Raises for a key that changes ids or decoded text in a way that is not implemented."""
    wrong = {
        "split_special_tokens": "the marks of a chat template would be split into plain text",
        "fix_mistral_regex": "text would be cut by another pattern than that of tokenizer.json",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "answers would lose spaces",
    }
    if not isinstance(inner.model, BPE):
        wrong["clean_up_tokenization_spaces"] = "answers would lose spaces"
    if name not in (*LLAMA, *BYTE_LEVEL, *AS_IT_IS):
        wrong |= dict.fromkeys(FOREIGN, f"litpeft does not know what a {name} does then")
    for key, why in wrong.items():
        if config.get(key):
            what = f"{key} {json.dumps(config[key])} is not supported: {why}"
            hint = AS_IT_IS_HINT if key in FOREIGN else "set it to false, if that is right for the model"
            raise ModelError(what, hint=hint)
    files = config.get("fast_tokenizer_files")
    for file in files if isinstance(files, list) else []:
        if file != "tokenizer.json" and (folder / str(file)).is_file():
            what = f"fast_tokenizer_files names {file!r}, and only tokenizer.json is read"
            raise ModelError(what, hint="rename the file to tokenizer.json, if it is the right one")


def _set_llama(inner: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> None:
    """Applies `legacy` and `add_prefix_space` to `inner`; by default only the text's start gets a space."""
    cuts, changes = _steps(inner.pre_tokenizer), _steps(inner.normalizer)
    plain = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    spaces = [step for step in cuts if step["type"] == "Metaspace" and step["replacement"] == SPACE]
    odd = [step["type"] for step in changes + cuts if step not in plain + spaces]
    if odd or not isinstance(inner.model, BPE):
        odd = odd or [f"a {type(inner.model).__name__} model"]
        what = f"tokenizer_class {name} only turns spaces into {SPACE}, but tokenizer.json has {', '.join(odd)}"
        raise ModelError(what, hint=AS_IT_IS_HINT)
    prefix = config.get("add_prefix_space")
    if prefix is None:
        prefix = plain[0] in changes or any(step["prepend_scheme"] != "never" for step in spaces)
        if not prefix:
            what = f"tokenizer.json puts no space before a text, but a {name} does unless add_prefix_space is false"
            raise ModelError(what, hint='write "add_prefix_space": false, or true')
    everywhere = bool(config.get("legacy")) and name == "LlamaTokenizer"  # a space after each special token, too
    inner.normalizer = None
    scheme = "never" if not prefix else "always" if everywhere else "first"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    inner.model.fuse_unk = inner.model.byte_fallback = True


def _check_parts(inner: tokenizers.Tokenizer, name: str) -> None:
    """Raises if tokenizer.json cuts a text otherwise than its class."""
    normal, expected = PARTS[name]
    cuts, changes = _steps(inner.pre_tokenizer), [step["type"] for step in _steps(inner.normalizer)]
    if expected == [WHOLE]:
        cuts = [step for step in cuts if step["type"] != "Digits"]  # changes no id: no merge crosses its cuts
    if [*map(_cut, cuts)] != expected or changes != normal or not isinstance(inner.model, BPE):
        has = [*changes, *(step["type"] for step in cuts), f"a {type(inner.model).__name__} model"]
        wants = [*normal, *(kind for kind, _ in expected), "a BPE model"]
        what = f"tokenizer_class {name} means {', '.join(wants)}; tokenizer.json has {', '.join(has)}"
        raise ModelError(what + (", with another pattern" if has == wants else ""), hint=AS_IT_IS_HINT)


def _set_byte_level(inner: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> None:
    """Applies `add_prefix_space` to `inner`."""
    pre = inner.pre_tokenizer
    last = pre[len(_steps(pre)) - 1] if isinstance(pre, pre_tokenizers.Sequence) else pre
    last.add_prefix_space = bool(config.get("add_prefix_space"))
    if PARTS[name][1] == [WHOLE]:
        inner.pre_tokenizer = last


def _cut(step: dict[str, Any]) -> tuple[str, Any]:
    """Returns a step of a pre-tokenizer, and the setting of it that matters."""
    settings = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}
    said = step.get(settings.get(step["type"], ""), True)
    return step["type"], said.get("Regex") if isinstance(said, dict) else said


def _token(value: Any) -> AddedToken:
    """Returns the special token of a key, whose value is its text or an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"} | {"special": True})


def _declared(
    inner: tokenizers.Tokenizer, config: dict[str, Any], added: dict[str, Any], special: list[AddedToken]
) -> dict[int, AddedToken]:
    """Returns id -> token of added_tokens_decoder, or else of added_tokens.json."""
    if "added_tokens_decoder" in config:
        return {int(number): AddedToken(**token) for number, token in (config["added_tokens_decoder"] or {}).items()}
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    marks = {text: any(text == token.content for token in special) for text in added if text not in known}
    return {int(added[text]): AddedToken(text, special=mark, normalized=not mark) for text, mark in marks.items()}


def _refuse_forgotten(inner: tokenizers.Tokenizer, listed: set[str], name: str) -> None:
    """Raises if tokenizer.json has added tokens that added_tokens_decoder lacks: transformers would drop them."""
    forgotten = [token.content for token in inner.get_added_tokens_decoder().values() if token.content not in listed]
    if forgotten:
        what = f"added_tokens_decoder lacks {some(forgotten)} of tokenizer.json: a {name} would read them as plain text"
        raise ModelError(what, hint=f"add them, or {AS_IT_IS_HINT}")


def _add_declared(inner: tokenizers.Tokenizer, tokens: dict[int, AddedToken]) -> None:
    """Adds tokens; raises if one cannot get its id."""
    for number, token in sorted(tokens.items()):
        new = inner.token_to_id(token.content) is None
        inner.add_tokens([token])
        if new and inner.token_to_id(token.content) != number:
            got = inner.token_to_id(token.content)
            what = f"added token {token.content!r} cannot get its id {number}: the next one is {got}"
            raise ModelError(what, hint="the tokenizer's files are not of one model")


def _add_special(inner: tokenizers.Tokenizer, special: list[AddedToken], rows: Any) -> None:
    """Adds special tokens that no file lists; one outside the vocabulary only if the embedding has a row for it."""
    added = inner.get_added_tokens_decoder()
    known, after = {token.content for token in added.values()}, max([*added, inner.get_vocab_size(False) - 1]) + 1
    for token in special:
        if token.content in known:
            continue
        if inner.token_to_id(token.content) is None:
            if isinstance(rows, int) and after >= rows:
                continue
            after += 1
        known.add(token.content)
        inner.add_tokens([token])
