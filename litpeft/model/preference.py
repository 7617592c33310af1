"""Learning which of two answers to a prompt is the better one: the losses of pairs, for any method.

    s_c, s_r   log p of the chosen and of the rejected answer: the sum over its trained tokens
    |c|, |r|   the number of these tokens
    ref        s of the model as the run begins, measured once
    m          the margin; the chosen answer is preferred where it is above 0

Each loss has a margin of its own:

    dpo     m = beta [(s_c - ref_c) - (s_r - ref_r)]            loss = -(1 - e) log sigma(m) - e log sigma(-m)
    ipo     m = beta [(s_c - ref_c)/|c| - (s_r - ref_r)/|r|]    loss = (m / beta - 1 / (2 beta))^2
    simpo   m = beta (s_c/|c| - s_r/|r|)                        loss = -(1 - e) log sigma(m - g) - e log sigma(g - m)
    orpo    m = log odds(s_c/|c|) - log odds(s_r/|r|)           loss = -s_c/|c| - beta log sigma(m)

e is `smoothing`, g is the setting `margin`, and log odds(l) = l - log(1 - exp(l)). IPO takes means over tokens, as TRL
does. `likelihood` times -s_c/|c| is added to dpo, ipo and simpo; orpo has this term already.

DPO https://arxiv.org/abs/2305.18290, with smoothing (cDPO) https://ericmitchell.ai/cdpo.pdf,
IPO https://arxiv.org/abs/2310.12036, SimPO https://arxiv.org/abs/2405.14734, ORPO https://arxiv.org/abs/2403.07691,
the added weight (RPO) https://arxiv.org/abs/2404.19733
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.data.preference import Preference

SURE = -1e-12  # mean log p above which the odds are taken as those of it: those of 0 are infinite


def margins_of(preference: Preference, sums: Tensor, counts: Tensor, references: Tensor | None) -> Tensor:
    """Returns m (P,) for log p of the chosen and the rejected answers, `sums` (P, 2), of `counts` tokens (P, 2)."""
    if preference.refers:
        assert references is not None, "the pairs lack references"
        sums = sums - references
    means = sums / counts
    if preference.loss == "orpo":
        means = means.clamp(max=SURE)
        means = means - torch.log(-torch.expm1(means))
        return means[:, 0] - means[:, 1]
    compared = sums if preference.loss == "dpo" else means
    return preference.steepness * (compared[:, 0] - compared[:, 1])


def losses_of(preference: Preference, sums: Tensor, counts: Tensor, references: Tensor | None) -> Tensor:
    """Returns the losses of pairs (P,); the arguments are those of `margins`."""
    m, likelihood = margins_of(preference, sums, counts, references), preference.likelihood
    if preference.loss == "ipo":
        found = (m / preference.steepness - 1 / (2 * preference.steepness)) ** 2
    elif preference.loss == "orpo":
        found, likelihood = -preference.steepness * F.logsigmoid(m), 1.0
    else:
        m = m if preference.loss == "dpo" else m - (1.0 if preference.margin is None else preference.margin)
        found = -(1 - preference.smoothing) * F.logsigmoid(m) - preference.smoothing * F.logsigmoid(-m)
    return found if likelihood == 0 else found - likelihood * sums[:, 0] / counts[:, 0]
