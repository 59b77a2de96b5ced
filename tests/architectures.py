"""Tiny, randomly initialised models of every text-generating architecture of the installed transformers.

A tiny configuration is the default one with its sizes lowered: `SIZES` says to what, by the name of the key.
What no rule can know stands in `SPECIAL`, by model class.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

TASKS = (
    "CAUSAL_IMAGE_MODELING",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "TEXT_TO_WAVEFORM",
)
VOCABULARY = 320  # its last tokens stand for images and the like
HEADS = 4
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# No value is raised. Attention must have something to leave out within 48 tokens: windows, chunks and
# selected blocks are shorter than that.
SIZES = {
    key: size
    for size, keys in {
        64: """
            adapter_in_dim adapter_input_size attention_hidden_size audio_hidden_size backbone_hidden_size
            cross_attention_hidden_size cross_hidden_size d_model decoder_dim decoder_hidden_size dim
            dim_model_base emb_dim embed_dim embedding_dim embedding_size encoder_hidden_size hidden_dim
            hidden_size hidden_size_global image_text_hidden_size image_token_embed_dim
            input_embedding_size lru_width mamba_d_ssm merged_hidden_size mlp_dim n_embd out_hidden_size
            output_embedding_size output_hidden_size output_proj_dims ple_embed_dim projection_dim
            projection_hidden_size projector_hidden_size projector_input_dim projector_output_dim
            text_hidden_size thinker_hidden_size vision_hidden_size vision_output_dim word_embed_proj_dim
        """,
        96: """
            alignment_intermediate_size d_ff decoder_ffn_dim dense_intermediate_size dff dim_ff
            encoder_ffn_dim expert_ffn_hidden_size feed_forward_size ffn_dim ffn_hidden_size
            intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size n_inner
            projection_intermediate_size share_expert_dim shared_expert_intermediate_size
            shared_experts_intermediate_size speech_encoder_intermediate_size t2u_decoder_ffn_dim
            t2u_encoder_ffn_dim
        """,
        32: """
            base_channels codebook_dim codebook_size hidden_size_per_layer_input kv_lora_rank
            lang_embed_dim moe_intermediate_size num_embeddings o_lora_rank q_lora_rank router_hidden_size
            shared_intermediate_size spkr_embed_dim unit_embed_dim
        """,
        16: """
            attention_chunk_size attention_head_dim attention_head_size attention_window
            attention_window_size cross_head_dim d_head d_kv dim_head global_head_dim head_dim
            index_block_size index_head_dim keep_window_size kv_channels linear_head_dim
            linear_key_head_dim linear_value_head_dim local_attention mamba_d_head mamba_d_state
            qk_nope_head_dim qk_rope_head_dim resampler_dim_head resampler_head_dim rotary_dim
            sliding_window sliding_window_size ssm_state_size state_size swa_head_dim time_step_rank
            v_head_dim window_size
        """,
        8: "index_topk mamba_n_heads mamba_num_heads n_mamba_heads",
        4: """
            attention_heads conf_num_attention_heads cross_num_attention_heads cross_num_key_value_heads
            decoder_attention_heads decoder_num_attention_heads decoder_num_key_value_heads
            encoder_attention_heads encoder_num_attention_heads encoder_num_key_value_heads index_n_heads
            linear_num_heads linear_num_value_heads moe_num_experts n_head n_heads n_routed_experts
            num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts
            num_filters num_heads num_local_experts num_sliding_attention_heads resampler_heads
            resampler_n_heads speech_encoder_attention_heads swa_num_attention_heads
            t2u_decoder_attention_heads t2u_encoder_attention_heads zero_expert_num
        """,
        2: """
            conf_num_hidden_layers decoder_layers decoder_num_hidden_layers depth encoder_layers
            encoder_num_hidden_layers index_topk_blocks layers linear_num_key_heads moe_k moe_top_k
            moe_topk n_layer n_layers num_blocks num_decoder_layers num_encoder_layers num_experts_per_tok
            num_experts_per_token num_hidden_layers num_layers resampler_depth speech_encoder_layers
            swa_num_key_value_heads t2u_decoder_layers t2u_encoder_layers top_k_experts
        """,
        1: """
            first_k_dense_replace moe_num_shared_experts n_group n_shared_experts num_dense_layers
            num_expert_group num_shared_experts topk_group
        """,
        VOCABULARY: """
            decoder_vocab_size encoder_hash_byte_group_vocab shape_vocab_size src_vocab_size
            tgt_vocab_size vocab_size vocab_size_per_layer_input
        """,
        512: "max_position_embeddings max_seq_len n_ctx n_positions",
    }.items()
    for key in keys.split()
}

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 96,
}
_DOTS3 = {
    "head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 300}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": _SECTIONS}},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": {"full_attention": _SECTIONS}}
    },
    "CsmForConditionalGeneration": {"codec_config": {"upsample_groups": 64}},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "global_head_dim": 32,
        }
    },
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3NoteForCausalLM": _DOTS3,
    "Dots3NoteForConditionalGeneration": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64},
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 300, "<|extra_200|>": 301}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [3, 3, 2]}}
    },
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "embed_dim": (64,) * 4,
            "num_heads": (4,) * 4,
            "num_groups": (4,) * 4,
            "depths": (1,) * 4,
        }
    },
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 16}},
    "Gemma3nForCausalLM": _SHARED_KEYS,
    "Gemma4ForCausalLM": {"global_head_dim": 32},
    "Gemma4ForConditionalGeneration": {"text_config": {"global_head_dim": 32}},
    "Gemma4UnifiedForCausalLM": {"global_head_dim": 32},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {"global_head_dim": 32}},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {
                **_SECTIONS,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"index_kpool": 4}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "GradiumPhononTTSForConditionalGeneration": {"flow_head_config": {"condition_dim": 64}},
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/4",
    },
    "GraniteMoeHybridForCausalLM": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config": {"upsample_groups": 64}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MiniMaxM3SparseForConditionalGeneration": {
        "text_config": {"layer_types": ["full_attention", "minimax_m3_sparse"]}
    },
    "MiniMaxM3VLForCausalLM": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 4},
    "MuseSparkForConditionalGeneration": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": (64,) * 4, "depths": (1,) * 4}
    },
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "PocketTTSForConditionalGeneration": {"flow_head_config": {"condition_dim": 64}},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "vision_start_token_id": 310,
        "text_config": {"rope_parameters": _SECTIONS},
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 310},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {"text_config": _INDEXER},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "SpeechT5ForSpeechToText": {"vocab_size": VOCABULARY},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 16}},
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "ZambaForCausalLM": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    **{
        name: {"text_config": {"rope_parameters": _SECTIONS}}
        for name in (
            "Glm46VForConditionalGeneration",
            "Glm4vForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
            "HunYuanVLForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
        )
    },
}

_TIMM = "its image tower is timm's, which is not installed"
_NO_FORWARD = "it has no forward pass of its own; its thinker stands in this table"
_DRAFT = "a draft model that reads the keys and values of another model"
NOT_RUN = {
    "FastVlmForConditionalGeneration": _TIMM,
    "Gemma3nForConditionalGeneration": _TIMM,
    "PerceptionLMForConditionalGeneration": _TIMM,
    "Qwen2_5OmniForConditionalGeneration": _NO_FORWARD,
    "Qwen3OmniMoeForConditionalGeneration": _NO_FORWARD,
    "Gemma4AssistantForCausalLM": _DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFT,
}

# No calls with a cache: they need positions that only `generate` prepares.
NO_STEPS = {
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def architectures() -> dict[str, str]:
    """Every model class of transformers' mappings for text generation, and a model type that leads to it."""
    found: dict[str, str] = {}
    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for model_type, names in mapping.items():
            for name in names if isinstance(names, (tuple, list)) else (names,):
                # Those that speak in one pass generate no tokens.
                if task != "TEXT_TO_WAVEFORM" or name.endswith("ForConditionalGeneration"):
                    found.setdefault(name, model_type)
    return found


