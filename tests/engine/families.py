"""A small random model of every architecture the engine runs, written as transformers writes it; also its oracle."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0 + pair / 8 for pair in range(8)],
    "long_factor": [4.0] * 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Case(NamedTuple):
    """An architecture with overrides of SHAPE; `fused` saves experts in one tensor, as transformers 5 holds them."""

    architecture: str
    options: Mapping[str, Any] = MappingProxyType({})
    fused: bool = False


CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM"),
    "llama_one_kv_head_tied": Case("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_biases": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case("MistralForCausalLM", {"sliding_window": None}),
    "mistral_window": Case("MistralForCausalLM", {"sliding_window": 21, "head_dim": 32}),
    "qwen2": Case("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_later_layers_windowed": Case(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "qwen3_layer_types": Case(
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": Case("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_fused_windowed": Case(
        "MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 30}, fused=True
    ),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", {**MOE, "head_dim": 32, "mlp_only_layers": [0]}),
    "qwen3_moe_normalized_every_second": Case(
        "Qwen3MoeForCausalLM", {**MOE, "norm_topk_prob": True, "decoder_sparse_step": 2}
    ),
    "qwen3_moe_fused_windowed": Case(
        "Qwen3MoeForCausalLM", {**MOE, "use_sliding_window": True, "sliding_window": 17}, fused=True
    ),
    "llama_classifier": Case("LlamaForSequenceClassification", {"num_labels": 2}),
    "mistral_classifier": Case("MistralForSequenceClassification", {"id2label": {0: "no", 1: "yes"}}),
    "qwen2_classifier": Case("Qwen2ForSequenceClassification", {"num_labels": 3, "pad_token_id": 0}),
    "qwen3_classifier": Case("Qwen3ForSequenceClassification", {"num_labels": 1, "head_dim": 16}),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_betas": {**YARN, "original_max_position_embeddings": 128, "beta_fast": 10.0, "beta_slow": 0.3},
    "yarn_untruncated": {
        **YARN,
        "original_max_position_embeddings": 128,
        "beta_fast": 10.0,
        "beta_slow": 0.3,
        "truncate": False,
    },
    "yarn_attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn_mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4},
    "longrope": LONGROPE,
    "longrope_attention_factor": {**LONGROPE, "attention_factor": 1.2},
}


def write_model(directory: Path, case: Case, seed: int = 0) -> PreTrainedModel:
    """Save a random model of this case; returns it, for its own answers."""
    family = case.architecture.split("For")[0]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **case.options})
    model: PreTrainedModel = getattr(transformers, case.architecture)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "mlp.gate." in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(directory, save_original_format=not case.fused)
    return model


@torch.inference_mode()
def expected(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What transformers computes for every token: logits [tokens, vocabulary] or scores [tokens, labels]."""
    ids = torch.tensor([token_ids])
    if hasattr(model, "score"):
        return model.score(model.model(ids).last_hidden_state)[0]
    return model(ids).logits[0]


def some_tokens(count: int, seed: int = 1) -> list[int]:
    """Random token ids; never 0, which a classifier may take for padding."""
    return torch.randint(1, 160, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
