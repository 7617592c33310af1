"""Settings of learning from pairs of answers; model/preference.py has the losses."""

import math
from dataclasses import dataclass
from typing import Literal

from litpeft.core.kinds import check_choices

READ = {  # which settings a loss reads
    "beta": ("dpo", "ipo", "simpo", "orpo"),
    "margin": ("simpo",),
    "smoothing": ("dpo", "simpo"),
    "likelihood": ("dpo", "ipo", "simpo"),
}


@dataclass
class Preference:
    """Pairs of answers, of which the chosen one shall become more likely than the rejected one."""

    loss: Literal["dpo", "ipo", "simpo", "orpo"] | None = None
    """What is learned from rows with prompt, chosen and rejected: null trains the chosen answers alone; dpo and ipo
    compare with the model as the run begins; simpo and orpo do without it."""
    beta: float | None = None
    """dpo and ipo: how near to the model of the start the result stays, larger is nearer; simpo: the steepness; orpo:
    the weight of the odds beside the chosen answer's loss. Default: 0.1, with simpo 2."""
    margin: float | None = None
    """simpo: by how much the chosen answer shall win. Default: 1."""
    smoothing: float = 0.0
    """dpo and simpo: the share of pairs whose answers may be the wrong way round, from 0 to below 0.5."""
    likelihood: float = 0.0
    """dpo, ipo and simpo: the weight of the chosen answer's own loss per token, which keeps it likely."""

    def __post_init__(self) -> None:
        check_choices(self, "preference.")
        for name, losses in READ.items():
            value = getattr(self, name)
            if value != getattr(Preference, name) and self.loss not in losses:
                known, got = " or ".join(losses), "null" if self.loss is None else self.loss
                raise ValueError(f"preference.{name} is used only with preference.loss {known}, which is {got}")
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"preference.{name} must be a finite number of at least 0, got {value}")
        if self.beta == 0:
            raise ValueError("preference.beta must be above 0, got 0")
        if self.smoothing >= 0.5:
            raise ValueError(f"preference.smoothing must be below 0.5, got {self.smoothing}")

    @property
    def refers(self) -> bool:
        """Whether the loss compares with the model as the run begins."""
        return self.loss in ("dpo", "ipo")

    @property
    def steepness(self) -> float:
        """beta, or its default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1
