"""The command `litpeft data parity`: conversations as trained, as the exported folder gives them, and as generated."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from litpeft.cli.data import ENDLESS
from litpeft.core.errors import ConfigError, DataError, ModelError, counted
from litpeft.core.kinds import check_least
from litpeft.core.terminal import say
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.thinking import thoughts_of
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run, tell_outdated

AROUND = 6  # tokens that are shown before and after the first difference
SHOWN = 5  # differences that are told


@dataclass
class Parity:
    """Compare the ids of conversations as trained, as the exported folder renders them, and as they are generated.

    The exported folder is read by transformers, as other programs do. The exit code is 3 if any row differs.
    """

    run: str
    """A run, or a YAML file of `litpeft finetune`."""
    data: str | None = field(default=None, kw_only=True)
    """Rows to compare, in place of those that the run was trained on."""
    folder: str | None = field(default=None, kw_only=True)
    """The exported folder; default: merged/ of the run if it is there, else the run's model, else the base."""
    base: str | None = field(default=None, kw_only=True)
    """Folder of the base model, if it has moved since the run."""
    rows: int = field(default=100, kw_only=True)
    """Compare the first so many rows."""
    json: bool = field(default=False, kw_only=True)
    """Print one JSON object."""

    def __post_init__(self) -> None:
        check_least(self, rows=1)


@dataclass
class Difference:
    """The first token in which a row is not what was trained."""

    where: str  # file:line
    by: str  # exported, or generated
    at: int  # index of the token
    trained: list[str]  # the tokens around it, as text
    other: list[str]
    reason: str = ""


@dataclass
class Compared:
    """What was compared, and what differs."""

    run: str
    folder: str
    rows: int
    tokens: int
    plain: int  # rows of plain text, which have no template
    differences: list[Difference]

    def __str__(self) -> str:
        lines = [f"rows        {self.rows:,} ({counted(self.tokens, 'token')}) of {self.run}"]
        lines += [f"plain text  {counted(self.plain, 'row')} not compared: they have no template"] if self.plain else []
        for by, what in (("exported", f"by {self.folder} in transformers"), ("generated", "by prompt and answer")):
            wrong = sum(one.by == by for one in self.differences)
            lines.append(f"{by:<11} {self.rows - wrong:,} equal{f', {wrong:,} not' if wrong else ''}: {what}")
        for one in self.differences[:SHOWN]:
            lines.append(f"{one.where}: {one.by} differs at token {one.at + 1}{one.reason and f': {one.reason}'}")
            lines += [f"  {name:<10}{' '.join(map(repr, part))}" for name, part in self._parts(one)]
        return "\n".join(lines)

    def _parts(self, one: Difference) -> Iterator[tuple[str, list[str]]]:
        yield "trained", one.trained
        yield one.by, one.other


def parity(settings: Parity) -> None:
    """The command."""
    data, tokenizer, template, folder = _read(settings)
    theirs, told = _transformers(folder), {} if template.is_models_own else template.options
    whole = replace(data, path=settings.data or data.path, validation_path=None, validation_split=0.0)
    whole = replace(whole, max_length=ENDLESS, bad_rows="skip")
    rows = load_dataset(whole, tokenizer, template, ENDLESS).train
    chats = [row for row in rows if row.turns[0].role != PLAIN][: settings.rows]
    differences = []
    for row in chats:
        kept = data.thinking == "keep" and sum(map(_thoughtful, row.turns)) == 1 and _thoughtful(row.turns[-1])
        pairs = _exported(row, template, theirs, told, kept), _generated(row, tokenizer, template, kept)
        for by, (trained, other) in zip(("exported", "generated"), pairs, strict=True):
            if trained != other:
                differences.append(_difference(row, by, trained, other, tokenizer))
    tokens, plain = sum(len(row.ids) for row in chats), sum(row.turns[0].role == PLAIN for row in rows)
    compared = Compared(settings.run, str(folder), len(chats), tokens, plain, differences)
    say(json.dumps(asdict(compared), ensure_ascii=False, indent=1) if settings.json else str(compared))
    if not chats:
        raise DataError("there is no conversation to compare", where=settings.data or data.named)
    if differences:
        wrong = len({one.where for one in differences})
        raise DataError(f"{counted(wrong, 'row')} of {len(chats):,} are not everywhere what was trained")