def build(name: str) -> transformers.PreTrainedModel:
    """A tiny model of a class, in eval mode; the same one each time."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[architectures()[name]]
    default = config_class()
    given = tiny(default, SPECIAL.get(name, {}))
    if hasattr(default, "is_decoder") and not default.is_encoder_decoder:
        given["is_decoder"] = True  # encoders of old, which also come as decoders
    config = config_class(**given)
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = model_class._from_config(config).eval()
    return model


def tiny(default: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a tiny configuration of the default one's class; `changes` has the last word."""
    declared = [field.name for field in fields(default)]
    held = vars(default)
    given: dict[str, Any] = {}
    for key in declared:
        value = held.get(type(default).attribute_map.get(key, key))
        if isinstance(value, PreTrainedConfig):
            inner = tiny(value, changes.get(key, {}))
            given[key] = {"model_type": value.model_type, **inner}
        elif key in ("num_key_value_heads", "num_kv_heads"):
            few = value is not None and value != held.get("num_attention_heads", value)
            given[key] = min(value, 2) if few else HEADS
        elif key == "head_dim":
            given[key] = SIZES[key]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif key in SIZES:
            given[key] = min(value, SIZES[key])
        elif key.endswith(("_id", "_token_index")) and value >= VOCABULARY:
            given[key] = SPECIAL_TOKENS.get(key, VOCABULARY - 1 - len(given))
    given |= _layers(default, declared)
    given |= {key: value for key, value in changes.items() if not isinstance(given.get(key), dict)}
    return given | _rotary(default, given)


def _layers(default: PreTrainedConfig, declared: list[str]) -> dict[str, Any]:
    """One layer of each kind, at least two, where a configuration lists the kinds of its layers."""
    given: dict[str, Any] = {}
    count = 2
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = list(dict.fromkeys(vars(default).get(key) or ()))
        if key in declared and kinds:
            count = max(count, len(kinds))
            given[key] = kinds
    for kinds in given.values():
        kinds += kinds[-1:] * (count - len(kinds))
    return {"num_hidden_layers": count, **given} if given else {}


def _rotary(default: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding for images, which must add up to half of the rotated part of a head."""
    rotary = vars(default).get("rope_parameters")
    if "rope_parameters" in given or not isinstance(rotary, dict) or "mrope_section" not in rotary:
        return {}
    size = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    half = int(size * rotary.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    return {"rope_parameters": {**rotary, "mrope_section": [half - 2 * third, third, third]}}
