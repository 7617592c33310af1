"""Measure a model on rows with known answers, and a run beside its base: loss, and answers that match exactly."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from litpeft.core.errors import ConfigError, DataError, counted
from litpeft.core.extras import extra
from litpeft.core.folders import atomic_file
from litpeft.core.terminal import say, tell
from litpeft.data.batches import Pairs
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.hub.address import address
from litpeft.data.neutral import forgetting, neutral_rows
from litpeft.data.prompts import new_file
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.sources import Source, find, find_measured
from litpeft.data.thinking import answer_of, block, parted, thoughts_of
from litpeft.data.tokenise import load_dataset
from litpeft.exchange.trained_rows import shape_of
from litpeft.generate.draft import Answer
from litpeft.generate.engine import Came, answer_all
from litpeft.generate.kept import Kept, kept, line, marks
from litpeft.generate.load import Loaded, as_base, load_measured, named
from litpeft.generate.settings import Evaluate, Sampling
from litpeft.model.gpt import GPT
from litpeft.model.objective import MICRO_TOKENS, answer_sums, mean_loss

SHOWN = 240  # characters of a text in the terminal


def exactly(
    loaded: Loaded,
    prompts: list[list[int]],
    expected: list[str],
    max_new_tokens: int,
    batch_size: int,
    came: Came = lambda i, answer: None,
    done: Mapping[int, Answer] | None = None,
) -> tuple[list[Answer], list[bool]]:
    """Returns the greedy answers, and whether each is the expected one; thoughts and spaces around it do not count.

    `came` is told of each answer but those that are `done`.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    answers = answer_all(loaded, prompts, batch_size, sampling, loaded.template.stop_ids, came, done)
    return answers, [parted(a.text)[1].strip() == want.strip() for a, want in zip(answers, expected, strict=True)]


@dataclass
class Measured(Data):
    """Rows to measure on: their options stand in no group."""

    prefix: ClassVar[str] = ""


@dataclass
class Score:
    """One model's results on the rows."""

    name: str
    loss: float  # nats per trained token
    answers: list[str]
    exact: list[bool | None]  # None: nothing is asked
    seconds: float
    tokens_per_second: float  # of the answers
    neutral: float | None = None  # loss on neutral text
    preferred: float | None = None  # share of pairs whose chosen answer is more likely per token

    @property
    def share(self) -> str:
        """Returns how many answers are exact."""
        return f"{self.exact.count(True)}/{self.asked}"

    @property
    def percent(self) -> str:
        """Returns the same in percent, to stand behind it."""
        return f" ({self.exact.count(True) / self.asked:.1%})" if self.asked else ""

    @property
    def asked(self) -> int:
        return len(self.exact) - self.exact.count(None)


@dataclass
class Exchange:
    """The last answer of a row that is to be learnt, and what comes before it."""

    before: list[Turn]
    expected: str
    thoughts: str = ""  # that come before it

    @classmethod
    def of(cls, row: Row) -> "Exchange":
        trained = [i for i, turn in enumerate(row.turns) if turn.trained]
        last = ([i for i in trained if row.turns[i].content] or trained or [len(row.turns) - 1])[-1]
        turn = row.turns[last]
        return cls(row.turns[:last], answer_of(turn), thoughts_of(turn))

    @property
    def whole(self) -> str:
        """Returns the answer with its thoughts."""
        return block(self.thoughts, self.expected) if self.thoughts else self.expected

    @property
    def asked(self) -> str:
        """Returns the last message before the answer, as one text."""
        return "\n\n".join(filter(None, (self.before[-1].content, self.before[-1].input))) if self.before else ""


def score(name: str, loaded: Loaded, rows: list[Row], settings: Evaluate, keep: Kept) -> Score:
    """Returns the loss and the greedy answers of a model, each of which is kept."""
    began = time.perf_counter()
    loss = mean_loss(loaded.model, rows, MICRO_TOKENS, loaded.model.embed.weight.device)
    exchanges = [Exchange.of(row) for row in rows]
    numbers = [i for i, row in enumerate(rows) if row.turns[0].role != PLAIN and exchanges[i].expected]
    prompts = []
    for i in numbers:
        try:
            prompts.append(loaded.template.prompt(exchanges[i].before, rows[i].source))
        except ValueError as error:
            raise DataError(f"the row cannot be asked: {error}", where=rows[i].source) from None
    expected = [exchanges[i].expected for i in numbers]

    def came(number: int, answer: Answer) -> None:
        row = {"folder": settings.model, "source": rows[numbers[number]].source, "expected": expected[number]}
        keep.add(row | {name: {"answer": answer.text.strip()}}, of[number], answer)

    asked = time.perf_counter()
    of = marks(settings, name, loaded, prompts, Sampling(max_new_tokens=settings.max_new_tokens))
    done = keep.done(of)
    found, exact = exactly(loaded, prompts, expected, settings.max_new_tokens, settings.batch_size, came, done)
    ended = time.perf_counter()
    speed = sum(len(answer.ids) for i, answer in enumerate(found) if i not in done) / (ended - asked)
    answers = dict(zip(numbers, zip((answer.text.strip() for answer in found), exact, strict=True), strict=True))
    texts, rights = zip(*(answers.get(i, ("", None)) for i in range(len(rows))), strict=True)
    texts_of = neutral_rows(settings.neutral, loaded.template, loaded.model.reach, "neutral")
    device = loaded.model.embed.weight.device
    neutral = mean_loss(loaded.model, texts_of, MICRO_TOKENS, device) if texts_of else None
    preferred = share_preferred(loaded.model, rows) if settings.pairs else None
    return Score(name, loss, list(texts), list(rights), ended - began, speed, neutral, preferred)


