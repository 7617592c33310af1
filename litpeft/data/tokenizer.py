"""The tokenizer of a model folder: text to token ids with their character offsets, and back."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, ModelError, located, quoted
from litpeft.core.json import read_json, read_optional
from litpeft.data.tokenizer_backends import Backend, Encoded, Span, overlaps
from litpeft.data.tokenizer_files import read_files

SURROGATE = re.compile("[\ud800-\udfff]")
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of Llama's tokenizers that is one byte


@dataclass
class Tokenizer:
    """Encodes and decodes text. It adds nothing to a text (no BOS, no EOS): templates do that."""

    backend: Backend
    special_tokens: dict[str, str]  # bos_token, eos_token, unk_token, pad_token, as far as the model names them
    stop_ids: tuple[int, ...]  # ids that end an answer; a chat template may add one (ChatTemplate.stop_ids)
    adds_bos: bool  # text without a template starts with BOS
    chat_template: str | None  # source of the model's own template
    where: str  # the file, for errors
    prefix: str = ""  # what text without a template starts with in place of BOS alone: GLM's [gMASK]<sop>

    def __post_init__(self) -> None:
        self.bos, self.eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        self.added: tuple[str, ...] = ()  # by `add`
        self.bos_id = self.token_id(self.bos)
        self.special_pattern = self.backend.special_pattern
        unknown = self.token_id(self.special_tokens.get("unk_token"))
        # ids that literal text must never become; characters outside the vocabulary rightly become the unknown token
        self._guarded = frozenset(self.backend.specials.values()) - {unknown}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Returns the tokenizer that a Hugging Face folder holds: tokenizer.json, else tokenizer.model."""
        generation, model = read_optional(folder / "generation_config.json"), read_optional(folder / "config.json")
        with located(folder / "tokenizer_config.json"):
            files = read_files(folder, model)
        backend, where = Backend(files.inner), str(files.path)
        names = files.names
        declared = {k: ids_of(generation.get(k)) or ids_of(model.get(k)) for k in ("bos_token_id", "eos_token_id")}
        for key in ("bos_token", "eos_token"):
            for number in declared[f"{key}_id"][:1]:
                if number in backend.names:
                    names.setdefault(key, backend.names[number])
        before = [] if files.adds_bos is not None else [backend.names[number] for number in backend.before]
        backend.make_special([token for token in (*names.values(), *files.special, *before) if token in backend.ids])
        stop = {*declared["eos_token_id"], *([backend.ids[names["eos_token"]]] if "eos_token" in names else [])}
        adds_bos = "bos_token" in names and (files.adds_bos is True or before == [names["bos_token"]])
        prefix = "" if adds_bos else "".join(before)
        return cls(backend, names, tuple(sorted(stop)), adds_bos, _chat_template(folder, files.config), where, prefix)

    @property
    def opening(self) -> str:
        """Returns the special tokens that text without a template starts with."""
        return (self.bos or "") if self.adds_bos else self.prefix

    @property
    def template_where(self) -> str:
        """Returns the file that the chat template comes from."""
        file = Path(self.where).with_name("chat_template.jinja")
        return str(file if file.is_file() else file.with_name("tokenizer_config.json"))

    @property
    def template_hash(self) -> str | None:
        """Returns the sha256 of the model's chat template."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template else None

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.ids.get(token)

    def encode(self, text: str, literal: list[Span] | None = None) -> list[int]:
        """Returns the ids of a text; special tokens within the spans `literal` are plain text."""
        return self.encode_batch([text], [literal or []])[0].ids

    def encode_batch(self, texts: list[str], literal: list[list[Span]]) -> list[Encoded]:
        """Does the same for many texts, with offsets; raises ValueError for text that is not valid Unicode."""
        for text in texts:
            if SURROGATE.search(text):
                raise ValueError("the text holds a lone surrogate, which is no character")
        encoded = iter(self.backend.encode([text for text, spans in zip(texts, literal, strict=True) if not spans]))
        around = self.backend.encode_around
        found = [around(text, spans) if spans else next(encoded) for text, spans in zip(texts, literal, strict=True)]
        for text, spans, one in zip(texts, literal, found, strict=True):
            self._refuse_leak(text, spans, one.ids)
        return found

    def _refuse_leak(self, text: str, literal: list[Span], ids: list[int]) -> None:
        """Raises ValueError if literal text became a special token: it could end a turn, or begin another's."""
        meant = len(self.special_pattern.findall(text))
        if literal:
            meant = sum(not overlaps(literal, *match.span()) for match in self.special_pattern.finditer(text))
        if sum(map(self._guarded.__contains__, ids)) > meant:
            raise ValueError("the tokenizer turns plain text of it into a special token")

    def add(self, tokens: Sequence[str], key: str = "add_tokens") -> None:
        """Adds tokens that the vocabulary lacks: whatever text spells one of them becomes its id. May be repeated."""
        if tuple(tokens) == self.added:
            return
        if not self.where.endswith(".json"):
            raise ConfigError("tokens can be added to a tokenizer.json only", where=key, hint=f"this is {self.where}")
        if odd := [token for token in tokens if not token.strip() or tokens.count(token) > 1]:
            raise ConfigError(f"{quoted(odd[0])} must be some text, and stand there once", where=key)
        if known := [token for token in tokens if token in self.backend.ids]:
            raise ConfigError(f"{quoted(known[0])} is a token of the base already", where=key, hint="leave it out")
        self.backend.add(tokens)
        self.added = tuple(tokens)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.backend.decode(ids, skip_special)

    def check_vocabulary(self, embedding_rows: int) -> None:
        """Raises if the tokenizer can give an id for which the model has no embedding."""
        top = max(self.backend.names)
        if top >= embedding_rows:
            name = self.backend.names[top]
            what = f"token {name!r} has id {top}, but the model's embedding has {embedding_rows} rows"
            hint = "the tokenizer files are not those of this model, or its embedding was not resized"
            raise ModelError(what, where=self.where, hint=hint)


def write_added_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokens that were added to a tokenizer into the tokenizer.json of a folder, a copy of its base's."""
    if not tokenizer.added:
        return
    path = folder / "tokenizer.json"
    content = read_json(path, path.name)
    for token in tokenizer.added:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"].append({"id": tokenizer.backend.ids[token], "content": token} | flags)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"the chat template cannot be read: {error}", where=path) from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def ids_of(value: Any) -> list[int]:
    """Returns the value of a key such as eos_token_id (a number, a list or None) as a list."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


class StreamDecoder:
    """Decodes ids one by one into text to print, never half of a character.

    The pieces joined are `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # ids before it are printed
        self._context = 0  # decoding starts here, since the space before a token depends on the token before it

    def feed(self, token: int) -> str:
        """Returns the text that this id completes; empty while a character is incomplete."""
        self._ids.append(token)
        name = self.tokenizer.backend.names.get(token, "")
        if BYTE.fullmatch(name) or name in self.tokenizer.backend.specials:
            return ""  # wait: a byte that does not fit makes the bytes before it U+FFFD, too
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """Returns the text that is left at the end; an incomplete character is U+FFFD."""
        text = self._pending()
        self._context, self._done = self._done, len(self._ids)
        return text

    def _pending(self) -> str:
        known = self.tokenizer.decode(self._ids[self._context : self._done])
        return self.tokenizer.decode(self._ids[self._context :])[len(known) :]
