"""From a Hugging Face config.json to a DecoderSpec, one reader per family.

Missing keys take the defaults of that family's transformers configuration class; an explicit null means what it does
there. Sizes that define the model have no default.
"""

from dataclasses import replace

from engine.models.fields import Config, index, items, number, size
from engine.models.ropes import exact_positions, rope_spec
from engine.models.spec import DecoderSpec, MoeSpec, UnsupportedModel


def llama_spec(config: Config) -> DecoderSpec:
    """Llama: RMSNorm, rotary grouped attention, SwiGLU; biases where the config asks for them."""
    bias = bool(config.get("attention_bias", False))
    spec = _block(config, positions=2048)
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def mistral_spec(config: Config) -> DecoderSpec:
    """Mistral: Llama's block with a sliding window on every layer, unless it is null."""
    spec = _block(config, kv_heads=8, positions=4096 * 32)
    return replace(spec, windows=(_window(config, 4096, spec),) * spec.layers)


def mixtral_spec(config: Config) -> DecoderSpec:
    """Mixtral: Mistral with a mixture of experts in every layer, their weights always normalised."""
    spec = _block(config, kv_heads=8, positions=4096 * 32, eps=1e-5, theta=1e6)
    moe = _moe(config, spec.intermediate_size, experts=8, per_token=2, normalize=True)
    windows = (_window(config, None, spec),) * spec.layers
    return replace(spec, windows=windows, moe=moe, sparse=(True,) * spec.layers)


def qwen2_spec(config: Config) -> DecoderSpec:
    """Qwen2 and Qwen2.5: biases on query, key and value always; windows by layer type."""
    spec = _block(config, kv_heads=32, positions=32768)
    return replace(spec, qkv_bias=True, windows=_windows_by_type(config, spec))


def qwen3_spec(config: Config) -> DecoderSpec:
    """Qwen3: RMSNorm on every query and key head; windows by layer type."""
    spec = _block(config, kv_heads=32, positions=32768, head_dim=128)
    return replace(_qwen3(config, spec), windows=_windows_by_type(config, spec))


def qwen3_moe_spec(config: Config) -> DecoderSpec:
    """Qwen3-MoE: Qwen3's attention; a mixture in every `decoder_sparse_step`-th layer not named in mlp_only_layers."""
    spec = _block(config, kv_heads=4, positions=32768)
    moe = _moe(
        config,
        size(config, "moe_intermediate_size", 768),
        experts=128,
        per_token=8,
        normalize=bool(config.get("norm_topk_prob", False)),
    )
    every, dense = size(config, "decoder_sparse_step", 1), items(config, "mlp_only_layers", int) or []
    sparse = tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(spec.layers))
    window = _window(config, 4096, spec) if config.get("use_sliding_window", False) else 0
    spec = replace(_qwen3(config, spec), windows=(window,) * spec.layers, sparse=sparse)
    return replace(spec, moe=moe if any(sparse) else None)


def classifier_spec(spec: DecoderSpec, config: Config) -> DecoderSpec:
    """The same decoder with a sequence classification head. Two unnamed labels when the config says nothing."""
    named, pad = config.get("id2label"), config.get("pad_token_id")
    if named is not None and (not isinstance(named, dict) or set(named) != {str(label) for label in range(len(named))}):
        raise UnsupportedModel("config.json: id2label must name the labels 0, 1, 2, …")
    count = len(named) if named else size(config, "num_labels", 2)
    labels = tuple(str(named[str(label)]) if named else f"LABEL_{label}" for label in range(count))
    return replace(spec, labels=labels, pad_token=pad if isinstance(pad, int) else None)


def _block(
    config: Config,
    *,
    positions: int,
    kv_heads: int | None = None,
    eps: float = 1e-6,
    theta: float = 10000.0,
    head_dim: int | None = None,
) -> DecoderSpec:
    """What all families share; the keyword arguments are the family's defaults (kv_heads None: as many as heads)."""
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {config['hidden_act']!r} is not supported; supported: silu")
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    groups = size(config, "num_key_value_heads", heads if "num_key_value_heads" in config else kv_heads or heads)
    if heads % groups:
        raise UnsupportedModel(f"{heads} attention heads cannot share {groups} key-value heads evenly")
    width = size(config, "head_dim", head_dim or hidden // heads)
    if width % 2:
        raise UnsupportedModel(f"heads of {width} dimensions cannot rotate in pairs; head_dim must be even")
    context = size(config, "max_position_embeddings", positions)
    rope = rope_spec(config, width, theta, context)
    return DecoderSpec(
        architecture=str(config["architectures"][0]),
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=groups,
        head_dim=width,
        norm_eps=number(config, "rms_norm_eps", eps),
        max_positions=exact_positions(rope, context),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


def _qwen3(config: Config, spec: DecoderSpec) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    return replace(spec, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _moe(config: Config, intermediate: int, *, experts: int, per_token: int, normalize: bool) -> MoeSpec:
    total = size(config, "num_local_experts", size(config, "num_experts", experts))
    chosen = size(config, "num_experts_per_tok", per_token)
    if chosen > total:
        raise UnsupportedModel(f"{chosen} experts per token cannot be chosen from {total}")
    return MoeSpec(total, chosen, intermediate, normalize)


def _window(config: Config, default: int | None, spec: DecoderSpec) -> int:
    """Tokens a token sees; 0 when there is no window or the context never outgrows it."""
    if config.get("sliding_window", default) is None:
        return 0
    window = size(config, "sliding_window", default)
    return window if window < spec.max_positions else 0


def _windows_by_type(config: Config, spec: DecoderSpec) -> tuple[int, ...]:
    """Per layer, from `layer_types` or, before transformers had those, from the first windowed layer's number."""
    sliding = bool(config.get("use_sliding_window", False)) and config.get("sliding_window", 4096) is not None
    first = index(config, "max_window_layers", 28)
    kinds = ("full_attention", "sliding_attention")
    types = items(config, "layer_types", str) or [kinds[sliding and layer >= first] for layer in range(spec.layers)]
    if len(types) != spec.layers:
        raise UnsupportedModel(f"config.json: layer_types names {len(types)} layers, there are {spec.layers}")
    odd = sorted(set(types) - set(kinds))
    if odd:
        raise UnsupportedModel(f"layer type {odd[0]!r} is not supported; supported: {', '.join(kinds)}")
    if "sliding_attention" in types and not sliding:
        raise UnsupportedModel("layer_types asks for sliding_attention, but use_sliding_window is off")
    return tuple(_window(config, 4096, spec) if kind == "sliding_attention" else 0 for kind in types)