def share_preferred(model: GPT, rows: Sequence[Row]) -> float:
    """Returns the share of pairs whose chosen answer has the higher log p per token; a tie counts half."""
    means = answer_sums(model, rows, MICRO_TOKENS, model.embed.weight.device) / Pairs.of(rows).counts
    return float((means[:, 0] - means[:, 1]).sign().mean() / 2 + 0.5)


def evaluate(settings: Evaluate) -> None:
    """The command `litpeft evaluate`."""
    if settings.tasks:
        extra("lm_eval", "a task", "tasks")
        from litpeft.generate.harness import evaluate_tasks

        return evaluate_tasks(settings)
    output = new_file(settings.output, ".jsonl")
    names = named(settings)
    with kept(output, settings.resume) as keep:
        rows, scores = measure(settings, keep)
        if len(names) > 1:
            scores[-1].name = next(iter(names))
        for name, path in list(names.items())[1:]:
            (score,) = measure(replace(settings, model=path, compare_base=False, method={}), keep)[1]
            scores.append(replace(score, name=name))
        say(table(scores, rows, settings.samples))
        if output is not None:
            with atomic_file(output) as handle:
                for i, row in enumerate(rows):
                    record = {"source": row.source, "expected": Exchange.of(row).expected}
                    record |= {s.name: {"answer": s.answers[i], "exact": s.exact[i]} for s in scores}
                    handle.write(line(record))


def measure(settings: Evaluate, keep: Kept | None = None) -> tuple[list[Row], list[Score]]:
    """Returns the rows, and the results of the model on them; before those of a run stand its base's, if asked for.

    `keep` keeps each answer as it comes.
    """
    keep = keep or Kept()
    loaded = load_measured(settings)
    template = loaded.run.template if loaded.run else "auto"
    reach = loaded.model.reach

    def read(sources: list[Source], shots: list[Row]) -> list[Row]:
        thinking = settings.thinking or (loaded.run.thinking if loaded.run else "error")
        shape = shape_of(settings, loaded.run, sources) | {"thinking": thinking}
        names = tuple(map(str, sources))
        data = Measured(names, None, 0.0, **shape, template=template, system=loaded.system, max_length=reach)
        found = load_dataset(data, loaded.tokenizer, loaded.template, reach, True, shots, settings.pairs)
        of_hub = [f"{name}: {rows}" for name, rows in found.report.files.items() if address(name)]
        for note in (*of_hub, *found.report.notes):
            tell(note)
        return found.train

    shots = read([shots_file(settings)], [])[: settings.shots] if settings.shots else []
    rows = read(find_measured(settings.data), shots)[: settings.max_rows]
    scores = [score("finetuned" if loaded.run else "model", loaded, rows, settings, keep)]
    if loaded.run and settings.compare_base:
        with as_base(loaded, settings):
            scores.insert(0, score("base", loaded, rows, settings, keep))
    return rows, scores


def shots_file(settings: Evaluate) -> Source:
    """Returns the file whose first rows are the shots."""
    hub = address(settings.data)
    whole = Path(settings.data).is_dir() if hub is None else not hub.rest
    if settings.shots_from is None and not whole:
        what = "the rows for shots are not named, and data is a file"
        raise ConfigError(what, where="shots_from", hint="name a file of rows, not those that are measured")
    return find(settings.shots_from or settings.data, None)[0][0]


def table(scores: list[Score], rows: list[Row], samples: int) -> str:
    """Returns the figures of the models side by side, and the answers to the first rows."""
    figures = {
        counted(len(rows), "row"): [s.name for s in scores],
        "exact answers": [s.share + s.percent for s in scores],
        "loss, nats per token": [f"{s.loss:.4f}" for s in scores],
        "seconds": [f"{s.seconds:.1f}" for s in scores],
    }
    if scores[0].preferred is not None:
        figures["preferred"] = [f"{s.preferred:.1%}" for s in scores]
    if scores[0].neutral is not None:
        figures["neutral text, nats"] = [f"{s.neutral:.4f}" for s in scores]
    lines = [f"{name:<22}" + "".join(f"{value:>18}" for value in values) for name, values in figures.items()]
    if scores[0].neutral is not None and scores[0].name == "base":
        lines += ["", *(f"{s.name}: {forgetting(scores[0].neutral, s.neutral)}" for s in scores[1:])]
    for i, row in enumerate(rows[:samples]):
        exchange = Exchange.of(row)
        texts = {"row": row.source, "asked": exchange.asked, "expected": exchange.expected}
        texts |= {s.name: s.answers[i] for s in scores}
        lines += ["", *(f"{name:<10} {one_line(text)}" for name, text in texts.items())]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Returns the beginning of a text as one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({counted(len(text) - SHOWN, 'more character')})"
