"""The model against transformers, with float64 as the judge, and against itself: cached, packed, batched."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, document_mask, in_float64, make_folder
from transformers import AutoConfig, AutoModelForCausalLM

from litpeft.model.attention import Documents, attend
from litpeft.model.build import build
from litpeft.model.context import Context, KVCache
from litpeft.model.gpt import GPT

GPT2 = {"vocab_size": 320, "n_embd": 64, "n_inner": 112, "n_layer": 2, "n_head": 4, "n_positions": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rotary(share: float, **rope: object) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": share, **rope}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def longrope(original: int, numbers: int = 8, **rope: object) -> dict:
    """Returns rotary positions that change beyond a length."""
    short, long = [1.0 + 0.1 * i for i in range(numbers)], [2.0 + 0.7 * i for i in range(numbers)]
    factors = {"short_factor": short, "long_factor": long, "factor": 8.0}
    return {"rope_type": "longrope", "original_max_position_embeddings": original} | factors | rope


GEMMA = {"pad_token_id": 0, "head_dim": 32}
GEMMA4 = GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 320,
}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
}
SCALES = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
}
GRANITE4 = {
    "model_type": "granitemoehybrid",
    "layer_types": ["attention"] * 2,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
} | SCALES
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
}
FALCON_H1 = {
    "model_type": "falcon_h1",
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "lm_head_multiplier": 0.7,
    "embedding_multiplier": 5.0,
    "mlp_multipliers": [0.8, 1.3],
    "key_multiplier": 0.4,
    "attention_out_multiplier": 1.6,
    "attention_in_multiplier": 1.2,
    "ssm_multipliers": [0.5, 1.5, 0.625, 1.75, 0.875],  # which transformers rounds to float32
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.9,
    "pad_token_id": 0,
}
LFM2_MOE = {
    "model_type": "lfm2_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "tie_word_embeddings": False,
}
NEMOTRON_H = {
    "model_type": "nemotron_h",
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 10,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}
GLM4_MOE = {
    "model_type": "glm4_moe",
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
}
ERNIE_MOE = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 48,
    "moe_num_shared_experts": 2,
    "head_dim": 16,
}
FAMILY_CASES = {  # the first of each family is also tested in training and answers, see tiny_families.py
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2, tied, no window": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 32,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text",
        "layer_types": ["full_attention", "linear_attention"],
        "head_dim": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 32,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen2_moe, a window, no biases, shares of 1": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
        "use_sliding_window": True,
        "sliding_window": 8,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "mlp_only_layers": [1],
    },
    "qwen3_moe, a layer without, shares of 1": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "head_dim": 16,
        "swiglu_limit": 0.6,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe, clipped": {"model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 3, "clip_qkv": 0.2},
    "gemma4_text": {"model_type": "gemma4_text", "num_kv_shared_layers": 2, "use_double_wide_mlp": True} | GEMMA4,
    "gemma4_text, values are keys, few global heads": {
        "model_type": "gemma4_text",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 5.0,
    }
    | GEMMA4
    | {"hidden_size_per_layer_input": 0},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2} | GEMMA,
    "gemma3_text, scaled, of no round size": {
        "model_type": "gemma3_text",
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 20,
        "sliding_window": 8,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "head_dim": 20,
    },
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 20} | GEMMA,
    "gemma2, caps that are reached": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 0.3,
        "final_logit_softcapping": 0.4,
    }
    | GEMMA,
    "gemma": {"model_type": "gemma"} | GEMMA,
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 9} | rotary(0.5),
    "phi3, longrope": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 32,
        "rope_parameters": longrope(32),
    },
    "phi": {"model_type": "phi"},
    "phi, norms of queries and keys": {"model_type": "phi", "qk_layernorm": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "pad_token_id": 0},
    "smollm3, windows": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
        "pad_token_id": 0,
    },
    "olmo3": {"model_type": "olmo3", "sliding_window": 8, "num_hidden_layers": 4, "rope_scaling": YARN},
    "olmo2": {"model_type": "olmo2"},
    "olmo": {"model_type": "olmo", "clip_qkv": 0.2},
    "granite": {"model_type": "granite"} | SCALES,
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 3} | SCALES,
    "granitemoehybrid": GRANITE4 | MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 4},
    "granitemoehybrid, Mamba with limits and biases": GRANITE4
    | MAMBA
    | {
        "layer_types": ["attention", "mamba"],
        "time_step_limit": [0.3, 0.9],
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
    },
    "granitemoehybrid, rope": GRANITE4 | {"num_local_experts": 4, "position_embedding_type": "rope"},
    "granitemoehybrid, no experts, tied": GRANITE4 | {"position_embedding_type": "rope", "tie_word_embeddings": True},
    "granitemoehybrid, no positions": GRANITE4 | {"attention_bias": True, "num_experts_per_tok": 0},
    "ministral3": {
        "model_type": "ministral3",
        "pad_token_id": 0,
        "head_dim": 16,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1},
    },
    "ministral3, its own positions": {"model_type": "ministral3", "sliding_window": 8},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "glm4_moe": GLM4_MOE | {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1},
    "glm4_moe, Air": GLM4_MOE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "norm_topk_prob": False},
    "glm4": {"model_type": "glm4", "pad_token_id": 0, "head_dim": 16},
    "glm": {"model_type": "glm", "pad_token_id": 0, "head_dim": 16, "attention_bias": False},
    "falcon": {"model_type": "falcon"},
    "falcon, new, two norms": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, new, one norm": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "bias": True,
    },
    "falcon, serial": {"model_type": "falcon", "multi_query": False, "parallel_attn": False, "bias": True},
    "bamba": MAMBA | {"model_type": "bamba", "attn_layer_indices": [1], "pad_token_id": 0},
    "bamba, biases": MAMBA
    | {"model_type": "bamba", "attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True, "pad_token_id": 0},
    "falcon_h1": FALCON_H1 | {"mamba_rms_norm": True},
    "falcon_h1, norm after the gate, biases": FALCON_H1
    | {
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "projectors_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "falcon_h1, no norm, tied": FALCON_H1 | {"mamba_proj_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True},
    "stablelm, parallel": {"model_type": "stablelm", "use_parallel_residual": True},
    "stablelm, norms of each head": {"model_type": "stablelm", "qk_layernorm": True},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
    }
    | LATENT,
    "deepseek_v3, yarn, plain queries, whole halves": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "attention_bias": True,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    }
    | LATENT,
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }
    | LATENT,
    "deepseek_v2, groups, plain queries": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.0,
    }
    | LATENT,
    "lfm2": {
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "conv_bias": True,
        "block_multiple_of": 16,
        "tie_word_embeddings": False,
    },
    "lfm2_moe": LFM2_MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2_moe, no bias": LFM2_MOE
    | {
        "layer_types": ["full_attention", "conv"],
        "num_dense_layers": 0,
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    },
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 8},
    "cohere2": {"model_type": "cohere2", "sliding_window": 8, "sliding_window_pattern": 2, "pad_token_id": 0},
    "cohere": {"model_type": "cohere", "use_qk_norm": True, "pad_token_id": 0},
    "cohere, no norms of queries and keys": {"model_type": "cohere", "attention_bias": True, "pad_token_id": 0},
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 5000.0},
    },
    "exaone4": {"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": 2},
    "exaone4, no window": {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32, "attention_out_bias": True, "mlp_bias": True},
    "apertus": {
        "model_type": "apertus",
        "attention_bias": True,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 500000.0},
    },
    "apertus, another activation": {"model_type": "apertus", "hidden_act": "relu2"},
    "ernie4_5_moe": ERNIE_MOE | {"moe_layer_start_index": 1},
    "ernie4_5_moe, large shares, none shared": ERNIE_MOE
    | {"moe_layer_end_index": 0, "moe_layer_start_index": 0, "moe_num_shared_experts": 0, "moe_norm_min": 0.6},
    "ernie4_5": {"model_type": "ernie4_5", "use_bias": True, "head_dim": 16},
    "nemotron_h": NEMOTRON_H | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
    "nemotron_h, biases, no experts": NEMOTRON_H
    | {"layers_block_type": ["mlp", "full_attention", "linear_attention"], "use_bias": True, "mlp_bias": True},
    "nemotron": {"model_type": "nemotron", "attention_bias": True},
}
CASES = {
    "grouped queries": {},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 32},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 500000.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral with a window": {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": 9},
    "gpt_neox, parallel, a quarter rotates": {"model_type": "gpt_neox"},
    "gpt_neox, serial, all rotates": {"model_type": "gpt_neox", "use_parallel_residual": False} | rotary(1.0),
    "gpt_neox, tied, no attention bias": {
        "model_type": "gpt_neox",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
    },
    "gpt_neox, rope linear": {"model_type": "gpt_neox"} | rotary(0.5, rope_type="linear", factor=4.0),
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
    "yarn": {"rope_parameters": YARN},
    "yarn, kept size": {"rope_parameters": YARN | {"attention_factor": 0.9, "truncate": False, "beta_fast": 8.0}},
    "longrope within": {"rope_parameters": longrope(64)},
    "longrope beyond": {"rope_parameters": longrope(32)},
    **FAMILY_CASES,
    "gpt2": {"model_type": "gpt2"},
    "gpt2, untied": {"model_type": "gpt2", "tie_word_embeddings": False, "activation_function": "relu"},
}


def reference(changes: dict, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {**GPT2, "bos_token_id": 1, "eos_token_id": 1} if changes.get("model_type") == "gpt2" else TINY
    config = AutoConfig.for_model(**{"model_type": "llama", **sizes, "initializer_range": 0.1} | changes)
    config._experts_implementation = "eager"  # their fast ones take no float64
    return randomise(AutoModelForCausalLM.from_config(config)).to(dtype).eval()


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Draws biases, which start at zero, and norms, which start at one: neither would show a mistake.

    Also the buffers that files hold.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0 if name == "weight" else 0.0, 0.2)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                torch.nn.init.normal_(buffer, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_logits_equal_transformers(case: str, dtype: torch.dtype, limit: float, tmp_path) -> None:
    theirs = reference(CASES[case], dtype)
    theirs.save_pretrained(tmp_path)
    if dtype == torch.float64:
        theirs = in_float64(theirs)
    ours = build(tmp_path, dtype)
    ids = torch.randint(0, TINY["vocab_size"], (2, 48))
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids)
    assert (want - got).abs().max() <= limit * max(1.0, float(want.abs().max()))


def test_gradients_equal_transformers(tmp_path) -> None:
    theirs = in_float64(reference({"tie_word_embeddings": True}, torch.float64))
    theirs.save_pretrained(tmp_path)
    ours = build(tmp_path, torch.float64).requires_grad_(True)
    ids = torch.randint(0, TINY["vocab_size"], (1, 32))
    torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:]).backward()
    (ours(ids, at=torch.arange(31), targets=ids[0, 1:]) / 31).backward()
    want = theirs.model.embed_tokens.weight.grad
    assert torch.allclose(ours.embed.weight.grad, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(ours.blocks[0].attn.k.weight.grad, theirs.model.layers[0].self_attn.k_proj.weight.grad)


@pytest.mark.parametrize("window", [None, 6])
def test_cached_decoding_equals_the_full_forward(tiny_folder, window: int | None) -> None:
    base = build(tiny_folder, torch.float64)
    model = GPT(replace(base.config, window=window)).double()
    model.load_state_dict(base.state_dict())
    ids = torch.randint(0, TINY["vocab_size"], (2, 20))
    with torch.no_grad():
        want = model(ids)
        cache = [KVCache(2, 20, model.config, torch.float64, "cpu") for _ in model.blocks]
        got = []
        for start, end in ((0, 9), (9, 10), (10, 14), (14, 20)):
            pos = torch.arange(start, end).expand(2, -1)
            got.append(model(ids[:, start:end], Context(pos, cache=cache, end=end)))
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-10)


def test_packed_logits_equal_those_of_each_document_alone(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64)
    lengths = (7, 70, 1, 9, 68, 64)
    ids = torch.randint(0, TINY["vocab_size"], (1, sum(lengths)))
    with torch.no_grad():
        packed = model(ids, Context.packed(lengths, ids.device, None))
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    assert (packed - alone).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_document_leaves_the_others_bit_identical(tiny_folder, dtype: torch.dtype) -> None:
    model = build(tiny_folder, dtype)
    lengths = (20, 30, 25)
    ids = torch.randint(0, TINY["vocab_size"], (1, 75))
    other = ids.clone()
    other[:, 20:50] = torch.randint(0, TINY["vocab_size"], (1, 30))
    with torch.no_grad():
        a, b = (model(x, Context.packed(lengths, ids.device, None)) for x in (ids, other))
    assert torch.equal(a[:, :20], b[:, :20])
    assert torch.equal(a[:, 50:], b[:, 50:])
    assert not torch.equal(a[:, 20:50], b[:, 20:50])


@pytest.mark.parametrize("window", [None, 5])
def test_attention_by_length_equals_the_masked_reference(window: int | None) -> None:
    torch.manual_seed(0)
    documents = Documents((3, 66, 10, 64, 1, 65))
    q, k, v = (torch.randn(1, heads, 209, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mask = document_mask(documents.lengths, window)[None, None]
    grad = torch.randn(1, 4, 209, 8, dtype=torch.float64)
    got = attend(q, k, v, mask=None, documents=documents, window=window)
    got_grads = torch.autograd.grad(got, (q, k, v), grad)
    want = attend(q, k, v, mask=mask, documents=None, window=None)
    want_grads = torch.autograd.grad(want, (q, k, v), grad)
    assert torch.allclose(got, want, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got_grads, want_grads, strict=True))


def test_activation_checkpointing_changes_no_gradient(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64).requires_grad_(True)
    ids = torch.randint(0, TINY["vocab_size"], (1, 40))
    grads = []
    for recompute in ("none", "cheap", "block", "offload"):
        model.recompute = recompute
        model.zero_grad()
        model(ids, Context.packed((15, 25), ids.device, None), at=torch.arange(39), targets=ids[0, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_the_loss_equals_cross_entropy_of_all_logits_over_several_chunks(tiny_folder) -> None:
    model: GPT = build(tiny_folder, torch.float64).requires_grad_(True)
    ids = torch.randint(0, TINY["vocab_size"], (2, 301))
    at = torch.arange(602)[torch.arange(602) % 301 != 300]
    loss = model(ids, at=at, targets=ids[:, 1:].flatten())
    want = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    got_grad, want_grad = (torch.autograd.grad(x, model.head.weight)[0] for x in (loss, want))
    assert torch.allclose(loss, want, rtol=1e-12)
    assert torch.allclose(got_grad, want_grad, atol=1e-10)


def test_tied_embeddings_are_one_parameter_and_ignore_a_stored_copy(tmp_path) -> None:
    folder = make_folder(tmp_path / "tied", tie_word_embeddings=True)
    model = build(folder, torch.float32)
    assert "head.weight" not in model.state_dict()
    assert model.head.dense() is model.embed.weight
