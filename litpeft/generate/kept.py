"""Answers kept on disk while the others are written, so that an interrupt, an error or a kill loses none.

They are in a file beside the output: out.part where that is out.jsonl. Each stands in its row, as it was answered: one
model after the other, the longest prompts first. What the row has under "kept" lets the command go on with it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, DataError, counted
from litpeft.core.place import disk_fault
from litpeft.core.terminal import tell
from litpeft.generate.draft import Answer
from litpeft.generate.load import Loaded
from litpeft.generate.settings import Answering, Sampling

KEY = "kept"


def line(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of JSON Lines."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def marks(
    settings: Answering, name: str, loaded: Loaded, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[str]:
    """Returns what tells each answer of a model from those of other files, prompts, their tokens, or settings."""
    folder = Path(settings.model) if loaded.run is None else loaded.run.folder
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".model"))
    held = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    model = [name, str(folder.resolve()), held, settings.precision, settings.quantize, settings.method]
    model = json.dumps([*model, sorted(loaded.template.stop_ids)], default=str)

    def mark(number: int, prompt: Sequence[int]) -> str:
        drawn = replace(sampling, seed=sampling.seed + number if sampling.temperature else 0)
        return hashlib.sha256(json.dumps([model, list(prompt), asdict(drawn)]).encode()).hexdigest()

    return [mark(number, prompt) for number, prompt in enumerate(prompts)]


class Kept:
    """The answers in such a file, by their marks; without one, none."""

    def __init__(self, part: Path | None = None):
        self.part, self.count = part, 0
        self.found: dict[str, Answer] = {}
        self.used: set[str] = set()  # marks of those that belong to this command

    def read(self) -> None:
        """Reads the answers of a command that was stopped; half a line at the end, of a kill, is cut off."""
        with open(self.part, "r+b") as file:
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)
        for number, row in enumerate(text.split(b"\n")[:-1], 1):
            try:
                kept = json.loads(row)[KEY]
                self.found[kept["mark"]] = Answer(list(kept["ids"]), str(kept["text"]), str(kept["reason"]))
            except (ValueError, KeyError, TypeError):
                what = "the line is none that `litpeft generate` or `evaluate` keeps"
                raise DataError(what, where=f"{self.part}:{number}", hint="remove the file") from None
        self.count = len(self.found)

    def done(self, marks: Sequence[str]) -> dict[int, Answer]:
        """Returns the answers that are there already, by the numbers of the `marks`."""
        done = {number: self.found[mark] for number, mark in enumerate(marks) if mark in self.found}
        self.used |= {mark for mark in marks if mark in self.found}
        if self.found and not self.used:
            what = "none of its answers is what this command would write: the model, the prompts or settings are others"
            raise ConfigError(what, where=self.part, hint="move or remove it, or name another output")
        if done:
            tell(f"{counted(len(done), 'answer')} of {len(marks)} from {self.part}")
        return done

    def add(self, row: Mapping[str, Any], mark: str, answer: Answer) -> None:
        """Adds an answer, which is in its row, to the file."""
        if self.part is None:
            return
        try:
            with open(self.part, "a", encoding="utf-8") as handle:
                handle.write(line({**row, KEY: {"mark": mark, **asdict(answer)}}))
        except OSError as error:
            raise disk_fault(error, self.part) or error from None
        self.count += 1


@contextmanager
def kept(output: Path | None, resume: bool) -> Iterator[Kept]:
    """Yields what keeps answers beside `output`, which the block writes at its end; with those of before to `resume`.

    The file is removed if the block succeeds and all that it keeps is in the output; else the user is told.
    """
    if output is None:
        yield Kept()
        return
    answers = Kept(output.with_suffix(".part"))  # no longer than `output`, whose name may be as long as a name can be
    if answers.part.exists() and answers.part.stat().st_size:
        if not resume:
            what = f"{answers.part} holds answers of a run that was stopped"
            raise ConfigError(what, where="output", hint="--resume goes on with them; or move or remove the file")
        answers.read()
    try:
        yield answers
    except BaseException:
        if answers.count and (answers.used or not answers.found):
            told = f"{counted(answers.count, 'answer')} kept in {answers.part}; {output} was not made"
            tell(f"{told}; the same command with --resume goes on with them")
        raise
    if others := answers.found.keys() - answers.used:
        of = "answers prompts or settings that this command does not have"
        tell(f"warning: {answers.part} stays: {counted(len(others), 'line')} of it {of}")
    else:
        answers.part.unlink(missing_ok=True)
