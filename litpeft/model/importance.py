"""How much the loss depends on each number of a Delta, smoothed over the steps of a training.

importance of a number t:  I <- 0.85 I + 0.15 |t dloss/dt|,  U <- 0.85 U + 0.15 ||t dloss/dt| - I|;  I U
"""

from torch import Tensor

from litpeft.core.distributed import gather
from litpeft.model.slots import LowRankDelta, Start

BETA = 0.85  # share of the old in the moving averages


class Weighed(LowRankDelta):
    """A low-rank update with moving averages of |t dloss/dt| and of its distance from them for each number t."""

    def weighed_tensor(self, name: str, shape: tuple[int, ...], start: Start) -> None:
        """Adds a parameter, as `tensor` does, whose numbers have an importance."""
        self.tensor(name, shape, start)
        self.buffer(f"{name}_importance", shape, 0.0, kept="checkpoint")
        self.buffer(f"{name}_uncertainty", shape, 0.0, kept="checkpoint")

    def observe(self) -> None:
        """Brings the averages up to date with the gradients."""
        for name, parameter in self.named_parameters(recurse=False):
            average, uncertainty = self.get_buffer(f"{name}_importance"), self.get_buffer(f"{name}_uncertainty")
            now = (gather(parameter) * gather(parameter.grad)).abs()
            average.lerp_(now, 1 - BETA)
            uncertainty.lerp_((now - average).abs(), 1 - BETA)

    def importance_of(self, name: str) -> Tensor:
        """Returns the importance of each number of a parameter."""
        return self.get_buffer(f"{name}_importance") * self.get_buffer(f"{name}_uncertainty")
