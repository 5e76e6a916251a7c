"""A tiny model of every causal class that the installed transformers knows.

``names()`` lists the model types that ``AutoModelForCausalLM`` maps to a class, ``build(name)`` makes one of them on the CPU
from random numbers, and ``NOT_TINY`` says why the others are omitted. Sizes come from one table of settings by name, and from a
table of what a model needs beyond it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64

# Settings with the same name in many configurations. A model gets those in its configuration.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 8,
    # encoders and decoders, and the names of other families
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 64,
    "n_layers": 2,
    "n_heads": 2,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 24,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    # recurrent layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "state_size": 8,
    "chunk_size": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "moe_shared_expert_intermediate_size": 8,
    "shared_experts_intermediate_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "rotary_dim": 4,
    # towers of images and sound
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "encoder_seq_length": 8,
    "audio_embed_dim": 16,
}

# What a model needs beyond SIZES, or instead of it.
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 2}  # every head has its own latent
MODELS: dict[str, dict[str, Any]] = {
    "axk2": _LATENT,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "codegen": {"rotary_dim": 4},
    "bailing_hybrid": {**_MIXED, **_LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "blt": {
        "encoder_hash_byte_group_vocab": 16,
        "encoder_hash_byte_group_size": [3],
        "local_attention_window_len": 8,
        "encoder_config": {"hidden_size_global": 16, "num_key_value_heads": 2},
        "decoder_config": {"hidden_size_global": 16, "num_key_value_heads": 2},
    },
    "cpmant": {"dim_head": 8, "dim_ff": 24, "prompt_length": 4, "position_bias_num_buckets": 16, "segment_types": 3},
    "ctrl": {"dff": 24},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _LATENT,
    "deepseek_v4": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
    },
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 2},
        "vision_config": {"mlp_layer_types": ["dense", "sparse"], "adapter_in_dim": 16, "adapter_out_dim": 16},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 16},
    },
    "dots3_note_text": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32},
    "flint": {"mlp_only_layers": [0], "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    "gemma4": {
        "vision_config": {"position_embedding_size": 16},
        "audio_config": {"output_proj_dims": 16, "subsampling_conv_channels": [8, 8]},
    },
    "gemma4_assistant": {
        "backbone_hidden_size": 16,
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16, "pooling_kernel_size": 1}
    },
    "gemma4_unified_assistant": {"backbone_hidden_size": 16},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "got_ocr2": {"vision_config": {"output_channels": 8, "mlp_dim": 24, "window_size": 2, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MIXED,
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
        "d_rel": 4,
        "rel_extent": 16,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_gate_rank": 4,
    },
    "inkling2_text": {
        "n_layers_per_attn_res_block": 1,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "d_rel": 4,
        "rel_extent": 16,
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
        "d_rel": 4,
        "rel_extent": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], **_LATENT},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"], "num_hidden_layers": 3},
    "longcat_flash": {
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 4,
        **_LATENT,
    },
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "input_size": 16,
            "bias_max_distance": 8,
        },
        "vision_config": {"crop_size": 16},
    },
    "prophetnet": {
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 2,
        "num_decoder_attention_heads": 2,
    },
    "qwen3_5": {"text_config": _MIXED},
    "qwen3_5_moe": {"text_config": _MIXED},
    "qwen3_5_moe_text": _MIXED,
    "qwen3_5_text": _MIXED,
    "qwen3_next": _MIXED,
    "qwen4_exp": {"text_config": {"hc_count": 2, "hc_lowrank": 4}},
    "qwen4_exp_text": {"hc_count": 2, "hc_lowrank": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16, "attention_window_size": 8},
    "reformer": {
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
        "attention_head_size": 8,
        "feed_forward_size": 24,
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [8, 8],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
    },
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "xlnet": {"d_inner": 24},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}

_WHOLE = "transformers hands its causal class the configuration of the whole, where it wants the decoder's"
NOT_TINY: dict[str, str] = {
    "gemma3n": "its vision tower is a model of the package timm",
    "musicgen": _WHOLE,
    "musicgen_melody": _WHOLE,
}


def names() -> list[str]:
    """Model types that ``AutoModelForCausalLM`` can make, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(name: str) -> PreTrainedConfig:
    """A tiny configuration of the model type ``name``."""
    return _config(CONFIG_MAPPING[name], MODELS.get(name, {}))


def build(name: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of the type ``name``, float32, in evaluation mode; the same bits every time.

    Args:
        name: one of :func:`names`.
        settings: of the configuration (of its text part where it has one), beyond those of the tables.

    Raises:
        KeyError: the model cannot be built at a tiny size; ``NOT_TINY`` says why.
    """
    if name in NOT_TINY:
        raise KeyError(f"{name}: {NOT_TINY[name]}")
    config = _config(CONFIG_MAPPING[name], {**MODELS.get(name, {}), **settings})
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _config(kind: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedConfig:
    fields = fields_of(kind)
    chosen = {name: value for name, value in SIZES.items() if name in fields} | settings
    for part, inner in _parts(kind).items():
        own = chosen.pop(part, {})
        if part == "text_config":  # the vocabulary of a wrapper
            own = {name: chosen.pop(name) for name in list(settings) if name in fields_of(inner) - fields} | own
        chosen[part] = _config(inner, own).to_dict()
    with _quiet():
        return kind(**chosen)


def _parts(kind: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Classes of the nested configurations."""
    defaults = getattr(kind, "sub_configs_defaults", {})  # ambiguous in older versions of transformers
    return {
        part: CONFIG_MAPPING[defaults[part].model_type] if inner is AutoConfig else inner
        for part, inner in kind.sub_configs.items()
        if inner is not AutoConfig or part in defaults
    }


@cache
def fields_of(kind: type[PreTrainedConfig]) -> frozenset[str]:
    """Names of the settings of a configuration class."""
    return frozenset(inspect.signature(kind.__init__).parameters) | frozenset(kind.attribute_map)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on odd settings to itself: at a tiny size nearly all are."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
