"""What a run minimises: -log p of its rows, or the losses of its pairs of answers; and how it measures that."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, counted
from litpeft.data.batches import Batch, Pairs, collate, collate_pairs, idle, idle_pairs, pair_weight, plan_epoch
from litpeft.data.preference import Preference
from litpeft.data.rows import Row, totals
from litpeft.data.store import Rows
from litpeft.model.objective import MICRO_TOKENS, answer_sums, mean_loss, summed_pair_loss
from litpeft.model.preference import losses_of, margins_of
from litpeft.train.checkpoints import Checkpoint
from litpeft.train.log import PairFigures
from litpeft.train.preparation import Preparation
from litpeft.train.step import SummedLoss

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

STEM = "references"  # of the file of a checkpoint


@dataclass(frozen=True)
class Measured:
    """A measurement on held-out rows."""

    loss: float
    pairs: PairFigures | None = None


class Objective:
    """-log p of rows: the weighted mean over their trained tokens."""

    loss: SummedLoss | None = None  # of a micro-batch; None: that of model/objective.py
    told = ""  # of the model at the run's start, for the log

    @classmethod
    def of(cls, run: Preparation) -> "Objective":
        """Returns the objective of a run."""
        return cls() if run.settings.preference.loss is None else PairObjective(run)

    def batch(self, rows: list[Row], any_row: Row, frame: tuple[int, int]) -> Batch:
        """Returns rows as a micro-batch; of none one that trains nothing, with `any_row` in it."""
        return collate(rows, *frame) if rows else idle(any_row, *frame)

    def totals(self, rows: list[Row]) -> tuple[int, float]:
        """Returns how many tokens of rows are trained, and what their summed loss is divided by."""
        return totals(rows)

    def measure(self, model: torch.nn.Module, rows: Rows, tokens: int, fabric: "Fabric") -> Measured:
        """Returns what the model makes of held-out rows, in passes of so many tokens."""
        return Measured(mean_loss(model, rows, tokens, fabric.device, fabric))

    def begin(self, model: torch.nn.Module, held_out: int, fabric: "Fabric") -> None:
        """Measures the model before the first step, of the held-out rows the first ones, if the losses refer to it."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns what checkpoints keep, by the stem of the file."""
        return {}

    def resume(self, saved: Checkpoint) -> int | None:
        """Takes over what a checkpoint has; returns how many held-out rows can be measured, None if all can."""


@dataclass
class PairObjective(Objective):
    """The losses of pairs: their weighted mean. `references` has what was measured before the first step."""

    run: Preparation
    references: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.preference: Preference = self.run.settings.preference
        self.loss = partial(summed_pair_loss, preference=self.preference)

    def batch(self, rows: list[Row], any_row: Row, frame: tuple[int, int]) -> Batch:
        return collate_pairs(rows, *frame) if rows else idle_pairs(any_row, *frame)

    def totals(self, rows: list[Row]) -> tuple[int, float]:
        trained = sum(sum(one.trained) for row in rows for one in row.documents)
        return trained, sum(map(pair_weight, rows))

    def measure(self, model: torch.nn.Module, rows: Rows, tokens: int, fabric: "Fabric") -> Measured:
        pairs, sums = Pairs.of(rows), answer_sums(model, rows, tokens, fabric.device, fabric)
        given = self.preference, sums, pairs.counts, pairs.references
        losses, margins = losses_of(*given), margins_of(*given)
        preferred = (margins > 0).double().mean() + (margins == 0).double().mean() / 2
        loss = (losses * pairs.weights).sum() / pairs.weights.sum()
        return Measured(float(loss), PairFigures(len(rows), float(preferred), float(margins.mean())))

    def begin(self, model: torch.nn.Module, held_out: int, fabric: "Fabric") -> None:
        if not self.preference.refers:
            return
        rows, tokens = self.run.rows, self.run.settings.train.micro_tokens
        passes = MICRO_TOKENS if tokens == "auto" else tokens, fabric.device, fabric
        places = self.needed()
        _, first = np.unique(rows.train.column("at")[places], return_index=True)  # a file's weight repeats its rows
        places = np.sort(places[first])
        self.references = {
            "places": torch.from_numpy(places),
            "train": answer_sums(model, rows.train.where(places), *passes),
            "validation": answer_sums(model, rows.validation[:held_out], *passes),
        }
        self.told = f"log p of the answers of {counted(len(places) + held_out, 'pair')} with the model as it begins"
        self.apply()

    def needed(self) -> np.ndarray:
        """Returns the places of the rows that the run trains on, fewer than all if it ends within an epoch."""
        settings, rows = self.run.settings, self.run.rows.train
        lengths = rows.column("tokens") if settings.data.group_by_length else None
        plan = plan_epoch(len(rows), settings.train.batch_size, 0, settings.data.seed, lengths)
        if len(plan) <= self.run.steps:
            return np.arange(len(rows))
        return np.unique([place for step in range(self.run.steps) for place in plan[step]])

    def apply(self) -> None:
        """Gives the rows their references."""
        rows, known = self.run.rows, {name: tensor.numpy() for name, tensor in self.references.items()}
        rows.train = rows.train.referenced(known["places"], known["train"])
        rows.validation = rows.validation.referenced(np.arange(len(known["validation"])), known["validation"])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {STEM: self.references} if self.references else {}

    def resume(self, saved: Checkpoint) -> int | None:
        if not self.preference.refers:
            return None
        self.references = {name: tensor.clone() for name, tensor in saved.tensors(STEM).items()}  # the file may go
        places, at = self.references["places"].numpy(), self.run.rows.train.column("at")
        if missing := int((~np.isin(at[self.needed()], at[places])).sum()):
            what = f"{counted(missing, 'pair')} to train on were not measured before the first step"
            hint = "resume it with the settings that it began with, or take another out"
            raise ConfigError(what, where="preference.loss", hint=hint)
        self.apply()
        return len(self.references["validation"])
