"""What the rounding of a merged model costs: the change of the loss on rows that its run held out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from litpeft.core.errors import UserError, counted, scaled
from litpeft.core.terminal import command_line
from litpeft.core.typed import typed
from litpeft.data.hub.address import address
from litpeft.data.readers import STDIN
from litpeft.data.rows import Row, totals
from litpeft.data.settings import Data
from litpeft.data.sources import find
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.exchange.run import Run

Logits = Callable[[list[list[int]]], Tensor]  # of prompts one after the other (tokens, V)

WORK = 1e11  # multiplications of weights for one model, of which follows how many tokens are read
FEWEST, MOST = 256, 2048  # tokens, whatever the size of the model
TOGETHER = 256  # tokens whose logits are held at one time
LARGEST = 1 << 26  # bytes of files of rows: larger ones are not read for this
SMALL, LARGE = 1e-3, 1e-2  # nats per token: less than the first is not noticed, more than the second is


class Unknown(Exception):
    """There are no held-out rows to measure on; the text says why."""


@dataclass
class HeldOut:
    """Rows that a run held out."""

    rows: list[Row]
    total: int  # how many it held out

    @classmethod
    def of(cls, run: Run, tokenizer: object, template: ChatTemplate, reach: int, parameters: int) -> "HeldOut":
        """Returns as many of the run's held-out rows as are read in bounded time; raises Unknown."""
        path = run.place / "run.yaml"
        if not path.exists():
            raise Unknown("there is no run.yaml beside the result, which says where its rows are")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            data = typed(Data, settings["data"], "data")
            most = settings["validation"]["max_rows"]
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
            raise Unknown(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
        if STDIN in data.paths:
            raise Unknown("its rows came from standard input")
        if any(address(one) for one in (*data.paths, data.validation_path) if one):
            raise Unknown(
                "its rows are of the hub, and nothing is fetched for this; `litpeft evaluate` measures on them"
            )
        try:
            sources, files = find(data.path, data.validation_path)
            if not files and not data.validation_split:
                raise Unknown("the run held out no row")
            size = sum(source.path.stat().st_size for source in files or sources)
            if size > LARGEST:
                raise Unknown(f"its rows are {scaled(size, 'B')}, which is more than is read for this")
            if files:  # the rows to train on need not be read
                data = replace(data, path=tuple(map(str, files)), validation_path=None, validation_split=0.0)
            found = load_dataset(data, tokenizer, template, reach)
        except (UserError, OSError) as error:
            said = error.what if isinstance(error, UserError) else error.strerror
            raise Unknown(f"its rows cannot be read: {said}") from None
        rows = (found.train if files else found.validation)[:most]
        tokens, kept = min(MOST, max(FEWEST, int(WORK / parameters))), []
        for row in rows:
            tokens -= len(row.ids)
            if kept and tokens < 0:
                break
            kept.append(row)
        if not any(sum(row.trained) for row in kept):
            raise Unknown("the run held out no row")
        return cls(kept, len(rows))

    def loss(self, logits: Logits) -> float:
        """Returns nats per trained token, by their weights."""
        total = 0.0
        for rows in self.groups():
            found, at = logits([row.ids for row in rows]), 0
            for row in rows:
                trained = torch.tensor(row.trained)[1:]
                own, at = found[at : at + len(row.ids) - 1][trained].float(), at + len(row.ids)
                weights = torch.tensor(row.trained if row.weights is None else row.weights)[1:][trained]
                losses = F.cross_entropy(own, torch.tensor(row.ids)[1:][trained], reduction="none")
                total += float((losses * weights).sum())
        return total / totals(self.rows)[1]

    def groups(self) -> Iterator[list[Row]]:
        """Yields rows that are read together."""
        group: list[Row] = []
        for row in self.rows:
            if group and sum(len(one.ids) for one in (*group, row)) > TOGETHER:
                yield group
                group = []
            group.append(row)
        yield group

    def lines(self, before: float, after: float, name: str, exact: str, out: Path | None) -> list[str]:
        """Returns what the losses of the run and of the written files say, to print; `out` is a folder to evaluate."""
        which = counted(len(self.rows), "held-out row") if len(self.rows) == self.total else "held-out rows"
        which = which if len(self.rows) == self.total else f"the first {len(self.rows):,} of {self.total:,} {which}"
        said = f"loss on {which}: {before:.4f} nats per token by the run, {after:.4f} by the files in {name}"
        cost = round(after - before, 4) + 0.0  # no minus sign before zeros
        if cost < SMALL:
            meaning = "answers are as good as the run's"
        elif cost < LARGE:
            compared = "" if out is None else f"compare answers with `{command_line('evaluate', out, 'ROWS')}`, or "
            meaning = f"little: {compared}{exact} has none of it"
        else:
            meaning = f"a part of what was learned is lost: {exact} keeps it"
        return [said, f"  so rounding costs {cost:+.4f}: {meaning}"]
