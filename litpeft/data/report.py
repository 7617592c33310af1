"""The report on a data set: figures and warnings about what became of its rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from litpeft.core.errors import counted, some
from litpeft.core.terminal import clean
from litpeft.data.formats import FORMATS
from litpeft.data.formats.keys import listed
from litpeft.data.kept import Thoughts
from litpeft.data.readers.record import Rejected
from litpeft.data.store import Rows

PAIRS = "; the chosen and the rejected answer are compared"


@dataclass
class Counts:
    """Totals of rows."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0  # tokens
    ended: int = 0  # rows whose end-of-turn token is trained

    @classmethod
    def of(cls, rows: Rows) -> "Counts":
        tokens, longest = int(rows.column("tokens").sum()), int(rows.column("longest").max(initial=0))
        trained, ended = int(rows.column("trained").sum()), int(rows.column("ended").sum())
        return cls(len(rows), tokens, trained, longest, ended)

    def __str__(self) -> str:
        if not self.rows:
            return "none"
        share, ended = self.trained / self.tokens, self.ended / self.rows
        return (
            f"{counted(self.rows, 'row')}, {counted(self.tokens, 'token')}, {self.trained:,} trained ({share:.1%}); "
            f"longest {self.longest:,}; end-of-turn token trained in {ended:.1%} of the rows"
        )


@dataclass
class Weights:
    """The rows whose tokens do not all have the weight 1 in the loss."""

    rows: int = 0
    least: float = 0.0  # of the weights of their trained tokens
    most: float = 0.0

    def add(self, weights: Iterable[float]) -> None:
        """Counts a row with these weights of its trained tokens in."""
        weights = [*weights, *([self.least, self.most] if self.rows else [])]
        self.rows, self.least, self.most = self.rows + 1, min(weights), max(weights)

    def __str__(self) -> str:
        """Returns the line of the report; "" if there are none."""
        if not self.rows:
            return ""
        span = f"{self.least:.6g}" if self.least == self.most else f"from {self.least:.6g} to {self.most:.6g}"
        return f"{counted(self.rows, 'row')} with weights in the loss, {span}"


@dataclass
class Report:
    """What became of every row of the files; `str` of it is printed."""

    template: str  # its name
    max_length: int  # tokens, the limit that was applied
    train: Counts = field(default_factory=Counts)
    validation: Counts = field(default_factory=Counts)
    files: dict[str, str] = field(default_factory=dict)  # file -> what became of it, where there are several
    formats: Counter[str] = field(default_factory=Counter)  # format -> rows
    rejected: list[Rejected] = field(default_factory=list)  # rows that cannot be used
    dropped: list[Rejected] = field(default_factory=list)  # over-long rows left out
    split_rows: int = 0  # over-long rows that were split
    split_pieces: int = 0  # their pieces that are trained
    empty_pieces: int = 0  # their pieces without a trained token, left out
    straddling: int = 0  # rows with a token across the end of a prompt and the start of its answer
    duplicates: int = 0  # held-out rows that are among the rows to train on
    repeated: int = 0  # rows to train on that are the same as one before, token by token
    lost: int = 0  # trained tokens of the rows that are left out for their length
    unread: Counter[str] = field(default_factory=Counter)  # key that no format reads -> rows with it
    unlike: list[str] = field(default_factory=list)  # file:line of rows that begin otherwise than the answer's prompt
    difference: str = ""  # how the first of these differs
    streamed: bool = False  # `train` are those of the first window
    cache: str = ""  # the file that the rows were read from, if they were not tokenised now
    thoughts: Thoughts = field(default_factory=Thoughts)
    weights: Weights = field(default_factory=Weights)
    pairs: bool = False  # rows are pairs of answers, both of which are trained

    def __str__(self) -> str:
        lines = [f"file        {name}: {told}" for name, told in self.files.items()]
        notes = {name: f"; {one.note}" for name, one in FORMATS.items() if one.note}
        notes |= {"preference": PAIRS} if self.pairs else {}
        shapes = [f"{name} ({counted(n, 'row')}{notes.get(name, '')})" for name, n in self.formats.most_common()]
        lines += [f"format      {', '.join(shapes)}"] if shapes else []
        first = "the first window of a stream: " if self.streamed else ""
        lines += [f"train       {first}{self.train}", f"validation  {self.validation}", f"template    {self.template}"]
        lines += [f"tokens      read from {self.cache} (data.cache)"] if self.cache else []
        return "\n".join([*lines, *self.notes])

    @property
    def notes(self) -> list[str]:
        """Returns the warnings, a line each."""
        long = f"longer than {self.max_length:,} tokens"

        def out(rows: list[Rejected]) -> str:
            named = some([f"{row.where} ({row.reason})" for row in rows])
            return f"left out: {named}; the run's rejected.jsonl lists them"

        notes = {
            f"not read    the keys {listed(self.unread)}": self.unread,
            f"thinking    {self.thoughts}": self.thoughts.answers,
            f"weights     {self.weights}": self.weights.rows,
            f"warning: {counted(len(self.rejected), 'row')} cannot be used, {out(self.rejected)}": self.rejected,
            f"warning: {counted(len(self.dropped), 'row')} {long}, {out(self.dropped)}": self.dropped,
            f"warning: {counted(self.split_rows, 'row')} {long}, cut into {counted(self.split_pieces, 'piece')}; "
            f"{self.empty_pieces:,} more with nothing to train": self.split_rows,
            f"warning: in {counted(self.straddling, 'row')} a token lies across the end of a prompt and the start of "
            "an answer; it is trained": self.straddling,
            f"warning: in {counted(len(self.unlike), 'row')} the prompt that asks for the answer is not how the row "
            f"begins: {self.difference} ({some(self.unlike)})": self.unlike,
            f"warning: the rows to train on hold {counted(self.duplicates, 'held-out row')}": self.duplicates,
        }
        return [clean(note).replace("\n", " ") for note, present in notes.items() if present]
