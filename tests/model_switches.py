"""A tiny model, and for each switch of ModelConfig a value away from its default."""

from dataclasses import fields

from litpeft.model.config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    vocab_size=320, d_model=48, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16, d_ff=40, max_positions=128
)
SWITCHED = {field.name: not field.default for field in fields(ModelConfig) if isinstance(field.default, bool)}
AWAY = SWITCHED | {  # of the defaults of ModelConfig
    "norm": "layer",
    "norm_eps": 0.1,
    "rotary_dim": 8,
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling("linear", 4.0),
    "activation": "gelu",
    "window": 7,
}