def _read(settings: Parity) -> tuple[Data, Tokenizer, ChatTemplate, Path]:
    """Returns how rows were trained, with tokenizer and template, and the exported folder."""
    path = Path(settings.run)
    if path.is_file():
        said = _yaml(path)
        data = _data(said, path)
        folder = Path(settings.base or said.get("base", {}).get("dir", ""))
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate(tokenizer, data.template, options=data.template_options)
    else:
        run = find_run(path)
        if run is None or not (run.place / "run.yaml").is_file():
            what = "this is neither a run with its run.yaml nor a YAML file of `litpeft finetune`"
            raise ConfigError(what, where=str(path), hint="name the `--out` of `litpeft finetune`")
        data = _data(_yaml(run.place / "run.yaml"), run.place / "run.yaml")
        folder = run.model_folder() if run.is_model else run.base_folder(settings.base)
        tokenizer, template = run.tokenizer_and_template(folder)
        merged = run.place / "merged"
        if merged.is_dir():
            tell_outdated(merged)
            folder = merged
    return data, tokenizer, template, Path(settings.folder) if settings.folder else folder


def _yaml(path: Path) -> dict[str, Any]:
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"this is no YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if not isinstance(said, dict) or not isinstance(said.get("data"), dict):
        raise ConfigError("it has no group `data`, as a YAML file of `litpeft finetune` has", where=str(path))
    return said


def _data(said: Mapping[str, Any], where: Path) -> Data:
    """Returns the settings of the data set in a YAML file."""
    given = dict(said["data"])
    if isinstance(given.get("path"), list):
        given["path"] = tuple(given["path"])
    try:
        return Data(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: {error}", where=str(where)) from None


def _transformers(folder: Path) -> Any:
    """Returns the tokenizer of a folder as transformers reads it."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        what = "the comparison reads the exported folder with transformers, which is not installed"
        raise ConfigError(what, hint="pip install transformers") from None
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot read the tokenizer: {error}", where=folder) from None
    if theirs.chat_template is None:
        hint = "`litpeft merge` writes the run's template into the folder"
        raise ModelError("the folder has no chat template for other programs", where=folder, hint=hint)
    return theirs


def _thoughtful(turn: Turn) -> bool:
    return turn.trained and bool(thoughts_of(turn))


def _exported(
    row: Row, template: ChatTemplate, theirs: Any, told: Mapping[str, Any], kept: bool
) -> tuple[list[int], list[int]]:
    """Returns a row's ids, and those of transformers; of a row whose thoughts were kept those before its answer."""
    messages = template.messages(row.turns)
    tools = next((list(turn.tools) for turn in row.turns if turn.tools), None)
    own = next((dict(turn.told) for turn in row.turns if turn.told), {})
    if kept:
        messages = messages[:-1]
    ids = theirs.apply_chat_template(messages, tools, add_generation_prompt=kept, return_dict=False, **{**told, **own})
    return (row.ids[: row.prompt_length] if kept else row.ids), ids


def _generated(row: Row, tokenizer: Tokenizer, template: ChatTemplate, kept: bool) -> tuple[list[int], list[int]]:
    """Returns a row's ids up to the end of its last trained answer; and the ids of the prompt for it and the answer."""
    last = max(i for i, turn in enumerate(row.turns) if turn.trained)
    [rendered] = template.spans_of([row.turns], [row.source], keep=kept)
    begin, end = rendered.trained[-1]
    literal = [(a - begin, b - begin) for a, b in rendered.literal if begin <= a and b <= end]
    answer = tokenizer.encode(rendered.text[begin:end], literal)
    trained = row.ids[: len(row.ids) - row.trained[::-1].index(True)]
    return trained, template.prompt(row.turns[:last]) + answer


def _difference(row: Row, by: str, trained: list[int], other: list[int], tokenizer: Tokenizer) -> Difference:
    pairs = zip(trained, other, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(other)))
    around = slice(max(0, at - AROUND), at + AROUND)
    texts = [[tokenizer.decode([number], skip_special=False) for number in ids[around]] for ids in (trained, other)]
    spelt = {word for turn in row.turns for word in tokenizer.special_pattern.findall(turn.content)}
    reason = f"the row spells {min(spelt)}, which is plain text in training" if spelt and by == "exported" else ""
    return Difference(row.source, by, at, *texts, reason)
