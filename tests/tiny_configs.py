"""Shrinks the config of any transformers model type: one table of sizes, one of exceptions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

NUM_LAYERS = 3
VOCAB_SIZE = 128

# Sizes differ from one another so that a swapped axis cannot pass unseen, and are multiples of
# four because grouped_mm wants strides of 16 bytes.
SIZES: dict[str, int] = {
    "vocab_size": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "num_hidden_layers": NUM_LAYERS,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window": 8,
    "rel_extent": 16,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 8,
    # feed-forward
    "intermediate_size": 40,
    "dense_intermediate_size": 44,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 20,
    "shared_expert_intermediate_size": 20,
    "shared_experts_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "moe_hidden_size": 28,
    "router_hidden_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # towers that text never visits
    "depth": 1,
    "encoder_layers": 1,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "mlp_dim": 40,
    "output_channels": 8,
    "downsample_hidden_size": 8,
    "projector_hidden_size": 20,
    "projection_intermediate_size": 20,
    "projection_hidden_dim": 20,
} | dict.fromkeys(
    (
        "hidden_size",
        "d_model",
        "out_hidden_size",
        "output_dim",
        "text_hidden_size",
        "adapter_in_dim",
        "adapter_input_size",
        "adapter_out_dim",
    ),
    32,
)

# Grouped routers sum the best two of a group: four experts a group leave a choice.
GROUPED_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}

MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}

# What is special about a config, keyed by its own model type, nested ones included.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"logit_scale": 1.0},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [8, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_lora_rank": 12,
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 20,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "moe_intermediate_size": 24,
        "global_head_dim": 32,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "glm4v_moe_text": {"head_dim": 16, "rope_parameters": MROPE | {"partial_rotary_factor": 0.5}},
    "glm5_next_text": {"index_kpool": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_audio": {"n_mel_bins": 8},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "muse_spark_audio": {
        "patch_sizes": [2, 2, 2],
        "hidden_sizes": [8, 8, 16],
        "depths": [1, 1, 1],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [8, 32]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of `model_type` with every size it has shrunk, nested configs included."""
    return _shrink(CONFIG_MAPPING[model_type])


def _shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    defaults = vars(config_class())
    aliases = config_class.attribute_map
    # A size that is unset by default switches its part off; experts are wanted in any case.
    changes: dict[str, Any] = {
        field.name: SIZES[field.name]
        for field in fields(config_class)
        if field.name in SIZES and (defaults[aliases.get(field.name, field.name)] or "expert" in field.name)
    }
    if "n_group" in changes:
        changes |= {name: GROUPED_EXPERTS[name] for name in GROUPED_EXPERTS.keys() & changes}
    if defaults.get("num_key_value_heads") == defaults.get("num_attention_heads"):
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in defaults.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = _shrink(type(value))
        elif isinstance(value, list) and len(value) == defaults.get("num_hidden_layers"):
            changes[name] = _shorten(value)
    return config_class(**changes | OVERRIDES.get(config_class.model_type, {}))


def _shorten(per_layer: list[Any]) -> list[Any]:
    """Every distinct value once, in order, then the last of them until NUM_LAYERS are there."""
    distinct = [value for i, value in enumerate(per_layer) if value not in per_layer[:i]]
    return (distinct + distinct[-1:] * NUM_LAYERS)[:NUM_LAYERS]
