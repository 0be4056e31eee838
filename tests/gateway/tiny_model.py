"""A tokenizer and, for tests that need real tokens, random weights: small enough to make for every session."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CONTROL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% if tools %}<|user|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 32, 2, 4, 2, 1024


def make_vocabulary() -> dict[str, int]:
    """Control tokens, then the letters a to z, then every other byte, as byte-level BPE writes them."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    return {token: index for index, token in enumerate([*CONTROL, *letters, *others])}


def write_tokenizer(directory: Path) -> int:
    """A tokenizer of single bytes with its chat template. Returns the vocabulary's size."""
    vocabulary = make_vocabulary()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    options = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(options))
    return len(vocabulary)


def write_model(directory: Path) -> Path:
    """A Llama with random weights beside its tokenizer, as Hugging Face lays it out."""
    import torch
    from safetensors.torch import save_file

    vocabulary = write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens": (vocabulary, HIDDEN), "lm_head": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj": (HIDDEN, HIDDEN), f"{prefix}.self_attn.k_proj": (kv, HIDDEN),
            f"{prefix}.self_attn.v_proj": (kv, HIDDEN), f"{prefix}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj": (2 * HIDDEN, HIDDEN), f"{prefix}.mlp.up_proj": (2 * HIDDEN, HIDDEN),
            f"{prefix}.mlp.down_proj": (HIDDEN, 2 * HIDDEN),
        }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    # One feature is always on and rules out all but letters: answers are text and do not end early by chance.
    weights["model.embed_tokens.weight"][:, 0] = 10
    weights["lm_head.weight"][:, 0] = -20
    weights["lm_head.weight"][5:31, 0] = 0
    norms = [f"model.layers.{layer}.{name}" for layer in range(LAYERS)
             for name in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    weights |= {f"{name}.weight": torch.ones(HIDDEN) for name in [*norms, "model.norm"]}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(directory / "model.safetensors"))
    return directory
