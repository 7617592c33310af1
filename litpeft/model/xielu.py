"""xIELU, an activation with two numbers that train: a parabola above 0, an exponential below.

    y = p x^2 + b x  for x > 0,  else  n (exp(min(x, e)) - 1 - x) + b x

    p = softplus(alpha_p), n = b + softplus(alpha_n)

https://arxiv.org/abs/2411.13010
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class XIELU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = nn.Parameter(torch.full((1,), 0.2)), nn.Parameter(torch.full((1,), -1.05))
        self.register_buffer("beta", torch.tensor(0.5))  # the files hold both
        self.register_buffer("eps", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        beta, eps = self.beta.to(x.dtype), self.eps.to(x.dtype)
        p, n = F.softplus(self.alpha_p.to(x.dtype)), beta + F.softplus(self.alpha_n.to(x.dtype))
        below = (torch.expm1(torch.minimum(x, eps)) - x) * n + beta * x
        return torch.where(x > 0, p * x * x + beta * x, below)
