"""A tiny model, and for each switch of ModelConfig a value away from its default, by its type."""

from dataclasses import MISSING, Field, fields
from typing import Any

from litpeft.core.kinds import alternatives, choices
from litpeft.model.config import ClampedGate, Experts, Latent, Layer, LayerInputs, ModelConfig, QueryGrowth, RopeScaling

CONFIG = ModelConfig(
    vocab_size=320, d_model=48, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16, d_ff=40, max_positions=128
)
VALUES = {int: 6, float: 0.1, RopeScaling: RopeScaling("linear", 4.0), Experts: Experts(4, 2, 24)}
VALUES |= {ClampedGate: ClampedGate(1.7, 0.5), LayerInputs: LayerInputs(320, 6), Latent: Latent(12, 8, 10, 6, 16)}
VALUES |= {tuple[Layer, ...]: (Layer(window=6),), QueryGrowth: QueryGrowth(0.5, 6)}
VALUES |= {tuple[float, float]: (0.5, 2.0)}


def away(field: Field) -> Any:
    """Returns a value of a field that is not its default; of a type that has none here, a KeyError names it."""
    if isinstance(field.default, bool):
        return not field.default
    allowed = [value for value in choices(field.type) if value != field.default]
    return allowed[0] if allowed else VALUES[alternatives(field.type)[0]]


AWAY = {field.name: away(field) for field in fields(ModelConfig) if field.default is not MISSING}
