"""A conversation with a model: what was said, who answers, and what can be undone."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from litpeft.core.errors import ConfigError, DataError, UserError, quoted
from litpeft.core.folders import atomic_file
from litpeft.data.formats.turn import Turn
from litpeft.data.templates import with_system
from litpeft.data.thinking import closed
from litpeft.generate.batch import Batch
from litpeft.generate.draft import Answer
from litpeft.generate.engine import stream
from litpeft.generate.load import Loaded
from litpeft.generate.settings import Sampling
from litpeft.model.delta import without_delta

MARK = "\U000f0000"  # a character that no template writes


class Session:
    """The messages so far and the model that answers the next one: one of those loaded, or its base.

    What an answer depends on is all in here: the messages and, for the draws, how many exchanges there are. So a
    conversation that went back to an earlier state goes on from there as it did before.
    """

    def __init__(self, models: dict[str, Loaded], system: str | None, sampling: Sampling):
        self.models, self.name, self.sampling = models, next(iter(models)), sampling
        self.given = system  # the system message; None: the one that the model was trained with
        self.turns: list[Turn] = []  # user and assistant by turns
        self.on_base = False
        self.batches: dict[tuple[str, bool], Batch] = {}  # keys differ from model to model
        self.written: Path | None = None  # the last file that was saved

    @property
    def loaded(self) -> Loaded:
        """Returns the model that answers, if its base does not."""
        return self.models[self.name]

    @property
    def system(self) -> str | None:
        """Returns the system message."""
        return self.loaded.system if self.given is None else self.given

    def ask(self, text: str, show: Callable[[str], None]) -> Answer:
        """Returns the answer to `text`, shown as it comes. Ctrl-C ends it and keeps its text so far."""
        question = Turn("user", text)
        try:
            prompt = self.loaded.template.prompt(with_system([*self.turns, question], self.system))
        except ValueError as error:
            raise DataError(str(error)) from None
        reach = self.loaded.model.reach
        if len(prompt) >= reach:
            what = f"the conversation has {len(prompt)} tokens; the model reaches {reach}, its answer included"
            raise DataError(what, hint="/reset starts anew, /undo drops the last exchange")
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.turns) // 2)
        stop_ids = self.loaded.template.stop_ids
        batch = self.batches.setdefault((self.name, self.on_base), Batch(self.loaded.model, 1))
        answer, pieces = stream(batch, prompt, self.loaded.tokenizer, sampling, stop_ids)
        try:
            with without_delta(self.loaded.model) if self.on_base else nullcontext():
                for piece in pieces:
                    show(piece)
        except KeyboardInterrupt:
            answer.reason = "interrupted"
        if answer.text or answer.reason != "interrupted":
            self.turns += [question, Turn("assistant", closed(answer.text))]
        return answer

    def instruct(self, system: str) -> None:
        """Takes another system message, an empty one for none; refuses one that the template refuses."""
        before, self.given = self.given, system
        try:
            self.opening()
        except UserError:
            self.given = before
            raise

    def opening(self) -> str:
        """Returns what the model reads before the user's first message: what was given, and what the template adds."""
        try:
            return self.loaded.template.render(with_system([Turn("user", MARK)], self.system)).partition(MARK)[0]
        except ValueError as error:
            raise DataError(str(error), where="/system") from None

    def undo(self) -> str:
        """Drops the last exchange; returns what the user had said."""
        if not self.turns:
            raise ConfigError("there is nothing to undo", where="/undo")
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        return question.content

    def use(self, name: str) -> None:
        """Lets another of the models answer from now on, in the same conversation."""
        if name not in self.models:
            hint = f"there is {', '.join(self.models)}; --also loads more"
            raise ConfigError(f"no model is called {quoted(name)}", where="/use", hint=hint)
        self.name, self.on_base = name, False

    def switch(self) -> bool:
        """Lets the other of finetuned model and base answer; returns whether that is the base."""
        if not self.loaded.has_delta:
            raise ConfigError("this model has no finetuned part that could be switched off", where="/base")
        self.on_base = not self.on_base
        return self.on_base

    def save(self, name: str, overwrite: bool = False) -> Path:
        """Writes the messages as a data set of one row, by default where they were written before; returns the path.

        A file that this conversation has not written is replaced only with `overwrite`.
        """
        if not self.turns:
            raise ConfigError("there is nothing to save", where="/save")
        path = Path(name) if name else self.written or Path(f"chat-{datetime.now():%Y%m%d-%H%M%S}.json")
        try:
            path = path.expanduser()
            taken = path.exists() and path.absolute() != self.written
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"this is no file name: {error}", where="/save") from None
        if taken and not overwrite:
            hint = f"name another, or replace it: /save --overwrite {path}"
            raise ConfigError("the file exists", where=str(path), hint=hint)
        with atomic_file(path) as handle:
            messages = [{"role": turn.role, "content": turn.content} for turn in with_system(self.turns, self.system)]
            json.dump([{"messages": messages}], handle, ensure_ascii=False, indent=2)
            handle.write("\n")
        self.written = path.absolute()
        return path
