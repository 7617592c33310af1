"""A tiny model, and for each switch of ModelConfig a value away from its default."""

from litpeft.model.config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    vocab_size=320, d_model=48, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16, d_ff=40, max_positions=128
)
AWAY = {  # of the defaults of ModelConfig
    "norm": "layer",
    "norm_eps": 0.1,
    "rotary_dim": 8,
    "rope_theta": 100.0,
    "rope_scaling": RopeScaling("linear", 4.0),
    "learned_positions": True,
    "tie_embeddings": True,
    "activation": "gelu",
    "gated_mlp": False,
    "parallel_residual": True,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "window": 7,
}
